"""What the benches of the kernels share: check, then time, then one row; and the command line around it.

A bench names its `Setting`s: an operation at a shape, and who computes it (`variants`). `build` makes the tensors and,
for every variant, a `Call`: what to run, and what must come out. Then, for each variant:

1. **Check.** Values and gradients are compared with the float64 reference. A variant that is wrong gets no number; its
   rows say why. A NaN is wrong.
2. **Time.** Events on the device around one call, after a buffer four times the L2 was written, so that nothing the
   call reads is in a cache. Before the first event the device waits for as long as the host needs to launch the call:
   what is timed is the device, also where it is faster than Python. How long the host took is in the note.
   Median, 20th and 80th percentile. `forward` builds the graph as training does; `backward` runs after a forward pass
   that is not timed; `both` is one after the other. The upstream gradient is 0.37, known to the device only: nothing
   can be skipped for a gradient of 1. Data is random, never zeros, which some hardware reads faster.
3. **Set against a copy.** `bytes` is what the operation must move, each input read once and each result written once,
   counted in each bench's `build`; vectors of one value per channel are left out. It is the operation's number, not
   the variant's: GB/s of a variant that moves more is that much lower. `percent_of_copy` is the time of a device copy
   of as many bytes (half read, half written), cold as well and in the same process, over the variant's time.

`peak_bytes` is the most that was allocated beyond what was there before the forward pass (inputs, and buffers of the
bench). Rows come in order of importance: `feedfast` and the copy at all shapes, then what it is compared with, then
`torch.compile` at its slowest to build. When `--seconds` are over, what is left becomes rows that say so.

What it does not do: touch clocks or power limits, or draw (plot_kernels.py does, from the rows).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rows import HEAD, RESULTS, Row, append, environment, gbps, line, percentile
from torch import Tensor

DIRECTIONS = ("forward", "backward", "both")
UPSTREAM = 0.37
OURS, COPY = "feedfast", "copy"
COMPILED = {
    "compile default": None,
    "compile gathered": None,
    "compile max-autotune": "max-autotune-no-cudagraphs",
}
LATER = {"composite eager": 2, "compile max-autotune": 3}  # everything else but ours and the copy is 1
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result, half a last place


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a result may be from float64.

    Attributes:
        value: relative, of a loss.
        gradient: of a gradient's element, times its size plus the root mean square of all; None follows the dtype.
        share: of the elements that may be off nevertheless, where a rounding decides between two results: signs at a
            tie, codes half way between two integers.
        vector: in place of ``gradient`` for vectors, which are sums over many elements.
    """

    value: float = 1e-5
    gradient: float | None = None
    share: float = 0.0
    vector: float = 1e-4


@dataclass(frozen=True, slots=True)
class Call:
    """One way of computing the operation.

    Attributes:
        function: called with the arguments; gives the loss or, where there is no gradient, a tensor or several.
        arguments: by position.
        expected: the loss and the gradients, or the results, in float64.
        tolerance: how far off it may be.
        note: goes into the rows.
        graph: capture forward and backward in one CUDA graph and time its replay.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: Tolerance = Tolerance()
    note: str = ""
    graph: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """The tensors of one setting.

    Attributes:
        leaves: receive gradients; none where the operation has no backward pass.
        bytes: what must be moved, by direction.
        calls: by variant.
    """

    leaves: list[Tensor]
    bytes: dict[str, int]
    calls: dict[str, Call]


@dataclass(frozen=True, slots=True)
class Setting:
    """An operation at a shape, before anything is allocated."""

    operation: str
    shape: str
    dtype: str
    codec: str
    layout: str
    build: Callable[[torch.device], Work]
    variants: tuple[str, ...]
    directions: tuple[str, ...] = DIRECTIONS


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a call, in milliseconds on the device, and what the host needed to launch it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_us: float | None = None


class TimeIsUpError(BaseException):
    """The time budget is spent; not an Exception, so that nobody on the way takes it for an error of his own."""


@dataclass(slots=True)
class Bench:
    """Times calls on one device.

    Attributes:
        device: where.
        tiny: few repetitions, and nothing is compiled.
    """

    device: torch.device
    tiny: bool = False
    flush: Tensor = field(init=False)
    copies: dict[int, Timing] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size
        else:
            size = 1 << 16 if self.tiny else 64 << 20
        self.flush = torch.empty(max(size, 1 << 16) // 4, dtype=torch.int32, device=self.device)

    def time(self, run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Timing:
        """Median and percentiles of ``run(prepare())``, where only ``run`` is timed."""
        once = self._once_cuda if self.device.type == "cuda" else self._once_cpu
        first, host = once(run, prepare, 1e-3)  # also the warm-up, after the check's
        wait = min(max(2 * host, 1e-4), 20e-3)
        enough = 3 if self.tiny else int(min(max(0.15 / (first + wait + 1e-4), 10), 100))
        pairs = [once(run, prepare, wait) for _ in range(enough)]
        times = [1e3 * seconds for seconds, _ in pairs]
        host_us = 1e6 * statistics.median(host for _, host in pairs) if self.device.type == "cuda" else None
        return Timing(statistics.median(times), percentile(times, 0.2), percentile(times, 0.8), host_us)

    def _once_cuda(self, run: Callable[[Any], Any], prepare: Callable[[], Any], wait: float) -> tuple[float, float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = prepare()
        self.flush.add_(1)
        torch.cuda._sleep(int(wait * 2e9))  # cycles of about 2 GHz
        start.record()
        begin = time.perf_counter()
        kept = run(ready)
        host = time.perf_counter() - begin
        stop.record()
        torch.cuda.synchronize(self.device)
        del kept, ready
        return start.elapsed_time(stop) / 1e3, host

    def _once_cpu(self, run: Callable[[Any], Any], prepare: Callable[[], Any], _wait: float) -> tuple[float, float]:
        ready = prepare()
        self.flush.add_(1)
        begin = time.perf_counter()
        run(ready)
        return time.perf_counter() - begin, 0.0

    def copy(self, size: int) -> Timing:
        """A copy that reads half of ``size`` bytes and writes the other half."""
        if size not in self.copies:
            source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device=self.device).random_(255)
            into = torch.empty_like(source)
            self.copies[size] = self.time(lambda _: into.copy_(source))
        return self.copies[size]

    def warm_up(self, seconds: float = 0.5) -> None:
        """Copy for that long, so that the clocks are up."""
        begin = time.perf_counter()
        while self.device.type == "cuda" and time.perf_counter() - begin < seconds:
            self.flush.add_(1)
            torch.cuda.synchronize(self.device)

    def peak(self, run: Callable[[Any], Any], prepare: Callable[[], Any]) -> int | None:
        """Most bytes allocated while ``run`` runs, beyond what there was before ``prepare``."""
        if self.device.type != "cuda":
            return None
        gc.collect()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        ready = prepare()
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = run(ready)
        torch.cuda.synchronize(self.device)
        del kept, ready
        return torch.cuda.max_memory_allocated(self.device) - before


def outcome(call: Call, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients, or the results of a call without any."""
    value = call.function(*call.arguments)
    if not leaves:
        return list(value) if isinstance(value, (tuple, list)) else [value]
    upstream = torch.full((), UPSTREAM, dtype=value.dtype, device=value.device)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def exact(function: Callable[..., Tensor], students: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients of ``function(*students)`` in float64."""
    leaves = [student.detach().double().requires_grad_() for student in students]
    loss = function(*leaves)
    upstream = torch.full((), UPSTREAM, dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def wrong(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: Tolerance) -> str:
    """Empty where the results are right, else what is not."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for index, (got, exact_one) in enumerate(zip(actual, expected, strict=True)):
        want = exact_one.double() if got.is_floating_point() else exact_one
        if got.shape != want.shape:
            return f"result {index} has the shape {list(got.shape)} instead of {list(want.shape)}"
        if not got.is_floating_point():
            bad, bound = got != want, f"share {tolerance.share:g}"
            if got.ndim == 0 and abs(int(got) - int(want)) <= tolerance.share * abs(int(want)):
                continue
        elif got.ndim == 0:
            bad = ~((got.double() - want).abs() <= tolerance.value * want.abs())  # a NaN is not <= anything
            bound = f"relative {tolerance.value:g}"
        else:
            relative = tolerance.gradient
            if relative is None:
                # on a CPU a 16-bit gradient is kept from forward on and rounded again after the upstream gradient,
                # and Triton's interpreter truncates
                twice = got.device.type == "cpu" and got.dtype != torch.float32
                relative = ROUNDING[got.dtype] * (2 if twice else 1)
            relative = tolerance.vector if got.ndim == 1 else relative
            error = (got.double() - want).abs()
            bad = ~(error <= relative * 1.01 * (want.abs() + want.square().mean().sqrt()))
            bound = f"relative {relative:g}"
        count = int(bad.sum())
        if count > tolerance.share * bad.numel():
            where = tuple(bad.nonzero()[0].tolist())
            return (
                f"result {index} differs in {count} of {bad.numel()} values ({bound}); "
                f"at {where} {got[where].item():.7g}, expected {want[where].item():.7g}"
            )
    return ""


def compiled(call: Call, mode: str | None, backend: str = "inductor") -> Call:
    """The call through `torch.compile`: one graph, for this shape alone."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {"backend": backend}
    function = torch.compile(call.function, fullgraph=True, dynamic=False, **options)
    return Call(function, call.arguments, call.expected, call.tolerance, call.note)


def captured(call: Call, leaves: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Forward and backward in one CUDA graph, and the tensors a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            outcome(call, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = outcome(call, leaves)
    return graph, results


def measure(setting: Setting, variant: str, work: Work, bench: Bench, about: dict[str, str]) -> Iterator[Row]:
    """The rows of one variant: checked, then timed, one direction after the other."""
    what = {key: getattr(setting, key) for key in ("operation", "shape", "dtype", "codec", "layout")}

    def row(direction: str, timing: Timing, peak: int | None, note: str) -> Row:
        size = work.bytes[direction]
        if timing.host_us is not None:
            note = "; ".join([*filter(None, [note]), f"host {timing.host_us:.0f} us"])
        return Row(
            **about, **what, variant=variant, direction=direction, median_ms=timing.median_ms, p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms, bytes=size, gbps=gbps(size, timing.median_ms),
            percent_of_copy=100 * bench.copy(size).median_ms / timing.median_ms, peak_bytes=peak, note=note,
        )  # fmt: skip

    def none(reason: str, directions: Iterable[str]) -> Iterator[Row]:
        for direction in directions:
            yield Row(**about, **what, variant=variant, direction=direction, note=reason)

    if variant == COPY:
        for direction in setting.directions:
            yield row(direction, bench.copy(work.bytes[direction]), None, "half read, half written")
        return
    call = work.calls[variant]
    directions = ("both",) if call.graph else setting.directions
    if variant in COMPILED:
        if bench.tiny:
            yield from none("skipped: --tiny compiles nothing", directions)
            return
        if bench.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            yield from none("skipped: torch.compile needs a C++ compiler here, and there is none", directions)
            return
        call = compiled(call, COMPILED[variant])
    if call.graph:
        if bench.device.type != "cuda":
            yield from none("skipped: CUDA graphs need a GPU", directions)
            return
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph, results = captured(call, work.leaves)
        peak = torch.cuda.max_memory_allocated() - before
        for result in results:
            result.fill_(float("nan"))  # a replay that writes nothing is found out
        graph.replay()
        if reason := wrong(results, call.expected(), call.tolerance):
            yield from none(f"wrong: {reason}", directions)
            return
        yield row("both", bench.time(lambda _: graph.replay()), peak, call.note)
        return
    if reason := wrong(outcome(call, work.leaves), call.expected(), call.tolerance):
        yield from none(f"wrong: {reason}", directions)
        return

    def forward(_: Any = None) -> Any:
        return call.function(*call.arguments)

    def backward(loss: Tensor) -> Any:
        return torch.autograd.grad(loss, work.leaves, upstream)

    upstream = torch.full((), UPSTREAM, device=bench.device)
    runs: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
        "forward": (forward, lambda: None),
        "backward": (backward, forward),
        "both": (lambda _: backward(forward()), lambda: None),
    }
    for direction in directions:
        run, prepare = runs[direction]
        yield row(direction, bench.time(run, prepare), bench.peak(run, prepare), call.note)


def run(settings: Sequence[Setting], bench: Bench, seconds: float, say: Callable[[Row], None]) -> list[Row]:
    """All rows, the important ones first; what there is no time for gets rows that say so."""
    about, rows = environment(bench.device), []
    ranks = sorted({_rank(variant) for setting in settings for variant in setting.variants})
    jobs = [
        (setting, chosen)
        for rank in ranks
        for setting in settings
        if (chosen := tuple(v for v in setting.variants if _rank(v) == rank))
    ]
    done: set[tuple[int, str]] = set()

    def keep(row: Row) -> None:
        rows.append(row)
        say(row)

    def give_up(setting: Setting, variants: Iterable[str], reason: str) -> None:
        what = {key: getattr(setting, key) for key in ("operation", "shape", "dtype", "codec", "layout")}
        for variant in variants:
            if (id(setting), variant) in done:
                continue
            done.add((id(setting), variant))
            had = {r.direction for r in rows if r.variant == variant and all(getattr(r, k) == what[k] for k in what)}
            for direction in ("both",) if variant.endswith("graph") else setting.directions:
                if direction not in had:
                    keep(Row(**about, **what, variant=variant, direction=direction, note=reason))

    try:
        with alarm(seconds):
            for setting, variants in jobs:
                try:
                    work = setting.build(bench.device)
                except Exception as error:
                    give_up(setting, variants, f"failed: {_first_line(error)}")
                    continue
                for variant in variants:
                    try:
                        for row in measure(setting, variant, work, bench, about):
                            keep(row)
                    except Exception as error:
                        give_up(setting, (variant,), f"failed: {_first_line(error)}")
                    done.add((id(setting), variant))
                del work
                gc.collect()
    except TimeIsUpError:
        for setting, variants in jobs:
            give_up(setting, variants, f"skipped: the time budget of {seconds:g} s was spent")
    return rows


def _rank(variant: str) -> int:
    return 0 if variant in (OURS, COPY) else LATER.get(variant, 1)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


@contextmanager
def alarm(seconds: float, again: float = 5.0) -> Iterator[None]:
    """Raise `TimeIsUpError` after that time, also in the middle of a compilation; 0 is never.

    And ``again`` after so many seconds more: what is raised while Python calls a finalizer is only printed.
    """

    def ring(*_: Any) -> None:
        raise TimeIsUpError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def main(settings: Callable[[bool], list[Setting]], doc: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a bench; 1 where `feedfast` was wrong or failed, 2 where there is no such device."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, three repetitions, nothing compiled")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop measuring after that time (default 0: never)")
    parser.add_argument("--only", default="", help="comma-separated variants (default all)")
    parser.add_argument("--shape", default="", help="only shapes that contain this text (default all)")
    parser.add_argument("--out", type=Path, help=f"append the rows to this file, e.g. {RESULTS.name} (default: do not)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; --tiny --device cpu runs without", file=sys.stderr)
        return 2
    chosen = []
    only = [variant.strip() for variant in args.only.split(",") if variant.strip()]
    for setting in settings(args.tiny):
        variants = tuple(v for v in setting.variants if not only or v in only)
        if variants and args.shape in setting.shape:
            values = {key.name: getattr(setting, key.name) for key in fields(setting)}
            chosen.append(Setting(**{**values, "variants": variants}))
    print(HEAD, file=sys.stderr)

    def say(row: Row) -> None:
        if args.out is not None:
            append([row], args.out)  # at once: what was measured outlives a bench that is killed
        print(line(row), file=sys.stderr, flush=True)

    begin = time.perf_counter()
    bench = Bench(device, args.tiny)
    bench.warm_up()
    rows = run(chosen, bench, args.seconds, say)
    bad = [row for row in rows if row.note.startswith(("wrong", "failed"))]
    document = {
        "seconds": round(time.perf_counter() - begin, 1),
        "measured": sum(row.median_ms is not None for row in rows),
        "skipped": sum(row.note.startswith("skipped") for row in rows),
        "wrong_or_failed": len(bad),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(document))
    return 1 if any(row.variant.startswith(OURS) for row in bad) else 0
