"""Writing a cache: rows in, durable shards and commit lines out.

`open_for_writing` (`feedfast.storage.create`) makes a cache or extends the one that is there. `CacheWriter` then takes
rows in ascending order, gathers each shard in one buffer, and hands full ones to a few threads that check, compress,
checksum and commit them (`feedfast.storage.ledger`). All of that runs without the GIL, at the same time as the
teachers.

Killed at any moment, the same calls finish the rest: `pending` names what is still to be written, `append` drops rows
of shards that are not, and because a shard is a pure function of its rows the bytes come out the same.

It does not encode maps into codes and does not know where rows come from. Small arrays are `feedfast.storage.small`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from feedfast.errors import FeedfastError, RequestError
from feedfast.storage.assemble import ShardBuffer, encode_shard
from feedfast.storage.create import open_for_writing
from feedfast.storage.layout import ArraySpec
from feedfast.storage.ledger import Ledger
from feedfast.storage.log import Problem
from feedfast.storage.pending import Division, Handed, Pending, Unit
from feedfast.storage.places import open_store
from feedfast.storage.schema import Manifest
from feedfast.storage.small import put_small, read_stored
from feedfast.storage.store import Place, Store

__all__ = ["CacheWriter", "open_for_writing"]

Array = npt.NDArray[Any]
_WAITING = 8  # shards that hold no buffer any more and wait for the disk: fsyncs of several overlap


class CacheWriter:
    """One writer of one part of a cache. A context manager; `close` waits for everything appended to be durable.

    Attributes:
        manifest: of the cache.
        part: its own.
        specs: the arrays.
        rows: of all views that belong to its part.
    """

    def __init__(
        self,
        place: Place | Store,
        manifest: Manifest,
        *,
        part: tuple[int, int] = (0, 1),
        divided: bool = True,
        workers: int = 2,
        max_in_flight: int | None = None,
    ) -> None:
        """Lock the part, repair the end of its log, and learn what is committed.

        Args:
            place: the cache.
            manifest: what `open_for_writing` returned.
            part: (i, n), this is writer i of n.
            divided: rows of other parts are dropped; False = the part names this writer's log alone, and whoever
                appends sees to it that every shard has one writer.
            workers: shards that are checked, compressed and checksummed at a time.
            max_in_flight: full shards in memory; default ``2 * workers + 1``.

        Raises:
            RequestError: the part is already being written, or writers of another division are at work.
            CacheMismatchError: the manifest on disk is another.
            CacheDamageError: a log is damaged other than by a torn last line, or disagrees with the manifest.
        """
        if not 0 <= part[0] < part[1]:
            raise RequestError(f"part: expected i/n with 0 <= i < n, found {part[0]}/{part[1]}")
        self.manifest, self.part = manifest, part
        self._ledger = Ledger(open_store(place), manifest, part)
        self.specs = self._ledger.specs
        division = Division(self.specs, manifest.num_rows, part if divided else (0, 1))
        self._division: Division | Handed = division
        self.rows = division.rows(manifest.views)
        self._open: dict[tuple[str, int], ShardBuffer] = {}
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # guards the buffers to use again
        self._spare: dict[int, list[npt.NDArray[np.uint8]]] = {}  # by size; fresh pages cost as much as the copy
        # Memory is flat: a buffer per array being written, and this many full ones. `append` waits when the disk is
        # slower than the teachers.
        most = max_in_flight or 2 * workers + 1
        self._slots = threading.BoundedSemaphore(most)
        self._turns = threading.BoundedSemaphore(workers)  # of the processor
        self._settled = threading.Condition()
        self._unsettled = 0  # shards that still need the processor
        self._on_the_way: set[tuple[str, int, int]] = set()  # array, view, shard: taken whole and not durable yet
        self._closed = False
        self._pool = ThreadPoolExecutor(most + _WAITING, thread_name_prefix="feedfast-write")

    # ---- what there is

    @property
    def bytes_written(self) -> int:
        """Bytes of the objects this writer has committed."""
        return self._ledger.bytes_written

    @property
    def shards_written(self) -> int:
        """How many objects this writer has committed."""
        return self._ledger.shards_written

    @property
    def damaged(self) -> list[Problem]:
        """Committed objects found missing or of another length at opening; they are to be written again."""
        return self._ledger.damaged

    def filling(self) -> frozenset[tuple[str, int, int]]:
        """(array, view, shard) of every shard that is begun and not full: what ending now would lose."""
        return frozenset((array, view, shard.shard) for (array, view), shard in self._open.items())

    def missing(self, array: str) -> set[tuple[int, int]]:
        """(view, shard) of every object of an array neither committed nor on its way, whichever part it belongs to."""
        return self._ledger.missing(array)

    def pending(self, arrays: Iterable[str]) -> Pending:
        """What this writer's part still has to write of sharded ``arrays``, as of now.

        Raises:
            FeedfastError: the manifest has no such array.
        """
        specs = {name: self._ledger.spec(name) for name in arrays}
        missing = {
            name: frozenset(place for place in self._division.shards(spec) if place not in self._ledger.done[name])
            for name, spec in specs.items()
        }
        return Pending(specs, missing, self.manifest.num_rows, self.manifest.views)

    # ---- work that is handed out

    def hand(self, units: Collection[Unit]) -> None:
        """From now on rows of these units are taken and all others dropped, whatever the part.

        For the writers of an engine, which are opened with ``divided=False``; whoever hands out the units sees to it
        that each has one writer. `flush` comes first: rows of shards that are not full yet would be lost.
        """
        self._division = Handed(units)

    def refresh(self) -> None:
        """Learn what other writers have committed since this one was opened. Reads all logs."""
        self._ledger.refresh(*(name for name, spec in self.specs.items() if spec.sharded))

    def holds(self, unit: Unit) -> bool:
        """Whether everything taken of a unit is durable; rows of shards that are not full yet do not count.

        Raises:
            FeedfastError: a shard could not be written.
        """
        with self._settled:
            coming = [(self.specs[name], view, shard) for name, view, shard in self._on_the_way]
        self._raise_pending()
        only = Handed([unit])
        return not any(only.holds(*one) for one in coming)

    def flush(self) -> None:
        """Wait until all full shards are durable.

        Raises:
            FeedfastError: a shard could not be written.
        """
        with self._settled:
            self._settled.wait_for(lambda: not self._on_the_way)
        self._raise_pending()

    # ---- small arrays

    def put(self, array: str, values: Array, *, view: int | None = None) -> None:
        """Write a small array at once: ``views/…``, ``labels``, a tap's ``scale``. Durable on return.

        What is already there is compared and left alone, so the same call is right on resuming.

        Args:
            array: its name.
            values: the whole array, or with ``view`` that view's part of it.
            view: for arrays with a view axis.

        Raises:
            CacheMismatchError: other values are committed.
            FeedfastError: wrong shape or dtype, or a value that means "missing".
        """
        self._raise_pending()
        put_small(self._ledger, array, values, view)

    def stored(self, array: str) -> Array | None:
        """A committed small array (`put`), or None while any of its objects is missing.

        Raises:
            CacheDamageError: an object is not the one that was committed.
        """
        return read_stored(self._ledger, array)

    # ---- rows of sharded arrays

    def append(
        self,
        array: str,
        view: int,
        start_row: int,
        rows: Array,
        *,
        saturated: int = 0,
    ) -> None:
        """Take rows [start_row, start_row + n) of a view; they are copied before this returns, or lie in their `place`.

        Rows of one shard must come in order, from its first, and one shard of an array and view at a time. Rows of
        shards that are committed, or belong to another part, are dropped: whole batches may be given, also again on
        resuming. Waits while ``max_in_flight`` full shards are in memory.

        Args:
            array: e.g. ``targets/a/final/codes``.
            view: number of the view.
            start_row: row of ``rows[0]``.
            rows: [n, ...] in the array's dtype and row shape, channels last.
            saturated: values the codec clipped in these rows; counted on the first shard they reach.

        Raises:
            FeedfastError: an earlier shard could not be written, rows do not follow, or they hold a fill value.
        """
        spec = self._checked(array, view, start_row, len(rows), rows.shape[1:], rows.dtype)
        at, stop = start_row, start_row + len(rows)
        while at < stop:
            shard = at // spec.shard_rows
            end = min(stop, spec.shard_span(shard)[1])
            if self._wanted(spec, view, shard):
                gathering = self._gather(spec, view, shard, at)
                target = gathering.rows[gathering.filled : gathering.filled + end - at]
                if not _is_same(rows, target):
                    target[...] = rows[at - start_row : end - start_row]
                gathering.filled += end - at
                gathering.saturated, saturated = gathering.saturated + saturated, 0
                if end == spec.shard_span(shard)[1]:
                    del self._open[array, view]
                    self._submit(gathering)
            at = end

    def place(self, array: str, view: int, start_row: int, count: int) -> Array | None:
        """The memory that rows [start_row, start_row + count) of a view will lie in, for `append`, which then copies
        nothing: fill it and append it. None where it is in two pieces, or the rows will be dropped.

        Raises:
            FeedfastError: as `append`.
        """
        spec = self._checked(array, view, start_row, count)
        shard = start_row // spec.shard_rows
        if not count or start_row + count > spec.shard_span(shard)[1] or not self._wanted(spec, view, shard):
            return None
        gathering = self._gather(spec, view, shard, start_row)
        return gathering.rows[gathering.filled : gathering.filled + count]

    def settle(self) -> None:
        """Wait until the shards taken so far need no more of the processor: what is left is waiting for the disk.

        For a caller whose own threads want every core: whoever computes in parallel regions waits for the slowest of
        its threads at the end of each, so a core that is shared now and then costs all of them.

        Raises:
            FeedfastError: a shard could not be written.
        """
        with self._settled:
            self._settled.wait_for(lambda: not self._unsettled)
        self._raise_pending()

    def _wanted(self, spec: ArraySpec, view: int, shard: int) -> bool:
        """Whether rows of a shard are kept: the one place where rows are dropped."""
        return (view, shard) not in self._ledger.done[spec.name] and self._division.holds(spec, view, shard)

    def _checked(
        self,
        array: str,
        view: int,
        start_row: int,
        count: int,
        row_shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ) -> ArraySpec:
        """The array's spec; raises unless these rows are there and, where given, theirs is the form."""
        self._raise_pending()
        spec, stop = self._ledger.spec(array), start_row + count
        shape, kind = spec.row_shape if row_shape is None else row_shape, spec.dtype if dtype is None else dtype
        fits = spec.sharded and kind == spec.dtype and shape == spec.row_shape
        if not fits or not 0 <= start_row <= stop <= spec.rows or not 0 <= view < spec.num_views:
            raise FeedfastError(
                f"{array}: expected rows {list(spec.row_shape)} {spec.dtype} within 0..{spec.rows} of views below "
                f"{spec.num_views}, found rows {list(shape)} {kind}, {start_row}..{stop} of view {view}"
            )
        return spec

    def _gather(self, spec: ArraySpec, view: int, shard: int, row: int) -> ShardBuffer:
        first = spec.shard_span(shard)[0]
        current = self._open.get((spec.name, view))
        expected = first if current is None else spec.shard_span(current.shard)[0] + current.filled
        if row != expected or (current is not None and current.shard != shard):
            raise FeedfastError(f"{spec.name}: view {view}: rows must follow, expected row {expected}, found row {row}")
        if current is None:
            size = spec.shard_rows * spec.row_bytes
            with self._lock:
                spare = self._spare.get(size)
                memory = spare.pop() if spare else np.empty(size, np.uint8)
            rows = memory.view(spec.dtype).reshape(spec.shard_rows, *spec.row_shape)
            current = self._open[spec.name, view] = ShardBuffer(spec, view, shard, rows)
        return current

    def _submit(self, shard: ShardBuffer) -> None:
        self._slots.acquire()
        try:
            self._raise_pending()
            self._ledger.done[shard.spec.name].add((shard.view, shard.shard))
            with self._settled:
                self._pool.submit(self._finish, shard)
                self._unsettled += 1
                self._on_the_way.add((shard.spec.name, shard.view, shard.shard))
        except BaseException:
            self._slots.release()
            raise

    def _finish(self, shard: ShardBuffer) -> None:
        """In a worker: publish one shard. An error is kept for the caller and ends the work of all workers."""
        spec = shard.spec
        with contextlib.ExitStack() as turn:
            turn.callback(self._let_go, shard)
            turn.enter_context(self._turns)
            try:
                if self._error is None:
                    parts = encode_shard(shard)
                    # turn and buffer are given back when the kernel has the bytes: the disk is waited for without them
                    self._ledger.commit(spec, shard.view, shard.shard, parts, shard.saturated, written=turn.close)
            except BaseException as error:  # whatever it is: the caller's thread raises it
                self._error = self._error or error
            finally:
                with self._settled:
                    self._on_the_way.discard((spec.name, shard.view, shard.shard))
                    self._settled.notify_all()

    def _let_go(self, shard: ShardBuffer) -> None:
        """Its buffer may be used again, and it needs no more of the processor."""
        with self._lock:
            self._spare.setdefault(shard.rows.nbytes, []).append(shard.rows.reshape(-1).view(np.uint8))
        self._slots.release()
        with self._settled:
            self._unsettled -= 1
            self._settled.notify_all()

    # ---- closing

    def _raise_pending(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise FeedfastError(f"{self._ledger.store.where()}: this writer is closed")

    def close(self) -> None:
        """Wait until everything appended is durable, and give the part back. Shards not full yet are not written.

        Raises:
            FeedfastError: a shard could not be written.
        """
        if self._closed:
            return
        self._pool.shutdown(wait=True)
        self._closed = True
        self._open.clear()
        self._spare.clear()
        self._ledger.close()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if not isinstance(error, KeyboardInterrupt):  # then what is computed already is written: it takes moments
            self._error = self._error or error  # what waits in the queue is dropped; it is computed again on resuming
        with contextlib.suppress(BaseException):
            self.close()


def _is_same(rows: Array, target: Array) -> bool:
    """Whether rows lie where they are to go."""
    here, there = (array.__array_interface__["data"][0] for array in (rows, target))
    return bool(here == there and rows.nbytes == target.nbytes and rows.flags.c_contiguous)
