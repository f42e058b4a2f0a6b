"""Several ranks that record one cache: what they agree on, and how rows of one shard come into one hand.

    rank 0: rows  0..15 ─┐                  ┌─ shard 0 (rows 0..31) ─► rank 0
    rank 1: rows 16..31 ─┼─ after a batch ──┤
    rank 0: rows 32..47 ─┘                  └─ shard 1 (rows 32..63) ─► rank 1

Every rank computes the rows it trains on, which is a slice of each global batch; a shard has one writer. A shard that
lies within one slice is written by the rank that computes it, and nothing of it travels. Others take turns, and a rank
sends the rows it has of them to their writers, as codes, through the process group. Rows of large maps are in
small shards, so it is those of small maps and checksums that travel, see docs/log.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from feedfast.errors import RequestError
from feedfast.stages.worker import Worker
from feedfast.storage.layout import ArraySpec
from feedfast.storage.pending import Pending
from feedfast.storage.writer import CacheWriter

Bytes = NDArray[np.uint8]


class Together:
    """The ranks of a job, as those who write one cache. Each method is called by all of them, or by none.

    Attributes:
        me: this one.
    """

    def __init__(self, me: Worker) -> None:
        """Where there are several, their process group must serve main memory (`Worker.process_group`).

        Raises:
            RequestError: it does not.
        """
        self.me = me
        if me.world > 1 and "cpu" not in dist.get_backend_config():
            raise RequestError(
                "train.source: 'record' needs a process group for main memory, too, expected 'cpu:gloo,cuda:nccl', "
                f"found {dist.get_backend_config()!r}"
            )

    def all(self, yes: bool) -> bool:
        """Whether every rank says yes; nobody goes on before the last has spoken."""
        if self.me.world == 1:
            return yes
        votes = torch.tensor(int(yes))
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes)

    def same(self, number: int) -> bool:
        """Whether every rank names the same number, below 2^62."""
        if self.me.world == 1:
            return True
        low_high = torch.tensor([number, -number])
        dist.all_reduce(low_high, dist.ReduceOp.MIN)
        return int(low_high[0]) == -int(low_high[1])

    def swap(self, out: dict[int, Bytes], sizes: dict[int, int]) -> dict[int, Bytes]:
        """Send bytes to other ranks and receive some of theirs.

        Args:
            out: to whom → what.
            sizes: from whom → how many bytes, as they know.
        """
        found = {rank: np.empty(size, np.uint8) for rank, size in sizes.items()}
        under_way = [dist.irecv(torch.from_numpy(data), rank) for rank, data in found.items()]
        under_way += [dist.isend(torch.from_numpy(data), rank) for rank, data in out.items()]
        for one in under_way:
            if one is not None:
                one.wait()
        return found


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of an array, all of one shard and of one rank's slice, on their way to the shard's writer."""

    array: str
    start: int
    stop: int
    source: int
    writer: int

    def nbytes(self, spec: ArraySpec) -> int:
        return _COUNT + (self.stop - self.start) * spec.row_bytes


_COUNT = 8  # bytes: how many values saturated
_Held = tuple[int, NDArray[Any], int]
"""First row, rows, and how many of their values saturated."""


class SharedWriter:
    """What a `Recorder` appends to on one of several ranks: rows wait until `exchange`, then go to their writers.

    Attributes:
        manifest: of the cache.
        specs: its arrays.
    """

    def __init__(self, writer: CacheWriter, together: Together, slice_rows: int) -> None:
        """Nothing waits yet.

        Args:
            writer: of this rank, not divided.
            together: the ranks.
            slice_rows: rows of a global batch per rank; row r is computed by rank ``r // slice_rows`` modulo the ranks.
        """
        self.manifest, self.specs = writer.manifest, writer.specs
        self.missing, self.stored, self.close = writer.missing, writer.stored, writer.close
        self._writer, self._together, self._slice = writer, together, slice_rows
        self._held: dict[str, list[_Held]] = {}
        self._pending: Pending | None = None

    @property
    def bytes_written(self) -> int:
        """Bytes of the objects this rank has committed."""
        return self._writer.bytes_written

    def pending(self, arrays: Iterable[str]) -> Pending:
        """See `CacheWriter.pending`; the same on every rank. What is exchanged is of these arrays and shards."""
        self._pending = self._writer.pending(sorted(arrays))
        return self._pending

    def place(self, array: str, view: int, start_row: int, count: int) -> None:
        """Nowhere: rows wait here until it is known whose they are."""

    def append(self, array: str, view: int, start_row: int, rows: NDArray[Any], *, saturated: int = 0) -> None:
        """See `CacheWriter.append`. The rows are not copied: they must stay as they are until `exchange`."""
        self._held.setdefault(array, []).append((start_row, rows, saturated))

    def settle(self) -> None:
        """See `CacheWriter.settle`."""
        self._writer.settle()

    def exchange(self, view: int, start: int, stop: int) -> None:
        """Bring rows [start, stop) of a view, a whole global batch or the last rows, to their writers. Of all ranks.

        Raises:
            FeedfastError: as `CacheWriter.append`.
        """
        me = self._together.me.rank
        pieces = [piece for piece in self._pieces(view, start, stop) if me in (piece.source, piece.writer)]
        mine = {piece: self._taken(piece) for piece in pieces if piece.source == me}
        self._held.clear()
        out: dict[int, list[NDArray[Any]]] = {}
        sizes: dict[int, int] = {}
        for piece in pieces:
            if piece.writer != me:
                rows, saturated = mine[piece]
                count = np.array([saturated], np.int64)
                out.setdefault(piece.writer, []).extend(flat.reshape(-1).view(np.uint8) for flat in (count, *rows))
            elif piece.source != me:
                sizes[piece.source] = sizes.get(piece.source, 0) + piece.nbytes(self.specs[piece.array])
        found = self._together.swap({rank: np.concatenate(parts) for rank, parts in out.items()}, sizes)
        read = dict.fromkeys(found, 0)
        for piece in pieces:  # in ascending order of rows, as a writer wants them
            if piece.writer == me:
                if piece.source != me:
                    begin, spec = read[piece.source], self.specs[piece.array]
                    read[piece.source] += piece.nbytes(spec)
                    data = found[piece.source][begin : read[piece.source]]
                    rows = [data[_COUNT:].view(spec.dtype).reshape(-1, *spec.row_shape)]
                    saturated = int(data[:_COUNT].view(np.int64)[0])
                else:
                    rows, saturated = mine[piece]
                at = piece.start
                for part in rows:
                    self._writer.append(piece.array, view, at, part, saturated=saturated)
                    at, saturated = at + len(part), 0

    def _pieces(self, view: int, start: int, stop: int) -> Iterator[_Piece]:
        """Those of missing shards, by array and row: the same list on every rank."""
        assert self._pending is not None
        for array, spec in self._pending.specs.items():
            for shard in range(start // spec.shard_rows, -(-stop // spec.shard_rows)):
                if (view, shard) not in self._pending.missing[array]:
                    continue
                first, last = spec.shard_span(shard)
                writer = self._writer_of(first, last, view * spec.num_shards + shard)
                first, last = max(first, start), min(last, stop)
                while first < last:
                    end = min((first // self._slice + 1) * self._slice, last)
                    yield _Piece(array, first, end, self._computes(first), writer)
                    first = end

    def _computes(self, row: int) -> int:
        return row // self._slice % self._together.me.world

    def _writer_of(self, start: int, stop: int, number: int) -> int:
        """Of a shard with rows [start, stop): the rank that computes all of it, where one does; else all in turn."""
        if start // self._slice == (stop - 1) // self._slice:
            return self._computes(start)
        return number % self._together.me.world

    def _taken(self, piece: _Piece) -> tuple[list[NDArray[Any]], int]:
        """Its rows as they were appended, and how many of their values saturated: counted with the first taken."""
        found, total = [], 0
        held = self._held[piece.array]
        for number, (start, rows, saturated) in enumerate(held):
            first, last = max(piece.start, start), min(piece.stop, start + len(rows))
            if first < last:
                found.append(np.ascontiguousarray(rows[first - start : last - start]))
                total += saturated
                held[number] = (start, rows, 0)
        return found, total
