"""Arguments of `connector_partial_l2`: what the tests of the CPU path and of the kernels share."""

from __future__ import annotations

import torch
from code_samples import STEP
from torch import Tensor

from feedfast_kernels import Codes, Target, encode
from feedfast_kernels.codes import is_quantized


def make(
    shape: tuple[int, ...], kind: str, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Target, Tensor, Tensor, Tensor]:
    """A convolution's output far from zero mean and unit variance, a target, gamma, beta and a margin."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    spread = (0.3 + torch.rand(channels, generator=generator)).view(-1, *[1] * (len(shape) - 2))
    y = torch.randn(shape, generator=generator) * spread + 4 * spread
    teacher = torch.randn(shape, generator=generator)
    gamma, beta = (torch.randn(channels, generator=generator) for _ in range(2))
    margin = -0.2 - torch.rand(channels, generator=generator)
    target: Target = teacher.to(device)
    if is_quantized(kind):
        offset = -2 - torch.rand(channels, generator=generator)
        step = torch.full((channels,), STEP[kind])
        target = Codes(encode(teacher, offset, step, codec=kind)[0], offset, step, kind).to(device)
    return y.to(device), target, gamma.to(device), beta.to(device), margin.to(device)
