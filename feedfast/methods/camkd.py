"""CA-MKD: teachers weighed sample by sample, by how well each of them does on it.

    L = CE(y, z) + alpha * 1/K sum over teachers k of mean_b w_bk * tau^2 * KL(p_bk || q_b)
                 + beta  * 1/K sum over teachers k of mean_b w_bk * mean (r_k(x)_b - x_bk)^2
    w_bk = (1 - softmax_k(CE(y_b, z_bk))) / (K - 1)

w sums to 1 over the K teachers; the division by K is the authors' code. r_k is that code's regressor: 1x1 convolution,
batch norm, ReLU, on the student's last map, trained with the student and thrown away. Weights come from the teachers'
logits, so all that is needed is stored. In that code the features' weights come from the teachers' classifiers, run on
the regressed map instead; a cache holds no classifier, so here both terms share the logits' weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid
from feedfast.tasks.base import wide
from feedfast_kernels import as_float

TAP = "final"


class CAMKD(Method):
    """Confidence-aware distillation of logits and last maps from two teachers or more."""

    name: ClassVar[str] = "camkd"
    paper: ClassVar[str] = (
        "Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022; "
        "the features' weights are those of the logits"
    )
    needs: ClassVar[tuple[str, ...]] = (LOGITS, TAP)
    one_label: ClassVar[bool] = True
    samples: ClassVar[bool] = True  # a mean over positions

    class Options(MethodOptions):
        """The two weights, the temperature, and when the maps' term begins."""

        alpha: float = Field(1.0, ge=0, description="weight of the divergence of logits")
        beta: float = Field(50.0, ge=0, description="weight of the last maps' distance")
        tau: float = Field(4.0, gt=0, description="temperature")
        wait: float = Field(
            1 / 240,
            ge=0,
            le=1,
            description="share of the run before the last maps' distance counts; the authors' first epoch of 240",
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        if len(teachers) < 2:
            raise RequestError(
                f"method.name: {self.name!r} weighs teachers against each other and needs at least two, "
                f"found {', '.join(map(repr, teachers))} alone"
            )
        self.options, self.teacher_names = options, tuple(teachers)
        self.regressors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours[0], theirs.shape[0], 1), nn.BatchNorm2d(theirs.shape[0]), nn.ReLU())
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True)
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``kd`` of logits [B, K], ``feature`` of the last maps [B, C, H, W], larger ones pooled to the smaller grid.

        Labels are int64 [B]. Without a label a row has no weights: it is left out; no labeled row gives 0.
        """
        ours = wide(student.output)
        theirs = [as_float(targets[name][LOGITS]).detach().to(ours.dtype) for name in self.teacher_names]
        tau = self.options.tau
        log_q = (ours / tau).log_softmax(1)
        log_p = [(z / tau).log_softmax(1) for z in theirs]
        divergences = [tau**2 * (p.exp() * (p - log_q)).sum(1) for p in log_p]
        distances = []
        for name, regressor in zip(self.teacher_names, self.regressors, strict=True):
            x, target = same_grid(student.at(TAP, name)[0], targets[name][TAP])
            distances.append((regressor(x) - as_float(target).detach()).square().flatten(1).mean(1))
        shares = teacher_shares(theirs, annotations) / len(theirs)
        return {
            "kd": (shares * torch.stack(divergences)).sum(),
            "feature": (shares * torch.stack(distances)).sum(),
        }

    def weights(self, progress: float) -> dict[str, float]:
        """alpha, and beta once ``wait`` is over."""
        return {"kd": self.options.alpha, "feature": self.options.beta if progress >= self.options.wait else 0.0}


def teacher_shares(teacher_logits: list[Tensor], labels_B: Tensor) -> Tensor:
    """What each teacher counts for each sample in a mean over the labeled rows, [teacher, B]; the sum over all is 1.

    Args:
        teacher_logits: [B, K] of two teachers or more.
        labels_B: int64; the column of an unlabeled row, -1, is 0.
    """
    losses = torch.stack([F.cross_entropy(z, labels_B, ignore_index=-1, reduction="none") for z in teacher_logits])
    weights = (1 - losses.softmax(0)) / (len(teacher_logits) - 1)
    labeled = labels_B >= 0
    return weights.where(labeled, 0) / labeled.sum().clamp(min=1)
