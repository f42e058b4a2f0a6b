"""DeepLabV3+ at output stride 16 (Chen et al. 2018), as the Overhaul method's segmentation results were trained.

Backbone, atrous spatial pyramid pooling (rates 6, 12, 18 and the pooled image), and a decoder that joins a 48-channel
projection of the stride-4 map. Logits leave at stride 4, ``[B, K, ceil(H/4), ceil(W/4)]``: who wants pixels upsamples
them. Backbones have torchvision's module names under ``backbone.``, so that its classifiers' weights fit. With a ResNet
the rest is named as in pytorch-deeplab-xception, whose files (the authors' teacher among them) therefore load.

The last stage keeps its stride. A ResNet-50/101 is dilated there by 2, 4, 8 block by block (multi-grid), a ResNet-18 by
2; a MobileNetV2 in its last block alone, by 2 (the blocks of 160 channels not at all): the authors' choices, all four.
Inside, maps are enlarged with ``align_corners=True``, as theirs: exact where a side has 16n+1 pixels. Dropout stands
after the pyramid (0.5) and twice in the decoder; the authors leave out the first one while they distill.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2  # type: ignore[import-untyped]
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # type: ignore[import-untyped]

__all__ = ["BACKBONES", "DeepLabV3Plus"]

_RATES = (6, 12, 18)
_WIDTH = 256  # of the pyramid's branches and of the decoder
_LOW_WIDTH = 48


class DilatedResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet without its classifier, at output stride 16.

    Args:
        block: torchvision's BasicBlock or Bottleneck.
        layers: blocks per stage.
        dilations: of the 3x3 convolutions of each block of ``layer4``.
    """

    def __init__(self, block: Any, layers: list[int], dilations: tuple[int, ...]) -> None:
        super().__init__(block, layers)
        del self.avgpool, self.fc
        self.low_channels, self.channels = 64 * block.expansion, 512 * block.expansion
        for unit, dilation in zip(self.layer4, dilations, strict=True):
            _dilate(unit, dilation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` → maps at strides 4 and 16, both activated."""
        low = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return low, self.layer4(self.layer3(self.layer2(low)))


class DilatedMobileNetV2(nn.Module):
    """torchvision's MobileNetV2 without its last convolution and its classifier, at output stride 16."""

    low_channels, channels = 24, 320

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(mobilenet_v2().features)[:-1])
        _dilate(self.features[14], 1)
        _dilate(self.features[17], 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` → maps at strides 4 and 16, both linear."""
        low = x
        for number, block in enumerate(self.features):
            x = block(x)
            if number == 3:
                low = x
        return low, x


def _dilate(unit: nn.Module, dilation: int) -> None:
    """Takes the stride off a residual block and spreads its 3x3 convolutions."""
    for module in unit.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


# name → the classifier of torchvision whose weights fit, and the network
BACKBONES: dict[str, tuple[str, Any]] = {
    "resnet18": ("resnet18", lambda: DilatedResNet(BasicBlock, [2, 2, 2, 2], (2, 2))),
    "resnet50": ("resnet50", lambda: DilatedResNet(Bottleneck, [3, 4, 6, 3], (2, 4, 8))),
    "resnet101": ("resnet101", lambda: DilatedResNet(Bottleneck, [3, 4, 23, 3], (2, 4, 8))),
    "mobilenetv2": ("mobilenet_v2", DilatedMobileNetV2),
}


class Atrous(nn.Module):
    """Convolution, batch norm, ReLU of the pyramid; 1x1 at dilation 1, else 3x3."""

    def __init__(self, c_in: int, dilation: int) -> None:
        super().__init__()
        kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
        self.atrous_conv = nn.Conv2d(c_in, _WIDTH, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(_WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, h, w]`` → ``[B, 256, h, w]``."""
        y: Tensor = self.relu(self.bn(self.atrous_conv(x)))
        return y


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling. While training, its pooled branch needs two images for batch statistics."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.aspp1 = Atrous(c_in, 1)
        self.aspp2, self.aspp3, self.aspp4 = (Atrous(c_in, rate) for rate in _RATES)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c_in, _WIDTH, 1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * _WIDTH, _WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, h, w]`` → ``[B, 256, h, w]``."""
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)]
        branches.append(self.global_avg_pool(x).expand_as(branches[0]))  # one value enlarged to the map
        y: Tensor = self.dropout(self.relu(self.bn1(self.conv1(torch.cat(branches, 1)))))
        return y


class Decoder(nn.Module):
    """The pyramid's map at the size of the stride-4 map, joined with its projection; two 3x3 layers, classifier."""

    def __init__(self, c_low: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_low, _LOW_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_LOW_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.last_conv = nn.Sequential(
            nn.Conv2d(_WIDTH + _LOW_WIDTH, _WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(_WIDTH, num_classes, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Maps at strides 4 and 16 → logits at stride 4."""
        low = self.relu(self.bn1(self.conv1(low)))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        logits: Tensor = self.last_conv(torch.cat((high, low), 1))
        return logits


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+.

    Args:
        backbone: a key of `BACKBONES`.
        num_classes: channels of the logits, background included where the masks have one.

    Modules: ``backbone``, ``aspp``, ``decoder``. Any input size from 33 pixels on.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        self.published, body = BACKBONES[backbone]
        self.backbone = body()
        self.aspp = Pyramid(self.backbone.channels)
        self.decoder = Decoder(self.backbone.low_channels, num_classes)
        for module in (*self.aspp.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → logits ``[B, num_classes, ceil(H/4), ceil(W/4)]``."""
        low, high = self.backbone(x)
        logits: Tensor = self.decoder(low, self.aspp(high))
        return logits
