"""timm's families at the size of a test, as factories that a recipe can name: networks:vit."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch import nn


def timm_network(name: str, **options: Any) -> nn.Module:
    """One of timm's, with random weights and without its published size."""
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, **options)
    return network


def vit(num_classes: int = 10) -> nn.Module:
    """A ViT of 32 pixels: 4x4 patches and a class token, 2 blocks."""
    return timm_network(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=num_classes
    )


def convnext(num_classes: int = 10) -> nn.Module:
    """A ConvNeXt of one block per stage."""
    return timm_network("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=num_classes)


def swin(num_classes: int = 10) -> nn.Module:
    """A Swin of 32 pixels, whose maps are channels-last inside."""
    return timm_network(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        num_classes=num_classes,
    )


class InMapping(nn.Module):
    """A linear classifier of 16 pixels that returns its logits in a mapping, as many hubs' networks do."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = flat(num_classes)

    def forward(self, x: Any) -> dict[str, Any]:
        """Normalized images [B, 3, 16, 16] → ``{"logits": [B, num_classes], "features": …}``."""
        return {"logits": self.body(x), "features": x}


def flat(num_classes: int = 10) -> nn.Module:
    """A linear classifier of 16 pixels, which has no map at all."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def deadly(num_classes: int = 10) -> nn.Module:
    """A WRN that kills its process at the sight of a blank image, while the file $FEEDFAST_TEST_POISON exists."""
    from feedfast.models.build import build_model

    def look(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        blank = (inputs[0] == 1).flatten(1).all(1)
        if bool(blank.any()) and os.path.exists(os.environ.get("FEEDFAST_TEST_POISON", "")):
            os.kill(os.getpid(), signal.SIGKILL)

    network = build_model("zoo/wrn-10-1", num_classes=num_classes, weights=None, seed=0)
    network.register_forward_pre_hook(look)
    return network


def plain(num_classes: int = 10) -> nn.Module:
    """A small network of 16 pixels without batch statistics: what it learns does not depend on how a batch is cut."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 16, num_classes),
    )
