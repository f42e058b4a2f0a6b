"""The learning rate as a pure function of the step: resuming needs no state of it.

The shapes are those of torch.optim.lr_scheduler, with a linear warm-up before any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from feedfast.recipe import Train

POLY_POWER = 0.9


@dataclass(frozen=True)
class Schedule:
    """Learning rate of ``total`` steps, ``steps_per_epoch`` of them per pass over the data."""

    train: Train
    total: int
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """The rate of ``step`` (0-based).

        Warm-up is linear from lr/warm-up steps; cosine ends at 0; one-cycle climbs for 30 % from lr/25 and ends at
        lr/25e4 (torch's OneCycleLR defaults, with ``lr`` as its peak); poly is lr * (1 - share done)^0.9, as DeepLab is
        trained; step multiplies by ``gamma`` at each milestone.
        """
        train = self.train
        warm = round(train.warmup_epochs * self.steps_per_epoch)
        if step < warm:
            return train.lr * (step + 1) / warm
        done = (step - warm) / max(self.total - warm, 1)
        if train.schedule == "cosine":
            return _anneal(train.lr, 0.0, done)
        if train.schedule == "poly":
            return float(train.lr * (1 - done) ** POLY_POWER)
        if train.schedule == "step":
            passed = sum(step >= round(milestone * self.total) for milestone in train.milestones)
            return train.lr * train.gamma**passed
        if train.schedule == "one-cycle":
            low, last, rise = train.lr / 25, train.lr / 25e4, 0.3
            if done < rise:
                return _anneal(low, train.lr, done / rise)
            return _anneal(train.lr, last, (done - rise) / (1 - rise))
        return train.lr


def total_steps(train: Train, count: int) -> int:
    """Steps of a run on ``count`` images: ``train.steps``, or as many as whole batches in its epochs."""
    return train.steps or count // train.batch * train.epochs


def _anneal(start: float, end: float, done: float) -> float:
    """Half a cosine from ``start`` (done = 0) to ``end`` (done = 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
