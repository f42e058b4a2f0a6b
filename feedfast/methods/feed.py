"""pFEED: feature distillation from several teachers at once (Park & Kwak, "Feature-level Ensemble for KD").

    L = CE(y, z) + beta * sum over teachers n of  || x_n / ||x_n||_2  -  NTL_n(x) / ||NTL_n(x)||_2 ||_1

Averaging works for logits and not for maps: N teachers give N different maps. So every teacher gets a small non-linear
network (NTL) of its own on top of the *same* student map, and the student's one map must serve them all. The NTLs are
trained with the student and thrown away.

x is the last map before pooling. An NTL is three 3x3 convolutions, C_S -> C_S -> C_T -> C_T, with a bias and a
LeakyReLU(0.1) after each: the translator of Factor Transfer, FEED's parent, whose published code is the nearest source.
Batch norm is off there and optional here.

The published equation is a sum over the D = C*H*W values, the parent's code a mean with beta = 500; beta_sum is
beta_mean / D. `mean` with 500 is the default, `sum` needs a beta of its own. The equation has no 1/N; `divide_by_n`
adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import StudentOutput, TapInfo, Targets, label_loss, require_teachers, tap_shape
from feedfast_kernels import normalized_l1

BETA_OF_THE_MEAN = 500.0
TAP = "final"


class NTL(nn.Sequential):
    """Non-linear transformation layers of one teacher: the student's map -> a map of the teacher's shape."""

    def __init__(self, student_channels: int, teacher_channels: int, *, bn: bool = False) -> None:
        widths = (student_channels, student_channels, teacher_channels, teacher_channels)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Conv2d(width_in, width_out, kernel_size=3, padding=1))
            if bn:
                layers.append(nn.BatchNorm2d(width_out))
            layers.append(nn.LeakyReLU(0.1))
        super().__init__(*layers)


class PFEED(nn.Module):
    """Parallel FEED: one NTL a teacher on one student map."""

    student_taps: tuple[str, ...] = (TAP,)
    teacher_taps: tuple[str, ...] = (TAP,)

    def __init__(
        self,
        student_taps: Mapping[str, tuple[int, ...]],
        teachers: Mapping[str, Mapping[str, TapInfo]],
        *,
        beta: float | None = None,
        reduction: Literal["sum", "mean"] = "mean",
        bn: bool = False,
        divide_by_n: bool = False,
    ) -> None:
        """Build one NTL a teacher, each with its own random initialization.

        Args:
            student_taps: tap name -> (C, H, W); "final" is used.
            teachers: teacher -> tap name -> shape; "final" is used, its H and W must be the student's.
            beta: weight of the feature term, >= 0; None is 500 for ``"mean"``. For ``"sum"`` there is no default.
            reduction: over the values of a sample.
            bn: batch norm after every convolution of an NTL.
            divide_by_n: average over the teachers instead of the equation's sum.

        Raises:
            RequestError: a tap or beta is missing, a value is out of range, or the spatial sizes differ.
        """
        super().__init__()
        require_teachers(teachers, "pfeed")
        if reduction not in ("sum", "mean"):
            raise RequestError(f"method.reduction: expected 'sum' or 'mean', found {reduction!r}")
        if beta is None and reduction == "sum":
            raise RequestError(
                "method.beta: expected a number with reduction = 'sum' (500 / (C*H*W) equals the default), found none"
            )
        self.beta = BETA_OF_THE_MEAN if beta is None else beta
        if not self.beta >= 0:
            raise RequestError(f"method.beta: expected 0 or more, found {beta}")
        self.reduction: Literal["sum", "mean"] = reduction
        self.teacher_names = tuple(teachers)
        self.weight = 1 / len(teachers) if divide_by_n else 1.0
        student = tap_shape(student_taps, TAP, "student")
        self.ntls = nn.ModuleList()
        for name, infos in teachers.items():
            teacher = tap_shape({tap: info.shape for tap, info in infos.items()}, TAP, f"teacher {name!r}")
            if len(student) != 3 or len(teacher) != 3 or student[1:] != teacher[1:]:
                raise RequestError(
                    f"tap {TAP!r}: expected maps of equal height and width, "
                    f"found (C, H, W) = {student} of the student and {teacher} of teacher {name!r}"
                )
            self.ntls.append(NTL(student[0], teacher[0], bn=bn))

    def forward(self, student: StudentOutput, targets: Targets, labels: Tensor) -> dict[str, Tensor]:
        """Loss of labels and final maps.

        Args:
            student: its logits [B, K] and its last map "final" [B, C, H, W].
            targets: "final" of every teacher.
            labels: int64 [B]; -1 is unlabelled.

        Returns:
            ``loss``, and before their weights ``ce`` and ``feature``.
        """
        ce = label_loss(student.logits, labels)
        maps = [ntl(student.taps[TAP]) for ntl in self.ntls]
        final = [targets[name][TAP] for name in self.teacher_names]
        feature = normalized_l1(maps, final, reduction=self.reduction, weight=self.weight)
        return {"loss": ce + self.beta * feature, "ce": ce.detach(), "feature": feature.detach()}
