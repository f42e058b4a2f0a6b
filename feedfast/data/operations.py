"""What a view does to its pixels beyond crop and flip: operations, how they are drawn, and the program they become.

An operation of the recipe (`ColorJitter`, `RandAugment`, ...) is drawn from words that belong to (seed, view, sample,
its place in the list) alone, and *resolved*: what is left is a fixed number of steps per sample, each a code with its
parameters, in the order in which they run (`steps.py`).

Distributions are torchvision's of the same names unless the class says otherwise; pixels are DALI's (`graph.py`).
Units: pixels of the output square, degrees, factors (1 = unchanged); rows come before columns. No DALI here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from feedfast.data.policies import AUTO_AUGMENT, TABLES, Table
from feedfast.data.steps import CODE_OF, PARAMETERS, Words, affine, between, normal, unit

__all__ = [
    "Affine", "AutoAugment", "ColorJitter", "GaussianBlur", "Grayscale", "Options", "PixelOperation", "Probability",
    "RandAugment", "RandomErasing", "Rotate", "Solarize", "TrivialAugment",
]  # fmt: skip

Drawn = tuple[NDArray[np.uint8], NDArray[np.float32]]
Probability = Annotated[FiniteFloat, Field(ge=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Fill = tuple[Byte, Byte, Byte]
Range = tuple[FiniteFloat, FiniteFloat]


def refuse_window(scale: Range, ratio: Range) -> None:
    """Raise unless these are ranges of a window's share of the image and of its sides' ratio."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < from <= to <= 1, found {list(scale)}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio: expected 0 < from <= to, found {list(ratio)}")


Interpolation = Literal["nearest", "bilinear"]


class Options(BaseModel):
    """One table of the list."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_ATTEMPTS = 10  # torchvision's RandomErasing gives up after ten


class PixelOperation(Options):
    """One entry of the list. Subclasses say how many words a sample needs and how many steps they become."""

    op: str
    p: Probability = Field(1.0, description="how often it is applied")

    @property
    def slots(self) -> int:
        """Steps per sample."""
        return 1

    @property
    def words(self) -> int:
        """64-bit words per sample."""
        raise NotImplementedError

    @property
    def emits(self) -> tuple[int, ...]:
        """Codes it may become, ascending, identity among them where it may do nothing."""
        raise NotImplementedError

    @property
    def emits_by_slot(self) -> tuple[tuple[int, ...], ...]:
        """The same of each of its steps."""
        return (self.emits,) * self.slots

    def draw(self, words: Words, size: int) -> Drawn:
        """Codes [n, slots] and parameters [n, slots, `PARAMETERS`] of each sample.

        Args:
            words: uint64 [n, `words`].
            size: side of the square.
        """
        raise NotImplementedError

    def _drawn(self, n: int) -> Drawn:
        return np.zeros((n, self.slots), np.uint8), np.zeros((n, self.slots, PARAMETERS), np.float32)

    def _one_step(self, on: NDArray[np.bool_], code: str, values: NDArray[np.float64]) -> Drawn:
        """The draw of an operation that is one step: ``code`` with ``values`` [n, k] where it is on, else identity."""
        codes, parameters = self._drawn(len(on))
        codes[:, 0] = np.where(on, CODE_OF[code], 0)
        parameters[:, 0, : values.shape[1]] = np.where(on[:, None], values, 0)
        return codes, parameters


class ColorJitter(PixelOperation):
    """Brightness, contrast, saturation and hue in an order drawn per sample (torchvision's ColorJitter)."""

    op: Literal["color-jitter"] = "color-jitter"
    brightness: FiniteFloat = Field(0.0, ge=0, description="factors of max(0, 1 - b) to 1 + b; 0 = never")
    contrast: FiniteFloat = Field(0.0, ge=0, description="as brightness")
    saturation: FiniteFloat = Field(0.0, ge=0, description="as brightness")
    hue: FiniteFloat = Field(0.0, ge=0, le=0.5, description="turns of -h to h, of a full circle")

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self._widths:
            raise ValueError("expected at least one of brightness, contrast, saturation and hue above 0")
        return self

    @property
    def _widths(self) -> dict[str, float]:
        widths = {name: float(getattr(self, name)) for name in ("brightness", "contrast", "saturation", "hue")}
        return {name: width for name, width in widths.items() if width}

    @property
    def slots(self) -> int:
        return len(self._widths)

    @property
    def words(self) -> int:
        return 1 + 2 * self.slots

    @property
    def emits(self) -> tuple[int, ...]:
        return (*([0] if self.p < 1 else []), *(CODE_OF[name] for name in self._widths))

    def draw(self, words: Words, size: int) -> Drawn:
        codes, parameters = self._drawn(len(words))
        values = np.empty((len(words), self.slots))
        for index, (name, width) in enumerate(self._widths.items()):
            low, high = (-360 * width, 360 * width) if name == "hue" else (max(0.0, 1 - width), 1 + width)
            values[:, index] = between(words[:, 1 + index], low, high)
        order = np.argsort(words[:, 1 + self.slots :], axis=1, kind="stable")
        on = unit(words[:, 0]) < self.p
        named = np.array([CODE_OF[name] for name in self._widths], np.uint8)
        codes[:] = np.where(on[:, None], named[order], 0)
        parameters[:, :, 0] = np.where(on[:, None], np.take_along_axis(values, order, axis=1), 0)
        return codes, parameters


class Grayscale(PixelOperation):
    """All three channels the luma of Rec. 601 (torchvision's RandomGrayscale): saturation 0."""

    op: Literal["grayscale"] = "grayscale"
    p: Probability = Field(0.1, description="how often it is applied")

    @property
    def words(self) -> int:
        return 1

    @property
    def emits(self) -> tuple[int, ...]:
        return (0, CODE_OF["saturation"])

    def draw(self, words: Words, size: int) -> Drawn:
        return self._one_step(unit(words[:, 0]) < self.p, "saturation", np.zeros((len(words), 1)))


class GaussianBlur(PixelOperation):
    """A Gaussian of a width drawn uniformly, over ``kernel`` pixels (torchvision's GaussianBlur)."""

    op: Literal["gaussian-blur"] = "gaussian-blur"
    p: Probability = Field(0.5, description="how often it is applied")
    sigma: Range = Field((0.1, 2.0), description="pixels, from and to")
    kernel: int = Field(23, ge=3, le=255, description="pixels, odd")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma: expected 0 < from <= to, found {list(self.sigma)}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number of pixels, found {self.kernel}")
        return self

    @property
    def words(self) -> int:
        return 2

    @property
    def emits(self) -> tuple[int, ...]:
        return (0, CODE_OF["gaussian-blur"])

    def draw(self, words: Words, size: int) -> Drawn:
        return self._one_step(unit(words[:, 0]) < self.p, "gaussian-blur", between(words[:, 1:2], *self.sigma))


class Solarize(PixelOperation):
    """Bytes at or above the threshold are inverted (torchvision's RandomSolarize)."""

    op: Literal["solarize"] = "solarize"
    p: Probability = Field(0.2, description="how often it is applied")
    threshold: Byte = Field(128, description="of 0..255")

    @property
    def words(self) -> int:
        return 1

    @property
    def emits(self) -> tuple[int, ...]:
        return (0, CODE_OF["solarize"])

    def draw(self, words: Words, size: int) -> Drawn:
        return self._one_step(unit(words[:, 0]) < self.p, "solarize", np.full((len(words), 1), float(self.threshold)))


class RandomErasing(PixelOperation):
    """A box filled with one color (torchvision's RandomErasing, in bytes and before normalization)."""

    op: Literal["random-erasing"] = "random-erasing"
    p: Probability = Field(0.5, description="how often it is applied")
    scale: Range = Field((0.02, 0.33), description="share of the image's area, from and to")
    ratio: Range = Field((0.3, 3.3), description="height over width, from and to, drawn log-uniformly")
    fill: Fill = Field((0, 0, 0), description="red, green, blue; the data's mean times 255 is 0 after normalization")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_window(self.scale, self.ratio)
        return self

    @property
    def words(self) -> int:
        return 1 + 2 * _ATTEMPTS + 2

    @property
    def emits(self) -> tuple[int, ...]:
        return (0, CODE_OF["erase"])

    def draw(self, words: Words, size: int) -> Drawn:
        area = size * size * between(words[:, 1 : 1 + 2 * _ATTEMPTS : 2], *self.scale)
        ratio = np.exp(between(words[:, 2 : 2 + 2 * _ATTEMPTS : 2], math.log(self.ratio[0]), math.log(self.ratio[1])))
        height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (height < size) & (width < size) & (height > 0) & (width > 0)
        first = np.argmax(fits, axis=1)[:, None]
        height, width = (np.take_along_axis(values, first, axis=1)[:, 0] for values in (height, width))
        top = np.floor(unit(words[:, -2]) * (size - height + 1))
        left = np.floor(unit(words[:, -1]) * (size - width + 1))
        on = (unit(words[:, 0]) < self.p) & fits.any(axis=1)
        return self._one_step(on, "erase", np.stack([top, left, height, width], axis=1))


class _Warped(PixelOperation):
    """What moves pixels, resampled once."""

    interpolation: Interpolation = Field("nearest", description="nearest | bilinear")
    fill: Fill = Field((0, 0, 0), description="red, green, blue of what lies outside")


class Affine(_Warped):
    """Rotation, translation, scale and shear along x about the center (torchvision's RandomAffine)."""

    op: Literal["affine"] = "affine"
    degrees: FiniteFloat = Field(0.0, ge=0, le=180, description="rotation of -d to d")
    translate: Range = Field((0.0, 0.0), description="largest shift along x and y, as shares of the side")
    scale: Range = Field((1.0, 1.0), description="from and to")
    shear: FiniteFloat = Field(0.0, ge=0, lt=90, description="degrees, of -s to s")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not all(0 <= share <= 1 for share in self.translate):
            raise ValueError(f"translate: expected two shares from 0 to 1, found {list(self.translate)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: expected 0 < from <= to, found {list(self.scale)}")
        return self

    @property
    def words(self) -> int:
        return 6

    @property
    def emits(self) -> tuple[int, ...]:
        return (*([0] if self.p < 1 else []), CODE_OF["affine"])

    def draw(self, words: Words, size: int) -> Drawn:
        shift = [np.rint(between(words[:, 2 + i], -s * size, s * size)) for i, s in enumerate(self.translate)]
        matrix = affine(
            size,
            degrees=between(words[:, 1], -self.degrees, self.degrees),
            x=shift[0],
            y=shift[1],
            scale=between(words[:, 4], *self.scale),
            shear_x=between(words[:, 5], -self.shear, self.shear),
        )
        return self._one_step(unit(words[:, 0]) < self.p, "affine", matrix)


class Rotate(_Warped):
    """Rotation about the center (torchvision's RandomRotation)."""

    op: Literal["rotate"] = "rotate"
    degrees: FiniteFloat = Field(15.0, ge=0, le=180, description="of -d to d, counter-clockwise")

    @property
    def words(self) -> int:
        return 2

    @property
    def emits(self) -> tuple[int, ...]:
        return (*([0] if self.p < 1 else []), CODE_OF["affine"])

    def draw(self, words: Words, size: int) -> Drawn:
        turned = affine(size, degrees=-between(words[:, 1], -self.degrees, self.degrees))
        return self._one_step(unit(words[:, 0]) < self.p, "affine", turned)


class RandAugment(_Warped):
    """``count`` operations of a table, each with the given magnitude (Cubuk et al., RandAugment, 2020).

    ``space = "torchvision"``: torchvision's 14 operations; ``"timm"``: timm's 15 "increasing" ones of ``rand-m9-inc1``.
    """

    op: Literal["rand-augment"] = "rand-augment"
    p: Probability = Field(1.0, description="how often each of the operations drawn is applied; timm: 0.5")
    count: int = Field(2, ge=1, le=8, description="operations per sample")
    magnitude: FiniteFloat = Field(9.0, ge=0, description="torchvision: a bin of 0..30; timm: 0..10")
    magnitude_std: FiniteFloat = Field(0.0, ge=0, description="deviation of the magnitude, normal, clipped; timm: 0.5")
    space: Literal["torchvision", "timm"] = "torchvision"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.magnitude > self._most:
            raise ValueError(f"magnitude: expected 0 to {self._most} for {self.space}, found {self.magnitude}")
        if self.space == "torchvision" and self.magnitude != int(self.magnitude):
            raise ValueError(f"magnitude: expected a bin from 0 to 30 for torchvision, found {self.magnitude}")
        return self

    @property
    def _most(self) -> int:
        return 30 if self.space == "torchvision" else 10

    @property
    def slots(self) -> int:
        return self.count

    @property
    def words(self) -> int:
        return 5 * self.count

    @property
    def emits(self) -> tuple[int, ...]:
        return _codes_of(name for name, _ in TABLES[self.space])

    def draw(self, words: Words, size: int) -> Drawn:
        codes, parameters = self._drawn(len(words))
        table = TABLES[self.space]
        for slot in range(self.count):
            own = words[:, 5 * slot : 5 * slot + 5]
            which = np.floor(unit(own[:, 0]) * len(table)).astype(np.int64)
            level = np.full(len(words), float(self.magnitude))
            if self.magnitude_std:
                level = (level + self.magnitude_std * normal(own[:, 2], own[:, 3])).clip(0, self._most)
                level = np.rint(level) if self.space == "torchvision" else level
            on = unit(own[:, 4]) < self.p
            _place(codes, parameters, slot, table, np.where(on, which, -1), level / self._most, own[:, 1], size)
        return codes, parameters


class TrivialAugment(_Warped):
    """One operation of the wide table with one of 31 magnitudes (Mueller and Hutter, TrivialAugment, 2021)."""

    op: Literal["trivial-augment"] = "trivial-augment"

    @property
    def words(self) -> int:
        return 4

    @property
    def emits(self) -> tuple[int, ...]:
        return _codes_of(name for name, _ in TABLES["trivial"])

    def draw(self, words: Words, size: int) -> Drawn:
        codes, parameters = self._drawn(len(words))
        table = TABLES["trivial"]
        which = np.floor(unit(words[:, 0]) * len(table)).astype(np.int64)
        level = np.floor(unit(words[:, 1]) * 31) / 30
        on = unit(words[:, 3]) < self.p
        _place(codes, parameters, 0, table, np.where(on, which, -1), level, words[:, 2], size)
        return codes, parameters


class AutoAugment(_Warped):
    """One of the published pairs of operations, each with its probability and magnitude (Cubuk et al., 2019)."""

    op: Literal["auto-augment"] = "auto-augment"
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"

    @property
    def slots(self) -> int:
        return 2

    @property
    def words(self) -> int:
        return 6

    @property
    def emits(self) -> tuple[int, ...]:
        return _codes_of(name for pair in AUTO_AUGMENT[self.policy] for name, _, _ in pair)

    def draw(self, words: Words, size: int) -> Drawn:
        codes, parameters = self._drawn(len(words))
        policy, table = AUTO_AUGMENT[self.policy], TABLES["auto"]
        number = {name: index for index, (name, _) in enumerate(table)}
        chosen = np.floor(unit(words[:, 0]) * len(policy)).astype(np.int64)
        applied = unit(words[:, 1]) < self.p
        for slot in range(2):
            which = np.array([number[pair[slot][0]] for pair in policy])[chosen]
            often = np.array([pair[slot][1] for pair in policy])[chosen]
            level = np.array([pair[slot][2] for pair in policy])[chosen] / 9
            on = applied & (unit(words[:, 2 + slot]) < often)
            _place(codes, parameters, slot, table, np.where(on, which, -1), level, words[:, 4 + slot], size)
        return codes, parameters


def _codes_of(names: Iterable[str]) -> tuple[int, ...]:
    """Ascending codes of a table's entries, and identity."""
    moving = {"shear-x", "shear-y", "translate-x", "translate-y", "rotate"}
    return tuple(sorted({0, *(CODE_OF["affine"] if name in moving else CODE_OF[name] for name in names)}))


def _place(
    codes: NDArray[np.uint8],
    parameters: NDArray[np.float32],
    slot: int,
    table: Table,
    which: NDArray[np.int64],
    level: NDArray[np.float64],
    sign_words: NDArray[np.uint64],
    size: int,
) -> None:
    """Resolve one slot: entry ``which`` of the table (-1 = none) at ``level`` of 0..1."""
    sign = np.where(unit(sign_words) < 0.5, -1.0, 1.0)
    for index, (name, magnitude) in enumerate(table):
        at = np.flatnonzero(which == index)
        if not at.size or name == "identity":
            continue
        value = magnitude(level[at], sign[at], size)
        if name in ("rotate", "shear-x", "shear-y", "translate-x", "translate-y"):
            codes[at, slot] = CODE_OF["affine"]
            parameters[at, slot] = _moved(name, value, size)
        else:
            codes[at, slot] = CODE_OF[name]
            parameters[at, slot, 0] = value


def _moved(name: str, value: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The matrices of a table's geometric entries."""
    if name == "rotate":
        return affine(size, degrees=-value)  # torchvision and PIL turn counter-clockwise
    if name == "translate-x":
        return affine(size, x=np.trunc(value))
    if name == "translate-y":
        return affine(size, y=np.trunc(value))
    # sheared about the top left corner, as PIL does it: output (x, y) shows source (x + s * y, y)
    matrix = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(value), 1))
    matrix[:, 1 if name == "shear-x" else 3] = value
    return matrix
