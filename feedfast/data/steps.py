"""The steps that a view's operations are resolved to: a code with its parameters each, and what the codes are called.

Steps are what a cache stores and asserts again, in the order in which they run; `TABLE` is part of its identity, so a
later version cannot silently mean other pixels. Units: pixels of the output square, degrees, factors (1 = unchanged);
rows come before columns. What draws them is in `operations.py`, what runs them in `graph.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CODES", "CODE_OF", "PARAMETERS", "TABLE", "Program", "Words", "affine", "between", "describe", "normal", "unit",
]  # fmt: skip

Words = NDArray[np.uint64]
"""Words of a sample are its own, whatever else is drawn; see `feedfast.data.views`."""

TABLE = "1"
"""Version of what the codes mean; any change that moves a pixel raises it."""

CODES = (
    "identity", "brightness", "contrast", "saturation", "hue", "sharpness", "posterize", "solarize", "solarize-add",
    "invert", "auto-contrast", "equalize", "gaussian-blur", "affine", "erase", "permute-channels",
)  # fmt: skip
"""Names by code. Never renumber one; add new ones at the end."""

CODE_OF = {name: code for code, name in enumerate(CODES)}

PARAMETERS = 6
"""Numbers per step: one for most codes (see `describe`), 6 for affine (rows of the output-to-source matrix), 4 for
erase (top, left, height, width), 3 for permute-channels (of each channel the one that it is taken from)."""


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of each sample, in the order in which they run; a slot's static arguments are its operation's.

    Attributes:
        codes: uint8 [n, slots].
        parameters: float32 [n, slots, `PARAMETERS`], 0 where a code needs fewer.
    """

    codes: NDArray[np.uint8]
    parameters: NDArray[np.float32]

    def rows(self, rows: NDArray[np.int64]) -> Program:
        """The same for some of the samples."""
        return Program(self.codes[rows], self.parameters[rows])


def describe(code: int, parameters: NDArray[np.float32]) -> str:
    """One step in words, for people."""
    name, first = CODES[code], float(parameters[0])
    if name in ("identity", "invert", "auto-contrast", "equalize"):
        return name
    if name == "erase":
        top, left, height, width = (int(value) for value in parameters[:4])
        return f"erase {height}x{width} at {top},{left}"
    if name == "permute-channels":
        return "channels " + "".join("RGB"[int(value)] for value in parameters[:3])
    if name == "affine":
        return _describe_affine(*parameters.tolist())
    if name == "posterize":
        return f"posterize to {8 - round(math.log2(256 - first))} bits"
    unit = {"hue": " deg", "gaussian-blur": " px"}.get(name, "")
    return f"{name} {first:.3g}{unit}"


def _describe_affine(a: float, b: float, x: float, c: float, d: float, y: float) -> str:
    """The pure moves of the policies by their names; others by their turn and scale."""
    if a == d == 1 and b == c == 0:
        return f"shifted {round(-y)},{round(-x)}"
    if a == d == 1 and (b == 0 or c == 0):
        return f"sheared {b or c:+.2f} along {'x' if b else 'y'}"
    scale = 1 / math.sqrt(abs(a * d - b * c))
    turn = math.degrees(math.atan2(-c, d))  # clockwise
    return f"turned {turn:.0f} deg" + (f", scaled {scale:.2f}" if abs(scale - 1) > 1e-3 else "")


def affine(
    size: int,
    *,
    degrees: NDArray[np.float64] | float = 0.0,
    x: NDArray[np.float64] | float = 0.0,
    y: NDArray[np.float64] | float = 0.0,
    scale: NDArray[np.float64] | float = 1.0,
    shear_x: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float64]:
    """Rows of the output-to-source matrix, [n, 6]: scaled, sheared, turned clockwise about the center, then shifted."""
    turn, shear = np.radians(degrees), np.radians(shear_x)
    a, b = np.cos(turn), -np.cos(turn) * np.tan(shear) - np.sin(turn)  # scale * R(turn) * S(shear), source to output
    c, d = np.sin(turn), -np.sin(turn) * np.tan(shear) + np.cos(turn)
    values = np.broadcast_arrays(d / scale, -b / scale, -c / scale, a / scale, x, y)  # its determinant is scale^2
    m00, m01, m10, m11, dx, dy = (np.atleast_1d(value).astype(np.float64) for value in values)
    middle = size / 2
    m02 = middle - m00 * (middle + dx) - m01 * (middle + dy)
    m12 = middle - m10 * (middle + dx) - m11 * (middle + dy)
    return np.stack([m00, m01, m02, m10, m11, m12], axis=1)


def normal(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal of two words (Box and Muller)."""
    drawn: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-unit(first))) * np.cos(2 * np.pi * unit(second))
    return drawn


def unit(words: Words) -> NDArray[np.float64]:
    """Uniform on [0, 1): the top 53 bits."""
    unit: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return unit


def between(words: Words, low: float, high: float) -> NDArray[np.float64]:
    """Uniform on [low, high)."""
    return low + (high - low) * unit(words)
