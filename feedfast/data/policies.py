"""Tables of published augmentation policies: which operations there are, and how a magnitude becomes a parameter.

A table's entry is (name, function of level, sign and size): level is 0..1 of the table's range, sign -1 or 1, size the
side of the square in pixels; the result is the step's parameter (`steps.py`). Ranges are those of torchvision 0.26 to
0.29 (``RandAugment``, ``TrivialAugmentWide``, ``AutoAugment``) and of timm's ``rand-mN-inc1``; tests hold them to both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AUTO_AUGMENT", "TABLES", "Table"]

Floats = NDArray[np.float64]
Magnitude = Callable[[Floats, Floats, int], Floats]
Table = tuple[tuple[str, Magnitude], ...]


def _signed(most: float) -> Magnitude:
    return lambda level, sign, size: most * level * sign


def _share(most: float) -> Magnitude:
    return lambda level, sign, size: most * size * level * sign


def _factor(most: float) -> Magnitude:
    return lambda level, sign, size: 1 + most * level * sign


def _mask(bits: Floats) -> Floats:
    """The byte that keeps the upper ``bits``."""
    mask: Floats = 256 - 2.0 ** (8 - bits)
    return mask


def _nothing(level: Floats, sign: Floats, size: int) -> Floats:
    return np.zeros_like(level)


def _torchvision(shear: float, translate: Magnitude, rotate: float, factor: float, bits: int) -> dict[str, Magnitude]:
    return {
        "identity": _nothing,
        "shear-x": _signed(shear),
        "shear-y": _signed(shear),
        "translate-x": translate,
        "translate-y": translate,
        "rotate": _signed(rotate),
        "brightness": _factor(factor),
        "saturation": _factor(factor),
        "contrast": _factor(factor),
        "sharpness": _factor(factor),
        "posterize": lambda level, sign, size: _mask(8 - np.rint(bits * level)),
        "solarize": lambda level, sign, size: 255 * (1 - level),
        "auto-contrast": _nothing,
        "equalize": _nothing,
    }


_RAND = _torchvision(0.3, _share(150 / 331), 30, 0.9, 4)


def _increasing(level: Floats, sign: Floats, size: int) -> Floats:
    return np.maximum(0.1, 1 + 0.9 * level * sign)


TABLES: dict[str, Table] = {
    "torchvision": tuple(_RAND.items()),
    "trivial": tuple(_torchvision(0.99, _signed(32), 135, 0.99, 6).items()),
    "auto": tuple((name, f) for name, f in {**_RAND, "invert": _nothing}.items() if name != "identity"),
    "timm": (
        ("auto-contrast", _nothing),
        ("equalize", _nothing),
        ("invert", _nothing),
        ("rotate", _signed(30)),
        ("posterize", lambda level, sign, size: _mask(4 - np.trunc(4 * level))),
        ("solarize", lambda level, sign, size: 256 - np.trunc(256 * level)),
        ("solarize-add", lambda level, sign, size: np.minimum(128, np.trunc(110 * level))),
        ("saturation", _increasing),
        ("contrast", _increasing),
        ("brightness", _increasing),
        ("sharpness", _increasing),
        ("shear-x", _signed(0.3)),
        ("shear-y", _signed(0.3)),
        ("translate-x", _share(0.45)),
        ("translate-y", _share(0.45)),
    ),
}
"""The operations that `RandAugment`, `TrivialAugment` and `AutoAugment` choose from, each as likely as the others."""

# name, probability, bin of 0..9; the two of a pair are joined by +
_PUBLISHED = {
    "imagenet": """
        posterize 0.4 8 + rotate 0.6 9, solarize 0.6 5 + auto-contrast 0.6 0, equalize 0.8 0 + equalize 0.6 0,
        posterize 0.6 7 + posterize 0.6 6, equalize 0.4 0 + solarize 0.2 4, equalize 0.4 0 + rotate 0.8 8,
        solarize 0.6 3 + equalize 0.6 0, posterize 0.8 5 + equalize 1 0, rotate 0.2 3 + solarize 0.6 8,
        equalize 0.6 0 + posterize 0.4 6, rotate 0.8 8 + saturation 0.4 0, rotate 0.4 9 + equalize 0.6 0,
        equalize 0 0 + equalize 0.8 0, invert 0.6 0 + equalize 1 0, saturation 0.6 4 + contrast 1 8,
        rotate 0.8 8 + saturation 1 2, saturation 0.8 8 + solarize 0.8 7, sharpness 0.4 7 + invert 0.6 0,
        shear-x 0.6 5 + equalize 1 0, saturation 0.4 0 + equalize 0.6 0, equalize 0.4 0 + solarize 0.2 4,
        solarize 0.6 5 + auto-contrast 0.6 0, invert 0.6 0 + equalize 1 0, saturation 0.6 4 + contrast 1 8,
        equalize 0.8 0 + equalize 0.6 0
    """,
    "cifar10": """
        invert 0.1 0 + contrast 0.2 6, rotate 0.7 2 + translate-x 0.3 9, sharpness 0.8 1 + sharpness 0.9 3,
        shear-y 0.5 8 + translate-y 0.7 9, auto-contrast 0.5 0 + equalize 0.9 0, shear-y 0.2 7 + posterize 0.3 7,
        saturation 0.4 3 + brightness 0.6 7, sharpness 0.3 9 + brightness 0.7 9, equalize 0.6 0 + equalize 0.5 0,
        contrast 0.6 7 + sharpness 0.6 5, saturation 0.7 7 + translate-x 0.5 8, equalize 0.3 0 + auto-contrast 0.4 0,
        translate-y 0.4 3 + sharpness 0.2 6, brightness 0.9 6 + saturation 0.2 8, solarize 0.5 2 + invert 0 0,
        equalize 0.2 0 + auto-contrast 0.6 0, equalize 0.2 0 + equalize 0.6 0, saturation 0.9 9 + equalize 0.6 0,
        auto-contrast 0.8 0 + solarize 0.2 8, brightness 0.1 3 + saturation 0.7 0,
        solarize 0.4 5 + auto-contrast 0.9 0, translate-y 0.9 9 + translate-y 0.7 9,
        auto-contrast 0.9 0 + solarize 0.8 3, equalize 0.8 0 + invert 0.1 0, translate-y 0.7 9 + auto-contrast 0.9 0
    """,
    "svhn": """
        shear-x 0.9 4 + invert 0.2 0, shear-y 0.9 8 + invert 0.7 0, equalize 0.6 0 + solarize 0.6 6,
        invert 0.9 0 + equalize 0.6 0, equalize 0.6 0 + rotate 0.9 3, shear-x 0.9 4 + auto-contrast 0.8 0,
        shear-y 0.9 8 + invert 0.4 0, shear-y 0.9 5 + solarize 0.2 6, invert 0.9 0 + auto-contrast 0.8 0,
        equalize 0.6 0 + rotate 0.9 3, shear-x 0.9 4 + solarize 0.3 3, shear-y 0.8 8 + invert 0.7 0,
        equalize 0.9 0 + translate-y 0.6 6, invert 0.9 0 + equalize 0.6 0, contrast 0.3 3 + rotate 0.8 4,
        invert 0.8 0 + translate-y 0 2, shear-y 0.7 6 + solarize 0.4 8, invert 0.6 0 + rotate 0.8 4,
        shear-y 0.3 7 + translate-x 0.9 3, shear-x 0.1 6 + invert 0.6 0, solarize 0.7 2 + translate-y 0.6 7,
        shear-y 0.8 4 + invert 0.8 0, shear-x 0.7 9 + translate-y 0.8 3, shear-y 0.8 5 + auto-contrast 0.7 0,
        shear-x 0.7 2 + invert 0.1 0
    """,
}


def _pairs(text: str) -> tuple[tuple[tuple[str, float, int], ...], ...]:
    def one(words: Any) -> tuple[str, float, int]:
        name, probability, magnitude = words.split()
        return name, float(probability), int(magnitude)

    return tuple(tuple(one(part) for part in pair.split("+")) for pair in text.split(","))


AUTO_AUGMENT = {name: _pairs(text) for name, text in _PUBLISHED.items()}
"""AutoAugment's pairs by policy: (name, probability, bin) twice."""
