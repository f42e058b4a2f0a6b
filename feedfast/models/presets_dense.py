"""Where networks of segmentation and detection keep the maps the methods ask for.

``final`` is the last map before a segmenter's classifier (DeepLabV3+: the decoder's), and a detector's largest map.
``ofd`` has one map per place before its last activation, ``stage`` the same places after it.

| network | ``ofd`` | batch norm |
|---|---|---|
| DeepLabV3+, n=6 | the backbone's four stages, the pyramid's end, the decoder's last layer | the last in each |
| SSD300 ResNet, n=6 | the six maps: ``layer3``, five extra blocks | the last in each |
| SSD300 VGG-16, n=6 | conv4_3 (before its normalization), conv7, four extra blocks | none: margins are measured |
| SSDLite, n=6 | the six maps | the last in each |
| torchvision DeepLabV3, n=6; FCN, LRASPP, n=5 | the backbone's four stages, the head's layers | the last in each |

A MobileNet's stages are tapped where `presets` taps them: after the expansion of the block that begins the next stage,
and at the linear end of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from feedfast.models.taps import Tap
from feedfast.models.trace import is_batch_norm

__all__ = ["dense_taps"]

Groups = dict[str, tuple[Tap, ...]]


def dense_taps(model: nn.Module) -> Groups | None:
    """Group → its taps; None of a network that is not in the table."""
    kind = type(model).__name__
    module = type(model).__module__
    if not module.startswith("feedfast.models."):
        return None
    if kind == "DeepLabV3Plus":
        return _groups(model, [*_stages(model), "aspp.relu", "decoder.last_conv.6"], "decoder.last_conv.6")
    if kind == "SingleShot":
        first = ["backbone.layer3"] if hasattr(model.backbone, "layer3") else _features(model)
        places = [*first, *(f"backbone.extra.{i}" for i, _ in enumerate(model.backbone.extra.children()))]  # type: ignore[union-attr]
        return _groups(model, places, places[0])
    heads = {
        "PlainDeepLabV3": ["classifier.0.project.2", "classifier.3"],
        "PlainFCN": ["classifier.2"],
        "PlainLRASPP": ["classifier.cbr.2"],
    }
    if kind in heads:
        return _groups(model, [*_stages(model), *heads[kind]], heads[kind][-1])
    return None


def _features(model: nn.Module) -> list[str]:
    features = model.get_submodule("backbone.features")
    # of SSDLite two parts that give a map each, of VGG-16 one run of layers
    parts = [name for name, part in features.named_children() if isinstance(part, nn.Sequential)]
    return [f"backbone.features.{name}" for name in parts] or ["backbone.features"]


def _stages(model: nn.Module) -> list[str | tuple[str, str]]:
    """The ends of a backbone's stages; of a MobileNet pairs: the block that ends one, and the next's expansion."""
    if hasattr(model.backbone, "layer4"):
        return [f"backbone.layer{i}" for i in range(1, 5)]
    # V2 in the zoo, V3 in torchvision's networks, which keep its layers without their Sequential
    v2 = hasattr(model.backbone, "features")
    blocks, inner, starts, last = (
        ("backbone.features", "conv", (4, 7, 14), 17) if v2 else ("backbone", "block", (4, 7, 13), 15)
    )
    return [*((f"{blocks}.{i - 1}", f"{blocks}.{i}.{inner}.0") for i in starts), (f"{blocks}.{last}", "")]


def _groups(model: nn.Module, places: Sequence[str | tuple[str, str]], final: str) -> Groups:
    """Taps at places: a path whose last activation is meant, or (a linear end, the activated path or "")."""
    before, after = [], []
    for number, place in enumerate(places, start=1):
        end, activated = (place, place) if isinstance(place, str) else place
        path = activated or end
        before.append(Tap(f"ofd{number}", path, "pre" if activated else "post", _norm(model, path)))
        after.append(Tap(f"stage{number}", end, "post"))
    return {"final": (Tap("final", final, "post"),), "ofd": tuple(before), "stage": tuple(after)}


def _norm(model: nn.Module, path: str) -> str | None:
    """The last batch norm of the main branch inside a module; of an activation by itself, the one before it."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    norms = [f"{path}.{inner}" for inner, m in module.named_modules() if is_batch_norm(m) and "downsample" not in inner]
    if norms:
        return norms[-1]
    if isinstance(module, nn.Sequential):
        return None
    siblings = list(model.get_submodule(parent).named_children())
    earlier = siblings[: [n for n, _ in siblings].index(name)]
    return next((f"{parent}.{n}" for n, m in reversed(earlier) if is_batch_norm(m)), None)
