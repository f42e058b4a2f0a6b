"""Masked generative distillation: the teacher's whole map is generated from a part of the student's.

    L = L_task + alpha * 1/B * sum of squares of  G(mask * f(x)) - x_T

f is a 1x1 convolution where channels differ, G two 3x3 convolutions with a ReLU between, mask drops whole channels
(the authors' classification) or places (their detection and segmentation) with probability ``masked``. It is drawn from
torch's generator, which the trainer seeds per step: live, cached and resumed runs draw the same. f and G are trained
with the student and thrown away. One teacher is the paper's method, several teachers are our extension.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid
from feedfast.tasks.base import wide
from feedfast_kernels import Target, as_float

TAP = "final"


class Generator(nn.Module):
    """One teacher's alignment and generation."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        same = student_channels == teacher_channels
        self.alignment = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student_NCHW: Tensor, target: Target, masked: float, over: str) -> Tensor:
        """Sum of squares per sample to the target [B, C_T, H, W]."""
        ours, theirs = same_grid(self.alignment(student_NCHW), target)
        batch, channels, height, width = ours.shape
        shape = (batch, channels, 1, 1) if over == "channels" else (batch, 1, height, width)
        kept = torch.rand(shape, device=ours.device) >= masked
        generated: Tensor = wide(self.generation(ours * kept))
        return (generated - as_float(theirs).detach().to(generated.dtype)).square().sum() / max(batch, 1)


class MGD(Method):
    """Squared distance of the last maps, the student's masked and completed."""

    name: ClassVar[str] = "mgd"
    paper: ClassVar[str] = "Yang et al., Masked Generative Distillation, ECCV 2022"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    dense: ClassVar[bool] = True
    whole: ClassVar[str] = "generates maps by 3x3 convolutions, which read neighbors"

    class Options(MethodOptions):
        """alpha and the mask."""

        # A sum over the map, so alpha belongs to a size of map: 7e-5 to 512 or 1024 x 7 x 7.
        alpha: float = Field(
            7e-5,
            ge=0,
            description="weight of the sum of squares per sample; the authors' 7e-5 at 224x224, 2e-5 for segmentation "
            "and one-stage detectors, 5e-7 for two-stage ones",
        )
        masked: float = Field(
            0.15,
            ge=0,
            lt=1,
            description="probability of a mask; the authors' 0.15 for classification, 0.75 for segmentation, 0.65 for "
            "one-stage and 0.45 for two-stage detectors",
        )
        over: Literal["channels", "places"] = Field(
            "channels", description="what is masked whole; places as the authors do for detection and segmentation"
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        self.generators = nn.ModuleList(
            Generator(ours[0], theirs.shape[0])
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True)
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``generation``: sums of squares of maps [B, C, H, W], averaged over batch and teachers."""
        options = self.options
        terms = [
            generator(student.taps[TAP], targets[name][TAP], options.masked, options.over)
            for name, generator in zip(self.teacher_names, self.generators, strict=True)
        ]
        return {"generation": torch.stack(terms).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        """alpha."""
        return {"generation": self.options.alpha}
