"""FEED's distance: absolute difference of two maps, each scaled to unit length over all of its C*H*W values.

    loss = weight / denominator * sum over teachers n, samples b of  || s_nb / ||s_nb||_2  -  t_nb / ||t_nb||_2 ||_1

Park & Kwak, "FEED: Feature-level Ensemble for Knowledge Distillation", equation 2. The paper writes the norm, a *sum*
over D = C*H*W values; Factor Transfer's published code, whose beta = 500 everyone quotes, takes the *mean*. Both are
here: mean = sum / D. Lengths are bounded below by `eps`, as in torch.nn.functional.normalize.

Nothing but the arguments and two lengths a sample is kept for the backward pass. With n = s / ||s||, q = sign(n - t'):

    d(loss)/ds = weight / denominator * (q - n * <n, q>) / ||s||       (q / eps where the length is below eps)

Computed in fp32 (float64 if the student is) in channels-last order, whatever strides the arguments have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from feedfast_kernels._layout import as_BHWC, work_dtype
from feedfast_kernels.codes import Codes, Target, decode


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
        fp32 scalar (float64 for float64 students); 0 for an empty batch; NaN if any value is NaN.

    Raises:
        ValueError: if the counts or shapes differ, or the reduction is unknown.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"normalized_l1: reduction expected 'sum' or 'mean', got {reduction!r}")
    if len(student_maps) != len(targets) or not targets:
        raise ValueError(
            f"normalized_l1: expected one student map a target (at least one), "
            f"got {len(student_maps)} maps and {len(targets)} targets"
        )
    total: Tensor | None = None
    for index, (student, target) in enumerate(zip(student_maps, targets, strict=True)):
        if student.ndim not in (2, 4) or target.shape != student.shape:
            raise ValueError(
                f"normalized_l1: expected target {index} of the student map's shape {list(student.shape)} "
                f"([B, C, H, W] or [B, C]), got {list(target.shape)}"
            )
        batch, values = student.shape[0], max(student[:1].numel(), 1)
        scale = weight / (max(batch, 1) if denominator is None else denominator)
        if reduction == "mean":
            scale /= values
        if isinstance(target, Codes):
            loss = _NormalizedL1.apply(student, target.data, target.offset, target.step, target.codec, scale, eps)
        else:
            loss = _NormalizedL1.apply(student, target.detach(), None, None, "", scale, eps)
        total = loss if total is None else total + loss
    assert total is not None
    return total


class _NormalizedL1(torch.autograd.Function):
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
        ctx.save_for_backward(student, target, offset_C, step_C, student_length_B, target_length_B)
        ctx.codec, ctx.scale, ctx.eps = codec, scale, eps
        difference_BD = student_BD / student_length_B.clamp(min=eps) - target_BD / target_length_B.clamp(min=eps)
        loss: Tensor = difference_BD.abs().sum() * scale
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, target, offset_C, step_C, student_length_B, target_length_B = ctx.saved_tensors
        divisor_B = student_length_B.clamp(min=ctx.eps)
        unit_BD = _rows(student, student_length_B.dtype) / divisor_B
        target_BD = _target_rows(target, offset_C, step_C, ctx.codec, unit_BD.dtype) / target_length_B.clamp(
            min=ctx.eps
        )
        sign_BD = torch.sign(unit_BD - target_BD)
        along_B = (unit_BD * sign_BD).sum(dim=1, keepdim=True)
        # below eps the divisor is a constant, so the length contributes nothing
        along_B = along_B * (student_length_B >= ctx.eps)
        # sign(NaN) is 0 in torch: a NaN of the target must not become a quiet zero gradient
        along_B = along_B + 0 * target_length_B
        gradient_BD = (sign_BD - unit_BD * along_B) * (upstream * ctx.scale / divisor_B)
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
    if codec and offset_C is not None and step_C is not None:
        return _rows(decode(Codes(target, offset_C, step_C, codec), dtype), dtype)
    return _rows(target, dtype)
