"""How far are the eager CPU paths from the best of `torch.compile`?

Forward and backward with u8 codes (and a margin where there is one), for an upstream gradient of 1 as `loss.backward()`
gives it, in nanoseconds per element. Eager and compiled alternate in one process and the least of all rounds counts,
because other work on a machine only ever adds. Results are compared with each other first. The compiled form is the
public function's own: while it is traced it shows the compiler its plain formulas.

    python bench/bench_cpu_losses.py [--only encode ...] [--rounds 15] [--threads 1 2] [--tiny]

The last line of stdout is one JSON document. It needs a C++ compiler, except with --tiny.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from inputs import random_codes, random_map
from torch import Tensor

from feedfast_kernels import (
    Codes,
    connector_partial_l2,
    decode,
    encode,
    ensemble_kl,
    locality,
    normalized_l1,
    partial_l2,
)

Shape = tuple[int, ...]
Case = tuple[Callable[[], Any], list[Tensor], int]  # what is called, what gets gradients, elements
WIDE = [(128, 32, 32, 32), (128, 128, 8, 8), (32, 256, 28, 28)]
TEACHERS = 5
CPU = torch.device("cpu")


def feature_map(shape: Shape, dtype: torch.dtype) -> Tensor:
    return random_map(shape, dtype, "NHWC", CPU, seed=0)


def some_codes(shape: Shape, seed: int = 1) -> tuple[Codes, Tensor]:
    """Codes, and a margin."""
    return random_codes(shape, "u8", CPU, seed), torch.full((shape[1],), -0.5)


def of_partial_l2(shape: Shape, dtype: torch.dtype) -> Case:
    codes, margin = some_codes(shape)
    s = feature_map(shape, dtype).requires_grad_()
    return lambda: partial_l2(s, codes, margin_C=margin), [s], s.numel()


def of_connector_partial_l2(shape: Shape, dtype: torch.dtype) -> Case:
    codes, margin = some_codes(shape)
    leaves = [feature_map(shape, dtype), 0.5 + torch.rand(shape[1]), torch.randn(shape[1])]
    y, gamma, beta = (x.requires_grad_() for x in leaves)
    return lambda: connector_partial_l2(y, codes, gamma, beta, margin_C=margin), leaves, y.numel()


def of_normalized_l1(shape: Shape, dtype: torch.dtype) -> Case:
    codes = [some_codes(shape, seed)[0] for seed in range(TEACHERS)]
    maps = [feature_map(shape, dtype).requires_grad_() for _ in codes]
    return lambda: normalized_l1(maps, codes, reduction="mean", weight=500.0), maps, TEACHERS * maps[0].numel()


def of_ensemble_kl(shape: Shape, dtype: torch.dtype) -> Case:
    logits = torch.randn(shape).to(dtype).requires_grad_()
    teachers, labels = [torch.randn(shape).half() for _ in range(3)], torch.randint(shape[1], shape[:1])
    return lambda: ensemble_kl(logits, teachers, tau=4.0, labels=labels), [logits], logits.numel()


def of_locality(shape: Shape, dtype: torch.dtype) -> Case:
    codes, _ = some_codes(shape)
    s = feature_map(shape, dtype).requires_grad_()
    return lambda: locality(s, codes, k=5), [s], s.numel()


def of_encode(shape: Shape, dtype: torch.dtype) -> Case:
    codes, margin = some_codes(shape)
    x = feature_map(shape, dtype)
    return lambda: encode(x, codes.offset, codes.step, codec="u8", margin_C=margin), [], x.numel()


def of_decode(shape: Shape, dtype: torch.dtype) -> Case:
    codes, _ = some_codes(shape)
    return lambda: decode(codes, dtype), [], codes.data.numel()


CASES: dict[str, tuple[Callable[[Shape, torch.dtype], Case], list[Shape], Shape]] = {  # the last is for --tiny
    "partial_l2": (of_partial_l2, WIDE, (2, 8, 4, 4)),
    "connector_partial_l2": (of_connector_partial_l2, WIDE, (2, 8, 4, 4)),
    "normalized_l1": (of_normalized_l1, [(128, 64, 8, 8), (32, 2048, 7, 7)], (2, 8, 4, 4)),
    "ensemble_kl": (of_ensemble_kl, [(128, 100), (128, 1000)], (3, 7)),
    "locality": (of_locality, [(128, 64, 8, 8), (128, 2048, 7, 7)], (7, 8, 2, 2)),
    "encode": (of_encode, WIDE, (2, 8, 4, 4)),
    "decode": (of_decode, WIDE, (2, 8, 4, 4)),
}


def fastest_ns(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    least = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            start = time.perf_counter_ns()
            call()
            least[index] = min(least[index], time.perf_counter_ns() - start)
    return least


def step(call: Callable[[], Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    result = call()
    if leaves:
        result.backward()
        return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return list(result) if isinstance(result, tuple) else [result]


def measure(case: Case, rounds: int, backend: str) -> dict[str, float]:
    eager, leaves, elements = case
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
    calls = [partial(step, call, leaves) for call in (eager, compiled)]
    results = [call() for call in calls]
    for ours, theirs in zip(*results, strict=True):
        # not element by element: of three million signs in normalized_l1's gradient a rounding tips about six
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        if not error < 1e-2:
            raise SystemExit(f"eager and compiled results differ by {error:.1e} of their norm")
    ns = [each / elements for each in fastest_ns(calls, rounds)]
    return {"eager": round(ns[0], 2), "compiled": round(ns[1], 2), "ratio": round(ns[0] / ns[1], 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true", help="one small map, traced but not compiled")
    options = parser.parse_args(arguments)
    before, document = torch.get_num_threads(), {}
    try:
        for name in options.only:
            make, shapes, tiny = CASES[name]
            for shape in [tiny] if options.tiny else shapes:
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    for dtype in (torch.float32, torch.bfloat16):
                        torch.manual_seed(0)
                        row = measure(make(shape, dtype), options.rounds, "aot_eager" if options.tiny else "inductor")
                        label = str(dtype).removeprefix("torch.")
                        key = f"{name}, {'x'.join(map(str, shape))}, {threads} thread(s), {label}"
                        document[key] = row
                        print(key, row, file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
    print(json.dumps({"torch": torch.__version__, "ns_per_element": document}))


if __name__ == "__main__":
    main()
