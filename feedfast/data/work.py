"""Everything that is done to the samples of a view: geometry, steps, mixing, and what they are then labeled with.

One piece for all who show a view: the loader hands it to DALI, a stream of stored pixels takes the labels from it, a
contact sheet its words. It follows from plan and dataset alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast.data.annotations import Boxes, ClassLabels, Masks, MixedLabels
from feedfast.data.crops import Keep
from feedfast.data.dataset import Dataset
from feedfast.data.geometry import Geometry, view_geometry
from feedfast.data.mixing import Mixing
from feedfast.data.steps import CODE_OF, Program
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

__all__ = ["Work", "annotations_of", "boxes_of", "refuse_unfit", "truth_of", "view_work"]


@dataclass(frozen=True, eq=False)
class Work:
    """Rows to be made: where each sample lies in the dataset, and all that is done to it.

    ``partner`` is the same of the samples that these are mixed with, and has none itself. ``keep``: which boxes stay.
    """

    positions: NDArray[np.int64]
    geometry: Geometry
    program: Program | None = None
    mixing: Mixing | None = None
    partner: Work | None = None
    keep: Keep = "visible"

    def rows(self, rows: NDArray[np.int64]) -> Work:
        """The same for some of the rows."""
        return Work(
            self.positions[rows],
            self.geometry.rows(rows),
            None if self.program is None else self.program.rows(rows),
            None if self.mixing is None else self.mixing.rows(rows),
            None if self.partner is None else self.partner.rows(rows),
            self.keep,
        )


def view_work(plan: ViewPlan, data: Dataset, view: int) -> Work:
    """All rows of a view, in its order.

    Raises:
        RequestError: as of `refuse_unfit`.
    """
    refuse_unfit(plan, data.annotations)

    def own(ids: NDArray[np.uint32]) -> Work:
        positions = np.searchsorted(data.ids, ids)
        boxes = boxes_of(data, positions) if plan.needs_boxes else None
        geometry = view_geometry(plan, view, ids, data.sizes[positions], boxes, data.annotations.task)
        return Work(positions, geometry, plan.program(view, ids), keep=plan.keep)

    order = plan.order(view, data.ids)
    mixing = plan.mixing(view, order)
    if mixing is None:
        return own(order)
    return replace(own(order), mixing=mixing, partner=own(plan.partners(view, data.ids)))


def boxes_of(data: Dataset, positions: NDArray[np.integer[Any]]) -> list[NDArray[np.float32]] | None:
    """What `ViewPlan.crops` is told of some samples' boxes; None of data without any."""
    return data.annotations.of(positions) if isinstance(data.annotations, Boxes) else None


def refuse_unfit(plan: ViewPlan, annotations: ClassLabels | Boxes | Masks) -> None:
    """Nothing, if samples with such annotations can be shown as the plan says.

    Raises:
        RequestError: they have no boxes where windows are placed by them, or have boxes or masks that could not follow.
    """
    found = {"classify": "class labels", "segment": "masks", "detect": "boxes"}[annotations.task]
    if plan.needs_boxes and not isinstance(annotations, Boxes):
        raise RequestError(
            f"data.augment: expand-crop places its windows by boxes, this data has {found}; "
            "use scale-crop for masks, resized-crop for class labels"
        )
    if isinstance(annotations, ClassLabels):
        return
    if plan.mixing_operations:
        raise RequestError(f"data.augment: mixup and cutmix mix class labels, this data has {found}; leave them out")
    for operation in plan.pixel_operations:
        if CODE_OF["affine"] in operation.emits:
            raise RequestError(
                f"data.augment: {operation.op} moves pixels and the {found} of this data would not follow it; "
                "leave it out, or move both by a crop and flip"
            )


def annotations_of(data: Dataset, work: Work, size: int) -> Any:
    """What some rows are labeled with, as their pixels show it; `MixedLabels` where the plan mixes."""
    marks = data.annotations
    if isinstance(marks, Boxes):
        return marks.at(work.positions, work.geometry, size, work.keep)
    own = marks.at(work.positions, work.geometry, size)
    if work.partner is None or work.mixing is None:
        return own
    other = marks.at(work.partner.positions, work.partner.geometry, size)
    return MixedLabels(own, other, torch.from_numpy(work.mixing.weight))


def truth_of(data: Dataset, work: Work, size: int) -> Any:
    """What some rows of an evaluation are judged by: class numbers, or the `truth` of boxes or masks."""
    marks = data.annotations
    if isinstance(marks, ClassLabels):
        return marks.at(work.positions, work.geometry, size)
    return marks.truth(work.positions, work.geometry)
