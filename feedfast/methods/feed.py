"""FEED: feature distillation from several teachers at once, or from a chain of students (Park & Kwak, ECAI 2020).

    L = CE(y, z) + beta * sum over teachers n of  || x_n / ||x_n||_2  -  NTL_n(x) / ||NTL_n(x)||_2 ||_1

Averaging works for logits and not for maps: N teachers give N different maps. So every teacher gets a small non-linear
network (NTL) of its own on top of the *same* student map, and the student's one map must serve them all. The NTLs are
trained with the student and thrown away. x is the last map before pooling. `pfeed` has all teachers at once; `sfeed`
has one, the student of the generation before, and `feedfast chain` drives it.

Teachers of other widths are met by the NTL, of other grids by pooling the larger map. The mean over the values and no
division by N, the defaults, are also how the multi-teacher harness of CA-MKD computes it (names in its compiled
`FFED`: an L1 mean of normalized maps, pooled to the smaller grid, added up over teachers).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import NTL, paired_maps, same_grid
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
    dense: ClassVar[bool] = True
    whole: ClassVar[str] = "transforms maps by 3x3 convolutions, which read neighbors"

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
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True)
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``feature``: the distances of the teachers' last maps [B, C, H, W], summed over teachers."""
        pairs = [
            same_grid(ntl(student.taps[TAP]), targets[name][TAP])
            for name, ntl in zip(self.teacher_names, self.ntls, strict=True)
        ]
        maps, final = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
        return {"feature": normalized_l1(maps, final, reduction=self.reduction, weight=self.share)}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"feature": self.beta}


class SFEED(PFEED):
    """Sequential FEED: one NTL, and the teacher is the student of the generation before."""

    name: ClassVar[str] = "sfeed"
    paper: ClassVar[str] = "Park & Kwak, Feature-level Ensemble Knowledge Distillation, ECAI 2020 (sequential FEED)"

    def __init__(self, options: PFEED.Options, student: Shapes, teachers: Teachers) -> None:
        if len(teachers) > 1:
            raise RequestError(
                f"method.name: 'sfeed' learns from one teacher, the generation before; found {len(teachers)}; "
                "with several, use 'pfeed'"
            )
        super().__init__(options, student, teachers)
