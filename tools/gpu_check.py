"""Everything that needs a GPU, one part after the other, into one JSON document; gpu_check.sh starts it.

Parts, in this order; a part that fails or runs out of its time does not stop the next:

    compile report   registers, spills and access widths for this GPU's architecture (on the processor, during the next)
    kernel tests     the tests of the kernels marked gpu
    drive            every kernel once, checked: tools/sanitize_kernels.py without a sanitizer
    bench <name>     check and time; the seconds that are left are shared out by how much there is to measure
    memcheck, racecheck   compute-sanitizer over the same driver, where it is on PATH
    other tests      what else is marked gpu, where feedfast's dependencies are installed
    decode           decoding on the CPU against decoding on the GPU, where the real images are

Nothing here changes clocks or any other setting of the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# shares of the benches' time, in the order they run
BENCHES = {
    "connector_partial_l2": 5.0,
    "partial_l2": 4.0,
    "normalized_l1": 4.0,
    "codes": 2.0,
    "ensemble_kl": 2.0,
    "locality": 1.0,
}
PIPELINE = (
    "torchvision", "nvidia.dali", "zarr", "numcodecs", "google_crc32c", "numpy", "PIL", "pydantic", "typer", "rich",
    "tensorboard", "sklearn",
)  # fmt: skip
TESTS = ("pytest", "hypothesis", "scipy")  # what the tests of the pipeline import as well
START = 15.0  # seconds: importing torch, making a context, and the end of what the time budget cut
END = 15.0  # seconds: many test processes, each with a context of its own, coming to their end
RESERVE = 90.0  # seconds kept for what comes after the benches
ARCHITECTURES = (80, 90, 100)  # that compile_report.py knows

Details = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One command of the check.

    Attributes:
        name: as in the document.
        command: what runs, in the repository.
        limit_s: when it is stopped.
        read: from exit code and stdout to what the document says; ``ok`` in it is True, False or None (did not apply).
        environment: added to this process's.
        missing: why it cannot run here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    read: Callable[[int, str], Details] = lambda code, out: {"ok": code == 0}
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def run_part(part: Part) -> Details:
    """Run one part; never raises for what the part does."""
    if part.missing:
        print(f"\n== {part.name}: skipped, {part.missing}", file=sys.stderr, flush=True)
        return {"ok": None, "seconds": 0.0, "note": f"skipped: {part.missing}"}
    print(f"\n== {part.name} (at most {part.limit_s:.0f} s)", file=sys.stderr, flush=True)
    begin = time.monotonic()
    return finish_part(part, start_part(part), begin)


def start_part(part: Part) -> subprocess.Popen[str]:
    """Start the command in a process group of its own; its stderr is ours."""
    environment = {**os.environ, **part.environment}
    environment.pop("TRITON_INTERPRET", None)  # the parts are to compile their kernels
    return subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def finish_part(part: Part, job: subprocess.Popen[str], begin: float) -> Details:
    """Wait for the command, or stop it and all it started; then read what it said."""
    late = ""
    try:
        out, _ = job.communicate(timeout=max(part.limit_s - (time.monotonic() - begin), 1))
    except subprocess.TimeoutExpired:
        late = f"stopped after {part.limit_s:.0f} s"
        os.killpg(job.pid, signal.SIGINT)  # pytest still writes down what it knows
        try:
            out, _ = job.communicate(timeout=END)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            out, _ = job.communicate()
    try:
        details = part.read(job.returncode, out)
    except (ValueError, LookupError, TypeError, OSError, StopIteration, ElementTree.ParseError) as error:
        details = {"ok": False, "note": f"its answer could not be read: {type(error).__name__}: {error}"}
    if late:
        details |= {"ok": False, "note": late}
    return {"ok": details.pop("ok"), "seconds": round(time.monotonic() - begin, 1), "exit": job.returncode, **details}


def last_json(out: str) -> Details:
    """The JSON document on the last line of a tool's stdout."""
    if not out.strip():
        raise ValueError("it printed nothing")
    document: Details = json.loads(out.strip().splitlines()[-1])
    return document


def read_tests(path: Path) -> Callable[[int, str], Details]:
    """What pytest wrote as JUnit XML: at least one test ran and none failed."""

    def read(code: int, _out: str) -> Details:
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        ran = counts["tests"] > counts["skipped"]
        ok = code == 0 and ran and not counts["failures"] + counts["errors"]
        return {"ok": ok, **counts, **({"failed": failed[:50]} if failed else {})}

    return read


def read_sanitizer(code: int, out: str) -> Details:
    """compute-sanitizer's summary; a device it cannot work with is no failure of the kernels."""
    if "not supported" in out and "SUMMARY: 0" not in out:
        return {"ok": None, "note": "skipped: compute-sanitizer does not support this device"}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", out)
    clean = bool(summary) and all(re.match(r"0 (errors|hazards)", line) for line in summary)
    found = [line for line in out.splitlines() if line.startswith("=========")][:40] if not clean else []
    return {"ok": code == 0 and clean, "summary": summary, **({"said": found} if found else {})}


def read_report(code: int, out: str) -> Details:
    """The compile report in a few figures; a spill is a failure."""
    reports = last_json(out)["reports"]
    spilled = [r["name"] for r in reports if r["spills"] or r["stack_bytes"]]
    return {
        "ok": code == 0 and not spilled and bool(reports),
        "launches": len(reports),
        "most_registers": max((r["regs"] for r in reports), default=0),
        "spilled": spilled,
        "reports": reports,
    }


def read_bench(code: int, out: str) -> Details:
    """A bench's rows; it failed where feedfast itself was wrong."""
    document = last_json(out)
    return {"ok": code == 0, **{key: document[key] for key in ("measured", "skipped", "wrong_or_failed", "rows")}}


def read_decode(code: int, out: str) -> Details:
    """The document of compare_decode.py."""
    return {"ok": code == 0, **last_json(out)}


def pytest_part(
    name: str, arguments: Sequence[str], work: Path, limit_s: float, missing: str = "", workers: int = 0
) -> Part:
    """Tests marked gpu, also where pytest or its plugins are older; other people's warnings are no failure."""
    xml = work / f"{name.replace(' ', '-')}.xml"
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "strict=false", "-W", "default", f"--junitxml={xml}"]
    # a file that needs what is not installed is an error, and the others run all the same
    options.append("--continue-on-collection-errors")
    if workers and not absent(["xdist"]):
        options += ["-n", str(workers)]
    command = (sys.executable, "-m", "pytest", *options, *arguments)
    # pytest writes to stdout: keep that for the document
    return Part(name, ("bash", "-c", 'exec "$@" >&2', "bash", *command), limit_s, read_tests(xml), missing=missing)


def absent(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # its parent is missing
            return False

    return [name for name in modules if not found(name)]


def parts_before(work: Path, workers: int) -> list[Part]:
    """What comes before the benches."""
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*_kernel.py"))
    missing = "pytest is not installed" if absent(["pytest"]) else ""
    return [
        pytest_part("kernel tests", tests, work, 200, missing, workers),
        Part("drive", (sys.executable, "tools/sanitize_kernels.py"), 90, read_drive),
    ]


def read_drive(code: int, out: str) -> Details:
    """The document of sanitize_kernels.py."""
    document = last_json(out)
    return {"ok": code == 0, "calls": document["calls"], "wrong": document["wrong"]}


def bench_part(name: str, seconds: float, csv: Path | None) -> Part:
    """One bench within so many seconds, its start and its end included."""
    measuring = max(seconds - START, 5)
    command = [sys.executable, f"bench/bench_{name}.py", "--seconds", f"{measuring:.0f}"]
    command += ["--out", str(csv)] if csv is not None else []
    return Part(f"bench {name}", tuple(command), measuring + 2 * START, read_bench)


def parts_after(work: Path, data: str) -> list[Part]:
    """What comes after the benches."""
    driver = (sys.executable, "tools/sanitize_kernels.py", "--no-check")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    missing = "" if sanitizer else "compute-sanitizer is not on PATH"
    # libraries ask the driver for what it may not have: an answer of "no" is no error of a kernel
    options = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
    parts = [
        Part(
            tool,
            (sanitizer or "", "--tool", tool, *options[tool], "--error-exitcode", "86", *driver),
            60,
            read_sanitizer,
            # PyTorch's cache would make room for a kernel that writes too far
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            missing,
        )
        for tool in options
    ]
    without, untested = absent(PIPELINE), absent(PIPELINE + TESTS)
    missing = f"not installed: {', '.join(untested)}" if untested else ""
    ignored = [f"--ignore={path.relative_to(ROOT)}" for path in (ROOT / "tests" / "kernels").glob("test_*_kernel.py")]
    parts.append(pytest_part("other tests", ignored, work, 60, missing))
    missing = f"not installed: {', '.join(without)}" if without else ""
    if not missing and not (ROOT / data).is_dir():
        missing = f"no real images at {data}"
    parts.append(Part("decode", (sys.executable, "tools/compare_decode.py", data), 60, read_decode, missing=missing))
    return parts


def table(parts: dict[str, Details]) -> str:
    """A line a part, then a line a shape: feedfast's time next to the copy and to what PyTorch makes of it."""
    lines = [f"\n{'part':<28} {'':<8} {'seconds':>8}"]
    for name, details in parts.items():
        word = {True: "ok", False: "FAILED", None: "skipped"}[details["ok"]]
        said = [
            f"{key} {details[key]}" for key in ("tests", "failures", "calls", "measured", "launches") if key in details
        ]
        lines.append(
            f"{name:<28} {word:<8} {details['seconds']:>8} {', '.join(said)} {details.get('note', '')}".rstrip()
        )
    rows = [row for details in parts.values() for row in details.get("rows", [])]
    if not rows:
        return "\n".join(lines)
    by_case: dict[tuple[str, ...], dict[str, Details]] = {}
    for row in rows:
        case = tuple(row[key] for key in ("operation", "shape", "dtype", "codec", "layout", "direction"))
        by_case.setdefault(case, {})[row["variant"]] = row
    layout = "{:<22} {:<34} {:<8} {:>9} {:>8} {:>7} {:>10} {:>12} {:>9}"
    head = ("operation", "shape", "", "ms", "GB/s", "% copy", "x compiled", "x max-autot.", "x eager")
    lines.append("\n" + layout.format(*head))
    for (operation, shape, dtype, codec, order, direction), variants in by_case.items():
        ours = variants.get("feedfast")
        if ours is None or direction not in ("both", "forward"):
            continue
        if direction == "forward" and (operation, shape, dtype, codec, order, "both") in by_case:
            continue
        what = f"{shape} {dtype}/{codec or 'float'} {order}"
        if ours["median_ms"] is None:
            lines.append(f"{operation:<22} {what:<34} {direction:<8} {ours['note']}")
            continue

        def times(variant: str, ours: Details = ours, variants: dict[str, Details] = variants) -> str:
            other = variants.get(variant, {}).get("median_ms")
            return "-" if other is None else f"{other / ours['median_ms']:.2f}"

        numbers = (f"{ours['median_ms']:.4f}", f"{ours['gbps']:.0f}", f"{ours['percent_of_copy']:.1f}")
        others = (times("compile default"), times("compile max-autotune"), times("reference eager"))
        lines.append(layout.format(operation, what, direction, *numbers, *others))
    return "\n".join(lines)


def check(work: Path, options: argparse.Namespace, architecture: int, workers: int) -> dict[str, Details]:
    """All parts within the seconds given."""
    begin = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - begin)

    found: dict[str, Details] = {}

    def within(part: Part) -> Part:
        """The part with no more than the time that is left."""
        short = "" if left() > START else f"the {options.seconds:.0f} s of the check are over"
        limit = min(part.limit_s, max(left(), 0))
        return Part(part.name, part.command, limit, part.read, part.environment, part.missing or short)

    report = Part(
        "compile report",
        (sys.executable, "tools/compile_report.py", "--quick", "--arch", str(architecture)),
        min(options.seconds, 240),
        read_report,
    )
    reporting = start_part(report)
    found[report.name] = {}
    for part in parts_before(work, workers):
        found[part.name] = run_part(within(part))
    found[report.name] = finish_part(report, reporting, begin)  # nothing runs next to the benches
    names = [name for name in BENCHES if (ROOT / "bench" / f"bench_{name}.py").is_file()]
    for index, name in enumerate(names):  # what one leaves over goes to the next
        share = BENCHES[name] / sum(BENCHES[other] for other in names[index:])
        part = bench_part(name, (left() - RESERVE) * share, options.csv)
        found[part.name] = run_part(within(part))
    for part in parts_after(work, options.data):
        found[part.name] = run_part(within(part))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("FEEDFAST_DATA", "../shared/data")
    parser.add_argument("data", nargs="?", default=default, help="folder of the real images (default ../shared/data)")
    parser.add_argument("--seconds", type=float, default=450, help="for everything together (default 450)")
    parser.add_argument(
        "--json", type=Path, help="write the document to this file; stdout then has it without the rows"
    )
    parser.add_argument("--csv", type=Path, help="append the benches' rows to this file (default: do not)")
    options = parser.parse_args(argv)
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if not found:
        print("gpu_check: torch sees no CUDA GPU here; nothing was checked", file=sys.stderr)
        print('{"gpu": null, "checked": false}')
        return 2
    for file in filter(None, (options.json, options.csv)):
        file.parent.mkdir(parents=True, exist_ok=True)  # not after eight minutes
    major, _ = torch.cuda.get_device_capability()
    architecture = max((a for a in ARCHITECTURES if a <= 10 * major), default=ARCHITECTURES[0])
    # compiling takes most of the tests' time; but each process may hold maps of more than 2^31 elements, 15 GB of them
    most = int(torch.cuda.mem_get_info()[1] / 15e9)
    workers = max(min(12, most, (os.cpu_count() or 1) - 2), 0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = check(Path(folder), options, architecture, workers)
    document = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "checked": True,
        "ok": parts["kernel tests"]["ok"] is True and all(details["ok"] is not False for details in parts.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "parts": parts,
    }
    print(table(parts), file=sys.stderr, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(document) + "\n")
        short = {
            name: {key: value for key, value in details.items() if key not in ("rows", "reports", "said")}
            for name, details in parts.items()
        }
        document = {**document, "parts": short}
    print(json.dumps(document))
    return 0 if document["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
