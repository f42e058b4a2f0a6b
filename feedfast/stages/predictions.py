"""What a trained dense student says of a few validation images, next to the truth, and any student's maps next to the
teachers', before and after training.

The images are the same for every run on the same data: evenly spaced through the validation images. Maps are those of
the first rows of view 0, whose targets the source has; a student of logits alone has none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.models.taps import Tapped, logits_of
from feedfast.report.page import Html, joined
from feedfast.report.pictures import Detected, Mapped, Segmented, detected_html, mapped_html, segmented_html
from feedfast.stages.sampling import on_grid
from feedfast.stages.source import Source
from feedfast.tasks import Detect, Segment, Task
from feedfast_kernels import Sampled, Target, as_float

__all__ = ["maps_html", "predictions_html"]

SHOWN = 4  # images
MAPPED, TAPS = 2, 3  # rows, and maps per network


@torch.no_grad()
def predictions_html(
    student: nn.Module, normalize: nn.Module, loader: Loader, task: Task, classes: Sequence[str]
) -> Html:
    """Truth and predictions next to each other; empty for classification.

    Args:
        student: the bare network; left in evaluation mode.
        normalize: uint8 pixels [B, H, W, 3] → what the network takes.
        loader: validation images.
        task: what was learned.
        classes: names by number, of the training images; validation may have fewer.
    """
    if not isinstance(task, (Segment, Detect)):
        return Html("")
    data = loader.dataset
    shown = np.unique(np.linspace(0, len(data) - 1, min(SHOWN, len(data))).astype(np.int64))
    student.eval()
    segmented: list[Segmented] = []
    detected: list[Detected] = []
    for batch in loader.evaluation(shown):
        output, truths = logits_of(student(normalize(batch.images))), batch.annotations
        places = np.searchsorted(data.ids, batch.ids).tolist()
        if isinstance(task, Segment):
            for place, truth, said in zip(places, truths, task.predictions(output, truths), strict=True):
                segmented.append(Segmented(data.name(place), _image(data, place), _array(truth["mask"]), _array(said)))
        else:
            for place, truth, seen in zip(places, truths, task.detections(output, truths), strict=True):
                own = (_array(truth[key]) for key in ("boxes", "labels"))
                found = (_array(seen[key]) for key in ("boxes", "labels", "scores"))
                detected.append(Detected(data.name(place), _image(data, place), *own, *found))
    return joined([segmented_html(segmented, classes), detected_html(detected, classes)])


@torch.no_grad()
def maps_html(
    tapped: Tapped, before: Tapped | None, normalize: nn.Module, source: Source, data: Dataset, rows: int
) -> Html:
    """Maps of the same pixels in every teacher and the student; empty without targets that are maps.

    Args:
        tapped: the student with the taps its methods read; left in evaluation mode.
        before: the same with the weights it started from; None where they are not to be had.
        normalize: uint8 pixels [B, H, W, 3] → what it takes.
        source: gives pixels and targets.
        data: the training images, for their names.
        rows: of a batch: teachers on batch statistics say something else of a smaller one.
    """
    names = [tap for infos in source.taps.values() for tap, info in infos.items() if len(info.shape) == 3]
    wanted = [tap for tap in dict.fromkeys(names) if tap in tapped.shapes][:TAPS]
    if not wanted:
        return Html("")
    batch = next(iter(source.batches(0, np.arange(rows), rows)))
    students = {"student before training": before, "student after training": tapped}
    said = {}
    for name, student in students.items():
        if student is not None:
            student.eval()
            _, said[name] = student(normalize(batch.images[:MAPPED]))
    samples = []
    for row, sample in enumerate(np.searchsorted(data.ids, batch.ids[:MAPPED]).tolist()):
        maps: dict[str, dict[str, NDArray[Any]]] = {}
        for tap in wanted:
            theirs = {f"teacher {name}": found[tap] for name, found in batch.targets.items() if tap in found}
            maps[tap] = {name: _map(values, row) for name, values in theirs.items()}
            maps[tap] |= {name: _array(found[tap][row].float()) for name, found in said.items()}
        samples.append(Mapped(data.name(sample), _array(batch.images[row]), maps))
    return mapped_html(samples)


def _map(values: Target | Sampled, row: int) -> NDArray[Any]:
    """A row of a target as [C, H, W]; where it is sampled, with what is not stored masked."""
    if isinstance(values, Sampled):
        one = slice(row, row + 1)
        whole: NDArray[Any] = on_grid(as_float(values.values)[one], values.positions[one], values.grid)[0]
        return whole
    return _array(as_float(values)[row])


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().cpu().numpy()
    return found


def _image(data: Dataset, position: int) -> NDArray[np.uint8]:
    """A whole image at its own resolution, uint8 [H, W, 3]."""
    if data.pixels_store is not None:
        return np.asarray(data.pixels([position])[0])
    with Image.open(io.BytesIO(data.encoded([position])[0].tobytes())) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
