"""Which axis of a tensor inside a network is what: convolution maps, channels-last maps, tokens, vectors.

A tap may name any module, and shapes alone mislead: [B, 16, 16, 16] may be a map of either kind, [B, 64, 64] tokens
of either kind. So a layout is established from one forward pass, before anything is stored: from the grids that
convolutions of the pass have (tokens are a grid's positions, after the prefix tokens the network declares), and from
the layers that made or take the tensor (a Linear or LayerNorm works on the last axis, a convolution on axis 1), also
across sums and activations. What cannot be told is refused in one sentence, never guessed.

Everything leaves channels first, as views: maps [B, C, H, W], tokens [B, C, N], vectors [B, C].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.trace import Call, Operator, Trace, is_activation

__all__ = ["Layout", "layout_of", "prefix_tokens"]

Kind = Literal["vector", "map", "map, channels last", "tokens", "tokens, channels first"]
# Layers that work element by element: what is known of their input holds for their output.
_ELEMENTWISE = ("Dropout", "DropPath", "StochasticDepth", "Identity", "LayerScale")
_FIRST = ("Conv", "Pool", "BatchNorm", "GroupNorm", "InstanceNorm")
_LAST = ("Linear", "LayerNorm", "RmsNorm", "RMSNorm")


@dataclass(frozen=True)
class Layout:
    """How a tensor is laid out inside its network.

    Attributes:
        kind: vector [B, C], map [B, C, H, W] or [B, H, W, C], tokens [B, N, C] or [B, C, N].
        grid: of tokens, (height, width) of the positions after the prefix; None where they form no known grid.
        prefix: of tokens, how many come before the grid's (class token, registers).
    """

    kind: Kind
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @property
    def is_tokens(self) -> bool:
        """Whether there is one axis of positions."""
        return self.kind.startswith("tokens")

    def words(self) -> str:
        """For people: ``tokens (1 + 14x14)``, ``map, channels last``."""
        if not self.is_tokens or self.grid is None:
            return self.kind
        lead = f"{self.prefix} + " if self.prefix else ""
        return f"{self.kind} ({lead}{self.grid[0]}x{self.grid[1]})"

    def arranged(self, x: Tensor, *, as_map: bool = False) -> Tensor:
        """The tensor channels first, a view: [B, C], [B, C, H, W], [B, C, N].

        Args:
            x: as the network computed it.
            as_map: tokens with a grid as [B, C, H, W], without the prefix tokens.
        """
        if self.kind == "map, channels last":
            return x.permute(0, 3, 1, 2)
        if not self.is_tokens:
            return x
        tokens_BCN = x.transpose(1, 2) if self.kind == "tokens" else x
        if not as_map:
            return tokens_BCN
        assert self.grid is not None  # the caller has looked
        return tokens_BCN[:, :, self.prefix :].reshape(*tokens_BCN.shape[:2], *self.grid)


def layout_of(model: nn.Module, seen: Trace, tensor: Tensor, batch: int) -> Layout:
    """The layout of a tensor of a traced forward pass.

    Args:
        model: the network.
        seen: its pass over an example.
        tensor: that some call of the pass took or returned.
        batch: of the example.

    Raises:
        RequestError: it is not per sample, or its layout cannot be told; the sentence is a reason, without a name.
    """
    shape = tuple(tensor.shape)
    if not 2 <= len(shape) <= 4 or shape[0] != batch:
        raise RequestError(
            f"expected [batch, …] with one to three axes per sample, found {list(shape)} for a batch of {batch}"
        )
    if len(shape) == 2:
        return Layout("vector")
    axis = _channel_axis(seen, tensor)
    return _tokens(model, seen, shape, axis) if len(shape) == 3 else _map(seen, shape, axis)


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens come before those of the image: timm's ``num_prefix_tokens``, else 1 with a class token."""
    for module in model.modules():
        found = getattr(module, "num_prefix_tokens", None)
        if isinstance(found, int):
            return found
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return 1 if names & {"class_token", "cls_token"} else 0


def _map(seen: Trace, shape: tuple[int, ...], axis: int | None) -> Layout:
    _, a, b, c = shape
    grids = _grids(seen)
    first, last = b == c or (b, c) in grids, a == b or (a, b) in grids
    if first == last:
        first, last = axis == 1, axis == -1
    elif (first and axis == -1) or (last and axis == 1):
        first = last = False
    if first == last:
        raise RequestError(f"{list(shape[1:])} per sample may be [C, H, W] or [H, W, C], and no layer near it tells")
    return Layout("map" if first else "map, channels last")


def _tokens(model: nn.Module, seen: Trace, shape: tuple[int, ...], axis: int | None) -> Layout:
    _, a, b = shape
    prefixes = {0, prefix_tokens(model)}
    grids = _grids(seen)

    def grid_of(count: int) -> list[tuple[int, tuple[int, int]]]:
        return [(p, grid) for p in sorted(prefixes) for grid in sorted(grids) if grid[0] * grid[1] == count - p]

    ours, theirs = grid_of(a), grid_of(b)
    if axis is None and bool(ours) != bool(theirs):
        axis = -1 if ours else 1
    contradicted = (axis == -1 and theirs and not ours) or (axis == 1 and ours and not theirs)
    if axis is None or contradicted:
        raise RequestError(f"{list(shape[1:])} per sample may be [N, C] or [C, N] tokens, and no layer near it tells")
    found = ours if axis == -1 else theirs
    if any(type(module).__name__ == "Unroll" for module in model.modules()):
        found = []  # Hiera keeps its tokens in the order of mask units, not row by row
    kind: Kind = "tokens" if axis == -1 else "tokens, channels first"
    # two grids of one size, or none: the tokens are known, their places are not
    return Layout(kind, found[0][1], found[0][0]) if len(found) == 1 else Layout(kind)


def _grids(seen: Trace) -> set[tuple[int, int]]:
    """(height, width) of everything that a convolution of the pass returned."""
    outputs = (call.output for call in seen.calls if isinstance(call.module, nn.Conv2d))
    return {(out.shape[2], out.shape[3]) for out in outputs if isinstance(out, Tensor) and out.dim() == 4}


def _channel_axis(seen: Trace, tensor: Tensor) -> int | None:
    """1 or -1 as the nearest layer that took or made the tensor has it; None if none is near."""
    shape, reached, waiting = tensor.shape, {id(tensor)}, [tensor]
    while waiting:
        here = waiting.pop(0)
        touching = [call for call in seen.calls if call.output is here or call.input is here]
        for call in touching:
            axis = _works_on(call)
            if axis is not None:
                return axis
        steps: list[object] = []
        for call in touching:
            if is_activation(call.module) or type(call.module).__name__.startswith(_ELEMENTWISE):
                steps += [call.output, call.input]
        for operator in (*seen.sums, *seen.functions):
            if operator.output is here or any(x is here for x in operator.inputs):
                steps += [operator.output, *operator.inputs]
        if any(here is pool.inputs[0] for pool in seen.pools):
            pool = next(pool for pool in seen.pools if pool.inputs[0] is here)
            axis = _pooled_axis(pool)
            if axis is not None:
                return axis
        for step in steps:
            if isinstance(step, Tensor) and step.shape == shape and id(step) not in reached:
                reached.add(id(step))
                waiting.append(step)
    return None


def _works_on(call: Call) -> int | None:
    name = type(call.module).__name__
    if next(call.module.children(), None) is not None and "Norm" not in name:
        return None  # a block may permute inside; norms with an activation inside do not
    if "2d" in name or "1d" in name or name.startswith(_FIRST):  # LayerNorm2d among them, which permutes inside
        return 1
    return -1 if name.startswith(_LAST) or name.endswith(_LAST) else None


def _pooled_axis(pool: Operator) -> int | None:
    x, out = pool.inputs[0], pool.output
    first, last = out.shape[1] == x.shape[1], out.shape[-1] == x.shape[-1]
    return None if first == last else 1 if first else -1
