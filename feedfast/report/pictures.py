"""Pictures of what networks say: masks and boxes next to the truth, and maps of teachers and student, for a page.

Arrays in, HTML out, and nothing to fetch: every picture is a data URI. PIL draws, pixel for pixel, so that an overlay
can be checked; a figure of axes is what matplotlib is for. Photographs become JPEG, flat maps PNG.

Images are uint8 [H, W, 3], masks uint8 [H, W] of class numbers, boxes float [k, 4] as left, top, right, bottom in
pixels of their image. What is larger than `SIDE` is made smaller; boxes are drawn after that, so that lines stay thin.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from feedfast.errors import printable

__all__ = [
    "IGNORE", "SIDE", "Detected", "Mapped", "Segmented", "boxes_drawn", "data_uri", "detected_html", "map_pixels",
    "mapped_html", "overlay", "palette", "segmented_html",
]  # fmt: skip

Pixels = NDArray[np.uint8]

SIDE = 320
"""Pixels of the longer side of a picture, at most."""
IGNORE = 255
"""The class number of a truth's pixels that are no class: they keep the image's own color."""
OPACITY = 0.55  # of a class's color over the image
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
    """An image and what networks make of it inside: tap or network → map, float [C, h, w]."""

    name: str
    image: Pixels
    maps: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)


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


def map_pixels(values: NDArray[np.floating[Any]], side: int = SIDE // 2) -> Pixels:
    """The mean over channels of a map [C, h, w], its own lowest value dark and its highest bright.

    Returns:
        uint8 [height, width, 3], the longer side about ``side`` pixels, every value a square; a map of one value is of
        one color, and what is not finite is red.
    """
    from matplotlib import colormaps

    mean = np.asarray(values, np.float64).mean(0)
    finite = np.isfinite(mean)
    low, high = (float(mean[finite].min()), float(mean[finite].max())) if finite.any() else (0.0, 0.0)
    scaled = np.where(finite, mean - low, 0.0) / (high - low if high > low else 1.0)
    colored = (np.asarray(colormaps["viridis"](scaled))[..., :3] * 255).round().astype(np.uint8)
    colored[~finite] = (255, 0, 0)
    times = max(side // max(mean.shape), 1)
    enlarged: Pixels = colored.repeat(times, 0).repeat(times, 1)
    return enlarged


def _fit(image: Pixels) -> Pixels:
    """The image, its longer side at most `SIDE`."""
    longer = max(image.shape[:2])
    if longer <= SIDE:
        return np.ascontiguousarray(image)
    width, height = (max(round(extent * SIDE / longer), 1) for extent in (image.shape[1], image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


# ---- a page


def data_uri(pixels: Pixels, kind: Literal["jpeg", "png"] = "jpeg") -> str:
    """The picture as text that an ``img`` shows."""
    buffer = io.BytesIO()
    # no chroma subsampling: it would smear colored lines of two pixels
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 90, "subsampling": 0} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def segmented_html(title: str, samples: Sequence[Segmented], classes: Sequence[str]) -> str:
    """A section: image, truth and prediction of every sample in a row, and the classes that can be seen."""
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
        rows.append(_row(sample.name, pictures))
    return _section(title, rows, _legend(classes, sorted(seen)))


def detected_html(title: str, samples: Sequence[Detected], classes: Sequence[str]) -> str:
    """A section: truth and predictions of every sample next to each other, and the classes that can be seen."""
    rows, seen = [], set()
    for sample in samples:
        best = _best(sample.scores)
        seen |= {int(number) for number in [*sample.labels, *sample.found_labels[best]]}
        truth = boxes_drawn(sample.image, sample.boxes, sample.labels, classes)
        found = boxes_drawn(sample.image, sample.found, sample.found_labels, classes, sample.scores)
        words = f"prediction, {len(best)} boxes of score {LEAST_SCORE:g} or more"
        if len(best) == MOST_BOXES:
            words = f"prediction, the best {MOST_BOXES} boxes"
        rows.append(_row(sample.name, [(f"ground truth, {len(sample.boxes)} boxes", truth), (words, found)]))
    return _section(title, rows, _legend(classes, sorted(seen)))


def mapped_html(title: str, samples: Sequence[Mapped]) -> str:
    """A section: every sample's image and maps in a row, each map's mean over channels, scaled by itself."""
    rows = []
    for sample in samples:
        pictures = [("image", _fit(sample.image))]
        pictures += [
            (f"{name}, {'x'.join(map(str, values.shape))}", map_pixels(values)) for name, values in sample.maps.items()
        ]
        rows.append(_row(sample.name, pictures, flat=range(1, len(pictures))))
    return _section(title, rows, "")


def _section(title: str, rows: Sequence[str], legend: str) -> str:
    return f"<h2>{html.escape(printable(title))}</h2>{legend}{''.join(rows)}" if rows else ""


def _row(name: str, pictures: Sequence[tuple[str, Pixels]], flat: Iterable[int] = ()) -> str:
    shown = html.escape(printable(name), quote=True)
    cells = []
    for place, (caption, pixels) in enumerate(pictures):
        words = html.escape(printable(caption), quote=True)
        uri = data_uri(pixels, "png" if place in flat else "jpeg")
        size = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
        cells.append(
            f'<figure><img alt="{shown}: {words}" {size} src="{uri}"><figcaption>{words}</figcaption></figure>'
        )
    return f'<h3>{shown}</h3><div class="pictures">{"".join(cells)}</div>'


def _legend(classes: Sequence[str], numbers: Sequence[int]) -> str:
    colors = palette(len(classes))
    entries = (
        f'<span><i style="background:rgb{colors[number]}"></i>{html.escape(printable(classes[number]))}</span>'
        for number in numbers
    )
    return f'<p class="legend">{" ".join(entries)}</p>' if numbers else ""
