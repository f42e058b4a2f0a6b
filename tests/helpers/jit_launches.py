"""Bind the launches of tools/launches.py as Triton's JIT does on a GPU, without one; compare with the compile report.

`JITFunction.warmup` binds, specializes and compiles, and starts nothing; all it asks of a driver is the architecture.
Prints one JSON document: how many launches were compared, and the names of those whose argument types or alignments
are not what tools/compile_report.py compiled.

    python tests/helpers/jit_launches.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compile_report
import torch
from launches import cases
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Hopper:
    """The answers of a driver that has one H100 or H200."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def real(value: Any) -> Any:
    """Memory in place of a meta tensor: the JIT looks at addresses."""
    if isinstance(value, tuple):
        return tuple(real(x) for x in value)
    return torch.empty(16, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def main() -> None:
    driver.set_active(Hopper())
    seen, different = set(), []
    for case in cases(quick=True):
        launch = case.launch
        # one launch a kernel and set of absent arguments
        kind = (launch.kernel.__name__, case.operation, *(k for k, v in launch.arguments.items() if v is None))
        if kind in seen:
            continue
        seen.add(kind)
        arguments = {name: real(value) for name, value in launch.arguments.items()}
        options = {"num_warps": launch.warps, "enable_fp_fusion": False, "grid": launch.grid}
        bound = launch.kernel.warmup(**arguments, **launch.constants, **options).src
        reported = compile_report.source_of(launch)
        aligned = [{key: value for key, value in source.attrs.items() if value} for source in (bound, reported)]
        if dict(bound.signature) != dict(reported.signature) or aligned[0] != aligned[1]:
            different.append(case.name)
    print(json.dumps({"compared": len(seen), "different": different}))


if __name__ == "__main__":
    main()
