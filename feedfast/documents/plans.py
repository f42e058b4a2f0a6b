"""The document of `plan`: what a caching job will cost, whom it serves and when it has paid, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feedfast.documents.base import Document
from feedfast.documents.caches import ImageFacts


@dataclass(frozen=True)
class PlannedTarget:
    """What one array will take, in all views.

    Attributes:
        shape: of one sample's map.
        codec: the stored form of its values.
        raw_bytes: before compression, by exact arithmetic.
        bytes: estimated from a batch of real codes.
        bytes_per_sample: of one view.
        bytes_per_view: of all samples.
        compression: raw over stored bytes.
        positions: of the map that are stored; None = all.
    """

    shape: tuple[int, ...]
    codec: str
    raw_bytes: int
    bytes: int
    bytes_per_sample: float
    bytes_per_view: float
    compression: float
    positions: int | None = None


@dataclass(frozen=True)
class PlannedTeacher:
    """One teacher, timed.

    Attributes:
        model: as the recipe names it.
        top1: accuracy on labeled training rows; None without any.
        top1_rows: how many those are.
        near_chance: whether guessing would be about as good.
        ms: forward pass of one batch.
        bytes: of its targets, in all views.
        bytes_per_view: of its targets.
    """

    model: str
    top1: float | None
    top1_rows: int
    near_chance: bool
    ms: float
    bytes: int
    bytes_per_view: float


@dataclass(frozen=True)
class FirstStudent:
    """When the first student is there.

    Attributes:
        wait_seconds: until its first step.
        seconds: until its last; None where no step could be timed.
    """

    wait_seconds: float
    seconds: float | None


@dataclass(frozen=True)
class PlanDocument(Document):
    """What `feedfast plan` found; the command's exit code is 0 where it ``fits``, else 1.

    Attributes:
        bytes: of the whole cache.
        raw_bytes: before compression.
        bytes_per_sample: of one view.
        bytes_per_view: of all samples.
        targets: teacher/tap, or "pixels" → what it takes.
        bytes_present: of a cache that is there already.
        free_bytes: on the disk; None of a bucket.
        fits: whether what is missing has room.
        views_that_fit: how many would.
        seconds: of the caching job.
        hours: the same.
        images_per_second: of the pass.
        setup_seconds: fitting codecs, opening and probes.
        view_seconds: until the first batch of a view comes.
        pass_ms: one batch of the pass.
        teachers_ms: one batch: forward pass of all teachers.
        encode_ms: one batch: maps to codes.
        student_ms: one batch: forward and backward pass; None where it cannot be built yet.
        step_ms: one batch: the same with task, methods and optimizer; None where that cannot be built yet.
        pixels_per_core_second: augmented images that the loader makes.
        view_bytes_per_row: of what says how a row is shown.
        live_over_cached: time of a step with live teachers over one without; None without ``student_ms``.
        break_even_epochs: after which caching has paid.
        break_even_runs: the same in runs of the recipe's length.
        first_student: "cache" (before training) and "record" (while it trains) → when it is there.
        teachers: name → what it is.
        serves: methods that could read this cache.
        serves_not: method → why it could not.
        method: of the recipe.
        unusable: why that could not use the cache; "" = it can.
        bf16_over_fp32: time of bf16 over that of fp32; None where the recipe asks for none on a CPU.
        data: the images.
        compression: teacher/tap → "zstd" or "none".
        zstd_step_ms: a step from the cache with what would be compressed by size alone.
        cached_step_ms: a step from the cache as planned.
        read_ms: one batch, decoded; None where the disk could not be measured.
        pays: whether that takes less than ``teachers_ms``.
        needed_bytes_per_second: of a student that waits for nothing, stored bytes.
        available_bytes_per_second: that reading gives, stored bytes.
        disk_bytes_per_second: of the disk.
        disk_direct: whether that was measured past the page cache.
        decoder_bytes_per_second: decoded bytes of one thread.
    """

    bytes: int
    raw_bytes: int
    bytes_per_sample: float
    bytes_per_view: float
    targets: Mapping[str, PlannedTarget]
    bytes_present: int
    free_bytes: int | None
    fits: bool
    views_that_fit: int
    seconds: float
    hours: float
    images_per_second: float
    setup_seconds: float
    view_seconds: float
    pass_ms: float
    teachers_ms: float
    encode_ms: float
    student_ms: float | None
    step_ms: float | None
    pixels_per_core_second: float
    view_bytes_per_row: int
    live_over_cached: float | None
    break_even_epochs: float
    break_even_runs: float
    first_student: Mapping[str, FirstStudent]
    teachers: Mapping[str, PlannedTeacher]
    serves: tuple[str, ...]
    serves_not: Mapping[str, str]
    method: str
    unusable: str
    bf16_over_fp32: float | None
    data: ImageFacts
    compression: Mapping[str, str]
    zstd_step_ms: float | None
    cached_step_ms: float | None
    read_ms: float | None
    pays: bool | None
    needed_bytes_per_second: float | None
    available_bytes_per_second: float | None
    disk_bytes_per_second: float | None
    disk_direct: bool | None
    decoder_bytes_per_second: float | None
