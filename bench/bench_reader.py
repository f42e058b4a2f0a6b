"""Which reader streams a cache fastest? The same Zarr v3 arrays, written by zarr-python, read by every candidate.

    python bench/bench_reader.py                  all rows, about four minutes and 1 GB in the temporary folder
    python bench/bench_reader.py --tiny           seconds; checks that every candidate still reads the same values
    python bench/bench_reader.py --cold           drop the files from the page cache before every pass

Candidates: zarr-python, zarrs (as zarr-python's codec pipeline) and TensorStore read batches by slices; `direct` is
feedfast's own stream over the same files. `x1`/`x2` is the number of threads reading ahead (TensorStore: its own
concurrency, 8 batches in flight). Only `direct` checks the fill value; all check the blocks' checksums as far as they
do that (zarrs is known not to on partial reads).

Passes: `sequential`, batches of 128 rows in stored order; `permuted`, granules of 64 rows in random order, two a batch;
`mixed`, rows also mixed inside windows of 16 granules, as feedfast trains a view for the second time (direct only:
for the others that is one slice a row).

Every candidate's values are compared with what was written before it is timed; a mismatch yields no number. Each pass
runs `--repeats` times: median, lowest and highest GB/s of decoded data, and GB per second of processor time, which says
what is left for training and suffers less from a busy machine. Rows are appended to `results_reader.csv`.
The table goes to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr

from feedfast.cache.layout import ArraySpec, shard_rows_for
from feedfast.cache.schema import auto_block_rows
from feedfast.cache.segments import BufferPool
from feedfast.cache.shards import ArrayView, ShardFiles
from feedfast.cache.stream import Stream

BATCH, GRANULE, WINDOW = 128, 64, 16
SHARD_BYTES = 32 << 20  # 32 MiB
ROWS = {"cifar": ((8, 8, 128), 16384), "imagenet-early": ((56, 56, 64), 2048), "imagenet-late": ((7, 7, 2048), 3072)}
RESULTS = Path(__file__).with_name("results_reader.csv")
Array = np.ndarray[Any, np.dtype[Any]]
Slices = list[list[tuple[int, int]]]  # per batch, the row ranges it is made of


def maps(shape: tuple[int, ...], rows: int) -> Array:
    """Codes like a ReLU map's: smoothed noise, about half of it zero, every row different."""
    rng = np.random.default_rng(0)
    base = min(rows, 256)
    noise = rng.standard_normal((base, *shape), dtype=np.float32)
    noise += np.roll(noise, 1, 1) + np.roll(noise, 1, 2)
    codes = np.clip(np.maximum(noise, 0) * 35, 0, 254).astype(np.uint8)
    return np.concatenate([np.roll(codes, (k, 3 * k), (1, 3)) for k in range(-(-rows // base))])[:rows]


def write(folder: Path, values: Array, compression: Any) -> ArrayView:
    """Store the rows as one view of a feedfast array, through zarr-python."""
    rows, row = len(values), values.shape[1:]
    block = auto_block_rows(int(np.prod(row)))
    per_shard = shard_rows_for(int(np.prod(row)), block, SHARD_BYTES)
    padded = -(-rows // per_shard) * per_shard
    dims = ("view", "row", "height", "width", "channel")
    spec = ArraySpec(
        "codes",
        (1, padded, *row),
        np.dtype("u1"),
        0xFF,
        (1, per_shard, *row),
        (1, block, *row),
        compression,
        dims,
        1,
        rows,
    )
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(spec.zarr_metadata()))
    array: Any = zarr.open_array(store=str(folder), mode="r+", zarr_format=3)
    for shard in range(spec.num_shards):
        start, stop = spec.shard_span(shard)
        array[0, start:stop] = values[start:stop]
    sizes = {shard: (folder / spec.key(0, shard)).stat().st_size for shard in range(spec.num_shards)}
    return ArrayView(spec, folder, 0, sizes)


def ahead(pool: ThreadPoolExecutor, read: Callable[[list[tuple[int, int]]], Array], slices: Slices) -> Iterator[Array]:
    """Batches read by a pool, four ahead."""
    waiting: deque[Any] = deque()
    for batch in slices:
        waiting.append(pool.submit(read, batch))
        if len(waiting) > 4:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def by_zarr(folder: Path, threads: int, pipeline: str) -> Callable[[Slices], Iterator[Array]]:
    """zarr-python, with its own pipeline or that of zarrs."""
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array: Any = zarr.open_array(store=str(folder), mode="r", zarr_format=3)

    def read(batch: list[tuple[int, int]]) -> Array:
        parts = [array[0, start:stop] for start, stop in batch]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run(slices: Slices) -> Iterator[Array]:
        with ThreadPoolExecutor(threads) as pool:
            yield from ahead(pool, read, slices)

    return run


def by_tensorstore(folder: Path) -> Callable[[Slices], Iterator[Array]]:
    """TensorStore with eight reads in flight and a cache for shard indexes, too small to keep the data."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}, "recheck_cached_data": False}
    array = ts.open(spec, context=ts.Context({"cache_pool": {"total_bytes_limit": 8 << 20}}), read=True).result()

    def run(slices: Slices) -> Iterator[Array]:
        waiting: deque[list[Any]] = deque()

        def pop() -> Array:
            parts = [future.result() for future in waiting.popleft()]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        for batch in slices:
            waiting.append([array[0, start:stop].read() for start, stop in batch])
            if len(waiting) >= 8:
                yield pop()
        while waiting:
            yield pop()

    return run


def by_stream(source: ArrayView, threads: int, rows: Array | None = None) -> Callable[[Slices], Iterator[Array]]:
    """feedfast's own stream; takes row numbers, not slices. Files and buffers outlive a pass, as in a reader."""
    files, pool = ShardFiles(), BufferPool()

    def run(slices: Slices) -> Iterator[Array]:
        order = rows
        if order is None:
            order = np.concatenate([np.arange(start, stop) for batch in slices for start, stop in batch])
        for batch in Stream([source], order, BATCH, threads=threads, files=files, pool=pool):
            yield batch["codes"]

    return run


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.rglob("c/**/*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def check(run: Callable[[Slices], Iterator[Array]], slices: Slices, order: Array, values: Array) -> str:
    """Empty if a pass gives what was written, else what is wrong."""
    done = 0
    for number, batch in enumerate(run(slices)):
        if not np.array_equal(batch, values[order[number * BATCH : (number + 1) * BATCH]]):
            return f"wrong values in batch {number}"
        done += len(batch)
    return "" if done == len(order) else f"{done} rows instead of {len(order)}"


def timed(run: Callable[[Slices], Iterator[Array]], slices: Slices) -> tuple[float, float]:
    """GB of decoded rows per second, and per second of processor time, of one pass."""
    start, processor = time.perf_counter(), time.process_time()
    gigabytes = sum(batch.nbytes for batch in run(slices)) / 1e9
    return gigabytes / (time.perf_counter() - start), gigabytes / (time.process_time() - processor)


def passes(rows: int) -> dict[str, tuple[Slices, Array]]:
    """Per kind of pass: the slices of each batch, and the rows these add up to."""
    rng = np.random.default_rng(1)
    granules = rng.permutation(rows // GRANULE)
    permuted = [
        [(int(g) * GRANULE, int(g + 1) * GRANULE) for g in granules[i : i + 2]] for i in range(0, len(granules), 2)
    ]
    order = np.concatenate([np.arange(start, stop) for batch in permuted for start, stop in batch])
    windows = [rng.permutation(order[i : i + WINDOW * GRANULE]) for i in range(0, len(order), WINDOW * GRANULE)]
    return {
        "sequential": ([[(start, start + BATCH)] for start in range(0, rows, BATCH)], np.arange(rows)),
        "permuted": (permuted, order),
        "mixed": (permuted, np.concatenate(windows)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few rows, one repeat, nothing appended")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per row (default 5)")
    parser.add_argument("--only", default="", help="comma-separated row kinds (default all)")
    parser.add_argument("--folder", type=Path, help="where the arrays are written (default a temporary folder)")
    args = parser.parse_args(argv)
    kinds = args.only.split(",") if args.only else list(ROWS)
    args.repeats = 1 if args.tiny else args.repeats
    results: list[dict[str, Any]] = []
    head = f"{'rows':15} {'codec':5} {'pass':11} {'candidate':15} {'GB/s':>7} {'low':>7} {'high':>7} {'per CPU s':>9}"
    print(head, file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in kinds:
            shape, rows = ROWS[kind]
            rows = 256 if args.tiny else rows
            values = maps(shape, rows)
            for compression in ("none", "zstd"):
                place = Path(folder, kind, compression)
                source = write(place, values, compression)
                results += _measure_all(kind, compression, place, source, values, args)
                for file in place.rglob("c/**/*"):
                    if file.is_file():
                        file.unlink()
    if not args.tiny:
        _append(results)
    best = max((row for row in results if row.get("gb_per_s")), key=lambda row: row["gb_per_s"])
    print(
        json.dumps({"rows": len(results), "skipped": [r for r in results if r["skipped"]], "best": best}, default=str)
    )
    return 0


def _measure_all(
    kind: str, compression: str, place: Path, source: ArrayView, values: Array, args: argparse.Namespace
) -> list[dict[str, Any]]:
    batched, zarrs = "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"
    stored = sum(source.sizes.values())
    results = []
    for name, (slices, order) in passes(len(values)).items():
        candidates = {
            "zarr-python x1": lambda: by_zarr(place, 1, batched),
            "zarr-python x2": lambda: by_zarr(place, 2, batched),
            "zarrs x1": lambda: by_zarr(place, 1, zarrs),
            "zarrs x2": lambda: by_zarr(place, 2, zarrs),
            "tensorstore": lambda: by_tensorstore(place),
        }
        if name == "mixed":
            candidates = {}
        for threads in (1, 2):
            candidates[f"direct x{threads}"] = lambda threads=threads, order=order: by_stream(source, threads, order)
        runs = {candidate: make() for candidate, make in candidates.items()}
        wrong = {candidate: check(run, slices, order, values) for candidate, run in runs.items()}
        rates: dict[str, list[tuple[float, float]]] = {candidate: [] for candidate in runs}
        for _ in range(args.repeats):  # the candidates take turns, so that a busy moment of the machine meets them all
            for candidate, run in runs.items():
                if not wrong[candidate]:
                    if args.cold:
                        drop_from_page_cache(place)
                    rates[candidate].append(timed(run, slices))
        for candidate, pairs in rates.items():
            wall, processor = [list(column) for column in zip(*pairs, strict=True)] or [[], []]
            row: dict[str, Any] = {
                "rows": kind, "row_bytes": source.spec.row_bytes, "block_rows": source.spec.block_rows,
                "compression": compression, "ratio": round(values.nbytes / stored, 3), "pass": name,
                "page_cache": "cold" if args.cold else "warm", "candidate": candidate, "skipped": wrong[candidate],
            }  # fmt: skip
            speed = wrong[candidate]
            if pairs:
                row |= {"gb_per_s": statistics.median(wall), "low": min(wall), "high": max(wall)}
                row["gb_per_cpu_s"] = statistics.median(processor)
                speed = f"{row['gb_per_s']:7.2f} {row['low']:7.2f} {row['high']:7.2f} {row['gb_per_cpu_s']:9.2f}"
            results.append(row)
            print(f"{kind:15} {compression:5} {name:11} {candidate:15} {speed}", file=sys.stderr, flush=True)
    return results


def _append(results: list[dict[str, Any]]) -> None:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    versions = {
        name: importlib.metadata.version(name) for name in ("zarr", "zarrs", "tensorstore", "numcodecs", "numpy")
    }
    context = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "feedfast/cache") else ""),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "cores": os.cpu_count(),
    }
    fields = [*context, "rows", "row_bytes", "block_rows", "compression", "ratio", "pass", "page_cache", "candidate"]
    fields += ["gb_per_s", "low", "high", "gb_per_cpu_s", "skipped"]
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        for row in results:
            rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**context, **rounded})


if __name__ == "__main__":
    sys.exit(main())
