"""Average precision of detections, by pycocotools: COCO's mean over ten overlaps, at one half, and Pascal VOC 2007's.

Detections and truth are kept per image until the end, since precision ranks the detections of all images together.

pycocotools is an optional extra (``feedfast[detect]``). It prints as it goes; that is swallowed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.errors import RequestError

_COCO_KEEP = 100
"""COCO looks at so many detections per image and class."""


class Detecting(Protocol):
    """What makes detections of a network's output, and how many per image at most."""

    @property
    def keep(self) -> int:
        """Detections per image at most."""

    def detections(
        self, output: Mapping[str, Tensor], truth: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Per sample ``boxes`` [n, 4] in source pixels, ``scores`` [n] and ``labels`` [n], on the CPU."""


def require_pycocotools(where: str) -> None:
    """Raise a RequestError that begins with ``where`` unless pycocotools can be imported."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise RequestError(
            f"{where}: detectors are judged by pycocotools, which is not installed: pip install 'feedfast[detect]'"
        ) from None


class Precision:
    """Detections and truth of every image seen.

    Images are told apart by ``sample`` (an int64 scalar) where the truth has it: one that is seen twice counts once.
    Images without it are numbered as they come, ranks in turn.
    """

    def __init__(self, task: Detecting) -> None:
        self._task = task
        self._images: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, output: Mapping[str, Tensor], annotations: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep a batch's detections and truth.

        Args:
            output: the network's, as `feedfast.tasks.detect` says.
            annotations: per sample ``boxes`` float [k, 4], left, top, right, bottom in pixels of the source; ``labels``
                int64 [k]; ``difficult`` bool [k], to be neither found nor missed: VOC's difficult, COCO's crowds;
                ``size`` and ``box`` as `Detect.detections` reads them; and, if there is one, ``sample``.
        """
        for found, own in zip(self._task.detections(output, annotations), annotations, strict=True):
            number = int(own["sample"]) if "sample" in own else -1 - len(self._images)
            rows = (found["boxes"], found["scores"][:, None], found["labels"][:, None])
            true = (own["boxes"], own["labels"][:, None], own["difficult"][:, None])
            self._images.setdefault(number, (_columns(rows), _columns(true)))

    def state(self) -> dict[str, Tensor]:
        """``samples`` int64 [n]; ``found`` and ``true`` float64 [·, 6], of all of them in turn; how many each has."""
        found, true = ([pair[side] for pair in self._images.values()] for side in (0, 1))
        return {
            "samples": torch.tensor(list(self._images), dtype=torch.int64),
            "found": torch.cat([torch.zeros(0, 6, dtype=torch.float64), *found]),
            "found_counts": torch.tensor([len(rows) for rows in found], dtype=torch.int64),
            "true": torch.cat([torch.zeros(0, 6, dtype=torch.float64), *true]),
            "true_counts": torch.tensor([len(rows) for rows in true], dtype=torch.int64),
        }

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """All ranks' images; one that several have seen counts once."""
        images: dict[int, tuple[Tensor, Tensor]] = {}
        for rank, state in enumerate(states):
            found = torch.split(state["found"], state["found_counts"].tolist())
            true = torch.split(state["true"], state["true_counts"].tolist())
            for number, *rows in zip(state["samples"].tolist(), found, true, strict=True):
                # numbered as they came: ranks take images in turn, so the n-th of rank r of R is the (nR + r)-th of all
                own = number if number >= 0 else -1 - ((-1 - number) * len(states) + rank)
                images.setdefault(own, (rows[0], rows[1]))
        self._images = images

    def compute(self) -> dict[str, float | None]:
        """All in 0..1, means over the classes that have boxes other than difficult ones.

        Returns:
            ``ap``: COCO's, the mean over overlaps of 0.50 to 0.95 and 101 recalls; ``ap50``: the same at an overlap of
            0.50. Difficult boxes are treated as COCO's crowds: what lies in one by that share is left out. Of an image
            and class the best 100 count.
            ``ap50_voc07``: as the devkit of Pascal VOC 2007 counts: 11 recalls; a detection is right only about the box
            it overlaps most, and left out where that is a difficult one.
        """
        if not any((true[:, 5] == 0).any() for _, true in self._images.values()):
            return {"ap": None, "ap50": None, "ap50_voc07": None}
        coco = _coco_precision(self._images, _COCO_KEEP)
        voc = _voc_precision(self._images, self._task.keep)
        return {"ap": _mean(coco), "ap50": _mean(coco[0]), "ap50_voc07": _mean(voc)}


def _columns(columns: Sequence[Tensor]) -> Tensor:
    return torch.cat([column.cpu().double() for column in columns], 1)


def _mean(precision: NDArray[np.float64]) -> float | None:
    known = precision[precision > -1]  # -1: a class without boxes to find
    return float(known.mean()) if known.size else None


def _coco_precision(images: Mapping[int, tuple[Tensor, Tensor]], keep: int) -> NDArray[np.float64]:
    """[overlap, recall, class, 1, 1]"""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        return _run(COCOeval(*_indexed(images), "bbox"), keep)


def _voc_precision(images: Mapping[int, tuple[Tensor, Tensor]], keep: int) -> NDArray[np.float64]:
    """[1, recall, class, 1, 1]"""
    from pycocotools.cocoeval import COCOeval

    class DevkitEval(COCOeval):  # type: ignore[misc]
        """Matching as in VOCevaldet.m, which knows no crowds and asks only about the box that is overlapped most."""

        def computeIoU(self, imgId: int, catId: int) -> Any:
            true = self._gts[imgId, catId]
            crowds = [own["iscrowd"] for own in true]
            for own in true:
                own["iscrowd"] = 0
            ious = super().computeIoU(imgId, catId)
            for own, crowd in zip(true, crowds, strict=True):
                own["iscrowd"] = crowd
            if not len(ious):
                return ious
            best = ious.argmax(1)
            rows = np.arange(len(ious))
            only = np.zeros_like(ious)
            only[rows, best] = ious[rows, best]
            return only

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = DevkitEval(*_indexed(images), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.recThrs = np.linspace(0, 1, 11)
        return _run(evaluation, keep)


def _run(evaluation: Any, keep: int) -> NDArray[np.float64]:
    evaluation.params.maxDets = [keep]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision: NDArray[np.float64] = evaluation.eval["precision"]
    return precision


def _indexed(images: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Any, Any]:
    """Truth and detections as pycocotools' index."""
    from pycocotools.coco import COCO

    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    # by the size of the number: those given as they came count downwards from -1
    for image, number in enumerate(sorted(images, key=lambda number: (number < 0, abs(number)))):
        found, true = images[number]
        for left, top, right, bottom, label, difficult in true.tolist():
            rows[0].append(_row(image, left, top, right, bottom, label, iscrowd=int(difficult)))
        for left, top, right, bottom, probability, label in found.tolist():
            rows[1].append(_row(image, left, top, right, bottom, label, score=probability))
    indexes = []
    classes = {row["category_id"] for own in rows for row in own}
    for own in rows:
        for identity, row in enumerate(own, 1):  # 0 would read as "matched with nothing"
            row["id"] = identity
        index = COCO()
        index.dataset = {
            "images": [{"id": image} for image in range(len(images))],
            "categories": [{"id": number} for number in sorted(classes)],
            "annotations": own,
        }
        index.createIndex()
        indexes.append(index)
    return indexes[0], indexes[1]


def _row(image: int, left: float, top: float, right: float, bottom: float, label: float, **more: Any) -> dict[str, Any]:
    width, height = right - left, bottom - top
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [left, top, width, height],
        "area": width * height,
        **more,
    }
