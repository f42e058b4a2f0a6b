"""Write-through: a student trains with live teachers, and the cache fills as it goes (``train.source = "record"``).

    cuts of cache.batch rows ──► teachers ──► codes ──┬─► shards (durable)
                                                      └─► batches of train.batch rows ──► student

An epoch over a view that is not complete runs the teachers on the cache's own cuts, in the stored order, so the bytes
are those `feedfast cache` would have written. The student learns from the codes that are stored, not from the maps they
were made of: it is the student that a finished cache would have trained. A view that is complete is read.

Cache and checkpoint need not agree, since both are functions of rows. What is durable already is read; what is not is
computed, also where the student is past it: then nobody trains on it. The view is complete before the student gets
its last batch, so a checkpoint at the end of an epoch never is ahead of the cache.

Several ranks compute the rows they train on, where slices of a batch are whole cuts (`feedfast.stages.together`).
Where they are not, and where rows are asked for in another order, each rank records its part of the missing shards, as
`feedfast cache` divides them, and then reads.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from feedfast.data.batch import Batch, moved
from feedfast.data.dataset import Dataset
from feedfast.data.views import ViewPlan
from feedfast.data.work import Work, annotations_of, view_work
from feedfast.errors import CacheDamageError, FeedfastError, PartTakenError, RequestError
from feedfast.methods import Targets
from feedfast.methods.base import matching
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.stages.ensemble import FrozenTeacher, Networks
from feedfast.stages.held import Held, Part, joined
from feedfast.stages.loop import rank_rows
from feedfast.stages.prepare import Preparation
from feedfast.stages.proof import check_views, plan_of, replay_pixels
from feedfast.stages.record import Recorder, needs_every_core
from feedfast.stages.source import Cached, Rows, Taps, manifest_taps, teachers_identity
from feedfast.stages.together import SharedWriter, Together
from feedfast.stages.trainee import Entry, needs_of
from feedfast.stages.usable import coming_taps, require_usable
from feedfast.stages.worker import Worker
from feedfast.storage import names
from feedfast.storage.create import record_pass, refuse_foreign
from feedfast.storage.layout import unit_rows
from feedfast.storage.manifest import held_manifest
from feedfast.storage.places import place_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast.storage.writer import CacheWriter

log = logging.getLogger(__name__)

Cuts = NDArray[np.bool_]
"""[cut]: which of a view's batches of ``cache.batch`` rows."""

SEEN_WITHIN_S = 60  # what one rank has written is seen by the others; network file systems keep names for a while


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
        together: Together,
    ) -> None:
        """Nothing is recorded yet. With several ranks all of them call a method, or none does; `is_complete`, and what
        reads a view that is, may be called by one.

        Args:
            reader: of the cache, as it is after `Preparation.prepare`.
            preparation: the teachers and their pixels.
            manifest: what `Preparation.prepare` returned.
            device: where batches are put.
            taps: the targets that batches carry, all of them of these teachers.
            provenance: of this job, for the manifest.
            together: the ranks.
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
        self._together = together
        self._complete: set[int] = set()

    def batches(self, view: int, rows: Rows, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Source`. Of a view that is not complete, its first epoch is recorded as it is handed out; whoever asks
        for other rows waits until they are recorded."""
        if self.finds_complete(view):
            return super().batches(view, rows, batch_size, start)
        me, all_rows = self._together.me, np.arange(len(self.data))
        epoch = rank_rows(all_rows, batch_size * me.world, me.rank, me.world)
        if self._together.all(np.array_equal(rows, epoch)):
            if me.world == 1 or batch_size % self._manifest.batch_rows == 0:
                return self._recording(view, batch_size, start)
            return self._following(view, rows, batch_size, start)
        # A later epoch of a view that has lost a shard needs all of it, and so will those after it.
        self._record_all(
            view, len(self.data) if len(rows) == len(epoch) or me.world > 1 else int(rows.max(initial=0)) + 1
        )
        return super().batches(view, rows, batch_size, start)

    def target_batches(self, view: int, rows: Rows, batch_size: int) -> Iterator[Targets]:
        """See `Source`. Rows that are not there yet are recorded first."""
        if not self.finds_complete(view):
            self._record_all(view, int(rows.max(initial=0)) + 1)
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
        found = sum(self.finds_complete(view) for view in range(self.views))
        if found < self.views:
            log.info(
                "record: %d of %d views are complete; `feedfast cache` or a longer run records the rest",
                found,
                self.views,
            )
        return found

    def is_complete(self, view: int) -> bool:
        """Whether a view is known to have everything that this job records of it."""
        return view in self._complete

    def finds_complete(self, view: int) -> bool:
        """Whether a view has everything that this job records of it, in files of the committed lengths."""
        if view not in self._complete:
            if not self._together.all(self._sees(view, len(self.data))):
                return False
            self._complete.add(view)
            if len(self._complete) == self.views:  # from here on the cache is read, and their memory is the student's
                self.teachers = {}
                self._preparation.teachers.clear()
        return True

    def _sees(self, view: int, stop: int) -> bool:
        """Whether this rank finds all that is recorded of the rows of a view before ``stop``."""
        try:
            self.reader.require(self._arrays(), [view], stop=stop)
        except CacheDamageError:  # the writer looks again, and says what it will not write anew
            return False
        return True

    def _arrays(self) -> list[str]:
        codes = [names.codes(name, tap) for name, taps in self._recorded.items() for tap in taps]
        return [names.SUMS, *({names.PIXELS} & self.reader.specs.keys()), *codes]

    def _renew(self) -> None:
        """See what has been written since the cache was opened."""
        self.reader.close()
        self.reader = CacheReader(self.reader.path, threads=self.reader.threads)

    # ---- recording

    def _recording(self, view: int, batch_size: int, start: int) -> Generator[Batch, None, None]:
        """The batches of a view's first epoch from the ``start``-th; the last one when the view is complete."""
        me, count, size = self._together.me, len(self.data), self._manifest.batch_rows
        whole = batch_size * me.world
        batches, number = count // whole, start
        work, held = view_work(self.plan, self.data, view), Held()
        began = time.perf_counter()
        with self._writing(slice_rows=batch_size) as recorder:
            cuts = _lacking(recorder, view)
            trained = np.arange(len(cuts)) >= start * whole // size
            walked = cuts | trained
            mine = walked & (_first_rows(walked, size) // batch_size % me.world == me.rank)
            walk = self._walk(recorder, view, mine, trained)
            # One rank takes a cut at a time; several take each what it has of a global batch, and exchange it.
            turn = size if me.world == 1 else whole
            for first in np.unique(np.flatnonzero(walked) * size // turn * turn).tolist():
                for batch, codes in islice(walk, int(mine[first // size : (first + turn) // size].sum())):
                    held.add(batch, codes, first=start * whole)
                if isinstance(recorder.writer, SharedWriter):
                    recorder.writer.exchange(view, first, min(first + turn, count))
                while number < batches - 1 and held.count >= batch_size:
                    yield self._batch(held.take(batch_size), work)
                    number += 1
        self._await(view, count)
        log.info(
            "record: view %d is complete, %s rows in %.1f s",
            view,
            f"{_rows_of(cuts, size, count):,}",
            time.perf_counter() - began,
        )
        if number < batches:
            yield self._batch(held.take(batch_size), work)

    def _following(self, view: int, rows: Rows, batch_size: int, start: int) -> Generator[Batch, None, None]:
        """The batches of a view's first epoch, where no rank can compute what it trains on: a stretch is recorded by
        all ranks, each its part of it, and then read. The last batch comes when the view is complete."""
        whole, batches = batch_size * self._together.me.world, len(rows) // batch_size
        for stop in self._stretches(len(self.data)):
            last = stop // whole
            if last >= batches:
                break
            self._record(view, stop)
            if last > start:
                yield from super().batches(view, rows[: last * batch_size], batch_size, start)
                start = last
        self._record(view, len(self.data))
        yield from super().batches(view, rows, batch_size, start)

    def _stretches(self, stop: int) -> range:
        """Ends of stretches before row ``stop``: in each every rank has a unit of rows, none waits long for another."""
        size = unit_rows(self.reader.specs) * self._together.me.world
        return range(size, stop, size)

    def _record_all(self, view: int, stop: int) -> None:
        """`_record`, a stretch at a time where several ranks do it."""
        for end in self._stretches(stop) if self._together.me.world > 1 else ():
            self._record(view, end)
        self._record(view, stop)

    def _record(self, view: int, stop: int) -> None:
        """Record what is missing up to the last shard that holds any row before ``stop``; nobody trains on it."""
        if self._together.all(self._sees(view, stop)):
            return
        with self._writing() as recorder:
            lacking, size = _lacking(recorder, view), self._manifest.batch_rows
            # From the view's start: a shard is written from its first row, and cuts do not begin where shards do.
            unit = unit_rows(recorder.writer.specs)  # the largest shard; no other crosses its edge
            cuts = lacking & (_first_rows(lacking, size) < -(-stop // unit) * unit)
            whose = "" if self._together.me.world == 1 else " in the first rank's part"
            rows = f"{_rows_of(cuts, size, len(self.data)):,}"
            log.info("record: view %d: %s rows that are not there yet%s", view, rows, whose)
            for _ in self._walk(recorder, view, cuts, np.zeros(len(cuts), bool)):
                pass
        self._await(view, stop)

    def _await(self, view: int, stop: int) -> None:
        """Read the cache anew, until this rank finds what all have recorded of the rows before ``stop``.

        Raises:
            FeedfastError: it does not.
        """
        world = self._together.me.world
        for _ in range(SEEN_WITHIN_S):
            self._renew()
            if world == 1 or self._sees(view, stop):  # what one process does not find is damage; who reads it says so
                return
            time.sleep(1)
        raise FeedfastError(
            f"{self.reader.path}: view {view}: expected to find what {world} ranks have recorded, found less; "
            "cache.path must be one folder that all of them share"
        )

    def _writer(self, *, divided: bool) -> CacheWriter:
        """Waits while another job writes, as a second student that records: what that writes is then read."""
        me, writer, said = self._together.me, None, False
        # The first rank's part comes first and is given back last: two jobs of several ranks do not wait for each
        # other, and whoever has it knows what the others have written.
        for mine in (me.first, not me.first):
            while True:
                if mine and writer is None:
                    try:
                        writer = CacheWriter(
                            self.reader.path,
                            self._manifest,
                            part=(me.rank, me.world),
                            divided=divided,
                            workers=self._preparation.recipe.cache.threads,
                        )
                    except PartTakenError as error:
                        if not said:
                            log.warning("record: waiting: %s", error)
                        said = True
                if self._together.all(writer is not None or not mine):
                    break
                time.sleep(1.0)
        assert writer is not None
        return writer

    @contextmanager
    def _writing(self, slice_rows: int = 0) -> Iterator[Recorder]:
        """A writer of its own for each pass: what one that was left halfway has not finished is begun anew.

        With several ranks and ``slice_rows``, rows go through a `SharedWriter`; else each rank writes its part.
        """
        path, me = self.reader.path, self._together.me
        shared = me.world > 1 and slice_rows > 0
        with self._writer(divided=not shared) as writer:
            if me.first:
                record_pass(path, self._provenance)
            self._renew()  # the writer now knows what is durable, and nobody else adds to it
            face = SharedWriter(writer, self._together, slice_rows) if shared else writer
            # Of several ranks each would wait for its own writers alone: the others' teachers share its cores.
            settle = me.world == 1 and needs_every_core(self.device, self._preparation.recipe.cache.threads)
            decoder = self._preparation.loader.describe()
            recorder = Recorder(face, self.reader, decoder, self._recorded, settle=settle)
            if shared and not self._together.same(_number_of(recorder)):
                raise FeedfastError(
                    f"{path}: expected all {me.world} ranks to find the same shards, found different ones; cache.path "
                    "must be one folder that all of them share"
                )
            try:
                yield recorder
            except GeneratorExit:
                writer.close()  # the epoch is left halfway: shards that are full are kept
                raise
            if not me.first:
                writer.close()  # waits until everything is durable
            self._together.all(True)
            writer.close()
            self._together.all(True)
        if me.first:
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

    def _batch(self, parts: Sequence[Part], work: Work) -> Batch:
        """One batch of what is held of one cut or more."""
        codes = {array: joined([part.codes[array] for part in parts]) for array in parts[0].codes}
        if len(parts) == 1 and len(parts[0].batch) == parts[0].stop - parts[0].start:
            whole = parts[0].batch
            return replace(whole, targets=self._targets(codes, whole.view, whole.ids))
        images = torch.cat([part.batch.images[part.start : part.stop] for part in parts])
        rows = np.concatenate([part.batch.rows[part.start : part.stop] for part in parts])
        annotations = moved(annotations_of(self.data, work.rows(rows), self.plan.size), self.device)
        ids = np.concatenate([part.batch.ids[part.start : part.stop] for part in parts])
        view = parts[0].batch.view
        return Batch(images, annotations, ids, rows, view, self._targets(codes, view, ids))


def _first_rows(cuts: Cuts, size: int) -> Rows:
    return np.arange(len(cuts)) * size


def _rows_of(cuts: Cuts, size: int, count: int) -> int:
    """Rows of these cuts of a view; its last may be short."""
    return int(np.minimum(size, count - _first_rows(cuts, size))[cuts].sum())


def _number_of(recorder: Recorder) -> int:
    """Names what is missing, below 2^62."""
    missing = sorted((array, *place) for array, places in recorder.pending.missing.items() for place in places)
    return int.from_bytes(hashlib.sha256(repr(missing).encode()).digest()[:7])


def _lacking(recorder: Recorder, view: int) -> Cuts:
    """The cuts of a view that touch a missing shard."""
    pending, size = recorder.pending, recorder.manifest.batch_rows
    lacking = np.zeros(-(-pending.num_rows // size), bool)
    for owner, rows in pending.batches(size):
        if owner == view:
            lacking[rows // size] = True
    return lacking


def refuse_unrecordable(recipe: Recipe) -> None:
    """Raise unless the recipe says what is to be recorded, all of it.

    Raises:
        RequestError: it does not.
    """
    if not recipe.cache.path:
        raise RequestError("cache.path: required with train.source='record', found nothing")
    if not recipe.cache.views:
        raise RequestError("cache.views: expected at least 1 to record, found 0; train.source='live' makes new ones")
    if not recipe.teachers:
        raise RequestError("teachers: expected at least one [[teachers]] to record, found none")
    if recipe.cache.part not in ("auto", "0/1"):
        raise RequestError(f"cache.part: expected 0/1 with train.source='record', found {recipe.cache.part}")


def _say_if_read_twice(batch: int, size: int, me: Worker) -> None:
    """One line where ranks cannot record what they train on, and which batch would fit."""
    if me.world > 1 and me.first and batch // me.world % size:
        log.warning(
            "record: train.batch: expected a multiple of ranks x cache.batch (%d x %d = %d) for each rank to record "
            "what it trains on, found %d: rows are recorded a stretch ahead, then read, and images are decoded twice",
            *(me.world, size, me.world * size, batch),
        )


def open_recorded(
    recipe: Recipe,
    data: Dataset,
    plan: ViewPlan,
    device: torch.device,
    entries: Sequence[Entry],
    me: Worker,
    networks: Networks | None = None,
    student: nn.Module | None = None,
) -> Recorded:
    """The source of a student that records as it trains; the cache is made, or agreed with.

    Args:
        recipe: what to train from; `refuse_unrecordable` has nothing to say of it.
        data: the training images.
        plan: their views.
        device: where teachers run and batches are put.
        entries: the recipe's methods.
        me: this rank.
        networks: of teachers that need not be built; ``student`` likewise.

    Raises:
        RequestError, CacheMismatchError: see `feedfast.stages.offline.run_cache`.
    """
    path, needs = place_of(recipe.cache.path), needs_of(entries)
    refuse_foreign(path)
    preparation = Preparation(recipe, data, plan, device, (me.rank, me.world), networks)
    try:
        own = {name: teacher.shapes for name, teacher in preparation.teachers.items()}
        coming = coming_taps(preparation.teachers, held_manifest(path), entries)
        # What the cache has beyond the recipe's taps is not recorded, so no method may read it.
        taps = {n: {t: i for t, i in coming[n].items() if t in own[n]} for n in own}
        require_usable(recipe, entries, taps, len(data.classes), student)
        manifest = preparation.prepare()
        reader, held = CacheReader(path, threads=recipe.cache.threads), manifest_taps(manifest)
        check_views(reader, data, plan, recipe.cache.views)
        taps = {name: {t: held[name][t] for t in own[name] if t in matching(needs, own[name])} for name in own}
        provenance = Provenance.begin(recipe.model_dump(mode="json"))
        source = Recorded(reader, preparation, manifest, device, taps if needs else {}, provenance, Together(me))
        # Of views that are read from the start nothing else compares the pixels; of the others the recorder does.
        whole = next((view for view in range(source.views) if not source.finds_complete(view)), source.views)
        if whole < source.views:
            _say_if_read_twice(recipe.train.batch, manifest.batch_rows, me)
        if whole and not source.stored_images:
            replay_pixels(reader, data, plan, blocks=recipe.train.replay, views=whole)
    except BaseException:
        preparation.loader.close()
        raise
    return source
