"""OFD: maps before their ReLU, compared by a partial distance (Heo et al., ICCV 2019).

    L = CE(y, z) + alpha * (1/N) * sum over teachers n, taps i = 1..k of  1/2^(k-i) * (1/B) * sum d(t_ni, r_ni(s_i))
    t = max(teacher map, m),  d = 0 where r <= t <= 0, else (t - r)^2
    r = 1x1 convolution without bias, then batch norm          the student's side; the teacher's map is not transformed

The distance is a sum over all elements, so the last tap weighs 1 and those before it, with their larger maps, 1/2, 1/4,
..., and alpha is small: 1e-3 at 32x32, 1e-4 at 224x224, 1e-5 for detection and segmentation (the authors' rule, from a
search over powers of ten). One teacher is the paper's method. More are our extension: every teacher has connectors of
its own, and their terms are averaged so that alpha keeps its meaning.

The margin m < 0 of a channel is the mean of its negative responses: from the batch norm before the tap in closed form
(`margin_from_bn`), or measured where there is none (`RunningMargin`). Maps clipped at m before they were stored may be
clipped again.

The authors' teacher runs with batch statistics, so its maps depend on the batch and cannot be cached. Which statistics
the teachers used is the caller's affair; this loss is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import (
    StudentOutput,
    TapInfo,
    Targets,
    label_loss,
    numbered_taps,
    require_teachers,
    tap_shape,
)
from feedfast_kernels import Target, connector_partial_l2, partial_l2

RARELY_NEGATIVE = 0.001  # the authors' threshold on the probability of a negative response
LEAST_DEVIATION = 1e-12  # a channel with gamma = 0 is a constant; the formula divides by |gamma|


def margin_from_bn(gamma: Tensor, beta: Tensor) -> Tensor:
    """Mean negative response of a batch norm's channels, modelled as X ~ N(beta, gamma^2): E[X | X < 0].

    m = beta - s * phi(beta/s) / Phi(-beta/s) with s = |gamma|; where fewer than one response in a thousand is negative,
    -3 * s instead (OFD, section 3.1 and the authors' code). gamma = 0 gives min(beta, 0) to within 1e-11.

    Args:
        gamma: [C], scale of the batch norm.
        beta: [C], shift of the batch norm.

    Returns:
        fp32 [C], every value < 0.
    """
    deviation = gamma.detach().double().abs().clamp(min=LEAST_DEVIATION)
    mean = beta.detach().double()
    z = mean / deviation
    negative_share = torch.special.ndtr(-z)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    margin = mean - deviation * density / negative_share
    return torch.where(negative_share > RARELY_NEGATIVE, margin, -3 * deviation).float()


class RunningMargin:
    """Margin of a tap without a batch norm: the mean negative response, batch by batch.

    The authors' recipe: per batch and channel sum(x where x < 0) / (count(x < 0) + 1e-10), then averaged over batches.
    """

    def __init__(self, channels: int) -> None:
        self._sum_C = torch.zeros(channels, dtype=torch.float64)
        self._batches = 0

    def update(self, x_NCHW: Tensor) -> None:
        """Take one batch of teacher maps, float [B, C, H, W] or [B, C], into account."""
        x = x_NCHW.detach().double()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean_C = x.clamp(max=0).sum(axes) / ((x < 0).sum(axes) + 1e-10)
        self._sum_C = self._sum_C.to(mean_C.device) + mean_C
        self._batches += 1

    def value(self) -> Tensor:
        """The margin so far, fp32 [C]; 0 for a channel that was never negative.

        Raises:
            RequestError: before the first `update`.
        """
        if self._batches == 0:
            raise RequestError("margin: expected at least one batch of teacher maps, found none")
        return (self._sum_C / self._batches).float()


class Connector(nn.Sequential):
    """The student's transform r: 1x1 convolution without bias, then batch norm."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        convolution = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        nn.init.normal_(convolution.weight, 0.0, math.sqrt(2 / teacher_channels))
        super().__init__(convolution, nn.BatchNorm2d(teacher_channels))

    def distance(self, student_NCHW: Tensor, target: Target, margin_C: Tensor, weight: float) -> Tensor:
        """`partial_l2` of the transformed map; in training without the normalized map, which nobody else needs."""
        convolution, batch_norm = self
        assert isinstance(batch_norm, nn.BatchNorm2d)
        if not self.training:
            return partial_l2(self(student_NCHW), target, margin_C=margin_C, weight=weight)
        assert batch_norm.momentum is not None
        assert batch_norm.num_batches_tracked is not None
        batch_norm.num_batches_tracked.add_(1)
        return connector_partial_l2(
            convolution(student_NCHW),
            target,
            batch_norm.weight,
            batch_norm.bias,
            batch_norm.running_mean,
            batch_norm.running_var,
            margin_C=margin_C,
            momentum=batch_norm.momentum,
            eps=batch_norm.eps,
            weight=weight,
        )


class OFD(nn.Module):
    """Partial distance to pre-activation maps at the end of every stage."""

    def __init__(
        self,
        student_taps: Mapping[str, tuple[int, ...]],
        teachers: Mapping[str, Mapping[str, TapInfo]],
        *,
        alpha: float = 1e-3,
    ) -> None:
        """Build one connector a teacher and tap.

        Args:
            student_taps: tap name -> (C, H, W); those called ofd1, ofd2, ... are used, in this order.
            teachers: teacher -> tap name -> shape and margin, with the same ofd taps as the student and equal H and W.
            alpha: weight of the feature term, >= 0.

        Raises:
            RequestError: a tap or a margin is missing, or the spatial sizes differ.
        """
        super().__init__()
        require_teachers(teachers, "ofd")
        if not alpha >= 0:
            raise RequestError(f"method.alpha: expected 0 or more, found {alpha}")
        self.alpha = alpha
        self.student_taps = numbered_taps(student_taps, "ofd")
        self.teacher_taps = self.student_taps
        if not self.student_taps:
            raise RequestError(f"student: expected taps ofd1, ofd2, ..., found {sorted(student_taps) or 'none'}")
        # lists, not dictionaries: module names may not hold the dots that teacher names may
        self.teacher_names = tuple(teachers)
        self.connectors = nn.ModuleList()
        for name, infos in teachers.items():
            connectors = nn.ModuleList()
            shapes = {tap: info.shape for tap, info in infos.items()}
            if numbered_taps(infos, "ofd") != self.student_taps:
                raise RequestError(
                    f"teacher {name!r}: expected the student's taps {list(self.student_taps)}, "
                    f"found {list(numbered_taps(infos, 'ofd'))}"
                )
            for tap in self.student_taps:
                student, teacher = tap_shape(student_taps, tap, "student"), shapes[tap]
                if len(student) != 3 or len(teacher) != 3 or student[1:] != teacher[1:]:
                    raise RequestError(
                        f"tap {tap!r}: expected maps of equal height and width, "
                        f"found (C, H, W) = {student} of the student and {teacher} of teacher {name!r}"
                    )
                margin = infos[tap].margin
                if margin is None or tuple(margin.shape) != teacher[:1]:
                    raise RequestError(
                        f"tap {tap!r} of teacher {name!r}: expected a margin of {teacher[0]} channels, "
                        f"found {'none' if margin is None else list(margin.shape)}"
                    )
                connector = Connector(student[0], teacher[0])
                connector.register_buffer("margin", margin.detach().clone().float())
                connectors.append(connector)
            self.connectors.append(connectors)

    def forward(self, student: StudentOutput, targets: Targets, labels: Tensor) -> dict[str, Tensor]:
        """Loss of labels and stage maps.

        Args:
            student: its logits [B, K] and pre-activation maps ofd1.. [B, C, H, W].
            targets: the same taps of every teacher, clipped at the margin or not.
            labels: int64 [B]; -1 is unlabelled.

        Returns:
            ``loss``, and before their weights ``ce`` and ``feature`` (weighted over taps, averaged over teachers).
        """
        ce = label_loss(student.logits, labels)
        last = len(self.student_taps) - 1
        feature = torch.zeros_like(ce)
        for name, connectors in zip(self.teacher_names, self.connectors, strict=True):
            assert isinstance(connectors, nn.ModuleList)
            for index, (tap, connector) in enumerate(zip(self.student_taps, connectors, strict=True)):
                assert isinstance(connector, Connector)
                margin = connector.get_buffer("margin")
                weight = 0.5 ** (last - index) / len(self.teacher_names)
                feature = feature + connector.distance(student.taps[tap], targets[name][tap], margin, weight)
        return {"loss": ce + self.alpha * feature, "ce": ce.detach(), "feature": feature.detach()}
