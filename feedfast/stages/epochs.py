"""Passes and epochs of a cache in other people's loops: plain PyTorch, DataLoader workers, DDP, Lightning, Accelerate.

`Stream` is one pass over one view, `Epochs` a loader that walks on to the next view each time it is iterated, and
`Evaluation` shows validation images. All are `IterableDataset`s, with `len`, usable in ``with``.

Nobody sees another's rows. Ranks divide every batch's worth of rows among themselves, DataLoader workers take batches
in turn. A copy that was forked, or a worker that would hand out an epoch twice, says so instead.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.data.passes import pass_order
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError
from feedfast.stages.loop import rank_rows, view_and_pass
from feedfast.stages.source import Cached
from feedfast.stages.worker import Worker

MAX_WORKERS = 1024


@dataclass(frozen=True)
class Place:
    """Which of several ranks a stream serves; None is found out when it is needed."""

    rank: int | None = None
    world: int | None = None

    def resolved(self) -> tuple[int, int]:
        """(rank, world): as given, else the process group's, else the environment's, else 0 of 1.

        Raises:
            RequestError: only one of both is given, or the rank is not below the world's size.
        """
        if (self.rank is None) != (self.world is None):
            raise RequestError(
                f"rank, world_size: expected both or neither, found rank={self.rank}, world_size={self.world}"
            )
        if self.rank is not None and self.world is not None:
            if not 0 <= self.rank < self.world:
                raise RequestError(f"rank: expected 0 to {self.world - 1}, found {self.rank}")
            return self.rank, self.world
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if "RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RequestError(
                f"rank: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but neither a process group nor RANK says which rank "
                "this is; pass rank and world_size, or iterate after the process group has been initialized"
            )
        worker = Worker.from_env()
        return worker.rank, worker.world


class _Sharded(IterableDataset[Batch]):
    """What the three have in common: whose rows, in which process."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # A DataLoader's spawned worker sees neither the process group nor, perhaps, its variables: they are asked here.
        rank, world = self._place.resolved()
        return {**self.__dict__, "_place": Place(rank, world)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._pid = os.getpid()

    def _refuse_fork(self) -> None:
        if self._pid != os.getpid():
            raise RequestError(
                "DataLoader: a cache cannot be streamed in a forked process (decoding threads do not survive a fork); "
                'pass multiprocessing_context="spawn", or num_workers=0: reading ahead happens in threads anyway'
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Stop what is read ahead."""


class Stream(_Sharded):
    """One pass over one view: an iterator of `Batch`, used up when the pass is over. Made by `OpenedCache.stream`.

    Attributes:
        view: which augmentation seed.
        pass_index: how often this view has been walked before.
        position: batches handed out, counted from the start of the pass.
    """

    def __init__(
        self,
        source: Cached,
        *,
        view: int,
        pass_index: int,
        batch_size: int,
        start_batch: int,
        drop_last: bool,
        normalize: nn.Module | None,
        place: Place,
    ) -> None:
        super().__init__(place)
        for key, value, least in (("batch_size", batch_size, 1), ("start_batch", start_batch, 0)):
            if value < least:
                raise RequestError(f"{key}: expected at least {least}, found {value}")
        self.source, self.view, self.pass_index = source, view, pass_index
        self.batch_size, self.drop_last, self.normalize = batch_size, drop_last, normalize
        self.position = start_batch
        self._batches: Iterator[Batch] | None = None
        self._over = False

    def check(self) -> None:
        """Raise a CacheDamageError now if a shard of this view is missing or short."""
        self.source.reader.require(self.source.arrays, [self.view])

    def rows(self) -> np.ndarray:
        """int64 [n], the rows of the view that this rank gets, in order."""
        rank, world = self._place.resolved()
        plan, count = self.source.plan, self.source.reader.manifest.num_rows
        order = pass_order(count, plan.seed, self.view, self.pass_index, plan.granule, plan.window)
        batch = self.batch_size * world
        whole = rank_rows(order, batch, rank, world)
        rest = order[len(order) // batch * batch :]
        return whole if self.drop_last else np.concatenate([whole, rest[rank::world]])

    def __len__(self) -> int:
        """Batches of this rank still to come (of all DataLoader workers together)."""
        return max(-(-len(self.rows()) // self.batch_size) - self.position, 0)

    def __iter__(self) -> Stream:
        if self._over:
            raise RequestError(
                f"stream: the pass over view {self.view} is over; ask for another one, or use cache.epochs(...), which "
                "walks on to the next view by itself"
            )
        return self

    def __next__(self) -> Batch:
        if self._over:
            raise StopIteration
        if self._batches is None:
            self._refuse_fork()
            self._batches = self._opened()
        batch = next(self._batches, None)
        if batch is None:
            self._over = True
            self.close()
            raise StopIteration
        self.position += 1
        return batch if self.normalize is None else replace(batch, images=self.normalize(batch.images))

    def _opened(self) -> Iterator[Batch]:
        rows, start, worker = self.rows(), self.position, get_worker_info()
        if worker is not None:
            parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            # In turn: torch asks its workers in turn, so the batches come in the order of a single process.
            mine = parts[start + worker.id :: worker.num_workers]
            rows, start = np.concatenate(mine) if mine else rows[:0], 0
        return self.source.batches(self.view, rows, self.batch_size, start)

    def close(self) -> None:
        """Stop what is read ahead; no further batches come."""
        self._over = True
        batches, self._batches = self._batches, None
        if batches is not None and hasattr(batches, "close"):
            batches.close()

    def state_dict(self) -> dict[str, int]:
        """Where this pass stands, to be given to `load_state_dict` of a stream made with the same arguments."""
        return {
            "view": self.view,
            "pass_index": self.pass_index,
            "batch_size": self.batch_size,
            "world_size": self._place.resolved()[1],
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            RequestError: the state is of another view, pass, batch size or number of ranks.
        """
        _refuse_other_state({**self.state_dict(), "position": state.get("position", -1)}, state)
        self.close()
        self._over, self.position = False, state["position"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_batches": None}

    def __repr__(self) -> str:
        where = f"view {self.view}, pass {self.pass_index}, batch {self.position}"
        return f"Stream({where}, {len(self)} batches of {self.batch_size} to come)"


class Epochs(_Sharded):
    """A loader that hands out the next epoch each time it is iterated. Made by `OpenedCache.epochs`.

    In a DataLoader with workers, call `set_epoch` before each epoch, as of torch's DistributedSampler.

    Attributes:
        epoch: the epoch under way, or the next one.
    """

    def __init__(
        self,
        source: Cached,
        *,
        batch_size: int,
        epoch: int,
        drop_last: bool,
        normalize: nn.Module | None,
        place: Place,
    ) -> None:
        super().__init__(place)
        if batch_size < 1:
            raise RequestError(f"batch_size: expected at least 1, found {batch_size}")
        self.source, self.batch_size, self.drop_last, self.normalize = source, batch_size, drop_last, normalize
        self._next = (epoch, 0)  # epoch and batch that the next iteration starts at
        self._stream: Stream | None = None
        self._stream_epoch = epoch
        # Shared with DataLoader workers: [0] the epoch of the last `set_epoch`, [1 + worker] the last one handed out.
        self._shared = torch.full((1 + MAX_WORKERS,), -1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one."""
        return self._next[0] if self._stream is None else self._stream_epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch; from its start, unless `load_state_dict` has just said where in it."""
        if self._stream is not None or self._next[0] != epoch:
            self._next = (epoch, 0)
        self._shared[0] = epoch

    @property
    def sampler(self) -> Epochs:
        """Itself: Lightning tells a loader's sampler which epoch begins, also after resuming at an epoch's end."""
        return self

    def __len__(self) -> int:
        """Batches of one epoch of this rank."""
        return len(self._made(0, 0))

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that an iterator nobody asks for a batch (Lightning makes some) uses no epoch up.
        self._refuse_fork()
        epoch, start = self._next
        worker = get_worker_info()
        if worker is not None:
            told = int(self._shared[0])
            if told not in (-1, epoch):
                epoch, start = told, 0
            if int(self._shared[1 + worker.id]) == epoch:
                raise RequestError(
                    f"epochs: DataLoader workers were about to hand out epoch {epoch} again; "
                    "call set_epoch(epoch) of this dataset before each epoch"
                )
            self._shared[1 + worker.id] = epoch
        if self._stream is not None:
            self._stream.close()
        stream = self._made(epoch, start)
        self._stream, self._stream_epoch = stream, epoch
        self._next = (epoch + 1, 0)
        try:
            yield from stream
        finally:
            stream.close()
            if self._stream is stream and len(stream) == 0:
                self._stream = None

    def _made(self, epoch: int, start: int) -> Stream:
        view, pass_index = view_and_pass(epoch, self.source.views)
        return Stream(
            self.source,
            view=view,
            pass_index=pass_index,
            batch_size=self.batch_size,
            start_batch=start,
            drop_last=self.drop_last,
            normalize=self.normalize,
            place=self._place,
        )

    def close(self) -> None:
        """Stop what is read ahead; the next iteration starts the next epoch."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def state_dict(self) -> dict[str, int]:
        """Where training stands: the epoch and how many batches of it have been handed out."""
        epoch, batch = self._next if self._stream is None else (self._stream_epoch, self._stream.position)
        size, world = self.batch_size, self._place.resolved()[1]
        return {"epoch": epoch, "position": batch, "batch_size": size, "world_size": world}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state_dict` was taken, in mid-epoch if need be.

        Raises:
            RequestError: the state is of another batch size or number of ranks.
        """
        own = {**self.state_dict(), "epoch": state.get("epoch", -1), "position": state.get("position", -1)}
        _refuse_other_state(own, state)
        self.close()
        self._next = (state["epoch"], state["position"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stream": None}

    def __repr__(self) -> str:
        state = self.state_dict()
        where = f"epoch {state['epoch']}, batch {state['position']} of {len(self)}"
        return f"Epochs({where}, batches of {self.batch_size}, {self.source.views} views)"


class Evaluation(_Sharded):
    """Validation images in id order, without targets; can be iterated again. Made by `OpenedCache.evaluation`."""

    def __init__(
        self,
        data: Dataset,
        plan: ViewPlan,
        device: torch.device,
        *,
        batch_size: int,
        normalize: nn.Module | None,
        place: Place,
        even: bool,
    ) -> None:
        super().__init__(place)
        if batch_size < 1:
            raise RequestError(f"batch_size: expected at least 1, found {batch_size}")
        self.data, self.plan, self.device = data, plan, device
        self.batch_size, self.normalize = batch_size, normalize
        self._even = even
        self._loader: Loader | None = None

    def rows(self) -> np.ndarray:
        """int64 [n], the positions that this rank shows."""
        rank, world = self._place.resolved()
        count, step = len(self.data), self.batch_size * world
        if not self._even:
            return np.arange(rank, count, world)
        whole = count // step * step
        last = -(-(count - whole) // world)
        parts = np.arange(whole).reshape(-1, world, self.batch_size)[:, rank].ravel()
        return np.concatenate([parts, (whole + rank * last + np.arange(last)) % count])

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.rows()) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._refuse_fork()
        rows, worker = self.rows(), get_worker_info()
        if worker is not None:
            parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            mine = parts[worker.id :: worker.num_workers]
            rows = np.concatenate(mine) if mine else rows[:0]
        if self._loader is None:
            self._loader = Loader(self.data, self.plan, batch_size=self.batch_size, device=self.device)
        for batch in self._loader.evaluation(rows):
            yield batch if self.normalize is None else replace(batch, images=self.normalize(batch.images))

    def close(self) -> None:
        """Stop what is read ahead."""
        if self._loader is not None:
            self._loader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loader": None}

    def __repr__(self) -> str:
        return f"Evaluation({self.data.source!r}, {len(self.data):,} images, batches of {self.batch_size})"


def _refuse_other_state(own: Mapping[str, int], state: Mapping[str, int]) -> None:
    differing = [key for key in sorted(own.keys() | state.keys()) if own.get(key) != state.get(key)]
    if differing or min(state.values(), default=-1) < 0:
        expected = ", ".join(f"{key}={own.get(key)}" for key in differing or own)
        found = ", ".join(f"{key}={state.get(key)}" for key in differing or state)
        raise RequestError(f"load_state_dict: expected a state of this stream ({expected}), found {found or 'nothing'}")
