"""ResNet-50 pruned uniformly, as the two-teacher ImageNet results were trained (ZTE's Adlik, ``model_optimizer``).

Every convolution but the stem keeps ``filters - int(filters * ratio)`` filters, and the classifier follows. Modules are
named as in torchvision's ``resnet50``. The students are trained from scratch, so no pruner is needed: a pruned network
is one of these widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-untyped]

__all__ = ["PrunedResNet50"]


class PrunedResNet50(ResNet):  # type: ignore[misc]
    """torchvision's ResNet-50 with fewer filters.

    Args:
        ratio: of the filters that are missing, 0 to below 1; multiples of 1/64 are exact.
        num_classes: rows of the classifier ``fc``.

    Images ``[B, 3, H, W]`` → logits ``[B, num_classes]``, usually of 224 pixels per side; the last map is a 32nd of it.
    """

    def __init__(self, ratio: float, num_classes: int) -> None:
        self.ratio = ratio  # before the parent's __init__, which calls `_make_layer`
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes)
        self.fc = nn.Linear(self.inplanes, num_classes)

    STEM = ("conv1", "bn1", "relu", "maxpool", "layer1")

    def forward_stem(self, x: Tensor) -> Tensor:
        """The modules of ``STEM``: what parallel branches share."""
        y: Tensor = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return y

    def forward_body(self, x: Tensor) -> Tensor:
        """The rest, to the logits."""
        x = self.layer4(self.layer3(self.layer2(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        # a bottleneck's last convolution has four times the filters, so the rule holds for it where it does here
        layer: nn.Sequential = super()._make_layer(block, planes - int(planes * self.ratio), *args, **kwargs)
        return layer
