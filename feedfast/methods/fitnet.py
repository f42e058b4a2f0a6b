"""Hints of FitNets: a map in the middle of the teacher is learned by regression, before the task or along with it.

    two stages   first  beta * MSE(r(x), x_T),  then  CE + lambda * KL(p_T || p) at temperature tau, lambda falling
    one stage    CE + beta * MSE(r(x), x_T)

The first is the paper's: the hint trains the layers below the tap and nothing else, then the whole network learns from
labels and logits; tau^2 is not in its loss. The second is what the benchmark codes call FitNet. The regressor r is
trained with the student and thrown away. One teacher is the paper's method, several teachers are our extension.
At some positions only, which needs equal grids, the mean is of those: unbiased but for r's batch statistics.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid, shared_taps, unscaled_kl
from feedfast.tasks.base import wide
from feedfast_kernels import as_float


class Regressor(nn.Sequential):
    """The student's map on the teacher's channels and grid: convolution, batch norm, ReLU (the hint is a map after it).

    The paper's convolution is the valid one whose kernel makes up for the difference of the grids, 1x1 on equal ones.
    As in the benchmark codes it has a stride of 2 where the student's map is twice as large, and is transposed where it
    is half as large. Any other smaller map keeps its grid, and the hint is pooled to it.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        (ours, height, width), (theirs, their_height, their_width) = student, teacher
        convolution: nn.Module
        if (height, width) == (2 * their_height, 2 * their_width):
            convolution = nn.Conv2d(ours, theirs, kernel_size=3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (their_height, their_width):
            convolution = nn.ConvTranspose2d(ours, theirs, kernel_size=4, stride=2, padding=1)
        elif height >= their_height and width >= their_width:
            convolution = nn.Conv2d(ours, theirs, kernel_size=(1 + height - their_height, 1 + width - their_width))
        else:
            convolution = nn.Conv2d(ours, theirs, kernel_size=1)
        super().__init__(convolution, nn.BatchNorm2d(theirs), nn.ReLU())


class FitNet(Method):
    """Regression of one map in the middle, then labels and logits; or the map and labels at once."""

    name: ClassVar[str] = "fitnet"
    paper: ClassVar[str] = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    needs: ClassVar[tuple[str, ...]] = ("stage*", LOGITS)
    dense: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    class Options(MethodOptions):
        """Stages, the hint, and the paper's second stage."""

        stages: Literal[1, 2] = Field(
            2,
            description="2 as in the paper; 1 learns hint and labels at once, as the benchmark codes do, and reads no "
            "logits: so it serves detection",
        )
        tap: str = Field("stage2", description="the map that is the hint, of student and teachers")
        beta: float = Field(
            100.0, ge=0, description="weight of the hint's mean square; 100 is RepDistiller's, not from the paper"
        )
        hint_share: float = Field(
            0.2, ge=0, lt=1, description="share of the run that the first of two stages takes; not from the paper"
        )
        tau: float = Field(3.0, gt=0, description="temperature of the second stage")
        lambda_start: float = Field(4.0, ge=0, description="weight of the logits where the second stage begins")
        lambda_end: float = Field(
            1.0,
            ge=0,
            description="weight of the logits at the end of the run, reached linearly; that the fall takes the whole "
            "second stage is not from the paper",
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        taps = shared_taps(student, teachers, "stage")
        if options.tap not in taps:
            raise RequestError(f"method.tap: expected {' | '.join(taps)}, found {options.tap!r}")
        self.regressors = nn.ModuleList(
            Regressor(ours, theirs.shape)
            for _, _, ours, theirs in paired_maps(student, teachers, (options.tap,), pooled=True)
        )

    @classmethod
    def needed(cls, options: Options) -> tuple[str, ...]:
        """Logits in two stages only."""
        return cls.needs if options.stages == 2 else cls.needs[:1]

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``hint``: mean squares of the tap's maps [B, C, H, W], averaged over the teachers; ``kd`` with two stages."""
        options = self.options
        hints = []
        for name, regressor in zip(self.teacher_names, self.regressors, strict=True):
            mine, _ = student.at(options.tap, name)  # a mean of the positions needs no rescaling
            ours, theirs = same_grid(regressor(mine), targets[name][options.tap])
            ours = wide(ours)
            hints.append(F.mse_loss(ours, as_float(theirs).detach().to(ours.dtype)))
        terms = {"hint": torch.stack(hints).mean()}
        if options.stages == 2:
            terms["kd"] = unscaled_kl(student, targets, options.tau)
        return terms

    def weights(self, progress: float) -> dict[str, float]:
        """beta; with two stages in the first one only, and lambda in the second."""
        options = self.options
        if options.stages == 1:
            return {"hint": options.beta}
        if progress < options.hint_share:
            return {"hint": options.beta, "kd": 0.0}
        done = (progress - options.hint_share) / (1 - options.hint_share)
        return {"hint": 0.0, "kd": options.lambda_start + done * (options.lambda_end - options.lambda_start)}

    def task_weight(self, progress: float) -> float:
        """0 in the first of two stages, else 1."""
        return 0.0 if self.options.stages == 2 and progress < self.options.hint_share else 1.0
