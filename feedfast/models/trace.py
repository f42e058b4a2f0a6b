"""What one forward pass does: which modules are called, in what order, how often, and what happens to their outputs.

Names in a module tree say where a layer *is*; a tap needs to know when it *runs*. torchvision's Bottleneck calls one
`relu` three times, blocks call activations as functions that no hook sees, sums and activations work in place. So one
example is sent through the network with a hook on every module and a dispatch mode under it that notes the few
operators of interest (activations, sums, global pooling) and the module they ran in.

Tensors are told apart by object identity, which holds while the trace lives because it keeps every tensor it has seen;
that is the memory of one forward pass with all its activations, so trace a sample or two, not a batch.

The pass leaves nothing behind: no gradients, evaluation mode (running statistics stay), train/eval flag of each module
as it was, random generators as they were. What it cannot see: modules bypassed by calling ``module.forward``, scripted
modules, and what a network does differently while training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from feedfast.errors import RequestError

__all__ = ["Call", "Trace", "is_activation", "is_batch_norm", "trace", "undisturbed"]

# By name and not by class: timm has its own of several, and a leaf that is called ReLU is one. Gates (sigmoid, tanh,
# hard-sigmoid) are absent: the last activation of a squeeze-and-excite block is not its gate.
# fmt: off
_ACTIVATION_MODULES = frozenset((
    "relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "gelutanh", "quickgelu", "silu",
    "swish", "mish", "hardmish", "hardswish", "hardtanh", "softplus", "threshold",
))
_ACTIVATION_OPERATORS = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise", "elu", "selu", "celu", "gelu",
    "silu", "mish", "hardswish", "hardtanh", "softplus", "threshold", "clamp_min",
))
# fmt: on
_POOLING_OPERATORS = frozenset(("mean", "amax", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"))


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation function (a leaf; gates are not counted)."""
    return type(module).__name__.lower() in _ACTIVATION_MODULES and next(module.children(), None) is None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module normalizes each channel by statistics it keeps: any torch, timm or frozen batch norm."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"


@dataclass(eq=False, slots=True)
class Call:
    """One call of one module."""

    path: str
    module: nn.Module = field(repr=False)
    index: int  # how many-th call of this module, from 0
    caller: Call | None = field(repr=False)
    started: int  # a clock that ticks at every call and every noted operator
    input: Tensor | None = field(repr=False)  # first positional argument
    output: object = field(default=None, repr=False)
    version: int = 0  # of the output when it was returned

    def within(self, scope: Call) -> bool:
        """Whether this call is ``scope`` or happened inside it."""
        call: Call | None = self
        while call is not None:
            if call is scope:
                return True
            call = call.caller
        return False


@dataclass(eq=False, slots=True)
class Operator:
    """One noted operator: an activation called as a function, a sum, or a global pooling."""

    name: str
    call: Call | None  # the innermost module it ran in
    started: int
    inputs: tuple[Tensor, ...] = field(repr=False)
    versions: tuple[int, ...]
    output: Tensor = field(repr=False)


@dataclass(eq=False, repr=False)
class Trace:
    """The calls of one forward pass, in the order in which they ended, and the noted operators."""

    calls: list[Call] = field(default_factory=list)
    functions: list[Operator] = field(default_factory=list)  # activations outside any activation module
    sums: list[Operator] = field(default_factory=list)
    pools: list[Operator] = field(default_factory=list)
    input: Tensor | None = None
    output: object = None

    def of(self, module: nn.Module) -> list[Call]:
        """The calls of this module, first to last."""
        return [call for call in self.calls if call.module is module]

    def last_activation(self, scope: Call) -> Call | Operator | None:
        """The activation that ran last inside ``scope``: a module's call, or an `Operator` if it was a function."""
        events: list[Call | Operator] = [c for c in self.calls if is_activation(c.module) and c.within(scope)]
        events += [f for f in self.functions if f.call is not None and f.call.within(scope)]
        return max(events, key=lambda event: event.started, default=None)

    def batch_norm_before(self, call: Call) -> str | None:
        """Path of the batch norm whose affine parameters describe the input of an activation call.

        That is the norm that produced the input, or the one that produced the first addend of the residual sum that
        did (the convolution branch comes first in every family here; for it the parameters are an approximation).
        """
        if call.caller is not None and is_batch_norm(call.caller.module):
            return call.caller.path  # timm's norm with its activation inside
        return None if call.input is None else self.batch_norm_of(call.input)

    def batch_norm_of(self, tensor: Tensor) -> str | None:
        """Path of the batch norm that produced a tensor, directly or as the first addend of a sum that is one."""
        made = {id(c.output): c.path for c in self.calls if is_batch_norm(c.module)}
        if id(tensor) in made:
            return made[id(tensor)]
        for operator in self.sums:
            if operator.output is tensor:
                return next((made[id(x)] for x in operator.inputs if id(x) in made), None)
        return None

    def modified(self, call: Call) -> bool:
        """Whether the tensor this call returned was written to afterwards."""
        return isinstance(call.output, Tensor) and call.output._version != call.version


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, record: Trace, stack: list[Call], clock: Iterator[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record, self.stack, self.clock = record, stack, clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        tensors = tuple(x for x in args if isinstance(x, Tensor))
        versions = tuple(x._version for x in tensors)
        out = func(*args, **(kwargs or {}))
        if not tensors or not isinstance(out, Tensor):
            return out
        here = self.stack[-1] if self.stack else None

        def noted() -> Operator:
            return Operator(name, here, next(self.clock), tensors, versions, out)

        if name == "add":
            self.record.sums.append(noted())
        elif name in _ACTIVATION_OPERATORS and not any(is_activation(c.module) for c in self.stack):
            self.record.functions.append(noted())
        elif name in _POOLING_OPERATORS and _is_global(tensors[0], out):
            self.record.pools.append(noted())
        return out


def _is_global(x: Tensor, out: Tensor) -> bool:
    """[B, C, H, W], [B, H, W, C] or [B, N, C] → one number per sample and channel, its axes of extent 1 kept or not."""
    if x.dim() not in (3, 4) or out.dim() not in (2, x.dim()):
        return False
    first = x.dim() == 4 and out.shape[:2] == x.shape[:2] and out.numel() == x.shape[0] * x.shape[1]
    last = out.shape[0] == x.shape[0] and out.shape[-1] == x.shape[-1] and out.numel() == x.shape[0] * x.shape[-1]
    return first or last


@contextlib.contextmanager
def undisturbed(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Evaluation mode without gradients; flags and random generators are restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    devices = [example.device] if example.device.type == "cuda" else []
    # inference tensors carry no version counter, and versions are how modification is seen
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Send one example through the network and note what happens.

    Args:
        model: left exactly as it was.
        example: normalized images ``[B, 3, H, W]`` on the model's device; one or two are enough.

    Raises:
        RequestError: the network cannot run on this example.
    """
    record = Trace(input=example)
    stack: list[Call] = []
    counts: dict[nn.Module, int] = {}
    clock = iter(range(1 << 62))

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            index = counts.get(module, 0)
            counts[module] = index + 1
            first = args[0] if args and isinstance(args[0], Tensor) else None
            stack.append(Call(path, module, index, stack[-1] if stack else None, next(clock), first))

        return hook

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        call.output = output
        call.version = output._version if isinstance(output, Tensor) else 0
        record.calls.append(call)

    with contextlib.ExitStack() as undo, undisturbed(model, example):
        for path, module in model.named_modules():
            undo.callback(module.register_forward_pre_hook(enter(path)).remove)
            # prepended, so that the output is seen before another hook could replace it
            undo.callback(module.register_forward_hook(leave, prepend=True).remove)
        try:
            with _Watch(record, stack, clock):
                record.output = model(example)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RequestError(
                f"{type(model).__name__} cannot run on an example of shape {list(example.shape)}: {lines[0][:300]}"
            ) from error
    return record
