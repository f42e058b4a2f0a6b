"""Attention transfer: where a stage's map is large, whatever its channels, is compared at the end of every stage.

    L = CE(y, z) + beta * sum over stages  mean (Q(x) - Q(x_T))^2        Q(x) = a / ||a||_2,  a = mean over c of |x_c|^p

a has one value per place, so that channels need not agree and no adapter is trained. The mean over places is the
authors' code; the paper's sum is H * W times that. One teacher is the paper's method, several teachers are our
extension. At some positions only, ||a|| is theirs: nearly the whole map's, so the loss is nearly unbiased.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid, shared_taps
from feedfast.tasks.base import wide
from feedfast_kernels import as_float


class AttentionTransfer(Method):
    """Distance of normalized attention maps at the end of every stage."""

    name: ClassVar[str] = "at"
    paper: ClassVar[str] = "Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017"
    needs: ClassVar[tuple[str, ...]] = ("stage*",)
    dense: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    class Options(MethodOptions):
        """beta and p."""

        beta: float = Field(1000.0, ge=0, description="weight of the mean of squares")
        p: float = Field(2.0, ge=1, description="power that the responses are raised to")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options = options
        taps = shared_taps(student, teachers, "stage")
        self.pairs = tuple((name, tap) for name, tap, _, _ in paired_maps(student, teachers, taps, pooled=True))
        self.share = 1 / len(teachers)

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``attention``: mean squares of the maps [B, C, H, W], summed over stages and averaged over teachers."""
        terms = []
        for name, tap in self.pairs:
            mine, rescale = student.at(tap, name)
            ours, theirs = same_grid(mine, targets[name][tap])
            ours = wide(ours)
            theirs = as_float(theirs).detach().to(ours.dtype)
            # of unit length over P places instead of H * W, squares are H * W / P as large
            terms.append(F.mse_loss(self._attention(ours), self._attention(theirs)) / rescale)
        return {"attention": torch.stack(terms).sum() * self.share}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"attention": self.options.beta}

    def _attention(self, x_NCHW: Tensor) -> Tensor:
        """Places' shares [B, H * W], of unit length."""
        return F.normalize(x_NCHW.abs().pow(self.options.p).mean(1).flatten(1))
