"""PyramidNet at CIFAR size: every block is a little wider than the one before (Han et al., CVPR 2017).

``pyramidnet-110-84`` and ``pyramidnet-200-240`` are depth and alpha, the channels that are added from the stem's 16 to
the last block (additive widening). Up to depth 110 blocks are basic (depth 6n+2), above it bottlenecks (depth 9n+2), as
in the paper's tables; ``b`` at the end of a name asks for bottlenecks at any depth. Input is ``[B, 3, H, W]``; the last
map is a quarter of it.

A block starts with a batch norm and *no* ReLU, and ends with a batch norm before the sum. Shortcuts hold no weights:
where a block strides they are averaged over 2x2, and new channels are added to zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.models.zoo_layers import conv, initialize

__all__ = ["PyramidBasic", "PyramidBottleneck", "PyramidNet", "pyramid_widths"]

_STEM = 16


def pyramid_widths(blocks: int, alpha: int) -> list[int]:
    """Width of each of ``blocks`` blocks: 16 + alpha k / blocks for k = 1.., rounded to the nearest whole number."""
    return [round(_STEM + alpha * k / blocks) for k in range(1, blocks + 1)]


def _add_shortcut(y: Tensor, x: Tensor) -> Tensor:
    """y += x in place, whose channels are never more: those y has besides are left as they are."""
    more = y.shape[1] - x.shape[1]
    y += F.pad(x, (0, 0, 0, 0, 0, more)) if more else x
    return y


def _pooled(stride: int) -> nn.Module:
    # a strided convolution rounds odd sides up, so the pooling must as well
    return nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()


class PyramidBasic(nn.Module):
    """BN-conv-BN-ReLU-conv-BN plus the shortcut."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = _pooled(stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, width, H/stride, W/stride]``, not activated."""
        y = self.conv2(self.relu2(self.bn2(self.conv1(self.bn1(x)))))
        return _add_shortcut(self.bn3(y), self.shortcut(x))


class PyramidBottleneck(nn.Module):
    """BN-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN plus the shortcut; the 3x3 convolution strides."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn4 = nn.BatchNorm2d(width * self.expansion)
        self.shortcut = _pooled(stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, 4 width, H/stride, W/stride]``, not activated."""
        y = self.relu2(self.bn2(self.conv1(self.bn1(x))))
        y = self.conv3(self.relu3(self.bn3(self.conv2(y))))
        return _add_shortcut(self.bn4(y), self.shortcut(x))


class PyramidNet(nn.Module):
    """PyramidNet for small images.

    Args:
        depth: 6n+2, or 9n+2 with bottlenecks; n blocks per stage.
        alpha: channels added over all blocks (four times as many at the ends of bottlenecks).
        bottleneck: which block.
        num_classes: rows of the classifier ``fc``.

    Modules: ``conv1``, ``bn1``, ``layer1``..``layer3``, ``bn_final``, ``relu_final``, ``pool``, ``fc``.
    """

    def __init__(self, depth: int, alpha: int, bottleneck: bool, num_classes: int) -> None:
        super().__init__()
        block = PyramidBottleneck if bottleneck else PyramidBasic
        n = (depth - 2) // (9 if bottleneck else 6)
        blocks: list[nn.Module] = []
        c_in = _STEM
        for index, width in enumerate(pyramid_widths(3 * n, alpha)):
            blocks.append(block(c_in, width, 2 if index in (n, 2 * n) else 1))
            c_in = width * block.expansion
        self.conv1 = conv(3, _STEM, 3)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks[i * n : (i + 1) * n]) for i in range(3))
        self.bn_final = nn.BatchNorm2d(c_in)
        self.relu_final = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, num_classes)
        initialize(self)

    STEM = ("conv1", "bn1", "layer1")

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → logits ``[B, num_classes]``."""
        return self.forward_body(self.forward_stem(x))

    def forward_stem(self, x: Tensor) -> Tensor:
        """The modules of ``STEM``: what parallel branches share."""
        y: Tensor = self.layer1(self.bn1(self.conv1(x)))
        return y

    def forward_body(self, x: Tensor) -> Tensor:
        """The rest, to the logits."""
        x = self.layer3(self.layer2(x))
        logits: Tensor = self.fc(torch.flatten(self.pool(self.relu_final(self.bn_final(x))), 1))
        return logits
