"""Arguments of what takes positions, and the plain formulas in NumPy: for the tests of CPU path and kernels."""

from __future__ import annotations

import numpy as np
import torch
from code_samples import STEP
from torch import Tensor

from feedfast_kernels import Codes, Target, encode
from feedfast_kernels.codes import is_quantized


def make(
    shape: tuple[int, ...], kind: str, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, Target, Tensor, Tensor]:
    """A student map [B, C, H, W], a target [B, C, P] of the codec, positions [B, P] and a margin; shape is all five."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width, count = shape
    student = torch.randn((batch, channels, height, width), generator=generator)
    teacher = torch.randn((batch, channels, count), generator=generator)
    margin = -0.2 - torch.rand(channels, generator=generator)
    orders = [torch.randperm(height * width, generator=generator)[:count] for _ in range(batch)]
    positions = torch.stack(orders).int()
    target: Target = teacher.half() if kind == "f16" else teacher
    if is_quantized(kind):
        offset = -2 - torch.rand(channels, generator=generator)
        step = torch.full((channels,), STEP[kind])
        target = Codes(encode(teacher, offset, step, codec=kind)[0], offset, step, kind)
    return student.to(device), target.to(device), positions.to(device), margin.to(device)


def gathered_numpy(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B, C, P] of a map [B, C, H, W], one value after the other."""
    batch, channels, _, width = x.shape
    out = np.empty((batch, channels, positions.shape[1]), x.dtype)
    for b in range(batch):
        for place, position in enumerate(positions[b].tolist()):
            out[b, :, place] = x[b, :, position // width, position % width]
    return out


def three_cases(student: np.ndarray, raw: np.ndarray, margin: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum and gradient as OFD's cases read: raw <= m, m < raw <= 0, raw > 0."""
    m = np.broadcast_to(margin[:, None], raw.shape)
    residual = np.where(raw > 0, student - raw, np.maximum(student - np.maximum(raw, m), 0))
    return float((residual**2).sum()), 2 * residual
