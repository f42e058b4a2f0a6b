"""Targets that fit are held after the first pass of a view: in codes, as the loss reads them, in memory.

A later pass takes its rows from there: nothing is read, decoded or checked again, and the batches are the same, bit for
bit. Every block was verified when it was read. A row that was not read yet (of another rank's share of an earlier
pass, or before the place where a run was resumed) is read from the cache when a pass first needs it, and held then.

Ranks share no memory: each deals with its own rows, a mixed pass deals out others than the one before, so in the end
every rank holds whole views. They are counted that way. Held rows are copied into the batch, which is the consumer's.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.errors import RequestError
from feedfast.stages.memory import available_bytes
from feedfast.stages.progress import format_bytes
from feedfast.storage.layout import ArraySpec
from feedfast.storage.reader import CacheReader
from feedfast.storage.segments import BufferPool, shaped, take_rows

log = logging.getLogger(__name__)

Residency = Literal["auto", "disk", "ram", "gpu"]
Rows = NDArray[np.int64]
Item = Mapping[str, "np.ndarray | Tensor"]

AHEAD: Final = 2  # batches made ready in memory while the consumer works


def resident(
    asked: Residency,
    reader: CacheReader,
    arrays: Sequence[str],
    device: torch.device,
    *,
    views: int,
    walked: int | None = None,
    ranks: int = 1,
    key: str = "train.residency",
) -> Resident | None:
    """What holds the rows of these arrays; None where every pass reads them. One line of the log says which and why.

    Args:
        asked: the option.
        reader: of the cache.
        arrays: what batches carry.
        device: where batches are put.
        views: how many there are.
        walked: passes over all views together, None = no end is known; of more views than that none is held.
        ranks: processes on this machine that hold the same.
        key: begins a refusal.

    Raises:
        RequestError: it was asked for by name and does not fit, or there is no GPU.
    """
    if not arrays:
        return None
    used = views if walked is None else min(views, walked)
    row_bytes = sum(reader.specs[array].row_bytes for array in arrays)
    needed = used * reader.manifest.num_rows * row_bytes
    if asked == "gpu" and device.type != "cuda":
        raise RequestError(f"{key}: 'gpu' holds targets on the training device, expected a CUDA device, found {device}")
    if asked == "gpu":
        available: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        needed, available = needed * ranks, available_bytes()
    kind, why = chosen(asked, needed, available, again=walked is None or walked > views, key=key)
    log.info("residency: %s", why)
    if kind == "disk":
        return None
    return Resident(
        reader, arrays, used, device if kind == "gpu" else torch.device("cpu"), pinned=device.type == "cuda"
    )


def chosen(
    asked: Residency, needed: int, available: int | None, *, again: bool, key: str = "train.residency"
) -> tuple[Literal["disk", "ram", "gpu"], str]:
    """Where targets are to be, and the sentence that says why.

    Args:
        asked: the option.
        needed: bytes that would be held.
        available: bytes that may be taken, None = nobody knows.
        again: whether any view is walked twice.
        key: begins a refusal.

    Raises:
        RequestError: asked for by name, and it does not fit.
    """
    size, room = format_bytes(needed), "an unknown amount" if available is None else format_bytes(available)
    where = "on the device" if asked == "gpu" else "in memory"
    if asked == "disk":
        return "disk", "every pass reads the cache, as asked"
    if asked != "auto":
        if available is not None and needed > available:
            raise RequestError(
                f"{key}: {asked!r} holds {size} {where}, expected room for it, found {room}; "
                "lower cache.views, or say 'auto' or 'disk'"
            )
        return asked, f"{size} are held {where} after the first pass of each view, as asked; {room} are available"
    if not again:
        return "disk", "every pass reads the cache: no view is walked twice"
    if available is None or needed > available // 2:
        return "disk", f"every pass reads the cache: {size} are more than half of the available memory ({room})"
    return "ram", f"{size} are held in memory after the first pass of each view; {room} are available"


class Resident:
    """Rows of some arrays that are held, and streams that take them from there.

    A copy in another process begins empty.
    """

    def __init__(
        self, reader: CacheReader, arrays: Sequence[str], views: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        """Make room; the system gives it as it is filled.

        Args:
            reader: where rows are read first.
            arrays: names of sharded arrays.
            views: the first of them are held; others are streamed from the reader.
            device: where rows are held. On the host a thread gathers batches ahead; on a GPU its queue does.
            pinned: gather the host's batches in page-locked memory, from which a GPU copies while the host goes on.
                What is held stays pageable: a batch is copied out of it in any case.

        Raises:
            RequestError: there is no room.
        """
        self.reader, self.arrays, self.views, self.device, self.pinned = reader, tuple(arrays), views, device, pinned
        self._pool = BufferPool()
        self._pool.keep((AHEAD + 3) * len(self.arrays))
        count = reader.manifest.num_rows
        self._held: dict[tuple[str, int], Tensor] = {}
        self._have = {(array, view): np.zeros(count, bool) for array in self.arrays for view in range(views)}
        try:
            for array, view in self._have:
                shape = (count, reader.specs[array].row_bytes)
                self._held[array, view] = torch.empty(shape, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's, of either kind of memory
            reason = str(error).partition("\n")[0]
            raise RequestError(
                f"train.residency: no room for the targets on {device} ({reason}); say 'disk'"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Resident], tuple[Any, ...]]:
        return _again, (self.reader, self.arrays, self.views, self.device, self.pinned)

    def stream(
        self, arrays: Sequence[str], view: int, rows: Rows, batch_size: int, *, start_batch: int = 0
    ) -> Iterator[Item]:
        """As `CacheReader.stream`, the same batches: NumPy arrays, or tensors where rows are held on a device.

        Raises:
            CacheDamageError: as `CacheReader.stream`, of rows that are not held yet.
        """
        if view >= self.views:
            return self.reader.stream(arrays, view, rows, batch_size, start_batch=start_batch)
        coming = np.asarray(rows, np.int64)[start_batch * batch_size :]
        lacking = np.zeros(len(coming), bool)
        for array in arrays:
            lacking |= ~self._have[array, view][coming]
        # Opened here and not by the first batch: a missing shard raises now.
        disk = self.reader.stream(arrays, view, coming[lacking], batch_size) if lacking.any() else None
        items = self._items(arrays, view, coming, lacking, batch_size, disk)
        return items if self.device.type == "cuda" else _Ahead(items)

    def _items(
        self,
        arrays: Sequence[str],
        view: int,
        coming: Rows,
        lacking: NDArray[np.bool_],
        batch_size: int,
        disk: Iterator[dict[str, np.ndarray]] | None,
    ) -> Generator[Item]:
        missing, got = coming[lacking], 0
        until = np.concatenate([[0], np.cumsum(lacking)])
        for start in range(0, len(coming), batch_size):
            here = coming[start : start + batch_size]
            item: Item = {}
            while disk is not None and got < until[start + len(here)]:
                read = missing[got : got + batch_size]
                item = self._keep(view, read, next(disk))
                got += len(read)
            # Where nothing was held, what is read comes in the very batches that are wanted.
            yield item if len(missing) == len(coming) else self._taken(arrays, view, here)

    def _keep(self, view: int, rows: Rows, item: Mapping[str, np.ndarray]) -> Item:
        """Hold what was read of some rows; the batch as it is to be handed out."""
        out: dict[str, np.ndarray | Tensor] = {}
        where = slice(int(rows[0]), int(rows[-1]) + 1) if bool((np.diff(rows) == 1).all()) else rows
        for array, values in item.items():
            held = self._held[array, view]
            flat = values.reshape(len(rows), -1).view(np.uint8)
            if held.device.type == "cpu":
                held.numpy()[where] = flat
                out[array] = values
            else:
                moved = torch.from_numpy(flat).pin_memory().to(held.device, non_blocking=True)
                held[torch.from_numpy(rows).to(held.device)] = moved
                out[array] = _typed(moved, self.reader.specs[array])
            self._have[array, view][rows] = True
        return out

    def _taken(self, arrays: Sequence[str], view: int, rows: Rows) -> Item:
        """Rows that are held, as a batch of its own."""
        out: dict[str, np.ndarray | Tensor] = {}
        for array in arrays:
            held, spec = self._held[array, view], self.reader.specs[array]
            if held.device.type != "cpu":
                out[array] = _typed(held.index_select(0, torch.from_numpy(rows).to(held.device)), spec)
                continue
            nbytes = len(rows) * spec.row_bytes
            pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self.pinned else None
            buffer = self._pool.lease(nbytes) if pinned is None else pinned.numpy()
            take_rows(held.numpy().reshape(-1), rows, buffer, spec.row_bytes)
            out[array] = shaped(buffer, spec) if pinned is None else _typed(pinned.view(len(rows), -1), spec)
        return out


def _again(reader: CacheReader, arrays: Sequence[str], views: int, device: torch.device, pinned: bool) -> Resident:
    return Resident(reader, arrays, views, device, pinned=pinned)


def _typed(data: Tensor, spec: ArraySpec) -> Tensor:
    """uint8 [row, row_bytes] as [row, ...] of the stored dtype."""
    dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
    return data.reshape(-1).view(dtype).view(-1, *spec.row_shape)


class _Ahead(Iterator[Item]):
    """Items of a generator, made by a thread a few ahead. The thread ends when this is exhausted, closed or dropped."""

    def __init__(self, items: Generator[Item]) -> None:
        self._work = _Work(items)
        # Not a bound method of self: the thread must stop when nobody holds the iterator any more.
        self._finalizer = weakref.finalize(self, self._work.stop)

    def __next__(self) -> Item:
        return self._work.take()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._finalizer()
        self._work.join()


class _Work:
    """The thread's side of `_Ahead`."""

    def __init__(self, items: Generator[Item]) -> None:
        self.items = items
        self.ready: deque[Item] = deque()
        self.changed = threading.Condition(threading.RLock())  # `stop` may run in a garbage collection
        self.error: BaseException | None = None
        self.over = self.stopped = False
        self.thread: threading.Thread | None = None

    def take(self) -> Item:
        if self.thread is None and not self.stopped:
            self.thread = threading.Thread(target=self._run, name="feedfast-held", daemon=True)
            self.thread.start()
        with self.changed:
            while not (self.ready or self.over or self.stopped):
                self.changed.wait()
            if self.ready and not self.stopped:
                self.changed.notify_all()
                return self.ready.popleft()
        if self.error is not None:
            raise self.error
        raise StopIteration

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.ready.clear()
            self.changed.notify_all()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    while len(self.ready) >= AHEAD and not self.stopped:
                        self.changed.wait()
                    if self.stopped:
                        break
                item = next(self.items, None)
                if item is None:
                    break
                with self.changed:
                    self.ready.append(item)
                    self.changed.notify_all()
                del item
        except BaseException as error:  # must reach the consumer, who would wait for ever otherwise
            self.error = error
        finally:
            self.items.close()
            with self.changed:
                self.over = True
                self.changed.notify_all()
