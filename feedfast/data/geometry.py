"""From a plan to the numbers the pixel pipeline is given: box, resize, window and flip of every sample.

One chain of four steps serves training and evaluation: cut a box out of the source image (it may leave the image: that
part is black), resize the box, cut a ``size`` x ``size`` window out of the result (it may leave that: the plan's
``fill``), mirror. A step that would change no pixel of any sample is left out of the pipeline, which moves no pixel
either: a resize to the same size is exact.

Evaluation follows torchvision: resize the shorter side, then ``CenterCrop``. An image that is ``size`` x ``size``
already is not resized. Else the shorter side becomes ``round(size * 256 / 224)``, except where training uses
``pad-crop-flip``: that shows the whole shorter side at ``size``, and evaluation must show objects at the same scale.
Dense tasks see the whole image: segmentation in a square on its longer side, detection squashed as SSD has it.
Units are pixels; heights come before widths. No DALI here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feedfast.data.views import BoxesPerSample, ViewPlan

__all__ = ["Geometry", "Task", "evaluation_geometry", "view_geometry"]

Task = Literal["classify", "segment", "detect"]

# Windows that may leave the image by far (SSD's canvas is 16 times the image): only what they show of it is cut and
# resized, and the rest filled in afterwards. Elsewhere it is filled in before, and stays so: caches hold those bytes.
_FILLED_AFTER = ("scale-crop-flip", "expand-crop-flip")


@dataclass(frozen=True, eq=False)
class Geometry:
    """Per sample, in the order in which samples are loaded (n rows).

    Attributes:
        image: int32 [n, 2], height and width of the source.
        box: int32 [n, 4], top, left, height, width in the source.
        resized: int32 [n, 2], size the box is resized to.
        window: int32 [n, 2], top and left of the output inside the resized box; negative where it begins outside.
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
        """Whether any resized box is not the output already."""
        return bool(np.any(self.resized != size))

    def overhung(self, size: int) -> bool:
        """Whether any output shows more than the resized box."""
        return bool(np.any(self.window < 0) or np.any(self.window + size > self.resized))

    @property
    def mirrored(self) -> bool:
        """Whether any sample is mirrored."""
        return bool(np.any(self.flip))

    def rows(self, rows: NDArray[np.int64]) -> Geometry:
        """The same for some of the samples."""
        return Geometry(self.image[rows], self.box[rows], self.resized[rows], self.window[rows], self.flip[rows])


def view_geometry(
    plan: ViewPlan,
    view: int,
    ids: NDArray[np.uint32],
    sizes: NDArray[np.int32],
    boxes: BoxesPerSample | None = None,
    task: Task = "classify",
) -> Geometry:
    """What one view does to each sample.

    Args:
        plan: the view plan; ``augment="none"`` gives the evaluation geometry.
        view: which view.
        ids: sample ids [n].
        sizes: height and width of each [n, 2].
        boxes: of each sample, where the plan needs them.
        task: what the samples are annotated for.
    """
    if plan.augment == "none":
        return evaluation_geometry(plan, sizes, task)
    box, flip = plan.crops(view, ids, sizes, boxes), plan.flips(view, ids).astype(np.int32)
    if plan.augment in _FILLED_AFTER:
        return _inside(sizes, box, flip, plan.size)
    n = len(ids)
    resized = np.full((n, 2), plan.size, dtype=np.int32)
    return Geometry(sizes, box, resized, np.zeros((n, 2), dtype=np.int32), flip)


def _inside(sizes: NDArray[np.int32], box: NDArray[np.int32], flip: NDArray[np.int32], size: int) -> Geometry:
    """Windows cut down to the image; the image's edges come to lie on whole pixels of the output."""
    corner, extent = box[:, :2].astype(np.int64), box[:, 2:].astype(np.int64)
    low = corner.clip(0, sizes - 1)
    high = np.minimum(corner + extent, sizes).clip(low + 1)
    first, last = ((2 * (edge - corner) * size + extent) // (2 * extent) for edge in (low, high))  # the nearest
    first = first.clip(0, size - 1)  # what is shown of an image is never less than a pixel
    last = last.clip(first + 1, size)
    shown = np.concatenate([low, high - low], axis=1).astype(np.int32)
    return Geometry(sizes, shown, (last - first).astype(np.int32), (-first).astype(np.int32), flip)


def evaluation_geometry(plan: ViewPlan, sizes: NDArray[np.int32], task: Task = "classify") -> Geometry:
    """What evaluation sees of each sample; nothing random.

    Args:
        plan: gives the output size, and with its augmentation the scale.
        sizes: height and width of each [n, 2].
        task: classification resizes and crops the center; segmentation shows the image in the upper left of a square
            on its longer side (black outside), detection the image squashed to the square.
    """
    n = len(sizes)
    if task != "classify":
        extent = sizes if task == "detect" else np.repeat(sizes.max(axis=1, keepdims=True), 2, axis=1)
        none = np.zeros((n, 2), dtype=np.int32)
        whole = np.concatenate([none, extent.astype(np.int32)], axis=1)
        return Geometry(sizes, whole, np.full((n, 2), plan.size, dtype=np.int32), none, np.zeros(n, dtype=np.int32))
    image = sizes.astype(np.int64)
    short = image.min(axis=1, keepdims=True)
    side = plan.size if plan.augment == "pad-crop-flip" else round(plan.size * 256 / 224)
    resized = np.where(image == short, side, side * image // short)  # torchvision cuts the longer side down to whole
    resized = np.where((image == plan.size).all(axis=1, keepdims=True), image, resized)
    window = np.rint((resized - plan.size) / 2.0)
    box = np.concatenate([np.zeros((n, 2), dtype=np.int32), sizes.astype(np.int32)], axis=1)
    return Geometry(sizes, box, resized.astype(np.int32), window.astype(np.int32), np.zeros(n, dtype=np.int32))
