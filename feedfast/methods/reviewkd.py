"""Knowledge review: a teacher's early map is learned from the student's map there and all its deeper ones.

    L = CE(y, z) + weight * warm-up * sum over levels  HCL(conv3x3(u_i), x_T,i)
    u_i = a * conv1x1(x_i) + b * u_{i+1}                     a, b in 0..1 per place, from both maps; u_{i+1} enlarged
    HCL = weighted mean of the mean squares of the maps, and of their 4x4, 2x2 and 1x1 averages: 1, 1/2, 1/4, 1/8

Levels are the ends of the stages before their activation, and as the deepest the pooled last map. All convolutions
(with batch norm) are trained with the student and thrown away. Maps before the activation on the student's side too are
the authors' ImageNet settings; a teacher tapped with ``ofd+margin`` gives them clipped. One teacher is the paper's
method, several teachers are our extension.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import embedding, paired_maps, shared_taps
from feedfast.tasks.base import wide
from feedfast_kernels import as_float

LAST = "final"
GRIDS = (4, 2, 1)  # sizes of HCL's averages, each with half the weight of the one before


class Fusion(nn.Module):
    """One level's attention-based fusion (ABF) of the student's map with what was fused at the deeper levels."""

    def __init__(self, channels: int, width: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.exit = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.shares = None if deepest else nn.Conv2d(2 * width, 2, 1)
        for convolution in (self.entry[0], self.exit[0]):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x_NCHW: Tensor, deeper: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The map that is compared, [B, C_T, *grid], and the fused one, [B, width, *grid]."""
        fused = self.entry(x_NCHW)
        if self.shares is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.shares(torch.cat((fused, deeper), 1)).sigmoid()
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != grid:
            fused = F.interpolate(fused, grid, mode="nearest")
        return self.exit(fused), fused


def hierarchical_context(ours_NCHW: Tensor, theirs_NCHW: Tensor) -> Tensor:
    """Weighted mean of the mean squares of two maps [B, C, H, W] and of their averages on grids smaller than they."""
    total, weight, weights = F.mse_loss(ours_NCHW, theirs_NCHW), 1.0, 1.0
    for size in GRIDS:
        if size < min(ours_NCHW.shape[2:]):
            weight /= 2
            weights += weight
            ours, theirs = (F.adaptive_avg_pool2d(x, size) for x in (ours_NCHW, theirs_NCHW))
            total = total + weight * F.mse_loss(ours, theirs)
    return total / weights


class ReviewKD(Method):
    """Distance of maps at every level, the student's fused with its deeper ones."""

    name: ClassVar[str] = "reviewkd"
    paper: ClassVar[str] = "Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021"
    needs: ClassVar[tuple[str, ...]] = ("ofd*", LAST)
    whole: ClassVar[str] = "fuses maps of several stages and pools them"

    class Options(MethodOptions):
        """Weight, its warm-up, and the width of what is fused."""

        beta: float = Field(
            1.0, ge=0, description="weight of the levels' sum; the authors' 0.6 to 8 by pair of networks, 5 for WRNs"
        )
        warmup_share: float = Field(
            1 / 12,
            ge=0,
            le=1,
            description="rise of the weight from 0, as a share of the run; the authors' 20 of 240 epochs",
        )
        width: int = Field(512, ge=1, description="channels of what is fused, at most those of the student's last map")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        self.taps = (*shared_taps(student, teachers, "ofd"), LAST)  # LAST is pooled
        pairs = list(paired_maps(student, teachers, self.taps, pooled=True))
        width = min(options.width, student[LAST][0])
        # teacher by teacher, and of each from the first level to the deepest
        self.fusions = nn.ModuleList(
            Fusion(ours[0], width, theirs.shape[0], deepest=tap == LAST) for _, tap, ours, theirs in pairs
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``review``: of maps [B, C, H, W], summed over levels and averaged over teachers."""
        terms = []
        levels = len(self.taps)
        for number, name in enumerate(self.teacher_names):
            fused: Tensor | None = None
            for level in reversed(range(levels)):
                tap, fusion = self.taps[level], self.fusions[number * levels + level]
                ours, theirs = student.taps[tap], as_float(targets[name][tap]).detach()
                if tap == LAST:
                    ours, theirs = embedding(ours)[:, :, None, None], embedding(theirs)[:, :, None, None]
                found, fused = fusion(ours, fused, tuple(theirs.shape[2:]))
                terms.append(hierarchical_context(wide(found), theirs))
        return {"review": torch.stack(terms).sum() / len(self.teacher_names)}

    def weights(self, progress: float) -> dict[str, float]:
        """beta, rising linearly during the warm-up."""
        share = self.options.warmup_share
        return {"review": self.options.beta * (min(1.0, progress / share) if share else 1.0)}
