"""Every kernel in both directions at small odd shapes: what compute-sanitizer runs over, and a check without it.

    python tools/sanitize_kernels.py                                          each call checked against float64
    compute-sanitizer --tool memcheck python tools/sanitize_kernels.py --no-check
    python tools/sanitize_kernels.py --device cpu                             in Triton's interpreter

The calls are those of the benches' tiny settings, so every operation that has a bench is here. Each runs as it is and
once more with every kernel's FEW_TILES lowered to 2, so that programs of several tiles run, too. Under memcheck set
PYTORCH_NO_CUDA_MEMORY_CACHING=1: an allocation that PyTorch rounds up hides a kernel that goes too far.

Messages go to stderr; the last line of stdout is one JSON document. Exit code 1 if a call failed or was wrong, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_check import BENCHES  # next to this file

ROOT = Path(__file__).parents[1]


@contextmanager
def many_tiles(modules: Sequence[Any]) -> Iterator[None]:
    """Make every kernel take several tiles per program, whatever the size."""
    had = {module: module.FEW_TILES for module in modules if hasattr(module, "FEW_TILES")}
    for module in had:
        module.FEW_TILES = 2
    try:
        yield
    finally:
        for module, value in had.items():
            module.FEW_TILES = value


def quiet(device: Any) -> AbstractContextManager[Any]:
    """No warnings of NumPy, which computes the kernels in the interpreter and need not be there on a GPU."""
    if device.type == "cuda":
        return nullcontext()
    import numpy as np

    return np.errstate(all="ignore")


def drive(device: Any, check: bool) -> tuple[int, list[str]]:
    """Call everything once; how many calls there were, and what went wrong."""
    import measure
    import torch

    calls, wrong = 0, []
    for name in BENCHES:
        if not (ROOT / "bench" / f"bench_{name}.py").is_file():
            continue
        bench: Any = importlib.import_module(f"bench_{name}")
        for setting in bench.settings(True):
            what = " ".join((setting.operation, setting.shape, setting.dtype, setting.codec, setting.layout))
            try:
                work = setting.build(device)
                call = work.calls[measure.OURS]
                with quiet(device):
                    results = measure.outcome(call, work.leaves)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                # the interpreter truncates to bf16 where a GPU rounds, so there nothing is exact
                exact = call.tolerance if device.type == "cuda" else replace(call.tolerance, gradient=None)
                reason = measure.wrong(results, call.expected(), exact) if check else ""
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            calls += 1
            if reason:
                wrong.append(f"{what}: {reason}")
            print(f"{what}: {reason or 'ok'}", file=sys.stderr, flush=True)
    return calls, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-check", action="store_true", help="run the kernels and compare nothing")
    args = parser.parse_args(argv)
    if args.device == "cpu":  # before triton is imported: its decorators bind then
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels")]
    import torch

    from feedfast_kernels import _ops

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; --device cpu runs in Triton's interpreter", file=sys.stderr)
        return 2
    before = _ops.INTERPRET
    _ops.INTERPRET = args.device == "cpu"
    folder = ROOT / "kernels/feedfast_kernels/gpu"
    modules = [
        importlib.import_module(f"feedfast_kernels.gpu.{path.stem}") for path in sorted(folder.glob("[a-z]*.py"))
    ]
    device = torch.device(args.device)
    try:
        calls, wrong = drive(device, not args.no_check)
        with many_tiles(modules):
            more, also = drive(device, not args.no_check)
    finally:
        _ops.INTERPRET = before
    print(
        json.dumps({"device": args.device, "calls": calls + more, "checked": not args.no_check, "wrong": wrong + also})
    )
    return 1 if wrong or also else 0


if __name__ == "__main__":
    sys.exit(main())
