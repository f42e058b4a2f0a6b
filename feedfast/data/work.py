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

from feedfast.data.annotations import ClassLabels, MixedLabels
from feedfast.data.dataset import Dataset
from feedfast.data.geometry import Geometry, view_geometry
from feedfast.data.mixing import Mixing
from feedfast.data.steps import Program
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

__all__ = ["Work", "annotations_of", "view_work"]


@dataclass(frozen=True, eq=False)
class Work:
    """Rows to be made: where each sample lies in the dataset, and all that is done to it.

    ``partner`` is the same of the samples that these are mixed with, and has none itself.
    """

    positions: NDArray[np.int64]
    geometry: Geometry
    program: Program | None = None
    mixing: Mixing | None = None
    partner: Work | None = None

    def rows(self, rows: NDArray[np.int64]) -> Work:
        """The same for some of the rows."""
        return Work(
            self.positions[rows],
            self.geometry.rows(rows),
            None if self.program is None else self.program.rows(rows),
            None if self.mixing is None else self.mixing.rows(rows),
            None if self.partner is None else self.partner.rows(rows),
        )


def view_work(plan: ViewPlan, data: Dataset, view: int) -> Work:
    """All rows of a view, in its order."""

    def own(ids: NDArray[np.uint32]) -> Work:
        positions = np.searchsorted(data.ids, ids)
        return Work(positions, view_geometry(plan, view, ids, data.sizes[positions]), plan.program(view, ids))

    order = plan.order(view, data.ids)
    mixing = plan.mixing(view, order)
    if mixing is None:
        return own(order)
    return replace(own(order), mixing=mixing, partner=own(plan.partners(view, data.ids)))


def annotations_of(data: Dataset, work: Work, size: int) -> Any:
    """What some rows are labeled with, as their pixels show it; `MixedLabels` where the plan mixes.

    Raises:
        RequestError: boxes or masks cannot be mixed.
    """
    marks = data.annotations
    own: Any = marks.at(work.positions, work.geometry, size)
    if work.partner is None or work.mixing is None:
        return own
    if not isinstance(marks, ClassLabels):
        raise RequestError(
            "data.augment: mixup and cutmix mix class labels, this data has boxes or masks; leave them out"
        )
    other = marks.at(work.partner.positions, work.partner.geometry, size)
    return MixedLabels(own, other, torch.from_numpy(work.mixing.weight))
