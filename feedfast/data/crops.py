"""Where a view's window lies: from a sample's words, its size and perhaps its boxes to a box in source pixels.

`ViewPlan` draws the words and says which of these functions a plan uses. Each is an algorithm that people know by its
implementation, written for many samples at once; what they return may leave the image.
Units: boxes are int64 [n, 4], top, left, height, width; ``sizes`` int64 [n, 2], height, width; both in source pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from feedfast.data.operations import Fill, Options, Probability, Range, refuse_window
from feedfast.data.steps import Words, between, unit

__all__ = [
    "JITTER_WORDS", "PAD_WORDS", "RESIZED_WORDS", "SCALE_WORDS", "ExpandCrop", "Keep", "MultiCrop", "Windows",
    "expand_crops", "jitter_crops", "pad_crops", "resized_crops", "scale_crops",
]  # fmt: skip

Int = NDArray[np.int64]
Keep = Literal["center", "visible"]
"""Which boxes a view keeps: those whose center it shows, or those of which it shows enough."""

_RESIZED_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten
PAD_WORDS, JITTER_WORDS, SCALE_WORDS = 2, 4, 4
RESIZED_WORDS = 2 * _RESIZED_ATTEMPTS + 4  # two words per attempt, two for the position, two unused

_ROUNDS = 64  # torchvision draws options for ever; with its own, (6/7)**64 = 5e-5 of hopeless images get that far
_CHUNK = 1024  # samples whose attempts are tried together: 40 attempts of 10 boxes each are some 7 MB per array


class ExpandCrop(Options):
    """SSD's window: the image on a larger canvas half of the time, then a part of it that suits a box (IoU crop).

    Zoom and crop are those of torchvision's RandomZoomOut and RandomIoUCrop, one window of the image in the end. It is
    placed by the sample's boxes, so the data must have some.
    """

    op: Literal["expand-crop"] = "expand-crop"
    expand: FiniteFloat = Field(4.0, ge=1, le=16, description="the canvas is 1 to this many times as wide and high")
    expand_p: Probability = Field(0.5, description="how often there is a canvas")
    min_iou: tuple[FiniteFloat, ...] = Field(
        (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        min_length=1,
        max_length=32,
        description="drawn from: what the part's IoU with a box it holds the center of must reach; 1 or more = all of "
        "the canvas",
    )
    scale: Range = Field((0.3, 1.0), description="width and height of the part, as shares of the canvas's, from and to")
    ratio: Range = Field((0.5, 2.0), description="width over height of the part, from and to; others are drawn again")
    attempts: int = Field(40, ge=1, le=256, description="parts tried before another of `min_iou` is drawn")
    fill: Fill = Field((123, 117, 104), description="red, green, blue of the canvas; default: ImageNet's mean")
    keep: Keep = Field("center", description="boxes whose center is shown, or of which a quarter is visible")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.min_iou) < 0:
            raise ValueError(f"min_iou: expected 0 or more each, found {list(self.min_iou)}")
        refuse_window(self.scale, self.ratio)
        return self


class Windows(Options):
    """One kind of window of `MultiCrop`."""

    scale: Range = Field((0.4, 1.0), description="share of the area, from and to")
    ratio: Range = Field((3 / 4, 4 / 3), description="width over height, from and to")
    count: int = Field(1, ge=1, le=64, description="windows of this kind in a round")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_window(self.scale, self.ratio)
        return self


class MultiCrop(Options):
    """Windows of several kinds, global ones and local ones: one per view, each kind its number of times in a round.

    A round is as many consecutive views as the counts add up to; where in it a sample begins is drawn per sample, so
    every batch holds all kinds. DINO and SwAV show all windows of an image in one batch, and local ones at a smaller
    output size; here each window is a row of its own, resized to the one size that all rows have.
    """

    op: Literal["multi-crop"] = "multi-crop"
    windows: tuple[Windows, ...] = Field(
        (Windows(scale=(0.4, 1.0), count=2), Windows(scale=(0.05, 0.4), count=6)),
        min_length=1,
        max_length=16,
        description="tables of `scale`, `ratio` and `count`; the defaults are DINO's ranges",
    )

    @property
    def kinds(self) -> Int:
        """Of each view of a round, which of ``windows``."""
        return np.repeat(np.arange(len(self.windows)), [kind.count for kind in self.windows])

    def crops(self, words: Words, sizes: Int, kind: Int) -> Int:
        """A window of its own kind for each sample, from `RESIZED_WORDS` words each."""
        out = np.empty((len(words), 4), np.int64)
        for number, entry in enumerate(self.windows):
            own = kind == number
            out[own] = resized_crops(words[own], sizes[own], entry.scale, entry.ratio)
        return out


def pad_crops(words: Words, sizes: Int, size: int, pad: int) -> Int:
    """A window of the output's size shifted by up to ``pad``, in an image of another size scaled with it."""
    shift_n2 = _below(words, np.int64(2 * pad + 1)) - pad
    side = sizes.min(axis=1)
    corner_n2 = (sizes - side[:, None]) // 2 + np.rint(shift_n2 * (side[:, None] / size)).astype(np.int64)
    return np.concatenate([corner_n2, np.stack([side, side], axis=1)], axis=1)


def jitter_crops(words: Words, sizes: Int, scale: tuple[float, float]) -> Int:
    """torchvision's ScaleJitter and FixedSizeCrop: at zoom 1 the longer side fills the output."""
    side = np.maximum(np.rint(sizes.max(axis=1) / between(words[:, 0], *scale)), 1).astype(np.int64)
    return _square(words[:, 1:3], sizes, side)


def scale_crops(words: Words, sizes: Int, size: int, scale: tuple[float, float]) -> Int:
    """Segmentation's scale and crop: the shorter side becomes a whole number of pixels in ``scale`` times ``size``.

    The number is uniform, both ends included. The window is a square of source pixels: its place and side are rounded
    to these, which loses the authors' pixel of the output where an image is enlarged, and nothing else.
    """
    low, high = (int(size * factor) for factor in scale)
    short = np.maximum(low + _below(words[:, 0], np.int64(high - low + 1)), 1)
    side = np.maximum(np.rint(size * sizes.min(axis=1) / short), 1).astype(np.int64)
    return _square(words[:, 1:3], sizes, side)


def _square(words: Words, sizes: Int, side: Int) -> Int:
    """A square anywhere in the image; along an axis where it is the larger one it begins where the image does."""
    corner_n2 = _below(words, np.maximum(sizes - side[:, None], 0) + 1)
    return np.concatenate([corner_n2, np.stack([side, side], axis=1)], axis=1)


def resized_crops(words: Words, sizes: Int, scale: tuple[float, float], ratio: tuple[float, float]) -> Int:
    """torchvision's RandomResizedCrop: ten attempts, then the central part of the nearest allowed ratio."""
    image_h, image_w = sizes[:, :1], sizes[:, 1:]  # [n, 1]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (image_h * image_w) * between(words[:, 0 : 2 * _RESIZED_ATTEMPTS : 2], *scale)  # [n, attempt]
    shape = np.exp(between(words[:, 1 : 2 * _RESIZED_ATTEMPTS : 2], low, high))
    # rint is Python's round(): halves go to the even neighbor, as in torchvision
    width = np.rint(np.sqrt(area * shape)).astype(np.int64)
    height = np.rint(np.sqrt(area / shape)).astype(np.int64)
    fits = (width > 0) & (width <= image_w) & (height > 0) & (height <= image_h)
    first = np.argmax(fits, axis=1)[:, None]
    found = np.take_along_axis(fits, first, axis=1)[:, 0]
    h = np.take_along_axis(height, first, axis=1)[:, 0]
    w = np.take_along_axis(width, first, axis=1)[:, 0]
    h0, w0 = image_h[:, 0], image_w[:, 0]
    narrow, wide = w0 / h0 < ratio[0], w0 / h0 > ratio[1]
    h = np.where(found, h, np.where(narrow, np.rint(w0 / ratio[0]).astype(np.int64), h0))
    w = np.where(found, w, np.where(wide, np.rint(h0 * ratio[1]).astype(np.int64), w0))
    at = words[:, 2 * _RESIZED_ATTEMPTS :]
    top = np.where(found, _below(at[:, 0], h0 - h + 1), (h0 - h) // 2)
    left = np.where(found, _below(at[:, 1], w0 - w + 1), (w0 - w) // 2)
    return np.stack([top, left, h, w], axis=1)


Draw = Callable[[int, Int, int], Words]


def expand_crops(draw: Draw, sizes: Int, boxes: Sequence[NDArray[np.floating[Any]]], options: ExpandCrop) -> Int:
    """torchvision's RandomZoomOut followed by its RandomIoUCrop, one window per sample.

    Args:
        draw: from a number, rows [r] and k to words [r, k] that belong to the number and each row's sample.
        sizes: of each image [n, 2].
        boxes: of each, [k, 4] xyxy in source pixels; without any the window is all of the canvas.
        options: the table.
    """
    out = np.empty((len(sizes), 4), np.int64)
    for start in range(0, len(sizes), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(sizes)))
        words = draw(0, rows, 4)
        on = unit(words[:, :1]) < options.expand_p
        canvas = np.floor(sizes[rows] * np.where(on, between(words[:, 1:2], 1.0, options.expand), 1.0))
        corner = np.floor((canvas - sizes[rows]) * unit(words[:, 2:4]))  # of the image on the canvas
        window = np.concatenate([np.zeros_like(canvas), canvas], axis=1)
        left = np.flatnonzero([len(boxes[row]) > 0 for row in rows.tolist()])
        for number in range(1, _ROUNDS + 1):
            if not left.size:
                break
            words = draw(number, rows[left], 1 + 4 * options.attempts)
            least = np.array(options.min_iou)[_below(words[:, 0], np.int64(len(options.min_iou)))]
            shown = [boxes[start + at][:, [1, 0, 3, 2]] + np.tile(corner[at], 2) for at in left.tolist()]  # ends
            found, part = _iou_crops(unit(words[:, 1:]), canvas[left], shown, least, options)
            window[left[found]] = part[found]
            left = left[~found & (least < 1)]
        window[:, :2] -= corner
        out[rows] = window.astype(np.int64)
    return out


def _iou_crops(
    drawn: NDArray[np.float64],
    canvas: NDArray[np.float64],
    boxes: Sequence[NDArray[np.float64]],
    least: NDArray[np.float64],
    options: ExpandCrop,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of each sample's attempts the first that will do: whether there is one [n], and the part [n, 4].

    Boxes are top, left, bottom, right on the canvas, at least one per sample.
    """
    u = drawn.reshape(len(canvas), options.attempts, 2, 2)  # extent or corner; width or height
    low, high = options.scale
    extent = np.floor(canvas[:, None] * (low + (high - low) * u[:, :, 0, ::-1]))
    corner = np.floor((canvas[:, None] - extent) * u[:, :, 1, ::-1])
    ratio = extent[..., 1] / np.maximum(extent[..., 0], 1)
    fits = (extent > 0).all(axis=2) & (options.ratio[0] <= ratio) & (ratio <= options.ratio[1])

    counts = [len(own) for own in boxes]
    owner = np.repeat(np.arange(len(boxes)), counts)
    starts = np.cumsum([0, *counts[:-1]])
    ends = np.concatenate(boxes)[:, None]  # [box, 1, 4], against [box, attempt, 2]
    first, last = corner[owner], (corner + extent)[owner]
    center = (ends[..., :2] + ends[..., 2:]) / 2
    within = ((first < center) & (center < last)).all(axis=2)
    shared = (np.minimum(last, ends[..., 2:]) - np.maximum(first, ends[..., :2])).clip(0).prod(axis=2)
    union = (ends[..., 2:] - ends[..., :2]).prod(axis=2) + extent.prod(axis=2)[owner] - shared
    iou: NDArray[np.float64] = np.where(within, shared / np.maximum(union, 1e-12), -1.0)
    best: NDArray[np.float64] = np.maximum.reduceat(iou, starts, axis=0)
    good: NDArray[np.bool_] = fits & (best >= 0) & (best >= least[:, None]) & (least < 1)[:, None]
    place = np.argmax(good, axis=1)[:, None, None]
    part = np.concatenate([np.take_along_axis(value, place, axis=1)[:, 0] for value in (corner, extent)], axis=1)
    return np.asarray(good.any(axis=1)), part


def _below(words: Words, bound: NDArray[np.int64] | np.int64) -> Int:
    """Uniform integers in [0, bound), bound broadcast; the bias is below bound * 2**-53."""
    drawn: Int = np.floor(unit(words) * bound).astype(np.int64)
    return drawn
