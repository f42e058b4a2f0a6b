"""One memory order for every operation: channels-last, cut into tiles that stay in the cache.

Legend: B batch, C channel, H height, W width; a vector batch [B, C] is a map of one pixel.

Sums depend on the order of their terms. All operations here walk [B, H, W, C], whatever strides their arguments have,
so the same values give the same bits whether a map came from a cache, from a live teacher, transposed or sliced.

PyTorch's eager CPU operators each walk their whole argument: over cache-sized tiles a chain of ten of them reads the
map from memory once instead of ten times. A GPU, and a compiler that fuses, want the opposite: only eager CPU code cuts
tiles. What its operators write is in scratch memory, which each thread keeps from call to call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# 2 MiB of fp32, which stays in the cache; smaller tiles pay for starting operators (kernels/README.md has the figures).
# Three scratch slots of a tile are 48 MiB at most for ordinary samples.
TILE_ELEMENTS_PER_THREAD = 1 << 19
TILE_ELEMENTS_MOST = 1 << 22  # a count kept in fp32 stays exact

Tile = tuple[slice, slice]  # samples, image rows


def as_BHWC(x: Tensor) -> Tensor:
    """View logical [B, C, H, W] (or [B, C]) as [B, H, W, C]; no copy."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x[:, None, None, :]


def is_eager_cpu(x: Tensor) -> bool:
    """Whether operators on ``x`` execute eagerly on the CPU: no compiler, no tracing, no fake or distributed tensor."""
    ordinary = type(x) in (Tensor, torch.nn.Parameter)
    return ordinary and x.device.type == "cpu" and not torch.compiler.is_compiling()


def tile_elements() -> int:
    """Elements of a tile."""
    return min(TILE_ELEMENTS_PER_THREAD * torch.get_num_threads(), TILE_ELEMENTS_MOST)


def tiles(shape_BHWC: tuple[int, ...] | torch.Size, *, whole_samples: bool = False) -> Iterator[Tile]:
    """Cut a [B, H, W, C] map into tiles in memory order; with ``whole_samples`` no sample is cut, however large."""
    batch, height, width, channels = shape_BHWC
    if batch * height * width * channels == 0:
        return
    image_rows = max(1, tile_elements() // (width * channels))
    if image_rows >= height or whole_samples:
        samples = max(1, image_rows // height)
        for start in range(0, batch, samples):
            yield slice(start, min(batch, start + samples)), slice(0, height)
    else:
        for sample in range(batch):
            for start in range(0, height, image_rows):
                yield slice(sample, sample + 1), slice(start, min(height, start + image_rows))


def work_dtype(student: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 stays (for gradient checks), everything else is fp32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.slots: dict[int, Tensor] = {}


_SCRATCH = _Scratch()


def scratch(slot: int, shape: Sequence[int]) -> Tensor:
    """fp32, not initialized: the calling thread's memory for ``slot``, kept for the next call.

    Valid until the slot is asked for again. New memory comes from the system page by page, at 0.25 ns per element:
    more than most operators take.
    """
    elements = math.prod(shape)
    buffer = _SCRATCH.slots.get(slot)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
            buffer = torch.empty(elements, dtype=torch.float32, device="cpu")
        if type(buffer) is Tensor:  # and what a mode makes in its place could not be used after it
            _SCRATCH.slots[slot] = buffer
    return buffer[:elements].view(shape)


def along_row(x_C: Tensor, width: int) -> Tensor:
    """[C] repeated ``width`` times, in less time than `repeat` takes for a short vector."""
    return x_C.expand(width, -1).flatten()
