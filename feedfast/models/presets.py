"""Where each family keeps the maps the methods ask for (of segmentation and detection: `presets_dense`).

Three groups. ``final`` is the last map before the global pooling, after its activation: what FEED and Factor Transfer
compare. ``ofd`` is the end of each stage *before* the activation, ``ofd1`` (largest map) to ``ofdn``: what the Overhaul
method compares (Heo et al., ICCV 2019), with the batch norm whose gamma and beta give the margin. ``stage`` is ``post``
at the same places, for hints and attention maps; MobileNetV2/V3's, and a basic PyramidNet's first two, end linearly.

| network | ``ofd`` | batch norm |
|---|---|---|
| zoo WRN, n=3 | the next stage's first batch norm, before its ReLU; at the end the final one | that one |
| zoo PyramidNet, n=3 | basic: the next stage's bn1 (no ReLU follows); bottleneck: its bn2; last: the final | that one |
| zoo ResNet, n=3; torchvision ResNet, ResNeXt, WideResNet, n=4 | residual sum of each stage's last block | its last |
| zoo FitNet, n=3 | the last convolution of each group, before its pooling | its own |
| zoo MobileNetV1, n=4 | point-wise convolution of blocks 3, 5, 11, 13 | its own |
| torchvision MobileNetV2/V3, n=4 | the expansion of the next strided block; at the end the last block | its own |
| VGG, n=4 | the last convolution before each of the last four poolings | its own, if it has one |
| torchvision ConvNeXt, Swin, n=4; ViT, n=4: blocks at even depths | their ends, linear | none |
| others with timm's ``feature_info`` or ``layer1``.. | stage ends from stride 4 on, before a final activation | found |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.branched import Branched
from feedfast.models.layout import prefix_tokens
from feedfast.models.presets_dense import dense_taps
from feedfast.models.taps import Tap, tap_layout
from feedfast.models.trace import Call, Trace, is_batch_norm, trace
from feedfast.models.zoo import CifarResNet, MobileNetV1, WideResNet
from feedfast.models.zoo_fitnet import FitNet
from feedfast.models.zoo_pyramid import PyramidBasic, PyramidNet

# Tokens count as the map of their grid, without class token and registers. Without a batch norm the margin is measured.

__all__ = ["GROUPS", "preset_taps"]

Place = TypeVar("Place")

GROUPS = ("final", "ofd", "stage")
BRANCH = "branch"  # of a student of parallel branches: branch1.final, branch1.logits, branch2.final, ...
_ONE = re.compile(r"(ofd|stage)\d+")
_STAGES = 4  # OFD's number of maps for networks with more stages than that
# Anything else needs taps by hand: a guess that trains on the wrong map would go unnoticed.
_BY_HAND = "name taps by hand, as in ofd1=module.path:pre or final=module.path (feedfast taps lists the places)"


def preset_taps(model: nn.Module, group: str, example: Tensor | None = None) -> tuple[Tap, ...]:
    """The taps of a group of methods.

    Args:
        model: the bare network.
        group: "final" (one tap of that name), "ofd" ("ofd1" .. "ofdn", first stage to last) or "stage" (likewise); or
            one of these taps, as "ofd2".
        example: normalized images ``[B, 3, H, W]`` for families that are not in the table and are watched on one
            forward pass; None = zeros of the size the network says it wants, else of 64 pixels.

    Raises:
        RequestError: unknown group, or a network this cannot be told for; it says how to name taps by hand.
    """
    if group == BRANCH:
        return _branches(model)
    if one := _ONE.fullmatch(group):
        every = preset_taps(model, one[1], example)
        found = tuple(tap for tap in every if tap.name == group)
        if not found:
            raise RequestError(f"taps {group!r}: expected one of {', '.join(tap.name for tap in every)}")
        return found
    if group not in GROUPS:
        raise RequestError(f"taps {group!r}: expected {', '.join(map(repr, GROUPS))} or name=module.path[:pre]")
    dense = dense_taps(model)
    if dense is not None:
        return dense[group]
    places = _table(model)
    if places is None:
        seen = trace(model, _example(model) if example is None else example)
        places = {
            "final": lambda: (_last_map(model, seen),),
            "ofd": lambda: tuple(_before_activation(name, call, seen) for name, call in _ends(model, seen, "ofd")),
            "stage": lambda: tuple(Tap(name, call.path, "post") for name, call in _ends(model, seen, "stage")),
        }
    return places[group]()


def _branches(model: nn.Module) -> tuple[Tap, ...]:
    """Last map and logits of every branch."""
    if not isinstance(model, Branched):
        raise RequestError(
            f"student.branches: expected a student of parallel branches (student.branches = 2 or more), "
            f"found a single {type(model).__name__}"
        )
    found: list[Tap] = []
    for number, branch in enumerate(model.branches):
        (final,) = preset_taps(branch, "final")
        for name, path in (("final", final.path), ("logits", "fc")):
            found.append(Tap(f"branch{number + 1}.{name}", f"branches.{number}.{path}", "post"))
    return tuple(found)


_Places = Mapping[str, Callable[[], tuple[Tap, ...]]]
"""Group → its taps, worked out when asked for: a family that was changed may still have some of them."""


def _table(model: nn.Module) -> _Places | None:
    """The places of a family that is in the table of the module's docstring."""
    kind = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
    if isinstance(model, WideResNet):
        wide = [("block2.0.relu1", "block2.0.bn1"), ("block3.0.relu1", "block3.0.bn1"), ("relu", "bn")]
        return {"final": lambda: _final("relu"), "ofd": lambda: _pre(wide), "stage": lambda: _post(p for p, _ in wide)}
    if isinstance(model, PyramidNet):
        return {
            "final": lambda: _final("relu_final"),
            "ofd": lambda: _pyramid(model),
            "stage": lambda: _post(tap.path for tap in _pyramid(model)),
        }
    if isinstance(model, FitNet):
        groups = [(path, f"{path}.{len(_children(model, path)) - 1}.bn1") for path in _layers(model)]
        return {
            "final": lambda: _final(groups[-1][0]),
            "ofd": lambda: _pre(groups),
            "stage": lambda: _post(path for path, _ in groups),
        }
    if isinstance(model, MobileNetV1):
        blocks = [f"features.{i}" for i in (3, 5, 11, 13)]
        return {
            "final": lambda: _final("features"),
            "ofd": lambda: _pre([(path, f"{path}.bn2") for path in blocks]),
            "stage": lambda: _post(blocks),
        }
    if isinstance(model, CifarResNet) or kind in ("torchvision.ResNet", "feedfast.PrunedResNet50"):
        layers = _layers(model)
        return {
            "final": lambda: _final(layers[-1]),
            "ofd": lambda: _pre([(path, _block_norm(model, path)) for path in layers]),
            "stage": lambda: _post(layers),
        }
    if kind in ("torchvision.MobileNetV2", "torchvision.MobileNetV3"):
        return {
            "final": lambda: _final("features"),
            "ofd": lambda: _expansions(model),
            "stage": lambda: _post(_linear_ends(model)),
        }
    if kind in ("torchvision.VGG", "timm.VGG"):
        return {
            "final": lambda: _final("features"),
            "ofd": lambda: _pre(_before_pooling(model)[-_STAGES:]),
            "stage": lambda: _post(path for path, _ in _before_pooling(model)[-_STAGES:]),
        }
    if kind in ("torchvision.ConvNeXt", "torchvision.SwinTransformer"):
        # ConvNeXt's classifier begins with a norm after the pooling; Swin's map is normed, then pooled
        ends = [f"features.{i}" for i in (1, 3, 5, 7)]
        final = "features" if kind == "torchvision.ConvNeXt" else "permute"
        return {"final": lambda: _final(final), "ofd": lambda: _linear(ends), "stage": lambda: _post(ends)}
    if kind == "torchvision.VisionTransformer":
        blocks = [f"encoder.layers.{name}" for name, _ in model.get_submodule("encoder.layers").named_children()]
        even = _evenly(blocks)
        return {"final": lambda: _final("encoder"), "ofd": lambda: _linear(even), "stage": lambda: _post(even)}
    return None


def _linear(paths: Iterable[str]) -> tuple[Tap, ...]:
    """Ends of stages that no activation follows: their outputs, whose margins are measured."""
    return tuple(Tap(f"ofd{i}", path, "post") for i, path in enumerate(paths, start=1))


def _evenly(places: Sequence[Place]) -> list[Place]:
    """At most four of the places, at even depths, with the last."""
    count = min(_STAGES, len(places))
    return [places[(i + 1) * len(places) // count - 1] for i in range(count)]


def _pre(places: Sequence[tuple[str, str | None]]) -> tuple[Tap, ...]:
    return tuple(Tap(f"ofd{i}", path, "pre", bn) for i, (path, bn) in enumerate(places, start=1))


def _pyramid(model: PyramidNet) -> tuple[Tap, ...]:
    """PyramidNet: where the authors of OFD take its maps (their networks' ``extract_feature``)."""
    last = Tap("ofd3", "relu_final", "pre", "bn_final")
    if isinstance(model.layer1[0], PyramidBasic):  # its first norm is followed by a convolution: nothing is activated
        norms = [f"{layer}.0.bn1" for layer in ("layer2", "layer3")]
        return (*(Tap(f"ofd{i}", path, "post", path) for i, path in enumerate(norms, start=1)), last)
    return (*_pre([(f"{layer}.0.relu2", f"{layer}.0.bn2") for layer in ("layer2", "layer3")]), last)


def _post(paths: Iterable[str]) -> tuple[Tap, ...]:
    return tuple(Tap(f"stage{i}", path, "post") for i, path in enumerate(paths, start=1))


def _final(path: str) -> tuple[Tap, ...]:
    return (Tap("final", path, "post"),)


def _layers(model: nn.Module) -> list[str]:
    """``layer1``, ``layer2``, …: how nearly every ResNet names its stages."""
    return [f"layer{i}" for i in range(1, 5) if isinstance(getattr(model, f"layer{i}", None), nn.Sequential)]


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _block_norm(model: nn.Module, stage: str) -> str:
    # of the convolution branch of a residual sum, so that the margin is the authors' approximation
    blocks = _children(model, stage)
    return f"{stage}.{len(blocks) - 1}.{'bn3' if hasattr(blocks[-1], 'bn3') else 'bn2'}"


def _inverted_residuals(model: nn.Module) -> tuple[list[str], list[str]]:
    """MobileNetV2/V3: paths of all blocks, and of those that stride but the first, which ends a stage at stride 2."""
    blocks = [
        (f"features.{i}", block)
        for i, block in enumerate(_children(model, "features"))
        if type(block).__name__ == "InvertedResidual"
    ]
    strided = [
        path for path, block in blocks if any(isinstance(m, nn.Conv2d) and m.stride[0] > 1 for m in block.modules())
    ]
    return [path for path, _ in blocks], strided[1:]


def _expansions(model: nn.Module) -> tuple[Tap, ...]:
    """MobileNetV2/V3: a stage ends where the next block strides, and is tapped after that block's 1x1 expansion.

    V2 at 224 pixels gives 144, 192, 576 and 320 channels.
    """
    paths, strided = _inverted_residuals(model)
    places: list[tuple[str, str | None]] = []
    for path in strided:
        inner = "conv" if hasattr(model.get_submodule(path), "conv") else "block"
        places.append((f"{path}.{inner}.0", f"{path}.{inner}.0.1"))
    last = paths[-1]  # linear: its output is the map without activation
    modules = model.get_submodule(last).named_modules()
    norms = [f"{last}.{name}" for name, module in modules if is_batch_norm(module)]
    return (*_pre(places), Tap(f"ofd{len(places) + 1}", last, "post", norms[-1]))


def _linear_ends(model: nn.Module) -> list[str]:
    """MobileNetV2/V3: the block before each that strides, and the last. V2 has 24, 32, 96 and 320 channels there."""
    paths, strided = _inverted_residuals(model)
    return [*(paths[paths.index(path) - 1] for path in strided), paths[-1]]


def _before_pooling(model: nn.Module) -> list[tuple[str, str | None]]:
    """VGG: the ReLU before each max pooling, with the batch norm before it if there is one."""
    layers = _children(model, "features")
    return [
        (f"features.{i - 1}", f"features.{i - 2}" if is_batch_norm(layers[i - 2]) else None)
        for i, layer in enumerate(layers)
        if isinstance(layer, nn.MaxPool2d)
    ]


def _example(model: nn.Module) -> Tensor:
    published = getattr(model, "pretrained_cfg", None)
    shape = published.get("input_size") if isinstance(published, dict) else None
    side = getattr(model, "image_size", 64)  # torchvision's transformers accept one size only
    first = next(model.parameters(), torch.zeros(0))
    return torch.zeros((1, *(shape or (3, side, side))), device=first.device, dtype=first.dtype)


def _last_map(model: nn.Module, seen: Trace) -> Tap:
    """The outermost module whose output is what the last global pooling receives.

    Where functions have worked on that output in place before it was pooled (DenseNet's last ReLU), it is tapped at the
    end of the pass. Without a pooling of a module's output (AlexNet flattens its map, a ViT takes its class token): the
    module that returned the last map or the last tokens.
    """
    outputs = [c for c in seen.calls if isinstance(c.output, Tensor) and c.output.dim() in (3, 4) and c.path]
    pool = seen.pools[-1] if seen.pools else None
    late = False
    made: list[Call] = []
    if pool is not None:
        pooled, version = pool.inputs[0], pool.versions[0]
        made = [c for c in outputs if c.output is pooled]
        now = [c for c in made if c.version == version]
        late = bool(made) and not now
        if late and pooled._version != version:
            made = []  # written to once more after it was pooled: no moment to take it at
        made = now or made
        made = [c for c in made if not isinstance(c.module, nn.Identity)] or made
    tokens = _last_tokens(model, outputs)
    if not made and tokens and (pool is None or pool.inputs[0].dim() == 3 or tokens[-1].started > pool.started):
        if not isinstance(tokens[-1].module, nn.Linear) and _gridded(
            model, seen, tokens[-1]
        ):  # VOLO: an auxiliary head
            made = [c for c in tokens if not isinstance(c.module, nn.Identity)] or tokens
    elif not made and pool is None:
        last = next((c for c in reversed(outputs) if "Pool" not in type(c.module).__name__), None)
        made = [c for c in outputs if last is not None and c.output is last.output]
    if not made:
        functions = [f.name for f in seen.functions if pool is not None and f.output is pool.inputs[0]]
        cause = f" (a function, {functions[0]}, makes it: use a module instead)" if functions else ""
        raise RequestError(
            f"taps 'final': {type(model).__name__} has no module that returns its last map before pooling{cause}; "
            f"{_BY_HAND}"
        )
    path = min(made, key=lambda c: (c.path.count("."), -c.started)).path
    return Tap("final", path, "end" if late else "post")


def _last_tokens(model: nn.Module, outputs: Sequence[Call]) -> list[Call]:
    """The calls that returned the last tokens of a pass; class tokens alone are not meant."""
    few = max(1, prefix_tokens(model))
    tokens = [(c, c.output) for c in outputs if isinstance(c.output, Tensor) and c.output.dim() == 3]
    tokens = [(c, output) for c, output in tokens if output.shape[1] > few]
    return [c for c, output in tokens if output is tokens[-1][1]]


def _gridded(model: nn.Module, seen: Trace, call: Call) -> bool:
    """Whether a call returned tokens whose places are known."""
    assert isinstance(call.output, Tensor)
    try:
        tap_layout(model, Tap("final", call.path), seen, call.output)
    except RequestError:
        return False
    return True


def _ends(model: nn.Module, seen: Trace, group: str) -> list[tuple[str, Call]]:
    """Names and calls of the stages timm knows of its networks, from stride 4 on; for others of ``layer1``, ``layer2``,
    … if there are three. Of a network of one stride (ViT, Mixer), blocks at even depths."""
    info = getattr(model, "feature_info", None)
    entries = [entry for entry in list(getattr(info, "info", info) or []) if isinstance(entry, dict)]
    places = [
        (int(entry["reduction"]), str(entry.get("module", "")), entry.get("num_chs"))
        for entry in entries
        if int(entry.get("reduction", 0)) >= 4
    ]
    if len({reduction for reduction, _, _ in places}) > 1:
        places = list({place[0]: place for place in places}.values())
    elif places:
        places = _evenly(places)
    elif len(_layers(model)) >= 3:
        places = [(0, path, None) for path in _layers(model)]
    modules = dict(model.named_modules())
    calls = [(seen.of(modules[path])[-1:] if path in modules else [], width) for _, path, width in places]
    if not places or any(not call for call, _ in calls):
        raise RequestError(f"taps {group!r}: the stages of {type(model).__name__} are not known; {_BY_HAND}")
    ends = [(call[0], width) for call, width in calls][-_STAGES:]
    found = []
    for i, (call, width) in enumerate(ends, start=1):
        tap, output = Tap(f"{group}{i}", call.path), call.output
        if not isinstance(output, Tensor):
            raise RequestError(f"taps {group!r}: expected {call.path} to return a map, found {type(output).__name__}")
        shape = tap_layout(model, tap, seen, output).arranged(output, as_map=True).shape[1:]
        if len(shape) != 3 or (width is not None and shape[0] != width):
            channels = "channels" if width is None else width
            raise RequestError(
                f"taps {group!r}: expected {call.path} to return [{channels}, height, width], found {list(shape)}"
            )
        found.append((tap.name, call))
    return found


def _before_activation(name: str, call: Call, seen: Trace) -> Tap:
    """Before the activation if the stage's output is one's result, else the output (linear ends)."""
    output, last = call.output, seen.last_activation(call)
    assert isinstance(output, Tensor)  # `_ends` has looked
    if last is not None and last.output is output:
        if not isinstance(last, Call):
            raise RequestError(
                f"taps 'ofd': {call.path} ends in an activation called as a function ({last.name}), which no hook "
                f"sees; make it a module (nn.ReLU())"
            )
        return Tap(name, call.path, "pre", seen.batch_norm_before(last))
    return Tap(name, call.path, "post", seen.batch_norm_of(output))
