"""Mixing: whether, how much and where a sample shows its partner.

The partner is another row of the same view (`ViewPlan.partners`); here its share is drawn. Teachers and student see the
*mixed* image: features of two images cannot be mixed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from feedfast.data.operations import Options, Probability
from feedfast.data.steps import Words, unit

__all__ = ["MIXING_WORDS", "CutMix", "Mixing", "Mixup", "draw_mixing"]


class Mixup(Options):
    """``lambda * image + (1 - lambda) * partner`` with lambda of Beta(alpha, alpha) (Zhang et al., mixup, 2018)."""

    op: Literal["mixup"] = "mixup"
    alpha: FiniteFloat = Field(0.2, gt=0, le=1, description="of the Beta distribution")
    p: Probability = Field(1.0, description="how often; mixup's and cutmix's together at most 1")


class CutMix(Options):
    """A box of the partner pasted into the image, its share of the area 1 - lambda (Yun et al., CutMix, 2019)."""

    op: Literal["cutmix"] = "cutmix"
    alpha: FiniteFloat = Field(1.0, gt=0, le=1, description="of the Beta distribution")
    p: Probability = Field(1.0, description="as mixup's")


MIXING_WORDS = 1 + 2 * 32 + 2


@dataclass(frozen=True, eq=False)
class Mixing:
    """What of each sample's partner is seen.

    Attributes:
        weight: float32 [n], the sample's own share, in its pixels and its label; 1 = not mixed.
        box: int32 [n, 4], top, left, height, width of what is pasted (CutMix); 0 where the whole image is mixed.
    """

    weight: NDArray[np.float32]
    box: NDArray[np.int32]

    def rows(self, rows: NDArray[np.int64]) -> Mixing:
        """The same for some of the samples."""
        return Mixing(self.weight[rows], self.box[rows])


def draw_mixing(operations: tuple[Mixup | CutMix, ...], words: Words, size: int) -> Mixing:
    """Which samples are mixed and how, from `MIXING_WORDS` words each."""
    weight = np.ones(len(words))
    box = np.zeros((len(words), 4), np.int64)
    u = unit(words[:, 0])
    start = 0.0
    for operation in operations:
        on = (start <= u) & (u < start + operation.p)
        start += operation.p
        drawn = _beta(operation.alpha, words[:, 1:-2])
        if operation.op == "mixup":
            weight[on] = drawn[on]
            continue
        # the authors' box: a center anywhere, sides sqrt(1 - lambda) of the image's, cut at the edges
        side = np.floor(size * np.sqrt(1 - drawn)).astype(np.int64)
        center = np.floor(unit(words[:, -2:]) * size).astype(np.int64)
        low = (center - side[:, None] // 2).clip(0, size)
        high = (center + side[:, None] // 2).clip(0, size)
        pasted = np.concatenate([low, high - low], axis=1)
        empty = (pasted[:, 2:] == 0).any(axis=1)
        pasted[empty] = 0
        box[on] = pasted[on]
        weight[on] = (1 - pasted[:, 2] * pasted[:, 3] / size**2)[on]
    return Mixing(weight.astype(np.float32), box.astype(np.int32))


def _beta(alpha: float, words: Words) -> NDArray[np.float64]:
    """Beta(alpha, alpha), alpha <= 1: Joehnk's rejection over pairs of words; a half where all 32 miss (2^-32)."""
    power = unit(words) ** (1 / alpha)
    x, y = power[:, 0::2], power[:, 1::2]
    total = x + y
    fits = (total <= 1) & (total > 0)
    first = np.argmax(fits, axis=1)[:, None]
    x, total = (np.take_along_axis(values, first, axis=1)[:, 0] for values in (x, total))
    drawn: NDArray[np.float64] = np.where(fits.any(axis=1), x / np.where(total > 0, total, 1), 0.5)
    return drawn
