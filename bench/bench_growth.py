"""How time and memory grow: with rows, views, taps, teachers, shards, writers, and with the images of a data set.

    python bench/bench_growth.py                 about four minutes and 100 MB in memory
    python bench/bench_growth.py --tiny          seconds; two sizes per axis, nothing appended
    python bench/bench_growth.py --plot P.svg    draw the rows that were measured last, and say the exponents
    python bench/bench_growth.py --paper         bytes, objects, logs of caches too large to make, by the layout alone

A cache of the size in question is made without running a network: its manifest and `zarr.json` files by the product,
its logs as the writer writes them (`Commit.to_line`, random checksums), rows of one byte. The first shard of each
array is real; of the others there are files of the committed length without content, where objects are asked for.
A tar data set is real, of one tiny PNG; from 10^5 images on its shards are copies of one.

Measured, each in a forked process: `open` (CacheReader), from an index and from the lines alone; `verify`
(the quick check, which looks up every object); `write` (what a writer does before it begins); `batch` (the first 128
rows); `plan` (order, boxes and flips of one view); `index` and `reopen` of tar shards. Seconds and processor seconds
are the least of `--repeats`; memory is what the process grew by at its most. Rows go to `results_growth.csv`. An
exponent is the slope of log(processor seconds) over log(size) between the two largest sizes: 1 is a straight line.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feedfast.data.dataset import open_dataset
from feedfast.data.views import ViewPlan
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import Commit, keep_index, log_name
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import DatasetInfo, DecoderInfo, Manifest, PlanInfo, TapInfo, TeacherInfo
from feedfast.storage.verify import verify_cache
from feedfast.storage.writer import CacheWriter, open_for_writing

RESULTS = Path(__file__).with_name("results_growth.csv")
BATCH = 128
IMAGES_PER_TAR = 1000


@dataclass(frozen=True)
class Size:
    """One cache; ``files``: its objects exist, too."""

    rows: int = 100_000
    views: int = 4
    taps: int = 1
    teachers: int = 1
    shard_rows: int = 1024
    writers: int = 1
    files: bool = True


@dataclass(frozen=True)
class Row:
    """One measurement."""

    date: str
    commit: str
    machine: str
    axis: str
    size: int
    what: str
    lines: int  # of the logs; images of a data set
    log_bytes: int
    seconds: float
    cpu_seconds: float
    memory_bytes: int


COLUMNS = [column.name for column in fields(Row)]
AXES: dict[str, tuple[Sequence[int], Sequence[int]]] = {  # all sizes, and those of --tiny
    "rows": ((1_000, 10_000, 100_000, 1_000_000), (1_000, 2_000)),
    "views": ((1, 4, 16, 64), (1, 2)),
    "taps": ((1, 4, 16), (1, 2)),
    "teachers": ((1, 4, 16), (1, 2)),
    "shards": ((98, 391, 1563), (98, 196)),
    "writers": ((1, 8, 64), (1, 2)),
}
TARGET = Size(rows=1_000_000, views=64, files=False)
IMAGES = ((1_000, 10_000, 100_000, 1_300_000), (100, 200))


def size_of(axis: str, value: int) -> Size:
    if axis == "shards":  # of one view of 100,000 rows
        return Size(shard_rows=2 ** math.floor(math.log2(100_000 / value * 1.01)), views=2)
    return replace(Size(), **{axis: value})


def manifest_of(size: Size) -> Manifest:
    tap = {
        f"t{number}": TapInfo(name=f"t{number}", path="x", position="pre", shape=(1,)) for number in range(size.taps)
    }
    tap["logits"] = TapInfo(name="logits", path="", position="post", shape=(1,), codec="f16")
    teachers = {
        name: TeacherInfo(
            name=name, model="zoo/wrn-10-1", weights_sha256=f"{number:064x}", mean=(0.5,) * 3, std=(0.5,) * 3, taps=tap
        )
        for number, name in enumerate(f"a{number}" for number in range(size.teachers))
    }
    return Manifest(
        dataset=DatasetInfo(kind="files", count=size.rows, fingerprint={"ids": "1"}),
        plan=PlanInfo(algorithm="philox", seed=1, size=32, augment="pad-crop-flip", pad=4),
        decoder=DecoderInfo(backend="dali-cpu"),
        num_rows=size.rows,
        views=size.views,
        shard_bytes=4 * size.shard_rows,
        batch_rows=128,
        teachers=teachers,
    )


def first_rows(writer: CacheWriter, spec: ArraySpec) -> None:
    """The first shard of view 0, as the product writes it."""
    stop = spec.shard_span(0)[1]
    writer.append(spec.name, 0, 0, np.ones((stop, *spec.row_shape), spec.dtype))


def make_cache(path: Path, size: Size) -> tuple[Manifest, int, int]:
    """The cache; its lines and their bytes."""
    manifest = open_for_writing(path, manifest_of(size))
    with CacheWriter(path, manifest) as writer:
        for spec in writer.specs.values():
            if spec.sharded:
                first_rows(writer, spec)
    log = path / "commits" / log_name((0, 1))
    real = {(c.array, c.shard): c for c in map(Commit.from_line, log.read_bytes().splitlines())}
    log.unlink()
    rng = np.random.default_rng(0)
    written: list[list[str]] = [[] for _ in range(size.writers)]
    lines, fits = 0, dict[str, str]()  # codes name the scale they were made with
    for name, spec in array_specs(manifest).items():
        digest, tap = manifest.digest_for(name), name.rpartition("/")[0]
        fit = fits.get(tap, "") if name.endswith("/codes") else ""
        for view in range(spec.num_views):
            for shard in range(spec.num_shards):
                key = spec.key(view, shard)
                commit = real.get((name, key))
                if commit is None:
                    sums = tuple(f"{number:08x}" for number in rng.integers(0, 2**32, spec.real_blocks(shard)))
                    start, stop = spec.shard_span(shard)
                    length = spec.shard_rows * spec.row_bytes + 4 * len(sums) + 20
                    commit = Commit(
                        array=name, shard=key, view=view, rows=(start, stop), bytes=length, crc32c="01234567",
                        sha256=rng.bytes(32).hex(), manifest=digest, block_sums=sums, fit=fit,
                    )  # fmt: skip
                    if size.files:
                        file = path / name / key
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.touch()
                        os.truncate(file, length)
                elif fit:
                    commit = dataclasses.replace(commit, fit=fit)
                if name.endswith("/scale"):
                    fits[tap] = commit.sha256[:16]
                written[lines % size.writers].append(commit.to_line())
                lines += 1
    for part, found in enumerate(written):
        (path / "commits" / log_name((part, size.writers))).write_text("".join(found))
    return manifest, lines, sum(file.stat().st_size for file in (path / "commits").glob("*.jsonl"))


def make_tars(folder: Path, images: int) -> str:
    """Shards of a thousand images; what opens them."""
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture, "PNG")
    first = folder / "train-000000.tar"
    per_tar = min(images, IMAGES_PER_TAR)
    with tarfile.open(first, "w") as out:
        for number in range(per_tar):
            for ending, content in (("png", picture.getvalue()), ("cls", str(number % 1000).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    shards = images // per_tar
    for number in range(1, shards):
        os.link(first, folder / f"train-{number:06d}.tar")  # one file by many names: the walk reads each
    return f"{folder}/train-{{000000..{shards - 1:06d}}}.tar" if shards > 1 else str(first)


def alone(call: Callable[[], object], repeats: int) -> tuple[float, float, int]:
    """Least seconds of a call in a process of its own, least seconds of its processor time, and what that grew by."""

    def child(pipe: Any) -> None:
        before = resident_bytes()
        seconds, work = [], []
        for _ in range(repeats):
            start, cpu = time.perf_counter(), time.process_time()
            kept = call()
            seconds.append(time.perf_counter() - start)
            work.append(time.process_time() - cpu)
            del kept
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((min(seconds), min(work), max(0, peak - before)))
        pipe.close()

    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    found: tuple[float, float, int] = here.recv()
    process.join()
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def calls(path: Path, manifest: Manifest, size: Size) -> dict[str, Callable[[], object]]:
    """What is measured of a cache, before it has an index."""
    array = "targets/a0/t0/codes"

    def batch() -> object:
        reader = CacheReader(path)
        return next(iter(reader.stream([array], 0, np.arange(BATCH), BATCH)))

    def write() -> object:
        with CacheWriter(path, manifest) as writer:
            return [*writer.pending(name for name, spec in writer.specs.items() if spec.sharded).batches(128)]

    found: dict[str, Callable[[], object]] = {"open, lines": lambda: CacheReader(path)}
    if size.files:
        found |= {"verify": lambda: verify_cache(path), "write": write} if size.writers == 1 else {}
        found["batch"] = batch
    return found


def plan_of(rows: int) -> Callable[[], object]:
    plan = ViewPlan(seed=1, size=224, augment="resized-crop-flip")
    ids, sizes = np.arange(rows, dtype=np.uint32), np.full((rows, 2), 400, np.int32)

    def draw() -> object:
        order = plan.order(0, ids)
        return order, plan.resolved(0, order, sizes[order], None)

    return draw


def measured(
    tiny: bool, repeats: int, folder: Path, only: str
) -> Iterator[tuple[str, int, str, int, int, float, float, int]]:
    points = [
        (axis, value, size_of(axis, value)) for axis, (full, few) in AXES.items() for value in (few if tiny else full)
    ]
    if not tiny:
        points.append(("target", 64, TARGET))
    for axis, value, size in points:
        if only and axis != only:
            continue
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            path = Path(temporary) / "c.zarr"
            manifest, lines, log_bytes = make_cache(path, size)
            for what, call in calls(path, manifest, size).items():
                yield axis, value, what, lines, log_bytes, *alone(call, repeats)
            if keep_index(path, array_specs(manifest)):
                yield axis, value, "open, index", lines, log_bytes, *alone(partial(CacheReader, path), repeats)
            if axis == "rows":
                yield axis, value, "plan", lines, log_bytes, *alone(plan_of(size.rows), repeats)
    for images in IMAGES[tiny] if only in ("", "images") else ():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            source = make_tars(Path(temporary) / "tars", images)
            yield "images", images, "index", images, 0, *alone(partial(open_dataset, source), 1)
            index = sum(file.stat().st_size for file in (Path(temporary) / "tars").glob(".feedfast-*"))
            yield "images", images, "reopen", images, index, *alone(partial(open_dataset, source), repeats)


PAPER: dict[str, tuple[int, int, dict[str, tuple[tuple[int, ...], str]]]] = {  # rows per view, views, taps
    "ImageNet-21k, last map and logits": (
        14_197_122, 4, {"final": ((2048, 7, 7), "u8"), "logits": ((21_841,), "f16")}
    ),
    "ImageNet-21k, the four maps of OFD": (
        14_197_122, 4,
        {f"ofd{n}": ((256 * 2**n, 56 >> n, 56 >> n), "u8") for n in range(4)} | {"logits": ((21_841,), "f16")},
    ),
    "1e9 samples, a vector of 1,024": (1_000_000_000, 1, {"final": ((1024,), "u8")}),
    "1e9 samples, last map": (1_000_000_000, 1, {"final": ((2048, 7, 7), "u8")}),
}  # fmt: skip
LINE_BYTES, SUM_BYTES = 302, 11  # of a commit line without block sums, and of each; as `target` has them
INDEX_BYTES = 57  # of an object in the index of logs, and 4 per block


def paper() -> list[dict[str, Any]]:
    """What the layout says of caches that nobody makes to be measured."""
    found = []
    for name, (rows, views, shapes) in PAPER.items():
        taps = {
            tap: TapInfo(name=tap, path="" if tap == "logits" else "x", position="post", shape=shape, codec=codec)
            for tap, (shape, codec) in shapes.items()
        }
        base = manifest_of(Size(rows=rows, views=views))
        teacher = base.teachers["a0"].model_copy(update={"taps": taps})
        specs = array_specs(base.model_copy(update={"teachers": {"a0": teacher}, "shard_bytes": 32 << 20})).values()
        objects = sum(spec.num_views * spec.num_shards for spec in specs)
        blocks = sum(spec.num_views * spec.num_shards * spec.blocks_per_shard for spec in specs)
        sharded = [spec for spec in specs if spec.sharded]
        small = [spec for spec in specs if not spec.sharded]
        found.append(
            {
                "cache": name,
                "rows_per_view": rows,
                "views": views,
                "code_bytes": sum(spec.num_views * spec.rows * spec.row_bytes for spec in sharded),
                "objects": objects,
                "log_bytes": objects * LINE_BYTES + blocks * SUM_BYTES,
                "index_bytes": objects * INDEX_BYTES + blocks * 4,
                "largest_small_array_bytes_per_view": max(spec.block_bytes for spec in small),
                "small_bytes_per_view": sum(spec.block_bytes for spec in small if spec.views),
            }
        )
    return found


def exponents(rows: Sequence[Row]) -> dict[str, float]:
    """Per axis and measurement, the slope of log(seconds) over log(size) between the two largest sizes."""
    found = {}
    for axis, what in dict.fromkeys((row.axis, row.what) for row in rows):
        points = sorted((row.size, row.cpu_seconds) for row in rows if (row.axis, row.what) == (axis, what))
        if len(points) > 1:
            (a, low), (b, high) = points[-2:]
            found[f"{axis}: {what}"] = round(math.log(high / low) / math.log(b / a), 2)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds and memory over size, a pair of panels per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in dict.fromkeys(row.axis for row in rows) if axis != "target"]
    figure, panels = plt.subplots(2, len(axes), figsize=(3 * len(axes), 6), squeeze=False, sharey="row")
    for column, axis in enumerate(axes):
        for what in dict.fromkeys(row.what for row in rows if row.axis == axis):
            points = sorted(
                (row.size, row.cpu_seconds, row.memory_bytes) for row in rows if (row.axis, row.what) == (axis, what)
            )
            sizes, seconds, memory = zip(*points, strict=True)
            panels[0][column].plot(sizes, seconds, marker="o", label=what)
            panels[1][column].plot(sizes, [max(number, 1 << 16) / 2**20 for number in memory], marker="o")
        panels[1][column].set_xlabel(axis)
        for row in (0, 1):
            panels[row][column].set_xscale("log")
            panels[row][column].set_yscale("log")
        panels[0][column].legend(fontsize=6)
    panels[0][0].set_ylabel("processor seconds")
    panels[1][0].set_ylabel("memory, MiB")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def load(path: Path) -> list[Row]:
    """The newest row of each axis, size and measurement."""
    with path.open(newline="") as file:
        kinds = {
            "size": int,
            "lines": int,
            "log_bytes": int,
            "seconds": float,
            "cpu_seconds": float,
            "memory_bytes": int,
        }
        found = [
            Row(**{key: kinds.get(key, str)(value) for key, value in line.items()}) for line in csv.DictReader(file)
        ]
    return list({(row.axis, row.size, row.what): row for row in found}.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small sizes per axis; nothing is appended")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="one axis: rows, views, taps, teachers, shards, writers, target, images"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="draw what --out holds, measure nothing")
    parser.add_argument("--paper", action="store_true", help="sizes by the layout alone, measure nothing")
    args = parser.parse_args(argv)
    if args.paper:
        print(json.dumps(paper()))
        return 0
    if args.plot:
        rows = load(args.out)
        plot(rows, args.plot)
        print(json.dumps({"plot": str(args.plot), "exponents": exponents(rows)}))
        return 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = (
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit or "unknown",
        platform.processor() or platform.machine(),
    )
    memory = Path("/dev/shm")
    rows = []
    for point in measured(
        args.tiny,
        1 if args.tiny else args.repeats,
        memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir()),
        args.only,
    ):
        rows.append(Row(*about, *point))
        row = rows[-1]
        print(
            f"{row.axis:<9} {row.size:>9,} {row.what:<12} {row.lines:>9,} lines {row.seconds:9.4f} s "
            f"{row.cpu_seconds:9.4f} cpu s "
            f"{row.memory_bytes / 2**20:8.1f} MiB",
            file=sys.stderr,
        )
        if not args.tiny:
            new = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(
                    {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
                )
    print(json.dumps({"rows": [asdict(row) for row in rows], "exponents": exponents(rows)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
