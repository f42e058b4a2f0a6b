"""Memory and bytes of a cache with very large rows: OFD's six taps of DeepLabV3+, 14.3 MB per image at 513 pixels.

    python bench/bench_large_rows.py                   64 rows, 0.9 GB in the temporary folder
    python bench/bench_large_rows.py --rows 256        is memory flat?
    python bench/bench_large_rows.py --side 65         seconds; the same shape of work at 65 pixels

Two processes, one after the other: `write` encodes and appends batches of float maps as the caching pass does (made-up
maps; no teacher runs), `read` streams a second, mixed pass. Peak is the resident memory beyond what the process held
before its first row: for `write` without the float maps themselves, which are a teacher's and are made before. `read`
also counts the bytes that were read, against those that are stored, and the places of the view a batch's rows are from.
The table goes to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedfast.data.passes import pass_order, pass_sizes
from feedfast.storage import names
from feedfast.storage.disk import FileObject
from feedfast.storage.layout import array_specs
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import DatasetInfo, DecoderInfo, Manifest, PlanInfo, TapInfo, TeacherInfo
from feedfast.storage.stream import MAX_BUFFER_BYTES
from feedfast.storage.writer import CacheWriter, open_for_writing
from feedfast_kernels import encode

CHANNELS, STRIDES = (256, 512, 1024, 2048, 256, 256), (4, 8, 16, 16, 16, 4)
BATCH = 12  # the authors', of two GPUs
OFFSET, STEP = -1.0, 0.03


def manifest(rows: int, side: int) -> Manifest:
    """One teacher, six taps, one view; granule and window as for any new cache."""
    taps = {}
    for number, (channels, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True), start=1):
        grid = -(-side // stride)
        shape = (channels, grid, grid)
        taps[f"ofd{number}"] = TapInfo(name=f"ofd{number}", path="x", position="pre", shape=shape, codec="u8")
    granule, window = pass_sizes(sum(tap.row_bytes for tap in taps.values()), 1, MAX_BUFFER_BYTES)
    triple = (0.5, 0.5, 0.5)
    teacher = TeacherInfo(name="a", model="made up", weights_sha256="0" * 64, mean=triple, std=triple, taps=taps)
    return Manifest(
        dataset=DatasetInfo(kind="pixels", count=rows, fingerprint={"ids": "x"}),
        plan=PlanInfo(algorithm="x", seed=0, size=side, augment="none", granule=granule, window=window),  # type: ignore[arg-type]
        decoder=DecoderInfo(backend="pixels"),
        num_rows=rows,
        views=1,
        batch_rows=BATCH,
        teachers={"a": teacher},
    )


def resident() -> int:
    """Bytes of memory that is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes of the largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(path: Path, rows: int, side: int) -> dict[str, Any]:
    asked = manifest(rows, side)
    taps = asked.teachers["a"].taps
    maps = {
        name: torch.empty(BATCH, *tap.shape, memory_format=torch.channels_last).normal_() for name, tap in taps.items()
    }
    scales = {name: (torch.full((t.channels,), OFFSET), torch.full((t.channels,), STEP)) for name, t in taps.items()}
    before, started = resident(), time.perf_counter()
    stored = open_for_writing(path, asked)
    with CacheWriter(path, stored) as writer:
        for name, (offset, step) in scales.items():
            writer.put(names.scale("a", name), np.stack([offset.numpy(), step.numpy()]))
        for start in range(0, rows, BATCH):
            for name, values in maps.items():
                codes, saturated = encode(values, *scales[name], codec="u8")
                some = codes.numpy()[: rows - start]
                writer.append(names.codes("a", name), 0, start, some, saturated=int(saturated))
    return {"peak_bytes": peak() - before, "seconds": time.perf_counter() - started}


def read(path: Path, rows: int, side: int) -> dict[str, Any]:
    counted = [0]
    real = FileObject.read

    def counting(self: FileObject, targets: Sequence[Any], offset: int) -> int:
        done = real(self, targets, offset)
        counted[0] += done
        return done

    FileObject.read = counting  # type: ignore[method-assign]
    reader = CacheReader(path)
    plan, arrays = reader.manifest.plan, [names.codes("a", tap) for tap in reader.manifest.teachers["a"].taps]
    order = pass_order(rows, 0, 0, 1, plan.granule, plan.window)
    counted[0], before, started = 0, resident(), time.perf_counter()
    places = []
    for number, _ in enumerate(reader.stream(arrays, 0, order, BATCH)):
        places.append(len(np.unique(order[number * BATCH : (number + 1) * BATCH] // plan.granule)))
    specs = array_specs(reader.manifest)
    return {
        "peak_bytes": peak() - before,
        "seconds": time.perf_counter() - started,
        "row_bytes": sum(specs[array].row_bytes for array in arrays),
        "stored_bytes": sum(commit.bytes for array in arrays for commit in reader.committed(array).values()),
        "read_bytes": counted[0],
        "granule": plan.granule,
        "window": plan.window,
        "places_per_batch": float(np.mean(places)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--side", type=int, default=513)
    parser.add_argument("--phase", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.phase is not None:
        work = write if options.phase == "write" else read
        print(json.dumps(work(options.path, options.rows, options.side)))
        return
    found: dict[str, Any] = {"rows": options.rows, "side": options.side}
    with tempfile.TemporaryDirectory() as folder:
        for phase in ("write", "read"):
            words = [
                "--phase",
                phase,
                "--path",
                f"{folder}/c",
                "--rows",
                str(options.rows),
                "--side",
                str(options.side),
            ]
            done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
            found[phase] = json.loads(done.stdout)
    for phase in ("write", "read"):
        what = ", ".join(f"{key} {value:,.5g}" for key, value in found[phase].items())
        print(f"{phase:<6} {what}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
