"""SSD's photometric distortion: six steps per sample, each of which may do nothing (`operations.py` has the others)."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from feedfast.data.operations import Drawn, PixelOperation, Probability, Range
from feedfast.data.steps import CODE_OF, Words, between, unit

__all__ = ["PhotometricDistort"]

_STEPS = ("brightness", "contrast", "saturation", "hue", "contrast", "permute-channels")


class PhotometricDistort(PixelOperation):
    """Brightness, contrast, saturation, hue and the order of channels, each or not (torchvision's, as SSD's authors').

    Contrast comes before saturation and hue or after them. ``p`` is of each part, and of the order of channels.
    """

    op: Literal["photometric-distort"] = "photometric-distort"
    p: Probability = Field(0.5, description="how often, of each part")
    brightness: Range = Field((0.875, 1.125), description="factor, from and to")
    contrast: Range = Field((0.5, 1.5), description="factor, from and to")
    saturation: Range = Field((0.5, 1.5), description="factor, from and to")
    hue: FiniteFloat = Field(0.05, ge=0, le=0.5, description="turns of -h to h, of a full circle")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("brightness", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name}: expected 0 <= from <= to, found {[low, high]}")
        return self

    @property
    def slots(self) -> int:
        return len(_STEPS)

    @property
    def words(self) -> int:
        return 13

    @property
    def emits(self) -> tuple[int, ...]:
        return tuple(sorted({code for codes in self.emits_by_slot for code in codes}))

    @property
    def emits_by_slot(self) -> tuple[tuple[int, ...], ...]:
        return tuple((0, CODE_OF[name]) for name in _STEPS)

    def draw(self, words: Words, size: int) -> Drawn:
        codes, parameters = self._drawn(len(words))
        on = unit(words[:, :5]) < self.p  # brightness, contrast, saturation, hue, channels
        contrast = between(words[:, 6], *self.contrast)
        early = unit(words[:, 9]) < 0.5
        turn = between(words[:, 8], -360 * self.hue, 360 * self.hue)
        steps = (
            (on[:, 0], between(words[:, 5], *self.brightness)),
            (on[:, 1] & early, contrast),
            (on[:, 2], between(words[:, 7], *self.saturation)),
            (on[:, 3], turn),
            (on[:, 1] & ~early, contrast),
        )
        for slot, (applied, value) in enumerate(steps):
            codes[:, slot] = np.where(applied, CODE_OF[_STEPS[slot]], 0)
            parameters[:, slot, 0] = np.where(applied, value, 0)
        codes[:, -1] = np.where(on[:, 4], CODE_OF["permute-channels"], 0)
        parameters[:, -1, :3] = np.where(on[:, 4:], np.argsort(words[:, 10:], axis=1, kind="stable"), 0)
        return codes, parameters
