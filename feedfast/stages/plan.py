"""`feedfast plan`: what a caching job will cost, before it costs it.

The first question everybody meets is disk space, the second is time. Both are estimated from a few batches: real
pixels through the real teachers, maps encoded and compressed as they will be, and a student step. Estimates are
labeled by how they were made: ``raw_bytes`` is exact arithmetic, ``bytes`` multiplies it by the compression one
batch of real codes reached. The batches that time the teachers also show how many of their images they know.

Break-even is the number of epochs after which caching has paid: a live run pays the teachers' forward pass every
epoch, a cached one paid it once per view.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feedfast.data.batch import Batch
from feedfast.data.dali import require_dali
from feedfast.data.dataset import Dataset, ImageSource
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.files import standing_folder
from feedfast.methods import TapInfo
from feedfast.methods.ft import FACTOR
from feedfast.models.given import copied
from feedfast.models.normalize import Normalize
from feedfast.models.taps import Tapped, logits_of
from feedfast.recipe import Recipe
from feedfast.stages.accuracy import near_chance, tell_accuracy
from feedfast.stages.agree import refuse_other_tap
from feedfast.stages.bf16 import say_slow_bf16
from feedfast.stages.codecs import Codecs, codecs_of
from feedfast.stages.data import facts_of, open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import LOGITS, FrozenTeacher, Networks, accuracies, load_teachers, method_taps
from feedfast.stages.pilot import mixing_plan, row_bytes, tap_row_bytes
from feedfast.stages.plan_compression import Reading, cached_ms, cheapest_kinds
from feedfast.stages.plan_rates import DiskRate, disk_rate
from feedfast.stages.plan_record import keep_plan
from feedfast.stages.plan_screen import plan_screen, screen_width
from feedfast.stages.plan_step import step_ms
from feedfast.stages.plan_tap import measured_tap
from feedfast.stages.plan_time import Measured, Pilot, batch_ms, first_student, pilot_of, setup_seconds
from feedfast.stages.progress import Meter, format_bytes
from feedfast.stages.record import usable_cores
from feedfast.stages.sampling import sampling_of
from feedfast.stages.trainee import Entry, build_student, memory_format, method_entries, names_of
from feedfast.stages.usable import coming_taps, refuse_unusable, served
from feedfast.stages.worker import pick_device
from feedfast.storage.create import refuse_foreign
from feedfast.storage.layout import block_rows_for
from feedfast.storage.log import read_log
from feedfast.storage.manifest import held_manifest
from feedfast.storage.places import place_of
from feedfast.storage.schema import MAX_VIEWS, CodecName, Compression, Manifest
from feedfast.storage.store import Place
from feedfast_kernels import Sampled, Target

log = logging.getLogger(__name__)

BLOCK_EXTRA = 20  # bytes: a place in the shard's index and a checksum
VIEW_ROW = 25  # bytes per row of views/order, views/window, views/flip and pixels/sums
STEP, MIX = 25, 20  # bytes per row of a step of the operations, and of mixing
SAMPLE = 12  # bytes per sample of samples/label and samples/content
SPARE = 1.02  # what may be wrong with the estimate of the bytes
TIMED = 5  # batches, after one that warms up


def run_plan(
    recipe: Recipe,
    *,
    train: ImageSource | None = None,
    teachers: Networks | None = None,
    student: nn.Module | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Estimate the recipe's cache.

    Args:
        recipe: what is to be cached.
        train: as of `run_cache`; ``teachers`` and ``student`` likewise.
        check: refuse what the recipe's own student could not use, as `run_cache` does; False = say it and go on.

    Returns:
        The JSON of `feedfast plan`. Space: ``bytes``, ``raw_bytes``, ``bytes_per_sample`` (of one view),
        ``bytes_per_view``, ``targets`` (per teacher/tap the same, with shape and codec), ``bytes_present``,
        ``free_bytes`` (None of a bucket), ``fits``, ``views_that_fit``. Time: ``seconds``, ``hours``,
        ``images_per_second``, ``setup_seconds`` (the pilot's fits, but not its forward),
        ``view_seconds`` (until a view's first batch comes),
        ``pass_ms`` (one batch of the pass), ``teachers_ms``,
        ``encode_ms`` and ``student_ms`` (one batch: forward; maps to codes; forward with backward),
        ``step_ms`` (the same with task, methods and optimizer; None where that cannot be built yet),
        ``pixels_per_core_second`` (augmented images by the loader), ``view_bytes_per_row`` (how a row is shown),
        ``live_over_cached``, ``break_even_epochs``, ``break_even_runs`` (of the recipe's length),
        ``first_student`` (one process; of ``cache`` before training, of ``record``: ``wait_seconds`` until its
        first step, ``seconds`` until its last, by ``step_ms``, else ``student_ms``). Reading: ``compression``
        (teacher/tap → "zstd" or "none", see `feedfast.stages.plan_compression`), ``zstd_step_ms`` and
        ``cached_step_ms`` (a step from the cache with what would be compressed by size alone, and as planned),
        ``read_ms`` (one batch, decoded), ``pays`` (it takes less than ``teachers_ms``), ``needed_bytes_per_second``
        (of a student
        that waits for nothing) and ``available_bytes_per_second``, of stored bytes; ``disk_bytes_per_second`` (past
        the page cache: ``disk_direct``), ``decoder_bytes_per_second`` (decoded, one thread). Use: ``teachers``
        (per teacher ``model``, ``top1`` on ``top1_rows`` training rows, ``near_chance``, ``ms``, ``bytes``,
        ``bytes_per_view``), ``serves`` (methods), ``serves_not`` (method → why), ``method`` and ``unusable`` (why the
        recipe's own cannot use it, "" if it can), ``bf16_over_fp32``; ``data`` (see
        `feedfast.stages.data.facts_of`).

    Raises:
        RequestError: the recipe cannot be run.
    """
    if not recipe.teachers or not recipe.cache.path or not recipe.cache.views:
        raise RequestError(
            "plan: expected [[teachers]], cache.path and cache.views, found at least one of them missing"
        )
    require_dali()
    entries = method_entries(recipe.method)
    path = place_of(recipe.cache.path)
    refuse_foreign(path)
    device = pick_device(recipe.train.device)
    data = open_train(recipe, train)
    count, views = len(data), recipe.cache.views
    classes = len(data.classes)
    log.info("plan: %s images, %d views, %d teachers on %s", f"{count:,}", views, len(recipe.teachers), device)
    ensemble = load_teachers(recipe, classes, device, teachers)
    held, codecs = held_manifest(path), codecs_of(recipe.teachers, recipe.cache.codec)
    _warn_of_other_taps(path, ensemble, codecs, held)
    taps = coming_taps(ensemble, held, entries)
    unusable = refuse_unusable(recipe, entries, taps, classes, check=check, given=student)
    ratio = say_slow_bf16(recipe, device)
    mixed = mixing_plan(
        view_plan(recipe.data, recipe.seed),
        row_bytes(ensemble.values(), codecs, recipe.cache.images, recipe.data.size),
    )
    granule = mixed.granule
    pilot = pilot_of(recipe, mixed, count)
    measured = _measure(recipe, data, ensemble, codecs, entries, granule, pilot, device, student, usable=not unusable)
    standing, free = _room(path)
    disk = disk_rate(standing, int(free)) if isinstance(standing, Path) else None
    rows = count * views
    reading = _reading(recipe, measured, disk, device)
    kinds: dict[str, Compression] = {name: cost.fixed for name, cost in measured.costs.items()}
    if recipe.cache.compression == "auto":
        size = sum(cost.stored_bytes(kinds[name]) for name, cost in measured.costs.items())
        batches = rows / measured.batch
        kinds = cheapest_kinds(measured.costs, reading, batches, free / SPARE - size * batches)
    stored = _stored(codecs, ensemble, taps, entries)
    targets = {
        name: _target(info, codec, _ratio(measured, kinds, name), count, views, granule)
        for name, (info, codec) in stored.items()
    }
    if recipe.cache.images == "stored":
        pixels = TapInfo((3, recipe.data.size, recipe.data.size))
        targets["pixels"] = _target(pixels, "u8", 1.0, count, views, granule)
    total = sum(entry["bytes"] for entry in targets.values()) + view_row_bytes(mixed) * rows + SAMPLE * count
    present = read_log(path).commits.total_bytes
    per_view = (total - SAMPLE * count) / views
    teachers_ms, student_ms = sum(measured.teacher_ms.values()), measured.student_ms
    pass_ms = batch_ms(recipe, measured, kinds, disk, total / rows, device)
    setup = setup_seconds(measured, pilot)
    seconds = (
        setup + (teachers_ms * pilot.rows + pass_ms * rows) / measured.batch / 1e3 + views * measured.stream_seconds
    )
    epoch_ms = teachers_ms * count / measured.batch
    epochs = recipe.train.steps * recipe.train.batch / count if recipe.train.steps else recipe.train.epochs
    methods = served(taps, classes, recipe.task.name)
    document = {
        "bytes": total,
        "raw_bytes": sum(entry["raw_bytes"] for entry in targets.values()),
        "bytes_per_sample": total / rows,
        "bytes_per_view": per_view,
        "targets": targets,
        "bytes_present": present,
        "free_bytes": free if math.isfinite(free) else None,
        "fits": max(total - present, 0) * SPARE < free,
        "views_that_fit": int(min(max(free / SPARE + present - SAMPLE * count, 0) / per_view, MAX_VIEWS)),
        "seconds": seconds,
        "hours": seconds / 3600,
        "images_per_second": measured.batch / pass_ms * 1e3,
        "setup_seconds": setup,
        "view_seconds": measured.stream_seconds,
        "pass_ms": pass_ms,
        "teachers_ms": teachers_ms,
        "encode_ms": measured.encode_ms,
        "student_ms": student_ms,
        "step_ms": measured.step_ms,
        "pixels_per_core_second": measured.pixels_per_second,
        "view_bytes_per_row": view_row_bytes(mixed),
        "live_over_cached": None if student_ms is None else (teachers_ms + student_ms) / student_ms,
        "break_even_epochs": seconds * 1e3 / epoch_ms,
        "break_even_runs": seconds * 1e3 / epoch_ms / epochs,
        "first_student": first_student(measured, count, pilot.rows, pass_ms, setup, views, epochs),
        "teachers": {name: _teacher(teacher, measured, targets, views) for name, teacher in ensemble.items()},
        "serves": [name for name, reason in methods.items() if not reason],
        "serves_not": {name: reason for name, reason in methods.items() if reason and name != "none"},
        "method": names_of(entries),
        "unusable": unusable,
        "bf16_over_fp32": ratio,
        "data": facts_of(data),
    }
    document |= _read(document, measured, kinds, disk, reading)
    keep_plan(recipe, device, document, measured.batch)
    if log.isEnabledFor(logging.INFO):
        log.info("plan:\n%s", plan_screen(document, recipe, str(standing), screen_width()))
    for name, entry in document["teachers"].items():
        if entry["near_chance"]:
            tell_accuracy(name, entry["top1"], entry["top1_rows"], classes, recipe.task.name)
    if not document["fits"]:
        log.error("plan: %s", _no_room(document, str(standing), views))
    return document


def _room(place: Place) -> tuple[Place, float]:
    """The folder that stands where the cache is to lie, and its free bytes; a bucket has as many as are paid for."""
    if isinstance(place, str):
        return place, math.inf
    standing = standing_folder(place)
    return standing, shutil.disk_usage(standing).free


def _warn_of_other_taps(
    path: Place, teachers: Mapping[str, FrozenTeacher], codecs: Codecs, held: Manifest | None
) -> None:
    """Say which target of the cache that is there is another than the recipe's: `cache` and `train` refuse it."""
    for name, teacher in teachers.items():
        known = held.teachers[name].taps if held is not None and name in held.teachers else {}
        for tap in teacher.requests.keys() & known.keys():
            try:
                refuse_other_tap(path, teacher, tap, codecs.of(name, tap), known[tap])
            except CacheMismatchError as error:
                log.warning("plan: %s", error)


def _ratio(measured: Measured, kinds: Mapping[str, Compression], name: str) -> float:
    """Raw bytes per stored byte; a factor's are not known before it is trained."""
    return measured.taps[name].compression(kinds[name]) if name in kinds else 1.0


def _reading(recipe: Recipe, measured: Measured, disk: DiskRate | None, device: torch.device) -> Reading:
    cores = usable_cores()
    return Reading(
        step_ms=measured.step_ms or measured.student_ms or 0.0,
        threads=recipe.cache.threads,
        cores=cores,
        shared=device.type == "cpu" and torch.get_num_threads() >= cores,
        bytes_per_second=None if disk is None else disk.bytes_per_second,
    )


def _read(
    document: Mapping[str, Any],
    measured: Measured,
    kinds: Mapping[str, Compression],
    disk: DiskRate | None,
    reading: Reading,
) -> dict[str, Any]:
    """Whether reading a batch takes less than computing it; rates are None where the disk could not be measured.

    A batch is read, then decoded by ``cache.threads``; a student that waits for nothing takes a batch per step.
    """
    rows, student_ms, costs = measured.batch, document["step_ms"] or document["student_ms"], measured.costs
    stored = document["bytes_per_sample"] * rows
    raw = document["raw_bytes"] / document["bytes"] * stored
    decoding = sum(cost.decode_ms(kinds[name]) for name, cost in costs.items())
    read_ms = None if disk is None else stored / disk.bytes_per_second * 1e3 + reading.decoding_ms(decoding)
    fixed: dict[str, Compression] = {name: cost.fixed for name, cost in costs.items()}
    return {
        "compression": dict(kinds),
        "zstd_step_ms": None if student_ms is None else cached_ms(costs, fixed, reading),
        "cached_step_ms": None if student_ms is None else cached_ms(costs, kinds, reading),
        "read_ms": read_ms,
        "pays": None if read_ms is None else read_ms < document["teachers_ms"],
        "needed_bytes_per_second": None if student_ms is None else stored / student_ms * 1e3,
        "available_bytes_per_second": None if read_ms is None else stored / read_ms * 1e3,
        "disk_bytes_per_second": None if disk is None else disk.bytes_per_second,
        "disk_direct": None if disk is None else disk.direct,
        "decoder_bytes_per_second": raw / decoding * 1e3 if decoding else None,
    }


def _no_room(document: Mapping[str, Any], folder: str, views: int) -> str:
    """The sentence for a disk that is too small."""
    missing = max(document["bytes"] - document["bytes_present"], 0) * SPARE - document["free_bytes"]
    return (
        f"expected {format_bytes(max(document['bytes'] - document['bytes_present'], 0))} free for cache.path, found "
        f"{format_bytes(document['free_bytes'])} in {folder}: {document['views_that_fit']} of {views} views fit; "
        f"free {format_bytes(missing)}, lower cache.views, or take fewer taps or another cache.codec"
    )


def _stored(
    codecs: Codecs,
    teachers: Mapping[str, FrozenTeacher],
    taps: Mapping[str, Mapping[str, TapInfo]],
    entries: Sequence[Entry],
) -> dict[str, tuple[TapInfo, CodecName]]:
    """teacher/tap → shape and codec of what this recipe's commands will store.

    With stored factors in use, `feedfast factors` follows and adds them.
    """
    found: dict[str, tuple[TapInfo, CodecName]] = {}
    factors = any(FACTOR in entry.kind.needed(entry.options) for entry in entries)
    for name, teacher in teachers.items():
        for tap in (*teacher.shapes, *((FACTOR,) if factors and FACTOR in taps[name] else ())):
            found[f"{name}/{tap}"] = taps[name][tap], codecs.of(name, tap)
    return found


def _target(info: TapInfo, codec: CodecName, ratio: float, count: int, views: int, granule: int) -> dict[str, Any]:
    """What one array takes, in all ``views`` of ``count`` rows."""
    raw = tap_row_bytes(info.stored, codec)
    block = block_rows_for(raw, granule)
    blocks = -(-count // block) * views
    # Blocks are whole: what fills up the last one of a view takes room unless zstd squeezes it to nothing.
    size = int(raw * count * views / ratio if ratio > 1 else raw * blocks * block) + BLOCK_EXTRA * blocks
    return {
        "shape": list(info.shape),
        **({} if info.positions is None else {"positions": info.positions}),
        "codec": codec,
        "raw_bytes": raw * count * views,
        "bytes": size,
        "bytes_per_sample": size / (count * views),
        "bytes_per_view": size / views,
        "compression": ratio,
    }


def _teacher(
    teacher: FrozenTeacher, measured: Measured, targets: Mapping[str, Mapping[str, Any]], views: int
) -> dict[str, Any]:
    top1, rows = measured.top1.of(teacher.name)
    size = sum(entry["bytes"] for key, entry in targets.items() if key.startswith(f"{teacher.name}/"))
    return {
        "model": teacher.source,
        "top1": top1,
        "top1_rows": rows,
        "near_chance": near_chance(top1, rows, measured.top1.classes),
        "ms": measured.teacher_ms[teacher.name],
        "bytes": size,
        "bytes_per_view": size / views,
    }


def _measure(
    recipe: Recipe,
    data: Dataset,
    teachers: Mapping[str, FrozenTeacher],
    codecs: Codecs,
    entries: Sequence[Entry],
    granule: int,
    pilot: Pilot,
    device: torch.device,
    given: nn.Module | None,
    *,
    usable: bool,
) -> Measured:
    """Run teachers and student on a few batches; progress is shown."""
    batches, speed, opening = _batches(recipe, data, device)
    first = batches[0].images
    found = Measured(len(first), accuracies(teachers, len(data.classes)), speed, opening)
    taps = sum(len(teacher.shapes) for teacher in teachers.values())
    targets: dict[str, dict[str, Target | Sampled]] = {}
    sampling = sampling_of(recipe.seed, method_taps(teachers))
    places = sampling.places(0, batches[0].ids, device)
    with Meter("plan", taps + len(teachers) * (TIMED + 1) + TIMED + 1, "measurements") as meter:
        for name, teacher in teachers.items():
            teacher.fit_margins([first])
            for tap, values in teacher(first).items():
                here = sampling.gathered(name, tap, values, places)
                asked = recipe.cache.compression
                made = measured_tap(teacher, tap, here, codecs.of(name, tap), asked, granule, pilot.fitted)
                targets.setdefault(name, {})[tap] = sampling.wrapped(name, tap, made.target, places)
                found.taps[f"{name}/{tap}"] = made
                meter.advance(1, f"{name}/{tap}")
            times = []
            for number in range(TIMED + 1):
                batch = batches[number % len(batches)]
                begin = time.perf_counter()
                logits = teacher(batch.images).get(LOGITS)
                _synchronize()
                times.append((time.perf_counter() - begin) * 1e3 * len(first) / len(batch))
                if number < len(batches):
                    found.top1.update(name, logits, batch.annotations)
                meter.advance(1, f"teacher {name}")
            found.teacher_ms[name] = float(np.median(times[1:]))
        try:
            found.student_ms = _student_ms(recipe, first, len(data.classes) or 1000, device, meter, given)
        except RequestError:
            if usable:
                raise
    if usable:
        found.step_ms = step_ms(
            recipe, data, entries, method_taps(teachers), replace(batches[0], targets=targets), device, given
        )
    return found


def _batches(recipe: Recipe, data: Dataset, device: torch.device) -> tuple[list[Batch], float, float]:
    """The first batches of view 0, cut as the caching pass will cut them, without a short last one.

    Also how many images the loader makes per second of a core's time, over the same rows once more: its pipeline is
    warm then, and nothing else runs. And the seconds in which a stream is opened.
    """
    size = min(recipe.cache.batch, len(data))
    rows = np.arange(min(TIMED + 1, len(data) // size) * size)
    with pixel_loader(data, view_plan(recipe.data, recipe.seed), size, device, recipe.data.threads) as loader:
        batches = list(loader.stream(0, rows))
        stream = loader.stream(0, np.tile(rows, 1 + 4 * size // len(rows) + 1))
        opening = time.perf_counter()
        next(stream)  # pays for the pipeline
        opening = time.perf_counter() - opening
        begin, made = time.process_time(), sum(len(batch) for batch in stream)
        seconds = time.process_time() - begin
    return batches, made / max(seconds, 1e-6), opening


def _student_ms(
    recipe: Recipe, images: Tensor, classes: int, device: torch.device, meter: Meter, given: nn.Module | None
) -> float:
    """Forward and backward of the plain student, of one that was passed a copy, on one batch."""
    asked, own = (
        recipe.student.model_copy(update={"weights": None}),
        None if given is None else copied(given, "student"),
    )
    student = build_student(asked, classes, recipe.train_seed, own)
    student = student.to(device=device, memory_format=memory_format(recipe.train))  # type: ignore[call-overload]
    normalize = Normalize(*recipe.data.normalization).to(device)
    Tapped(student, (), normalize(images[:2]))  # refuses a network that cannot run at this size

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            output = logits_of(student(normalize(images)))
            parts = [part for part in output.values() if part.requires_grad] if isinstance(output, dict) else [output]
            loss = torch.stack([part.float().logsumexp(-1).mean() for part in parts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        meter.advance(1, "student")

    return _median_ms(step)


def view_row_bytes(plan: ViewPlan) -> int:
    """Bytes per row of what says how a row is shown."""
    slots = sum(operation.slots for operation in plan.pixel_operations)
    return VIEW_ROW + slots * STEP + (MIX if plan.mixing_operations else 0)


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMED + 1):
        begin = time.perf_counter()
        work()
        _synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times[1:]))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
