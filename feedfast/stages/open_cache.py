"""A cache for any training loop: `feedfast.open_cache`.

    cache = feedfast.open_cache("runs/c100.zarr")
    loader = cache.epochs(batch_size=128)
    for epoch in range(30):
        for batch in loader:                                 # every epoch the next view
            loss = my_loss(model(batch.images), batch.labels, batch.targets["a"]["final"])

Batches are those of `feedfast train`: the same source makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from feedfast.data.dataset import Dataset, ImageSource, open_dataset
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.models.normalize import Normalize
from feedfast.stages.data import refuse_other_classes, warn_of
from feedfast.stages.epochs import Epochs, Evaluation, Place, Stream
from feedfast.stages.identity import dataset_info, refuse_differences
from feedfast.stages.proof import check_views, plan_of, replay_pixels, selection_of, source_of
from feedfast.stages.resident import Residency, resident
from feedfast.stages.source import Cached, manifest_taps
from feedfast.stages.tiers import make_tier
from feedfast.stages.worker import pick_device, ranks_here
from feedfast.storage import names
from feedfast.storage.places import place_of
from feedfast.storage.reader import CacheReader

Wanted = Mapping[str, str | Sequence[str]]

NormalizeWith = bool | tuple[Sequence[float], Sequence[float]]
"""True = with the first teacher's mean and std; mean and std per channel in 0..1 units; False = uint8 pixels."""


class OpenedCache:
    """An open cache with its images. Made by `open_cache`; pickles, so that other processes can stream it too.

    Attributes:
        manifest: what the cache was made from.
        data: the images.
        plan: their views.
    """

    def __init__(self, reader: CacheReader, data: Dataset) -> None:
        self.reader, self.data, self.plan = reader, data, plan_of(reader)
        self.manifest = reader.manifest

    def __len__(self) -> int:
        """Rows of one view."""
        return self.manifest.num_rows

    def __repr__(self) -> str:
        taps = ", ".join(f"{name}: {' '.join(taps)}" for name, taps in self.taps.items())
        return f"OpenedCache({str(self.reader.path)!r}, {self.views} views of {len(self):,} rows, {taps})"

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # The images travel as they were found: scanning a large folder again in every worker would take minutes.
        return OpenedCache, (self.reader, self.data)

    def __enter__(self) -> OpenedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that no stream is reading; the cache stays usable."""
        self.reader.close()

    @property
    def views(self) -> int:
        """How many views there are."""
        return self.manifest.views

    @property
    def taps(self) -> dict[str, tuple[str, ...]]:
        """Teacher → the names of its targets."""
        return {name: tuple(taps) for name, taps in manifest_taps(self.manifest).items()}

    def stream(
        self,
        view: int = 0,
        batch_size: int = 128,
        *,
        device: str | torch.device = "cpu",
        taps: Wanted | None = None,
        pass_index: int = 0,
        start_batch: int = 0,
        drop_last: bool = True,
        normalize: NormalizeWith = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Stream:
        """One pass over one view.

        Args:
            view: which augmentation seed.
            batch_size: rows per batch and rank, as of a DataLoader.
            device: where tensors are put.
            taps: teacher → targets wanted; all of them without it, none with {}.
            pass_index: 0 is the stored order; later passes over the same view mix rows
                (`feedfast.data.passes.pass_order`).
            start_batch: first batch to hand out; nothing before it is read.
            drop_last: leave out rows that fill no whole batch of every rank. Without it they are dealt out in turn, and
                some ranks may see one batch less than others.
            normalize: True = float images [B, 3, H, W] as networks take them, with the first teacher's mean and std; a
                pair (mean, std) in 0..1 units = with these; False = uint8 pixels [B, H, W, 3].
            rank: this process among ``world_size``, each of which gets rows of its own. By default those of torch's
                process group, else those of torchrun's or srun's variables, else 0 of 1.
            world_size: see ``rank``.

        Raises:
            RequestError: no such view, teacher or tap, or a number below its least.
            CacheDamageError: a shard is missing or short; while iterating, before the batch it belongs to: changed.
        """
        if not 0 <= view < self.views:
            raise RequestError(f"{self.reader.path}: expected a view below {self.views}, found {view}")
        if pass_index < 0:
            raise RequestError(f"pass_index: expected at least 0, found {pass_index}")
        place = Place(rank, world_size)
        stream = Stream(
            self.source(device, taps),
            view=view,
            pass_index=pass_index,
            batch_size=batch_size,
            start_batch=start_batch,
            drop_last=drop_last,
            normalize=self._normalize(normalize, device),
            place=place,
        )
        stream.check()
        return stream

    def epochs(
        self,
        batch_size: int = 128,
        *,
        device: str | torch.device = "cpu",
        taps: Wanted | None = None,
        epoch: int = 0,
        drop_last: bool = True,
        normalize: NormalizeWith = True,
        rank: int | None = None,
        world_size: int | None = None,
        residency: Residency = "disk",
    ) -> Epochs:
        """A loader: each time it is iterated, the next epoch, walking through the views and then mixing their rows.

        Args:
            batch_size: rows per batch and rank.
            device: where tensors are put.
            taps: teacher → targets wanted; all of them without it, none with {}.
            epoch: the first epoch to hand out.
            drop_last: as of `stream`.
            normalize: as of `stream`.
            rank: as of `stream`.
            world_size: as of `stream`.
            residency: as ``train.residency``, with all views counted, once per rank of this machine: where rows come
                from after the first pass of a view. Each worker of a DataLoader begins with nothing held.

        Raises:
            RequestError, CacheDamageError: as `stream`; every view is looked at now.
        """
        if epoch < 0:
            raise RequestError(f"epoch: expected at least 0, found {epoch}")
        source = self.source(device, taps)
        self.reader.require(source.arrays, range(self.views))
        source.resident = resident(
            *(residency, self.reader, source.arrays, source.device),
            views=self.views,
            ranks=ranks_here(),
            key="residency",
        )
        return Epochs(
            source,
            batch_size=batch_size,
            epoch=epoch,
            drop_last=drop_last,
            normalize=self._normalize(normalize, device),
            place=Place(rank, world_size),
        )

    def evaluation(
        self,
        images: ImageSource,
        batch_size: int = 256,
        *,
        device: str | torch.device = "cpu",
        normalize: NormalizeWith = True,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = False,
    ) -> Evaluation:
        """Validation images as batches without targets, resized and cropped as torchvision evaluates; re-iterable.

        Args:
            images: anything `feedfast.data.dataset.open_dataset` opens, with the classes of the training images.
            batch_size: rows per batch.
            device: where tensors are put.
            normalize: as of `stream`.
            rank: as of `stream`; ranks take images in turn, so that their counts differ by one at most.
            world_size: as of `stream`.
            even: for those who gather what ranks found: every rank shows as many images, the steps of all ranks follow
                one another in id order, and where the last one falls short the first images are shown again.

        Raises:
            RequestError: no such images, or other classes than those of the cache.
        """
        found = open_dataset(images, split="val", task=selection_of(self.reader).task)
        warn_of(found)
        refuse_other_classes(found, self.manifest.dataset.classes, str(self.reader.path), key="images")
        return Evaluation(
            found,
            self.plan,
            pick_device(str(device), key="device"),
            batch_size=batch_size,
            normalize=self._normalize(normalize, device),
            place=Place(rank, world_size),
            even=even,
        )

    def source(self, device: str | torch.device = "cpu", taps: Wanted | None = None) -> Cached:
        """What all streams read: batches and targets of given rows of a view, as `feedfast train` asks for them.

        Args:
            device: where tensors are put.
            taps: teacher → targets wanted; all of them without it, none with {}.

        Raises:
            RequestError: ``taps`` is no mapping.
            CacheMismatchError: no such teacher or tap.
        """
        where = pick_device(str(device), key="device")
        have = manifest_taps(self.manifest)
        names: Wanted = self.taps if taps is None else taps
        if not isinstance(names, Mapping):
            raise RequestError(f"taps: expected teacher → target or targets, as {self.taps}, found {names!r}")
        wanted = {name: (some,) if isinstance(some, str) else tuple(some) for name, some in names.items()}
        for teacher, some in wanted.items():
            for tap in some:
                if tap not in have.get(teacher, {}):
                    found = {name: sorted(infos) for name, infos in have.items()}
                    raise CacheMismatchError(
                        f"{self.reader.path}: expected tap {tap!r} of teacher {teacher!r}, found {found}; "
                        "run `feedfast cache` with this recipe to add it"
                    )
        infos = {teacher: {tap: have[teacher][tap] for tap in some} for teacher, some in wanted.items()}
        return Cached(self.reader, self.data, self.plan, where, infos, views=self.views)

    def _normalize(self, given: NormalizeWith, device: str | torch.device) -> Normalize | None:
        if given is False:
            return None
        first = next(iter(self.manifest.teachers.values()))
        mean, std = (first.mean, first.std) if given is True else given
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise RequestError(
                f"normalize: expected True, False, or (mean, std) of 3 channels each with std > 0, found {given!r}"
            )
        return Normalize(mean, std).to(pick_device(str(device), key="device"))


def open_cache(
    path: str | Path,
    *,
    data: ImageSource | None = None,
    threads: int = 2,
    replay: int = 2,
    local: str | Path = "",
    local_gb: float = 50.0,
) -> OpenedCache:
    """Open a cache together with the images it was made from.

    Args:
        path: the cache's folder, or the URL of a bucket with a prefix: `s3://BUCKET/PREFIX`, `gs://…` or `az://…`.
        data: where the training images are, or the Python object that gives them; without it, where the manifest says
            they were, unless the cache has been copied since or comes from somebody else.
        threads: reading threads of each stream; from a bucket more are started as they are needed.
        replay: blocks of pixels decoded again and compared with the teachers' pixels; 0 skips the comparison.
        local: of a cache in a bucket: a folder on a local disk where its objects are kept as they are read; "" = none.
        local_gb: GiB that folder may hold; what was used longest ago goes first.

    Raises:
        RequestError: no cache there, or its images are not.
        CacheMismatchError: the images are not those of the cache, decode to other pixels, or cannot be compared.
        CacheDamageError: the cache is incomplete or damaged.
    """
    place = place_of(path)
    place = place.expanduser() if isinstance(place, Path) else place
    reader = CacheReader(place, threads=threads, tier=make_tier(str(local), local_gb))
    chosen = source_of(reader) if data is None else selection_of(reader)
    found = chosen.open(given=data)
    warn_of(found)
    expected = reader.manifest.model_copy(update={"dataset": dataset_info(chosen, found)})
    refuse_differences(reader.path, expected, reader.manifest)
    reader.require([*reader.manifest.plan.arrays, names.LABEL, names.CONTENT, names.SUMS], range(reader.manifest.views))
    cache = OpenedCache(reader, found)
    check_views(reader, found, cache.plan, reader.manifest.views)
    if reader.manifest.images == "replay":
        replay_pixels(reader, found, cache.plan, blocks=replay, views=reader.manifest.views)
    return cache
