"""The offline stage: every teacher once over every view, maps encoded and written as they come.

    rows of a view ──► DALI pixels ──► teachers ──► codes ──► shards (durable) ──► log

Only what is missing is computed. The commit log says which shards exist; a batch is run by a teacher only if it
touches a shard that teacher still lacks. So the same command starts a cache, finishes it after a kill, and adds a
teacher, a tap or a view. Batches are cut at fixed rows of a view (multiples of ``cache.batch``), never at the place
where a job happens to resume: a convolution's last bits may depend on its batch, and the bytes of a resumed cache
must equal those of an uninterrupted one.

Memory is one shard buffer per stored array plus what the writer has in flight, whatever the size of the cache. A
checksum of the pixels each block of rows was computed from goes into the log, so that training can prove it sees
the same pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from feedfast.data.dali import require_dali
from feedfast.data.dataset import Dataset, ImageSource
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError, RequestError
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.stages.accuracy import near_chance, tell_accuracy
from feedfast.stages.agree import refuse_other_tap
from feedfast.stages.bf16 import say_slow_bf16
from feedfast.stages.data import facts_of, open_train, view_plan
from feedfast.stages.ensemble import LOGITS, Networks, accuracies
from feedfast.stages.identity import refuse_differences
from feedfast.stages.interrupt import HoldShards
from feedfast.stages.plan_record import predicted_cache, prediction_error
from feedfast.stages.prepare import Preparation
from feedfast.stages.progress import Meter, format_bytes
from feedfast.stages.record import Recorder, needs_every_core
from feedfast.stages.trainee import method_entries
from feedfast.stages.usable import coming_taps, refuse_unusable
from feedfast.stages.worker import AUTO, Share, Worker, pick_device
from feedfast.storage import names
from feedfast.storage.create import record_pass, refuse_foreign
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import cache_digest, keep_index, read_log
from feedfast.storage.manifest import held_manifest
from feedfast.storage.pending import Pending
from feedfast.storage.places import open_store, place_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast.storage.writer import CacheWriter

log = logging.getLogger(__name__)


def run_cache(
    recipe: Recipe,
    *,
    train: ImageSource | None = None,
    teachers: Networks | None = None,
    student: nn.Module | None = None,
    check: bool = True,
    whole: bool = False,
) -> dict[str, Any]:
    """Write (or finish, or extend) the recipe's cache.

    Args:
        recipe: what to do.
        train: the object that the images come from, with ``data.train = "python"``: its items are (image, label).
        teachers: networks of the recipe's teachers that need not be built; they are copied.
        student: the network that is to be trained, if it is one that cannot be built.
        check: refuse before the first row what the recipe's own student could not use; False = say it and go on.
        whole: where ``cache.part`` is "auto", all of it, for who needs it next; False = a job array's task takes its
            part.

    Returns:
        The JSON of `feedfast cache`: ``rows_written``, ``rows_resumed``, ``bytes`` (of the whole cache),
        ``bytes_written`` (by this job), ``bytes_per_sample`` (of one view), ``images_per_second``, ``seconds``,
        ``digest``, ``complete``, ``taps`` (per teacher/tap the measured errors and the saturated fraction),
        ``teachers`` (of each ``top1``, the labeled rows it is of, and whether that is near chance), ``part`` (i/n, this
        job's, and ``part_said``, by which option or variables, "" = all of it), ``path``, ``data``
        (see `feedfast.stages.data.facts_of`); ``predicted`` by `run_plan` of the same recipe (None without one) and
        ``prediction_error`` (found / predicted - 1 of ``bytes`` and ``seconds``; None of what is not comparable).

    Raises:
        RequestError, CacheMismatchError: the recipe cannot be run, or the path holds a cache of something else.
        FeedfastError: a teacher's map is not finite, or the disk is full.
    """
    refuse_incomplete(recipe)
    require_dali()
    part = (0, 1) if whole and recipe.cache.part == AUTO else None
    job = OfflineRun(recipe, Worker.from_env(), train, check=check, part=part, networks=teachers, student=student)
    return job.run()


def refuse_incomplete(recipe: Recipe) -> None:
    """Raise unless a recipe says what to cache and where.

    Raises:
        RequestError: it does not.
    """
    if not recipe.cache.path:
        raise RequestError("cache.path: required, found nothing")
    if not recipe.cache.views:
        raise RequestError("cache.views: expected at least 1 to cache, found 0")
    if not recipe.teachers:
        raise RequestError("teachers: expected at least one [[teachers]], found none")


class OfflineRun:
    """One caching job; building it opens data, plan and teachers: mistakes show before hours are spent."""

    def __init__(
        self,
        recipe: Recipe,
        me: Worker,
        train: ImageSource | None = None,
        *,
        check: bool = True,
        part: tuple[int, int] | None = None,
        networks: Networks | None = None,
        student: nn.Module | None = None,
    ) -> None:
        """``part``: which log this process writes; None = that of ``me``. The others as of `run_cache`."""
        self.recipe, self.path, self.check, self.student = recipe, place_of(recipe.cache.path), check, student
        self.entries = method_entries(recipe.method)
        share = me.share(recipe.cache.part) if part is None else Share(*part, "")
        self.part, self.said, self.first = share.part, share.said, me.first
        if share.said:
            log.info("cache: part %d/%d, by %s", *self.part, share.said)
        self.provenance = Provenance.begin(recipe.model_dump(mode="json"))
        self.device = pick_device(recipe.train.device, me.local)
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        say_slow_bf16(recipe, self.device, student=False)
        self.data: Dataset = open_train(recipe, train)
        self.plan: ViewPlan = view_plan(recipe.data, recipe.seed)
        self.preparation = Preparation(recipe, self.data, self.plan, self.device, self.part, networks)
        self.teachers, self.loader = self.preparation.teachers, self.preparation.loader
        self.accuracy = accuracies(self.teachers, len(self.data.classes))
        self.resumed = 0  # rows of this part that an earlier run has written
        self._begun: tuple[CacheWriter, Pending] | None = None

    def run(self) -> dict[str, Any]:
        """See `run_cache`. A signal ends it when the shards are full that were begun."""
        try:
            return self._run()
        except KeyboardInterrupt:
            self._say_what_is_left()
            raise

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        refuse_foreign(self.path)
        done = self.nothing_to_do()
        if done is not None:
            log.info("cache: %s cannot be written to, and holds all that the recipe asks for", self.path)
            self.loader.close()
            return self.summary(done, 0, 0, 0.0, time.perf_counter() - started)
        manifest = self.prepare()
        with CacheWriter(self.path, manifest, part=self.part, workers=self.recipe.cache.threads) as writer:
            recorder = self.recorder(writer)
            work = recorder.pending
            self._begun = writer, work
            total = sum(len(rows) for _, rows in work.batches(self.recipe.cache.batch))
            self.resumed = max(0, writer.rows - total)  # whole batches are run, also where half of one is there
            there = f", {self.resumed:,} rows already there" if self.resumed else ""
            others = manifest.num_rows * manifest.views - writer.rows
            there += f", {others:,} rows are other parts'" if others else ""
            images = f"{manifest.num_rows:,} images"
            log.info(
                "cache: %d teachers, %d views of %s → %s%s",
                len(self.teachers),
                manifest.views,
                images,
                self.path,
                there,
            )
            if total and self.first:
                record_pass(self.path, self.provenance)
            computing = time.perf_counter()
            with Meter("cache", total) as meter:
                with HoldShards(writer.filling) as hold:
                    for view, rows in work.batches(self.recipe.cache.batch):
                        for batch in self.record(recorder, view, rows):
                            meter.advance(len(batch), f"{format_bytes(writer.bytes_written)} written")
                            hold.check()
                writer.close()  # waits until everything is durable
        self.loader.close()
        if total and self.first:
            record_pass(self.path, self.provenance.finished())
        now = time.perf_counter()
        return self.summary(manifest, total, writer.bytes_written, now - computing, now - started)

    def prepare(self) -> Manifest:
        """Refuse what could not be used; else the manifest, with all small arrays written: only rows are missing."""
        coming = coming_taps(self.teachers, held_manifest(self.path), self.entries)
        classes = len(self.data.classes)
        refuse_unusable(self.recipe, self.entries, coming, classes, check=self.check, given=self.student)
        return self.preparation.prepare()

    def recorder(self, writer: CacheWriter) -> Recorder:
        """What takes the rows of this job."""
        return Recorder(
            writer,
            CacheReader(self.path),
            self.loader.describe(),
            {name: teacher.shapes for name, teacher in self.teachers.items()},
            settle=needs_every_core(self.device, self.recipe.cache.threads),
        )

    def nothing_to_do(self) -> Manifest | None:
        """The manifest of a cache that cannot be written to and need not be; None where there is work to do."""
        held = held_manifest(self.path)
        if held is None or open_store(self.path).writable():
            return None
        refuse_differences(self.path, self.preparation.manifest(held, {}), held)
        reader = CacheReader(self.path)
        for name, teacher in self.teachers.items():
            known = held.teachers[name].taps if name in held.teachers else {}
            for tap in teacher.requests:
                if tap not in known:
                    return None
                refuse_other_tap(self.path, teacher, tap, self.preparation.codecs.of(name, tap), known[tap])
            if LOGITS in teacher.shapes and LOGITS not in known:
                return None
        if held.views < self.recipe.cache.views or not reader.complete:
            return None
        reader.require(reader.specs, range(held.views))
        self.resumed = held.num_rows * held.views
        return held

    def _say_what_is_left(self) -> None:
        """Of this part, after its writer has closed; nothing where it had not begun."""
        if self._begun is not None:
            writer, work = self._begun
            lacking = writer.pending(work.specs).batches(self.recipe.cache.batch)
            left, rows = sum(len(some) for _, some in lacking), writer.rows
            done = f"{max(rows - left, 0):,} of {rows:,} rows are durable, {left:,} are left"
            log.warning("cache: part %d/%d: %s", *self.part, done)

    def record(self, recorder: Recorder, view: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Run the batches of one view; yields the rows of each that was recorded."""
        for batch in self.loader.stream(view, rows):
            start, stop = int(batch.rows[0]), int(batch.rows[-1]) + 1
            wanted = recorder.wants(view, start, stop)
            maps = {
                name: teacher(batch.images, widen=False) for name, teacher in self.teachers.items() if name in wanted
            }
            for name, found in maps.items():
                self.accuracy.update(name, found.get(LOGITS), batch.annotations)
            recorder.record(view, start, batch.images.cpu().numpy(), batch.ids, maps)
            yield batch.rows

    def summary(self, manifest: Manifest, rows: int, written: int, computing: float, seconds: float) -> dict[str, Any]:
        """See `run_cache`."""
        log = read_log(self.path)
        specs = array_specs(manifest)
        total = log.commits.total_bytes
        taps: dict[str, Any] = {}
        for name, teacher in manifest.teachers.items():
            for tap, info in teacher.taps.items():
                if tap == LOGITS:
                    continue
                array = names.codes(name, tap)
                commits = log.of(array)
                count = sum(commit.rows[1] - commit.rows[0] for commit in commits)
                values = count * int(np.prod(info.stored))
                taps[f"{name}/{tap}"] = {
                    "codec": info.codec,
                    "compression": info.compression,
                    "shape": list(info.shape),
                    "transform": info.transform,
                    "sample": None if info.sample is None else info.sample.share,
                    **info.error,
                    "saturated_fraction": sum(commit.saturated for commit in commits) / max(values, 1),
                    "bytes_per_sample": sum(commit.bytes for commit in commits) / max(count, 1),
                }
        complete = sum(spec.num_shards * spec.num_views for spec in specs.values()) == len(log.commits)
        if complete and written:
            self._keep_index(specs)
        # Comparable are a cache of these teachers alone, and a job that wrote all of it.
        whole = {
            "bytes": total if complete and manifest.teachers.keys() == self.teachers.keys() else None,
            "seconds": seconds if rows == manifest.num_rows * manifest.views else None,
        }
        predicted = predicted_cache(self.recipe, self.device)
        return {
            "rows_written": rows,
            "rows_resumed": self.resumed,
            "predicted": predicted,
            "prediction_error": prediction_error("cache", predicted, whole),
            "bytes": total,
            "bytes_written": written,
            "bytes_per_sample": total / (manifest.num_rows * manifest.views),
            "images_per_second": rows / computing if rows else None,
            "seconds": seconds,
            "digest": cache_digest(self.path),
            "part": f"{self.part[0]}/{self.part[1]}",
            "part_said": self.said,
            "complete": complete,
            "taps": taps,
            "teachers": {name: self._top1(name, manifest) for name in self.teachers},
            "path": str(self.path),
            "data": facts_of(self.data),
        }

    def _keep_index(self, specs: Mapping[str, ArraySpec]) -> None:
        try:
            keep_index(self.path, specs)
        except FeedfastError as error:  # readers do without
            log.warning("cache: %s", error)

    def _top1(self, name: str, manifest: Manifest) -> dict[str, Any]:
        """Of the rows this job ran; of the pilot where it ran none."""
        top1, rows = self.accuracy.of(name)
        if not rows:
            top1, rows = manifest.teachers[name].top1, manifest.teachers[name].top1_rows
        classes = len(self.data.classes)
        tell_accuracy(name, top1, rows, classes, self.recipe.task.name)
        return {"top1": top1, "top1_rows": rows, "near_chance": near_chance(top1, rows, classes)}
