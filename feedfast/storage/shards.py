"""Reading blocks out of shards, and believing nothing on the way.

A shard is an ordinary Zarr v3 `sharding_indexed` object: blocks one after another, then an index of
(offset, length) pairs as little-endian uint64, then the index's crc32c. A block is `block_rows` rows of one view,
C-order, either one zstd frame with its content checksum or the raw bytes followed by their crc32c.

Stock Zarr readers turn a missing file, a zero-length file and an absent block into fill values without a word, and
some skip checksums on partial reads. Here every one of these is an error. Checked, in this order: the object's length
against the commit log before a byte is read; the index's checksum; offset and length of each block; the block's own
checksum, and that it is the one in the commit log; the fill value inside rows that hold data.

It does not decide which shards exist (the log does), does not turn codes into values and never writes.
"""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from feedfast.errors import CacheDamageError
from feedfast.storage.assemble import holds_fill
from feedfast.storage.blocks import crc32c, crc32c_of, decompress, index_length, parse_index
from feedfast.storage.layout import NO_CHUNK, ArraySpec
from feedfast.storage.log import check_length, object_key, problem
from feedfast.storage.store import Object, Store, refuse_not_damage

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
LOOKS: Final = 3  # at bytes that were not what is committed and may have been changed on their way
_MAX_BUFFERS: Final = 1024  # IOV_MAX: what one call of preadv may fill


@dataclass(frozen=True)
class ArrayView:
    """One view of one array: how it is stored (``spec``), where (``store``), its committed bytes by shard number.

    ``sums`` are the logged ends of each shard's blocks, where there are any (`feedfast.storage.log`).
    """

    spec: ArraySpec
    store: Store
    view: int
    sizes: Mapping[int, int] = field(repr=False)
    sums: Mapping[int, Sequence[str]] = field(default_factory=dict, repr=False)

    def object_key(self, shard: int) -> str:
        """Key of the shard's object."""
        return object_key(self.spec.name, self.spec.key(self.view, shard))

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
        spec, path, key = self.spec, self.store.where(self.object_key(shard)), self.spec.key(self.view, shard)
        where = f"array {spec.name}, shard {key}"
        entry = {**problem(spec.name, key, kind, detail), "path": path}
        if block is not None:
            first = block * spec.block_rows
            where += f", block {block} (rows {first} to {min(first + spec.block_rows, spec.rows) - 1})"
            entry["block"] = str(block)
        cure = (
            ""
            if kind in ("incomplete", "missing", "length", "io")
            else "; delete the file to have feedfast cache write it again"
        )
        return CacheDamageError(f"{path}: {detail} [{kind}: {where}]{cure}", [entry])


class CommittedObject:
    """One open object whose length is the committed one; it closes when nothing refers to it any more."""

    def __init__(self, source: ArrayView, number: int, tail_bytes: int = 0) -> None:
        """Open object ``number`` of the view, of which ``tail_bytes`` at the end will be read first.

        Raises:
            CacheDamageError: kind ``incomplete``, ``missing``, ``length`` or ``io``.
        """
        self.source = source
        self.number = number
        committed = source.sizes.get(number)
        if committed is None:
            raise source.damage("incomplete", number, "no commit line names this shard; run feedfast cache")
        self.size = committed
        self._tail_bytes = min(tail_bytes, committed)
        wrong = check_length(committed, self._open)
        if wrong is not None:
            raise source.damage(wrong[0], number, wrong[1])

    def _open(self) -> int:
        key, store = self.source.object_key(self.number), self.source.store
        self._object: Object = store.open(key, tail_bytes=self._tail_bytes, committed_bytes=self.size)
        return self._object.size

    def refetch(self) -> bool:
        """See `feedfast.storage.store.Object.refetch`.

        Raises:
            CacheDamageError: what is there then is missing, or of another length.
        """
        again: list[bool] = []

        def look() -> int:
            again.append(self._object.refetch())
            return self._object.size

        wrong = check_length(self.size, look)
        if wrong is not None:
            raise self.source.damage(wrong[0], self.number, wrong[1])
        return again[-1]

    def read(self, targets: Sequence[Any], offset: int) -> None:
        """Fill uint8 arrays, one after another, with the bytes from ``offset`` on.

        Raises:
            CacheDamageError: kind ``length`` (the object became shorter) or ``io``.
        """
        try:
            got = self._object.read(targets, offset)
        except OSError as error:
            refuse_not_damage(error, self.source.store.where(self.source.object_key(self.number)))
            raise self.source.damage("io", self.number, f"cannot be read: {error.strerror}") from error
        if got < sum(target.nbytes for target in targets):
            detail = f"the file ends at byte {offset + got}, it was longer when it was opened"
            raise self.source.damage("length", self.number, detail)


def checked(file: CommittedObject, read: Callable[[], T]) -> T:
    """What ``read`` makes of an object; read again after damage, where a second look can help, `LOOKS` times in all.

    Raises:
        CacheDamageError: as ``read``, the last time.
    """
    for _ in range(LOOKS - 1):
        try:
            return read()
        except CacheDamageError:
            if not file.refetch():
                raise
    return read()


class OpenShard:
    """One open shard whose index has been read and checked."""

    def __init__(self, source: ArrayView, number: int, file: CommittedObject | None = None) -> None:
        """Open shard ``number`` of the view, or take the object that is open already.

        Raises:
            CacheDamageError: what `CommittedObject` raises, or kind ``index``.
        """
        self.source = source
        self.number = number
        self._object = file or CommittedObject(source, number, index_length(source.spec.blocks_per_shard))
        self._looking = threading.Lock()
        self._looks = 0
        self._index = checked(self._object, self._read_index)

    def _read_index(self) -> list[list[int]]:
        size, n_blocks = self._object.size, self.source.spec.blocks_per_shard
        tail = np.empty(min(size, index_length(n_blocks)), np.uint8)
        self._object.read([tail], size - len(tail))
        try:
            found: list[list[int]] = parse_index(tail, n_blocks, size).tolist()
        except CacheDamageError as error:
            raise self.source.damage("index", self.number, str(error)) from None
        return found

    def read(self, blocks: Sequence[int], targets: Sequence[Sequence[Bytes]]) -> None:
        """Read consecutive blocks (numbers within the view) into memory.

        What is found damaged is looked at again where the bytes may have been changed on the way or in a copy nearby.

        Args:
            blocks: ascending block numbers, all of this shard.
            targets: per block the stretches that take its bytes, contiguous uint8 [block_bytes] together and each of
                whole rows; more than one only for a block without padding. Undefined after an error.

        Raises:
            CacheDamageError: kind ``index``, ``checksum``, ``fill``, ``length`` or ``io``, naming the block.
        """
        for last in (False,) * (LOOKS - 1) + (True,):
            looks = self._looks
            try:
                self._read(blocks, targets)
            except CacheDamageError:
                if last or not self._look_again(looks):
                    raise
            else:
                return

    def _look_again(self, looks: int) -> bool:
        """Whether there is, or another thread has taken, a further look since the reader counted ``looks`` of them."""
        with self._looking:
            if self._looks == looks:
                if not self._object.refetch():
                    return False
                self._index = self._read_index()
                self._looks += 1
            return True

    def _read(self, blocks: Sequence[int], targets: Sequence[Sequence[Bytes]]) -> None:
        ranges = [self._range(block) for block in blocks]
        if self.source.spec.compression == "none":
            self._read_raw(blocks, ranges, targets)
        else:
            self._read_zstd(blocks, ranges, targets)

    def _check_fill(self, block: int, data: Sequence[Bytes]) -> None:
        spec = self.source.spec
        padding = (block + 1) * spec.block_rows - spec.rows
        if padding > 0:
            data = [data[0][: -padding * spec.row_bytes]]  # a block with padding has one target
        if spec.dtype != np.uint8:
            data = [part.view(spec.dtype) for part in data]
        if any(holds_fill(spec, part) for part in data):
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

    def _read_raw(
        self, blocks: Sequence[int], ranges: list[tuple[int, int]], targets: Sequence[Sequence[Bytes]]
    ) -> None:
        # Straight into the caller's memory: the fastest way measured (`bench/bench_reader.py`), because reading and the
        # fill check run without the GIL. crc32c keeps it, but at about 30 GB/s only for tens of microseconds per block.
        sums = np.empty((len(blocks), 4), np.uint8)
        for first, last in _adjacent(ranges, [len(parts) + 1 for parts in targets]):
            places = [piece for i in range(first, last) for piece in (*targets[i], sums[i])]
            self._object.read(places, ranges[first][0])
        for block, parts, end, stored in zip(blocks, targets, sums, sums.view("<u4")[:, 0].tolist(), strict=True):
            if crc32c_of(parts) != stored:
                raise self.source.damage("checksum", self.number, "the block does not match its crc32c", block)
            self.source.check_block_identity(self.number, block % self.source.spec.blocks_per_shard, end)
            self._check_fill(block, parts)

    def _read_zstd(
        self, blocks: Sequence[int], ranges: list[tuple[int, int]], targets: Sequence[Sequence[Bytes]]
    ) -> None:
        for first, last in _adjacent(ranges, [1] * len(blocks)):
            start = ranges[first][0]
            frames = thread_buffer("frames", ranges[last - 1][0] + ranges[last - 1][1] - start)
            self._object.read([frames], start)
            for i in range(first, last):
                frame = frames[ranges[i][0] - start :][: ranges[i][1]]
                parts = targets[i]
                data = parts[0] if len(parts) == 1 else thread_buffer("decoded", self.source.spec.block_bytes)
                # The decoder checks the frame's header, too: a flipped flag would switch its checksum off, and a forged
                # content size would choose how much memory it takes. The one bit of it that zstd ignores changes no
                # value and is left to ``verify --full``.
                try:
                    decompress(frame, "zstd", data)
                except CacheDamageError as error:
                    raise self.source.damage("checksum", self.number, str(error), blocks[i]) from None
                self.source.check_block_identity(self.number, blocks[i] % self.source.spec.blocks_per_shard, frame[-4:])
                self._check_fill(blocks[i], [data])
                done = 0
                for part in parts if len(parts) > 1 else ():
                    part[:] = data[done : done + part.nbytes]
                    done += part.nbytes


class ShardFiles:
    """The shards opened last, so that their indexes are read and checked once; safe to share between threads."""

    def __init__(self, limit: int = 256) -> None:
        """Keep at most ``limit`` files open, and no more than a quarter of what this process may open."""
        self._limit = min(limit, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._open: OrderedDict[tuple[str, int, int], OpenShard] = OrderedDict()
        self._coming: dict[tuple[str, int, int], Future[OpenShard]] = {}
        self._lock = threading.Lock()

    def get(self, source: ArrayView, number: int) -> OpenShard:
        """The open shard; raises what `OpenShard` raises."""
        key = (source.spec.name, source.view, number)
        with self._lock:
            shard = self._open.get(key)
            if shard is not None:
                self._open.move_to_end(key)
                return shard
            # One thread opens it, and the others that want it wait for what comes of that: of a far object each would
            # ask anew.
            coming = self._coming.get(key)
            if coming is None:
                mine = self._coming[key] = Future()
        if coming is not None:
            return coming.result()
        try:
            shard = OpenShard(source, number)
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._open[key] = shard
            evicted = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self._limit)]
        mine.set_result(shard)
        evicted.clear()  # files close here, outside the lock, or later in the thread that still reads one
        return shard

    def clear(self) -> None:
        """Close what no thread is reading."""
        with self._lock:
            self._open.clear()


_local = threading.local()


def thread_buffer(use: str, nbytes: int) -> Bytes:
    """Memory of the calling thread, one piece per ``use``, overwritten by its next call."""
    buffer: Bytes | None = getattr(_local, use, None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(nbytes, 1 << 20), np.uint8)
        setattr(_local, use, buffer)
    return buffer[:nbytes]


def _adjacent(ranges: list[tuple[int, int]], targets: list[int]) -> Iterable[tuple[int, int]]:
    """Cut (offset, length) pairs into runs [first, last) that lie back to back in the file.

    ``targets`` are the buffers each is read into; the kernel takes 1,024 per call.
    """
    first, count = 0, 0
    for i in range(len(ranges) + 1):
        if i == len(ranges) or (
            i > first and (ranges[i][0] != sum(ranges[i - 1]) or count + targets[i] > _MAX_BUFFERS)
        ):
            yield first, i
            first, count = i, 0
        count += targets[i] if i < len(ranges) else 0


def read_small(source: ArrayView, number: int = 0) -> Bytes:
    """The checked content of an object that is not sharded: plain bytes with their crc32c at the end.

    Raises:
        CacheDamageError: what `CommittedObject` raises, or kind ``checksum``.
    """
    size = source.spec.block_bytes
    file = CommittedObject(source, number, size + 4)
    return checked(file, lambda: np.concatenate([np.empty(0, np.uint8), *small_pieces(file, size)]))


def small_pieces(file: CommittedObject, piece_bytes: int) -> Iterator[Bytes]:
    """`read_small` in pieces; the checksum is known to be right when the last has been taken.

    Args:
        file: an object of an array that is not sharded.
        piece_bytes: a multiple of the size of a value.
    """
    source, number, size = file.source, file.number, file.source.spec.block_bytes
    if file.size != size + 4:
        raise source.damage("length", number, f"the array takes {size + 4} bytes, committed are {file.size}")
    found, stored = 0, np.empty(4, np.uint8)
    for offset in range(0, size, max(piece_bytes, 1)):
        piece = np.empty(min(piece_bytes, size - offset), np.uint8)
        file.read([piece], offset)
        found = crc32c(piece, found)
        yield piece
    file.read([stored], size)
    if found != int(stored.view("<u4")[0]):
        raise source.damage("checksum", number, "the array does not match its crc32c")
    source.check_block_identity(number, 0, stored)
