"""torchvision's networks of segmentation and detection, tapped below their own resizing and normalization.

`build_dense` returns torchvision's network with its class changed to a subclass whose forward pass is plain: normalized
images in, logits at the network's own stride or raw boxes out. Its modules stay as they are, so keys of state_dicts are
torchvision's and its files load. Auxiliary classifiers of segmentation are left out: nothing here trains them.

``num_classes`` counts what the data count: of detection without background, where torchvision counts it in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models  # type: ignore[import-untyped]
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3  # type: ignore[import-untyped]

from feedfast.models.zoo_ssd import plain

__all__ = ["DENSE_NAMES", "build_dense", "data_classes", "detector_input", "is_detector"]

# name → the classifier whose published weights fit the backbone; "": none (SSDLite's is narrower than the classifier)
_SEGMENTERS = {
    "deeplabv3_resnet50": "resnet50",
    "deeplabv3_resnet101": "resnet101",
    "deeplabv3_mobilenet_v3_large": "mobilenet_v3_large",
    "fcn_resnet50": "resnet50",
    "fcn_resnet101": "resnet101",
    "lraspp_mobilenet_v3_large": "mobilenet_v3_large",
}
_DETECTORS = {"ssd300_vgg16": "vgg16", "ssdlite320_mobilenet_v3_large": ""}
_ALL_LAYERS = {"ssd300_vgg16": 5, "ssdlite320_mobilenet_v3_large": 6}  # to train; with weights torchvision freezes some
DENSE_NAMES = (*_SEGMENTERS, *_DETECTORS)


class PlainDeepLabV3(DeepLabV3):  # type: ignore[misc]
    """torchvision's DeepLabV3: normalized images ``[B, 3, H, W]`` → logits ``[B, K, ceil(H/8), ceil(W/8)]``.

    With a MobileNetV3 the logits' stride is 16.
    """

    AUXILIARY = ("aux_classifier.",)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.backbone(x)["out"])
        return logits


class PlainFCN(FCN):  # type: ignore[misc]
    """torchvision's FCN: normalized images ``[B, 3, H, W]`` → logits ``[B, K, ceil(H/8), ceil(W/8)]``."""

    AUXILIARY = ("aux_classifier.",)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.backbone(x)["out"])
        return logits


class PlainLRASPP(LRASPP):  # type: ignore[misc]
    """torchvision's LR-ASPP: normalized images ``[B, 3, H, W]`` → logits ``[B, K, ceil(H/8), ceil(W/8)]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.backbone(x))
        return logits


_PLAIN: dict[Any, Any] = {DeepLabV3: PlainDeepLabV3, FCN: PlainFCN, LRASPP: PlainLRASPP}


def is_detector(name: str) -> bool:
    """Whether this name of torchvision's is a detector's."""
    return name in _DETECTORS


def data_classes(name: str, categories: int) -> int:
    """Classes in the data of a set of published weights: a detector's background is none."""
    return categories - is_detector(name)


def build_dense(name: str, num_classes: int | None = None, weights: Any = None) -> nn.Module:
    """One of `DENSE_NAMES`.

    Args:
        name: torchvision's.
        num_classes: None = torchvision's default (21 to segment, 90 to detect), or that of the weights.
        weights: a member of torchvision's weights of this network, or None to start at random.
    """
    options: dict[str, Any] = {"weights": weights, "weights_backbone": None}
    if num_classes is not None:
        options["num_classes"] = num_classes + is_detector(name)
    if is_detector(name) and weights is not None:
        options["trainable_backbone_layers"] = _ALL_LAYERS[name]
    model: nn.Module = models.get_model(name, **options)
    if is_detector(name):
        model = plain(model)
    else:
        model.__class__ = _PLAIN[type(model)]
        if hasattr(model, "aux_classifier"):
            model.aux_classifier = None  # type: ignore[assignment]
    model.published = {**_SEGMENTERS, **_DETECTORS}[name]  # type: ignore[assignment]
    return model


@functools.cache
def detector_input(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and std per channel in 0..1 units and the side in pixels, of the transform that torchvision puts in front.

    Nothing here runs it.
    """
    with torch.device("meta"):
        transform: Any = build_dense(name).transform
    mean, std = tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std))
    return mean, std, int(transform.fixed_size[0])
