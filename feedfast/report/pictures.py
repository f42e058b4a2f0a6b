"""Pictures of what networks say: masks and boxes next to the truth, maps of teachers and student, views of samples.

Arrays in, HTML out, and nothing to fetch: every picture is a data URI. PIL draws, pixel for pixel, so that an overlay
can be checked. Photographs become JPEG; maps and small images PNG at their own size, which the browser enlarges in
squares: a map of 8x8 values takes 200 bytes so.

Images are uint8 [H, W, 3], masks uint8 [H, W] of class numbers, boxes float [k, 4] as left, top, right, bottom in
pixels of their image. What is larger than `SIDE` is made smaller; boxes are drawn after that, so that lines stay thin.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from feedfast.errors import printable
from feedfast.report.page import Html, escaped, joined, notes

__all__ = [
    "IGNORE", "SIDE", "Detected", "Mapped", "Segmented", "Viewed", "boxes_drawn", "data_uri", "detected_html",
    "map_pixels", "mapped_html", "overlay", "palette", "segmented_html", "viewed_html",
]  # fmt: skip

Pixels = NDArray[np.uint8]

SIDE = 320
"""Pixels of the longer side of a picture, at most."""
IGNORE = 255
"""The class number of a truth's pixels that are no class: they keep the image's own color."""
OPACITY = 0.55  # of a class's color over the image
SMALL = 64  # pixels of the longer side up to which an image is PNG: JPEG would smear it, and saves nothing
# matplotlib's viridis at every eighth of its 256 steps: from dark to bright also for those who see no color
_VIRIDIS = np.array([
    0x440154, 0x470d60, 0x48186a, 0x482374, 0x472d7b, 0x453781, 0x424086, 0x3e4989, 0x3b528b, 0x375b8d, 0x33638d,
    0x2f6b8e, 0x2c728e, 0x297a8e, 0x26828e, 0x23898e, 0x21908c, 0x1f978b, 0x1f9f88, 0x21a685, 0x27ad81, 0x31b57b,
    0x3ebc74, 0x4dc26c, 0x5cc863, 0x6ece58, 0x82d34d, 0x95d840, 0xaadc32, 0xc0df25, 0xd5e21a, 0xeae51a, 0xfde725,
])  # fmt: skip
LEAST_SCORE, MOST_BOXES = 0.3, 20  # predictions that are drawn: all would hide the image


@dataclass(frozen=True, eq=False)
class Segmented:
    """An image with its mask and what a network made of it.

    Attributes:
        name: of the sample.
        image: uint8 [H, W, 3].
        truth: uint8 [H, W], class numbers, `IGNORE` where there is none.
        prediction: integers [H, W], class numbers.
    """

    name: str
    image: Pixels
    truth: NDArray[np.integer[Any]]
    prediction: NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Detected:
    """An image with its boxes and those a network found.

    Attributes:
        name: of the sample.
        image: uint8 [H, W, 3].
        boxes, labels: float [k, 4] in pixels of the image and integers [k], the truth.
        found, found_labels, scores: likewise, of the network, with scores float [k] in 0..1.
    """

    name: str
    image: Pixels
    boxes: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]
    found: NDArray[np.floating[Any]]
    found_labels: NDArray[np.integer[Any]]
    scores: NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Mapped:
    """An image and what networks make of it inside.

    Attributes:
        name: of the sample.
        image: uint8 [H, W, 3], or None where it is not at hand.
        maps: tap → network → map, float [C, h, w]; of a masked array, what is masked was not stored.
    """

    name: str
    image: Pixels | None
    maps: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Viewed:
    """Views of a sample: what each is called, its pixels uint8 [H, W, 3], and what was done to them."""

    name: str
    views: Sequence[tuple[str, Pixels, Sequence[str]]]


# ---- pixels


@functools.cache
def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colors (red, green, blue) of ``count`` classes, each as far as can be from those before it, black and white.

    The first colors do not depend on ``count``. Above 200 they repeat.
    """
    steps = np.array([0, 51, 102, 153, 204, 255], np.float64)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(grid)
    nearest = np.minimum.reduce([np.square(lab - lab[index]).sum(1) for index in (0, len(grid) - 1)])
    chosen: list[int] = []
    for _ in range(min(count, 200)):
        best = int(nearest.argmax())
        chosen.append(best)
        nearest = np.minimum(nearest, np.square(lab - lab[best]).sum(1))
    colors = [(int(grid[i, 0]), int(grid[i, 1]), int(grid[i, 2])) for i in chosen]
    return tuple(colors[number % len(colors)] for number in range(count))


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB of sRGB bytes [n, 3]: there, distances are about those that people see."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    share = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def overlay(image: Pixels, mask: NDArray[np.integer[Any]], classes: int, opacity: float = OPACITY) -> Pixels:
    """The image with every class's color over it; pixels of `IGNORE` stay as they are.

    Args:
        image: uint8 [H, W, 3].
        mask: class numbers [H, W], below ``classes`` or `IGNORE`.
        classes: how many there are.
        opacity: of the colors, 0..1.

    Raises:
        ValueError: image and mask are of different sizes, or a number is no class.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"expected a mask of the image's {image.shape[:2]} pixels, found {mask.shape}")
    known = mask != IGNORE
    if known.any() and not 0 <= int(mask[known].min()) <= int(mask[known].max()) < classes:
        raise ValueError(f"expected class numbers below {classes}, found {int(mask[known].max())}")
    colors = np.array([*palette(classes), (0, 0, 0)], np.float64)
    over = colors[np.where(known, mask, classes)]
    share = np.where(known, opacity, 0.0)[..., None]
    mixed: Pixels = (image * (1 - share) + over * share).round().astype(np.uint8)
    return mixed


def boxes_drawn(
    image: Pixels,
    boxes: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    classes: Sequence[str],
    scores: NDArray[np.floating[Any]] | None = None,
) -> Pixels:
    """The image, at most `SIDE` pixels long, with boxes in their classes' colors and their names.

    Args:
        image: uint8 [H, W, 3].
        boxes: float [k, 4], left, top, right, bottom in pixels of ``image``.
        labels: class numbers [k].
        classes: their names.
        scores: of predictions, 0..1: written next to the name; the best `MOST_BOXES` of at least `LEAST_SCORE` are
            drawn. None = all are.
    """
    small = _fit(image)
    scale = small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]
    canvas = Image.fromarray(small)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    shown = range(len(boxes)) if scores is None else _best(scores)
    for index in reversed(shown):  # the best last: on top
        label = int(labels[index])
        color = palette(len(classes))[label]
        left, top, right, bottom = (float(value) * scale[axis % 2] for axis, value in enumerate(boxes[index]))
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color, width=2)
        text = printable(classes[label]) + ("" if scores is None else f" {scores[index]:.2f}")
        across, _, over, down = (int(value) for value in draw.textbbox((0, 0), text, font=font))
        place = min(max(left, 0), max(small.shape[1] - over - 2, 0)), max(top - down - 2, 0)
        draw.rectangle((place[0], place[1], place[0] + over - across + 3, place[1] + down + 2), fill=color)
        dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
        draw.text((place[0] + 2, place[1]), text, fill="white" if dark else "black", font=font)
    return np.asarray(canvas)


def _best(scores: NDArray[np.floating[Any]]) -> list[int]:
    order = np.argsort(-scores, kind="stable")[:MOST_BOXES]
    return [int(index) for index in order if scores[index] >= LEAST_SCORE]


def map_pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    """The mean over channels of a map [C, h, w], its own lowest value dark and its highest bright.

    Returns:
        uint8 [h, w, 4], red, green, blue and opacity: a map of one value is of one color, what is not finite is red,
        and what a masked array masks is transparent.
    """
    mean, stored = _mean(values)
    finite = np.isfinite(mean) & stored
    low, high = _range(mean[finite])
    scaled = np.where(finite, mean - low, 0.0) / (high - low if high > low else 1.0)
    anchors = (_VIRIDIS[:, None] >> (16, 8, 0)) & 255
    at = np.linspace(0, 1, len(anchors))
    pixels = np.full((*mean.shape, 4), 255, np.uint8)
    for color in range(3):
        pixels[..., color] = np.interp(scaled, at, anchors[:, color]).round()
    pixels[stored & ~finite] = (255, 0, 0, 255)
    pixels[~stored] = 0
    return pixels


def _mean(values: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Mean over channels [h, w], and where there is one."""
    stored: NDArray[np.bool_] = np.asarray(~np.ma.getmaskarray(values).any(axis=0))
    return np.ma.getdata(values).astype(np.float64).mean(0), stored


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _fit(image: Pixels) -> Pixels:
    """The image, its longer side at most `SIDE`."""
    longer = max(image.shape[:2])
    if longer <= SIDE:
        return np.ascontiguousarray(image)
    width, height = (max(round(extent * SIDE / longer), 1) for extent in (image.shape[1], image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


# ---- markup


def data_uri(pixels: Pixels, kind: Literal["jpeg", "png"] = "jpeg") -> str:
    """The picture as text that an ``img`` shows."""
    buffer = io.BytesIO()
    # no chroma subsampling: it would smear colored lines of two pixels
    options = {"quality": 90, "subsampling": 0} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def segmented_html(samples: Sequence[Segmented], classes: Sequence[str]) -> Html:
    """Image, truth and prediction of every sample in a row, and the classes that can be seen."""
    rows, seen = [], set()
    for sample in samples:
        known = sample.truth != IGNORE
        seen |= {int(number) for number in np.union1d(sample.truth[known], sample.prediction) if number != IGNORE}
        right = (
            f", {(sample.prediction[known] == sample.truth[known]).mean():.1%} of pixels right" if known.any() else ""
        )
        pictures = [
            ("image", _fit(sample.image)),
            ("ground truth", _fit(overlay(sample.image, sample.truth, len(classes)))),
            (f"prediction{right}", _fit(overlay(sample.image, sample.prediction, len(classes)))),
        ]
        rows.append(_row(sample.name, [_picture(sample.name, *one) for one in pictures], wide=True))
    return joined([_legend(classes, sorted(seen)), *rows]) if rows else Html("")


def detected_html(samples: Sequence[Detected], classes: Sequence[str]) -> Html:
    """Truth and predictions of every sample next to each other, and the classes that can be seen."""
    rows, seen = [], set()
    for sample in samples:
        best = _best(sample.scores)
        seen |= {int(number) for number in [*sample.labels, *sample.found_labels[best]]}
        truth = boxes_drawn(sample.image, sample.boxes, sample.labels, classes)
        found = boxes_drawn(sample.image, sample.found, sample.found_labels, classes, sample.scores)
        words = f"prediction, {len(best)} boxes of score {LEAST_SCORE:g} or more"
        if len(best) == MOST_BOXES:
            words = f"prediction, the best {MOST_BOXES} boxes"
        pictures = [(f"ground truth, {len(sample.boxes)} boxes", truth), (words, found)]
        rows.append(_row(sample.name, [_picture(sample.name, *one) for one in pictures], wide=True))
    return joined([_legend(classes, sorted(seen)), *rows]) if rows else Html("")


def mapped_html(samples: Sequence[Mapped]) -> Html:
    """Every sample's image and, tap by tap, the maps of all networks in a row, each scaled by itself."""
    rows = []
    for sample in samples:
        if not sample.maps:
            continue
        sets = [] if sample.image is None else [_set([_picture(sample.name, "image", _fit(sample.image))])]
        sets += [
            _set([_picture(sample.name, _map_words(tap, who, found), map_pixels(found)) for who, found in maps.items()])
            for tap, maps in sample.maps.items()
        ]
        rows.append(Html(f'<h3>{escaped(sample.name)}</h3><div class="sets">{joined(sets)}</div>'))
    if not rows:
        return Html("")
    sampled = any(np.ma.is_masked(map_) for s in samples for maps in s.maps.values() for map_ in maps.values())
    said = (
        "Each map is the mean over its channels, colored on one scale from its own lowest value to its own highest; "
        "both are written below it, with channels x height x width. What is not finite is red."
    )
    blank = " Positions that the cache does not hold (sampled taps) are left blank." if sampled else ""
    colors = ",".join(f"#{value:06x}" for value in _VIRIDIS)
    scale = Html(
        '<ul class="keys"><li>lowest <i style="width:8rem;background:linear-gradient(90deg,'
        f'{colors})"></i> highest</li></ul>'
    )
    return joined([notes(said + blank), scale, *rows])


def viewed_html(samples: Sequence[Viewed]) -> Html:
    """Every sample's views in a row, what was done to each written below it."""
    rows = []
    for sample in samples:
        tiles = [_picture(sample.name, name, _fit(pixels), words) for name, pixels, words in sample.views]
        rows.append(_row(sample.name, tiles))
    return joined(rows)


def _map_words(tap: str, who: str, values: NDArray[np.floating[Any]]) -> str:
    mean, stored = _mean(values)
    low, high = _range(mean[stored & np.isfinite(mean)])
    share = "" if stored.all() else f", {stored.mean():.0%} of positions"
    return f"{who}, {tap}, {'x'.join(map(str, values.shape))}{share}: {low:.3g} to {high:.3g}"


def _row(name: str, tiles: Sequence[Html], *, wide: bool = False) -> Html:
    return Html(f'<h3>{escaped(name)}</h3><div class="pictures{" wide" * wide}">{joined(tiles)}</div>')


def _set(tiles: Sequence[Html]) -> Html:
    """Maps that belong together: sets stand next to each other where there is room, and do not mix."""
    return Html(f'<div class="set">{joined(tiles)}</div>')


def _picture(name: str, caption: str, pixels: Pixels, words: Sequence[str] = ()) -> Html:
    height, width = pixels.shape[:2]
    uri = data_uri(pixels, "png" if pixels.shape[2] == 4 or max(height, width) <= SMALL else "jpeg")
    listed = f"<ul>{''.join(f'<li>{escaped(word)}</li>' for word in words)}</ul>" if words else ""
    return Html(
        f'<figure><img alt="{escaped(name)}: {escaped(caption)}" width="{width}" height="{height}" src="{uri}">'
        f"<figcaption>{escaped(caption)}{listed}</figcaption></figure>"
    )


def _legend(classes: Sequence[str], numbers: Sequence[int]) -> Html:
    colors = palette(len(classes))
    entries = (
        f'<li><i style="background:rgb{colors[number]}"></i>{escaped(classes[number])}</li>' for number in numbers
    )
    return Html(f'<ul class="keys">{"".join(entries)}</ul>' if numbers else "")
