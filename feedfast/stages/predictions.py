"""What a trained dense student says of a few validation images, next to the truth, and its maps next to the teachers'.

The images are the same for every run on the same data: evenly spaced through the validation images. Maps are those of
the first rows of view 0, whose targets the source has; a classifier's report has neither.
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
from feedfast.report.pictures import Detected, Mapped, Segmented, detected_html, mapped_html, segmented_html
from feedfast.stages.source import Source
from feedfast.tasks import Detect, Segment, Task
from feedfast_kernels import as_float

__all__ = ["maps_html", "predictions_html"]

SHOWN = 4  # images
MAPPED, TAPS = 2, 3  # rows, and maps per network


@torch.no_grad()
def predictions_html(
    student: nn.Module, normalize: nn.Module, loader: Loader, task: Task, classes: Sequence[str]
) -> str:
    """A section of the report; empty for classification.

    Args:
        student: the bare network; left in evaluation mode.
        normalize: uint8 pixels [B, H, W, 3] → what the network takes.
        loader: validation images.
        task: what was learned.
        classes: names by number, of the training images; validation may have fewer.
    """
    if not isinstance(task, (Segment, Detect)):
        return ""
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
    title = "Validation images"
    return segmented_html(title, segmented, classes) + detected_html(title, detected, classes)


@torch.no_grad()
def maps_html(tapped: Tapped, normalize: nn.Module, source: Source, data: Dataset, rows: int) -> str:
    """A section with maps of the same pixels in every teacher and the student; empty without targets that are whole.

    Args:
        tapped: the student with the taps its methods read; left in evaluation mode.
        normalize: uint8 pixels [B, H, W, 3] → what it takes.
        source: gives pixels and targets.
        data: the training images, for their names.
        rows: of a batch: teachers on batch statistics say something else of a smaller one.
    """
    names = [tap for infos in source.taps.values() for tap, info in infos.items() if len(info.stored) == 3]
    wanted = [tap for tap in dict.fromkeys(names) if tap in tapped.shapes][:TAPS]
    if not wanted:
        return ""
    batch = next(iter(source.batches(0, np.arange(rows), rows)))
    tapped.eval()
    _, ours = tapped(normalize(batch.images[:MAPPED]))
    samples = []
    for row, sample in enumerate(np.searchsorted(data.ids, batch.ids[:MAPPED]).tolist()):
        maps: dict[str, NDArray[Any]] = {}
        for tap in wanted:
            theirs = {name: targets[tap] for name, targets in batch.targets.items() if tap in targets}
            maps |= {f"{name} {tap}": _array(as_float(values)[row]) for name, values in theirs.items()}
            maps[f"student {tap}"] = _array(ours[tap][row].float())
        samples.append(Mapped(data.name(sample), _array(batch.images[row]), maps))
    return mapped_html("Maps of teachers and student", samples)


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().cpu().numpy()
    return found


def _image(data: Dataset, position: int) -> NDArray[np.uint8]:
    """A whole image at its own resolution, uint8 [H, W, 3]."""
    if data.pixels_store is not None:
        return np.asarray(data.pixels([position])[0])
    with Image.open(io.BytesIO(data.encoded([position])[0].tobytes())) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
