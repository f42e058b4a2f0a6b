"""From a plan to the numbers the pixel pipeline is given: box, resize, window and flip of every sample.

One chain of four steps serves training and evaluation: cut a box out of the source image (it may leave the image: that
part is black), resize the box, cut a ``size`` x ``size`` window out of the result, mirror. A step that would change
no pixel of any sample is left out of the pipeline, which moves no pixel either: a resize to the same size is exact.

Evaluation follows torchvision: resize the shorter side, then ``CenterCrop``. An image that is ``size`` x ``size``
already is not resized. Else the shorter side becomes ``round(size * 256 / 224)``, except where training uses
``pad-crop-flip``: that shows the whole shorter side at ``size``, and evaluation must show objects at the same scale.
Units are pixels; heights come before widths. No DALI here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feedfast.data.views import ViewPlan

__all__ = ["Geometry", "evaluation_geometry", "view_geometry"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Per sample, in the order in which samples are loaded (n rows).

    Attributes:
        image: int32 [n, 2], height and width of the source.
        box: int32 [n, 4], top, left, height, width in the source.
        resized: int32 [n, 2], size the box is resized to.
        window: int32 [n, 2], top and left of the output inside the resized box.
        flip: int32 [n], 1 = mirrored left to right.
    """

    image: NDArray[np.int32]
    box: NDArray[np.int32]
    resized: NDArray[np.int32]
    window: NDArray[np.int32]
    flip: NDArray[np.int32]

    @property
    def boxed(self) -> bool:
        """Whether any box is not the whole image."""
        return bool(np.any(self.box[:, :2]) or np.any(self.box[:, 2:] != self.image))

    @property
    def padded(self) -> bool:
        """Whether any box leaves its image."""
        return bool(np.any(self.box[:, :2] < 0) or np.any(self.box[:, :2] + self.box[:, 2:] > self.image))

    @property
    def scaled(self) -> bool:
        """Whether any box changes size."""
        return bool(np.any(self.resized != self.box[:, 2:]))

    def windowed(self, size: int) -> bool:
        """Whether any resized box is larger than the output."""
        return bool(np.any(self.resized != size))

    @property
    def mirrored(self) -> bool:
        """Whether any sample is mirrored."""
        return bool(np.any(self.flip))

    def rows(self, rows: NDArray[np.int64]) -> Geometry:
        """The same for some of the samples."""
        return Geometry(self.image[rows], self.box[rows], self.resized[rows], self.window[rows], self.flip[rows])


def view_geometry(plan: ViewPlan, view: int, ids: NDArray[np.uint32], sizes: NDArray[np.int32]) -> Geometry:
    """What one view does to each sample.

    Args:
        plan: the view plan; ``augment="none"`` gives the evaluation geometry.
        view: which view.
        ids: sample ids [n].
        sizes: height and width of each [n, 2].
    """
    if plan.augment == "none":
        return evaluation_geometry(plan, sizes)
    n = len(ids)
    resized = np.full((n, 2), plan.size, dtype=np.int32)
    window = np.zeros((n, 2), dtype=np.int32)
    return Geometry(sizes, plan.crops(view, ids, sizes), resized, window, plan.flips(view, ids).astype(np.int32))


def evaluation_geometry(plan: ViewPlan, sizes: NDArray[np.int32]) -> Geometry:
    """Resize and central crop of each sample; nothing random.

    Args:
        plan: gives the output size, and with its augmentation the scale.
        sizes: height and width of each [n, 2].
    """
    image = sizes.astype(np.int64)
    short = image.min(axis=1, keepdims=True)
    side = plan.size if plan.augment == "pad-crop-flip" else round(plan.size * 256 / 224)
    resized = np.where(image == short, side, side * image // short)  # torchvision cuts the longer side down to whole
    resized = np.where((image == plan.size).all(axis=1, keepdims=True), image, resized)
    window = np.rint((resized - plan.size) / 2.0)
    n = len(sizes)
    box = np.concatenate([np.zeros((n, 2), dtype=np.int32), sizes.astype(np.int32)], axis=1)
    return Geometry(sizes, box, resized.astype(np.int32), window.astype(np.int32), np.zeros(n, dtype=np.int32))
