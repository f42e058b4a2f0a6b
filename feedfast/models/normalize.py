"""Pixels as networks take them: the one place where uint8 becomes float.

Teachers and students normalize differently, so pixels stay uint8 up to here, in the cache and on their way to a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x/255 - mean) / std: uint8 pixels [batch, height, width, 3] to float32 [batch, 3, height, width].

    The result keeps the channels-last strides of its pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std_C)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean_C / std_C).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch."""
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)
