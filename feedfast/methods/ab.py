"""Activation boundaries: whether each neuron responds is transferred, not how much, and before the task is learned.

    L_AB = 1/B * sum over taps i  2^(i-n) * sum over all values  max(0, margin - sign * r_i(x))^2

sign is 1 where x_T > 0, else -1; x is the map before its activation; r_i a 1x1 convolution with batch norm, nothing
where the channels agree. The first stage of the run trains with this alone, the second with the teachers' logits alone
(KL at temperature tau without tau^2, the authors' default) or with labels alone. One teacher is the paper's method,
several teachers are our extension.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import Connector, paired_maps, same_grid, shared_taps, unscaled_kl
from feedfast.tasks.base import wide
from feedfast_kernels import as_float


class ActivationBoundaries(Method):
    """Squared hinge on the sign of every response, then logits or labels."""

    name: ClassVar[str] = "ab"
    paper: ClassVar[str] = (
        "Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019"
    )
    needs: ClassVar[tuple[str, ...]] = ("ofd*", LOGITS)
    samples: ClassVar[bool] = True

    class Options(MethodOptions):
        """The two stages."""

        alpha: float = Field(3e-3, ge=0, description="weight of the boundaries' sum per sample in the first stage")
        margin: float = Field(1.0, ge=0, description="how far beyond the boundary a response is left alone")
        first_share: float = Field(
            0.375,
            ge=0,
            le=1,
            description="share of the run that the first stage takes; the authors' 60 and 100 epochs for MIT scenes",
        )
        second: Literal["kd", "task"] = Field(
            "kd",
            description="what the second stage learns: the logits, which is slow since the authors' KL "
            "lacks tau^2, or the task, better in short runs",
        )
        tau: float = Field(3.0, gt=0, description="temperature of the second stage's logits")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        self.taps = shared_taps(student, teachers, "ofd")
        pairs = list(paired_maps(student, teachers, self.taps, pooled=True))
        self.pairs = tuple((name, tap) for name, tap, _, _ in pairs)
        self.connectors = nn.ModuleList(
            nn.Identity() if ours[0] == theirs.shape[0] else Connector(ours[0], theirs.shape[0])
            for _, _, ours, theirs in pairs
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``boundary``: of maps [B, C, H, W], summed over taps, averaged over batch and teachers; ``kd`` if chosen."""
        options, last = self.options, len(self.taps) - 1
        boundaries = []
        for (name, tap), connector in zip(self.pairs, self.connectors, strict=True):
            mine, rescale = student.at(tap, name)
            ours, theirs = same_grid(connector(mine), targets[name][tap])
            sign = torch.where(as_float(theirs).detach() > 0, 1.0, -1.0)
            missing = (options.margin - sign * wide(ours)).relu()
            boundaries.append(missing.square().sum() * (rescale * 0.5 ** (last - self.taps.index(tap))))
        batch = max(student.taps[self.taps[0]].shape[0], 1)
        terms = {"boundary": torch.stack(boundaries).sum() / (batch * len(self.teacher_names))}
        if options.second == "kd":
            terms["kd"] = unscaled_kl(student, targets, options.tau)
        return terms

    def weights(self, progress: float) -> dict[str, float]:
        """alpha in the first stage; in the second 1 for the logits, if they are chosen."""
        first = progress < self.options.first_share
        weights = {"boundary": self.options.alpha if first else 0.0}
        return weights if self.options.second == "task" else {**weights, "kd": 0.0 if first else 1.0}

    def task_weight(self, progress: float) -> float:
        """0 but for a second stage that learns the task."""
        return float(self.options.second == "task" and progress >= self.options.first_share)
