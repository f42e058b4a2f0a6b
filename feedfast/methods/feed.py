"""pFEED: feature distillation from several teachers at once (Park & Kwak, "Feature-level Ensemble for KD").

    L = CE(y, z) + beta * sum over teachers n of  || x_n / ||x_n||_2  -  NTL_n(x) / ||NTL_n(x)||_2 ||_1

Averaging works for logits and not for maps: N teachers give N different maps. So every teacher gets a small non-linear
network (NTL) of its own on top of the *same* student map, and the student's one map must serve them all. The NTLs are
trained with the student and thrown away. x is the last map before pooling.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import NTL, paired_maps
from feedfast_kernels import normalized_l1

TAP = "final"
# The published equation is a sum over the D = C*H*W values, the code of Factor Transfer, its parent, a mean with 500;
# beta_sum is beta_mean / D.
BETA_OF_THE_MEAN = 500.0


class PFEED(Method):
    """Parallel FEED: one NTL per teacher on one student map."""

    name: ClassVar[str] = "pfeed"
    paper: ClassVar[str] = "Park & Kwak, Feature-level Ensemble Knowledge Distillation, ECAI 2020 (parallel FEED)"
    needs: ClassVar[tuple[str, ...]] = (TAP,)

    class Options(MethodOptions):
        """beta and how the distance is reduced; batch norm in the NTLs."""

        beta: float | None = Field(
            None, ge=0, description="weight of the feature term; default 500 for the mean, none for the sum"
        )
        reduction: Literal["sum", "mean"] = Field("mean", description="over the values of a sample")
        bn: bool = Field(False, description="batch norm after every convolution of an NTL; not from the paper")
        divide_by_n: bool = Field(
            False, description="average over the teachers instead of the equation's sum; not from the paper"
        )

        @model_validator(mode="after")
        def _sum_has_a_beta(self) -> Self:
            if self.beta is None and self.reduction == "sum":
                raise ValueError(
                    "beta: expected a number with reduction = 'sum' (500 / (C*H*W) equals the default), found none"
                )
            return self

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.beta = BETA_OF_THE_MEAN if options.beta is None else options.beta
        self.reduction: Literal["sum", "mean"] = options.reduction
        self.teacher_names = tuple(teachers)
        self.share = 1 / len(teachers) if options.divide_by_n else 1.0
        self.ntls = nn.ModuleList(
            NTL(ours[0], theirs.shape[0], bn=options.bn)
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,))
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``feature``: the distances of the teachers' last maps [B, C, H, W], summed over teachers."""
        maps = [ntl(student.taps[TAP]) for ntl in self.ntls]
        final = [targets[name][TAP] for name in self.teacher_names]
        return {"feature": normalized_l1(maps, final, reduction=self.reduction, weight=self.share)}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"feature": self.beta}
