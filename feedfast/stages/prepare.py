"""What is settled before the first row of a cache is recorded: whose it is, scales, and every small array.

Two jobs record rows: the caching pass, and a student that trains with live teachers (``train.source = "record"``).
Both begin here, so both make the same cache: an existing one must be of the same images, plan, teachers and taps, and
its teachers must still compute what they did; what it lacks is fitted on the pilot; manifest, plan, labels, content
and scales are then durable, and only rows are missing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedfast.data.dataset import Dataset
from feedfast.data.views import ViewPlan
from feedfast.data.work import boxes_of
from feedfast.errors import CacheDamageError, CacheMismatchError
from feedfast.models.build import published_weights
from feedfast.recipe import Recipe
from feedfast.stages.accuracy import tell_accuracy
from feedfast.stages.agree import refuse_other_tap
from feedfast.stages.codecs import codecs_of
from feedfast.stages.data import Selection, pixel_loader
from feedfast.stages.ensemble import LOGITS, FrozenTeacher, Networks, accuracies, load_teachers
from feedfast.stages.folder import ensure_dir
from feedfast.stages.identity import dataset_info, decisive_versions, decoder_info, plan_info, refuse_differences
from feedfast.stages.pilot import Fitted, mixing_plan, pilot_pixels, row_bytes, run_pilot
from feedfast.stages.plan_record import planned_compression
from feedfast.stages.probe import refuse_other_probe
from feedfast.stages.proof import content_of
from feedfast.storage import names
from feedfast.storage.blocks import AskedCompression, choose_compression
from feedfast.storage.create import open_for_writing
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import check_length, object_key, read_log
from feedfast.storage.manifest import held_manifest
from feedfast.storage.places import open_store, place_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Compression, Manifest, TapInfo, TeacherInfo
from feedfast.storage.store import COMMITS, Place
from feedfast.storage.writer import CacheWriter

log = logging.getLogger(__name__)


class Preparation:
    """Teachers and pixels of one recording job.

    Attributes:
        teachers: the recipe's, by name.
        given: names of those that were passed as objects.
        codecs: of their taps.
        loader: of the pixels they see, in batches of ``cache.batch`` rows; after `prepare` every sample's bytes are
            compared with those the cache was made of.
        probes: what each teacher computes on the first batch; known after `prepare`.
        pilot_accuracy: of the teachers on the pilot.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        plan: ViewPlan,
        device: torch.device,
        part: tuple[int, int],
        networks: Networks | None = None,
    ) -> None:
        """Build the teachers, but those of ``networks``; nothing is written. ``part``: of the cache, this job's."""
        self.recipe, self.data, self.plan, self.part = recipe, data, plan, part
        self.path: Place = place_of(recipe.cache.path)
        self.device = device
        self.codecs = codecs_of(recipe.teachers, recipe.cache.codec)
        self.teachers: dict[str, FrozenTeacher] = load_teachers(recipe, len(data.classes), device, networks)
        self.given = frozenset(networks or ())
        self.loader = pixel_loader(data, plan, recipe.cache.batch, device, recipe.data.threads)
        self.probes: dict[str, dict[str, tuple[float, float]]] = {}
        self.pilot_accuracy = accuracies(self.teachers, len(data.classes))

    def prepare(self) -> Manifest:
        """Agree with an existing cache or fit what is new; returns the merged manifest, small arrays written.

        Raises:
            CacheMismatchError: the path holds a cache of something else.
            RequestError: another job is at work on this part of the cache.
            FeedfastError: a teacher's map is not finite, or the disk is full.
        """
        with _one_at_a_time(self.path):
            return self._prepare()

    def _prepare(self) -> Manifest:
        held = held_manifest(self.path)
        bare = self.manifest(held, {})
        if held is not None:
            refuse_differences(self.path, bare, held)
            # A lost one is written again below, a damaged one is refused by the writer.
            with suppress(CacheDamageError):
                self.loader.content = content_of(CacheReader(self.path), self.data)
            self._refuse_empty_views(held)
        self._probe(held)
        fitted = self._fit(held, bare.plan.granule)
        manifest = open_for_writing(self.path, self.manifest(held, fitted))
        with CacheWriter(self.path, manifest, part=self.part, workers=1) as writer:
            for name, array in array_specs(manifest).items():
                # A kill may have left a teacher in the manifest that this recipe does not name: not ours to finish.
                target = names.parse(name)
                ours = (
                    target is None or target[:2] in fitted or (target.tap == LOGITS and target.teacher in self.teachers)
                )
                if ours and not array.sharded and writer.missing(name):
                    writer.put(name, self._small(name, array, fitted))
            content = writer.stored(names.CONTENT)
            assert content is not None  # written above, if not before
            self.loader.content = content[self.data.ids]  # also of a new cache: images may change while the pass runs
        return manifest

    def _refuse_empty_views(self, held: Manifest) -> None:
        """A manifest may promise views that nobody has begun: those are written only when they are asked for."""
        begun = {commit.view for commit in read_log(self.path).commits.all()}
        most = max(self.recipe.cache.views, len(begun))
        if held.views > most:
            raise CacheMismatchError(
                f"{self.path}: its manifest says {held.views} views, but its log holds rows of {len(begun)} and the "
                f"recipe asks for {self.recipe.cache.views}; cache.views={held.views} writes all of them"
            )

    def manifest(self, held: Manifest | None, fitted: dict[tuple[str, str], Fitted]) -> Manifest:
        """The manifest this recipe asks for; taps are those of ``fitted`` and those already held."""
        recipe = self.recipe
        weights = {spec.name: spec.weights for spec in recipe.teachers}
        teachers = {}
        for name, teacher in self.teachers.items():
            known = held.teachers[name].taps if held is not None and name in held.teachers else {}
            taps: dict[str, TapInfo] = {tap: known[tap] for tap in teacher.requests if tap in known}
            taps.update({tap: entry.info for (owner, tap), entry in fitted.items() if owner == name})
            if LOGITS in teacher.shapes:
                shape = teacher.shapes[LOGITS]
                # Which taps a recipe names decides how logits are stored first, and nothing after that.
                codec = known[LOGITS].codec if LOGITS in known else self.codecs.of(name, LOGITS)
                taps[LOGITS] = TapInfo(name=LOGITS, path="", position="post", shape=shape, codec=codec)
            teachers[name] = TeacherInfo(
                name=name,
                **teacher.described(recipe.data.size),
                taps=taps,
                probe=self.probes.get(name, {}),
                **dict(zip(("top1", "top1_rows"), self.pilot_accuracy.of(name), strict=True)),
                published=name not in self.given and published_weights(teacher.source, weights[name]),
            )
        return Manifest(
            dataset=dataset_info(Selection.of(recipe), self.data),
            plan=plan_info(self._mixing_plan(held)),
            decoder=decoder_info(self.loader.describe()),
            images=recipe.cache.images,
            num_rows=len(self.data),
            views=recipe.cache.views,
            shard_bytes=held.shard_bytes if held else int(recipe.cache.shard_mb * 2**20),
            batch_rows=recipe.cache.batch,
            teachers=teachers,
            versions=decisive_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=open_store(self.path).number(),
        )

    def _probe(self, held: Manifest | None) -> None:
        """Run each teacher on the first batch: does it compute what it did when the cache was made?"""
        first = np.arange(min(len(self.data), self.recipe.cache.batch))
        images = next(iter(self.loader.stream(0, first))).images
        for name, teacher in self.teachers.items():
            self.probes[name] = teacher.probe(images)
            if held is not None and name in held.teachers:
                refuse_other_probe(name, teacher.precision, held.teachers[name].probe, self.probes[name])

    def _mixing_plan(self, held: Manifest | None) -> ViewPlan:
        """The recipe's plan; how passes mix rows is the existing cache's, whose blocks are made for it."""
        if held is not None:
            return replace(self.plan, granule=held.plan.granule, window=held.plan.window)
        images = self.recipe.cache.images
        return mixing_plan(self.plan, row_bytes(self.teachers.values(), self.codecs, images, self.plan.size))

    def _fit(self, held: Manifest | None, granule: int) -> dict[tuple[str, str], Fitted]:
        """Pilot for the taps the cache does not have yet, and for those whose scale is lost or was never written."""
        cache = open_store(self.path)
        durable = {
            commit.array
            for commit in read_log(cache).commits.all()
            if _is_scale(commit.array)
            and check_length(commit.bytes, partial(cache.size, object_key(commit.array, commit.shard))) is None
        }
        wanted: dict[str, list[str]] = {}
        for name, teacher in self.teachers.items():
            if held is None or name not in held.teachers:
                wanted[name] = []  # a new one, of which perhaps only logits are asked: its accuracy is measured
            known = held.teachers[name].taps if held is not None and name in held.teachers else {}
            for tap in teacher.requests:
                if tap in known:
                    refuse_other_tap(self.path, teacher, tap, self.codecs.of(name, tap), known[tap])
                    self._say_compression(f"{name}/{tap}", known[tap].compression)
                if tap not in known or names.scale(name, tap) not in durable:
                    wanted.setdefault(name, []).append(tap)
        if not wanted:
            return {}
        fit, held_out, labels = pilot_pixels(self.loader, self.recipe.cache.pilot)
        out: dict[tuple[str, str], Fitted] = {}
        planned = planned_compression(self.recipe, self.device)
        for name, taps in wanted.items():
            codecs = {tap: self.codecs.of(name, tap) for tap in taps}
            asked: dict[str, AskedCompression] = dict.fromkeys(taps, self.recipe.cache.compression)
            for tap in taps:
                if f"{name}/{tap}" in planned:
                    asked[tap] = "zstd" if planned[f"{name}/{tap}"] == "zstd" else "raw"
            entries = run_pilot(
                *(self.teachers[name], codecs, fit, held_out, granule, asked),
                seen=partial(self._seen, name, labels),
            )
            tell_accuracy(name, *self.pilot_accuracy.of(name), len(self.data.classes), self.recipe.task.name)
            for tap, entry in entries.items():
                out[name, tap] = entry
                _log_fitted(name, entry.info)
        return out

    def _say_compression(self, target: str, held: Compression) -> None:
        asked = self.recipe.cache.compression
        if asked != "auto" and choose_compression((), asked) != held:
            log.info("cache: %s stays as it is stored (%s); cache.compression is for what is new", target, held)

    def _seen(self, teacher: str, labels: list[Any], number: int, logits: torch.Tensor | None) -> None:
        self.pilot_accuracy.update(teacher, logits, labels[number])

    def _small(self, name: str, spec: ArraySpec, fitted: dict[tuple[str, str], Fitted]) -> np.ndarray:
        """The content of an unsharded array: plan parameters, labels, or a tap's offset and step."""
        if name == names.LABEL:
            labels = np.full(spec.shape, -1, np.int32)
            labels[self.data.ids] = self.data.labels
            return labels
        if name == names.CONTENT:
            content = np.zeros(spec.shape, np.uint64)
            content[self.data.ids] = self.data.content()
            return content
        target = names.parse(name)
        if target is not None:
            fit = fitted.get((target.teacher, target.tap))
            if fit is not None and fit.scale is not None:
                return fit.scale
            channels = spec.shape[1]  # a float map: offset 0, step 1
            return np.stack([np.zeros(channels, np.float32), np.ones(channels, np.float32)])
        columns: list[np.ndarray] = []
        for view in range(spec.views):
            order = self.plan.order(view, self.data.ids)
            if name == names.ORDER:
                columns.append(order)
            else:
                part, positions = name.removeprefix("views/"), np.searchsorted(self.data.ids, order)
                sizes, boxes = self.data.sizes[positions], boxes_of(self.data, positions)
                columns.append(self.plan.resolved(view, order, sizes, boxes, only=(part,))[part])
        return np.stack(columns)


def _log_fitted(teacher: str, info: TapInfo) -> None:
    """One line on what the pilot found for a tap."""
    flips = f", {info.error['mask_flip_rate']:.3%} signs flip" if "mask_flip_rate" in info.error else ""
    log.info(
        "pilot: %s/%s %s %s, %s: relative RMS error %s (worst channel %s)%s",
        teacher,
        info.name,
        list(info.shape),
        info.codec,
        info.compression,
        f"{info.error['relative_rms_error']:.2%}",
        f"{info.error['worst_channel_rms_error']:.2%}",
        flips,
    )


def _is_scale(array: str) -> bool:
    target = names.parse(array)
    return target is not None and target.part == "scale"


@contextmanager
def _one_at_a_time(path: Place) -> Iterator[None]:
    """Serialize the preparation of jobs that start together on one cache: the first fits, the others find it done."""
    store = open_store(path)
    if isinstance(path, Path):
        ensure_dir(path / COMMITS, "cache.path")  # says which key of the recipe is wrong
    else:
        store.make()
    lock = store.lock(f"{COMMITS}/.lock-prepare", patience_s=math.inf)
    assert lock is not None
    with lock:
        yield
