"""Maps to encode, and codes read one channel at a time: what the tests of the CPU path and of the kernels share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TOP = {"u8": 254, "u4": 14}


def some_map(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map with outliers, values on exact ties, and per-channel offset, step, margin; channel 0 is constant."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    offset = -torch.rand(channels, generator=generator) - 1
    step = torch.rand(channels, generator=generator) / 64 + 1 / 128
    margin = offset + torch.linspace(-3.7, 10.3, channels) * step
    step[0] = 0
    x = 2 * torch.randn(shape, generator=generator)
    flat = x.view(-1)
    flat[: flat.numel() // 3] = (flat[: flat.numel() // 3] * 64).round() / 64
    return x, offset, step, margin


def nibbles(packed: np.ndarray, channels: int) -> np.ndarray:
    """Codes of packed bytes, one channel at a time."""
    return np.stack([packed[..., c // 2] >> 4 * (c % 2) & 15 for c in range(channels)], -1)
