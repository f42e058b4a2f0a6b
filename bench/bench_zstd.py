"""zstd level 1 against the fast strategy with long matches only, on a cache's own blocks of codes.

    python bench/bench_zstd.py CACHE TEACHER/TAP ...

Blocks are read and decoded with feedfast's reader, encoded both ways, and decoded with the reader's own decoder, the
two ways in turn within one process: on a shared machine only ratios of such times mean anything. Needs `zstandard`,
because numcodecs cannot be told strategy and match length; frames of both are ordinary ones with size and checksum.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import zstandard
from numcodecs import zstd

from feedfast.storage import names
from feedfast.storage.reader import CacheReader

LEVEL_1 = zstandard.ZstdCompressionParameters.from_level(1, write_checksum=True)
LONG_MATCHES = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    window_log=17,
    hash_log=6,
    target_length=0,
    write_checksum=True,
)


def compare(blocks: list[np.ndarray], repeats: int) -> dict[str, float]:
    """Stored bytes per code of both, and how many times as fast the second works: medians of ``repeats``."""
    ways = {"level_1": LEVEL_1, "long_matches": LONG_MATCHES}
    encoders = {name: zstandard.ZstdCompressor(compression_params=given) for name, given in ways.items()}
    frames = {name: [encoder.compress(block) for block in blocks] for name, encoder in encoders.items()}
    out = np.empty_like(blocks[0])
    for made in frames.values():
        for frame, block in zip(made, blocks, strict=True):
            zstd.decompress(frame, out)
            assert np.array_equal(out, block)
    encoding, decoding = [], []
    for _ in range(repeats):
        took = {}
        for name, encoder in encoders.items():
            begin = time.perf_counter()
            for block in blocks:
                encoder.compress(block)
            middle = time.perf_counter()
            for frame in frames[name]:
                zstd.decompress(frame, out)
            took[name] = middle - begin, time.perf_counter() - middle
        encoding.append(took["level_1"][0] / took["long_matches"][0])
        decoding.append(took["level_1"][1] / took["long_matches"][1])
    total = sum(block.size for block in blocks)
    found = {name: sum(map(len, made)) / total for name, made in frames.items()}
    found["numcodecs_level_1"] = sum(len(zstd.compress(block, 1, True)) for block in blocks) / total
    return found | {"encodes": float(np.median(encoding)), "decodes": float(np.median(decoding))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("targets", nargs="+", help="teacher/tap")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    reader = CacheReader(given.cache)
    for target in given.targets:
        array = names.codes(*target.split("/"))
        spec = reader.specs[array]
        rows = np.arange(
            min(given.blocks * spec.block_rows, reader.manifest.num_rows) // spec.block_rows * spec.block_rows
        )
        codes = reader.read_rows(array, 0, rows).reshape(-1, spec.block_bytes)
        print(json.dumps({"target": target, "block_bytes": spec.block_bytes} | compare(list(codes), given.repeats)))


if __name__ == "__main__":
    main()
