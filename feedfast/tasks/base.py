"""The words all tasks share: an output check, a loss of the annotations, and a metric.

A task says what a network's output must look like, what it costs to be wrong about the annotations, and how good it is
on validation images. It knows neither teachers nor methods: those add their own terms to its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
"""Shape of one sample's output; of a mapping of tensors name → shape without the first axis; None of anything else."""


class Metric(Protocol):
    """Counts over validation batches. Ranks count separately; `merge` puts their counts together."""

    def update(self, output: Any, annotations: Any) -> None:
        """Take one batch into account: a network's output, and what the images are annotated with.

        The two may be on different devices.
        """

    def state(self) -> dict[str, Tensor]:
        """What this rank has counted, as tensors on the CPU."""

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

    @property
    def score(self) -> str:
        """The name of the metric that a run is judged by; higher is better."""

    def check(self, outputs: Outputs, where: str) -> None:
        """Raise a RequestError unless a network with these outputs can learn the task; ``where`` begins it."""

    def loss(self, output: Any, annotations: Any) -> Tensor:
        """Scalar fp32 loss of a batch, averaged as the task does."""

    def metric(self) -> Metric:
        """A fresh metric."""


def described(outputs: Outputs) -> str:
    """A network's outputs in words, for messages; ``no tensor``, ``[10] per sample``, or each name with its shape."""
    if outputs is None:
        return "no tensor"
    if isinstance(outputs, Mapping):
        return "a mapping of " + ", ".join(f"{name} {['…', *shape]}" for name, shape in outputs.items())
    return f"{list(outputs)} per sample"


def wide(x: Tensor) -> Tensor:
    """fp32 of any narrower float; float64 stays: what losses are computed in, whatever autocast made of their input."""
    return x if x.dtype == torch.float64 else x.float()
