"""SSD on squares of any size (Liu et al. 2016): torchvision's single-shot detector with a plain forward pass.

Torchvision's detectors resize and normalize inside, take lists, and answer with losses or with boxes. Here the same
modules, under the same names, take normalized images and return what a loss, a cache and a decoder all start from.

``zoo/ssd300-resnet…`` is NVIDIA's SSD300 (DeepLearningExamples): a ResNet cut after ``layer3``, whose first block does
not stride, and five extra blocks of convolution, batch norm, ReLU, twice; maps of 38, 19, 10, 5, 3, 1 at 300 pixels and
a batch norm in front of each map's last ReLU. ``zoo/ssd300-vgg16`` is torchvision's ``ssd300_vgg16``.

Default boxes come from torchvision's generator with its scales for ``ssd300_vgg16`` (0.07 to 1.05 of the side). The
first four maps lie at their true strides 8, 16, 32, 64; the last two fill the image, whatever its size: at 300 pixels
these are the steps 100 and 300. The last two convolutions do not pad; a map of under 3 pixels per side is padded to 3
with zeros before them, so that small images have six maps, too.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator  # type: ignore[import-untyped]
from torchvision.models.detection.image_list import ImageList  # type: ignore[import-untyped]
from torchvision.models.detection.ssd import (  # type: ignore[import-untyped]
    SSD,
    SSDFeatureExtractorVGG,
    ssd300_vgg16,
)
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # type: ignore[import-untyped]

__all__ = ["SSD_BACKBONES", "SingleShot", "build_ssd", "plain"]

_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
_STRIDES = [8, 16, 32, 64]


class Boxes(nn.Module):
    """Default boxes of the six maps, in pixels of the image: torchvision's generator at strides, then at map sizes."""

    def __init__(self) -> None:
        super().__init__()
        split = len(_STRIDES)
        self.aspect_ratios = _RATIOS
        self.strided = DefaultBoxGenerator(_RATIOS[:split], scales=_SCALES[: split + 1], steps=_STRIDES)
        self.filling = DefaultBoxGenerator(_RATIOS[split:], scales=_SCALES[split:])

    def num_anchors_per_location(self) -> list[int]:
        """4, 6, 6, 6, 4, 4."""
        return [*self.strided.num_anchors_per_location(), *self.filling.num_anchors_per_location()]

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Boxes ``[A, 4]`` as x1, y1, x2, y2 for each image of the list."""
        parts = (self.strided(images, maps[: len(_STRIDES)]), self.filling(images, maps[len(_STRIDES) :]))
        return [torch.cat(both) for both in zip(*parts, strict=True)]


class SingleShot(SSD):  # type: ignore[misc]
    """torchvision's SSD with a plain forward pass; made by `build_ssd`, or of torchvision's own by `plain`."""

    HEAD = "head.classification_head."  # whose channels are anchors times classes

    made: dict[Any, Tensor]  # default boxes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw predictions, while training too.

        Args:
            images: normalized, ``[B, 3, H, W]``.

        Returns:
            ``cls_logits`` ``[B, A, K+1]``, class 0 is background; ``bbox_regression`` ``[B, A, 4]`` in the coding of
            torchvision's ``BoxCoder((10, 10, 5, 5))``; ``anchors`` ``[A, 4]``, float32, x1, y1, x2, y2 in pixels.
        """
        maps = list(self.backbone(images).values())
        found = self.head(maps)
        return {
            "cls_logits": found["cls_logits"],
            "bbox_regression": found["bbox_regression"],
            "anchors": self._anchors(images, maps),
        }

    def _anchors(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """Made once per size and device: torchvision makes them on the CPU, and copying them would halt a GPU."""
        sizes = tuple((m.shape[2], m.shape[3]) for m in maps)
        key = (images.shape[2], images.shape[3], sizes, images.device)
        if key not in self.made:
            # neither tensors of inference mode, which a loss could not use, nor bfloat16 coordinates of autocast
            with torch.inference_mode(False), torch.no_grad():
                whole = ImageList(torch.empty((1, 1, *images.shape[2:])), [(images.shape[2], images.shape[3])])
                like = [torch.empty((1, 1, *size), device=images.device) for size in sizes]
                self.made[key] = self.anchor_generator(whole, like)[0]
        return self.made[key]


def plain(model: SSD) -> SingleShot:
    """torchvision's SSD as a `SingleShot`, in place; parameters and their names stay."""
    model.__class__ = SingleShot
    model.made = {}
    if type(model.backbone) is SSDFeatureExtractorVGG:
        model.backbone.__class__ = VggMaps
        model.anchor_generator = Boxes()
    single: SingleShot = model
    return single


def padded(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """The outputs of a chain of extra blocks; the last two have 3x3 convolutions without padding."""
    maps = []
    for number, block in enumerate(blocks):
        across, down = (max(3 - side, 0) if number >= len(blocks) - 2 else 0 for side in (x.shape[3], x.shape[2]))
        if across or down:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        x = block(x)
        maps.append(x)
    return maps


class ResNetMaps(ResNet):  # type: ignore[misc]
    """torchvision's ResNet up to ``layer3`` at stride 8, and five extra blocks.

    Args:
        block: torchvision's BasicBlock or Bottleneck.
        layers: blocks of the first three stages.
        extra: channels of the five further maps.
    """

    def __init__(self, block: Any, layers: list[int], extra: list[int]) -> None:
        super().__init__(block, [*layers, 1])
        del self.avgpool, self.fc, self.layer4
        for module in self.layer3[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.out_channels = [256 * block.expansion, *extra]
        inner = (256, 256, 128, 128, 128)
        self.extra = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c_in, c_mid, 1, bias=False),
                nn.BatchNorm2d(c_mid),
                nn.ReLU(inplace=True),
                nn.Conv2d(c_mid, c_out, 3, *((2, 1) if number < 3 else (1, 0)), bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            )
            for number, (c_in, c_mid, c_out) in enumerate(zip(self.out_channels, inner, extra, strict=False))
        )
        for module in self.extra.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[B, 3, H, W]`` → six maps, activated, at strides 8, 16, 32, 64 and two smaller ones."""
        x = self.layer3(self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))))
        return OrderedDict((str(i), y) for i, y in enumerate([x, *padded(self.extra, x)]))


class VggMaps(SSDFeatureExtractorVGG):  # type: ignore[misc]
    """torchvision's maps of VGG-16, of images of any size; the first is normalized and scaled per channel."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[B, 3, H, W]`` → six maps."""
        x = self.features(x)
        first = self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)
        return OrderedDict((str(i), y) for i, y in enumerate([first, *padded(self.extra, x)]))


# name → the classifier of torchvision whose weights fit, and the network
SSD_BACKBONES: dict[str, tuple[str, Any]] = {
    "resnet18": ("resnet18", lambda: ResNetMaps(BasicBlock, [2, 2, 2], [512, 512, 256, 256, 128])),
    "resnet34": ("resnet34", lambda: ResNetMaps(BasicBlock, [3, 4, 6], [512, 512, 256, 256, 256])),
    "resnet50": ("resnet50", lambda: ResNetMaps(Bottleneck, [3, 4, 6], [512, 512, 256, 256, 256])),
    "vgg16": ("vgg16", lambda: None),
}


def build_ssd(backbone: str, num_classes: int) -> SingleShot:
    """SSD of a key of `SSD_BACKBONES` for ``num_classes`` classes without background, at random."""
    published, body = SSD_BACKBONES[backbone]
    if backbone == "vgg16":
        model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    else:
        model = SSD(body(), Boxes(), (300, 300), num_classes + 1)
    model.published = published
    return plain(model)
