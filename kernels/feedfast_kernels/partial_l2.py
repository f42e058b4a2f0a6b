"""OFD's distance: squared error that forgives a student for being more negative than a negative teacher.

    t = max(target, margin_C)
    dead = (s <= t) and (t <= 0)                    the teacher is silent there, and the student at least as much
    loss = weight / denominator * sum over everything of  0 if dead else (s - t)^2

Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3; the authors' code sums over all
elements and divides by the batch, so that is the default denominator.

Only a NaN-preserving form will do: "keep where s > t or t > 0" turns a NaN of the student into 0 and hides divergence.

Nothing but the arguments is kept for the backward pass; t and the mask are computed again from the codes, which costs
less than writing and reading fp32 maps. With a = s - t the residual is

    d = a where t > 0, else max(a, 0)   =   max(a, (a where t > 0, else 0))

and d(loss)/ds = 2 * weight / denominator * d. Computed in fp32 (float64 if the student is), result in fp32 (float64).

On CUDA a Triton kernel does each direction in one pass (gpu/partial_l2.py: 3 bytes an element forward, 5 backward);
elsewhere, and for float64, PyTorch operators over cache-sized tiles. At s == t the distance and its gradient are 0 on
both sides, so how ties are broken never shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feedfast_kernels._layout import Tile, as_BHWC, tiles, work_dtype
from feedfast_kernels._ops import OPS, first_order_only, register, runs_triton
from feedfast_kernels.codes import Codes, Target, unpack


def partial_l2(
    student_NCHW: Tensor,
    target: Target,
    *,
    margin_C: Tensor | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """Partial squared distance between the student's map and max(target, margin).

    Args:
        student_NCHW: float [B, C, H, W] or [B, C], any strides (channels-last is fastest); receives the gradient.
        target: codes or a float map of the same logical shape; no gradient.
        margin_C: float [C], or None. A target already clipped at the margin may be clipped again.
        weight: factor of the sum.
        denominator: divisor of the sum; None is the batch size.

    Returns:
        fp32 scalar (float64 for a float64 student); 0 for an empty batch; NaN if any value is NaN.

    Raises:
        ValueError: if shapes differ.
    """
    return _loss(student_NCHW, target, margin_C, weight, denominator, triton=runs_triton(student_NCHW))


def reference(
    student_NCHW: Tensor,
    target: Target,
    *,
    margin_C: Tensor | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """`partial_l2` in PyTorch operators on any device: what the kernel is compared with."""
    return _loss(student_NCHW, target, margin_C, weight, denominator, triton=False)


def _loss(
    student: Tensor, target: Target, margin_C: Tensor | None, weight: float, denominator: float | None, *, triton: bool
) -> Tensor:
    if student.ndim not in (2, 4) or target.shape != student.shape:
        raise ValueError(
            f"partial_l2: expected a target of the student's shape {list(student.shape)}, [B, C, H, W] or [B, C], "
            f"got {list(target.shape)}"
        )
    batch, channels = student.shape[:2]
    if margin_C is not None and margin_C.shape != (channels,):
        raise ValueError(f"partial_l2: margin expected [{channels}], got {list(margin_C.shape)}")
    scale = weight / (max(batch, 1) if denominator is None else denominator)
    if isinstance(target, Codes):
        loss = _PartialL2.apply(student, target.data, target.offset, target.step, target.codec, margin_C, scale, triton)
    else:
        loss = _PartialL2.apply(student, target.detach(), None, None, "", margin_C, scale, triton)
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
        codec: str,  # "" for values
        margin_C: Tensor | None,
        scale: float,
        triton: bool,
    ) -> Tensor:
        ctx.save_for_backward(student, target, offset_C, step_C, margin_C)
        ctx.codec, ctx.scale, ctx.triton = codec, scale, triton
        if triton:
            loss: Tensor = OPS.partial_l2(student, target, offset_C, step_C, codec, margin_C, scale)
            return loss
        source = Source(student, target, offset_C, step_C, codec, margin_C)
        sums = []
        for tile in tiles(source.student.shape, student.device):
            residual = source.residual(tile)
            sums.append(residual.mul_(residual).sum())
        if not sums:
            return torch.zeros((), dtype=source.dtype, device=student.device)
        return torch.stack(sums).sum() * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, target, offset_C, step_C, margin_C = ctx.saved_tensors
        if ctx.triton:
            first_order_only("partial_l2")
            gradient = OPS.partial_l2_backward(
                upstream, student, target, offset_C, step_C, ctx.codec, margin_C, ctx.scale
            )
            return gradient, *[None] * 7
        source = Source(student, target, offset_C, step_C, ctx.codec, margin_C)
        gradient = torch.empty_like(student)
        gradient_BHWC = as_BHWC(gradient)
        factor = upstream * (2 * ctx.scale)
        for tile in tiles(source.student.shape, student.device):
            into = gradient_BHWC[tile]
            into.copy_(source.residual(tile).mul_(factor).view(into.shape))
        return gradient, *[None] * 7


_ARGUMENTS = "Tensor student, Tensor target, Tensor? offset, Tensor? step, str codec, Tensor? margin, float scale"
register(
    f"partial_l2({_ARGUMENTS}) -> Tensor",
    "partial_l2.forward",
    lambda student, *_: student.new_empty((), dtype=torch.float32),
)
register(
    f"partial_l2_backward(Tensor upstream, {_ARGUMENTS}) -> Tensor",
    "partial_l2.backward",
    lambda _upstream, student, *_: torch.empty_like(student),
)


class Source:
    """The arguments of one call, ready to give the residual of any tile."""

    def __init__(
        self,
        student: Tensor,
        target: Tensor,
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: str,
        margin_C: Tensor | None,
    ) -> None:
        stored = target if target.ndim == 4 else target[:, None, None, :]
        self.student, self.target, self.codec = as_BHWC(student), stored if codec else as_BHWC(target), codec
        self.dtype = work_dtype(student)
        width = self.student.shape[2]

        def row(x_C: Tensor | None) -> Tensor | None:
            return None if x_C is None else x_C.to(self.dtype).repeat(width)

        self.offset, self.step, self.margin = row(offset_C), row(step_C), row(margin_C)

    def student_values(self, tile: Tile) -> Tensor:
        """The student's values of one tile, [image rows, W * C] in the working dtype; may be a view."""
        student = self.student[tile]
        return student.to(self.dtype).reshape(student.shape[0] * student.shape[1], -1)

    def target_values(self, tile: Tile) -> Tensor:
        """t of one tile, [image rows, W * C] in the working dtype; may be a view."""
        target = self.target[tile]
        if self.codec == "u4":
            target = unpack(target, self.student.shape[3])
        t = target.to(self.dtype).reshape(target.shape[0] * target.shape[1], -1)
        if self.step is not None and self.offset is not None:
            t.mul_(self.step).add_(self.offset)
        return t if self.margin is None else torch.maximum(t, self.margin)

    def residual(self, tile: Tile) -> Tensor:
        """d of one tile, [image rows, W * C] in the working dtype, in memory of its own."""
        return residual(self.student_values(tile), self.target_values(tile))


def residual(s: Tensor, t: Tensor) -> Tensor:
    """0 where s <= t <= 0, else s - t; NaN where either is."""
    a = s - t
    # threshold_backward(a, t, 0) is "a where t > 0, else 0" and vectorised on the CPU (0.1 ns an element);
    # torch.where is not (2 ns, torch 2.15)
    return torch.maximum(a, torch.ops.aten.threshold_backward(a, t, 0))
