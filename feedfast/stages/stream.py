"""A cache for any training loop: `feedfast.open_cache(path).stream(...)`.

    cache = feedfast.open_cache("runs/c100.zarr")
    for batch in cache.stream(view=0, batch_size=128):
        loss = my_loss(model(batch.images), batch.labels, batch.targets["a"]["final"])
        ...

Images are decoded again with the stored crops and flips by the loader that fed the teachers, or read from the cache
if it was made with ``images = "stored"``; targets are read ahead by threads and verified on the way. Both sides
walk the same rows, so a batch can be resumed exactly: pass ``start_batch``. This is the part of the student stage
that other trainers want.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feedfast.cache.reader import CacheReader
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import pass_order
from feedfast.errors import RequestError
from feedfast.stages.audit import check_views, plan_of, recipe_of, replay_pixels
from feedfast.stages.ensemble import LOGITS, Normalize
from feedfast.stages.identity import dataset_info, refuse_differences
from feedfast.stages.targets import CachedTargets, Targets
from feedfast.stages.worker import pick_device

STORED = "pixels/codes"


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of a stream.

    Attributes:
        images: float32 [batch, 3, height, width], normalized, channels-last strides (uint8
            [batch, height, width, 3] with ``normalize=False``).
        labels: int64 [batch], -1 where there is none.
        targets: teacher → tap → `feedfast_kernels.Codes` or a float map; ``logits`` [batch, class].
        ids: uint32 [batch], sample ids.
        rows: int64 [batch], positions in the view's order.
    """

    images: Tensor
    labels: Tensor
    targets: Targets
    ids: np.ndarray
    rows: np.ndarray


class Cache:
    """An open cache with its images. Made by `open_cache`."""

    def __init__(self, reader: CacheReader, data: Dataset) -> None:
        self.reader, self.data, self.plan = reader, data, plan_of(reader)
        self.manifest = reader.manifest

    def __len__(self) -> int:
        """Rows of one view."""
        return self.manifest.num_rows

    @property
    def taps(self) -> dict[str, tuple[str, ...]]:
        """Teacher → the names of its targets."""
        return {name: (*teacher.taps, LOGITS) for name, teacher in self.manifest.teachers.items()}

    def stream(
        self,
        view: int = 0,
        batch_size: int = 128,
        *,
        device: str = "cpu",
        taps: dict[str, Sequence[str]] | None = None,
        pass_index: int = 0,
        start_batch: int = 0,
        drop_last: bool = True,
        normalize: bool = True,
    ) -> Iterator[Batch]:
        """One pass over a view.

        Args:
            view: which augmentation seed.
            batch_size: rows a batch.
            device: where tensors are put.
            taps: teacher → targets wanted; all of them without it, none with {}.
            pass_index: 0 is the stored order; later passes over the same view mix rows
                (`feedfast.data.views.pass_order`).
            start_batch: first batch to hand out; nothing before it is read.
            drop_last: leave out a last batch with fewer rows.
            normalize: images as networks take them (with the first teacher's mean and std), or uint8 pixels.

        Raises:
            RequestError: no such view, teacher or tap, or a number below its least.
            CacheDamageError: a shard is missing or short; while iterating, before the batch it belongs to: changed.
        """
        where = pick_device(device)
        if not 0 <= view < self.manifest.views:
            raise RequestError(f"{self.reader.path}: expected a view below {self.manifest.views}, found {view}")
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("start_batch", start_batch, 0),
            ("pass_index", pass_index, 0),
        ):
            if value < least:
                raise RequestError(f"{key}: expected at least {least}, found {value}")
        wanted = {
            name: (names,) if isinstance(names, str) else tuple(names)
            for name, names in (self.taps if taps is None else taps).items()
        }
        source = CachedTargets(self.reader, wanted, where)
        rows = pass_order(len(self), self.plan.seed, view, pass_index)
        if drop_last:
            rows = rows[: len(rows) // batch_size * batch_size]
        # Opened here and not by the first batch: a shard that is not there ends the call, not a loop under way.
        batches = -(-len(rows) // batch_size)
        items = source.stream(view, rows, batch_size, start_batch) if wanted else repeat({}, batches - start_batch)
        first = next(iter(self.manifest.teachers.values()))
        transform = Normalize(first.mean, first.std).to(where) if normalize else None
        pixels = self._pixels(view, rows, batch_size, start_batch, where)
        return self._batches(pixels, items, source, transform)

    def _batches(
        self,
        pixels: Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]],
        items: Iterator[dict[str, np.ndarray]],
        source: CachedTargets,
        transform: Normalize | None,
    ) -> Iterator[Batch]:
        for (images, labels, ids, here), item in zip(pixels, items, strict=True):
            shown = images if transform is None else transform(images)
            yield Batch(shown, labels, source.targets(item, images), ids, here)

    def _pixels(
        self, view: int, rows: np.ndarray, batch_size: int, start_batch: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]]:
        if self.manifest.images == "replay":
            loader = Loader(self.data, self.plan, batch_size=batch_size, device=str(device))
            for batch in loader.stream(view, rows, start_batch=start_batch):
                yield batch.images, batch.labels, batch.ids, batch.rows
            return
        order, labels = self.reader.read_array("views/order", view), self.reader.read_array("labels")
        items = self.reader.stream([STORED], view, rows, batch_size, start_batch=start_batch)
        for number, item in enumerate(items, start_batch):
            here = rows[number * batch_size : (number + 1) * batch_size]
            ids = order[here]
            images = torch.from_numpy(item[STORED]).to(device)
            yield images, torch.from_numpy(labels[ids].astype(np.int64)).to(device), ids, here


def open_cache(
    path: str | Path, *, data: str | Sequence[str] | None = None, threads: int = 2, replay: int = 2
) -> Cache:
    """Open a cache together with the images it was made from.

    Args:
        path: the cache's folder.
        data: where the training images are; where the manifest says they were without it.
        threads: reading threads of each stream.
        replay: blocks of pixels decoded again and compared with the teachers' pixels; 0 skips the comparison.

    Raises:
        RequestError: no cache there, or its images are not.
        CacheMismatchError: the images are not those of the cache, or decode to other pixels.
        CacheDamageError: the cache is incomplete or damaged.
    """
    reader = CacheReader(path, threads=threads)
    recipe = recipe_of(reader)
    found = open_dataset(data or recipe.data.train, limit=recipe.data.limit)
    expected = reader.manifest.model_copy(update={"dataset": dataset_info(recipe, found)})
    refuse_differences(reader.path, expected, reader.manifest)
    reader.require(["views/order", "views/crop", "views/flip", "labels"], range(reader.manifest.views))
    cache = Cache(reader, found)
    check_views(reader, found, cache.plan, reader.manifest.views)
    if reader.manifest.images == "replay":
        replay_pixels(reader, found, cache.plan, blocks=replay, views=reader.manifest.views, seed=0)
    return cache
