"""The networks of the distillation papers, at CIFAR size.

Here pre-activation wide ResNets (``wrn-16-2``: depth 6n+4 and width; Zagoruyko & Komodakis 2016), the thin
post-activation ResNets for CIFAR (``resnet-20``, ``resnet-56``, ``resnet-110``: depth 6n+2; He et al. 2015, section
4.2) and MobileNetV1 (``mobilenetv1``; Howard et al. 2017) whose stem keeps its resolution (``mobilenetv1-224``: strided
as published); ``zoo_*.py`` have the other families. Input is ``[B, 3, H, W]``, 8 to 64 pixels per side; the last map is
a quarter of the input (ResNets) or a sixteenth of it (MobileNet), never less than 1x1.

Why written here: a tap is a *module*, so every batch norm and every activation is one, called once per forward pass.
Shortcuts that change shape are a 1x1 convolution with batch norm in the thin ResNets (He's option B, as the feature
distillation papers train them: 2,752 weights more than option A's padding, at any depth) and a bare 1x1 convolution of
the activated input in WRN.

Speed: ReLUs and residual sums work in place. No backward pass needs what they overwrite (batch norm keeps its input,
convolution its input, ReLU its result), and on a CPU the saved allocations are a visible part of a step.
`taps.Tapped` copies exactly what is overwritten and tapped. Nothing here touches the memory format: a channels-last
input stays channels-last to the pooling.
"""

from __future__ import annotations

import difflib
import re

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.names import ZOO_NAMES
from feedfast.models.zoo_fitnet import FitNet
from feedfast.models.zoo_layers import ConvBnRelu, conv, initialize
from feedfast.models.zoo_pyramid import PyramidNet

__all__ = ["ZOO_NAMES", "CifarResNet", "MobileNetV1", "WideResNet", "build_zoo"]

_PRUNED = {"resnet-50-p25": 0.25, "resnet-50-p37.5": 0.375, "resnet-50-p50": 0.5}  # shares of filters left out

_DEPTH_LIMIT = 1202  # the deepest CIFAR ResNet published; a typing slip must not allocate the machine's memory
_WIDTH_LIMIT = 64
_ALPHA_LIMIT = 2048
_BASIC_DEPTH = 110  # PyramidNets up to here are basic; the paper's deeper ones (164, 200, 236, 272) are bottlenecks


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice plus the shortcut; the shape-changing shortcut starts after the first ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(c_out, c_out, 3)
        self.shortcut = conv(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, H/stride, W/stride]``, not activated."""
        activated = self.relu1(self.bn1(x))
        y: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        y += x if self.shortcut is None else self.shortcut(activated)
        return y


class WideResNet(nn.Module):
    """WRN-depth-width for small images.

    Args:
        depth: 6n+4; n blocks per stage.
        width: multiple of 16, 32, 64 channels in the three stages.
        num_classes: rows of the classifier ``fc``.

    Modules: ``conv1``, ``block1``..``block3``, ``bn``, ``relu``, ``pool``, ``fc``.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        n = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv(3, widths[0], 3)
        self.block1 = self._stage(widths[0], widths[1], n, 1)
        self.block2 = self._stage(widths[1], widths[2], n, 2)
        self.block3 = self._stage(widths[2], widths[3], n, 2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        initialize(self)

    @staticmethod
    def _stage(c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(c_in, c_out, stride), *(PreActBlock(c_out, c_out, 1) for _ in range(n - 1)))

    STEM = ("conv1", "block1")

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → logits ``[B, num_classes]``."""
        return self.forward_body(self.forward_stem(x))

    def forward_stem(self, x: Tensor) -> Tensor:
        """The modules of ``STEM``: what parallel branches share."""
        y: Tensor = self.block1(self.conv1(x))
        return y

    def forward_body(self, x: Tensor) -> Tensor:
        """The rest, to the logits."""
        x = self.block3(self.block2(x))
        logits: Tensor = self.fc(torch.flatten(self.pool(self.relu(self.bn(x))), 1))
        return logits


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU (He et al. 2015)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU(inplace=True)
        changes = stride != 1 or c_in != c_out
        self.shortcut = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, H/stride, W/stride]``, activated."""
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        activated: Tensor = self.relu2(y)
        return activated


class CifarResNet(nn.Module):
    """The thin ResNet for CIFAR: three stages of 16, 32, 64 channels.

    Args:
        depth: 6n+2; n blocks per stage.
        num_classes: rows of the classifier ``fc``.

    Modules: ``conv1``, ``bn1``, ``relu``, ``layer1``..``layer3``, ``pool``, ``fc``.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    @staticmethod
    def _stage(c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1)))

    STEM = ("conv1", "bn1", "relu", "layer1")

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → logits ``[B, num_classes]``."""
        return self.forward_body(self.forward_stem(x))

    def forward_stem(self, x: Tensor) -> Tensor:
        """The modules of ``STEM``: what parallel branches share."""
        y: Tensor = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return y

    def forward_body(self, x: Tensor) -> Tensor:
        """The rest, to the logits."""
        x = self.layer3(self.layer2(x))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


class SeparableBlock(nn.Module):
    """Depth-wise 3x3 then point-wise 1x1 convolution, batch norm and ReLU after each (Howard et al. 2017, figure 3)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_in, 3, stride, groups=c_in)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(c_in, c_out, 1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, H/stride, W/stride]``, activated."""
        x = self.relu1(self.bn1(self.conv1(x)))
        y: Tensor = self.relu2(self.bn2(self.conv2(x)))
        return y


class MobileNetV1(nn.Module):
    """MobileNetV1, width 1.0.

    Args:
        num_classes: rows of the classifier ``fc``.
        stem_stride: 2 is the paper's, for 224 pixels; with 1, 32 pixels end as a 2x2 map and not as a single point.

    Modules: ``features`` (0 is the stem, 1..13 the separable blocks), ``pool``, ``fc``.
    """

    # (output channels, stride) of blocks 1..13: table 1 of the paper
    _PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))

    def __init__(self, num_classes: int, stem_stride: int = 1) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ConvBnRelu(3, 32, stem_stride)]
        c_in = 32
        for c_out, stride in self._PLAN:
            blocks.append(SeparableBlock(c_in, c_out, stride))
            c_in = c_out
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → logits ``[B, num_classes]``."""
        logits: Tensor = self.fc(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def build_zoo(name: str, num_classes: int) -> nn.Module:
    """Build a zoo network with random weights from the global generator.

    Args:
        name: ``wrn-D-K`` with D = 6n+4, ``resnet-D`` with D = 6n+2, ``mobilenetv1`` (stem of stride 1) or
            ``mobilenetv1-224`` (of stride 2, as published), or ``pyramidnet-D-A`` with
            D = 6n+2 up to 110 (basic blocks), else 9n+2 (bottlenecks); ``pyramidnet-D-Ab``: bottlenecks at any depth;
            ``resnet-50-p25``, ``-p37.5``, ``-p50`` (torchvision's with so many per cent of the filters left out);
            ``fitnet-1`` to ``fitnet-4``; ``deeplabv3plus-B`` segments and ``ssd300-B`` detects, B their backbone.
        num_classes: at least 1; of a detector without background.

    Raises:
        RequestError: unknown name (close matches are listed) or a depth or width the family does not have.
    """
    if num_classes < 1:
        raise RequestError(f"model zoo/{name}: num_classes must be at least 1, found {num_classes}")
    if name in ("mobilenetv1", "mobilenetv1-224"):
        return MobileNetV1(num_classes, stem_stride=2 if name.endswith("-224") else 1)
    if found := re.fullmatch(r"wrn-(\d{1,6})-(\d{1,6})", name):
        depth, width = int(found[1]), int(found[2])
        if depth < 10 or depth % 6 != 4 or depth > _DEPTH_LIMIT:
            raise RequestError(f"model zoo/{name}: a WRN's depth is 6n+4 (10, 16, 22, 28, 34, 40, …), found {depth}")
        if not 1 <= width <= _WIDTH_LIMIT:
            raise RequestError(f"model zoo/{name}: a WRN's width is 1 to {_WIDTH_LIMIT}, found {width}")
        return WideResNet(depth, width, num_classes)
    if found := re.fullmatch(r"resnet-(\d{1,6})", name):
        depth = int(found[1])
        if depth < 8 or depth % 6 != 2 or depth > _DEPTH_LIMIT:
            raise RequestError(
                f"model zoo/{name}: a CIFAR ResNet's depth is 6n+2 (20, 32, 44, 56, 110, …), found {depth}; "
                f"for the ImageNet networks write torchvision/resnet18, torchvision/resnet50, …"
            )
        return CifarResNet(depth, num_classes)
    if name in _PRUNED:
        # half a second of imports that the other families need not pay
        from feedfast.models.zoo_pruned import PrunedResNet50

        return PrunedResNet50(_PRUNED[name], num_classes)
    family, _, backbone = name.partition("-")
    if name in ZOO_NAMES and family == "deeplabv3plus":
        from feedfast.models.zoo_deeplab import DeepLabV3Plus

        return DeepLabV3Plus(backbone, num_classes)
    if name in ZOO_NAMES and family == "ssd300":
        from feedfast.models.zoo_ssd import build_ssd

        return build_ssd(backbone, num_classes)
    if found := re.fullmatch(r"fitnet-([1-4])", name):
        return FitNet(int(found[1]), num_classes)
    if found := re.fullmatch(r"pyramidnet-(\d{1,6})-(\d{1,6})(b?)", name):
        depth, alpha = int(found[1]), int(found[2])
        bottleneck = bool(found[3]) or depth > _BASIC_DEPTH
        kind, step = ("bottleneck", 9) if bottleneck else ("basic", 6)
        if depth < step + 2 or depth % step != 2 or depth > _DEPTH_LIMIT:
            raise RequestError(
                f"model zoo/{name}: the depth of a PyramidNet of {kind} blocks is {step}n+2, found {depth} "
                f"(blocks are basic up to depth {_BASIC_DEPTH} and bottlenecks above it or with a b at the end)"
            )
        if not 1 <= alpha <= _ALPHA_LIMIT:
            raise RequestError(f"model zoo/{name}: a PyramidNet's alpha is 1 to {_ALPHA_LIMIT}, found {alpha}")
        return PyramidNet(depth, alpha, bottleneck, num_classes)
    close = difflib.get_close_matches(name, ZOO_NAMES, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join('zoo/' + c for c in close)}?" if close else f"known: {', '.join(ZOO_NAMES)}"
    raise RequestError(f"model zoo/{name} is not known; {hint} (wrn-D-K takes D = 6n+4, resnet-D takes D = 6n+2)")
