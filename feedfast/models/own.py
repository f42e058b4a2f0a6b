"""What a network's own weights were trained on: normalization and size of the input.

A teacher that sees other numbers than it was trained on computes nonsense without a word, so what its library or its
file says is the default wherever a recipe says nothing. Three say something: timm's networks carry it
(``pretrained_cfg``), torchvision's published weights carry it (their ``transforms``; its detectors themselves), and
weights that a run of feedfast saved lie in its folder, beside the recipe it was trained by (which the stages read).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from feedfast.models.build import named_weights, published_file

Triple = tuple[float, float, float]

__all__ = ["OwnInput", "built_size", "own_input"]


@dataclass(frozen=True)
class OwnInput:
    """A network's own input.

    Attributes:
        mean: per channel, in 0..1 units.
        std: per channel, likewise.
        size: side in pixels; 0 = unknown.
        binding: whether it is shown that size wherever nothing else is said: it runs at no other, or the weights in use
            were made for it. A file of somebody's own for a timm network may have been trained at any.
        source: who says so, for messages.
    """

    mean: Triple
    std: Triple
    size: int
    binding: bool
    source: str


def own_input(
    name: str, weights: str | Path | None, model: nn.Module | None = None, *, given: bool = False
) -> OwnInput | None:
    """The input that a network's own weights were made for; None where nobody says.

    Args:
        name: as `build_model` takes it.
        weights: likewise; "" = the published ones.
        model: the network, if there is one: a factory may return one of timm's.
        given: whether it was passed as an object: its name and a file say nothing of its weights, and what it carries
            itself is believed, its size too.
    """
    family, _, rest = name.partition("/")
    weights = None if given else weights
    if family == "torchvision":
        return _torchvision(rest, weights)
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None and family == "timm" and model is None:
        config = _timm_config(rest)
    published = family == "timm" and weights is not None and str(weights) == ""
    return _of_timm(config, model, published=published or given) if config else None


def _torchvision(rest: str, weights: str | Path | None) -> OwnInput | None:
    dense = importlib.import_module("feedfast.models.dense")
    chosen = named_weights(rest, weights) or published_file(rest, weights)
    if dense.is_detector(rest):  # torchvision normalizes inside the network, whoever's the weights are
        mean, std, size = dense.detector_input(rest)
        return OwnInput(mean, std, size, chosen is not None, f"torchvision's {rest}")
    if chosen is not None:
        made = chosen.transforms()
        mean, std = tuple(map(float, made.mean)), tuple(map(float, made.std))
        # a segmenter's have no size: its images keep their shapes, and it is trained on crops of the data's size
        size = int(made.crop_size[0]) if hasattr(made, "crop_size") else 0
        return OwnInput(mean, std, size, size > 0, f"torchvision's {chosen}")
    return None


def _timm_config(rest: str) -> Any:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return None
    return timm.get_pretrained_cfg(rest) if timm.is_model(rest) else None


def _of_timm(config: Any, model: nn.Module | None, *, published: bool) -> OwnInput | None:
    def said(key: str) -> Any:
        return config.get(key) if isinstance(config, dict) else getattr(config, key, None)

    mean, std, shape = said("mean"), said("std"), said("input_size")
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        return None
    # a network built for another size than its weights (img_size=…) says so itself
    size = built_size(model) or (int(shape[-1]) if shape else 0)
    strict = bool(getattr(getattr(model, "patch_embed", None), "strict_img_size", False))
    binding = published or strict or bool(said("fixed_input_size"))
    mean_3, std_3 = (tuple(map(float, values)) for values in (mean, std))
    return OwnInput(mean_3, std_3, size, binding, "timm's pretrained_cfg")  # type: ignore[arg-type]


def built_size(model: nn.Module | None) -> int:
    """The side in pixels a network was built for, where it knows: timm's patch embedding, torchvision's ViT; else 0."""
    found: Any = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    if isinstance(found, (tuple, list)):
        found = found[0]
    return found if isinstance(found, int) else 0
