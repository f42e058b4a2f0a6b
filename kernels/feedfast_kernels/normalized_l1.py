"""FEED's distance: absolute difference of two maps, each scaled to unit length over all of its C*H*W values.

    loss = weight / denominator * sum over teachers n, samples b of  || s_nb / ||s_nb||_2  -  t_nb / ||t_nb||_2 ||_1
    d(loss)/ds = weight / denominator * (q - n * <n, q>) / ||s||       (q / eps where the length is below eps)
    with n = s / ||s||, t' = t / ||t||, q = sign(n - t') and sign(0) = 0

Park & Kwak, "FEED: Feature-level Ensemble for Knowledge Distillation", equation 2. The paper writes the norm, a *sum*
over D = C*H*W values; Factor Transfer's published code, whose beta = 500 everyone quotes, takes the *mean*. Both are
here: mean = sum / D. Lengths are bounded below by `eps`, as in torch.nn.functional.normalize. Computed in fp32 (float64
if the student is) in channels-last order, whatever strides the arguments have.

On CUDA one Triton launch does all teachers whose maps look alike (gpu/normalized_l1.py). On a CPU PyTorch's operators
go over tiles of whole samples and compute the gradient together with the loss (_tiled.py). A compiler, float64 and
other devices get `reference`. Only the last has a double backward; the others refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from feedfast_kernels._layout import as_BHWC, scratch, tiles, work_dtype
from feedfast_kernels._ops import OPS, first_order_only, register
from feedfast_kernels._tiled import Backend, Source, backend_of, empty_gradient, finished_gradient
from feedfast_kernels.codes import Codes, StoredAs, Target, decode_reference, stored_parts

Reduction = Literal["sum", "mean"]


def normalized_l1(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    reduction: Reduction,
    weight: float = 1.0,
    denominator: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Sum over teachers of the L1 distance between unit-length maps.

    Args:
        student_maps: one float map [B, C_n, H_n, W_n] (or [B, C_n]) per teacher, any strides; receives a gradient.
        targets: codes or float maps of the same logical shapes; no gradient.
        reduction: ``"sum"`` over the values of a sample, or their ``"mean"`` (divides by C_n * H_n * W_n).
        weight: factor of the whole.
        denominator: divisor of the whole; None is the batch size.
        eps: least length a map is divided by.

    Returns:
        fp32 scalar (float64 for float64 students); 0 for an empty batch; NaN if any value is NaN or infinite, or a
        length is too large to be squared in that dtype (1.8e19 in fp32).

    Raises:
        ValueError: if the counts or shapes differ, or the reduction is unknown.

    Example:
        >>> import torch
        >>> student, target = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])  # (0.6, 0.8) and (1, 0)
        >>> round(normalized_l1([student], [target], reduction="sum").item(), 6)
        1.2
    """
    return _loss(student_maps, targets, reduction, weight, denominator, eps, backend=backend_of(student_maps))


def reference(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    reduction: Reduction,
    weight: float = 1.0,
    denominator: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """`normalized_l1` in PyTorch operators on any device, gradients by autograd: what the kernel is compared with."""
    return _loss(student_maps, targets, reduction, weight, denominator, eps, backend="whole")


def _loss(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    reduction: Reduction,
    weight: float,
    denominator: float | None,
    eps: float,
    *,
    backend: Backend,
) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"normalized_l1: reduction expected 'sum' or 'mean', got {reduction!r}")
    if len(student_maps) != len(targets) or not targets:
        raise ValueError(
            f"normalized_l1: expected one student map per target (at least one), "
            f"got {len(student_maps)} maps and {len(targets)} targets"
        )
    scales = []
    for index, (student, target) in enumerate(zip(student_maps, targets, strict=True)):
        if student.ndim not in (2, 4) or target.shape != student.shape:
            raise ValueError(
                f"normalized_l1: expected target {index} of the student map's shape {list(student.shape)} "
                f"([B, C, H, W] or [B, C]), got {list(target.shape)}"
            )
        batch, values = student.shape[0], max(student[:1].numel(), 1)
        scale = weight / (max(batch, 1) if denominator is None else denominator)
        scales.append(scale / values if reduction == "mean" else scale)
    if backend == "triton":
        data, offsets, steps, codecs = zip(*map(stored_parts, targets), strict=True)
        loss: Tensor = _AllTeachers.apply(list(codecs), scales, eps, *student_maps, *data, *offsets, *steps)
        return loss
    total: Tensor | None = None
    for student, target, scale in zip(student_maps, targets, scales, strict=True):
        if backend == "tiled":
            loss = _OneTeacher.apply(student, *stored_parts(target), scale, eps, torch.is_grad_enabled())
        else:
            loss = _whole(student, target, scale, eps)
        total = loss if total is None else total + loss
    assert total is not None
    return total


class _AllTeachers(torch.autograd.Function):
    """The Triton kernels: tensors come last and flat, N students, N targets, N offsets, N steps."""

    @staticmethod
    def forward(ctx: Any, codecs: list[str], scales: list[float], eps: float, *tensors: Tensor | None) -> Tensor:
        loss, statistics = OPS.normalized_l1(*_quarters(tensors), codecs, scales, eps)
        ctx.save_for_backward(statistics, *tensors)
        ctx.codecs, ctx.scales = codecs, scales
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("normalized_l1")
        statistics, *tensors = ctx.saved_tensors
        gradients = OPS.normalized_l1_backward(grad_output, statistics, *_quarters(tensors), ctx.codecs, ctx.scales)
        return None, None, None, *gradients, *[None] * (3 * len(gradients))


def _quarters(tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    count = len(tensors) // 4
    return [list(tensors[i * count : (i + 1) * count]) for i in range(4)]


_ARGUMENTS = "Tensor[] students, Tensor[] targets, Tensor?[] offsets, Tensor?[] steps, str[] codecs, float[] scales"
register(
    f"normalized_l1({_ARGUMENTS}, float eps) -> (Tensor, Tensor)",
    "normalized_l1.forward",
    lambda students, *_: (
        students[0].new_empty((), dtype=torch.float32),
        students[0].new_empty((sum(x.shape[0] for x in students), 4), dtype=torch.float32),
    ),
)
register(
    f"normalized_l1_backward(Tensor grad_output, Tensor statistics, {_ARGUMENTS}) -> Tensor[]",
    "normalized_l1.backward",
    lambda _grad_output, _statistics, students, *_: [torch.empty_like(x) for x in students],
)


class _OneTeacher(torch.autograd.Function):
    """Eager CPU code."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,  # stored bytes for codes, values otherwise
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: StoredAs,
        scale: float,
        eps: float,
        grad_enabled: bool,
    ) -> Tensor:
        source = Source(student, target, offset_C, step_C, codec, None)
        loss, ctx.gradient = _tiled(source, student, scale, eps, grad_enabled and ctx.needs_input_grad[0])
        ctx.save_for_backward(student, target, offset_C, step_C)
        ctx.codec, ctx.scale, ctx.eps = codec, scale, eps
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("normalized_l1")
        inputs = (*ctx.saved_tensors, ctx.codec, None)
        student: Tensor = inputs[0]
        gradient = finished_gradient(
            ctx, grad_output, student.dtype, lambda: _tiled(Source(*inputs), student, ctx.scale, ctx.eps, True)[1]
        )
        return gradient, *[None] * 7


def _tiled(
    source: Source, student: Tensor, scale: float, eps: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss, and its gradient for a grad_output of 1, tile by tile."""
    gradient = empty_gradient(student) if wants_gradient else None
    distances_B = []
    for tile in tiles(source.student.shape, whole_samples=True):
        s, t = source.student_rows(tile), source.target_rows(tile)
        samples = (tile[0].stop - tile[0].start, -1, s.shape[1])
        s_BRE, t_BRE = s.view(samples), t.view(samples)  # R image rows of E = W * C values
        s_length_B, t_length_B = _length(s_BRE), _length(t_BRE)
        # NaN lengths, and infinite ones, whose maps would be 0, make both maps and so the loss and the gradient NaN
        poison_B = 0 * (s_length_B + t_length_B)
        s_factor_B, t_factor_B = (1 / (x.clamp(min=eps) + poison_B) for x in (s_length_B, t_length_B))
        free, unit, difference = (scratch(slot, s_BRE.shape) for slot in (0, 2, 1))
        torch.mul(s_BRE, s_factor_B, out=unit)
        torch.mul(t_BRE, t_factor_B, out=difference)
        torch.sub(unit, difference, out=difference)
        distances_B.append(torch.abs(difference, out=free).sum((1, 2)))
        if gradient is None:
            continue
        q = difference.sign_()
        along_B = torch.mul(q, unit, out=free).sum((1, 2), keepdim=True)
        # below eps the divisor is a constant, so the length contributes nothing
        slope_B = along_B * (s_length_B >= eps) * s_factor_B * -scale
        unit.mul_(slope_B)
        into = as_BHWC(gradient)[tile]
        if into.dtype == q.dtype and into.is_contiguous():
            torch.addcmul(unit, q, s_factor_B * scale, out=into.view(q.shape))
        else:
            into.copy_(torch.addcmul(unit, q, s_factor_B * scale, out=q).view(into.shape))
    if not distances_B:
        return torch.zeros((), dtype=source.dtype), gradient
    return torch.cat(distances_B).sum() * scale, gradient


def _length(x_BRE: Tensor) -> Tensor:
    """[B, 1, 1], row by row first: one chain of fp32 sums over a whole map loses a digit."""
    of_rows = torch.linalg.vector_norm(x_BRE, dim=2, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(of_rows, dim=1, keepdim=True)
    return length


def _whole(student: Tensor, target: Target, scale: float, eps: float) -> Tensor:
    """The formula over whole maps, differentiated by autograd."""
    dtype = work_dtype(student)
    student_BD = _rows(student, dtype)
    target_BD = _rows(decode_reference(target, dtype) if isinstance(target, Codes) else target.detach(), dtype)
    student_length_B, target_length_B = (
        torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (student_BD, target_BD)
    )
    poison_B = 0 * (student_length_B.detach() + target_length_B)
    unit_BD = student_BD / (student_length_B.clamp(min=eps) + poison_B)
    distance: Tensor = (unit_BD - target_BD / target_length_B.clamp(min=eps)).abs().sum()
    return distance * scale


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D] in channels-last order."""
    return as_BHWC(x).to(dtype).reshape(x.shape[0], math.prod(x.shape[1:]))
