"""FEED's distance: absolute difference of two maps, each scaled to unit length over all of its C*H*W values.

    loss = weight / denominator * sum over teachers n, samples b of  || s_nb / ||s_nb||_2  -  t_nb / ||t_nb||_2 ||_1

Park & Kwak, "FEED: Feature-level Ensemble for Knowledge Distillation", equation 2. The paper writes the norm, a *sum*
over D = C*H*W values; Factor Transfer's published code, whose beta = 500 everyone quotes, takes the *mean*. Both are
here: mean = sum / D. Lengths are bounded below by `eps`, as in torch.nn.functional.normalize.

Nothing but the arguments and a few numbers a sample is kept for the backward pass, among them <n, q>, so that it is one
pass. With n = s / ||s||, t' = t / ||t||, q = sign(n - t') and sign(0) = 0:

    d(loss)/ds = weight / denominator * (q - n * <n, q>) / ||s||       (q / eps where the length is below eps)

Computed in fp32 (float64 if the student is) in channels-last order, whatever strides the arguments have.

On CUDA one Triton launch does all teachers whose maps look alike (gpu/normalized_l1.py: 3 bytes an element forward and
5 backward, with u8 codes and 16-bit students); elsewhere, and for float64, PyTorch operators teacher by teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from feedfast_kernels._layout import as_BHWC, work_dtype
from feedfast_kernels._ops import OPS, first_order_only, register, runs_triton
from feedfast_kernels.codes import Codes, Target, decode_reference


def normalized_l1(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    reduction: Literal["sum", "mean"],
    weight: float = 1.0,
    denominator: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Sum over teachers of the L1 distance between unit-length maps.

    Args:
        student_maps: one float map [B, C_n, H_n, W_n] (or [B, C_n]) a teacher, any strides; each receives its gradient.
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
    """
    triton = all(runs_triton(x) for x in student_maps)
    return _loss(student_maps, targets, reduction, weight, denominator, eps, triton=triton)


def reference(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    reduction: Literal["sum", "mean"],
    weight: float = 1.0,
    denominator: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """`normalized_l1` in PyTorch operators on any device: what the kernel is compared with."""
    return _loss(student_maps, targets, reduction, weight, denominator, eps, triton=False)


def _loss(
    student_maps: Sequence[Tensor],
    targets: Sequence[Target],
    reduction: str,
    weight: float,
    denominator: float | None,
    eps: float,
    *,
    triton: bool,
) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"normalized_l1: reduction expected 'sum' or 'mean', got {reduction!r}")
    if len(student_maps) != len(targets) or not targets:
        raise ValueError(
            f"normalized_l1: expected one student map a target (at least one), "
            f"got {len(student_maps)} maps and {len(targets)} targets"
        )
    stored: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    codecs, scales = [], []
    for index, (student, target) in enumerate(zip(student_maps, targets, strict=True)):
        if student.ndim not in (2, 4) or target.shape != student.shape:
            raise ValueError(
                f"normalized_l1: expected target {index} of the student map's shape {list(student.shape)} "
                f"([B, C, H, W] or [B, C]), got {list(target.shape)}"
            )
        batch, values = student.shape[0], max(student[:1].numel(), 1)
        scale = weight / (max(batch, 1) if denominator is None else denominator)
        scales.append(scale / values if reduction == "mean" else scale)
        if isinstance(target, Codes):
            stored.append((target.data, target.offset, target.step))
            codecs.append(str(target.codec))
        else:
            stored.append((target.detach(), None, None))
            codecs.append("")
    if triton:
        data, offsets, steps = zip(*stored, strict=True)
        loss: Tensor = _AllTeachers.apply(codecs, scales, eps, *student_maps, *data, *offsets, *steps)
        return loss
    total: Tensor | None = None
    for student, source, codec, scale in zip(student_maps, stored, codecs, scales, strict=True):
        loss = _OneTeacher.apply(student, *source, codec, scale, eps)
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
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("normalized_l1")
        statistics, *tensors = ctx.saved_tensors
        gradients = OPS.normalized_l1_backward(upstream, statistics, *_quarters(tensors), ctx.codecs, ctx.scales)
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
    f"normalized_l1_backward(Tensor upstream, Tensor statistics, {_ARGUMENTS}) -> Tensor[]",
    "normalized_l1.backward",
    lambda _upstream, _statistics, students, *_: [torch.empty_like(x) for x in students],
)


class _OneTeacher(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,  # stored bytes for codes, values otherwise
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: Literal["u8", "u4", ""],  # "" for values
        scale: float,
        eps: float,
    ) -> Tensor:
        student_BD = _rows(student, work_dtype(student))
        target_BD = _target_rows(target, offset_C, step_C, codec, student_BD.dtype)
        student_length_B, target_length_B = (
            torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (student_BD, target_BD)
        )
        unit_BD = student_BD / student_length_B.clamp(min=eps)
        difference_BD = unit_BD - target_BD / target_length_B.clamp(min=eps)
        loss: Tensor = difference_BD.abs().sum() * scale
        # a length whose square overflows divides everything to a quiet zero
        loss = loss + 0 * (student_length_B + target_length_B).sum()
        along_B = None
        if ctx.needs_input_grad[0]:
            along_B = difference_BD.sign_().mul_(unit_BD).sum(dim=1, keepdim=True)
        ctx.save_for_backward(student, target, offset_C, step_C, student_length_B, target_length_B, along_B)
        ctx.codec, ctx.scale, ctx.eps = codec, scale, eps
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, target, offset_C, step_C, student_length_B, target_length_B, along_B = ctx.saved_tensors
        divisor_B = student_length_B.clamp(min=ctx.eps)
        unit_BD = _rows(student, student_length_B.dtype) / divisor_B
        target_BD = _target_rows(target, offset_C, step_C, ctx.codec, unit_BD.dtype)
        sign_BD = (unit_BD - target_BD / target_length_B.clamp(min=ctx.eps)).sign_()
        # below eps the divisor is a constant, so the length contributes nothing
        along_B = along_B * (student_length_B >= ctx.eps)
        # sign(NaN) is 0 in torch: a NaN of the target must not become a quiet zero gradient
        along_B = along_B + 0 * (student_length_B + target_length_B)
        gradient_BD = sign_BD.sub_(unit_BD.mul_(along_B)).mul_(upstream * ctx.scale / divisor_B)
        gradient = torch.empty_like(student)
        into = as_BHWC(gradient)
        into.copy_(gradient_BD.view(into.shape))
        return gradient, None, None, None, None, None, None


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D] in channels-last order."""
    return as_BHWC(x).to(dtype).reshape(x.shape[0], -1) if x.numel() else x.new_zeros((x.shape[0], 0), dtype=dtype)


def _target_rows(
    target: Tensor, offset_C: Tensor | None, step_C: Tensor | None, codec: Literal["u8", "u4", ""], dtype: torch.dtype
) -> Tensor:
    if not codec or offset_C is None or step_C is None:
        return _rows(target, dtype)
    return _rows(decode_reference(Codes(target, offset_C, step_C, codec), dtype), dtype)
