"""How fast the loader makes pixels: CIFAR pad-crop-flip, JPEG resized-crop-flip, JPEG evaluation, and drawing a plan.

Each loader row streams whole views and counts only full passes after one that warms DALI, the page cache and the
allocator. Reported are the median of the passes, the slowest and the fastest, and images per second of processor time,
which suffers less from a busy machine. The first batch is compared with PIL before anything is timed: a wrong loader
has no speed. The PIL rows make the same pixels in one process, for scale. Files are read from the page cache; cold
disks are not measured here.

    python bench/bench_loader.py [--data ../shared/data] [--passes 5] [--threads 2] [--tiny]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan


def images_per_second(passes: int, one_pass: Callable[[int], Iterator[Batch]]) -> dict[str, float]:
    rates, work = [], []
    for index in range(passes + 1):
        start, cpu = time.perf_counter(), time.process_time()
        count = sum(len(batch.ids) for batch in one_pass(index))
        rates.append(count / (time.perf_counter() - start))
        work.append(count / (time.process_time() - cpu))
    timed = rates[1:]
    return {
        "images_per_second": round(statistics.median(timed), 1),
        "slowest": round(min(timed), 1),
        "fastest": round(max(timed), 1),
        "per_cpu_second": round(statistics.median(work[1:]), 1),
        "images_per_pass": count,
    }


def reference(data: Dataset, plan: ViewPlan, position: int, view: int) -> np.ndarray:
    """One sample of a view through PIL."""
    if data.kind == "pixels":
        image = Image.fromarray(data.pixels([position])[0])
    else:
        with Image.open(data.path(position)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    ids = data.ids[position : position + 1]
    top, left, h, w = (int(v) for v in plan.crops(view, ids, data.sizes[position : position + 1])[0])
    image = image.crop((left, top, left + w, top + h))
    if image.size != (plan.size, plan.size):
        image = image.resize((plan.size, plan.size), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.mirror(image) if plan.flips(view, ids)[0] else image)


def check(loader: Loader, view: int, tolerance: int) -> None:
    batch = next(loader.stream(view, np.arange(min(32, len(loader.dataset)))))
    for i, position in enumerate(np.searchsorted(loader.dataset.ids, batch.ids)):
        expected = reference(loader.dataset, loader.plan, int(position), view)
        off = np.abs(batch.images[i].numpy().astype(int) - expected)[1:-1, 1:-1]  # see loader.py about the edge
        if off.max() > tolerance:
            raise SystemExit(f"wrong pixels: {loader.dataset.name(int(position))} is off by {off.max()}")


def bench_views(
    data: Dataset, plan: ViewPlan, batch: int, threads: int | None, passes: int, fewest: int
) -> dict[str, Any]:
    with Loader(data, plan, batch_size=batch, threads=threads) as loader:
        check(loader, 0, 0 if data.kind == "pixels" else 1)
        rows = np.tile(np.arange(len(data)), -(-fewest // len(data)))  # a small set several times: not its start-up
        return {"batch": batch, **images_per_second(passes, lambda view: loader.stream(view, rows))}


def bench_pil(data: Dataset, plan: ViewPlan, count: int) -> dict[str, Any]:
    start = time.perf_counter()
    for position in range(min(count, len(data))):
        reference(data, plan, position, 0)
    seconds = time.perf_counter() - start
    return {"images_per_second": round(min(count, len(data)) / seconds, 1), "processes": 1}


def bench_plan(samples: int) -> dict[str, float]:
    plan = ViewPlan(0, 224, "resized-crop-flip")
    ids, sizes = np.arange(samples), np.tile([[375, 500]], (samples, 1))
    seconds = {}
    for name, draw in (
        ("order", lambda: plan.order(0, ids)),
        ("crops", lambda: plan.crops(0, ids, sizes)),
        ("flips", lambda: plan.flips(0, ids)),
    ):
        start = time.perf_counter()
        draw()
        seconds[f"{name}_seconds"] = round(time.perf_counter() - start, 4)
    return {"samples": samples, **seconds}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FEEDFAST_DATA", here)))
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="a few images, to see that it runs")
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        raise SystemExit(f"real images not found: {args.data} (give --data or FEEDFAST_DATA)")
    passes, per_class, fewest = (1, 1, 1) if args.tiny else (args.passes, 0, 600)

    cifar = open_dataset(args.data / "cifar-100-binary" / "train.bin", limit=per_class)
    small = open_dataset(args.data / "imagenette-small" / "train", limit=per_class)
    photos = open_dataset(args.data / "photos-varied", limit=8 if args.tiny else 0)
    pad_crop, resized = ViewPlan(0, 32, "pad-crop-flip"), ViewPlan(0, 224, "resized-crop-flip")
    rows: dict[str, Any] = {}

    def record(name: str, result: dict[str, Any]) -> None:
        rows[name] = result
        print(f"{name:28s} {result}", file=sys.stderr)

    record("plan", bench_plan(10_000 if args.tiny else 1_281_167))
    record("cifar_pad_crop_flip", bench_views(cifar, pad_crop, 128, args.threads, passes, fewest))
    record("jpeg224_resized_crop_flip", bench_views(small, resized, 64, args.threads, passes, fewest))
    record("jpeg224_pil", bench_pil(small, resized, 10 if args.tiny else 400))
    record("photos_resized_crop_flip", bench_views(photos, resized, 61, args.threads, passes, fewest))
    record("photos_pil", bench_pil(photos, resized, 61))
    with Loader(photos, resized, batch_size=61, threads=args.threads) as loader:
        record("photos_evaluation", images_per_second(passes, lambda _: loader.evaluation()))
        machine = {"cpus": len(os.sched_getaffinity(0)), "threads": loader.threads, "machine": platform.machine()}
        document = {"bench": "loader", "tiny": args.tiny, **machine, "decoder": loader.describe(), "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
