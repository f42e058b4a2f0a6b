"""What the CPU paths of the losses share: arguments tile by tile in scratch memory, and a precomputed gradient.

On a CPU PyTorch's eager operators cost more than memory does. So each loss goes over cache-sized tiles once and
computes the gradient for a grad_output of 1 on the way; backward scales that in place.

A compiler fuses plain formulas better than these steps, and float64 is there for gradient checks, which need double
backward: both get a loss's formula over whole maps instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from feedfast_kernels._layout import Tile, along_row, as_BHWC, is_eager_cpu, scratch, work_dtype
from feedfast_kernels._ops import runs_triton
from feedfast_kernels.codes import StoredAs, unpack


def runs_tiled(student: Tensor) -> bool:
    """Whether the tiled form takes ``student``. float64 is for gradient checks, which need double backward."""
    return is_eager_cpu(student) and student.dtype != torch.float64


Backend = Literal["triton", "tiled", "whole"]
"""Triton kernels, PyTorch operators over cache-sized tiles, or the formula over whole maps."""


def backend_of(students: Sequence[Tensor]) -> Backend:
    """What computes a loss of these maps."""
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
        codec: StoredAs,
        margin_C: Tensor | None,
    ) -> None:
        stored = target if target.ndim == 4 else target[:, None, None, :]
        self.student, self.target, self.codec = as_BHWC(student), as_BHWC(target) if codec == "float" else stored, codec
        self.dtype = work_dtype(student)
        width = self.student.shape[2]

        def row(x_C: Tensor | None) -> Tensor | None:
            return None if x_C is None else along_row(x_C.to(self.dtype), width)

        self.offset, self.step, self.margin = row(offset_C), row(step_C), row(margin_C)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Student and t of the whole map; may be views."""
        target = unpack(self.target, self.student.shape[3], self.codec)
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
        t = self._read(unpack(self.target[tile], self.student.shape[3], self.codec), 1)
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
    """Memory for a precomputed gradient; fp16 would lose small values before a loss scaler's factor arrives."""
    return torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)


def finished_gradient(
    ctx: Any, grad_output: Tensor, dtype: torch.dtype, recompute: Callable[[], Tensor | None]
) -> Tensor:
    """The gradient for ``grad_output``, in the memory of that for 1, which the forward pass left in ``ctx.gradient``.

    The first backward takes the precomputed one (thread-safe); later ones of the same graph recompute it from the saved
    arguments with ``recompute``.
    """
    gradient: Tensor | None = ctx.__dict__.pop("gradient", None)
    if gradient is None:
        gradient = recompute()
    assert gradient is not None
    return (gradient if grad_output == 1 else gradient.mul_(grad_output)).to(dtype)  # 1 is what training has


def _rows(x_BHWC: Tensor) -> tuple[int, int]:
    batch, height, width, channels = x_BHWC.shape
    return batch * height, width * channels
