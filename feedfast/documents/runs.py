"""What `train`, `chain`, `sweep`, `compare`, `export`, `analyze reconstruction` and `demo` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feedfast.documents.base import Document


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
