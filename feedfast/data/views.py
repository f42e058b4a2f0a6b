"""The view plan: which sample comes when, and which crop, flip and further operations it gets.

A view is one augmentation seed. Everything in it is a pure function of (seed, view, sample id): it does not change
with batch size, worker, rank or resume point, nor with how many other samples were asked for. That is what lets
a cached target be matched to the pixels it was computed from, months later and on another machine. The parameters are
therefore drawn here and passed to the loader, instead of being left to its random operators (seeded by batch position).

The numbers come from `feedfast.data.philox`. This file draws them; it touches no image, and knows neither DALI nor the
cache.
Units: boxes are int32 (top, left, height, width) in source pixels, after EXIF orientation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from feedfast.data import philox
from feedfast.data.crops import (
    JITTER_WORDS,
    PAD_WORDS,
    RESIZED_WORDS,
    SCALE_WORDS,
    ExpandCrop,
    Keep,
    MultiCrop,
    expand_crops,
    jitter_crops,
    pad_crops,
    resized_crops,
    scale_crops,
)
from feedfast.data.mixing import MIXING_WORDS, CutMix, Mixing, Mixup, draw_mixing
from feedfast.data.operations import PixelOperation
from feedfast.data.passes import GRANULES, PASS_GRANULE, PASS_WINDOW
from feedfast.data.philox import Purpose, as_ids
from feedfast.data.steps import PARAMETERS, TABLE, Program, unit
from feedfast.errors import RequestError

__all__ = [
    "ALGORITHM",
    "Augment",
    "ViewPlan",
]

Augment = Literal[
    "pad-crop-flip", "resized-crop-flip", "scale-jitter-flip", "scale-crop-flip", "expand-crop-flip", "multi-crop-flip",
    "none",
]  # fmt: skip
_ZOOMED = ("scale-jitter-flip", "scale-crop-flip")
_OPTIONS: dict[str, type[ExpandCrop] | type[MultiCrop]] = {
    "expand-crop-flip": ExpandCrop, "multi-crop-flip": MultiCrop,
}  # fmt: skip

BoxesPerSample = Sequence[NDArray[np.floating[Any]]]
"""Of each sample its boxes [k, 4], xyxy in source pixels."""

RESOLVED = ("window", "flip", "steps", "parameters", "weight", "box")
"""What `ViewPlan.resolved` may say of a row."""

ALGORITHM = "philox4x64-10/1"
"""Generator and version of the mapping from words to parameters; any change below that moves a number raises it."""

MAX_SLOTS = 16
"""The most steps an operation list may become per sample."""


@dataclass(frozen=True)
class ViewPlan:
    """What every view of one dataset looks like.

    Args:
        seed: 0 <= seed < 2**64; one plan for a whole run.
        size: side of the square output in pixels.
        augment: ``"pad-crop-flip"`` shifts by up to ``pad`` pixels and fills with black; ``"resized-crop-flip"`` has
            the distribution of torchvision's ``RandomResizedCrop``; ``"scale-jitter-flip"`` zooms in and out, as
            detectors are trained; ``"scale-crop-flip"`` scales the shorter side, as segmentation is trained;
            ``"expand-crop-flip"`` is SSD's zoom-out and IoU crop; ``"multi-crop-flip"`` has windows of several kinds;
            ``"none"`` is the evaluation geometry.
        flip: probability of a horizontal flip (0 for ``"none"``, whatever is given).
        pad: largest shift of pad-crop in output pixels; -1 means ``size // 8`` (4 at CIFAR's 32).
        scale: range of the crop's area as a fraction of the image's; of scale jitter and scale crop, of the zoom: at 1
            the longer (jitter) or shorter side fills the output.
        ratio: range of the crop's width over height, drawn log-uniformly.
        granule: rows that stay together when a view is read again, a power of two up to 64 (`pass_order`).
        window: granules whose rows are mixed with each other then, at least 1.
        operations: what follows crop and flip, in this order; mixing (`Mixup`, `CutMix`) comes last.
        crop: options of ``"expand-crop-flip"`` and ``"multi-crop-flip"``, None = their defaults; scale and ratio are
            theirs, then, and the plan's have no meaning.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    seed: int
    size: int
    augment: Augment
    flip: float = 0.5
    pad: int = -1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    granule: int = PASS_GRANULE
    window: int = PASS_WINDOW
    operations: tuple[PixelOperation | Mixup | CutMix, ...] = ()
    crop: ExpandCrop | MultiCrop | None = None

    def __post_init__(self) -> None:
        _require("seed", 0 <= self.seed < 2**64, "an integer from 0 to 2**64 - 1", self.seed)
        _require("size", 1 <= self.size <= 1 << 14, "1 to 16384 pixels", self.size)
        _require("augment", self.augment in get_args(Augment), " | ".join(get_args(Augment)), self.augment)
        _require("flip", 0.0 <= self.flip <= 1.0, "a probability", self.flip)
        _require("pad", -1 <= self.pad <= self.size, f"-1 (size // 8) to {self.size}", self.pad)
        for name in ("scale", "ratio"):
            low, high = (float(v) for v in getattr(self, name))
            _require(name, 0.0 < low <= high < math.inf, "0 < low <= high", getattr(self, name))
            object.__setattr__(self, name, (low, high))  # a list from a recipe compares equal to a tuple
        kind = _OPTIONS.get(self.augment)
        if self.crop is None and kind is not None:
            object.__setattr__(self, "crop", kind())
        expected = f"{kind.__name__}, its options" if kind else f"None for {self.augment}"
        _require("crop", isinstance(self.crop, kind or type(None)), expected, self.crop)
        zoomed = self.augment in _ZOOMED
        most = 16.0 if zoomed else 1.0
        expected = "a zoom from 1/16 to 16" if zoomed else "at most the whole image"
        _require("scale", self.scale[1] <= most and (not zoomed or self.scale[0] >= 1 / most), expected, self.scale)
        _require("granule", self.granule in GRANULES, f"one of {', '.join(map(str, GRANULES))}", self.granule)
        _require("window", 1 <= self.window <= 1 << 16, "1 to 65536 granules", self.window)
        slots = sum(operation.slots for operation in self.pixel_operations)
        _require("operations", slots <= MAX_SLOTS, f"at most {MAX_SLOTS} steps per sample", slots)
        kinds = [operation.op for operation in self.operations]
        mixed = [operation.op for operation in self.mixing_operations]
        _require("operations", not mixed or kinds[-len(mixed) :] == mixed, "mixup and cutmix last", kinds)
        _require("operations", len(set(mixed)) == len(mixed), "mixup and cutmix once each", kinds)
        share = sum(operation.p for operation in self.mixing_operations)
        _require("operations", share <= 1 + 1e-9, "p of mixup and cutmix at most 1 together", share)
        if self.pad == -1:
            object.__setattr__(self, "pad", self.size // 8)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, with the algorithm that turns it into numbers."""
        more: dict[str, Any] = {}
        if self.operations:  # caches without them keep the identity that they have
            more["operations"] = {
                "table": TABLE,
                "listed": [operation.model_dump(mode="json") for operation in self.operations],
                "slots": sum(operation.slots for operation in self.pixel_operations),
                "parameters": PARAMETERS,
                "mixed": bool(self.mixing_operations),
            }
        if self.crop is not None:
            more["crop"] = self.crop.model_dump(mode="json")
        return {
            "algorithm": ALGORITHM,
            "seed": self.seed,
            "size": self.size,
            "augment": self.augment,
            "flip": self.flip,
            "pad": self.pad,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "granule": self.granule,
            "window": self.window,
            **more,
        }

    @property
    def pixel_operations(self) -> tuple[PixelOperation, ...]:
        """Those that change a sample's own pixels."""
        return tuple(operation for operation in self.operations if isinstance(operation, PixelOperation))

    @property
    def mixing_operations(self) -> tuple[Mixup | CutMix, ...]:
        """Those that show part of another sample."""
        return tuple(operation for operation in self.operations if isinstance(operation, (Mixup, CutMix)))

    @property
    def needs_boxes(self) -> bool:
        """Whether a window follows from the sample's boxes."""
        return isinstance(self.crop, ExpandCrop)

    @property
    def fill(self) -> tuple[int, int, int]:
        """Red, green, blue of what a window shows outside the image."""
        return self.crop.fill if isinstance(self.crop, ExpandCrop) else (0, 0, 0)

    @property
    def keep(self) -> Keep:
        """Which of the boxes a view keeps."""
        return self.crop.keep if isinstance(self.crop, ExpandCrop) else "visible"

    def resolved(
        self,
        view: int,
        ids: ArrayLike,
        sizes: ArrayLike,
        boxes: BoxesPerSample | None = None,
        *,
        only: Collection[str] = RESOLVED,
    ) -> dict[str, NDArray[Any]]:
        """What a view does to each sample, by the names it is stored under, n rows each.

        Args:
            view: which view.
            ids: sample ids [n].
            sizes: height and width of each image [n, 2].
            boxes: of each sample, where the plan `needs_boxes`.
            only: what is wanted of it; nothing else is drawn.

        Returns:
            ``window``, ``flip``; with operations ``steps``, ``parameters``; with mixing ``weight``, ``box``.
        """
        wanted, found = set(only), dict[str, NDArray[Any]]()
        if "window" in wanted:
            found["window"] = self.crops(view, ids, sizes, boxes)
        if "flip" in wanted:
            found["flip"] = self.flips(view, ids)
        if wanted & {"steps", "parameters"} and (program := self.program(view, ids)) is not None:
            found |= {"steps": program.codes, "parameters": program.parameters}
        if wanted & {"weight", "box"} and (mixing := self.mixing(view, ids)) is not None:
            found |= {"weight": mixing.weight, "box": mixing.box}
        return found

    def program(self, view: int, ids: ArrayLike) -> Program | None:
        """The resolved steps of each sample in a view, n rows; None where the plan has no such operations."""
        ids_n = as_ids(ids)
        parts = [
            operation.draw(philox.words(self.seed, view, Purpose.OPERATION, place, ids_n, operation.words), self.size)
            for place, operation in enumerate(self.pixel_operations)
        ]
        if not parts:
            return None
        return Program(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))

    def mixing(self, view: int, ids: ArrayLike) -> Mixing | None:
        """How each sample is mixed with its partner in a view, n rows; None where the plan mixes nothing."""
        if not self.mixing_operations:
            return None
        words = philox.words(self.seed, view, Purpose.MIXING, 0, as_ids(ids), MIXING_WORDS)
        return draw_mixing(self.mixing_operations, words, self.size)

    def partners(self, view: int, ids: ArrayLike) -> NDArray[np.uint32]:
        """The sample that each row of a view is mixed with, [n] in the view's order.

        A second permutation of the same samples, so nothing but weight and box needs storing, batches may be cut
        anywhere, and every sample is somebody's partner once. One row in n is its own.

        Args:
            view: which view.
            ids: all sample ids of the view, in any order.
        """
        ascending = np.sort(as_ids(ids))
        keys = philox.words(self.seed, view, Purpose.PARTNER, 0, ascending, 1)[:, 0]
        permuted: NDArray[np.uint32] = ascending[np.argsort(keys, kind="stable")].astype(np.uint32)
        return permuted

    def order(self, view: int, ids: ArrayLike) -> NDArray[np.uint32]:
        """The order in which a view presents samples.

        Every sample has a 64-bit key; the order is that of the keys, so a subset keeps the relative order it has in
        the whole.

        Args:
            view: which view, >= 0.
            ids: sample ids [n], in any order, each at most once.

        Returns:
            The same ids [n], permuted; the order in which they were given does not matter.
        """
        ascending = np.sort(as_ids(ids))
        keys = philox.words(self.seed, view, Purpose.ORDER, 0, ascending, 1)[:, 0]
        permuted: NDArray[np.uint32] = ascending[np.argsort(keys, kind="stable")].astype(np.uint32)
        return permuted

    def crops(
        self, view: int, ids: ArrayLike, sizes: ArrayLike, boxes: BoxesPerSample | None = None
    ) -> NDArray[np.int32]:
        """The crop box of each sample in a view.

        ``"resized-crop-flip"``: torchvision's ``RandomResizedCrop.get_params`` (ten attempts, then the central crop of
        the nearest allowed ratio). ``"pad-crop-flip"``: a ``size`` x ``size`` window shifted by up to ``pad`` pixels,
        which may leave the image. For an image of another size the window is the central square on its shorter side
        and the shift is scaled with it, so the augmentation looks the same after resizing; along the longer side a
        shift then shows real pixels instead of padding. ``"scale-jitter-flip"``: torchvision's ``ScaleJitter`` and
        ``FixedSizeCrop``, a square that is as much smaller than the image's longer side as it is zoomed in on, anywhere
        in the image; where it is the larger one the image lies in its upper left corner. ``"scale-crop-flip"``: that,
        measured by the shorter side, see `scale_crops`. ``"expand-crop-flip"``: torchvision's ``RandomZoomOut`` and
        ``RandomIoUCrop``, see `expand_crops`; the window may leave the image on every side. ``"multi-crop-flip"``: as
        ``"resized-crop-flip"``, with the ranges of the window's kind. ``"none"``: the whole image.

        Args:
            view: which view, >= 0.
            ids: sample ids [n].
            sizes: height and width of each image [n, 2].
            boxes: of each sample, where the plan `needs_boxes`.

        Returns:
            int32 [n, 4]: top, left, height, width in source pixels.
        """
        ids_n = as_ids(ids)
        size_n2 = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        if len(size_n2) != len(ids_n):
            raise ValueError(f"sizes: expected one (height, width) per id, {len(ids_n)}; got {len(size_n2)}")
        if self.needs_boxes and (boxes is None or len(boxes) != len(ids_n)):
            found = "none" if boxes is None else str(len(boxes))
            raise ValueError(f"boxes: expected those of each of {len(ids_n)} samples, got {found}")
        box_n4 = np.zeros((len(ids_n), 4), dtype=np.int32)
        box_n4[:, 2:] = size_n2
        if self.augment == "none":
            return box_n4
        by_id = np.argsort(ids_n, kind="stable")  # neighbors in id share drawn blocks; values do not depend on it
        for start in range(0, len(ids_n), philox.RUN_SAMPLES):
            part = by_id[start : start + philox.RUN_SAMPLES]
            own = [boxes[row] for row in part.tolist()] if boxes is not None and self.needs_boxes else []
            box_n4[part] = self._crops(view, ids_n[part], size_n2[part], own)
        return box_n4

    def flips(self, view: int, ids: ArrayLike) -> NDArray[np.uint8]:
        """1 where a sample is mirrored left to right in a view, else 0; uint8 [n]."""
        ids_n = as_ids(ids)
        if self.augment == "none":
            return np.zeros(len(ids_n), dtype=np.uint8)
        flipped: NDArray[np.uint8] = (
            unit(philox.words(self.seed, view, Purpose.FLIP, 0, ids_n, 1)[:, 0]) < self.flip
        ).astype(np.uint8)
        return flipped

    def _crops(
        self, view: int, ids: NDArray[np.int64], sizes: NDArray[np.int64], boxes: BoxesPerSample
    ) -> NDArray[np.int64]:
        def words(count: int) -> NDArray[np.uint64]:
            return philox.words(self.seed, view, Purpose.CROP, 0, ids, count)

        if self.augment == "pad-crop-flip":
            return pad_crops(words(PAD_WORDS), sizes, self.size, self.pad)
        if self.augment == "scale-jitter-flip":
            return jitter_crops(words(JITTER_WORDS), sizes, self.scale)
        if self.augment == "scale-crop-flip":
            return scale_crops(words(SCALE_WORDS), sizes, self.size, self.scale)
        if isinstance(self.crop, ExpandCrop):
            # a round of attempts is one more of the counter's passes: only samples that need it draw its words
            def drawn(number: int, rows: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
                return philox.words(self.seed, view, Purpose.CROP, number, ids[rows], count)

            return expand_crops(drawn, sizes, boxes, self.crop)
        if isinstance(self.crop, MultiCrop):
            # drawn once per sample, so of view 0: over a round of views each sample has every kind its number of times
            begin = (
                philox.words(self.seed, 0, Purpose.KIND, 0, ids, 1)[:, 0] % np.uint64(len(self.crop.kinds))
            ).astype(np.int64)
            kind = self.crop.kinds[(view + begin) % len(self.crop.kinds)]
            return self.crop.crops(words(RESIZED_WORDS), sizes, kind)
        return resized_crops(words(RESIZED_WORDS), sizes, self.scale, self.ratio)


def _require(name: str, ok: bool, expected: str, found: object) -> None:
    if not ok:
        raise RequestError(f"view plan, {name}: expected {expected}, found {found!r}")
