"""Reading blocks out of shard files, and believing nothing on the way.

A shard is an ordinary Zarr v3 `sharding_indexed` object: blocks one after another, then an index of
(offset, length) pairs as little-endian uint64, then the index's crc32c. A block is `block_rows` rows of one view,
C-order, either one zstd frame with its content checksum or the raw bytes followed by their crc32c.

Stock Zarr readers turn a missing file, a zero-length file and an absent block into fill values without a word, and
some skip checksums on partial reads. This module reads the files itself, because then every one of these is an error
and because it is the fastest way measured here (`bench/bench_reader.py`): raw blocks go by `preadv` straight into
the caller's memory, and `preadv`, zstd and the fill check all run without the GIL. `google_crc32c` keeps the GIL, but
at about 30 GB/s a block holds it for tens of microseconds.

Checked, in this order: the file's length against the commit log before a byte is read; the index's checksum; offset
and length of each block against the file; for zstd the frame header (content size as expected, checksum flag set: a
flipped flag would otherwise switch the check off, and a forged content size would choose how much memory the decoder
takes); the block's own checksum, and that it is the one in the commit log; the fill value inside rows that hold
data. A flipped bit that zstd itself ignores (there is an unused one in its header) changes no value and is left to
``verify --full``.

Announcing blocks to the kernel ahead of time (`posix_fadvise`) was tried on a cold page cache and changed nothing:
the threads' own reads keep a local disk busy.

It does not decide which shards exist (the log does), does not turn codes into values and never writes.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feedfast.cache.assemble import holds_fill
from feedfast.cache.codec import crc32c, decompress, index_length, parse_index
from feedfast.cache.layout import NO_CHUNK, ArraySpec
from feedfast.errors import CacheDamageError

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ArrayView:
    """One view of one array: how it is stored (``spec``), where (``folder``), its committed bytes by shard number.

    ``sums`` are the logged ends of each shard's blocks, where there are any (`feedfast.cache.log`).
    """

    spec: ArraySpec
    folder: Path
    view: int
    sizes: Mapping[int, int] = field(repr=False)
    sums: Mapping[int, Sequence[str]] = field(default_factory=dict, repr=False)

    def path(self, shard: int) -> Path:
        """The shard's file."""
        return self.folder / self.spec.key(self.view, shard)

    def check_block_identity(self, shard: int, block: int, end: Bytes) -> None:
        """Raise unless a sound block, whose last four bytes are ``end``, is the one that was committed.

        Args:
            shard: number of the shard.
            block: number of the block within it.
            end: uint8 [4].

        Raises:
            CacheDamageError: kind ``checksum``.
        """
        sums = self.sums.get(shard)
        if sums and end.tobytes().hex() != sums[block]:
            number = shard * self.spec.blocks_per_shard + block if self.spec.sharded else None
            raise self.damage("checksum", shard, "sound, but not what was committed: it is of another object", number)

    def damage(self, kind: str, shard: int, detail: str, block: int | None = None) -> CacheDamageError:
        """The error for a bad shard; ``block`` counts from the start of the view."""
        spec, path, key = self.spec, self.path(shard), self.spec.key(self.view, shard)
        where = f"array {spec.name}, shard {key}"
        problem = {"array": spec.name, "shard": key, "kind": kind, "detail": detail, "path": str(path)}
        if block is not None:
            first = block * spec.block_rows
            where += f", block {block} (rows {first} to {min(first + spec.block_rows, spec.rows) - 1})"
            problem["block"] = str(block)
        cure = (
            ""
            if kind in ("incomplete", "missing", "length")
            else "; delete the file to have feedfast cache write it again"
        )
        return CacheDamageError(f"{path}: {detail} [{kind}: {where}]{cure}", [problem])


class CommittedFile:
    """One open object whose length is the committed one; the file closes with the object."""

    def __init__(self, source: ArrayView, number: int) -> None:
        """Open object ``number`` of the view.

        Raises:
            CacheDamageError: kind ``incomplete``, ``missing``, ``length`` or ``io``.
        """
        self.source = source
        self.number = number
        self.fd = -1
        committed = source.sizes.get(number)
        if committed is None:
            raise source.damage("incomplete", number, "no commit line names this shard; run feedfast cache")
        self.size = committed
        try:
            # without O_NONBLOCK a pipe in the place of a shard would block for ever
            self.fd = os.open(source.path(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self.fd)
        except FileNotFoundError:
            raise source.damage("missing", number, f"committed with {committed} bytes, but there is no file") from None
        except OSError as error:
            raise source.damage("io", number, f"cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise source.damage("io", number, "not an ordinary file")
        if status.st_size != committed:
            raise source.damage("length", number, f"committed with {committed} bytes, the file has {status.st_size}")

    def __del__(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)

    def read(self, targets: Sequence[Any], offset: int) -> None:
        """Fill uint8 arrays, one after another, with the bytes from ``offset`` on.

        Raises:
            CacheDamageError: kind ``length`` (the file became shorter) or ``io``.
        """
        try:
            if os.preadv(self.fd, targets, offset) == sum(target.nbytes for target in targets):
                return
            # a signal, or the kernel's limit of 2 GiB a call: rare, so one buffer at a time is good enough
            for target in targets:
                done = 0
                while done < target.nbytes:
                    got = os.preadv(self.fd, [target[done:]], offset + done)
                    if got == 0:
                        detail = f"the file ends at byte {offset + done}, it was longer when it was opened"
                        raise self.source.damage("length", self.number, detail)
                    done += got
                offset += target.nbytes
        except OSError as error:
            raise self.source.damage("io", self.number, f"cannot be read: {error.strerror}") from error


class Shard:
    """One open shard whose index has been read and checked."""

    def __init__(self, source: ArrayView, number: int) -> None:
        """Open shard ``number`` of the view.

        Raises:
            CacheDamageError: what `CommittedFile` raises, or kind ``index``.
        """
        self.source = source
        self.number = number
        self._file = CommittedFile(source, number)
        size, n_blocks = self._file.size, source.spec.blocks_per_shard
        tail = np.empty(min(size, index_length(n_blocks)), np.uint8)
        self._file.read([tail], size - len(tail))
        try:
            self._index: list[list[int]] = parse_index(tail, n_blocks, size).tolist()
        except CacheDamageError as error:
            raise source.damage("index", number, str(error)) from None

    def read(self, blocks: Sequence[int], out: Bytes) -> None:
        """Read consecutive blocks (numbers within the view) into ``out``, one after another.

        Args:
            blocks: ascending block numbers, all of this shard.
            out: uint8 [len(blocks) * block_bytes], contiguous. Undefined after an error.

        Raises:
            CacheDamageError: kind ``index``, ``checksum``, ``fill``, ``length`` or ``io``, naming the block.
        """
        spec = self.source.spec
        size = spec.block_bytes
        ranges = [self._range(block) for block in blocks]
        parts = [out[i * size : (i + 1) * size] for i in range(len(blocks))]
        if spec.compression == "none":
            self._read_raw(blocks, ranges, parts)
        else:
            self._read_zstd(blocks, ranges, parts)
        for block, part in zip(blocks, parts, strict=True):
            rows = min(spec.block_rows, spec.rows - block * spec.block_rows)
            if holds_fill(spec, part[: rows * spec.row_bytes].view(spec.dtype)):
                raise self.source.damage("fill", self.number, "a committed row holds the fill value", block)

    def _range(self, block: int) -> tuple[int, int]:
        source, spec = self.source, self.source.spec
        offset, length = self._index[block % spec.blocks_per_shard]
        if offset == NO_CHUNK and length == NO_CHUNK:
            raise source.damage("index", self.number, "committed rows have no block", block)
        raw = spec.block_bytes
        # zstd never grows its input by more than a 256th and some header; anything longer is not our block
        low, high = (raw + 4,) * 2 if spec.compression == "none" else (9, raw + raw // 128 + 1024)
        if not low <= length <= high:
            detail = f"the index gives the block {length} bytes, expected {low if low == high else f'{low} to {high}'}"
            raise source.damage("index", self.number, detail, block)
        return offset, length

    def _read_raw(self, blocks: Sequence[int], ranges: list[tuple[int, int]], parts: list[Bytes]) -> None:
        sums = np.empty((len(parts), 4), np.uint8)
        for first, last in _adjacent(ranges):
            targets = [piece for i in range(first, last) for piece in (parts[i], sums[i])]
            self._file.read(targets, ranges[first][0])
        for block, part, stored in zip(blocks, parts, sums.view("<u4")[:, 0].tolist(), strict=True):
            if crc32c(part) != stored:
                raise self.source.damage("checksum", self.number, "the block does not match its crc32c", block)
        for block, end in zip(blocks, sums, strict=True):
            self.source.check_block_identity(self.number, block % self.source.spec.blocks_per_shard, end)

    def _read_zstd(self, blocks: Sequence[int], ranges: list[tuple[int, int]], parts: list[Bytes]) -> None:
        for first, last in _adjacent(ranges):
            start = ranges[first][0]
            frames = scratch("frames", ranges[last - 1][0] + ranges[last - 1][1] - start)
            self._file.read([frames], start)
            for i in range(first, last):
                frame = frames[ranges[i][0] - start :][: ranges[i][1]]
                try:
                    decompress(frame, "zstd", parts[i])
                except CacheDamageError as error:
                    raise self.source.damage("checksum", self.number, str(error), blocks[i]) from None
                self.source.check_block_identity(self.number, blocks[i] % self.source.spec.blocks_per_shard, frame[-4:])


class ShardFiles:
    """The shards opened last, so that their indexes are read and checked once; safe to share between threads."""

    def __init__(self, limit: int = 256) -> None:
        """Keep at most ``limit`` files open (the usual limit of a process is 1024)."""
        self._limit = limit
        self._open: OrderedDict[tuple[str, int, int], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: ArrayView, number: int) -> Shard:
        """The open shard; raises what `Shard` raises."""
        key = (source.spec.name, source.view, number)
        with self._lock:
            shard = self._open.get(key)
            if shard is not None:
                self._open.move_to_end(key)
                return shard
        shard = Shard(source, number)
        with self._lock:
            self._open[key] = shard
            evicted = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self._limit)]
        evicted.clear()  # files close here, outside the lock, or later in the thread that still reads one
        return shard

    def clear(self) -> None:
        """Close what no thread is reading."""
        with self._lock:
            self._open.clear()


_local = threading.local()


def scratch(use: str, nbytes: int) -> Bytes:
    """Memory of the calling thread, one piece for each ``use``, overwritten by its next call."""
    buffer: Bytes | None = getattr(_local, use, None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(nbytes, 1 << 20), np.uint8)
        setattr(_local, use, buffer)
    return buffer[:nbytes]


def _adjacent(ranges: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Cut (offset, length) pairs into runs [first, last) that lie back to back in the file."""
    first = 0
    for i in range(1, len(ranges) + 1):
        if i == len(ranges) or ranges[i][0] != sum(ranges[i - 1]) or i - first == 256:
            yield first, i
            first = i


def read_small(source: ArrayView, number: int = 0) -> Bytes:
    """The checked content of an object that is not sharded: plain bytes with their crc32c at the end.

    Raises:
        CacheDamageError: what `CommittedFile` raises, or kind ``checksum``.
    """
    file, expected = CommittedFile(source, number), source.spec.block_bytes + 4
    if file.size != expected:
        raise source.damage("length", number, f"the array takes {expected} bytes, committed are {file.size}")
    data, stored = np.empty(expected - 4, np.uint8), np.empty(4, np.uint8)
    file.read([data, stored], 0)
    if crc32c(data) != int(stored.view("<u4")[0]):
        raise source.damage("checksum", number, "the array does not match its crc32c")
    source.check_block_identity(number, 0, stored)
    return data
