"""The words all tasks share: an output check, a loss of the annotations, and a metric.

A task says what a network's output must look like, what it costs to be wrong about the annotations, and how good it is
on validation images. It knows neither teachers nor methods: those add their own terms to its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Metric(Protocol):
    """Counts over validation batches. Ranks count separately; `merge` puts their counts together."""

    def update(self, output: Any, annotations: Any) -> None:
        """Take one batch into account: a network's output, and what the images are annotated with."""

    def state(self) -> dict[str, Tensor]:
        """What this rank has counted, as tensors."""

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Replace the counts by those of all ranks together; ``states`` holds every rank's, this one's included."""

    def compute(self) -> dict[str, float | None]:
        """Name → value; None where nothing was annotated."""


class Task(Protocol):
    """What is learned."""

    @property
    def name(self) -> str:
        """As recipes and manifests call it."""

    @property
    def term(self) -> str:
        """What its loss is called among a step's losses."""

    def check(self, outputs: tuple[int, ...] | None, where: str) -> None:
        """Raise a RequestError unless a network with this output shape can learn the task; ``where`` begins it."""

    def loss(self, output: Any, annotations: Any) -> Tensor:
        """Scalar fp32 loss of a batch, averaged as the task does."""

    def metric(self) -> Metric:
        """A fresh metric."""
