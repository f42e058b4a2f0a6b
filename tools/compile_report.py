"""What the compiler makes of every kernel, for GPUs that are not here: registers, stack, spills, access widths.

Each operation plans its launches from meta tensors of the shapes real networks have, exactly as it does from real ones,
and Triton compiles them for sm_80, sm_90 and sm_100. Numbers come from the machine code, read with the disassembler in
Triton's wheel:

    regs        registers per thread; with the warps and the shared memory they bound how many programs fit
    stack       bytes of local memory per thread; 0, or the kernel spills
    spills      loads and stores of local memory (LDL, STL)
    load, store bits of the widest access to global memory; 128 is the most a thread can ask for
    wide        share of the loaded bytes that 128-bit loads bring
    narrow      accesses to global memory of 8 or 16 bits: a stream that was not vectorized, or upper bits of u6 or u5
    sass/el     instructions executed for one element of the map: all of them over all elements; where there is a loop,
                those of its largest body over the elements whose bytes it loads
    occupancy   warps that fit on a multiprocessor, of the most

    python tools/compile_report.py [--arch 90 ...] [--op partial_l2 ...] [--match REGEX] [--quick] [--jobs 2]

A table goes to stderr; the last line of stdout is one JSON document. What this cannot see: time, races, alignment that
the caller does not deliver.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import repeat
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a decorator binds to the interpreter for good
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

import torch
import triton
from launches import Case, cases  # next to this file
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from feedfast_kernels.gpu.launch import Launch

POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# a multiprocessor holds so many registers, bytes of shared memory, warps and programs (CUDA programming guide)
LIMITS = {80: (65536, 164 << 10, 64, 32), 90: (65536, 228 << 10, 64, 32), 100: (65536, 228 << 10, 64, 32)}


@dataclass(frozen=True, slots=True)
class Report:
    """What one launch became."""

    name: str
    arch: int
    regs: int
    stack_bytes: int
    spills: int
    widest_load_bits: int
    widest_store_bits: int
    narrow: int
    wide_share: float
    wide: int  # 128-bit loads, or stores where they are more
    shared_bytes: int
    instructions: int
    sass_per_element: float
    warps: int
    occupancy_warps: int
    most_warps: int


def source_of(launch: Launch) -> ASTSource:
    """The launch as the JIT would specialize it: argument types, 16-byte alignment, integers that are 1."""
    signature: dict[str, Any] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = launch.kernel.arg_names
    for name in names:
        index = names.index(name)
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(value, tuple):
            signature[name] = tuple(POINTER[x.dtype] if x is not None else "constexpr" for x in value)
            for position, x in enumerate(value):
                if x is not None:
                    attributes[(index, position)] = [["tt.divisibility", 16]]
                else:
                    constants[(index, position)] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code of one binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED):(\d+)", usage.stdout + usage.stderr)}
    return numbers, sass


def access_bits(sass: str, kind: str) -> list[int]:
    """Bits of every LDG or STG, and a 0 in front."""
    widths = [0]
    for modifiers in re.findall(rf"\b{kind}(?!\w)((?:\.\w+)*)", sass):
        named = [int(part) for part in modifiers.split(".") if part in ("64", "128", "256")]
        small = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
        widths.append(named[0] if named else next((b for m, b in small.items() if m in modifiers.split(".")), 32))
    return widths


def largest_loop(sass: str) -> list[str]:
    """Lines of the longest stretch that a branch jumps back over without another such stretch inside; [] if none."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z].*)")
    lines = [(int(found[1], 16), found[2]) for found in map(line.search, sass.splitlines()) if found]
    loops = []
    for address, text in lines:
        found = re.match(r"BRA\S*\s.*?(?:`\(|0x)([0-9a-f]+)", text)
        # a jump to itself is the padding behind the exit
        if found and int(found[1], 16) < address:
            loops.append((int(found[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for at, text in lines if start <= at <= end] for start, end in inner]
    return max(bodies, key=len, default=[])


def report(case: Case, arch: int) -> Report:
    """Compile one launch for one architecture and read the result."""
    launch = case.launch
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    binary = triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = disassemble(binary.asm["cubin"])
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    # behind the last exit lie padding and the slow path of divisions, for operands that are not normal numbers
    last_exit = max((at for at, op in enumerate(code) if op.startswith("EXIT")), default=len(code))
    code = [op for op in code[: last_exit + 1] if not op.startswith("NOP")]
    registers, shared, most_warps, most_programs = LIMITS[arch]
    shared_bytes = int(binary.metadata.shared)
    fit = [most_programs, most_warps // launch.warps]
    fit.append(registers // (-(-usage["REG"] * 32 // 256) * 256) // launch.warps)
    if shared_bytes:
        fit.append(shared // (shared_bytes + 1024))
    loads, stores = access_bits(sass, "LDG"), access_bits(sass, "STG")
    threads = prod(launch.grid) * launch.warps * 32
    per_element = len(code) * threads / case.elements
    body = largest_loop(sass)
    if body and case.read_bytes:
        loaded_bytes = sum(access_bits("\n".join(body), "LDG")) / 8
        per_element = len(body) / (loaded_bytes / case.read_bytes)
    return Report(
        name=case.name,
        arch=arch,
        regs=usage["REG"],
        stack_bytes=usage["STACK"],
        spills=sum(op.startswith(("LDL", "STL")) for op in code),
        widest_load_bits=max(loads),
        widest_store_bits=max(stores),
        wide_share=round(sum(bits for bits in loads if bits >= 128) / max(sum(loads), 1), 2),
        wide=max(sum(bits >= 128 for bits in kind) for kind in (loads, stores)),
        narrow=sum(0 < bits < 32 for bits in loads + stores),
        shared_bytes=shared_bytes,
        instructions=len(code),
        sass_per_element=round(per_element, 1),
        warps=launch.warps,
        occupancy_warps=min(fit) * launch.warps,
        most_warps=most_warps,
    )


def numbered_report(number: int, arch: int, quick: bool) -> Report:
    """Report of the launch with that number: a launch cannot be sent to another process."""
    return report(all_cases(quick)[number], arch)


@lru_cache(maxsize=1)
def all_cases(quick: bool) -> list[Case]:
    return list(cases(quick))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--op", nargs="+", help="only these operations")
    parser.add_argument("--match", default="", help="only launches whose name this regular expression is found in")
    parser.add_argument("--quick", action="store_true", help="the shapes that compile differently, once each")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default 1)")
    options = parser.parse_args()
    rows = []
    line = "{:<58} {:>4} {:>5} {:>6} {:>6} {:>5} {:>5} {:>5} {:>6} {:>7} {:>8} {:>6}"
    head = line.format(
        "launch", "arch", "regs", "stack", "spills", "load", "store", "wide", "narrow", "shared", "sass/el", "warps"
    )
    print(head, file=sys.stderr)
    chosen = [
        (number, arch)
        for number, case in enumerate(all_cases(options.quick))
        if (not options.op or case.operation in options.op) and re.search(options.match, case.name)
        for arch in options.arch
    ]
    numbers, archs = zip(*chosen, strict=True) if chosen else ((), ())
    # spawned: a fork would take the threads' locks along
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) if options.jobs > 1 else nullcontext() as pool:
        for number, r in zip(
            numbers, (pool.map if pool else map)(numbered_report, numbers, archs, repeat(options.quick)), strict=True
        ):
            case = all_cases(options.quick)[number]
            rows.append(asdict(r) | {"operation": case.operation, "aligned": case.aligned})
            occupancy = f"{r.occupancy_warps}/{r.most_warps}"
            widths = (r.widest_load_bits, r.widest_store_bits, r.wide_share, r.narrow)
            text = line.format(
                r.name, r.arch, r.regs, r.stack_bytes, r.spills, *widths, r.shared_bytes, r.sass_per_element, occupancy
            )
            print(text, file=sys.stderr, flush=True)
    print(json.dumps({"triton": triton.__version__, "reports": rows}))


if __name__ == "__main__":
    main()
