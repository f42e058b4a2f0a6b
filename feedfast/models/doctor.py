"""What `feedfast taps` shows: every place a tap can name, what its map costs, and what to beware of.

One row per module that returns a tensor, in the order in which a forward pass ends them. Hazards are facts about this
network on this example, not rules of thumb; `taps.Tapped` deals with all of them except those marked "not available".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.layout import layout_of
from feedfast.models.presets import GROUPS, preset_taps
from feedfast.models.taps import Tap
from feedfast.models.trace import Call, trace

__all__ = ["TapPlace", "describe_taps"]


@dataclass(frozen=True)
class TapPlace:
    """One tappable module.

    Attributes:
        path: dotted module path.
        kind: its class.
        shape: of its output without the batch, as the network has it.
        layout: which axis is what: map, tokens, vector, … (see `feedfast.models.layout`); "unknown" where it cannot be
            told, and a hazard says why.
        values: numbers per sample in it: bytes per sample under codec ``u8``, times 2 or 4 under ``f16`` or ``f32``.
        positions: "post" always; "pre" where an activation module inside can be tapped before it acts.
        pre_shape: shape of the ``pre`` map, which differs when the last activation is not at the end; None without it.
        bn: path of the batch norm that describes the ``pre`` map, if there is one.
        calls: how often a forward pass calls it.
        hazards: sentences, empty when there is nothing to beware of.
        suggestions: what a preset would use here, as ``name:position`` ("final:post", "ofd2:pre").
        specs: the same as a recipe's ``taps`` take them ("final=layer4:post").
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    layout: str
    values: int
    positions: tuple[Literal["post", "pre"], ...]
    pre_shape: tuple[int, ...] | None
    bn: str | None
    calls: int
    hazards: tuple[str, ...]
    suggestions: tuple[str, ...]
    specs: tuple[str, ...]


def describe_taps(model: nn.Module, example: Tensor) -> list[TapPlace]:
    """List the tappable places of a network.

    Args:
        model: the bare network; left as it was.
        example: normalized images ``[B, 3, H, W]`` on its device, at the size the taps will be used at.

    Returns:
        One row for each module that is called and returns a tensor with a batch axis, in the order the calls end.

    Raises:
        RequestError: the network cannot run on the example.
    """
    seen = trace(model, example)
    suggested: dict[str, list[Tap]] = {}
    for group in GROUPS:
        try:
            for tap in preset_taps(model, group, example):
                suggested.setdefault(tap.path, []).append(tap)
        except RequestError:
            continue  # no preset for this family; the rows are what the user then chooses from
    counts: dict[nn.Module, int] = {}
    for call in seen.calls:
        counts[call.module] = counts.get(call.module, 0) + 1
    rows = []
    for call in seen.calls:
        output = call.output
        last_call = call.index == counts[call.module] - 1
        if not call.path or not last_call or not isinstance(output, Tensor) or output.dim() < 2:
            continue
        activation = seen.last_activation(call)
        hazards = []
        if counts[call.module] > 1:
            hazards.append(f"called {counts[call.module]} times: the last call is meant")
        if seen.modified(call):
            hazards.append("its output is overwritten in place later: a copy is kept")
        pre: Tensor | None = None
        bn = None
        if isinstance(activation, Call):
            pre, bn = activation.input, seen.batch_norm_before(activation)
            if activation.output is not output:
                hazards.append(f"pre: the last activation, {activation.path}, is not the last layer inside")
            elif getattr(activation.module, "inplace", False):
                hazards.append("pre: the activation works in place: a tap makes it out of place")
        elif activation is not None:
            hazards.append(f"pre is not available: the last activation inside is a function call ({activation.name})")
        gridded = False
        try:
            found = layout_of(model, seen, output, len(example))
            layout, gridded = found.words(), found.grid is not None
        except RequestError as error:
            layout = "unknown"
            hazards.append(f"cannot be tapped: {error}")
        if output.dim() != 4 and not gridded:
            hazards.append(f"not a map: {output.dim() - 1} axes per sample instead of 3")
        taps = suggested.get(call.path, [])
        rows.append(
            TapPlace(
                path=call.path,
                kind=type(call.module).__name__,
                shape=tuple(output.shape[1:]),
                layout=layout,
                values=output[0].numel(),
                positions=("post",) if pre is None else ("post", "pre"),
                pre_shape=None if pre is None else tuple(pre.shape[1:]),
                bn=bn,
                calls=counts[call.module],
                hazards=tuple(hazards),
                suggestions=tuple(f"{tap.name}:{tap.position}" for tap in taps),
                specs=tuple(f"{tap.name}={tap.path}:{tap.position}" for tap in taps),
            )
        )
    return rows
