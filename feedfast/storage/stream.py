"""Batches of cached rows, read ahead by threads into memory that is used again and again.

The rows of a pass are cut twice. The consumer sees *batches*. The threads read *segments*: stretches of the pass after
which no block read so far is needed again, of any array. So every block is read, checked and decoded once, although
later passes mix the rows of neighboring blocks. Such cuts follow from the row numbers alone: block edges in the
stored order, window edges in a mixed pass. A pass without any (rows at random over the whole view) is cut where
memory requires it, and reads blocks more than once.

Rows are put where their batch wants them as soon as their block is read; a batch is a view of that memory, without
another copy. Memory: see `MAX_BUFFER_BYTES`.

Threads, not processes: nothing to pickle, no copies, and reading and decoding release the GIL.
This module knows rows and arrays; where shards come from is up to the caller.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from feedfast.errors import CacheDamageError
from feedfast.storage.segments import (
    SMALL_BYTES,
    Array,
    BufferPool,
    Piece,
    Places,
    Rows,
    Segment,
    cut_segments,
    shaped,
)
from feedfast.storage.shards import ArrayView, ShardFiles
from feedfast.storage.store import NEAR, Reach

MAX_BUFFER_BYTES: Final = 2 << 30
"""2 GiB: what one stream holds, decoded, over all its arrays: batches that are read, or being read, and not handed out.

A segment takes at most a quarter of it, so that the one being handed out, the next one and batches that lie in two of
them fit together. Windows of later passes are therefore sized to a quarter of it (`feedfast.data.passes.pass_sizes`):
in larger ones segments end inside a window and its blocks are read again. Two things are always allowed, whatever the
bound: what the next batch needs (the segments it touches), and a segment of one largest block.
Not counted is what the consumer holds, nor free buffers that the pool keeps, about as many as were in use at once.
"""


class _Batch:
    """A batch in the making, then its arrays or the error that prevents them.

    ``parts`` are the segments it consists of, with the positions of it that each has; ``piece`` holds its memory.
    """

    def __init__(self, parts: list[tuple[Segment, int, int]], piece: Piece) -> None:
        self.parts = parts
        self.piece = piece
        self.pending = 0
        self.arrays: dict[str, Array] | None = None
        self.error: Exception | None = None


class _Engine:
    """The threads' side of a stream. The consumer's side holds it; it holds nothing of the consumer."""

    def __init__(self, sources: Sequence[ArrayView], files: ShardFiles, pool: BufferPool, reach: Reach) -> None:
        self.sources = {source.spec.name: source for source in sources}
        self.files = files
        self.pool = pool
        self.reach = reach
        self.lock = threading.RLock()  # `stop` may run in a garbage collection while its thread holds the lock
        self.work = threading.Condition(self.lock)
        self.ready = threading.Condition(self.lock)
        self.reads: deque[tuple[Segment, str, int, int]] = deque()  # blocks [first, last) of one shard
        self.stopped = False
        self.threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        for _ in range(threads):
            number = len(self.threads)
            thread = threading.Thread(target=self._run, name=f"feedfast-read-{number}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Tell the threads to end; does not wait for them."""
        with self.lock:
            self.stopped = True
            self.reads.clear()
            self.work.notify_all()
            self.ready.notify_all()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()

    def schedule(self, segment: Segment) -> None:
        """Give the segment's new pieces their memory and queue its reads."""
        jobs = []
        for name, source in self.sources.items():
            for piece in segment.pieces:
                if name not in piece.buffers:
                    piece.buffers[name] = self.pool.lease((piece.stop - piece.start) * source.spec.row_bytes)
            _, bounds = segment.blocks(source.spec.block_rows)
            runs = segment.jobs(source.spec, self.reach.job_bytes)
            jobs += [(bounds[first], (segment, name, first, last)) for first, last in runs]
        jobs.sort(key=lambda job: job[0])  # all arrays advance together; stable, so still in file order
        with self.lock:
            segment.pending = len(jobs)
            self.reads.extend(job for _, job in jobs)
            self.work.notify_all()

    def request(self, batch: _Batch) -> None:
        """Have the batch ready as soon as its segments have been read."""
        with self.lock:
            for segment, _, _ in batch.parts:
                if segment.pending:
                    segment.waiting.append(batch)
                    batch.pending += 1
            if batch.pending == 0:
                self._complete(batch)

    def wait(self, batch: _Batch) -> dict[str, Array]:
        with self.lock:
            while batch.arrays is None and batch.error is None and not self.stopped:
                self._reach_further()
                self.ready.wait()
        if batch.error is not None:
            raise batch.error
        if batch.arrays is None:
            raise RuntimeError("the stream was closed while a batch was awaited")
        return batch.arrays

    def _reach_further(self) -> None:
        """The consumer waits while reads wait for a thread: have twice as many, where the store allows (lock held)."""
        have = len(self.threads)
        self.start(max(0, min(len(self.reads), have, self.reach.threads - have)))

    def _complete(self, batch: _Batch) -> None:
        """All segments of the batch have been read (lock held)."""
        for segment, start, stop in batch.parts:
            batch.error = batch.error or segment.error_in(start, stop)
        if batch.error is None:
            first, last = batch.parts[0][1] - batch.piece.start, batch.parts[-1][2] - batch.piece.start
            arrays = {}
            for name, source in self.sources.items():
                size = source.spec.row_bytes
                arrays[name] = shaped(batch.piece.buffers[name][first * size : last * size], source.spec)
            batch.arrays = arrays
        batch.parts = []
        self.ready.notify_all()

    def _run(self) -> None:
        while True:
            with self.lock:
                while not (self.reads or self.stopped):
                    self.work.wait()
                if self.stopped:
                    return
                job = self.reads.popleft()
            self._read(job)
            del job  # an idle thread must not keep buffers from going back to the pool

    def _read(self, job: tuple[Segment, str, int, int]) -> None:
        segment, name, first, last = job
        errors: list[tuple[int, int, Exception]] = []
        places = [(piece.start, piece.buffers[name]) for piece in segment.pieces]
        try:
            segment.read(self.sources[name], self.files, places, first, last)
        except CacheDamageError:  # an error fails only the batches it concerns
            errors = self._read_singly(job, places)
        except Exception as error:  # any error must reach the consumer; otherwise it would block forever
            _, bounds = segment.blocks(self.sources[name].spec.block_rows)
            errors = [(bounds[first], bounds[last], error)]
        with self.lock:
            segment.errors += errors
            segment.pending -= 1
            if segment.pending == 0:
                segment.pieces = []  # a segment lives as long as one of its batches; each of those holds its piece
                waiting, segment.waiting = segment.waiting, []
                for batch in waiting:
                    batch.pending -= 1
                    if batch.pending == 0:
                        self._complete(batch)

    def _read_singly(self, job: tuple[Segment, str, int, int], places: Places) -> list[tuple[int, int, Exception]]:
        """Read block by block what could not be read together, so that an error fails only the batches it concerns."""
        segment, name, first, last = job
        _, bounds = segment.blocks(self.sources[name].spec.block_rows)
        errors: list[tuple[int, int, Exception]] = []
        for number in range(first, last):
            try:
                segment.read(self.sources[name], self.files, places, number, number + 1)
            except Exception as error:
                errors.append((bounds[number], bounds[number + 1], error))
        return errors


class Stream(Iterator[dict[str, Array]]):
    """Batches of some arrays' rows in a given order; use it as an iterator, and as a context manager to stop early.

    Each item maps array name to ``[b, *row_shape]`` in the stored dtype. The arrays are the consumer's: they look into
    pooled memory that is used again only after every view of it is gone, so they may be kept and changed. An array
    copied to a GPU asynchronously must be kept until the copy has finished.

    Dropping the iterator, exhausting it or an error stops the threads; so does `close`.
    """

    def __init__(
        self,
        sources: Sequence[ArrayView],
        rows: Rows,
        batch_size: int,
        *,
        start_batch: int = 0,
        drop_last: bool = False,
        prefetch: int = 3,
        threads: int = 2,
        files: ShardFiles | None = None,
        pool: BufferPool | None = None,
        max_buffer_bytes: int = MAX_BUFFER_BYTES,
        reach: Reach = NEAR,
    ) -> None:
        """Plan the pass; threads start with the first batch.

        Args:
            sources: what to read. Their ``block_rows`` may differ; the largest is a multiple of the others.
            rows: int64 [n], rows of the view in the order they are wanted; every one within the view.
            batch_size: rows per batch; batch k holds ``rows[k * batch_size : (k + 1) * batch_size]``.
            start_batch: first batch to hand out; nothing before it is read.
            drop_last: leave out a last batch with fewer rows.
            prefetch: batches that are made ready ahead of the consumer.
            threads: threads that read, check and decode.
            files: open shards to share with others.
            pool: buffers to share with others.
            max_buffer_bytes: what the stream may hold, decoded, over all arrays; see `MAX_BUFFER_BYTES` for what is
                always allowed. Less than four windows of a mixed pass means that blocks are read more than once.
            reach: how far to reach ahead; of the store that the sources are in.
        """
        if drop_last:
            rows = rows[: len(rows) // batch_size * batch_size]
        self._rows = rows[start_batch * batch_size :]
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._threads = threads
        row_bytes = sum(source.spec.row_bytes for source in sources)
        block_rows = max(source.spec.block_rows for source in sources)
        self._max_rows = max_buffer_bytes // row_bytes
        max_rows = max(block_rows, self._max_rows // 4)
        if batch_size % block_rows == 0 and bool((np.diff(self._rows) == 1).all()):
            max_rows = max(max_rows, batch_size)  # a segment per batch: it is there in any case, and none lies in two
        least_rows = min(reach.segment_bytes // row_bytes, reach.segment_batches * batch_size)
        self._cuts = cut_segments(self._rows, block_rows, batch_size, max_rows, least_rows)
        self._total = -(-len(self._rows) // batch_size)
        # Small rows are put into place by one copy per piece, so a segment's batches share one; batches of large rows
        # have a piece each, so that what the consumer keeps is no more than that.
        self._shared = row_bytes < SMALL_BYTES
        self._next = 0  # the batch to be handed out next
        self._next_segment = 0
        self._short = False  # whether memory kept the stream from reading ahead as far as it should
        self._segments: deque[Segment] = deque()
        self._pieces: deque[Piece] = deque()  # of batches that are not handed out yet
        self._batches: deque[_Batch] = deque()
        self._pool = pool or BufferPool()
        self._engine = _Engine(sources, files or ShardFiles(), self._pool, reach)
        # Not a bound method of self: the threads must stop when nobody holds the stream any more.
        self._finalizer = weakref.finalize(self, self._engine.stop)

    def __len__(self) -> int:
        """Batches still to come."""
        return self._total - self._next

    def __iter__(self) -> Stream:
        return self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> dict[str, Array]:
        if self._next >= self._total or not self._finalizer.alive:
            self.close()
            raise StopIteration
        if not self._engine.threads:
            self._engine.start(self._threads)
        try:
            self._advance(1 + self._prefetch)
            batch = self._batches.popleft()
            arrays = self._engine.wait(batch)
            self._next += 1
            if self._short:
                self._advance(self._prefetch)  # with what this batch took; it is read while the consumer works
        except BaseException:
            self.close()
            raise
        return arrays

    def close(self) -> None:
        """Stop the threads and release the memory; iteration ends."""
        self._finalizer()
        self._engine.join()
        self._segments.clear()
        self._pieces.clear()
        self._batches.clear()

    def _advance(self, count: int) -> None:
        """Request up to ``count`` batches and read ahead, as far as memory allows; the first of them in any case."""
        self._short = False
        consumed = self._next * self._batch_size
        while self._segments and self._segments[0].stop <= consumed:
            self._segments.popleft()
        while self._pieces and self._pieces[0].stop <= consumed:
            self._pieces.popleft()
        last = min(self._next + count, self._total)
        while self._next + len(self._batches) < last:
            first = consumed + len(self._batches) * self._batch_size
            stop = min(first + self._batch_size, len(self._rows))
            until = self._next_segment
            while self._cuts[until] < stop:
                until += 1
            if self._batches and self._rows_with(until) > self._max_rows:
                self._short = True
                break
            while self._next_segment < until:
                self._schedule()
            parts = [
                (segment, max(first, segment.start), min(stop, segment.stop))
                for segment in self._segments
                if segment.start < stop and segment.stop > first
            ]
            batch = _Batch(parts, next(piece for piece in self._pieces if piece.stop >= stop))
            self._batches.append(batch)
            self._engine.request(batch)
        ahead = consumed + count * self._batch_size
        while self._next_segment < len(self._cuts) - 1:
            start, stop = self._cuts[self._next_segment : self._next_segment + 2]
            if start >= ahead and start - consumed > stop - start:
                break
            if self._rows_with(self._next_segment + 1) > self._max_rows:
                self._short = True
                break
            self._schedule()

    def _rows_with(self, until: int) -> int:
        """Rows in pieces not handed out completely, once the segments before number ``until`` are scheduled."""
        if not self._pieces:
            return self._batches_end(self._cuts[until]) - self._next * self._batch_size
        return self._batches_end(self._cuts[until]) - self._pieces[0].start

    def _batches_end(self, position: int) -> int:
        """Where the batch ends that a position is in; the position itself if no batch is cut by it."""
        return min(-(-position // self._batch_size) * self._batch_size, len(self._rows))

    def _schedule(self) -> None:
        start, stop = self._cuts[self._next_segment : self._next_segment + 2]
        segment = Segment(self._rows[start:stop], start, stop)
        # the last piece may be that of a batch which this segment goes on with
        new = max(start, self._pieces[-1].stop if self._pieces else 0)
        whole = stop // self._batch_size * self._batch_size if stop < len(self._rows) else stop
        step = max(whole - new, 1) if self._shared else self._batch_size
        edges = [*range(new, whole, step), max(new, whole)]
        if stop > edges[-1]:
            edges.append(self._batches_end(stop))
        self._pieces.extend(Piece(a, b) for a, b in itertools.pairwise(edges))
        segment.pieces = [piece for piece in self._pieces if piece.start < stop and piece.stop > start]
        self._engine.schedule(segment)
        self._segments.append(segment)
        self._next_segment += 1
        self._pool.keep((len(self._pieces) + self._prefetch + 2) * len(self._engine.sources))
