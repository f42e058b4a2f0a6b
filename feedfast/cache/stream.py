"""Batches of cached rows, read ahead by threads into memory that is used again and again.

The rows of a pass are cut twice. The consumer sees *batches*. The threads read *segments*: stretches of the pass after
which no block read so far is needed again, so that every block is read, checked and decoded once although later passes
mix the rows of neighbouring blocks. Such cuts fall out of the row numbers alone: in the stored order every block edge
is one, in a pass that mixes rows within windows every window edge is. A pass without any (rows at random over
the whole view) is cut where memory asks for it, and then reads blocks more than once.

A segment's rows lie in ascending order in one buffer per array. A block of which all rows are wanted is read or decoded
straight into its place there; of any other block the wanted rows are copied. A batch whose rows lie in order
is a view of that buffer, without a copy; any other batch is gathered with one `np.take` per segment and array. Decoding
and gathering happen in the threads and release the GIL; per block the threads hold it for some tens of microseconds.

Memory: the rows of the segments of the next `prefetch` batches (at least one whole segment ahead), and for gathered
batches those batches too. A buffer returns to its pool when the last view of it dies, wherever that view has travelled
to; whoever keeps all batches (`list(stream)`) just uses more memory.

Damage found ahead of time waits until the consumer reaches the batch it belongs to.
Threads, not processes: nothing to pickle, no copies, and the work is done in C without the GIL.
This module knows rows and arrays; where shards come from is the caller's affair.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from feedfast.cache.segments import Array, BufferPool, Rows, Segment, cut_segments, shaped, take_rows
from feedfast.cache.shards import ArrayView, ShardFiles

_SEGMENT_BYTES = 4 << 20  # 4 MiB; planning a segment costs the consumer some 50 microseconds, so not too small ones


class _Batch:
    """One batch to be: the stretches of segments it is made of, then its arrays or the error that prevents them."""

    def __init__(self, parts: list[tuple[Segment, int, int]]) -> None:
        self.parts = parts
        self.pending = 0
        self.arrays: dict[str, Array] | None = None
        self.error: Exception | None = None


class _Engine:
    """The threads' side of a stream. The consumer's side holds it; it holds nothing of the consumer."""

    def __init__(self, sources: Sequence[ArrayView], files: ShardFiles, pool: BufferPool) -> None:
        self.sources = {source.spec.name: source for source in sources}
        self.files = files
        self.pool = pool
        self.lock = threading.RLock()  # `stop` may run in a garbage collection while its thread holds the lock
        self.work = threading.Condition(self.lock)
        self.ready = threading.Condition(self.lock)
        self.gathers: deque[_Batch] = deque()
        self.reads: deque[tuple[Segment, str, int, int]] = deque()  # slots [first, last) of one shard
        self.stopped = False
        self.threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        for number in range(threads):
            thread = threading.Thread(target=self._run, name=f"feedfast-read-{number}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Tell the threads to end; does not wait for them."""
        with self.lock:
            self.stopped = True
            self.gathers.clear()
            self.reads.clear()
            self.work.notify_all()
            self.ready.notify_all()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()

    def schedule(self, segment: Segment) -> None:
        """Give the segment its memory and queue its reads."""
        jobs = []
        for name, source in self.sources.items():
            segment.buffers[name] = self.pool.lease(len(segment.rows) * source.spec.row_bytes)
            jobs += [(segment, name, first, last) for first, last in segment.jobs(source.spec)]
        jobs.sort(key=lambda job: job[2])  # all arrays advance together; stable, so still in file order
        with self.lock:
            segment.pending = len(jobs)
            self.reads.extend(jobs)
            self.work.notify_all()

    def request(self, batch: _Batch) -> None:
        """Have the batch built as soon as its segments are there."""
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
                self.ready.wait()
        if batch.error is not None:
            raise batch.error
        if batch.arrays is None:
            raise RuntimeError("the stream was closed while a batch was awaited")
        return batch.arrays

    def _complete(self, batch: _Batch) -> None:
        """All segments of the batch are there (lock held): hand out views, or queue the gathering."""
        for segment, start, stop in batch.parts:
            batch.error = batch.error or segment.error_in(start, stop)
        if batch.error is None and not self._as_views(batch):
            self.gathers.append(batch)
            self.work.notify()
            return
        batch.parts = []
        self.ready.notify_all()

    def _as_views(self, batch: _Batch) -> bool:
        if len(batch.parts) != 1:
            return False
        segment, start, stop = batch.parts[0]
        index = segment.index[start - segment.start : stop - segment.start]
        first = int(index[0])
        # rows wanted twice are copied, so that what the consumer holds is always his alone
        if not segment.consecutive and not (segment.distinct and (np.diff(index) == 1).all()):
            return False
        arrays = {}
        for name, source in self.sources.items():
            size = source.spec.row_bytes
            arrays[name] = shaped(segment.buffers[name][first * size : (first + stop - start) * size], source.spec)
        batch.arrays = arrays
        return True

    def _run(self) -> None:
        while True:
            with self.lock:
                while not (self.gathers or self.reads or self.stopped):
                    self.work.wait()
                if self.stopped:
                    return
                batch = self.gathers.popleft() if self.gathers else None
                job = self.reads.popleft() if batch is None else None
            if batch is not None:
                self._gather(batch)
            elif job is not None:
                self._read(job)
            del batch, job  # an idle thread must not keep buffers from going back to the pool

    def _read(self, job: tuple[Segment, str, int, int]) -> None:
        segment, name, first, last = job
        errors: list[tuple[int, int, Exception]] = []
        try:
            segment.read(self.sources[name], self.files, segment.buffers[name], first, last)
        except Exception:  # whatever it is, the consumer must hear of it instead of waiting for ever
            errors = self._read_singly(job)
        with self.lock:
            segment.errors += errors
            segment.pending -= 1
            if segment.pending == 0:
                waiting, segment.waiting = segment.waiting, []
                for batch in waiting:
                    batch.pending -= 1
                    if batch.pending == 0:
                        self._complete(batch)

    def _read_singly(self, job: tuple[Segment, str, int, int]) -> list[tuple[int, int, Exception]]:
        """Read block by block what could not be read together, so that an error meets only the batches it concerns."""
        segment, name, first, last = job
        errors: list[tuple[int, int, Exception]] = []
        for number in range(first, last):
            try:
                segment.read(self.sources[name], self.files, segment.buffers[name], number, number + 1)
            except Exception as error:
                errors.append((segment.bounds[number], segment.bounds[number + 1], error))
        return errors

    def _gather(self, batch: _Batch) -> None:
        arrays: dict[str, Array] = {}
        error: Exception | None = None
        try:
            for name, source in self.sources.items():
                size = source.spec.row_bytes
                count = sum(stop - start for _, start, stop in batch.parts)
                out = self.pool.lease(count * size)
                done = 0
                for segment, start, stop in batch.parts:
                    index = segment.index[start - segment.start : stop - segment.start]
                    end = done + len(index) * size
                    take_rows(segment.buffers[name], index, out[done:end], size)
                    done = end
                arrays[name] = shaped(out, source.spec)
        except Exception as caught:
            error = caught
        with self.lock:
            batch.parts = []
            batch.error = error
            batch.arrays = arrays
            self.ready.notify_all()


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
        max_buffer_bytes: int = 1 << 30,  # 1 GiB
    ) -> None:
        """Plan the pass; threads start with the first batch.

        Args:
            sources: what to read; all with the same ``block_rows``.
            rows: int64 [n], rows of the view in the order they are wanted; every one within the view.
            batch_size: rows per batch; batch k holds ``rows[k * batch_size : (k + 1) * batch_size]``.
            start_batch: first batch to hand out; nothing before it is read.
            drop_last: leave out a last batch with fewer rows.
            prefetch: batches that are made ready ahead of the consumer.
            threads: threads that read, check, decode and gather.
            files: open shards to share with others.
            pool: buffers to share with others.
            max_buffer_bytes: what the segments in memory may take, decoded, over all arrays (two batches are always
                allowed). Less means that blocks of mixed passes are read more than once.
        """
        if drop_last:
            rows = rows[: len(rows) // batch_size * batch_size]
        self._rows = rows[start_batch * batch_size :]
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._threads = threads
        self._block_rows = sources[0].spec.block_rows
        row_bytes = sum(source.spec.row_bytes for source in sources)
        max_rows = max(batch_size, self._block_rows, max_buffer_bytes // (2 * row_bytes))
        least_rows = min(_SEGMENT_BYTES // row_bytes, 16 * batch_size)
        self._cuts = cut_segments(self._rows, self._block_rows, batch_size, max_rows, least_rows)
        self._total = -(-len(self._rows) // batch_size)
        self._next = 0  # batch to hand out
        self._next_segment = 0
        self._segments: deque[Segment] = deque()
        self._batches: deque[_Batch] = deque()
        self._requested = 0
        self._pool = pool or BufferPool()
        self._engine = _Engine(sources, files or ShardFiles(), self._pool)
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
        self._advance()
        batch = self._batches.popleft()
        try:
            arrays = self._engine.wait(batch)
        except BaseException:
            self.close()
            raise
        self._next += 1
        return arrays

    def close(self) -> None:
        """Stop the threads and let go of the memory; further batches do not come."""
        self._finalizer()
        self._engine.join()
        self._segments.clear()
        self._batches.clear()

    def _advance(self) -> None:
        """Schedule the segments and request the batches that belong to the next ``prefetch`` ones."""
        consumed = self._next * self._batch_size
        until = (self._next + 1 + self._prefetch) * self._batch_size
        while self._next_segment < len(self._cuts) - 1:
            start, stop = self._cuts[self._next_segment : self._next_segment + 2]
            if start >= until and start - consumed > stop - start:
                break
            segment = Segment(self._rows[start:stop], start, stop, self._block_rows)
            self._engine.schedule(segment)
            self._segments.append(segment)
            self._next_segment += 1
            self._pool.keep((len(self._segments) + self._prefetch + 2) * len(self._engine.sources))
        last = min(self._next + 1 + self._prefetch, self._total)
        while self._requested < last:
            first = self._requested * self._batch_size
            stop = min(first + self._batch_size, len(self._rows))
            parts = []
            while self._segments[0].stop <= first:
                self._segments.popleft()
            for segment in self._segments:
                if segment.start >= stop:
                    break
                parts.append((segment, max(first, segment.start), min(stop, segment.stop)))
            batch = _Batch(parts)
            self._batches.append(batch)
            self._engine.request(batch)
            self._requested += 1
