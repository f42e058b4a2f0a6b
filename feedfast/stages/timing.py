"""Step and waiting times of a training loop, without evaluation and checkpoints.

A step begins when its data are asked for. On a GPU it ends when its work is queued, so only means say something there.
"""

from __future__ import annotations

import time

import numpy as np


class Timing:
    """Step and waiting times of this process, in milliseconds, without evaluation and checkpoints."""

    def __init__(self, batch: int, *, queued: bool = False) -> None:
        self.batch, self.queued = batch, queued
        self.steps: list[float] = []
        self.waits: list[float] = []
        self._checkpoint = time.perf_counter()

    def begin(self) -> None:
        """A step starts: its data are asked for."""
        self._begin = time.perf_counter()

    def waited(self) -> None:
        """The data have come."""
        self._waited = time.perf_counter()

    def end(self) -> None:
        """The step is queued (on the CPU: done)."""
        self.steps.append((time.perf_counter() - self._begin) * 1e3)
        self.waits.append((self._waited - self._begin) * 1e3)

    def checkpointed(self) -> None:
        """Restart the checkpoint clock."""
        self._checkpoint = time.perf_counter()

    def minutes_since_checkpoint(self) -> float:
        """Minutes since the last checkpoint."""
        return (time.perf_counter() - self._checkpoint) / 60

    def row(self) -> dict[str, float]:
        """The last twenty steps, for metrics.jsonl."""
        steps, waits = self.steps[-20:], self.waits[-20:]
        return {
            "images_per_second": self.batch * len(steps) / max(sum(steps) / 1e3, 1e-9),
            "data_wait_fraction": sum(waits) / max(sum(steps), 1e-9),
        }

    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(self.steps) / 1e3

    def images_per_second(self) -> float | None:
        """Images per second over the whole run, the first step (warm-up) left out when there are more."""
        steps = self.steps[1:] or self.steps
        return self.batch * len(steps) / max(sum(steps) / 1e3, 1e-9) if steps else None

    def wait_fraction(self) -> float | None:
        """Share of the time spent waiting for pixels or targets."""
        steps, waits = self.steps[1:] or self.steps, self.waits[1:] or self.waits
        return sum(waits) / max(sum(steps), 1e-9) if steps else None

    def step_ms(self) -> float | None:
        """Median step; on a GPU the mean, because there a step only queues its work until a later one waits for it."""
        steps = self.steps[1:] or self.steps
        if not steps:
            return None
        return float(np.mean(steps) if self.queued else np.median(steps))
