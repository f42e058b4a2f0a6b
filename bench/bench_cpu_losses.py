"""How far are the eager CPU paths of `partial_l2` and `connector_partial_l2` from the best of `torch.compile`?

Forward and backward with u8 codes, a margin and an upstream gradient of 0.37, in nanoseconds an element. Eager and
compiled alternate in one process and the least of all rounds counts, because other work on a machine only ever adds.
Losses are compared with each other first. The compiled form is the public function's own: while it is traced it shows
the compiler its plain formulas.

    python bench/bench_cpu_losses.py [--rounds 15] [--threads 1 2] [--tiny]

The last line of stdout is one JSON document. It needs a C++ compiler, except with --tiny.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from feedfast_kernels import Codes, connector_partial_l2, encode, partial_l2

SHAPES = [(128, 32, 32, 32), (128, 128, 8, 8), (32, 256, 28, 28)]
UPSTREAM = 0.37


def fastest_ns(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    least = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for index, call in enumerate(calls):
            start = time.perf_counter_ns()
            call()
            least[index] = min(least[index], time.perf_counter_ns() - start)
    return least


def step(loss_of: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    loss = loss_of()
    loss.backward(torch.tensor(UPSTREAM))
    return loss.detach()


def measure(shape: tuple[int, ...], dtype: torch.dtype, rounds: int, backend: str) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    channels = shape[1]
    student, teacher = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    offset, width, margin = torch.full((channels,), -2.0), torch.full((channels,), 0.02), torch.full((channels,), -0.5)
    codes = Codes(encode(teacher, offset, width, codec="u8")[0], offset, width, "u8")
    leaves = [student.to(dtype), 0.5 + torch.rand(channels), torch.randn(channels)]
    s, gamma, beta = (x.requires_grad_() for x in leaves)
    losses: dict[str, Callable[[], Tensor]] = {
        "partial_l2": lambda: partial_l2(s, codes, margin_C=margin),
        "connector_partial_l2": lambda: connector_partial_l2(s, codes, gamma, beta, margin_C=margin),
    }
    rows = {}
    for name, eager in losses.items():
        torch._dynamo.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
        calls = [partial(step, loss_of, leaves) for loss_of in (eager, compiled)]
        values = [call() for call in calls]
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)
        ns = [each / s.numel() for each in fastest_ns(calls, rounds)]
        rows[name] = {"eager": round(ns[0], 2), "compiled": round(ns[1], 2), "ratio": round(ns[0] / ns[1], 2)}
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true", help="one small map, traced but not compiled")
    options = parser.parse_args(arguments)
    before, document = torch.get_num_threads(), {}
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for shape in [(2, 8, 4, 4)] if options.tiny else SHAPES:
                for dtype in (torch.float32, torch.bfloat16):
                    rows = measure(shape, dtype, options.rounds, "aot_eager" if options.tiny else "inductor")
                    key = f"{threads} thread(s), {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
                    document[key] = rows
                    print(key, rows, file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
    print(json.dumps({"torch": torch.__version__, "ns_per_element": document}))


if __name__ == "__main__":
    main()
