"""What the CPU paths of the losses share: arguments tile by tile in scratch memory, and a gradient that waits.

On a CPU PyTorch's eager operators cost more than memory does. So each loss goes over cache-sized tiles once, makes the
gradient for an upstream of 1 on the way, and backward scales that in place. The arguments are kept as well, because a
graph walked twice has given its gradient away by then and makes it again.

A compiler fuses plain formulas better than these steps, and float64 is there for gradient checks, which derive twice:
both get a loss's formula over whole maps instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from feedfast_kernels._layout import Tile, along_row, as_BHWC, is_eager_cpu, scratch, work_dtype
from feedfast_kernels._ops import runs_triton
from feedfast_kernels.codes import unpack


def runs_tiled(student: Tensor) -> bool:
    """Whether the tiled form takes ``student``. float64 is for gradient checks, and may be derived twice."""
    return is_eager_cpu(student) and student.dtype != torch.float64


def how_to_run(students: Sequence[Tensor]) -> str:
    """``"triton"`` kernels, operators over ``"tiled"`` maps, or the formula over ``"whole"`` ones."""
    if all(runs_triton(x) for x in students):
        return "triton"
    return "tiled" if all(runs_tiled(x) for x in students) else "whole"


class Source:
    """The arguments of one call, as rows [image rows, W * C] of a tile or of the whole map, in the working dtype.

    Rows of a tile are views where they can be, else they lie in scratch memory: slot 0 is the student's, slot 1 the
    target's, slot 2 free.
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
        return t if self.margin is None else torch.maximum(t, self.margin, out=scratch(1, t.shape))

    def _read(self, x_BHWC: Tensor, slot: int) -> Tensor:
        if x_BHWC.dtype == self.dtype and x_BHWC.is_contiguous():
            return x_BHWC.view(_rows(x_BHWC))
        rows = scratch(slot, _rows(x_BHWC))
        rows.view(x_BHWC.shape).copy_(x_BHWC)
        return rows


def empty_gradient(student: Tensor) -> Tensor:
    """Memory for a gradient that waits for its upstream; fp16 would lose small values before a loss scale arrives."""
    return torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)


def finished_gradient(
    ctx: Any, upstream: Tensor, dtype: torch.dtype, make_again: Callable[[], Tensor | None]
) -> Tensor:
    """The gradient for ``upstream``, in the memory of that for 1, which the forward pass left in ``ctx.gradient``.

    Whoever comes first takes that, also of two threads; everyone else makes it again.
    """
    gradient: Tensor | None = ctx.__dict__.pop("gradient", None)
    if gradient is None:
        gradient = make_again()
    assert gradient is not None
    return (gradient if upstream == 1 else gradient.mul_(upstream)).to(dtype)  # 1 is what training has


def _rows(x_BHWC: Tensor) -> tuple[int, int]:
    batch, height, width, channels = x_BHWC.shape
    return batch * height, width * channels
