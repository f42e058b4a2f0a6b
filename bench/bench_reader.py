"""Which reader streams a cache fastest? The same Zarr v3 arrays, written by zarr-python, read by every candidate.

    python bench/bench_reader.py                  all rows, about six minutes and 2 GB in the temporary folder
    python bench/bench_reader.py --tiny           seconds; checks that every candidate still reads the same values
    python bench/bench_reader.py --cold           drop the files from the page cache before every pass

Candidates: zarr-python, zarrs (as zarr-python's codec pipeline) and TensorStore read batches by slices; `direct` is
feedfast's own stream over the same files. `x1`/`x2` is the number of threads reading ahead (TensorStore: its own
concurrency, 8 batches in flight). Only `direct` checks the fill value; all check the blocks' checksums as far as they
do that (zarrs is known not to on partial reads).

Passes: `sequential`, batches of 128 rows in stored order; `permuted`, granules of 64 rows in random order, two per
batch; `mixed`, rows also mixed inside windows, as feedfast trains a view for the second time (direct only: for
the others that is one slice per row). Granule and window of `mixed` follow from the bytes per row. The row kind
`resnet50` streams four large maps at once, each with blocks of its own size; there, `mixed 64x16` keeps 16 granules
of 64 rows at that size too, which is more than a stream may hold, so that blocks are read more than once.

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
import math
import os
import platform
import shutil
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

from feedfast.data.passes import pass_order, pass_sizes
from feedfast.storage.disk import Disk
from feedfast.storage.layout import ArraySpec, shard_rows_for
from feedfast.storage.segments import BufferPool
from feedfast.storage.shards import ArrayView, ShardFiles
from feedfast.storage.stream import MAX_BUFFER_BYTES, Stream

BATCH, GRANULE = 128, 64
BLOCK_BYTES = 8 << 20  # 8 MiB
SHARD_BYTES = 32 << 20  # 32 MiB
ROWS = {"cifar": ((8, 8, 128), 16384), "imagenet-early": ((56, 56, 64), 2048), "imagenet-late": ((7, 7, 2048), 3072)}
JOINT = {"resnet50": (((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)), 1056)}
RESULTS = Path(__file__).with_name("results_reader.csv")
Array = np.ndarray[Any, np.dtype[Any]]
Batch = Array | dict[str, Array]  # of one array, or of each by its name
Slices = list[list[tuple[int, int]]]  # per batch, the row ranges it is made of


def maps(shape: tuple[int, ...], rows: int) -> Array:
    """Codes like a ReLU map's: smoothed noise, about half of it zero, every row different."""
    rng = np.random.default_rng(0)
    base = min(rows, 256, max(16, (1 << 26) // math.prod(shape)))
    noise = rng.standard_normal((base, *shape), dtype=np.float32)
    noise += np.roll(noise, 1, 1) + np.roll(noise, 1, 2)
    codes = np.clip(np.maximum(noise, 0) * 35, 0, 254).astype(np.uint8)
    return np.concatenate([np.roll(codes, (k, 3 * k), (1, 3)) for k in range(-(-rows // base))])[:rows]


def write(folder: Path, values: Array, compression: Any, most_rows: int = GRANULE) -> ArrayView:
    """Store the rows as one view of a feedfast array, through zarr-python; blocks of at most ``most_rows`` rows."""
    rows, row = len(values), values.shape[1:]
    row_bytes = math.prod(row)
    block = most_rows
    while block > 1 and block * row_bytes > BLOCK_BYTES:
        block //= 2
    per_shard = shard_rows_for(row_bytes, block, SHARD_BYTES)
    padded = -(-rows // per_shard) * per_shard
    spec = ArraySpec(
        name=folder.name,
        shape=(1, padded, *row),
        dtype=np.dtype("u1"),
        fill=0xFF,
        chunk=(1, per_shard, *row),
        block=(1, block, *row),
        compression=compression,
        dims=("view", "row", "height", "width", "channel"),
        views=1,
        rows=rows,
    )
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(spec.zarr_metadata()))
    array: Any = zarr.open_array(store=str(folder), mode="r+", zarr_format=3)
    for shard in range(spec.num_shards):
        start, stop = spec.shard_span(shard)
        array[0, start:stop] = values[start:stop]
    sizes = {shard: (folder / spec.key(0, shard)).stat().st_size for shard in range(spec.num_shards)}
    return ArrayView(spec, Disk(folder.parent), 0, sizes)


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


def by_stream(sources: list[ArrayView], threads: int, rows: Array) -> Callable[[Slices], Iterator[Batch]]:
    """feedfast's own stream; takes row numbers, not slices. Files and buffers outlive a pass, as in a reader."""
    files, pool = ShardFiles(), BufferPool()

    def run(slices: Slices) -> Iterator[Batch]:
        return Stream(sources, rows, BATCH, threads=threads, files=files, pool=pool)

    return run


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.rglob("c/**/*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def check(run: Callable[[Slices], Iterator[Batch]], slices: Slices, order: Array, values: dict[str, Array]) -> str:
    """Empty if a pass gives what was written, else what is wrong."""
    done = 0
    for number, batch in enumerate(run(slices)):
        wanted = order[number * BATCH : (number + 1) * BATCH]
        found = batch if isinstance(batch, dict) else dict.fromkeys(values, batch)
        if not all(np.array_equal(found[name], written[wanted]) for name, written in values.items()):
            return f"wrong values in batch {number}"
        done += len(wanted)
    return "" if done == len(order) else f"{done} rows instead of {len(order)}"


def timed(run: Callable[[Slices], Iterator[Batch]], slices: Slices) -> tuple[float, float]:
    """GB of decoded rows per second, and per second of processor time, of one pass."""
    start, processor = time.perf_counter(), time.process_time()
    nbytes = 0
    for batch in run(slices):
        nbytes += sum(part.nbytes for part in batch.values()) if isinstance(batch, dict) else batch.nbytes
    return nbytes / 1e9 / (time.perf_counter() - start), nbytes / 1e9 / (time.process_time() - processor)


def passes(rows: int, row_bytes: int, *, joint: bool) -> dict[str, tuple[Slices, Array]]:
    """Per kind of pass: the slices of each batch (none where only row numbers can say it), and all its rows."""
    sequential: Slices = [[(start, start + BATCH)] for start in range(0, rows, BATCH)]
    sizes = pass_sizes(row_bytes, 1, MAX_BUFFER_BYTES)
    mixed = {"mixed": ([], pass_order(rows, 1, 0, 1, *sizes))}
    if joint:
        fixed = pass_order(rows, 1, 0, 1)
        return {"sequential": (sequential, np.arange(rows)), **mixed, "mixed 64x16": ([], fixed)}
    granules = np.random.default_rng(1).permutation(rows // GRANULE)
    permuted = [
        [(int(g) * GRANULE, int(g + 1) * GRANULE) for g in granules[i : i + 2]] for i in range(0, len(granules), 2)
    ]
    order = np.concatenate([np.arange(start, stop) for batch in permuted for start, stop in batch])
    return {"sequential": (sequential, np.arange(rows)), "permuted": (permuted, order), **mixed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few rows, one repeat, nothing appended")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per row (default 5)")
    parser.add_argument("--only", default="", help="comma-separated row kinds (default all)")
    parser.add_argument("--folder", type=Path, help="where the arrays are written (default a temporary folder)")
    args = parser.parse_args(argv)
    kinds = args.only.split(",") if args.only else [*ROWS, *JOINT]
    args.repeats = 1 if args.tiny else args.repeats
    results: list[dict[str, Any]] = []
    head = f"{'rows':15} {'codec':5} {'pass':11} {'candidate':15} {'GB/s':>7} {'low':>7} {'high':>7} {'per CPU s':>9}"
    print(head, file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in kinds:
            shapes, rows = JOINT[kind] if kind in JOINT else ((ROWS[kind][0],), ROWS[kind][1])
            rows = 256 if args.tiny else rows
            granule, _ = pass_sizes(sum(map(math.prod, shapes)), 1, MAX_BUFFER_BYTES)
            for compression in ("none", "zstd"):
                place = Path(folder, kind, compression)
                values = {f"codes{number}": maps(shape, rows) for number, shape in enumerate(shapes)}
                sources = [write(place / name, codes, compression, granule) for name, codes in values.items()]
                results += _measure_all(kind, compression, sources, values, args)
                shutil.rmtree(place)
    if not args.tiny:
        _append(results)
    best = max((row for row in results if row.get("gb_per_s")), key=lambda row: row["gb_per_s"])
    print(
        json.dumps({"rows": len(results), "skipped": [r for r in results if r["skipped"]], "best": best}, default=str)
    )
    return 0


def _measure_all(
    kind: str, compression: str, sources: list[ArrayView], values: dict[str, Array], args: argparse.Namespace
) -> list[dict[str, Any]]:
    batched, zarrs = "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"
    stored = sum(size for source in sources for size in source.sizes.values())
    decoded = sum(codes.nbytes for codes in values.values())
    row_bytes = sum(source.spec.row_bytes for source in sources)
    place, results = Path(sources[0].store.where(sources[0].spec.name)), []
    kinds = passes(len(next(iter(values.values()))), row_bytes, joint=len(sources) > 1)
    for name, (slices, order) in kinds.items():
        candidates: dict[str, Callable[[], Callable[[Slices], Iterator[Batch]]]] = {
            "zarr-python x1": lambda: by_zarr(place, 1, batched),
            "zarr-python x2": lambda: by_zarr(place, 2, batched),
            "zarrs x1": lambda: by_zarr(place, 1, zarrs),
            "zarrs x2": lambda: by_zarr(place, 2, zarrs),
            "tensorstore": lambda: by_tensorstore(place),
        }
        if name.startswith("mixed") or len(sources) > 1:
            candidates = {}
        for threads in (1, 2):
            candidates[f"direct x{threads}"] = lambda threads=threads, order=order: by_stream(sources, threads, order)
        runs = {candidate: make() for candidate, make in candidates.items()}
        wrong = {candidate: check(run, slices, order, values) for candidate, run in runs.items()}
        rates: dict[str, list[tuple[float, float]]] = {candidate: [] for candidate in runs}
        for _ in range(args.repeats):  # the candidates take turns, so that a busy moment of the machine meets them all
            for candidate, run in runs.items():
                if not wrong[candidate]:
                    if args.cold:
                        drop_from_page_cache(place.parent)
                    rates[candidate].append(timed(run, slices))
        for candidate, pairs in rates.items():
            wall, processor = [list(column) for column in zip(*pairs, strict=True)] or [[], []]
            row: dict[str, Any] = {
                "rows": kind, "row_bytes": row_bytes,
                "block_rows": "/".join(str(source.spec.block_rows) for source in sources),
                "compression": compression, "ratio": round(decoded / stored, 3), "pass": name,
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
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "--porcelain", "feedfast/storage") else ""),
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
