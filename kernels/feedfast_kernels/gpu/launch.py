"""One description of a kernel call, used to run it and to compile it for a GPU that is not there.

An operation plans its call as a `Launch`: kernel, grid, arguments, compile-time constants. `run` starts it;
tools/compile_report.py and the tests hand the same object, made from meta tensors, to the compiler, so that what is
checked without a GPU is what runs on one.

The configuration is a pure function of shapes and dtypes: an autotuner's winner is a timing accident that fixes the
order of summation, so two runs would differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

THREADS = 128
PER_THREAD = 16  # elements: 16 bytes of codes and 32 of bf16, two full-width loads


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and everything its call needs.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes.
        arguments: run-time arguments by name: tensors, tuples of tensors, ints, floats, or None for an absent tensor.
        constants: ``tl.constexpr`` arguments by name.
        warps: of 32 threads, per program.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = THREADS // 32

    @property
    def device(self) -> torch.device:
        """Where the first tensor argument lives."""
        for value in self.arguments.values():
            first = value[0] if isinstance(value, tuple) else value
            if isinstance(first, Tensor):
                return first.device
        raise ValueError("launch: expected at least one tensor argument, got none")

    def run(self) -> None:
        """Start the kernel on its tensors' device; does not wait."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._start()
        else:  # Triton's interpreter
            self._start()

    def _start(self) -> None:
        # multiplications and additions are not contracted unless the kernel writes `tl.fma`: offset + step * code must
        # have the bits the CPU computes, because the sign of a decoded value decides what the partial distance counts
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, enable_fp_fusion=False)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def channel_block(channels: int, most: int) -> int:
    """Channels a tile spans: a power of two that divides the channels, so that no lane is masked along them.

    A mask that changes within what a thread loads makes every access one element wide. Where the largest power of two
    that divides the channel count is below 8 there is no way to avoid that, and the tile is as wide as the channels;
    never below 8, the codes whose upper bits u5 keeps in one byte.
    """
    divisor = channels & -channels
    return min(divisor if divisor >= 8 else max(power_of_two(channels), 8), most)
