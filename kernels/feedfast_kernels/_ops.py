"""Where an operation runs, and how its Triton half is made known to PyTorch.

A launch is registered as an operator of its own, `torch.ops.feedfast_kernels.<name>`, with a shape function. Then
`torch.compile` sees one node whose outputs it knows and does not look inside. Gradients are those of the
`autograd.Function` around the operators.

On a CPU there is no operator in the way: eager mode runs the tiled PyTorch code, and a compiler fuses it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

NAMESPACE = "feedfast_kernels"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
OPS: Any = getattr(torch.ops, NAMESPACE)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = False  # tests set this to run the kernels on CPU tensors, in Triton's interpreter


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``: on CUDA and not float64, which is for gradient checks."""
    return (x.is_cuda or INTERPRET) and HAS_TRITON and x.dtype != torch.float64


def register(schema: str, launch: str, fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.feedfast_kernels.<name>``.

    Args:
        schema: name, arguments and results, as in ``"f(Tensor x, float a) -> Tensor"``.
        launch: ``"module.function"`` below ``feedfast_kernels.gpu``, which allocates the results and starts the
            kernels; called with the schema's arguments by position. Imported on the first call.
        fake: allocates the results and nothing else.
    """
    name = schema.split("(")[0]
    module, function = launch.split(".")

    def start(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"feedfast_kernels.gpu.{module}"), function)(*arguments)

    # not `triton_op`, which refuses to run under Triton's interpreter and so could not be tested without a GPU; not
    # `custom_op`: 36 microseconds on the host per eager call against 6
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, start, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def first_order_only(name: str, otherwise: str = "for second ones use float64 or `reference`") -> None:
    """Raise where a backward pass is itself recorded: a kernel's gradient would be a constant to autograd, silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(f"{name}: expected a first derivative; {otherwise}")


MemoryFormat = Literal["channels_last", "contiguous", "strided"]


def memory_format_of(x: Tensor) -> MemoryFormat:
    """The memory format of a map, ``"strided"`` if it has neither of PyTorch's two; dense vectors are channels-last."""
    if x.ndim == 2:
        return "channels_last" if x.is_contiguous() else "strided"
    # a map with one channel or one pixel is both; channels-last has the wider tiles
    if x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous" if x.is_contiguous() else "strided"


def dense(x: Tensor) -> Tensor:
    """``x``, or a channels-last copy of a strided map."""
    if memory_format_of(x) != "strided":
        return x
    return x.contiguous() if x.ndim == 2 else x.contiguous(memory_format=torch.channels_last)


def dense_target(target: Tensor, codec: str) -> Tensor:
    """Contiguous codes, or a float map (``codec`` is ``"float"``) as `dense` gives it."""
    return dense(target) if codec == "float" else target.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """A per-channel vector as kernels read it, or None."""
    return None if x is None else x.contiguous()
