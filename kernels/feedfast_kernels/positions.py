"""Targets at some positions of a map, and a student's map gathered there.

Legend: B batch, C channel, H height, W width, P positions. A position is y * W + x; each sample has P distinct ones of
its own. What is gathered is [B, P, C] in memory, as a fast student's map and stored codes are: whole rows of channels
move, and a 1x1 convolution, a norm or a loss afterwards has P / (H * W) of the work.

Autograd's own backward pass of a gather adds up, in case a position came twice; distinct ones are copied, in half the
time on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feedfast_kernels._layout import is_eager_cpu
from feedfast_kernels.codes import Codes, Target


@dataclass(frozen=True, slots=True)
class Sampled:
    """A batch of targets at some positions of their maps.

    Attributes:
        values: logical [B, C, P]: codes with data [B, P, C], or floats.
        positions: int32 or int64 [B, P], y * W + x, distinct per sample.
        grid: (H, W) of the whole map.

    Raises:
        ValueError: if shapes do not fit together.
    """

    values: Target
    positions: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) != 3 or tuple(self.positions.shape) != (shape[0], shape[2]):
            raise ValueError(
                f"sampled: expected values [B, C, P] and positions [B, P], got {list(shape)} and "
                f"{list(self.positions.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Logical shape of the values, (B, C, P)."""
        return torch.Size(self.values.shape)

    @property
    def rescale(self) -> float:
        """H * W / P: what a sum over the positions is multiplied with to stand for the sum over the map."""
        return self.grid[0] * self.grid[1] / max(self.positions.shape[1], 1)

    def gather(self, x_NCHW: Tensor) -> Tensor:
        """A map [B, C', H, W], as the student's, at these positions: see `gather_positions`.

        Raises:
            ValueError: the map has another grid.
        """
        if tuple(x_NCHW.shape[2:]) != self.grid:
            raise ValueError(f"gather: expected a map of {list(self.grid)}, got {list(x_NCHW.shape[2:])}")
        return gather_positions(x_NCHW, self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sampled:
        """The same targets on ``device``."""
        moved = self.positions.to(device, non_blocking=non_blocking)
        return Sampled(self.values.to(device, non_blocking=non_blocking), moved, self.grid)

    def pin_memory(self) -> Sampled:
        """The same targets in page-locked host memory, as `Codes.pin_memory`."""
        return Sampled(self.values.pin_memory(), self.positions.pin_memory(), self.grid)


def gather_positions(x_NCHW: Tensor, positions: Tensor) -> Tensor:
    """The channels of some positions of a map.

    Args:
        x_NCHW: float [B, C, H, W], any strides; channels-last moves whole rows of channels.
        positions: int32 or int64 [B, P], distinct per sample: one that came twice would lose a gradient.

    Returns:
        [B, C, P], in memory [B, P, C]; with gradient, which is 0 at all other positions.

    Raises:
        ValueError: if shapes do not fit together; on the CPU also a position outside the map. On a GPU, which reading
            them back would stall, one of those reads (and writes) what is not the sample's.

    Example:
        >>> import torch
        >>> gather_positions(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[3, 0]])).tolist()
        [[[3.0, 0.0]]]
    """
    check_positions("gather_positions", x_NCHW, positions)
    gathered = _Gather.apply(x_NCHW, positions)
    assert isinstance(gathered, Tensor)
    return gathered


def as_row(values: Target) -> Target:
    """Targets [B, C, P] as a map of one row, [B, C, 1, P]; no copy."""
    if isinstance(values, Codes):
        return Codes(values.data.unsqueeze(1), values.offset, values.step, values.codec)
    return values.unsqueeze(2)


def check_positions(name: str, x_NCHW: Tensor, positions: Tensor) -> None:
    """Raise ValueError unless ``positions`` are [B, P] whole numbers for, on the CPU within, a map [B, C, H, W]."""
    whole = positions.dtype in (torch.int32, torch.int64)
    if x_NCHW.ndim != 4 or positions.ndim != 2 or not whole or positions.shape[0] != x_NCHW.shape[0]:
        raise ValueError(
            f"{name}: expected a map [B, C, H, W] and int32 or int64 positions [B, P], got {list(x_NCHW.shape)} and "
            f"{positions.dtype} {list(positions.shape)}"
        )
    if is_eager_cpu(positions) and positions.numel():  # rows of all samples are one list: one too far is the next's
        cells, (least, most) = x_NCHW.shape[2] * x_NCHW.shape[3], (int(end) for end in positions.aminmax())
        if least < 0 or most >= cells:
            raise ValueError(
                f"{name}: expected positions 0 to {cells - 1} of a map of {list(x_NCHW.shape[2:])}, got "
                f"{least} to {most}"
            )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.shape, ctx.spatial_first = x.shape, x.is_contiguous()
        batch, channels, height, width = x.shape
        if ctx.spatial_first:  # a row of channels is nowhere together: gather each channel, transpose the few
            return x.flatten(2).gather(2, _per_channel(positions, channels)).transpose(1, 2).contiguous().mT
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        picked = rows.index_select(0, _flat(positions, height * width))
        return picked.view(batch, positions.shape[1], channels).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        if ctx.spatial_first:
            whole = gradient.new_zeros(batch, channels, height * width)
            return whole.scatter(2, _per_channel(positions, channels), gradient).view(ctx.shape), None
        rows = gradient.new_zeros(batch * height * width, channels)
        rows = rows.index_put((_flat(positions, height * width).long(),), gradient.mT.reshape(-1, channels))
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _flat(positions: Tensor, cells: int) -> Tensor:
    """Positions [B, P] as rows of [B * H * W, C]."""
    starts = torch.arange(positions.shape[0], device=positions.device) * cells
    return (positions + starts[:, None]).view(-1)


def _per_channel(positions: Tensor, channels: int) -> Tensor:
    """int64 [B, C, P]."""
    return positions.long()[:, None, :].expand(-1, channels, -1)
