"""A contact sheet: views of a few samples as networks see them, masks and boxes drawn, what was done written below."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from feedfast.data.annotations import Boxes, Masks
from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.data.steps import describe
from feedfast.data.views import ViewPlan
from feedfast.data.work import Work
from feedfast.errors import FeedfastError
from feedfast.report.page import Html
from feedfast.report.pictures import Viewed, boxes_drawn, overlay, viewed_html

__all__ = ["contact_sheet", "row_words"]

log = logging.getLogger(__name__)

SAMPLES, VIEWS = 3, 6


def row_words(work: Work, row: int, size: int) -> list[str]:
    """What a view does to one row: crop, flip, steps and mixing, those that do something."""
    geometry = work.geometry.rows(np.array([row]))
    words = []
    if geometry.boxed:
        top, left, height, width = geometry.box[0].tolist()
        words.append(f"crop {height}x{width} at {top},{left}")
    if geometry.overhung(size):
        (top, left), (height, width) = geometry.window[0].tolist(), geometry.resized[0].tolist()
        words.append(f"shown {min(height, size)}x{min(width, size)} at {max(-top, 0)},{max(-left, 0)}")
    if geometry.mirrored:
        words.append("flip")
    if work.program is not None:
        steps = zip(work.program.codes[row].tolist(), work.program.parameters[row], strict=True)
        words += [describe(code, parameters) for code, parameters in steps if code]
    if work.mixing is not None and work.mixing.weight[row] < 1:
        top, left, height, width = work.mixing.box[row].tolist()
        share = f"{1 - float(work.mixing.weight[row]):.0%} of another"
        words.append(f"{share} in a box {height}x{width} at {top},{left}" if height else f"{share} mixed in")
    return words or ["as for evaluation"]


def contact_sheet(data: Dataset, plan: ViewPlan, views: int) -> Html:
    """The first samples' views, with what was done to each; empty where the images cannot be shown.

    Args:
        data: the images.
        plan: how they are shown.
        views: how many there are; 0 = a new one every epoch.
    """
    shown = np.linspace(0, len(data) - 1, min(SAMPLES, len(data))).astype(np.int64)
    found: list[list[tuple[str, NDArray[np.uint8], list[str]]]] = [[] for _ in shown]
    try:
        with Loader(data, plan, batch_size=len(shown), threads=1) as loader:
            for view in range(min(views or VIEWS, VIEWS)):
                whole = loader.work(view)
                rows = _rows_of(whole.positions, shown)
                work = whole.rows(rows)
                batch = next(iter(loader.stream(view, rows)))
                for place, seen in enumerate(found):
                    seen.append((f"view {view}", _marked(batch, place, data), row_words(work, place, plan.size)))
    except FeedfastError as error:
        log.warning("contact sheet: images not shown: %s", error)
        return Html("")
    return viewed_html(
        [Viewed(data.name(position), views) for position, views in zip(shown.tolist(), found, strict=True)]
    )


def _marked(batch: Batch, row: int, data: Dataset) -> NDArray[np.uint8]:
    """An image of a batch, with its mask over it or its boxes drawn."""
    image: NDArray[np.uint8] = batch.images[row].numpy()
    if isinstance(data.marks, Masks):
        return overlay(image, batch.annotations[row].numpy(), len(data.classes))
    if isinstance(data.marks, Boxes):
        boxes, labels = (batch.annotations[row][key].numpy() for key in ("boxes", "labels"))
        return boxes_drawn(image, boxes, labels, data.classes)
    return image


def _rows_of(positions: NDArray[np.int64], shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of a view in which samples lie."""
    row_of = np.empty(len(positions), np.int64)
    row_of[positions] = np.arange(len(positions))
    rows: NDArray[np.int64] = row_of[shown]
    return rows
