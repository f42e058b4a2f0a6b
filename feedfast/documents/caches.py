"""Documents of what makes, checks and shows a cache: `plan`, `cache`, `factors`, `verify`, `inspect` and `copy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class FactorTap:
    """Factors as they were stored.

    Attributes:
        shape: (channel, height, width) of one sample.
        codec: the stored form of its values.
        weights_sha256: of the encoder that made them.
        relative_rms_error: norm of the error over norm of the values, on pilot rows.
        worst_channel_rms_error: the same of the channel with the largest.
        cosine: between exact and stored values.
        saturated_fraction: share of the pilot's values that lie beyond the outermost code.
        mask_flip_rate: None: factors are no maps before an activation.
    """

    shape: tuple[int, ...]
    codec: str
    weights_sha256: str
    relative_rms_error: float | None = None
    worst_channel_rms_error: float | None = None
    cosine: float | None = None
    saturated_fraction: float | None = None
    mask_flip_rate: float | None = None


@dataclass(frozen=True)
class FactorsDocument(Document):
    """What `feedfast factors` added to a cache.

    Attributes:
        taps: teacher/factor → how it is stored.
        rows_written: by this job.
        digest: of the whole cache.
        path: of the cache.
    """

    taps: Mapping[str, FactorTap]
    rows_written: int
    digest: str
    path: str


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache.

    Attributes:
        array: name of the array; "" = the cache as a whole.
        shard: key of the shard within it.
        kind: what is wrong: "missing", "length", "checksum", "pixels", "teacher", …
        detail: a sentence with what was expected and found.
        path: of the object, where one was read.
        block: number of the block within it, where that is known.
    """

    array: str
    shard: str
    kind: str
    detail: str
    path: str | None = None
    block: str | None = None


@dataclass(frozen=True)
class VerifyDocument(Document):
    """What `feedfast verify` found; the command's exit code is 0 where ``ok``, else 1.

    Attributes:
        ok: whether there is no problem.
        problems: all that were found.
        objects: committed ones.
        bytes: of them all.
        replayed: blocks of pixels that were decoded again and compared.
        cosine: array → the smallest of a stored batch with the teacher's exact maps.
    """

    ok: bool
    problems: tuple[Problem, ...]
    objects: int
    bytes: int
    replayed: int
    cosine: Mapping[str, float]


@dataclass(frozen=True)
class DrawnPositions:
    """Which positions of a map are stored.

    Attributes:
        share: as it was asked for.
        positions: how many those are.
        algorithm: that draws them, with its version.
    """

    share: float
    positions: int
    algorithm: str


@dataclass(frozen=True)
class StoredArray:
    """One sharded array of a cache.

    Attributes:
        dtype: of what is stored.
        row_shape: of a stored row.
        codec: of a tap's values; None of pixels.
        transform: what happened to a map before it was encoded; None of pixels.
        sample: which positions are stored; None = all.
        compression: of its blocks: "zstd" or "none".
        rows: that are there, over all views.
        bytes: that they take.
        bytes_per_sample: per row; None without any.
        ratio: uncompressed over stored bytes; None without any.
        relative_rms_error: as of `CachedTap`.
        worst_channel_rms_error: as of `CachedTap`.
        cosine: as of `CachedTap`.
        saturated_fraction: on pilot rows.
        mask_flip_rate: as of `CachedTap`.
    """

    dtype: str
    row_shape: tuple[int, ...]
    codec: str | None
    transform: str | None
    sample: DrawnPositions | None
    compression: str
    rows: int
    bytes: int
    bytes_per_sample: float | None
    ratio: float | None
    relative_rms_error: float | None = None
    worst_channel_rms_error: float | None = None
    cosine: float | None = None
    saturated_fraction: float | None = None
    mask_flip_rate: float | None = None


@dataclass(frozen=True)
class InspectDocument(Document):
    """What a cache holds: `feedfast inspect`.

    Attributes:
        path: of the cache.
        rows: of one view.
        views: how many.
        bytes: of all committed objects.
        digest: sha256 over all committed shards in canonical order.
        complete: whether every row of every view is there.
        targets: array → what it holds.
        teachers: name → what it knows of labeled pilot rows.
        data: the images.
        manifest: what the cache was made from (docs/cache-format.md).
        report: the page, where a folder for it was given.
    """

    path: str
    rows: int
    views: int
    bytes: int
    digest: str
    complete: bool
    targets: Mapping[str, StoredArray]
    teachers: Mapping[str, TeacherScore]
    data: ImageFacts
    manifest: Mapping[str, Any]
    report: str | None = None


@dataclass(frozen=True)
class CopyDocument(Document):
    """What `feedfast copy` did.

    Attributes:
        source: from where.
        target: to where.
        objects: of the cache.
        bytes: of them all.
        objects_copied: by this job; the others were there.
        bytes_copied: by this job.
        seconds: of this job.
        digest: of both caches.
    """

    source: str
    target: str
    objects: int
    bytes: int
    objects_copied: int
    bytes_copied: int
    seconds: float
    digest: str
