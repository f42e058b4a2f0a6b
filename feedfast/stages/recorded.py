"""Write-through: a student trains with live teachers, and the cache fills as it goes (``train.source = "record"``).

    cuts of cache.batch rows ──► teachers ──► codes ──┬─► shards (durable)
                                                      └─► batches of train.batch rows ──► student

An epoch over a view that is not complete runs the teachers on the cache's own cuts, in the stored order, so the bytes
are those `feedfast cache` would have written. The student learns from the codes that are stored, not from the maps they
were made of: it is the student that a finished cache would have trained. A view that is complete is read.

Cache and checkpoint need not agree, since both are functions of rows. What is durable already is read; what is not is
computed, also where the student is past it: then nobody trains on it. The view is complete before the student gets
its last batch, so a checkpoint at the end of an epoch never is ahead of the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast.cache import names
from feedfast.cache.create import record_pass, refuse_foreign
from feedfast.cache.layout import unit_rows
from feedfast.cache.manifest import held_manifest
from feedfast.cache.reader import CacheReader
from feedfast.cache.schema import Manifest
from feedfast.cache.writer import CacheWriter
from feedfast.data.batch import Batch, moved
from feedfast.data.dataset import Dataset
from feedfast.data.views import ViewPlan
from feedfast.data.work import Work, annotations_of, view_work
from feedfast.errors import CacheDamageError, PartTakenError, RequestError
from feedfast.methods import Targets
from feedfast.methods.base import matching
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.prepare import Preparation
from feedfast.stages.proof import check_views, plan_of, replay_pixels
from feedfast.stages.record import Recorder, needs_every_core
from feedfast.stages.source import Cached, Rows, Taps, manifest_taps, teachers_identity
from feedfast.stages.trainee import Entry, needs_of
from feedfast.stages.usable import coming_taps, require_usable
from feedfast.stages.worker import Worker

log = logging.getLogger(__name__)

Cuts = NDArray[np.bool_]
"""[cut]: which of a view's batches of ``cache.batch`` rows."""


class Recorded(Cached):
    """Reads views that are complete, and records the others while they are trained on for the first time."""

    def __init__(
        self,
        reader: CacheReader,
        preparation: Preparation,
        manifest: Manifest,
        device: torch.device,
        taps: Taps,
        provenance: Provenance,
    ) -> None:
        """Nothing is recorded yet.

        Args:
            reader: of the cache, as it is after `Preparation.prepare`.
            preparation: the teachers and their pixels.
            manifest: what `Preparation.prepare` returned.
            device: where batches are put.
            taps: the targets that batches carry, all of them of these teachers.
            provenance: of this job, for the manifest.
        """
        recipe = preparation.recipe
        super().__init__(
            reader,
            preparation.data,
            plan_of(reader),
            device,
            taps,
            views=recipe.cache.views,
            threads=recipe.data.threads,
        )
        self.teachers: Mapping[str, FrozenTeacher] = preparation.teachers
        self._preparation, self._manifest, self._provenance = preparation, manifest, provenance
        self._recorded = {name: tuple(teacher.shapes) for name, teacher in self.teachers.items()}
        self._teachers_identity = teachers_identity(self.teachers, preparation.probes)
        self._complete: set[int] = set()

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Source`. Of a view that is not complete, its first epoch is recorded as it is handed out; whoever asks
        for other rows waits until they are recorded."""
        if self.is_complete(view):
            return super().batches(view, rows, batch_size, start)
        whole = np.arange(len(self.data) // batch_size * batch_size)
        if np.array_equal(rows, whole):
            return self._recording(view, batch_size, start)
        # A later epoch of a view that has lost a shard needs all of it, and so will those after it.
        self._record(view, rows if len(rows) < len(whole) else np.arange(len(self.data)))
        return super().batches(view, rows, batch_size, start)

    def target_batches(self, view: int, rows: Rows, batch_size: int) -> Iterator[Targets]:
        """See `Source`. Rows that are not there yet are recorded first."""
        if not self.is_complete(view):
            self._record(view, rows)
        return super().target_batches(view, rows, batch_size)

    def identity(self) -> dict[str, Any]:
        """See `Source`: teachers and what is fitted once, which stay as they are while the cache grows."""
        scales = {names.scale(teacher, tap) for _, teacher, tap, *_ in self._entries} & self.reader.specs.keys()
        arrays = {*scales, *self.reader.manifest.plan.arrays, names.CONTENT}
        return {"cache": self.reader.digest(arrays, self.views), **self._teachers_identity}

    def close(self) -> None:
        """See `Source`."""
        super().close()
        self._preparation.loader.close()

    # ---- what is there

    def views_complete(self) -> int:
        """How many views hold all that this job records; where some are missing, a line says who completes them."""
        found = sum(self.is_complete(view) for view in range(self.views))
        if found < self.views:
            log.info(
                "record: %d of %d views are complete; `feedfast cache` or a longer run records the rest",
                found,
                self.views,
            )
        return found

    def is_complete(self, view: int) -> bool:
        """Whether a view has everything that this job records of it, in files of the committed lengths."""
        if view not in self._complete:
            codes = [names.codes(name, tap) for name, taps in self._recorded.items() for tap in taps]
            pixels = {names.PIXELS} & self.reader.specs.keys()
            try:
                self.reader.require([names.SUMS, *pixels, *codes], [view])
            except CacheDamageError:  # the writer looks again, and says what it will not write anew
                return False
            self._complete.add(view)
            if len(self._complete) == self.views:  # from here on the cache is read, and their memory is the student's
                self.teachers = {}
                self._preparation.teachers.clear()
        return True

    def _renew(self) -> None:
        """See what has been written since the cache was opened."""
        self.reader.close()
        self.reader = CacheReader(self.reader.path, threads=self.reader.threads)

    # ---- recording

    def _recording(self, view: int, batch_size: int, start: int) -> Generator[Batch, None, None]:
        """The batches of a view's first epoch from the ``start``-th; the last one when the view is complete."""
        batches, number, size = len(self.data) // batch_size, start, self._manifest.batch_rows
        work, held = view_work(self.plan, self.data, view), _Held()
        began = time.perf_counter()
        with self._writing() as recorder:
            cuts = _lacking(recorder, view)
            trained = np.arange(len(cuts)) >= start * batch_size // size
            for batch, codes in self._walk(recorder, view, cuts | trained, trained):
                held.add(batch, codes, first=start * batch_size)
                while number < batches - 1 and held.count >= batch_size:
                    yield self._batch(held.take(batch_size), work)
                    number += 1
            recorder.writer.close()  # waits until everything is durable
            log.info(
                "record: view %d is complete, %s rows in %.1f s",
                view,
                f"{min(int(cuts.sum()) * size, len(self.data)):,}",
                time.perf_counter() - began,
            )
        self._renew()
        if number < batches:
            yield self._batch(held.take(batch_size), work)

    def _record(self, view: int, rows: Rows) -> None:
        """Record what is missing up to the last shard that holds any of some rows; nobody trains on it."""
        with self._writing() as recorder:
            lacking, size = _lacking(recorder, view), self._manifest.batch_rows
            # From the view's start: a shard is written from its first row, and cuts do not begin where shards do.
            unit = unit_rows(recorder.writer.specs)  # the largest shard; no other crosses its edge
            stop = (int(rows.max(initial=0)) // unit + 1) * unit
            cuts = lacking & (np.arange(len(lacking)) * size < stop)
            log.info("record: view %d: %s rows that are not there yet", view, f"{int(cuts.sum()) * size:,}")
            for _ in self._walk(recorder, view, cuts, np.zeros(len(cuts), bool)):
                pass
        self._renew()

    def _writer(self) -> CacheWriter:
        """Waits while another job writes, as a second student that records: what that writes is then read."""
        said = False
        while True:
            try:
                return CacheWriter(self.reader.path, self._manifest, workers=self._preparation.recipe.cache.threads)
            except PartTakenError as error:
                if not said:
                    log.warning("record: waiting: %s", error)
                said = True
                time.sleep(1.0)

    @contextmanager
    def _writing(self) -> Iterator[Recorder]:
        """A writer of its own for each pass: what one that was left halfway has not finished is begun anew."""
        path = self.reader.path
        with self._writer() as writer:
            record_pass(path, self._provenance)
            self._renew()  # the writer now knows what is durable, and nobody else adds to its part
            try:
                settle = needs_every_core(self.device, self._preparation.recipe.cache.threads)
                decoder = self._preparation.loader.describe()
                yield Recorder(writer, self.reader, decoder, self._recorded, settle=settle)
            except GeneratorExit:
                writer.close()  # the epoch is left halfway: shards that are full are kept
                raise
        record_pass(path, self._provenance.finished())

    def _walk(
        self, recorder: Recorder, view: int, cuts: Cuts, trained: Cuts
    ) -> Iterator[tuple[Batch, dict[str, NDArray[Any]]]]:
        """Run or read some cuts of a view, recording what is missing.

        Args:
            recorder: of this pass.
            view: which view.
            cuts: those to go through.
            trained: those of which the student wants codes.

        Yields:
            Pixels and annotations of a cut, and of those in ``trained`` array → codes.
        """
        size, count = self._manifest.batch_rows, len(self.data)
        spans = {cut: (cut * size, min((cut + 1) * size, count)) for cut in np.flatnonzero(cuts).tolist()}
        wants = {cut: recorder.wants(view, *span) for cut, span in spans.items()}
        read = {name: [names.codes(name, tap) for tap in infos] for name, infos in self.taps.items() if infos}
        stored = {}
        for name, arrays in read.items():
            durable = [np.arange(*spans[cut]) for cut in spans if trained[cut] and name not in wants[cut]]
            if durable:  # only the view's last cut may be short, so the stream's batches are these cuts
                stored[name] = self.reader.stream(arrays, view, np.concatenate(durable), size)
        rows = [np.arange(*span) for span in spans.values()]
        for batch in self._preparation.loader.stream(view, np.concatenate([*rows, np.empty(0, np.int64)])):
            first = int(batch.rows[0])
            cut = first // size
            maps = {
                name: teacher(batch.images, widen=False)
                for name, teacher in self.teachers.items()
                if name in wants[cut]
            }
            keep = {array for name in maps for array in read.get(name, ())} if trained[cut] else set()
            codes = recorder.record(view, first, batch.images.cpu().numpy(), batch.ids, maps, keep=keep)
            for name, stream in stored.items():
                if trained[cut] and name not in maps:
                    codes |= next(stream)
            yield batch, codes

    def _batch(self, parts: Sequence[_Part], work: Work) -> Batch:
        """One batch of what is held of one cut or more."""
        codes = {array: _joined([part.codes[array] for part in parts]) for array in parts[0].codes}
        if len(parts) == 1 and len(parts[0].batch) == parts[0].stop - parts[0].start:
            whole = parts[0].batch
            return replace(whole, targets=self._targets(codes, whole.view, whole.ids))
        images = torch.cat([part.batch.images[part.start : part.stop] for part in parts])
        rows = np.concatenate([part.batch.rows[part.start : part.stop] for part in parts])
        annotations = moved(annotations_of(self.data, work.rows(rows), self.plan.size), self.device)
        ids = np.concatenate([part.batch.ids[part.start : part.stop] for part in parts])
        view = parts[0].batch.view
        return Batch(images, annotations, ids, rows, view, self._targets(codes, view, ids))


@dataclass(frozen=True)
class _Part:
    """Rows [start, stop) of a cut, and their codes."""

    batch: Batch
    start: int
    stop: int
    codes: Mapping[str, NDArray[Any]]


class _Held:
    """Cuts that the student has not had yet: a queue of rows between two sizes of batches.

    Attributes:
        count: rows held.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[_Part] = []

    def add(self, batch: Batch, codes: Mapping[str, NDArray[Any]], *, first: int) -> None:
        """Hold the rows of a cut that are not before row ``first``."""
        start = min(max(first - int(batch.rows[0]), 0), len(batch))
        if start < len(batch):
            self._parts.append(_Part(batch, start, len(batch), {name: rows[start:] for name, rows in codes.items()}))
            self.count += len(batch) - start

    def take(self, rows: int) -> list[_Part]:
        """The first ``rows`` rows; they are held no longer."""
        taken: list[_Part] = []
        self.count -= rows
        while rows:
            part = self._parts.pop(0)
            size = min(rows, part.stop - part.start)
            taken.append(
                replace(part, stop=part.start + size, codes={name: codes[:size] for name, codes in part.codes.items()})
            )
            rows -= size
            if size < part.stop - part.start:
                rest = {name: codes[size:] for name, codes in part.codes.items()}
                self._parts.insert(0, replace(part, start=part.start + size, codes=rest))
        return taken


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _lacking(recorder: Recorder, view: int) -> Cuts:
    """The cuts of a view that touch a missing shard."""
    pending, size = recorder.pending, recorder.manifest.batch_rows
    lacking = np.zeros(-(-pending.num_rows // size), bool)
    for owner, rows in pending.batches(size):
        if owner == view:
            lacking[rows // size] = True
    return lacking


def refuse_unrecordable(recipe: Recipe, me: Worker) -> None:
    """Raise unless the recipe says what is to be recorded, and this process is alone.

    Raises:
        RequestError: it does not, or there are several ranks or parts.
    """
    if not recipe.cache.path:
        raise RequestError("cache.path: required with train.source='record', found nothing")
    if not recipe.cache.views:
        raise RequestError("cache.views: expected at least 1 to record, found 0; train.source='live' makes new ones")
    if not recipe.teachers:
        raise RequestError("teachers: expected at least one [[teachers]] to record, found none")
    # A rank trains on a slice of every batch, so it would have a part of each shard; whole shards are what is written.
    if me.world > 1:
        raise RequestError(
            f"train.source: 'record' is for one process, found {me.world} ranks; run `feedfast cache` under them "
            "first, then train with 'cache'"
        )
    if recipe.cache.part != "0/1":
        raise RequestError(f"cache.part: expected 0/1 with train.source='record', found {recipe.cache.part}")


def open_recorded(
    recipe: Recipe, data: Dataset, plan: ViewPlan, device: torch.device, entries: Sequence[Entry]
) -> Recorded:
    """The source of a student that records as it trains; the cache is made, or agreed with.

    Args:
        recipe: what to train from; `refuse_unrecordable` has nothing to say of it.
        data: the training images.
        plan: their views.
        device: where teachers run and batches are put.
        entries: the recipe's methods.

    Raises:
        RequestError, CacheMismatchError: see `feedfast.stages.offline.run_cache`.
    """
    path, needs = Path(recipe.cache.path), needs_of(entries)
    refuse_foreign(path)
    preparation = Preparation(recipe, data, plan, device, (0, 1))
    try:
        own = {name: teacher.shapes for name, teacher in preparation.teachers.items()}
        coming = coming_taps(preparation.teachers, held_manifest(path), entries)
        # What the cache has beyond the recipe's taps is not recorded, so no method may read it.
        require_usable(
            recipe, entries, {n: {t: i for t, i in coming[n].items() if t in own[n]} for n in own}, len(data.classes)
        )
        manifest = preparation.prepare()
        reader = CacheReader(path, threads=recipe.cache.threads)
        check_views(reader, data, plan, recipe.cache.views)
        found = manifest_taps(manifest)
        taps = {name: {t: found[name][t] for t in own[name] if t in matching(needs, own[name])} for name in own}
        provenance = Provenance.begin(recipe.model_dump(mode="json"))
        source = Recorded(reader, preparation, manifest, device, taps if needs else {}, provenance)
        # Of views that are read from the start nothing else compares the pixels; of the others the recorder does.
        whole = next((view for view in range(source.views) if not source.is_complete(view)), source.views)
        if whole and not source.stored_images:
            replay_pixels(reader, data, plan, blocks=recipe.train.replay, views=whole)
    except BaseException:
        preparation.loader.close()
        raise
    return source
