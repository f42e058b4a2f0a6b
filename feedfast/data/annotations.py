"""What samples are labeled with, and how it follows their pixels: class numbers, boxes, masks.

The geometry of a view (`feedfast.data.geometry`) moves pixels in four steps: cut a box out of the image, resize it, cut
a window, mirror. Boxes and masks go the same way, so that they fit the pixels of that view: boxes as one affine
function, masks pixel by pixel, nearest neighbor, since a mean of two class numbers is a third class. Class numbers
stay where they are.

Units are pixels; positions count samples of the dataset. Nothing here reads files or knows of DALI.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.data.crops import Keep
from feedfast.data.geometry import Geometry, Task

__all__ = [
    "IGNORE",
    "Boxes",
    "ClassLabels",
    "Masks",
    "MixedLabels",
    "move_boxes",
    "move_mask",
    "turn_boxes",
    "turn_mask",
]

IGNORE = 255
"""The class number of mask pixels that count in no loss: unknown, or outside the image."""


@dataclass(frozen=True, eq=False)
class ClassLabels:
    """One class per sample.

    Attributes:
        labels: int32 [n], -1 where there is none.
        classes: names by number; empty where there are none.
    """

    task: ClassVar[Task] = "classify"

    labels: NDArray[np.int32]
    classes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Sha256 (hex) over the class numbers in order."""
        return hashlib.sha256(self.labels.astype("<i4").tobytes()).hexdigest()

    def at(self, positions: NDArray[np.integer[Any]], geometry: Geometry, size: int) -> Tensor:
        """int64 [b] of some samples, however they are moved."""
        return torch.from_numpy(self.labels[positions].astype(np.int64))


@dataclass(eq=False)
class MixedLabels:
    """Two classes per image, of which each holds a share: what mixup and CutMix learn from.

    Attributes:
        first: int64 [B], the images' own class numbers, -1 where there is none.
        second: int64 [B], their partners'.
        weight: float32 [B], the first one's share, 0..1.
    """

    first: Tensor
    second: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedLabels:
        """The same on ``device``."""
        return MixedLabels(*(value.to(device, non_blocking=non_blocking) for value in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Boxes:
    """Any number of boxes per sample.

    Attributes:
        xyxy: float32 [boxes, 4], left, top, right, bottom in pixels of the source image, sample after sample.
        labels: int64 [boxes], class numbers.
        starts: int64 [n + 1]; the boxes of sample i are ``starts[i]`` to ``starts[i + 1]``.
        classes: names by number.
        least_visible: share of its area that a box must keep within the view; those below are left out.
        difficult: bool [boxes], those that count neither as found nor as missed; none by default.
        taught: whether difficult boxes are learned from: VOC's are objects, COCO's crowds are regions.
    """

    task: ClassVar[Task] = "detect"

    xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    classes: tuple[str, ...] = ()
    least_visible: float = 0.25
    difficult: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    taught: bool = True

    def __post_init__(self) -> None:
        if not len(self.difficult):
            object.__setattr__(self, "difficult", np.zeros(len(self.labels), dtype=np.bool_))

    def fingerprint(self) -> str:
        """Sha256 (hex) over boxes, class numbers, which are difficult, and which sample each belongs to."""
        digest = hashlib.sha256(self.xyxy.astype("<f4").tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        digest.update(self.difficult.astype("u1").tobytes())
        return digest.hexdigest()

    def of(self, positions: NDArray[np.integer[Any]]) -> list[NDArray[np.float32]]:
        """The boxes that are learned from of some samples, float32 [k, 4] each, in pixels of the source."""
        out = []
        for position in positions.tolist():
            own = self._own(position)
            out.append(self.xyxy[own] if self.taught else self.xyxy[own][~self.difficult[own]])
        return out

    def at(
        self, positions: NDArray[np.integer[Any]], geometry: Geometry, size: int, keep: Keep = "visible"
    ) -> list[dict[str, Tensor]]:
        """What torchvision's detectors learn from: per sample ``boxes`` float32 [k, 4] (xyxy) and ``labels`` int64 [k].

        Args:
            positions: samples [b].
            geometry: how each of them is moved, b rows.
            size: side of the square output in pixels.
            keep: which boxes stay: ``"visible"``, those of which the view shows ``least_visible``; ``"center"``, those
                whose center it shows.
        """
        out = []
        for row, position in enumerate(positions.tolist()):
            own = self._own(position)
            moved, visible = move_boxes(self.xyxy[own], geometry, row, size)
            kept = visible >= self.least_visible
            if keep == "center":
                center = _moved_corners(self.xyxy[own], geometry, row, size).mean(axis=1)
                kept = ((center > 0) & (center < size)).all(axis=1) & (moved[:, 2:] > moved[:, :2]).all(axis=1)
            kept &= self.taught | ~self.difficult[own]
            out.append({"boxes": torch.from_numpy(moved[kept]), "labels": torch.from_numpy(self.labels[own][kept])})
        return out

    def truth(self, positions: NDArray[np.integer[Any]], geometry: Geometry) -> list[dict[str, Tensor]]:
        """What detections are judged by, in pixels of the source: all boxes of a sample, wherever its view lies.

        Args:
            positions: samples [b].
            geometry: of the evaluation, b rows.

        Returns:
            Per sample ``boxes`` float32 [k, 4] xyxy, ``labels`` int64 [k], ``difficult`` bool [k], ``size`` int64 [2]
            (height, width of the source), and ``box`` int64 [4] (top, left, height, width of what the square shows).
        """
        out = []
        for row, position in enumerate(positions.tolist()):
            own = self._own(position)
            labels = torch.tensor(self.labels[own])
            difficult = torch.tensor(self.difficult[own])
            shown = {"size": geometry.image[row], "box": geometry.box[row]}
            out.append(
                {"boxes": torch.tensor(self.xyxy[own]), "labels": labels, "difficult": difficult}
                | {name: torch.from_numpy(value.astype(np.int64)) for name, value in shown.items()}
            )
        return out

    def _own(self, position: int) -> slice:
        return slice(int(self.starts[position]), int(self.starts[position + 1]))


@dataclass(frozen=True, eq=False)
class Masks:
    """One class per pixel.

    Attributes:
        read: position → uint8 [H, W], class numbers of the source image's pixels, `IGNORE` where there is none.
        digest: sha256 (hex) of all masks, by whoever opened them.
        classes: names by number.
    """

    task: ClassVar[Task] = "segment"

    read: Callable[[int], NDArray[np.uint8]]
    digest: str
    classes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """``digest``."""
        return self.digest

    def at(self, positions: NDArray[np.integer[Any]], geometry: Geometry, size: int) -> Tensor:
        """int64 [b, size, size], as cross-entropy takes them; parameters as of `Boxes.at`."""
        moved = [move_mask(self.read(at), geometry, row, size) for row, at in enumerate(positions.tolist())]
        return torch.from_numpy(np.stack(moved).astype(np.int64))

    def truth(self, positions: NDArray[np.integer[Any]], geometry: Geometry) -> list[dict[str, Tensor]]:
        """What maps are judged by: per sample ``mask`` uint8 [H, W] of the source, and ``box`` as of `Boxes.truth`."""
        return [
            {"mask": torch.tensor(self.read(at)), "box": torch.from_numpy(geometry.box[row].astype(np.int64))}
            for row, at in enumerate(positions.tolist())
        ]


def move_boxes(
    xyxy: NDArray[np.float32], geometry: Geometry, row: int, size: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Boxes of one sample in the coordinates of its view, clipped to it.

    Args:
        xyxy: float32 [k, 4] in pixels of the source image.
        geometry: of a batch.
        row: the sample's row in it.
        size: side of the square output in pixels.

    Returns:
        float32 [k, 4] within 0..size, and float64 [k], the share of each box's area that is within; a box without
        area counts as visible where it lies inside.
    """
    corners = _moved_corners(xyxy, geometry, row, size)
    clipped = corners.clip(0, size)
    whole, seen = (np.prod(boxes[:, 1] - boxes[:, 0], axis=1) for boxes in (corners, clipped))
    inside = ((corners >= 0) & (corners <= size)).all(axis=(1, 2)).astype(np.float64)
    visible = np.where(whole > 0, seen / np.where(whole > 0, whole, 1.0), inside)
    return clipped.reshape(-1, 4).astype(np.float32), visible


def _moved_corners(xyxy: NDArray[np.float32], geometry: Geometry, row: int, size: int) -> NDArray[np.float64]:
    """Upper left and lower right corners (x, y) of boxes in their view, [k, 2, 2], wherever they lie."""
    top, left, height, width = (int(value) for value in geometry.box[row])
    scale = np.array([geometry.resized[row][1] / width, geometry.resized[row][0] / height])  # x, y
    window = geometry.window[row][::-1].astype(np.float64)  # left, top
    corners: NDArray[np.float64] = (xyxy.astype(np.float64).reshape(-1, 2, 2) - (left, top)) * scale - window
    if geometry.flip[row]:
        corners[:, :, 0] = size - corners[:, ::-1, 0]
    return corners


def move_mask(mask: NDArray[np.uint8], geometry: Geometry, row: int, size: int) -> NDArray[np.uint8]:
    """A mask in the pixels of its sample's view; what lies outside the image is `IGNORE`.

    Args:
        mask: uint8 [H, W], class numbers of the source image's pixels.
        geometry: of a batch.
        row: the sample's row in it.
        size: side of the square output in pixels.

    Returns:
        uint8 [size, size]: of each pixel the source pixel that its center lies in (torch calls it nearest-exact).
    """
    box, resized, window = geometry.box[row], geometry.resized[row], geometry.window[row]
    at = [_sources(int(box[axis]), int(box[axis + 2]), int(resized[axis]), int(window[axis]), size) for axis in (0, 1)]
    columns = at[1][::-1] if geometry.flip[row] else at[1]
    rows_in, columns_in = (_within(index, extent) for index, extent in zip((at[0], columns), mask.shape, strict=True))
    out: NDArray[np.uint8] = mask[np.ix_(at[0].clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))]
    out[~rows_in] = IGNORE
    out[:, ~columns_in] = IGNORE
    return out


def _sources(start: int, extent: int, resized: int, window: int, size: int) -> NDArray[np.int64]:
    """Source index of each output pixel along one axis; may lie outside the image."""
    # center (i + 1/2) * extent / resized in whole numbers: floats would round where it lies on an edge
    index: NDArray[np.int64] = start + (2 * (np.arange(size) + window) + 1) * extent // (2 * resized)
    return index


def _within(index: NDArray[np.int64], extent: int) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (index >= 0) & (index < extent)
    return inside


_TURNS = {
    1: (False, False, False), 2: (True, False, False), 3: (True, True, False), 4: (False, True, False),
    5: (False, False, True), 6: (False, True, True), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
"""EXIF orientation → what makes a stored image upright: mirror left to right, top to bottom, then exchange axes."""


def turn_boxes(xyxy: NDArray[np.float64], orientation: int, height: int, width: int) -> NDArray[np.float64]:
    """Boxes in stored pixels, as the image is turned by its EXIF orientation.

    Args:
        xyxy: float64 [k, 4].
        orientation: 1 to 8.
        height: of the image as stored.
        width: of the image as stored.

    Returns:
        float64 [k, 4], left and top first.
    """
    across, down, exchanged = _TURNS[orientation]
    x, y = xyxy[:, [0, 2]], xyxy[:, [1, 3]]
    x = width - x[:, ::-1] if across else x
    y = height - y[:, ::-1] if down else y
    return np.stack([y, x] if exchanged else [x, y], axis=2).reshape(-1, 4)


def turn_mask(mask: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A mask in stored pixels, uint8 [H, W], as the image is turned by its EXIF orientation (1 to 8); contiguous."""
    across, down, exchanged = _TURNS[orientation]
    mask = mask[:, ::-1] if across else mask
    mask = mask[::-1] if down else mask
    return np.ascontiguousarray(mask.T if exchanged else mask)
