"""Inputs of the kernels' benches: random, never zeros, from a seed, made on the device they are used on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feedfast_kernels import Codes
from feedfast_kernels.codes import packed_channels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random_map(
    shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device, seed: int, like: float = 1.0
) -> Tensor:
    """Normal values of that deviation, in that memory order."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).mul_(like).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "NHWC" and x.ndim == 4 else x


def random_codes(shape: Sequence[int], codec: str, device: torch.device, seed: int) -> Codes:
    """Codes that use their whole range, decoding to about -2 to 3: some 40 % of a teacher's values are negative."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, channels, *space = shape
    stored = (batch, *space, packed_channels(channels, codec))

    def integers(top: int) -> Tensor:
        return torch.randint(0, top + 1, stored, generator=generator, device=device, dtype=torch.uint8)

    if codec == "u4":
        data = integers(14) | (integers(14) << 4)
        if channels % 2:
            data[..., -1] &= 15
    else:
        data = integers(254)
    spread = 1 + 0.1 * torch.rand(channels, generator=generator, device=device)
    return Codes(data, -2 * spread, spread * (5 / 254 if codec == "u8" else 5 / 14), codec)  # type: ignore[arg-type]
