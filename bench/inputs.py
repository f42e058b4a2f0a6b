"""Inputs of the kernels' benches: random, never zeros, from a seed, made on the device they are used on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feedfast_kernels import Codes
from feedfast_kernels.codes import pack, top_code

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
    top = top_code(codec)
    data = torch.randint(0, top + 1, (batch, *space, channels), generator=generator, device=device, dtype=torch.uint8)
    spread = 1 + 0.1 * torch.rand(channels, generator=generator, device=device)
    return Codes(pack(data, codec), -2 * spread, spread * (5 / top), codec)  # type: ignore[arg-type]
