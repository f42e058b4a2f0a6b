"""Top-1 of teachers on labeled rows: a teacher that was normalized wrongly, or never got its weights, shows itself.

Rows are those of augmented training images, as the teachers see them while caching: the number is no validation
accuracy, and is told apart from chance, not compared with a paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

SIGMAS = 3.0  # a guess exceeds chance by more in one of 700 cases


@dataclass
class Top1:
    """How many labeled rows a teacher got right so far.

    Attributes:
        classes: of the images; a teacher of other classes is not counted.
        correct: rows whose largest logit is the label's.
        rows: labeled rows seen.
    """

    classes: int
    correct: int = 0
    rows: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K], labels int64 [B], -1 where there is none; on any devices."""
        if logits.dim() != 2 or logits.shape[1] != self.classes:
            return
        labels = labels.to(logits.device)
        self.rows += int((labels >= 0).sum())
        self.correct += int((logits.argmax(1) == labels).sum())

    @property
    def value(self) -> float | None:
        """Share of the labeled rows, None without any."""
        return self.correct / self.rows if self.rows else None

    @property
    def near_chance(self) -> bool:
        """Whether guessing would do as well: within `SIGMAS` standard errors, or a quarter, of 1 / classes."""
        if not self.rows or self.classes < 2:
            return False
        chance = 1 / self.classes
        error = math.sqrt(chance * (1 - chance) / self.rows)
        return self.correct / self.rows <= max(chance + SIGMAS * error, 1.25 * chance)

    def warning(self, name: str) -> str:
        """One sentence for a teacher near chance."""
        return (
            f"teachers[{name}]: top-1 {self.correct / max(self.rows, 1):.1%} on {self.rows:,} training rows, "
            f"chance is {1 / self.classes:.1%}; are weights, mean, std and the order of classes the teacher's own?"
        )
