"""How long a caching job takes, and until the first student is trained, by what a few batches showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from feedfast.data.views import ViewPlan
from feedfast.recipe import Recipe
from feedfast.stages.accuracy import Accuracies
from feedfast.stages.pilot import pilot_batches
from feedfast.stages.plan_compression import TapCost
from feedfast.stages.plan_rates import DiskRate
from feedfast.stages.plan_tap import MeasuredTap
from feedfast.stages.record import needs_every_core, usable_cores
from feedfast.storage.schema import Compression


@dataclass
class Measured:
    """What a few batches showed.

    Attributes:
        taps: teacher/tap → what it costs.
        teacher_ms: teacher → forward pass of a batch.
        top1: of the teachers on these batches.
        student_ms: forward and backward pass of the student on a batch; None if it cannot be built or run.
        step_ms: of the recipe's student with its task, methods and optimizer; None if that cannot be built here.
        batch: rows of a batch.
        pixels_per_second: images that the loader makes per second of a core's time, augmented.
        stream_seconds: from asking for a view's rows to the first batch.
    """

    batch: int
    top1: Accuracies
    pixels_per_second: float
    stream_seconds: float
    taps: dict[str, MeasuredTap] = field(default_factory=dict)
    teacher_ms: dict[str, float] = field(default_factory=dict)
    student_ms: float | None = None
    step_ms: float | None = None

    @property
    def encode_ms(self) -> float:
        """Of all taps of a batch."""
        return sum(tap.encode_ms for tap in self.taps.values())

    @property
    def costs(self) -> dict[str, TapCost]:
        """Of all taps that may be compressed."""
        return {name: tap.cost for name, tap in self.taps.items() if tap.cost is not None}


@dataclass(frozen=True)
class Pilot:
    """Rows that the teachers see before the first is recorded, those that codecs are fitted on, and streams of them."""

    rows: int
    fitted: int
    streams: int


def pilot_of(recipe: Recipe, plan: ViewPlan, count: int) -> Pilot:
    """The pilot as `pilot_pixels` will cut it."""
    batch = min(recipe.cache.batch, count)
    augmented = plan.augment != "none" or bool(plan.operations)
    sizes = [
        [min(numbers.stop * batch, count) - numbers.start * batch for _, numbers in part]
        for part in pilot_batches(count, recipe.cache.pilot, batch, augmented=augmented)
    ]
    return Pilot(sum(map(sum, sizes)), sum(sizes[0]), sum(map(len, sizes)))


def setup_seconds(measured: Measured, pilot: Pilot) -> float:
    """Before the first row, but for the pilot's forward pass: views are opened, the probe runs, codecs are fitted."""
    opening = (1 + pilot.streams) * measured.stream_seconds
    probe = sum(measured.teacher_ms.values()) / 1e3
    return opening + probe + sum(tap.fit_seconds for tap in measured.taps.values())


def batch_ms(
    recipe: Recipe,
    measured: Measured,
    kinds: Mapping[str, Compression],
    disk: DiskRate | None,
    bytes_per_row: float,
    device: torch.device,
) -> float:
    """A batch of the caching pass: what the teachers' cores do, or what writers or disk take where that is slower."""
    cores, workers = usable_cores(), recipe.cache.threads
    finish = sum(measured.taps[name].finish_ms[kind == "zstd"] for name, kind in kinds.items())
    compute = sum(measured.teacher_ms.values()) + measured.encode_ms
    if needs_every_core(device, workers):
        compute += finish / min(workers, cores) + measured.batch / measured.pixels_per_second / cores * 1e3
    disk_ms = 0.0
    if disk is not None and disk.written_per_second:
        disk_ms = bytes_per_row * measured.batch / disk.written_per_second * 1e3
    return max(compute, finish / workers, disk_ms)


def first_student(
    measured: Measured, count: int, pilot: int, pass_ms: float, setup: float, views: int, epochs: float
) -> dict[str, dict[str, float | None]]:
    """How long the first student takes with the whole cache before it, and if it records its views as it trains.

    Args:
        measured: by a few batches.
        count: rows per view.
        pilot: rows that the teachers see before the first is recorded.
        pass_ms: a batch of the pass.
        setup: seconds besides the pilot's rows before the first row.
        views: of the cache.
        epochs: of the student; each records a view, until there are no more.
    """
    per_row = 1e-3 / measured.batch
    teachers, student_ms = sum(measured.teacher_ms.values()), measured.step_ms or measured.student_ms
    fitting, recording = setup + teachers * pilot * per_row, pass_ms * count * per_row + measured.stream_seconds
    training = None if student_ms is None else student_ms * count * epochs * per_row
    before, during = fitting + recording * views, fitting + recording * min(epochs, views)
    return {
        "cache": {"wait_seconds": before, "seconds": None if training is None else before + training},
        "record": {"wait_seconds": fitting, "seconds": None if training is None else during + training},
    }
