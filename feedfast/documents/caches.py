"""Documents of what makes, checks and shows a cache: `plan`, `cache`, `factors`, `verify`, `inspect` and `copy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feedfast.documents.base import Document


@dataclass(frozen=True)
class ImageFacts:
    """The images of a job.

    Attributes:
        images: how many.
        classes: how many; 0 = no labels.
        first_classes: names of the first three.
        skipped: extension → files that look like images and are not read.
        remarks: a remark on the form of some files → how many it was made on; None in `inspect`.
    """

    images: int
    classes: int
    first_classes: tuple[str, ...]
    skipped: Mapping[str, int]
    remarks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class CachedTap:
    """One tap of a teacher as it was stored.

    Attributes:
        codec: the stored form of its values.
        compression: of the codes: "zstd" or "none".
        shape: (channel, height, width), (channel, token) or (channel,) of one sample.
        transform: what happened to the map before it was encoded: "none", "margin" or "factor".
        sample: share of its positions that is stored; None = all.
        saturated_fraction: share of the stored values that lie beyond the outermost code.
        bytes_per_sample: stored bytes per sample of one view.
        relative_rms_error: norm of the error over norm of the values, on pilot rows.
        worst_channel_rms_error: the same of the channel with the largest.
        cosine: between exact and stored values, on pilot rows.
        mask_flip_rate: share of the signs that change; None of maps after an activation.
    """

    codec: str
    compression: str
    shape: tuple[int, ...]
    transform: str
    sample: float | None
    saturated_fraction: float
    bytes_per_sample: float
    relative_rms_error: float | None = None
    worst_channel_rms_error: float | None = None
    cosine: float | None = None
    mask_flip_rate: float | None = None


@dataclass(frozen=True)
class TeacherScore:
    """How many of the images a teacher knows.

    Attributes:
        top1: accuracy on labeled rows; None without any, or of a detector.
        top1_rows: how many those are; of dense tasks pixels.
        near_chance: whether guessing would be about as good; None in `inspect`.
    """

    top1: float | None
    top1_rows: int
    near_chance: bool | None = None


@dataclass(frozen=True)
class CachePrediction:
    """What a plan predicted of a caching job, or how far off it was (found / predicted - 1).

    Attributes:
        bytes: of the cache; None of a share that is not comparable, as of half a job.
        seconds: of the pass.
    """

    bytes: float | None
    seconds: float | None


@dataclass(frozen=True)
class CacheDocument(Document):
    """What `feedfast cache` wrote.

    Attributes:
        rows_written: by this job.
        rows_resumed: of this part that earlier jobs had written.
        bytes: of the whole cache.
        bytes_written: by this job.
        bytes_per_sample: of one view.
        images_per_second: of this job; None where nothing was left to do.
        seconds: of this job.
        digest: sha256 over all committed shards in canonical order.
        part: i/n, this job's.
        part_said: by which option or variables; "" = all of it.
        complete: whether every row of every view is there.
        taps: teacher/tap → how it is stored.
        teachers: name → what it knows.
        path: of the cache.
        data: the images.
        predicted: by a plan of the same recipe; None without one.
        prediction_error: found / predicted - 1; None without a plan.
    """

    rows_written: int
    rows_resumed: int
    bytes: int
    bytes_written: int
    bytes_per_sample: float
    images_per_second: float | None
    seconds: float
    digest: str
    part: str
    part_said: str
    complete: bool
    taps: Mapping[str, CachedTap]
    teachers: Mapping[str, TeacherScore]
    path: str
    data: ImageFacts
    predicted: CachePrediction | None
    prediction_error: CachePrediction | None
