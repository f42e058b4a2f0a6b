"""Streaming a cache from a bucket against a folder: MB/s of decoded rows, and requests per batch.

    python bench/bench_bucket.py                  # 0 and 50 ms before each answer, with and without a local tier

The server is the tests' own: moto's S3 on 127.0.0.1 behind a proxy that waits, both in Python and on the cores of the
reader. It shows what latency costs and what hides it; a real store's bandwidth it does not show.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from buckets import Cloud, Fault, Proxy, s3_server
from cache_samples import fill_cache, make_manifest, make_tap, make_teacher

from feedfast.storage.bucket import Bucket
from feedfast.storage.copying import copy_cache
from feedfast.storage.places import open_store
from feedfast.storage.reader import CacheReader
from feedfast.storage.store import NEAR
from feedfast.storage.tier import Tier

ARRAY = "targets/a/final/codes"
BATCH = 128


def passed(reader: CacheReader, seconds: float) -> tuple[float, int]:
    """MB/s of passes over the first view in stored order, for about so long, and batches."""
    done, batches, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for batch in reader.stream([ARRAY], 0, batch_size=BATCH):
            done += batch[ARRAY].nbytes
            batches += 1
    return done / (time.perf_counter() - began) / 1e6, batches


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4096, help="of 16 KiB")
    options.add_argument("--seconds", type=float, default=8.0, help="per row of the table")
    options.add_argument("--latency-ms", type=float, nargs="*", default=[0.0, 50.0])
    options.add_argument("--out", type=Path, help="a CSV file to write")
    given = options.parse_args()
    teacher = make_teacher("a", make_tap("final", (64, 16, 16)))
    manifest = make_manifest(teacher, rows=given.rows, views=1, granule=64, shard_bytes=8 << 20, batch_rows=128)
    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        folder = Path(place)
        fill_cache(folder / "c.zarr", manifest, batch=128)
        with s3_server() as port:
            cloud = Cloud(port, Proxy(port), "bench")
            cloud.request("PUT", "/bench")
            os.environ.update(cloud.environment)
            url = cloud.url()
            copy_cache(open_store(folder / "c.zarr"), open_store(url))

            def measure(name: str, latency_ms: float, reader: CacheReader) -> None:
                before = len(cloud.proxy.seen)
                rate, batches = passed(reader, given.seconds)
                asked = (len(cloud.proxy.seen) - before) / batches
                table.append(
                    {
                        "what": name,
                        "latency_ms": latency_ms,
                        "mb_per_s": round(rate, 1),
                        "requests_per_batch": round(asked, 3),
                    }
                )
                print(*table[-1].values(), flush=True)

            measure("folder", 0.0, CacheReader(folder / "c.zarr"))
            for latency_ms in given.latency_ms:
                cloud.proxy.rule = lambda *_, ms=latency_ms: Fault(delay_s=ms / 1e3)  # type: ignore[misc]
                measure("bucket", latency_ms, CacheReader(url))
                with patch.object(Bucket, "reach", NEAR):  # as a folder is read: two threads, 1 MiB at a time
                    measure("bucket, not reaching ahead", latency_ms, CacheReader(url))
                tier = Tier(folder / f"near{latency_ms:.0f}", 1 << 30)
                first = CacheReader(url, tier=tier)
                began = time.perf_counter()
                rows = sum(len(batch[ARRAY]) for batch in first.stream([ARRAY], 0, batch_size=BATCH))
                nbytes = rows * int(np.prod(first.specs[ARRAY].row_shape))
                print("first pass with a tier", latency_ms, round(nbytes / (time.perf_counter() - began) / 1e6, 1))
                measure("bucket, later passes with a tier", latency_ms, CacheReader(url, tier=tier))
            cloud.proxy.close()
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
