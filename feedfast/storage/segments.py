"""What is read together: cutting a pass into segments, and the memory they are read into.

A *segment* is a stretch of a pass that is read at once. A *piece* is a stretch of whole batches whose rows lie in one
buffer per array, in the order of the pass: a batch is a view of its piece. Rows are put into their places as their
block is read, so that nothing is gathered afterwards. A batch that two segments share has a piece that both fill.

Arrays of a stream may differ in rows per block; each is read by jobs of its own blocks.

A *buffer* is lent, never given: NumPy arrays that look into it keep a lease alive through their ``base``, and when the
last of them dies, in whichever thread and however derived, the buffer is free again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feedfast.storage.layout import ArraySpec
from feedfast.storage.shards import ArrayView, Bytes, ShardFiles, thread_buffer

Rows = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# 16 KiB; Python spends 1 or 2 us on each stretch of memory that is read into: copying less than this takes less.
SMALL_BYTES = 16 << 10


class _Lease:
    """Lends a buffer to NumPy and gives it back when the last array that looks into it is gone.

    Reference counts of the buffer itself would tell the same, but somebody would have to poll them, and they mean less
    on a Python without the global lock.
    """

    def __init__(self, buffer: Bytes, give_back: Callable[[Bytes], None]) -> None:
        self._buffer = buffer
        self._give_back = give_back
        self.__array_interface__ = {
            "version": 3,
            "shape": buffer.shape,
            "typestr": "|u1",
            "data": (buffer.__array_interface__["data"][0], False),
        }

    def __del__(self) -> None:
        self._give_back(self._buffer)


class BufferPool:
    """Reused byte buffers: a large fresh one costs a page fault per 4 KiB, more than reading it from the page cache.

    Not page-locked: a copy to a GPU still in progress when the last view dies would read the next block's bytes.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[Bytes]] = {}
        self._limit = 2
        self.allocated = 0  # buffers ever made: flat after the start of a stream

    def lease(self, nbytes: int) -> Bytes:
        """Return uninitialized uint8 [nbytes]; it goes back to the pool by itself when no view of it is left."""
        size = _size_class(nbytes)
        free = self._free.setdefault(size, deque())
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(size, np.uint8)
            self.allocated += 1
        return np.asarray(_Lease(buffer, self._give_back))[:nbytes]

    def keep(self, buffers: int) -> None:
        """Keep up to this many free buffers of each size."""
        self._limit = max(self._limit, buffers)

    def _give_back(self, buffer: Bytes) -> None:
        # Runs wherever the last view dies, possibly inside a garbage collection: it must not take a lock.
        free = self._free.get(buffer.nbytes)
        if free is not None and len(free) < self._limit:
            free.append(buffer)


def _size_class(nbytes: int) -> int:
    """The next of eight sizes per power of two, so that requests of many lengths share buffers."""
    step = 1 << max(12, nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


def cut_segments(rows: Rows, block_rows: int, batch_size: int, max_rows: int, least_rows: int = 1) -> list[int]:
    """Positions 0 = p0 < p1 < … = len(rows) between which the rows are read together.

    No block is needed on both sides of a cut, unless ``max_rows`` forces one. Cuts at multiples of ``batch_size`` are
    preferred: then no batch needs rows of two segments.

    Args:
        rows: int64 [n], any order.
        block_rows: rows per block; of several arrays the largest, which the smaller ones divide: a cut that no block
            of one array crosses is then crossed by no block of any.
        batch_size: rows per batch, counted from position 0.
        max_rows: longest segment, at least 1.
        least_rows: segments are made at least this long where that is possible, and at least a batch.
    """
    count = len(rows)
    least = min(max(batch_size, least_rows), max_rows)
    # A cut is clean where every block met so far was used for the last time.
    blocks = rows // block_rows
    last_use = np.zeros(int(blocks.max(initial=0)) + 1, np.int64)
    last_use[blocks] = np.arange(count)  # of repeated indices, the last assignment stays
    needed_until = np.maximum.accumulate(last_use[blocks])
    clean = np.flatnonzero(needed_until == np.arange(count)) + 1
    cuts, late = [0], 0  # late: the last clean cut that was passed over because a batch would have straddled it
    for cut in clean.tolist():
        _split(cuts, late, cut, max_rows)
        length = cut - cuts[-1]
        if length >= least and (cut % batch_size == 0 or length >= least + 8 * batch_size or length >= max_rows):
            cuts.append(cut)
        late = cut
    if cuts[-1] != count:
        _split(cuts, late, count, max_rows)
        cuts.append(count)
    return cuts


def _split(cuts: list[int], late: int, upto: int, max_rows: int) -> None:
    """Add cuts so that a segment ending at ``upto`` has at most ``max_rows`` rows; at a clean place if there is one."""
    if upto - cuts[-1] > max_rows and late > cuts[-1]:
        cuts.append(late)
    while upto - cuts[-1] > max_rows:
        cuts.append(cuts[-1] + max_rows)


class Piece:
    """Positions [start, stop) of a pass, whole batches; ``buffers`` has of each array the rows in that order."""

    __slots__ = ("buffers", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.buffers: dict[str, Bytes] = {}


Places = Sequence[tuple[int, Bytes]]
"""Of one array: the buffers of a segment's pieces, ascending, and the position in the pass of the first row of each."""


class Segment:
    """Positions [start, stop) of a pass: ``rows`` are the rows wanted there, ascending; the blocks those lie in.

    ``places[i]`` is the position, counted from ``start``, at which ``rows[i]`` is wanted. Rows wanted twice are there
    twice, and copied twice, so that what the consumer holds is always his alone.
    """

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        steps = np.diff(rows)
        self.places: Rows = np.arange(len(rows)) if bool((steps > 0).all()) else np.argsort(rows, kind="stable")
        self.rows = rows[self.places]
        self._distinct = bool((np.diff(self.rows) > 0).all())
        self.pieces: list[Piece] = []
        self.pending = 0
        self.errors: list[tuple[int, int, Exception]] = []  # of ``rows``, [first, last) that did not come
        self.waiting: list[Any] = []  # batches of the stream that cannot be handed out yet
        self._blocks: dict[int, tuple[list[int], list[int]]] = {}

    def blocks(self, block_rows: int) -> tuple[list[int], list[int]]:
        """Blocks of ``block_rows`` rows, and bounds: ``rows[bounds[i] : bounds[i + 1]]`` lie in ``blocks[i]``."""
        known = self._blocks.get(block_rows)
        if known is None:
            blocks, first = np.unique(self.rows // block_rows, return_index=True)
            known = self._blocks[block_rows] = (blocks.tolist(), [*first.tolist(), len(self.rows)])
        return known

    def jobs(self, spec: ArraySpec, job_bytes: int) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of `blocks` to be read together: whole, consecutive, of one shard, not too large."""
        most = max(1, job_bytes // spec.block_bytes) if self._distinct else 1
        (blocks, bounds), first = self.blocks(spec.block_rows), 0
        for last in range(1, len(blocks) + 1):
            if (
                last == len(blocks)
                or last - first == most
                or blocks[last] != blocks[last - 1] + 1
                or blocks[last] % spec.blocks_per_shard == 0
                or bounds[last] - bounds[first] != (last - first) * spec.block_rows
                or bounds[last + 1] - bounds[last] != spec.block_rows
            ):
                yield first, last
                first = last

    def error_in(self, start: int, stop: int) -> Exception | None:
        """What prevents positions [start, stop) of the pass from being handed out."""
        for first, last, error in self.errors:
            places = self.places[first:last] + self.start
            if ((places >= start) & (places < stop)).any():
                return error
        return None

    def read(self, source: ArrayView, files: ShardFiles, places: Places, first: int, last: int) -> None:
        """Do one of the `jobs`: put the rows of blocks [first, last) into their places in the array's buffers."""
        spec = source.spec
        blocks, bounds = self.blocks(spec.block_rows)
        blocks, start, stop = blocks[first:last], bounds[first], bounds[last]
        shard = files.get(source, blocks[0] // spec.blocks_per_shard)
        wanted = self.places[start:stop] + self.start
        which = np.searchsorted([position for position, _ in places], wanted, side="right") - 1
        # rows [edges[i], edges[i + 1]) go to one place, one after another
        edges = [0, *(np.flatnonzero((np.diff(wanted) != 1) | (np.diff(which) != 0)) + 1).tolist(), len(wanted)]
        whole = self._distinct and len(wanted) == len(blocks) * spec.block_rows
        if whole and (len(edges) - 1 <= len(blocks) or len(wanted) * spec.row_bytes >= SMALL_BYTES * (len(edges) - 1)):
            shard.read(blocks, self._targets(spec, places, wanted, which, edges, len(blocks)))
            return
        data = thread_buffer("block", len(blocks) * spec.block_bytes)
        size = spec.block_bytes
        shard.read(blocks, [[data[i * size : (i + 1) * size]] for i in range(len(blocks))])
        found = data.reshape(-1, spec.row_bytes)
        numbers = None if whole else self.rows[start:stop] - blocks[0] * spec.block_rows
        for piece in range(int(which.min()), int(which.max()) + 1):
            position, buffer = places[piece]
            some = np.flatnonzero(which == piece)
            if len(some) == len(wanted) and numbers is None:
                taken = found
            else:
                taken = found[some if numbers is None else numbers[some]]
            buffer.reshape(-1, spec.row_bytes)[wanted[some] - position] = taken

    def _targets(
        self, spec: ArraySpec, places: Places, wanted: Rows, which: Rows, edges: list[int], blocks: int
    ) -> list[list[Bytes]]:
        """Where the bytes of whole blocks go: per block the stretches of memory, in the order of its bytes."""
        size, per_block = spec.row_bytes, spec.block_rows
        cuts = edges if blocks == 1 else sorted({*edges, *range(0, len(wanted), per_block)})
        targets: list[list[Bytes]] = [[] for _ in range(blocks)]
        at, pieces = wanted[cuts[:-1]].tolist(), which[cuts[:-1]].tolist()
        for i, first in enumerate(cuts[:-1]):
            position, buffer = places[pieces[i]]
            begin = (at[i] - position) * size
            targets[first // per_block].append(buffer[begin : begin + (cuts[i + 1] - first) * size])
        return targets


def take_rows(rows: Bytes, index: Rows, out: Bytes, row_bytes: int) -> None:
    """Copy rows by number. With mode "clip" NumPy writes straight into ``out``; the numbers are in range already."""
    np.take(rows.reshape(-1, row_bytes), index, axis=0, out=out.reshape(-1, row_bytes), mode="clip")


def shaped(data: Bytes, spec: ArraySpec) -> Array:
    """Bytes of whole rows as [row, ...]."""
    return data.view(spec.dtype).reshape(-1, *spec.row_shape)
