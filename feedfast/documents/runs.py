"""What `train`, `chain`, `sweep`, `compare`, `export`, `analyze reconstruction` and `demo` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feedfast.documents.base import Document
from feedfast.documents.caches import CacheDocument
from feedfast.stages.analyze import Setting
from feedfast.stages.compare import Group, Payback


@dataclass(frozen=True)
class StepPrediction:
    """What a plan predicted of a training step, or how far off it was (found / predicted - 1).

    Attributes:
        step_ms: of a step; None of what is not comparable.
    """

    step_ms: float | None


@dataclass(frozen=True)
class TrainDocument(Document):
    """A trained student: what `feedfast train` prints.

    Attributes:
        final_loss: of the last logged step; None where no step was taken.
        steps: of the run so far.
        images_per_second: over all ranks.
        data_wait_fraction: share of the time in which a step waited for its batch.
        step_ms: of a step: the median; on a GPU the mean.
        seconds: in steps.
        source: of the targets: "cache", "live", "record" or "none".
        method: names of the methods, with " + " between several.
        model: of the student, as the recipe names it.
        parameters: of the bare student.
        out: folder of the run; the student is its ``student.pt``.
        predicted: ``step_ms`` by a plan of the same recipe; None without one.
        prediction_error: found / predicted - 1; None without a plan.
        val_accuracy: top-1 on the validation images; None without any, and of dense tasks.
        val_miou: mean intersection over union, of segmentation.
        val_ap50: average precision at 50 % overlap, of detection.
        val_metrics: all that was measured, where that is more than one number.
        views_complete: of a run that records: views of the cache that hold all that it records.
        branch_accuracy: of a student of branches, per branch; the best one is saved as ``branch.pt``.
    """

    final_loss: float | None
    steps: int
    images_per_second: float | None
    data_wait_fraction: float | None
    step_ms: float | None
    seconds: float | None
    source: str
    method: str
    model: str
    parameters: int
    out: str
    predicted: StepPrediction | None
    prediction_error: StepPrediction | None
    val_accuracy: float | None = None
    val_miou: float | None = None
    val_ap50: float | None = None
    val_metrics: Mapping[str, float | None] | None = None
    views_complete: int | None = None
    branch_accuracy: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class ChainDocument(Document):
    """What `feedfast chain` trained.

    Attributes:
        generations: each student's document, the first one first.
        val_accuracy: of the last.
        final_loss: of the last.
        method: that all but a plain first one learn by.
        cache: that they share.
        out: the folder with a folder per generation.
    """

    generations: tuple[TrainDocument, ...]
    val_accuracy: float | None
    final_loss: float | None
    method: str
    cache: str
    out: str


@dataclass(frozen=True)
class CompareDocument(Document):
    """What `feedfast compare` found.

    Attributes:
        metric: the name of the score.
        groups: runs that differ in nothing but seeds, the best first.
        caches: that the runs read, with what they cost and saved.
        report: the page, where a folder for it was given.
    """

    metric: str
    groups: tuple[Group, ...]
    caches: tuple[Payback, ...]
    report: str | None


@dataclass(frozen=True)
class SweepDocument(Document):
    """What `feedfast sweep` did; the command's exit code is 1 where a run failed, else 0.

    Attributes:
        runs: name of a point of the grid → folder of its run.
        shared: name → the point of equal settings that runs for it.
        done: how many have ended.
        failed: name → why.
        seconds: of this call.
        compare: the comparison of those that have ended; None without any.
    """

    runs: Mapping[str, str]
    shared: Mapping[str, str]
    done: int
    failed: Mapping[str, str]
    seconds: float
    compare: CompareDocument | None


@dataclass(frozen=True)
class ExportedFile:
    """A student in one form.

    Attributes:
        path: of the file.
        bytes: of it.
        difference: the largest of the logits over the largest logit, on real images; 0 of weights.
    """

    path: str
    bytes: int
    difference: float


@dataclass(frozen=True)
class ProgramInput:
    """What an exported program takes.

    Attributes:
        dtype: of the pixels.
        shape: with the name of an axis of any length.
        order: of the channels.
    """

    dtype: str
    shape: tuple[int | str, ...]
    order: str


@dataclass(frozen=True)
class Normalization:
    """What the bare network takes.

    Attributes:
        of: what mean and std are of.
        mean: per channel.
        std: per channel.
        layout: of the axes.
    """

    of: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str


@dataclass(frozen=True)
class ExportDocument(Document):
    """What `feedfast export` wrote.

    Attributes:
        run: its folder.
        model: of the student.
        branches: of the network that was written.
        parameters: of it.
        sha256: of its weights.
        task: that it has learned.
        classes: names by number.
        input: what programs take.
        normalization: what the bare network takes.
        images: real ones that the forms were compared on.
        files: form → its file.
    """

    run: str
    model: str
    branches: int
    parameters: int
    sha256: str
    task: str
    classes: tuple[str, ...]
    input: ProgramInput
    normalization: Normalization
    images: int
    files: Mapping[str, ExportedFile]


@dataclass(frozen=True)
class Reconstruction:
    """How well a paraphraser rebuilds one network's final maps.

    Attributes:
        name: of the run among the others.
        path: of the run.
        model: of its student.
        method: that it learned by.
        val_accuracy: of it; None where none was measured.
        shape: of the map.
        factors: channels of them.
        train_l1: mean absolute error per epoch, taken while it trains.
        test_l1: the same on the validation images.
        test_mean_abs: mean absolute value of the map there.
        final_l1: the last of ``test_l1``.
        final_relative_l1: over ``test_mean_abs``.
    """

    name: str
    path: str
    model: str
    method: str
    val_accuracy: float | None
    shape: tuple[int, ...]
    factors: int
    train_l1: tuple[float, ...]
    test_l1: tuple[float, ...]
    test_mean_abs: float
    final_l1: float
    final_relative_l1: float


@dataclass(frozen=True)
class ReconstructionDocument(Document):
    """What `feedfast analyze reconstruction` found.

    Attributes:
        setting: how every paraphraser was trained.
        runs: one entry per run.
        report: the page.
        provenance: how it was made.
    """

    setting: Setting
    runs: tuple[Reconstruction, ...]
    report: str
    provenance: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class DemoDocument(Document):
    """What `feedfast demo` did.

    Attributes:
        students: one row of its table per method: column → value.
        cache: that they learned from.
        verified: whether `verify` found no problem in it.
        break_even_epochs: method → epochs after which caching has paid.
        seconds: of all.
        report: the page.
    """

    students: tuple[Mapping[str, Any], ...]
    cache: CacheDocument
    verified: bool
    break_even_epochs: Mapping[str, float]
    seconds: float
    report: str
