"""feedfast's reader against what people do today: the same rows in the same order, in one run, taking turns.

    python bench/bench_peers.py                     rows of 4 KB, 50 KB and 1.5 MB, about four minutes each
    python bench/bench_peers.py --only 4KB          one size
    python bench/bench_peers.py --tiny              seconds; checks that every peer still reads what was written
    python bench/bench_peers.py --plot              no run, only the plots of what was measured last

Rows are codes of maps after a ReLU: half of them zero, the rest those of a Gaussian. Every peer (peers.py) stores the
same rows in a folder of its own and hands out batches in the order of a later pass of training, in which the rows of a
batch come from 16 places of the view or more. WebDataset, which cannot be asked for an order, has its own. There are
two ceilings: the sequential read of the same bytes and, for zstd, the decoder on frames in memory.

Each peer has a fresh process. Before it is timed it reads every row once, and the checksum of each is compared; that
pass also gives its memory: resident bytes of the process and its workers (Pss: shared pages count once, and those of
mapped files count, too) beyond what was there after importing. Then, `--repeats` times, every peer takes a turn with a
cold page cache, and every peer one with a warm one, of 0.3 s at least and stopped after `--seconds`. Cold means
files written back (fsync), their pages dropped (POSIX_FADV_DONTNEED), and mincore asked what is still there; that share
is in the results. What the disk, or a host below a virtual one, caches cannot be dropped from here.

Processor time per row, of all of a peer's processes, says what is left for training and suffers less from a busy
machine. A turn that is stopped counts what was handed out, not what was read ahead: where that happens to feedfast
(a window ahead) or WebDataset (a buffer to fill), the machine is too busy for these figures.

At the end one bit of a row's stored data is flipped, and each peer reads that row's batch: "error" if that raises,
"silent" if the wrong row is handed out.

Rows are appended to results_peers.csv, a plot is drawn from it. The table goes to stderr; the last line of stdout is
one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from peers import CEILINGS, PEERS, PLAIN, ByProcesses, Bytes, Peer, Rows, Setting
from stored_files import cached_share, drop, files_of, flip, toggle, warm

from feedfast.data.passes import pass_order, pass_sizes

SIZES = {"4KB": ((8, 8, 64), 24576, 128), "50KB": ((14, 14, 256), 6144, 128), "1.5MB": ((56, 56, 480), 256, 32)}
BOUND_BYTES = 256 << 20  # 256 MiB: of 400 MB of rows, feedfast's default of 2 GiB would hold the most part at once
RESULTS = Path(__file__).with_name("results_peers.csv")
LEAST_SECONDS = 0.3


def setting_of(size: str, *, tiny: bool) -> Setting:
    """What is stored at a size of row; granule and window as a plan derives them from bytes."""
    shape, rows, batch = SIZES[size]
    row_bytes = int(np.prod(shape))
    bound = BOUND_BYTES
    if tiny:
        rows, batch, bound = 160, 32, min(bound, 4 * 64 * row_bytes)
    granule, window = pass_sizes(row_bytes, 1, bound)
    return Setting(shape, rows, batch, granule, window, bound)


def codes(setting: Setting) -> Bytes:
    """Codes of a ReLU's map, uint8 [row, row_bytes]: every row its own."""
    rng = np.random.default_rng(0)
    out = np.empty((setting.rows, setting.row_bytes), np.uint8)
    for start in range(0, setting.rows, 64):
        noise = rng.standard_normal(out[start : start + 64].shape, dtype=np.float32)
        out[start : start + 64] = np.clip(np.rint(noise * 60), 0, 254)
    return out


def crc32c(row: Bytes) -> int:
    return int(google_crc32c.value(row))


def entropy(values: Bytes) -> float:
    """Bits per code, of the codes' frequencies."""
    share = np.bincount(values.reshape(-1), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


# ---- a peer's process


def serve(args: argparse.Namespace) -> None:
    """Answer the bench: read lines of JSON, write lines of JSON."""
    setting = Setting(**{**json.loads(args.setting), "shape": tuple(json.loads(args.setting)["shape"])})
    kind = PEERS[args.serve]
    peer, order = kind(args.folder / (kind.stored or args.serve), setting), np.load(args.folder / "order.npy")
    sums = np.load(args.folder / "sums.npy")
    import_of(args.serve)
    answer = {"ready": True}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        asked = json.loads(line)
        try:
            if asked["do"] == "check":
                answer = checked(peer, order if asked["rows"] is None else np.array(asked["rows"]), sums, args.serve)
            else:
                answer = timed(peer, order, asked["least"], asked["most"])
        except Exception as error:  # what a peer raises is a result
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        peer.release()


def import_of(name: str) -> None:
    """Import what a peer needs, so that its memory is counted without."""
    own = {"hdf5": ["h5py"], "webdataset": ["webdataset", "safetensors.numpy"], "zarr": ["zarr"], "lmdb": ["lmdb"]}
    own |= {"feedfast": ["feedfast.storage.reader"], "zstd": ["feedfast.storage.reader"], "pt": ["torch"]}
    more = ["torch.utils.data"] if issubclass(PEERS[name], ByProcesses) else []
    for module in (*own.get(name.split()[0], []), *more):
        importlib.import_module(module)


def checked(peer: Peer, order: Rows, sums: Any, name: str) -> dict[str, Any]:
    """Read the rows once and compare the checksum of each; how many were wrong, and how many came."""
    wrong, seen = 0, []
    for rows, batch in peer.batches(order):
        seen.append(rows.copy())
        if name != "zstd decoder":
            wrong += sum(crc32c(row) != sums[number] for number, row in zip(rows.tolist(), batch, strict=True))
    found = np.sort(np.concatenate(seen))
    return {"wrong": int(wrong), "complete": bool(np.array_equal(found, np.sort(order)))}


def timed(peer: Peer, order: Rows, least: float, most: float) -> dict[str, Any]:
    """Rows handed out and seconds: whole passes until ``least`` seconds are over, or broken off after ``most``."""
    rows, start = 0, time.perf_counter()
    while True:
        for numbers, _ in peer.batches(order):
            rows += len(numbers)
            if time.perf_counter() - start > most:
                break
        seconds = time.perf_counter() - start
        if seconds >= least:
            return {"rows": rows, "seconds": seconds}


class Process:
    """A peer in a process of its own."""

    def __init__(self, name: str, folder: Path, setting: Setting) -> None:
        words = ["--serve", name, "--folder", str(folder), "--setting", json.dumps(vars(setting))]
        command = [sys.executable, "-W", "ignore", __file__, *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Until it has imported what it needs."""
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer's process ended with {self._process.wait()}")
        return dict(json.loads(line))

    def ask(self, **asked: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def ask_memory(self, **asked: Any) -> tuple[dict[str, Any], int]:
        """The same, with the most bytes held meanwhile beyond those before."""
        before, most, done = self.held(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0] = max(most[0], self.held())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            answer = self.ask(**asked)
        finally:
            done.set()
            watcher.join()
        return answer, most[0] - before

    def _tree(self) -> list[int]:
        found, todo = [], [self._process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            with contextlib.suppress(OSError):  # ended in between
                todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def held(self) -> int:
        """Resident bytes of the process and its children, pages that are shared divided among those who share them."""
        total = 0
        for pid in self._tree():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        return total

    def processor(self) -> float:
        """Seconds of processor time of the process and its children so far, by the kernel's clock of 10 ms."""
        ticks = 0
        for pid in self._tree():
            with contextlib.suppress(OSError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


# ---- the bench


def measure(size: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All peers at one size of row."""
    setting = setting_of(size, tiny=args.tiny)
    rows, names = codes(setting), args.peers.split(",") if args.peers else list(PEERS)
    order = pass_order(setting.rows, 0, 0, 1, setting.granule, setting.window)
    np.save(folder / "order.npy", order)
    np.save(folder / "sums.npy", np.array([crc32c(row) for row in rows], np.uint32))
    done = folder / "done"
    for name in names:
        where = PEERS[name].stored or name
        if not (done / where.replace(" ", "-")).exists():
            shutil.rmtree(folder / where, ignore_errors=True)
            makers = {PLAIN: "sequential", "feedfast zstd": "feedfast zstd"}
            PEERS[makers.get(where, name)](folder / where, setting).write(rows)
            os.sync()
            done.mkdir(exist_ok=True)
            (done / where.replace(" ", "-")).touch()
    files = {name: files_of(folder / (PEERS[name].stored or name)) for name in names}
    found: dict[str, dict[str, Any]] = {
        name: {
            "rows": size, "row_bytes": setting.row_bytes, "count": setting.rows, "batch": setting.batch,
            "granule": setting.granule, "window": setting.window, "peer": name, "workers": PEERS[name].workers,
            "entropy_bits": entropy(rows[:512]), "files": len(files[name]),
            "disk_bytes": sum(file.stat().st_blocks * 512 for file in files[name]),
        }
        for name in names
    }  # fmt: skip
    processes = {name: Process(name, folder, setting) for name in names}
    try:
        for process in processes.values():
            process.wait()
        for name, process in processes.items():
            answer, found[name]["memory_bytes"] = process.ask_memory(do="check", rows=None)
            sound = answer.get("wrong") == 0 and answer["complete"]
            found[name]["problem"] = "" if sound else json.dumps(answer)
        rates: dict[tuple[str, str], list[float]] = {}
        shares: dict[tuple[str, str], list[float]] = {}
        spent: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.repeats):
            for cache in ("cold", "warm"):
                for name, process in processes.items():
                    if found[name]["problem"]:
                        continue
                    (drop if cache == "cold" else warm)(files[name])
                    shares.setdefault((name, cache), []).append(cached_share(files[name]))
                    least = LEAST_SECONDS if cache == "warm" and not args.tiny else 0.0
                    before = process.processor()
                    answer = process.ask(do="time", least=least, most=args.seconds)
                    rates.setdefault((name, cache), []).append(answer["rows"] / answer["seconds"])
                    spent.setdefault((name, cache), []).append((process.processor() - before) / answer["rows"])
        for name, process in processes.items():
            changed = not found[name]["problem"] and name not in CEILINGS
            found[name]["flipped_bit"] = flipped(name, process, setting, order, rows, files[name]) if changed else ""
    finally:
        for process in processes.values():
            process.close()
    results = []
    for (name, cache), values in rates.items():
        row = {**found[name], "page_cache": cache, "cached_share": round(max(shares[name, cache]), 3)}
        row |= {"samples_per_s": statistics.median(values), "low": min(values), "high": max(values)}
        row["cpu_us_per_row"] = 1e6 * statistics.median(spent[name, cache])
        results.append(row | {"mb_per_s": row["samples_per_s"] * setting.row_bytes / 1e6})
    return results + [row for row in found.values() if row["problem"]]


def flipped(name: str, process: Process, setting: Setting, order: Rows, rows: Bytes, files: Sequence[Path]) -> str:
    """What a peer says of a batch in whose stored bytes a bit was flipped: ``error`` or ``silent``."""
    place = flip(files, rows[int(order[setting.batch // 2])])
    try:
        first = name != "webdataset" and "zstd" not in name  # those two are asked for everything
        answer = process.ask(do="check", rows=order[: setting.batch].tolist() if first else None)
    finally:
        toggle(*place)
    if "error" in answer:
        return "error"
    return "silent" if answer["wrong"] == 1 else f"unclear: {answer}"


def with_ratios(results: list[dict[str, Any]]) -> None:
    """Of each row its rate over the ceiling's: the sequential read, and for zstd the decoder as well."""
    by = {(row["rows"], row.get("page_cache"), row["peer"]): row.get("samples_per_s") for row in results}
    for row in results:
        for column, ceiling in (("of_sequential", "sequential"), ("of_decoder", "zstd decoder")):
            top = by.get((row["rows"], row.get("page_cache"), ceiling))
            if top and row.get("samples_per_s") and (ceiling == "sequential" or row["peer"] == "feedfast zstd"):
                row[column] = row["samples_per_s"] / top


def context() -> dict[str, Any]:
    """Where and with what it was measured."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    packages = ["numpy", "torch", "zarr", "numcodecs", "h5py", "lmdb", "webdataset", "safetensors"]
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    changed = git("status", "--porcelain", "../feedfast/storage", "../bench/peers.py", "../bench/bench_peers.py")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "machine": f"{os.cpu_count()} x {model}",
        "versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in packages),
    }


COLUMNS = [
    "rows", "row_bytes", "count", "batch", "granule", "window", "entropy_bits", "peer", "workers", "page_cache",
    "samples_per_s", "low", "high", "mb_per_s", "of_sequential", "of_decoder", "cpu_us_per_row", "disk_bytes", "files",
    "memory_bytes", "flipped_bit", "cached_share", "problem",
]  # fmt: skip


def append(results: Sequence[dict[str, Any]], path: Path) -> None:
    where, new = context(), not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*where, *COLUMNS])
        if new:
            writer.writeheader()
        for row in results:
            rounded = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**where, **rounded})


def table(results: Sequence[dict[str, Any]]) -> None:
    head = f"{'rows':6} {'peer':16} {'cache':5} {'samples/s':>10} {'low':>9} {'high':>9} {'MB/s':>8} {'of seq':>6} "
    print(head + f"{'of dec':>6} {'CPU us':>8} {'disk MB':>8} {'mem MB':>7} {'bit':>7} {'cached':>6}", file=sys.stderr)
    for row in sorted(results, key=lambda row: (row["rows"], row.get("page_cache", ""), -row.get("samples_per_s", 0))):
        if row["problem"]:
            print(f"{row['rows']:6} {row['peer']:16} {row['problem']}", file=sys.stderr)
            continue
        ratios = " ".join(f"{row[name]:6.2f}" if name in row else " " * 6 for name in ("of_sequential", "of_decoder"))
        line = f"{row['rows']:6} {row['peer']:16} {row['page_cache']:5} {row['samples_per_s']:10.0f} {row['low']:9.0f} "
        line += f"{row['high']:9.0f} {row['mb_per_s']:8.0f} {ratios} {row['cpu_us_per_row']:8.1f} "
        line += f"{row['disk_bytes'] / 1e6:8.1f} {row['memory_bytes'] / 1e6:7.1f} "
        line += f"{row['flipped_bit']:>7} {row['cached_share']:6.2f}"
        print(line, file=sys.stderr)


def plot(path: Path) -> list[str]:
    """One figure of what was measured last: samples per second of each peer, cold and warm, per size of row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        latest = {(row["rows"], row["page_cache"], row["peer"]): row for row in csv.DictReader(file)}
    rows = [row for row in latest.values() if row["samples_per_s"]]
    sizes = [size for size in SIZES if any(row["rows"] == size for row in rows)]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.2), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        names = [name for name in PEERS if any(row["rows"] == size and row["peer"] == name for row in rows)]
        for shift, cache, color in ((0.2, "cold", "tab:blue"), (-0.2, "warm", "tab:orange")):
            found = [latest.get((size, cache, name)) for name in names]
            shown = [(place, row) for place, row in enumerate(found) if row is not None and row["samples_per_s"]]
            middle = [float(row["mb_per_s"]) for _, row in shown]
            scale = [float(row["mb_per_s"]) / float(row["samples_per_s"]) for _, row in shown]
            ends = [[m - float(row["low"]) * s for m, s, (_, row) in zip(middle, scale, shown, strict=True)]]
            ends += [[float(row["high"]) * s - m for m, s, (_, row) in zip(middle, scale, shown, strict=True)]]
            places = [place + shift for place, _ in shown]
            axis.barh(places, middle, 0.38, xerr=np.maximum(ends, 0), color=color, label=f"{cache} page cache")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("MB/s of decoded rows")
        axis.set_title(f"rows of {size}")
    axes[0][0].legend(loc="lower right", fontsize=8)
    place = path.with_name("peers.svg")
    figure.savefig(place)
    plt.close(figure)
    return [str(place)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few rows, one repeat, nothing appended")
    parser.add_argument("--only", default="", help="comma-separated sizes of row (default all)")
    parser.add_argument("--peers", default="", help="comma-separated peers (default all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each peer, cold and warm (default 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="a timed turn is stopped after so long (default 4)")
    parser.add_argument(
        "--folder", type=Path, help="where the rows are stored for the time (default a temporary folder)"
    )
    parser.add_argument("--keep", type=Path, help="store them here, leave them, and use those that an earlier run left")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV that rows are appended to")
    parser.add_argument("--plot", action="store_true", help="no run, only the plot")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args)
        return 0
    if args.plot:
        print(json.dumps({"plots": plot(args.results)}))
        return 0
    args.repeats, args.seconds = (1, 0.3) if args.tiny else (args.repeats, args.seconds)
    results: list[dict[str, Any]] = []
    for size in args.only.split(",") if args.only else SIZES:
        if args.keep is None:
            folder = Path(tempfile.mkdtemp(prefix="feedfast-peers-", dir=args.folder))
        else:
            folder = args.keep / size
            folder.mkdir(parents=True, exist_ok=True)
        try:
            found = measure(size, folder, args)
        finally:
            if args.keep is None:
                shutil.rmtree(folder)
        with_ratios(found)
        table(found)
        results += found
        if not args.tiny:
            append(found, args.results)
    plots = [] if args.tiny else plot(args.results)
    print(json.dumps({"results": results, "plots": plots}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
