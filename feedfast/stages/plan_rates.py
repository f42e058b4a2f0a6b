"""How fast rows can be read where a cache is to lie: the disk's rate and the decoder's, measured for a moment.

The disk is read past the page cache, from a file of our own that is removed again; nothing else is dropped from
memory. Where that is not possible (some file systems cannot), the file is read through the page cache, and the rate is
memory's: `DiskRate.direct` says which.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from feedfast.files import write_all
from feedfast.storage.blocks import decompress
from feedfast.storage.create import PLAN_PROBE
from feedfast.storage.schema import Compression

FILE_BYTES: Final = 64 << 20  # 64 MiB, at most a tenth of what is free
PIECE_BYTES: Final = 4 << 20  # 4 MiB, about a shard's worth of blocks in one read
SECONDS: Final = 1.0  # at most, of reading
DECODING_SECONDS: Final = 0.02


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second of one reader, past the page cache if ``direct``; and of one writer, until they are durable."""

    bytes_per_second: float
    direct: bool
    written_per_second: float | None = None


def disk_rate(folder: Path, free_bytes: int) -> DiskRate | None:
    """Write a file into ``folder``, read it, remove it; None where it cannot be written or there is no room for it."""
    pieces = min(FILE_BYTES, free_bytes // 10) // PIECE_BYTES
    if not pieces:
        return None
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=PLAN_PROBE) as file:
        # random bytes: a file system that compresses would not show the disk
        noise = np.random.default_rng().bytes(PIECE_BYTES)
        begin = time.perf_counter()
        for number in range(pieces):
            write_all(file.fileno(), [number.to_bytes(8, "little"), memoryview(noise)[8:]])
        os.fsync(file.fileno())
        written = pieces * PIECE_BYTES / max(time.perf_counter() - begin, 1e-9)
        with contextlib.suppress(OSError):
            return DiskRate(_read(file.name, pieces, getattr(os, "O_DIRECT", 0)), hasattr(os, "O_DIRECT"), written)
        return DiskRate(_read(file.name, pieces, 0), False, written)
    return None


def _read(path: str, pieces: int, flags: int) -> float:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as buffer:  # aligned to a page, as direct reads require
            begin, got = time.perf_counter(), 0
            for number in range(pieces):
                got += os.preadv(fd, [buffer], number * PIECE_BYTES)
                if time.perf_counter() - begin > SECONDS:
                    break
            return got / max(time.perf_counter() - begin, 1e-9)
    finally:
        os.close(fd)


def decode_ms(stored: bytes, compression: Compression, raw_bytes: int) -> float:
    """Milliseconds in which one thread decodes and checks a stored block, the least of a few."""
    out = np.empty(raw_bytes, np.uint8)
    least, until = float("inf"), time.perf_counter() + DECODING_SECONDS
    while True:
        begin = time.perf_counter()
        decompress(stored, compression, out)
        end = time.perf_counter()
        least = min(least, end - begin)
        if end > until:
            return least * 1e3
