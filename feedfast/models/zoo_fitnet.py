"""The four students of FitNets (Romero et al., ICLR 2015), which later papers distill into as students 1 to 4.

From the paper: deep and thin stacks of 3x3 convolutions in three groups, each ended by a max pooling; 11, 11, 13 and 19
weighted layers; the widths of the fourth (FitNet-19 of the authors' repository), whose groups are pooled by 2, 2 and
8; a layer of 500 units before the classifier. Widths of the other three, and dropout of 0.2 after the 500 units, are as
a later code base gives them.

Chosen here: ReLU for two-piece maxout, so with half its weights per layer, and batch norm after every
convolution. The last pooling takes the whole map, which is the 8x8 of 32 pixels and the 7x7 of
MNIST's 28. Three channels: gray images come as three equal ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feedfast.models.zoo_layers import ConvBnRelu, initialize

__all__ = ["FITNETS", "FitNet"]

# student → widths of the convolutions of its three groups
FITNETS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((16, 16, 16), (32, 32, 32), (48, 48, 64)),
    2: ((16, 32, 32), (48, 64, 80), (96, 96, 128)),
    3: ((32, 48, 64, 64), (80,) * 4, (128,) * 3),
    4: ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6),
}
_UNITS = 500
_DROPOUT = 0.2


class FitNet(nn.Module):
    """A FitNets student.

    Args:
        student: 1 to 4.
        num_classes: rows of the classifier ``fc``.

    Modules: ``layer1``..``layer3``, ``pool1``..``pool3``, ``fc1``, ``relu``, ``dropout``, ``fc``.
    """

    def __init__(self, student: int, num_classes: int) -> None:
        super().__init__()
        first, second, third = FITNETS[student]
        self.layer1 = self._group(3, first)
        self.pool1 = nn.MaxPool2d(2)
        self.layer2 = self._group(first[-1], second)
        self.pool2 = nn.MaxPool2d(2)
        self.layer3 = self._group(second[-1], third)
        self.pool3 = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Linear(third[-1], _UNITS)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(_DROPOUT)
        self.fc = nn.Linear(_UNITS, num_classes)
        initialize(self)

    @staticmethod
    def _group(c_in: int, widths: tuple[int, ...]) -> nn.Sequential:
        return nn.Sequential(*(ConvBnRelu(a, b, 1) for a, b in zip((c_in, *widths), widths, strict=False)))

    STEM = ("layer1", "pool1")

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]``, at least 4 pixels per side → logits ``[B, num_classes]``."""
        return self.forward_body(self.forward_stem(x))

    def forward_stem(self, x: Tensor) -> Tensor:
        """The modules of ``STEM``: what parallel branches share."""
        y: Tensor = self.pool1(self.layer1(x))
        return y

    def forward_body(self, x: Tensor) -> Tensor:
        """The rest, to the logits."""
        x = self.layer3(self.pool2(self.layer2(x)))
        x = self.relu(self.fc1(torch.flatten(self.pool3(x), 1)))
        logits: Tensor = self.fc(self.dropout(x))
        return logits
