"""Rows of a view → pixels, through DALI. The same loader feeds teachers, students and evaluation.

DALI decodes and resamples; it draws nothing. Box, size, window and flip of every sample come from the view plan and
are passed in with the bytes, so the pixels of a row do not depend on the batch it is in, on the thread that made it, or
on where a run was resumed. Output is uint8 NHWC: teachers normalize differently, so normalizing is not done here.

The tests hold it to PIL and torchvision: CPU decoding of what `headers.py` lets pass, whole or by region, with EXIF
orientation, equals PIL bit for bit (16-bit PNG: within 1, and gray is scaled where PIL clips); pad, crop and flip are
exact; resizing is PIL's triangle filter with antialiasing to within 1 of 255, but for the outermost row and column of a
*downscaled* box, where DALI repeats the edge pixel.

`graph.py` says what DALI does; `dali.py` imports it, when a loader is first made.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast.data.batch import Batch, moved
from feedfast.data.content import content_hash, refuse_changed
from feedfast.data.dali import dali_version, require_dali, torch_plugin
from feedfast.data.dataset import Dataset
from feedfast.data.geometry import evaluation_geometry
from feedfast.data.graph import FLAGS, MIXED_FLAGS, Stored, build_pipeline
from feedfast.data.images import Unreadable
from feedfast.data.views import ViewPlan
from feedfast.data.work import Work, annotations_of, refuse_unfit, truth_of, view_work
from feedfast.errors import FeedfastError, RequestError

__all__ = ["Loader"]

_EVALUATION = -1  # the view of batches that belong to none


class Loader:
    """Pixels of one dataset under one plan.

    Several loaders, and several streams of one loader, may run in one process at the same time. A stream may be
    abandoned half-way: closing or dropping it stops its threads.

    Args:
        dataset: what to load.
        plan: how every view looks; its ``size`` is also that of evaluation.
        batch_size: samples in a batch.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:i"``: where images are resampled (and decoded) and tensors end up.
        threads: DALI's CPU threads; None means the CPUs this process may use, at most 16.
        prefetch: batches DALI works ahead, >= 1.
        content: uint64 [sample], by position, what `Dataset.content` once said of each: every sample is compared as it
            is read. None compares nothing.

    Raises:
        RequestError: a number is out of range, the device does not exist, DALI is not installed, or the samples'
            annotations cannot follow the plan (`refuse_unfit`).
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: ViewPlan,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        content: NDArray[np.uint64] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("threads", threads or 1), ("prefetch", prefetch)):
            if value < 1:
                raise RequestError(f"loader, {name}: expected at least 1, found {value}")
        refuse_unfit(plan, dataset.annotations)
        require_dali()
        self.dataset = dataset
        self.plan = plan
        self.batch_size = batch_size
        self.device = _device(device)
        self.threads = threads or min(16, len(os.sched_getaffinity(0)))
        self.prefetch = prefetch
        self.content = content
        self._latest_view: tuple[int, Work] | None = None
        self._streams: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def stream(
        self, view: int, rows: NDArray[np.integer[Any]], *, start_batch: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Some rows of a view, in the order given.

        Args:
            view: which view.
            rows: row numbers, positions in the view's order; repeats are allowed.
            start_batch: batches to leave out at the front, for resuming: batch k is ``rows[k*B:(k+1)*B]`` wherever
                the stream starts, with the same pixels.
            drop_last: leave out a last batch that is not full.

        Returns:
            An iterator of batches; it works ahead once the first batch is asked for.

        Raises:
            RequestError: rows outside the dataset; while iterating, images that cannot be read or decoded, all of the
                batches in flight named by path.
            CacheMismatchError: while iterating, samples whose bytes are not those of ``content``.
        """
        rows_n = np.asarray(rows, dtype=np.int64)
        if rows_n.ndim != 1 or (rows_n.size and (rows_n.min() < 0 or rows_n.max() >= len(self.dataset))):
            raise RequestError(f"rows: expected a 1-D array of numbers from 0 to {len(self.dataset) - 1}")
        if start_batch < 0:
            raise RequestError(f"start_batch: expected at least 0, found {start_batch}")
        return self._started(self.work(view), view, rows_n, start_batch, drop_last)

    def evaluation(self, rows: NDArray[np.integer[Any]] | None = None) -> Iterator[Batch]:
        """Samples in id order: resize and central crop as in torchvision, see ``geometry.py``.

        Of data with boxes or masks the whole image, and as annotations a list of what each image is judged by, at its
        original resolution and on the CPU (`Boxes.truth`, `Masks.truth`).

        Args:
            rows: positions in id order; None means all samples.
        """
        everything = np.arange(len(self.dataset), dtype=np.int64)
        geometry = evaluation_geometry(self.plan, self.dataset.sizes, self.dataset.annotations.task)
        wanted = everything if rows is None else np.asarray(rows, dtype=np.int64)
        return self._started(Work(everything, geometry), _EVALUATION, wanted, 0, False)

    def describe(self) -> dict[str, Any]:
        """What made the pixels, for a cache's manifest: backend, versions and flags, all JSON-able."""
        gpu = self.device.type == "cuda"
        return {
            "backend": "dali-mixed" if gpu else "dali-cpu",
            "dali": dali_version(),
            "nvimgcodec": _nvimgcodec_version(),
            "flags": {**FLAGS, "region_decode": not gpu, **(MIXED_FLAGS if gpu else {})},
        }

    def close(self) -> None:
        """Stop every stream that is still running. The loader can be used again."""
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def work(self, view: int) -> Work:
        """All that is done to the samples of a view, in its order."""
        # A pass asks for the same view many times (pilot, resume, replay): the latest is kept, 25 bytes per sample.
        if self._latest_view is None or self._latest_view[0] != view:
            self._latest_view = (view, view_work(self.plan, self.dataset, view))
        return self._latest_view[1]

    def _started(
        self, whole: Work, view: int, rows: NDArray[np.int64], start_batch: int, drop_last: bool
    ) -> Iterator[Batch]:
        if drop_last:
            rows = rows[: len(rows) // self.batch_size * self.batch_size]
        rows = rows[start_batch * self.batch_size :]
        stream = self._batches(whole.rows(rows), view, rows)
        self._streams.add(stream)
        return stream

    def _batches(self, work: Work, view: int, rows: NDArray[np.int64]) -> Generator[Batch, None, None]:
        if not rows.size:
            return
        parts = [slice(at, at + self.batch_size) for at in range(0, len(rows), self.batch_size)]
        reader = ThreadPoolExecutor(
            max_workers=min(4, self.threads) if self.dataset.kind == "files" else 1,
            thread_name_prefix="feedfast-read",
        )
        try:
            shown = [work.positions] if work.partner is None else [work.positions, work.partner.positions]
            feed = _Feed(self.dataset, shown, parts, reader, ahead=self.prefetch + 1, content=self.content)
            pipeline = self._pipeline(work, feed)
            # A CUDA stream of its own: waiting for the copy must not wait for the consumer's kernels.
            cuda: Any = torch.cuda  # parts of it carry no types
            copier = cuda.Stream(self.device) if self.device.type == "cuda" else None
            ahead: deque[tuple[Work, Future[Any]]] = (
                deque()
            )  # masks are files, too: read by the threads that read images
            for index, part in enumerate(parts):
                while len(ahead) < min(self.prefetch, len(parts) - index):
                    here = work.rows(np.arange(len(rows))[parts[index + len(ahead)]])
                    ahead.append((here, reader.submit(self._annotated, here, view)))
                try:
                    (output,) = pipeline.run()
                except RuntimeError as error:
                    bad = np.concatenate([positions[p] for positions in shown for p in parts[index : feed.fed]])
                    raise _explained(error, self.dataset, bad) from error
                images = _owned(output, self.device, copier)
                here, annotated = ahead.popleft()
                annotations = annotated.result()
                if not (view == _EVALUATION and isinstance(annotations, list)):  # metrics work on the CPU
                    annotations = moved(annotations, self.device)
                yield Batch(images, annotations, self.dataset.ids[here.positions], rows[part], view)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _annotated(self, work: Work, view: int) -> Any:
        what = truth_of if view == _EVALUATION else annotations_of
        return what(self.dataset, work, self.plan.size)

    def _pipeline(self, work: Work, feed: _Feed) -> Any:
        store = self.dataset.pixels_store
        planar = store is not None and store.layout == "CHW"
        return build_pipeline(
            self.plan,
            work,
            Stored(files=self.dataset.kind == "files", planar=planar),
            feed.with_parameters,
            batch_size=self.batch_size,
            threads=self.threads,
            prefetch=self.prefetch,
            device_id=self.device.index if self.device.type == "cuda" else None,
        )


class _Feed:
    """Reads batches ahead in threads and hands them to DALI's source callback, in order."""

    def __init__(
        self,
        dataset: Dataset,
        positions: list[NDArray[np.int64]],
        parts: list[slice],
        reader: ThreadPoolExecutor,
        *,
        ahead: int,
        content: NDArray[np.uint64] | None,
    ) -> None:
        self.fed = 0  # batches handed to DALI
        self._parts = parts
        self._positions = positions
        self._reader = reader
        self._ahead = ahead
        self._pending: deque[list[Future[Any]]] = deque()
        self._dataset, self._content = dataset, content

    def _read(self, positions: NDArray[np.int64]) -> Any:
        # Looks at every file before DALI does: one JPEG cut short and one file of no known format in a batch make
        # DALI 2.4.0 crash the process, in most runs, instead of raising.
        data = self._dataset.stored(positions)
        if self._content is not None:
            found, expected = content_hash(data), self._content[positions]
            if not np.array_equal(found, expected):
                names = [self._dataset.name(position) for position in positions.tolist()]
                refuse_changed(self._dataset.source, names, self._dataset.ids[positions], found, expected)
        return data if self._dataset.pixels_store is not None else self._dataset.decodable(positions, list(data))

    def with_parameters(self, arrays: list[NDArray[Any]]) -> Callable[[], tuple[Any, ...]]:
        """DALI's source: each call gives the next batch of data and of every parameter array."""

        def source() -> tuple[Any, ...]:
            if self.fed == len(self._parts):
                raise StopIteration
            while len(self._pending) < min(self._ahead, len(self._parts) - self.fed):
                part = self._parts[self.fed + len(self._pending)]
                self._pending.append([self._reader.submit(self._read, at[part]) for at in self._positions])
            data = [read.result() for read in self._pending.popleft()]
            part = self._parts[self.fed]
            self.fed += 1
            return (*data, *(np.ascontiguousarray(array[part]) for array in arrays))

        return source


def _owned(output: Any, device: torch.device, copier: Any) -> torch.Tensor:
    """A copy of DALI's output batch: its buffers are reused for a later one."""
    tensor = output.as_tensor()
    if device.type == "cpu":
        return torch.from_numpy(np.array(tensor))
    cuda: Any = torch.cuda  # parts of it carry no types
    consumer = cuda.current_stream(device)
    with cuda.stream(copier):
        images = torch.empty(tensor.shape(), dtype=torch.uint8, device=device)
        torch_plugin().feed_ndarray(tensor, images, cuda_stream=copier)
    copier.synchronize()
    images.record_stream(consumer)
    return images


def _explained(error: RuntimeError, dataset: Dataset, positions: NDArray[np.int64]) -> FeedfastError:
    """DALI does not say which sample failed; decode each of those in flight again."""
    if dataset.kind == "files":
        bad = []
        for position in np.unique(positions):
            try:
                dataset.check(int(position))
            except Unreadable as why:
                bad.append(f"\n  {dataset.where(int(position))}: {why}")
        if bad:
            return RequestError(f"{dataset.source}: {len(bad)} images cannot be decoded:{''.join(bad)}")
    first, last = dataset.name(int(positions[0])), dataset.name(int(positions[-1]))
    return FeedfastError(f"{dataset.source}: DALI failed between samples {first} and {last}: {error}")


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"device: expected cpu, cuda or cuda:i, found {device!r}") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = wanted.index if wanted.index is not None else (torch.cuda.current_device() if count else 0)
    if wanted.type != "cuda" or index >= count:
        raise RequestError(f"device: expected cpu or one of {count} CUDA devices, found {device!s}")
    return torch.device("cuda", index)


def _nvimgcodec_version() -> str:
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        if name.lower().replace("_", "-").startswith("nvidia-nvimgcodec-cu"):
            return package.version
    return "unknown"
