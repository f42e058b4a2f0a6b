"""How good each teacher is on the labeled rows it runs: a teacher at chance computes maps as quietly as any other.

Wrong normalization, weights that were never loaded, classes in another order: all show here and nowhere else before a
student is trained. Counted only where a teacher has as many outputs as the data have classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from feedfast.tasks.classify import Mixed, Top1
from feedfast.tasks.segment import IGNORE

log = logging.getLogger(__name__)

HITS = 5  # expected at the limit: with fewer rows than that chance itself scatters across it

Counts = dict[str, dict[str, int]]
"""Teacher → what its metric counts → how many."""


class Accuracies:
    """Top-1 of some teachers, counted as they run.

    Args:
        outputs: teacher → length of its logits.
        classes: of the data; 0 = no labels.
    """

    def __init__(self, outputs: Mapping[str, int], classes: int) -> None:
        self.classes = classes
        self._metrics = {name: Top1() for name, count in outputs.items() if classes > 1 and count == classes}

    def update(self, teacher: str, logits: Tensor | None, labels: Tensor | Mixed) -> None:
        """Take logits [B, K] and labels int64 [B], -1 = unlabeled, into account; of mixed images those that are not.

        Or logits [B, K, h, w] and masks int64 [B, H, W], each place of the logits by the pixel in its middle.
        """
        if teacher not in self._metrics or logits is None:
            return
        if not isinstance(labels, Tensor):
            labels = torch.where(labels.weight == 1, labels.first, -1)
        if logits.dim() == 4:
            labels = F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
            labels = labels.where(labels != IGNORE, -1)
        self._metrics[teacher].update(logits, labels.to(logits.device))

    def of(self, teacher: str) -> tuple[float | None, int]:
        """Top-1 in 0..1 and the number of labeled rows it is of; None and 0 where nothing was counted."""
        if teacher not in self._metrics:
            return None, 0
        metric = self._metrics[teacher]
        return metric.compute()["accuracy"], int(metric.state()["labeled"])

    def counts(self) -> Counts:
        """What was counted so far, as plain numbers."""
        return {
            name: {key: int(value) for key, value in metric.state().items()} for name, metric in self._metrics.items()
        }

    def merge(self, counts: Sequence[Counts]) -> None:
        """Hold the sum of what several have counted, in place of what was counted here."""
        for name, metric in self._metrics.items():
            metric.merge([{key: torch.tensor(value) for key, value in one[name].items()} for one in counts])


def chance_limit(classes: int) -> float:
    """Top-1 below which a teacher counts as near chance: twice chance, or a tenth of the way from chance to 1.

    Whichever is lower: with two classes twice chance would be perfection.
    """
    chance = 1 / classes
    return min(2 * chance, chance + 0.1 * (1 - chance))


def near_chance(top1: float | None, rows: int, classes: int) -> bool:
    """Whether a top-1 counts as near chance: below `chance_limit`, on rows enough to expect 5 hits there."""
    return top1 is not None and classes > 1 and rows * chance_limit(classes) >= HITS and top1 < chance_limit(classes)


def tell_accuracy(teacher: str, top1: float | None, rows: int, classes: int, task: str = "classify") -> None:
    """Log a teacher's top-1, as a warning near chance; of ``task`` segment it is of pixels."""
    if top1 is None:
        return
    unit = "pixels" if task == "segment" else "rows"
    if near_chance(top1, rows, classes):
        log.warning(
            "teachers[%s]: top-1 %.1f %% on %s labeled %s, near chance (%.1f %% of %d classes): are its weights the "
            "right file, its mean and std those it was trained with, its classes in the order of data.train?",
            *(teacher, 100 * top1, f"{rows:,}", unit, 100 / classes, classes),
        )
    else:
        log.info("teachers[%s]: top-1 %.1f %% on %s labeled %s", teacher, 100 * top1, f"{rows:,}", unit)
