"""Classification: logits [B, K], cross-entropy with class numbers, top-1 accuracy.

Class number -1 is an image without a label: it counts in no loss and no metric. A mixed image (mixup, CutMix) has two
class numbers and the share of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from feedfast.errors import RequestError
from feedfast.tasks.base import Outputs, described, wide


class Mixed(Protocol):
    """Two labels per image: class numbers int64 [B] of both, and the first one's share, float [B] in 0..1."""

    first: Tensor
    second: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Classify:
    """One of ``classes`` classes per image; 0 = as many as the network has outputs."""

    classes: int = 0
    name: str = "classify"
    term: str = "ce"
    score: str = "accuracy"

    def check(self, outputs: Outputs, where: str) -> None:
        """Raise unless a network returns one tensor of logits [B, K] with K = ``classes``.

        Args:
            outputs: of one sample, as the network was seen to return them.
            where: begins the message.

        Raises:
            RequestError: it is no classifier, or one of other classes.
        """
        if not isinstance(outputs, tuple) or len(outputs) != 1:
            raise RequestError(
                f"{where}: expected a classifier that returns logits [batch, class], found {described(outputs)}"
            )
        if self.classes and outputs[0] != self.classes:
            raise RequestError(f"{where}: expected logits of {self.classes} classes, found {outputs[0]}")

    def loss(self, output: Tensor, annotations: Tensor | Mixed) -> Tensor:
        """`label_loss`."""
        return label_loss(output, annotations)

    def metric(self) -> Top1:
        """Top-1 accuracy, called ``accuracy``."""
        return Top1()


def label_loss(logits: Tensor, labels: Tensor | Mixed) -> Tensor:
    """Cross-entropy with the hard labels, averaged over the labeled samples of the batch.

    Args:
        logits: [B, K], any float dtype; computed in fp32 (float64 stays).
        labels: int64 [B], -1 is unlabeled; of mixed images two and a share, each counting for its share.

    Returns:
        Scalar; 0 (with a zero gradient) if no sample is labeled.
    """
    wide_logits = wide(logits)
    if not isinstance(labels, Tensor):
        weight = labels.weight.to(wide_logits.dtype)
        parts = [(labels.first, weight), (labels.second, 1 - weight)]
        losses = [F.cross_entropy(wide_logits, own, ignore_index=-1, reduction="none") * share for own, share in parts]
        counted = [(share * (own != -1)).sum() for own, share in parts]
        whole = counted[0] + counted[1]
        return (losses[0] + losses[1]).sum() / whole.where(whole > 0, 1)
    total = F.cross_entropy(wide_logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)


class Top1:
    """Share of the labeled samples whose largest logit is that of their class."""

    def __init__(self) -> None:
        self._right = self._labeled = torch.zeros((), dtype=torch.int64)

    def update(self, output: Tensor, annotations: Tensor) -> None:
        """Logits [B, K] and labels int64 [B], -1 is unlabeled; nothing waits for a GPU here."""
        labeled = annotations >= 0
        self._right = self._right + ((output.argmax(1) == annotations) & labeled).sum()
        self._labeled = self._labeled + labeled.sum()

    def state(self) -> dict[str, Tensor]:
        """Counts, int64 scalars."""
        return {"right": self._right.cpu(), "labeled": self._labeled.cpu()}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Add all ranks' counts."""
        self._right = torch.stack([state["right"] for state in states]).sum()
        self._labeled = torch.stack([state["labeled"] for state in states]).sum()

    def compute(self) -> dict[str, float | None]:
        """``accuracy``, 0..1."""
        total = int(self._labeled)
        return {"accuracy": int(self._right) / total if total else None}
