"""Maps to encode, and codes read bit by bit: what the tests of the CPU path and of the kernels share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

TOP = {"u8": 254, "u6": 62, "u5": 30, "u4": 14}
STEP = {"u8": 0.02, "u6": 0.08, "u5": 0.15, "u4": 0.3}  # a normal distribution from -2 or -3 on is about all in range
PARTS = {"u8": (8,), "u6": (4, 2), "u5": (4, 1), "u4": (4,)}  # docs/cache-format.md


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


def stored_bytes(channels: int, codec: str) -> int:
    """Bytes of a pixel."""
    return sum(math.ceil(channels * width / 8) for width in PARTS[codec])


def integers(stored: np.ndarray, channels: int, codec: str) -> np.ndarray:
    """Codes [..., channels] of stored bytes, bit by bit; every bit that belongs to no channel must be 0."""
    assert stored.shape[-1] == stored_bytes(channels, codec)
    bits = np.unpackbits(stored, axis=-1, bitorder="little")
    codes = np.zeros((*stored.shape[:-1], channels), np.uint8)
    at = low = 0
    for width in PARTS[codec]:
        for channel in range(channels):
            for bit in range(width):
                codes[..., channel] |= bits[..., at + channel * width + bit] << (low + bit)
        used = at + channels * width
        at += 8 * math.ceil(channels * width / 8)
        assert not bits[..., used:at].any()
        low += width
    return codes


def packed(codes: np.ndarray, codec: str) -> np.ndarray:
    """The inverse of `integers`, bit by bit, too."""
    channels = codes.shape[-1]
    parts, low = [], 0
    for width in PARTS[codec]:
        bits = [codes[..., c] >> (low + bit) & 1 for c in range(channels) for bit in range(width)]
        parts.append(np.packbits(np.stack(bits, -1), axis=-1, bitorder="little"))
        low += width
    return np.concatenate(parts, -1)
