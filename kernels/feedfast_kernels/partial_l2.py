"""OFD's distance: squared error that forgives a student for being more negative than a negative teacher.

    t = max(target, margin_C)
    dead = (s <= t) and (t <= 0)                    the teacher is silent there, and the student at least as much
    d = 0 if dead else s - t
    loss = weight / denominator * sum of d^2;       d(loss)/ds = 2 * weight / denominator * d

Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3; the authors' code sums over all
elements and divides by the batch, so that is the default denominator. Computed in fp32 (float64 if the student is). At
s == t the distance and its gradient are 0 on both sides, so how ties are broken never shows.

Of a map that is sampled only some positions are compared, gathered in front of all this or inside the kernel.

On CUDA a Triton kernel does each direction in one pass (gpu/partial_l2.py); on a CPU PyTorch's operators go over
cache-sized tiles and compute the gradient together with the loss (_tiled.py); a compiler, float64 and other devices get
the formula over whole maps, `reference`. Only the last has a double backward; the others refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feedfast_kernels._layout import as_BHWC, scratch, tiles
from feedfast_kernels._ops import OPS, first_order_only, register
from feedfast_kernels._tiled import Backend, Source, backend_of, empty_gradient, finished_gradient
from feedfast_kernels.codes import StoredAs, Target, stored_parts
from feedfast_kernels.positions import as_row, check_positions, gather_positions


def partial_l2(
    student_NCHW: Tensor,
    target: Target,
    *,
    margin_C: Tensor | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Partial squared distance between the student's map and max(target, margin).

    Args:
        student_NCHW: float [B, C, H, W] or [B, C], any strides (channels-last is fastest); receives the gradient.
        target: codes or a float map of the same logical shape; no gradient.
        margin_C: float [C], or None. A target already clipped at the margin may be clipped again.
        weight: factor of the sum.
        denominator: divisor of the sum; None is the batch size.
        positions: int32 or int64 [B, P], y * W + x, distinct per sample: where the student's map is compared, with a
            target [B, C, P]. Nothing is rescaled: ``weight`` has H * W / P where the sum is to stand for the map's.

    Returns:
        fp32 scalar (float64 for a float64 student); 0 for an empty batch; NaN if any value is NaN.

    Raises:
        ValueError: if shapes differ, and as `gather_positions`.

    Example:
        The second value is forgiven: the target is negative, and the student is below it.

        >>> import torch
        >>> student, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -1.0]])
        >>> partial_l2(student, target).item()
        4.0
    """
    backend = backend_of([student_NCHW])
    return _loss(student_NCHW, target, margin_C, weight, denominator, positions, backend=backend)


def reference(
    student_NCHW: Tensor,
    target: Target,
    *,
    margin_C: Tensor | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """`partial_l2` in PyTorch operators on any device: what the kernel is compared with."""
    return _loss(student_NCHW, target, margin_C, weight, denominator, positions, backend="whole")


def _loss(
    student: Tensor,
    target: Target,
    margin_C: Tensor | None,
    weight: float,
    denominator: float | None,
    positions: Tensor | None,
    *,
    backend: Backend,
) -> Tensor:
    if positions is not None:
        check_positions("partial_l2", student, positions)
        expected = (*student.shape[:2], positions.shape[1])
        if tuple(target.shape) != expected:
            raise ValueError(f"partial_l2: expected a target {list(expected)}, got {list(target.shape)}")
        if backend != "triton":
            student, target, positions = gather_positions(student, positions).unsqueeze(2), as_row(target), None
    if positions is None and (student.ndim not in (2, 4) or target.shape != student.shape):
        raise ValueError(
            f"partial_l2: expected a target of the student's shape {list(student.shape)}, [B, C, H, W] or [B, C], "
            f"got {list(target.shape)}"
        )
    batch, channels = student.shape[:2]
    if margin_C is not None and margin_C.shape != (channels,):
        raise ValueError(f"partial_l2: margin expected [{channels}], got {list(margin_C.shape)}")
    scale = weight / (max(batch, 1) if denominator is None else denominator)
    options = (margin_C, scale, backend, torch.is_grad_enabled(), positions)
    loss = _PartialL2.apply(student, *stored_parts(target), *options)
    assert isinstance(loss, Tensor)
    return loss


class _PartialL2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,  # stored bytes for codes, values in the student's shape otherwise
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: StoredAs,
        margin_C: Tensor | None,
        scale: float,
        backend: Backend,
        grad_enabled: bool,
        positions: Tensor | None,
    ) -> Tensor:
        ctx.codec, ctx.scale, ctx.backend = codec, scale, backend
        # only the arguments are kept: t and the mask are computed again from the codes
        ctx.save_for_backward(student, target, offset_C, step_C, margin_C, positions)
        inputs = (student, target, offset_C, step_C, codec, margin_C)
        if backend == "tiled":
            loss, ctx.gradient = _tiled(Source(*inputs), student, scale, grad_enabled and ctx.needs_input_grad[0])
            return loss
        if backend == "triton":
            of_kernel: Tensor = OPS.partial_l2(*inputs, scale, positions)
            return of_kernel
        d = residual(*Source(*inputs).whole())
        return d.mul_(d).sum() * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.backend != "whole":
            first_order_only("partial_l2")
        student, target, offset_C, step_C, margin_C, positions = ctx.saved_tensors
        inputs = (student, target, offset_C, step_C, ctx.codec, margin_C)
        if ctx.backend == "tiled":
            gradient = finished_gradient(
                ctx, grad_output, student.dtype, lambda: _tiled(Source(*inputs), student, ctx.scale, True)[1]
            )
            return gradient, *[None] * 9
        if ctx.backend == "triton":
            return OPS.partial_l2_backward(grad_output, *inputs, ctx.scale, positions), *[None] * 9
        d = residual(*Source(*inputs).whole())
        gradient = torch.empty_like(student)
        into = as_BHWC(gradient)
        into.copy_(d.mul_(grad_output * (2 * ctx.scale)).view(into.shape))
        return gradient, *[None] * 9


def _tiled(source: Source, student: Tensor, scale: float, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss, and its gradient for a grad_output of 1, tile by tile."""
    # a 16-bit gradient is rounded here, before grad_output is known: one that is no power of two rounds a second time
    gradient = empty_gradient(student) if wants_gradient else None
    sums = []
    for tile in tiles(source.student.shape):
        d = residual_in(source.student_rows(tile), source.target_rows(tile), 0)
        sums.append(square_sum(d))
        if gradient is not None:
            into = as_BHWC(gradient)[tile]
            if into.dtype == d.dtype:
                torch.mul(d.view(into.shape), 2 * scale, out=into)
            else:
                into.copy_(d.mul_(2 * scale).view(into.shape))
    if not sums:
        return torch.zeros((), dtype=source.dtype, device=student.device), gradient
    return torch.stack(sums).sum() * scale, gradient


_ARGUMENTS = (
    "Tensor student, Tensor target, Tensor? offset, Tensor? step, str codec, Tensor? margin, float scale, "
    "Tensor? positions=None"
)
register(
    f"partial_l2({_ARGUMENTS}) -> Tensor",
    "partial_l2.forward",
    lambda student, *_: student.new_empty((), dtype=torch.float32),
)
register(
    f"partial_l2_backward(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
    "partial_l2.backward",
    lambda _grad_output, student, *_: torch.empty_like(student),
)


def residual(s: Tensor, t: Tensor) -> Tensor:
    """0 where s <= t <= 0, else s - t; NaN where either is."""
    # max(a, (a where t > 0, else 0)). "keep where s > t or t > 0" would turn a NaN of the student into 0
    a = s - t
    # threshold_backward(a, t, 0) is "a where t > 0, else 0" and vectorized on the CPU (0.1 ns per element);
    # torch.where is not (2 ns, torch 2.15)
    return torch.maximum(a, torch.ops.aten.threshold_backward(a, t, 0))


def residual_in(s: Tensor, t: Tensor, slot: int) -> Tensor:
    """`residual` in a slot of scratch memory, which may be that of s; overwrites slot 1."""
    a, kept = scratch(slot, s.shape), scratch(1, s.shape)
    torch.sub(s, t, out=a)
    torch.ops.aten.threshold_backward.grad_input(a, t, 0, grad_input=kept)
    return torch.maximum(a, kept, out=a)


def square_sum(d: Tensor) -> Tensor:
    """Sum of squares; overwrites slot 1. `torch.dot` is 0.05 ns per element faster and loses a digit."""
    return torch.mul(d, d, out=scratch(1, d.shape)).sum()
