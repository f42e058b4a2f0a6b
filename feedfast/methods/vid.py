"""Variational information distillation: a Gaussian of the teacher's map given the student's, its likelihood maximized.

    L = CE(y, z) + weight * sum over stages  mean  1/2 * ((x_T - mu(x))^2 / s^2 + log s^2)
    s_c^2 = log(1 + exp(a_c)) + eps                          one per channel, learned;  mu: three 1x1 convolutions

The term bounds the mutual information of the two maps from below and may be negative. mu and a are trained with the
student and thrown away. One teacher is the paper's method, several teachers are our extension.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid, shared_taps
from feedfast.tasks.base import wide
from feedfast_kernels import Target, as_float

EPS = 1e-5  # the least variance


class Gaussian(nn.Module):
    """Mean and variance of one teacher's map given the student's."""

    def __init__(self, student_channels: int, teacher_channels: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        # the inverse of the softplus in `forward`, so that training starts from `variance`
        self.log_scale_C = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - EPS))))

    def forward(self, student_NCHW: Tensor, target: Target) -> Tensor:
        """Mean negative log-likelihood of the target [B, C_T, H, W], without its constant."""
        ours, theirs = same_grid(student_NCHW, target)
        variance = (F.softplus(wide(self.log_scale_C)) + EPS)[:, None, None]
        square = (wide(self.mean(ours)) - as_float(theirs).detach()).square()
        loss: Tensor = 0.5 * (square / variance + variance.log()).mean()
        return loss


class VID(Method):
    """Negative log-likelihood of the teacher's maps at the end of every stage."""

    name: ClassVar[str] = "vid"
    paper: ClassVar[str] = "Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019"
    needs: ClassVar[tuple[str, ...]] = ("stage*",)
    samples: ClassVar[bool] = True  # a mean over positions

    class Options(MethodOptions):
        """Weight and initial variance."""

        beta: float = Field(1.0, ge=0, description="weight of the likelihood; 1 is RepDistiller's")
        variance: float = Field(5.0, gt=EPS, description="of every channel where training starts")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.beta, self.share = options.beta, 1 / len(teachers)
        taps = shared_taps(student, teachers, "stage")
        pairs = list(paired_maps(student, teachers, taps, pooled=True))
        self.pairs = tuple((name, tap) for name, tap, _, _ in pairs)
        self.gaussians = nn.ModuleList(
            Gaussian(ours[0], theirs.shape[0], options.variance) for _, _, ours, theirs in pairs
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``information``: of maps [B, C, H, W], summed over stages and averaged over teachers."""
        terms = [
            gaussian(student.at(tap, name)[0], targets[name][tap])
            for (name, tap), gaussian in zip(self.pairs, self.gaussians, strict=True)
        ]
        return {"information": torch.stack(terms).sum() * self.share}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"information": self.beta}
