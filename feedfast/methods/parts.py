"""What several methods are built of: connectors, transformation layers, margins, and the check of paired maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import LOGITS, Shapes, StudentOutput, TapInfo, Targets, Teachers, numbered_taps
from feedfast.tasks.base import wide
from feedfast_kernels import Codes, Target, as_float, connector_partial_l2, ensemble_kl, partial_l2

Found = TypeVar("Found")

RARELY_NEGATIVE = 0.001  # the authors' threshold on the probability of a negative response
STANDARDIZE = (
    "bring each sample's logits to mean 0 and deviation 1 before they are softened "
    "(Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024)"
)
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
    """The student's transform r: 1x1 convolution without bias, then batch norm; initialized as by OFD's authors."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        convolution = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        nn.init.normal_(convolution.weight, 0.0, math.sqrt(2 / teacher_channels))
        super().__init__(convolution, ConnectorBatchNorm(teacher_channels))

    def distance(self, student_NCHW: Tensor, target: Target, margin_C: Tensor, weight: float) -> Tensor:
        """`partial_l2` of the transformed map; of a sampled one all of this at its positions only."""
        convolution, batch_norm = self
        assert isinstance(batch_norm, ConnectorBatchNorm)
        return batch_norm.distance(convolution(student_NCHW), target, margin_C, weight)


class ConnectorBatchNorm(nn.BatchNorm2d):
    """A batch norm whose normalized map only a partial distance needs: in training it is never written."""

    def distance(self, x_NCHW: Tensor, target: Target, margin_C: Tensor, weight: float) -> Tensor:
        """`partial_l2` of the normalized map; keeps the running statistics as `forward` does."""
        if not self.training:
            return partial_l2(self(x_NCHW), target, margin_C=margin_C, weight=weight)
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return connector_partial_l2(
            x_NCHW,
            target,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            margin_C=margin_C,
            momentum=self.momentum,
            eps=self.eps,
            weight=weight,
        )


class NTL(nn.Sequential):
    """Non-linear transformation layers of one teacher: the student's map -> a map of the teacher's shape.

    Three 3x3 convolutions, C_S -> C_S -> C_T -> C_T, with a bias and a LeakyReLU(0.1) after each: the translator of
    Factor Transfer, FEED's parent, whose published code is the nearest source. Batch norm is off there.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, bn: bool = False) -> None:
        widths = (student_channels, student_channels, teacher_channels, teacher_channels)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Conv2d(width_in, width_out, kernel_size=3, padding=1))
            if bn:
                layers.append(nn.BatchNorm2d(width_out))
            layers.append(nn.LeakyReLU(0.1))
        super().__init__(*layers)


def shared_taps(student: Shapes, teachers: Teachers, prefix: str) -> tuple[str, ...]:
    """The taps called ``prefix`` and a number, which the student and every teacher have in common.

    Raises:
        RequestError: the student has none, or a teacher has others: stages are compared one by one.
    """
    taps = numbered_taps(student, prefix)
    if not taps:
        raise RequestError(f"student: expected taps {prefix}1, {prefix}2, ..., found {sorted(student) or 'none'}")
    for name, infos in teachers.items():
        if (found := numbered_taps(infos, prefix)) != taps:
            raise RequestError(f"teacher {name!r}: expected the student's taps {list(taps)}, found {list(found)}")
    return taps


def paired_maps(
    student: Shapes, teachers: Teachers, taps: Sequence[str], *, pooled: bool = False
) -> Iterator[tuple[str, str, tuple[int, ...], TapInfo]]:
    """(teacher, tap, the student's shape, the teacher's tap), teacher by teacher, for maps of equal height and width.

    Args:
        student: tap → shape.
        teachers: teacher → tap → shape and margin.
        taps: the taps that are paired by name.
        pooled: heights and widths may differ; the method brings both to one grid with `same_grid`.

    Raises:
        RequestError: a tap is missing on either side, is no map, or its spatial sizes differ.
    """
    for name, infos in teachers.items():
        for tap in taps:
            ours = _tap(student, tap, "student")
            theirs = _tap(infos, tap, f"teacher {name!r}")
            maps = len(ours) == 3 and len(theirs.shape) == 3
            if not maps or (ours[1:] != theirs.shape[1:] and not pooled):
                tokens = 2 in (len(ours), len(theirs.shape))
                hint = "; tokens become the map of their grid with :map after the tap's path" if tokens else ""
                if maps:
                    hint = "; networks of equal output strides have them"
                raise RequestError(
                    f"tap {tap!r}: expected maps{'' if pooled else ' of equal height and width'}, "
                    f"found (C, H, W) = {ours} of the student and {theirs.shape} of teacher {name!r}{hint}"
                )
            yield name, tap, ours, theirs


def same_grid(student_NCHW: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Both maps on the smaller of the two grids: the larger one is averaged over it, as the benchmark codes do.

    Args:
        student_NCHW: [B, C_S, H, W], with gradient.
        target: codes or float [B, C_T, H', W'].

    Returns:
        The student's map, and the target: as it came where it is not the larger one, else float.
    """
    ours, theirs = student_NCHW.shape[2:], target.shape[2:]
    grid = (min(ours[0], theirs[0]), min(ours[1], theirs[1]))
    if ours != grid:
        student_NCHW = F.adaptive_avg_pool2d(student_NCHW, grid)
    if theirs != grid:
        target = F.adaptive_avg_pool2d(as_float(target), grid)
    return student_NCHW, target


def logit_rows(output: Tensor, targets: Iterable[Target]) -> tuple[Tensor, list[Tensor]]:
    """Logits as the rows that are compared: one per image, or one per image and place of the coarsest grid.

    Of a dense network maps on finer grids are averaged over the coarsest one, as `same_grid` does: nothing is invented
    between a teacher's places. Rows of a channels-last map on that grid are a view of it.

    Args:
        output: the student's logits, [B, K] or [B, K, h, w], with gradient.
        targets: teachers' logits, codes or float, [B, K] or [B, K, h', w'].

    Returns:
        The student's rows and each teacher's, [B, K] or [B * h * w, K]; dtypes stay where nothing is averaged.
    """
    theirs = [as_float(target) if isinstance(target, Codes) else target for target in targets]
    if output.ndim != 4:
        return output, theirs
    grids = [x.shape[2:] for x in (output, *theirs)]
    grid = (min(height for height, _ in grids), min(width for _, width in grids))

    def rows(x: Tensor) -> Tensor:
        if x.shape[2:] != grid:
            x = F.adaptive_avg_pool2d(wide(x), grid)
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

    return rows(output), [rows(x) for x in theirs]


def embedding(target: Target) -> Tensor:
    """A vector per sample: the mean over height and width of a map [B, C, H, W]; a vector [B, C] as it is; float."""
    x = as_float(target)
    return x.mean((2, 3)) if x.ndim == 4 else x


def check_taps(student: Shapes, teachers: Teachers, taps: Sequence[str]) -> None:
    """Raise unless student and teachers have these taps, of whatever shapes.

    Raises:
        RequestError: a tap is missing on either side.
    """
    for tap in taps:
        _tap(student, tap, "student")
        for name, infos in teachers.items():
            _tap(infos, tap, f"teacher {name!r}")


def unscaled_kl(student: StudentOutput, targets: Targets, tau: float) -> Tensor:
    """KL(teachers || student) of the logits at temperature ``tau``, without the usual tau^2: FitNets' and AB's."""
    ours, theirs = logit_rows(student.output, (as_float(taps[LOGITS]) for taps in targets.values()))
    return ensemble_kl(ours, theirs, tau=tau, weight=tau**-2)


def standardized(logits: Tensor) -> Tensor:
    """Each row of [B, K] with mean 0 and deviation 1 (that of a sample: divisor K - 1), fp32 or float64.

    (z - mean) / (std + 1e-7), as the authors of logit standardization have it in their code; gradients go through both.
    """
    z = wide(logits)
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def _tap(taps: Mapping[str, Found], tap: str, owner: str) -> Found:
    if tap not in taps:
        raise RequestError(f"{owner}: expected a tap named {tap!r}, found {sorted(taps) or 'none'}")
    return taps[tap]
