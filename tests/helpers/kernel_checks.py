"""What the tests of every Triton kernel need: memory formats, one backward pass, the tolerance of 16-bit results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def orders(x: Tensor) -> dict[str, Tensor]:
    """The same values as channels-last, contiguous, and as a slice that is neither."""
    if x.ndim != 4:
        wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype, device=x.device)
        wide[:, ::2] = x
        return {"contiguous": x.contiguous(), "sliced": wide[:, ::2]}
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "contiguous": x.contiguous(),
        "sliced": wide[..., ::2],
    }


def run(
    loss_of: Callable[..., Tensor], leaves: Sequence[Tensor], grad_output: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of ``loss_of(*leaves)`` for an upstream gradient that only the device knows."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = loss_of(*leaves)
    loss.backward(torch.tensor(grad_output, device=loss.device, dtype=loss.dtype))
    gradients = [x.grad for x in leaves]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


def captured(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """The CUDA graph of ``step()``, and the results that a replay writes.

    It runs once on another stream, so that inside the capture nothing is compiled, loaded or set up.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """A 16-bit result may be off by one rounding of the exact value.

    The interpreter truncates to bf16 instead of rounding (2^-7 instead of 2^-8), so it is given twice as much.
    """
    eps = torch.finfo(actual.dtype).eps
    bound = eps / 2 if actual.is_cuda else eps
    least = torch.finfo(actual.dtype).smallest_normal
    torch.testing.assert_close(actual.double(), exact.double(), rtol=bound * 1.01, atol=least)
