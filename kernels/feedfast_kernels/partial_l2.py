"""OFD's distance: squared error that forgives a student for being more negative than a negative teacher.

    t = max(target, margin_C)
    dead = (s <= t) and (t <= 0)                    the teacher is silent there, and the student at least as much
    loss = weight / denominator * sum over everything of  0 if dead else (s - t)^2

Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3; the authors' code sums over all
elements and divides by the batch, so that is the default denominator.

Only a NaN-preserving form will do: "keep where s > t or t > 0" turns a NaN of the student into 0 and hides divergence.

With a = s - t the residual is

    d = a where t > 0, else max(a, 0)   =   max(a, (a where t > 0, else 0))

and d(loss)/ds = 2 * weight / denominator * d. Computed in fp32 (float64 if the student is), result in fp32 (float64).
At s == t the distance and its gradient are 0 on both sides, so how ties are broken never shows.

Three ways to compute it:

* On CUDA a Triton kernel does each direction in one pass (gpu/partial_l2.py: 3 bytes an element forward, 5 backward).
  Only the arguments are kept; t and the mask are computed again from the codes.
* On a CPU PyTorch's operators cost more than memory does, so each runs once: the forward pass goes over cache-sized
  tiles in scratch memory and, where a gradient is wanted, leaves the gradient for an upstream of 1. That map is kept
  instead of the student. A bf16 student's is bf16, so an upstream that is no power of two rounds a second time.
* For a compiler, for float64 and on other devices, operators over whole maps: `reference`.

Only the last has second derivatives; the others refuse them.
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
    return _loss(student_NCHW, target, margin_C, weight, denominator, how=_how(student_NCHW))


def reference(
    student_NCHW: Tensor,
    target: Target,
    *,
    margin_C: Tensor | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """`partial_l2` in PyTorch operators on any device: what the kernel is compared with."""
    return _loss(student_NCHW, target, margin_C, weight, denominator, how="whole")


def _how(student: Tensor) -> str:
    if runs_triton(student):
        return "triton"
    return "tiled" if runs_tiled(student) else "whole"


def _loss(
    student: Tensor, target: Target, margin_C: Tensor | None, weight: float, denominator: float | None, *, how: str
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
    options = (margin_C, scale, how, torch.is_grad_enabled())
    if isinstance(target, Codes):
        loss = _PartialL2.apply(student, target.data, target.offset, target.step, target.codec, *options)
    else:
        loss = _PartialL2.apply(student, target.detach(), None, None, "", *options)
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
        how: str,  # "triton", "tiled" or "whole"
        grad_enabled: bool,
    ) -> Tensor:
        ctx.codec, ctx.scale, ctx.how, ctx.dtype = codec, scale, how, student.dtype
        if how == "tiled":
            source = Source(student, target, offset_C, step_C, codec, margin_C)
            loss, gradient = _tiled(source, student, scale, grad_enabled and ctx.needs_input_grad[0])
            ctx.save_for_backward(gradient)
            return loss
        ctx.save_for_backward(student, target, offset_C, step_C, margin_C)
        if how == "triton":
            of_kernel: Tensor = OPS.partial_l2(student, target, offset_C, step_C, codec, margin_C, scale)
            return of_kernel
        d = residual(*Source(student, target, offset_C, step_C, codec, margin_C).whole())
        return d.mul_(d).sum() * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.how != "whole":
            first_order_only("partial_l2")
        if ctx.how == "tiled":
            return times_upstream(ctx.saved_tensors[0], upstream, ctx.dtype), *[None] * 8
        student, target, offset_C, step_C, margin_C = ctx.saved_tensors
        if ctx.how == "triton":
            gradient = OPS.partial_l2_backward(
                upstream, student, target, offset_C, step_C, ctx.codec, margin_C, ctx.scale
            )
            return gradient, *[None] * 8
        d = residual(*Source(student, target, offset_C, step_C, ctx.codec, margin_C).whole())
        gradient = torch.empty_like(student)
        into = as_BHWC(gradient)
        into.copy_(d.mul_(upstream * (2 * ctx.scale)).view(into.shape))
        return gradient, *[None] * 8


def _tiled(source: Source, student: Tensor, scale: float, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss, and its gradient for an upstream of 1, tile by tile."""
    gradient = empty_gradient(student) if wants_gradient else None
    sums = []
    for tile in tiles(source.student.shape, student.device):
        d = source.residual(source.student_rows(tile), source.target_rows(tile), 0)
        sums.append(source.square_sum(d))
        if gradient is not None:
            into = as_BHWC(gradient)[tile]
            if into.dtype == d.dtype:
                torch.mul(d.view(into.shape), 2 * scale, out=into)
            else:
                into.copy_(d.mul_(2 * scale).view(into.shape))
    if not sums:
        return torch.zeros((), dtype=source.dtype, device=student.device), gradient
    return torch.stack(sums).sum() * scale, gradient


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


def runs_tiled(student: Tensor) -> bool:
    """Whether the tiled form takes ``student``: eager CPU code. float64, for gradient checks, may be derived twice."""
    on_cpu = student.device.type == "cpu" and student.dtype != torch.float64
    return on_cpu and not torch.compiler.is_compiling()


class Source:
    """The arguments of one call, as rows [image rows, W * C] of a tile or of the whole map, in the working dtype.

    Rows of a tile are views where they can be, else they lie in scratch memory: slot 0 is the student's, slot 1 the
    target's, slot 2 free. Fresh memory for every operator cost more than the operators.
    """

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
        self._scratch: list[Tensor | None] = [None] * 3
        width = self.student.shape[2]

        def row(x_C: Tensor | None) -> Tensor | None:
            return None if x_C is None else along_row(x_C.to(self.dtype), width)

        self.offset, self.step, self.margin = row(offset_C), row(step_C), row(margin_C)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Student and t of the whole map; may be views."""
        target = unpack(self.target, self.student.shape[3]) if self.codec == "u4" else self.target
        t = target.to(self.dtype).reshape(_rows(target))
        if self.step is not None and self.offset is not None:
            t.mul_(self.step).add_(self.offset)
        return (
            self.student.to(self.dtype).reshape(_rows(self.student)),
            t if self.margin is None else torch.maximum(t, self.margin),
        )

    def student_rows(self, tile: Tile) -> Tensor:
        """The student's values of one tile."""
        return self._read(self.student[tile], 0)

    def target_rows(self, tile: Tile) -> Tensor:
        """t of one tile."""
        target = self.target[tile]
        t = self._read(unpack(target, self.student.shape[3]) if self.codec == "u4" else target, 1)
        if self.step is not None and self.offset is not None:
            t.mul_(self.step).add_(self.offset)
        return t if self.margin is None else torch.maximum(t, self.margin, out=self.scratch(1, t.shape))

    def residual(self, s: Tensor, t: Tensor, slot: int) -> Tensor:
        """`residual` in a slot, which may be that of s; overwrites slot 1."""
        a, kept = self.scratch(slot, s.shape), self.scratch(1, s.shape)
        torch.sub(s, t, out=a)
        torch.ops.aten.threshold_backward.grad_input(a, t, 0, grad_input=kept)
        return torch.maximum(a, kept, out=a)

    def square_sum(self, d: Tensor) -> Tensor:
        """Sum of squares; overwrites slot 1. `torch.dot` is 0.05 ns an element faster and loses a digit."""
        return torch.mul(d, d, out=self.scratch(1, d.shape)).sum()

    def scratch(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Memory of a slot for at most as many rows as the slot was first used for: the first tile is the largest."""
        buffer = self._scratch[slot]
        if buffer is None:
            buffer = self._scratch[slot] = torch.empty(shape, dtype=self.dtype)
        return buffer[: shape[0]]

    def _read(self, x_BHWC: Tensor, slot: int) -> Tensor:
        if x_BHWC.dtype == self.dtype and x_BHWC.is_contiguous():
            return x_BHWC.view(_rows(x_BHWC))
        rows = self.scratch(slot, _rows(x_BHWC))
        rows.view(x_BHWC.shape).copy_(x_BHWC)
        return rows


def residual(s: Tensor, t: Tensor) -> Tensor:
    """0 where s <= t <= 0, else s - t; NaN where either is."""
    a = s - t
    # threshold_backward(a, t, 0) is "a where t > 0, else 0" and vectorised on the CPU (0.1 ns an element);
    # torch.where is not (2 ns, torch 2.15)
    return torch.maximum(a, torch.ops.aten.threshold_backward(a, t, 0))


def empty_gradient(student: Tensor) -> Tensor:
    """Memory for a gradient that waits for its upstream; fp16 would lose small values before a loss scale arrives."""
    return torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)


def times_upstream(gradient: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient for ``upstream`` from that for 1; never the kept map itself, which a second walk may need."""
    return None if gradient is None else (gradient * upstream).to(dtype)


def along_row(x_C: Tensor, width: int) -> Tensor:
    """[C] repeated ``width`` times, in less time than `repeat` takes for a short vector."""
    return x_C.expand(width, -1).flatten()


def _rows(x_BHWC: Tensor) -> tuple[int, int]:
    batch, height, width, channels = x_BHWC.shape
    return batch * height, width * channels
