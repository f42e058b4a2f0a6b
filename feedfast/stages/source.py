"""Where a student's batches come from: plain images, live teachers, or the cache.

Every source has one face, so a training loop cannot tell them apart: `batches` walks given rows of a view and yields
whole batches, read ahead. The live source is the oracle that the cached one is tested against; the plain one is the
baseline that both are timed against. A fourth, live and filling the cache as it trains, is `feedfast.stages.recorded`.

Codes stay codes: a u8 map travels to the device as uint8 and is dequantized inside the loss.

A cache is checked against the recipe before anything trains (`feedfast.stages.agree`), and every needed shard must be
there; the stored order and crops must be those of the plan; a few blocks of pixels are decoded again and compared with
the checksums taken when the teachers saw them; and the bytes of every sample are compared as they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.data.batch import Batch, moved
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.data.work import annotations_of, view_work
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.methods import TapInfo, Targets
from feedfast.methods.base import apart, matching
from feedfast.methods.ft import FACTOR
from feedfast.recipe import Recipe
from feedfast.stages.agree import refuse_other_outputs, refuse_other_recipe
from feedfast.stages.codecs import codecs_of
from feedfast.stages.data import Selection, pixel_loader
from feedfast.stages.ensemble import LOGITS, FrozenTeacher, Networks, load_teachers, method_taps
from feedfast.stages.identity import dataset_info
from feedfast.stages.pilot import mixing_plan, pilot_pixels, readable_plan, row_bytes
from feedfast.stages.probe import Probe
from feedfast.stages.proof import check_views, content_of, plan_of, replay_pixels
from feedfast.stages.resident import Item, Resident, resident
from feedfast.stages.sampling import sampling_of, sampling_of_manifest
from feedfast.stages.schedule import total_steps
from feedfast.stages.tiers import tier_of
from feedfast.stages.worker import ranks_here
from feedfast.storage import names
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast.storage.transform import floored
from feedfast_kernels import Codes, Sampled, Target
from feedfast_kernels.codes import CODECS

Rows = NDArray[np.int64]
Taps = Mapping[str, Mapping[str, TapInfo]]
"""Teacher → tap → what a method needs to know of it."""


class Source(Protocol):
    """What a training loop needs.

    Attributes:
        taps: the targets that batches carry; the recipe's teachers, in the recipe's order.
        views: how many views the epochs run through; 0 = a new one every epoch.
        classes: of the teachers' logits; 0 = unknown.
        plan: the view plan, with the granule and window in which later passes mix rows.
    """

    taps: Taps
    views: int
    classes: int
    plan: ViewPlan

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Some rows of a view in the order given: batch k is ``rows[k * batch_size : (k + 1) * batch_size]``.

        Args:
            view: which view.
            rows: int64 [n], positions in the view's order.
            batch_size: rows per batch.
            start: batches to leave out at the front, for resuming; nothing of them is read.

        Raises:
            CacheDamageError: at once, where a shard of these rows is missing or short; while iterating, before the
                batch it belongs to, where one is changed.
        """

    def target_batches(self, view: int, rows: Rows, batch_size: int) -> Iterator[Targets]:
        """The targets of `batches`, without images where they need not be decoded."""

    def identity(self) -> dict[str, Any]:
        """What names the targets, as JSON values: a run may only be continued with the same."""

    def close(self) -> None:
        """Stop whatever is still read ahead; the source can be used again."""


class Plain:
    """Decoded images and their annotations; no targets."""

    def __init__(self, data: Dataset, plan: ViewPlan, device: torch.device, *, views: int, threads: int = 0) -> None:
        """``threads`` decode; 0 = one per core."""
        self.data, self.plan, self.device, self.views = data, plan, device, views
        self.taps: Taps = {}
        self.classes = 0
        self._threads = threads
        self._loader: Loader | None = None

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Source`."""
        if self._loader is None or self._loader.batch_size != batch_size:
            self.close()
            self._loader = pixel_loader(self.data, self.plan, batch_size, self.device, self._threads, self._content())
        return self._loader.stream(view, rows, start_batch=start)

    def target_batches(self, view: int, rows: Rows, batch_size: int) -> Iterator[Targets]:
        """See `Source`."""
        return (apart(batch.targets)[0] for batch in self.batches(view, rows, batch_size))

    def identity(self) -> dict[str, Any]:
        """See `Source`: there are no targets."""
        return {}

    def close(self) -> None:
        """See `Source`."""
        if self._loader is not None:
            self._loader.close()

    def _content(self) -> NDArray[np.uint64] | None:
        """What every sample is compared with as it is read; None where nobody knows."""
        return None


class Live(Plain):
    """Runs the teachers together with the student, as every method's authors do."""

    def __init__(
        self,
        data: Dataset,
        plan: ViewPlan,
        device: torch.device,
        teachers: Mapping[str, FrozenTeacher],
        taps: Taps,
        *,
        views: int,
        threads: int = 0,
        probes: Mapping[str, Probe] | None = None,
    ) -> None:
        """``probes``: what each teacher computes on the first batch; part of `identity`."""
        super().__init__(data, plan, device, views=views, threads=threads)
        self.teachers, self.taps, self.probes = teachers, taps, probes or {}
        self.classes = next((teacher.classes for teacher in teachers.values()), 0)
        self._sampling = sampling_of(plan.seed, taps)
        # As a cache of these teachers holds them: OFD floors at the margin itself, other methods read maps as they are.
        self._floors = {
            (name, tap): None if tap == LOGITS else teachers[name].transform(tap).floor(device)
            for name, infos in taps.items()
            for tap in infos
        }

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Source`."""
        for batch in super().batches(view, rows, batch_size, start):
            yield replace(batch, targets=self.targets(batch))

    def identity(self) -> dict[str, Any]:
        """See `Source`: weights, and what they compute, which changed code would change."""
        return teachers_identity(self.teachers, self.probes)

    def targets(self, batch: Batch) -> dict[str, dict[str, Target | Sampled]]:
        """One forward pass of every teacher on a batch's uint8 pixels."""
        out: dict[str, dict[str, Target | Sampled]] = {}
        places = self._sampling.places(batch.view, batch.ids, self.device)
        for name, infos in self.taps.items():
            maps = self.teachers[name](batch.images)
            for tap in infos:
                values = floored(self._sampling.gathered(name, tap, maps[tap], places), self._floors[name, tap])
                out.setdefault(name, {})[tap] = self._sampling.wrapped(name, tap, values, places)
        return out


class Cached(Plain):
    """Streams the ensemble's maps from a cache; no teacher is in memory.

    Pixels are decoded again with the stored crops and flips by the loader that fed the teachers, or read from the
    cache where it holds them (``images = "stored"``).
    """

    def __init__(
        self,
        reader: CacheReader,
        data: Dataset,
        plan: ViewPlan,
        device: torch.device,
        taps: Taps,
        *,
        views: int,
        threads: int = 0,
    ) -> None:
        super().__init__(data, plan, device, views=views, threads=threads)
        self.reader, self.taps = reader, taps
        sampling_of_manifest(reader.manifest, reader.path)  # known here?
        self._sampling = sampling_of(plan.seed, taps)
        self.resident: Resident | None = None  # what holds the rows of `arrays`, where they are to be held
        self.classes = next((teacher.num_classes for teacher in reader.manifest.teachers.values()), 0)
        self.stored_images = reader.manifest.images == "stored"
        self.arrays = [names.PIXELS] if self.stored_images else []
        self._entries: list[tuple[str, str, str, str, Tensor, Tensor]] = []
        for teacher, infos in taps.items():
            for tap in infos:
                array = names.codes(teacher, tap)
                codec = reader.manifest.teachers[teacher].taps[tap].codec
                offset = step = torch.empty(0)
                if CODECS[codec].quantized:
                    scale = reader.scale(teacher, tap)
                    offset, step = (torch.from_numpy(np.array(row, dtype=np.float32)).to(device) for row in scale)
                self.arrays.append(array)
                self._entries.append((array, teacher, tap, codec, offset, step))
        self.plan = readable_plan(plan, [reader.specs[array] for array in self.arrays])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}  # another process makes its own

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Source`. Opened here and not by the first batch: a missing shard raises now, not mid-iteration."""
        if not self.arrays:
            return super().batches(view, rows, batch_size, start)
        items = (self.resident or self.reader).stream(self.arrays, view, rows, batch_size, start_batch=start)
        if self.stored_images:
            return self._with_stored_images(items, view, rows, batch_size, start)
        return self._with_targets(super().batches(view, rows, batch_size, start), items)

    def target_batches(self, view: int, rows: Rows, batch_size: int) -> Iterator[Targets]:
        """See `Source`. Nothing is decoded."""
        arrays = [array for array in self.arrays if array != names.PIXELS]
        items = (self.resident or self.reader).stream(arrays, view, rows, batch_size)
        ids = self.plan.order(view, self.data.ids)[rows] if self._sampling else np.empty(0, np.uint32)
        return (
            apart(self._targets(item, view, ids[number * batch_size : (number + 1) * batch_size]))[0]
            for number, item in enumerate(items)
        )

    def identity(self) -> dict[str, Any]:
        """See `Source`: a digest of the objects it reads, so that a cache may grow meanwhile."""
        scales = [
            names.scale(teacher, tap) for _, teacher, tap, codec, _, _ in self._entries if CODECS[codec].quantized
        ]
        arrays = {*self.arrays, *scales, *self.reader.manifest.plan.arrays, names.CONTENT, names.SUMS}
        return {"cache": self.reader.digest(arrays, self.views)}

    def _content(self) -> NDArray[np.uint64]:
        return content_of(self.reader, self.data)

    def _with_targets(self, pixels: Iterator[Batch], items: Iterator[Item]) -> Iterator[Batch]:
        for batch, item in zip(pixels, items, strict=True):
            yield replace(batch, targets=self._targets(item, view=batch.view, ids=batch.ids))

    def _with_stored_images(
        self, items: Iterator[Item], view: int, rows: Rows, batch_size: int, start: int
    ) -> Iterator[Batch]:
        work = view_work(self.plan, self.data, view)
        for number, item in enumerate(items, start):
            here = rows[number * batch_size : (number + 1) * batch_size]
            own = work.rows(here)
            batch = Batch(
                images=self._moved(item[names.PIXELS]),
                annotations=annotations_of(self.data, own, self.plan.size),
                ids=self.data.ids[own.positions],
                rows=here,
                view=view,
            )
            batch.targets = self._targets(item, view, batch.ids)
            yield replace(batch, annotations=moved(batch.annotations, self.device))

    def _moved(self, array: np.ndarray | Tensor) -> Tensor:
        if isinstance(array, Tensor):  # page-locked, or on the device
            return array.to(self.device, non_blocking=True)
        data = torch.from_numpy(array)
        if self.device.type == "cpu":
            return data
        # The reader fills its buffers again as soon as nobody holds them, which may be before an asynchronous copy has
        # ended; torch keeps its pinned memory until then.
        return data.pin_memory().to(self.device, non_blocking=True)

    def _targets(self, item: Item, view: int, ids: NDArray[np.integer]) -> dict[str, dict[str, Target | Sampled]]:
        out: dict[str, dict[str, Target | Sampled]] = {}
        places = self._sampling.places(view, ids, self.device)
        for array, teacher, tap, codec, offset, step in self._entries:
            data = self._moved(item[array])
            value: Target
            if CODECS[codec].quantized:
                value = Codes(data=data, offset=offset, step=step, codec=codec)  # type: ignore[arg-type]
            else:
                value = data.movedim(-1, 1) if data.dim() > 2 else data.float()
            out.setdefault(teacher, {})[tap] = self._sampling.wrapped(teacher, tap, value, places)
        return out


def teachers_identity(teachers: Mapping[str, FrozenTeacher], probes: Mapping[str, Probe]) -> dict[str, Any]:
    """What names live teachers, as JSON values: weights, and what they compute, which changed code would change."""
    return {
        "teachers": {
            name: {
                "weights_sha256": teacher.weights_sha256,
                "precision": teacher.precision,
                "outputs": {tap: list(values) for tap, values in probes.get(name, {}).items()},
            }
            for name, teacher in teachers.items()
        }
    }


def open_source(
    recipe: Recipe,
    data: Dataset,
    plan: ViewPlan,
    device: torch.device,
    needs: Sequence[str],
    method: str,
    networks: Networks | None = None,
) -> Source:
    """The source that ``train.source`` names, unless it is ``record`` (`feedfast.stages.recorded.open_recorded`).

    Args:
        recipe: what to train from.
        data: the training images.
        plan: their views.
        device: where batches are put.
        needs: selectors of the taps that the methods read: ``final``, ``ofd*``, ``logits``.
        method: what the methods are called, for messages.
        networks: of teachers that need not be built.

    Raises:
        RequestError, CacheMismatchError, CacheDamageError: see `run_train`.
    """
    kind, views, threads = recipe.train.source, recipe.cache.views, recipe.data.threads
    if kind == "none":
        return Plain(data, plan, device, views=views, threads=threads)
    if kind == "live":
        teachers = load_teachers(recipe, len(data.classes), device, networks)
        pilot: list[Tensor] = []
        # Cut as the caching pass cuts them: both sources then have the same margins and probes.
        with pixel_loader(data, plan, recipe.cache.batch, device, threads) as cutter:
            first = next(iter(cutter.stream(0, np.arange(min(len(data), recipe.cache.batch))))).images
            if any(teacher.needs_pilot for teacher in teachers.values()):
                pilot, *_ = pilot_pixels(cutter, recipe.cache.pilot)
            probes = {name: teacher.probe(first) for name, teacher in teachers.items()}
            refuse_other_outputs(recipe, dataset_info(Selection.of(recipe), data), cutter, teachers, probes)
        for teacher in teachers.values():
            teacher.fit_margins(pilot)
        taps = {name: needed(infos, needs) for name, infos in method_taps(teachers).items()}
        codecs = codecs_of(recipe.teachers, recipe.cache.codec)
        plan = mixing_plan(plan, row_bytes(teachers.values(), codecs, recipe.cache.images, plan.size))
        taps = taps if needs else {}
        return Live(data, plan, device, teachers, taps, views=views, threads=threads, probes=probes)
    return _open_cached(recipe, data, plan, device, needs, method, networks)


def _open_cached(
    recipe: Recipe,
    data: Dataset,
    plan: ViewPlan,
    device: torch.device,
    needs: Sequence[str],
    method: str,
    networks: Networks | None,
) -> Source:
    if not recipe.cache.path:
        raise RequestError("cache.path: required with train.source='cache', found nothing")
    reader = CacheReader(recipe.cache.path, threads=recipe.cache.threads, tier=tier_of(recipe))
    dataset = dataset_info(Selection.of(recipe), data)
    refuse_other_recipe(reader, dataset, plan, recipe, needs, networks)
    views = recipe.cache.views or reader.manifest.views
    if views > reader.manifest.views:
        raise CacheMismatchError(
            f"cache.views: expected at most the {reader.manifest.views} views of {reader.path}, found {views}; "
            "run `feedfast cache` to add them"
        )
    chosen = [teacher.name for teacher in recipe.teachers] or list(reader.manifest.teachers)
    cached = manifest_taps(reader.manifest)
    taps = {name: needed(cached[name], needs) for name in chosen} if needs else {}
    for name in taps:
        for need in needs:
            if not matching((need,), taps[name]):
                command = "factors" if need == FACTOR else "cache"
                raise CacheMismatchError(
                    f"{reader.path}: method {method!r} needs the {need!r} taps of teacher {name!r}, "
                    f"found {sorted(cached[name])}; run `feedfast {command}` with this recipe to add them"
                )
    source = Cached(reader, data, plan_of(reader), device, taps, views=views, threads=recipe.data.threads)
    reader.require([*source.arrays, *reader.manifest.plan.arrays, names.LABEL, names.CONTENT, names.SUMS], range(views))
    check_views(reader, data, plan, views)
    if not source.stored_images:
        replay_pixels(reader, data, plan, blocks=recipe.train.replay, views=views)
    train = recipe.train
    steps = min(total_steps(train, len(data)), train.max_steps or sys.maxsize)
    walked = -(-steps // max(len(data) // train.batch, 1))
    source.resident = resident(
        *(train.residency, reader, source.arrays, device), views=views, walked=walked, ranks=ranks_here()
    )
    return source


def needed(infos: Mapping[str, TapInfo], needs: Sequence[str]) -> dict[str, TapInfo]:
    """The taps that any of the selectors names."""
    wanted = matching(needs, infos)
    return {tap: info for tap, info in infos.items() if tap in wanted}


def manifest_taps(manifest: Manifest) -> dict[str, dict[str, TapInfo]]:
    """What the cache of ``manifest`` can serve, in the methods' words."""
    out: dict[str, dict[str, TapInfo]] = {}
    for name, teacher in manifest.teachers.items():
        out[name] = {
            tap: TapInfo(
                tuple(entry.shape),
                None if entry.margin is None else torch.tensor(entry.margin),
                None if entry.sample is None else entry.sample.positions,
            )
            for tap, entry in teacher.taps.items()
        }
    return out
