"""The manifest: what a cache was made from, said once, as frozen and validated data.

It lives in the root group's attributes (``{"feedfast": {...}}``). `differences` compares two manifests and leaves out
what cannot change a stored value; `digest_for` hashes just what one array depends on, so a second teacher, tap or view
leaves the digests of everything stored as they were. Every extent is bounded before anything is allocated, and names
are plain path components: a manifest may come from a stranger.

Some fields are configured (the tap's place, its codec, the teacher's weights) and some measured while caching (margin,
compression, fit, errors, probe). When a cache is extended the configured ones must agree, and the measured ones of the
existing cache are kept, like `shard_bytes` and the plan's granule: its codes were made with them.

Shapes are the network's: (C, H, W), or (C,) for a vector. This module knows nothing of files, recipes and models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from feedfast.errors import CacheDamageError, CacheMismatchError
from feedfast.provenance import Provenance
from feedfast.storage import names
from feedfast_kernels.codes import CODECS, packed_channels

FORMAT: Final = 2
ATTRIBUTE: Final = "feedfast"
MAX_ROW_BYTES: Final = 256 << 20  # 256 MiB: far above any real map, far below what hurts
MAX_BLOCK_BYTES: Final = 1 << 30  # 1 GiB: what a reader may have to hold at once, per array
MAX_VIEWS: Final = 65535
CONTENT_HASH: Final = "crc32c+length"  # what the numbers of ``samples/content`` are
MAX_CHANNELS: Final = 1 << 20
MAX_PASSES: Final = 256
MAX_MARGINS: Final = 1 << 16  # every digest of a tap, and of what is made from it, goes over them
MAX_FACTORS: Final = 4  # per teacher; likewise
MAX_CELLS: Final = 1 << 22  # of a sampled map: whoever draws positions orders all of them
MAX_WEIGHTS: Final = 1 << 28  # 1 GiB of float32

CodecName = Literal["f32", "f16", "u8", "u6", "u5", "u4"]
Compression = Literal["zstd", "none"]
Difference = tuple[str, Any, Any]

GIVEN: Final = "python/"  # begins the name of a network that was an object: not the name, the weights say which it is
# of a teacher: no part of what it is; taps are compared one by one
_MEASURED: Final = {"taps", "probe", "published", "top1", "top1_rows"}

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Triple = tuple[float, float, float]
Text = Annotated[str, Field(max_length=4096)]
Scalar = Text | Annotated[int, Field(ge=-(2**63), lt=2**64)] | float | bool | None
Facts = Annotated[
    dict[Text, Scalar], Field(max_length=256)
]  # each array's digest goes over some: no room for megabytes


_Entry = Scalar | Annotated[tuple[Scalar, ...], Field(max_length=32)]
_Crop = Annotated[
    dict[Text, _Entry | Annotated[tuple[dict[Text, _Entry], ...], Field(max_length=16)]], Field(max_length=32)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetInfo(_Part):
    """The images: how many, and a fingerprint that changes when they do.

    ``id_space`` is the largest sample id + 1, the length of the ``labels`` array; 0 means ``count`` (ids are
    0..count-1). ``source`` says where they were read from and is no part of the identity: folders move.
    Nor is ``skipped``: extension → files that looked like images and were not used.
    """

    kind: str = Field(max_length=64)
    count: int = Field(ge=1, lt=2**32)
    fingerprint: Facts
    classes: tuple[Text, ...] = Field((), max_length=1 << 20)
    source: str = Field("", max_length=1 << 20)
    id_space: int = Field(0, ge=0, lt=2**32)
    skipped: dict[str, int] = Field({}, max_length=1 << 10)

    @property
    def num_labels(self) -> int:
        """Length of the ``labels`` array."""
        return self.id_space or self.count


class Operations(_Part):
    """What follows crop and flip, as the recipe's tables with all defaults, and the version of what their steps mean.

    A row has ``slots`` steps of ``parameters`` numbers each; ``mixed`` rows show part of another row.
    """

    table: str = Field(max_length=16)
    listed: tuple[dict[str, Scalar | tuple[Scalar, ...]], ...] = Field(min_length=1, max_length=32)
    slots: int = Field(ge=0, le=64)
    parameters: int = Field(ge=1, le=64)
    mixed: bool = False


class PlanInfo(_Part):
    """The view plan: the algorithm's name and version, and the parameters it is a pure function of.

    ``crop`` is the recipe's table of a crop that has one of its own, with all defaults.
    ``granule`` and ``window`` say how later passes mix rows. No stored value depends on them, so they are no part of
    the identity; the existing cache's are kept, like the sizes of its blocks, of which the granule is a multiple.
    """

    algorithm: str = Field(max_length=128)
    seed: int = Field(ge=0, lt=2**64)
    size: int = Field(ge=1, le=8192)
    augment: str = Field(max_length=64)
    flip: float = 0.5
    pad: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    granule: Literal[1, 2, 4, 8, 16, 32, 64] = 64
    window: int = Field(16, ge=1, le=1 << 16)
    operations: Operations | None = None
    crop: _Crop | None = None

    def identity(self) -> dict[str, Any]:
        """What stored values depend on, as JSON values; without operations or crop what it was before they existed."""
        left_out = {"granule", "window"} | {name for name in ("operations", "crop") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=left_out)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that say what each row of a view shows."""
        if self.operations is None:
            return names.VIEWS
        steps = (names.STEPS, names.PARAMETERS) if self.operations.slots else ()
        return (*names.VIEWS, *steps, *((names.WEIGHT, names.BOX) if self.operations.mixed else ()))


class DecoderInfo(_Part):
    """What turned bytes into pixels. Backend and flags are identity; versions serve the message when pixels differ."""

    backend: str = Field(max_length=64)
    flags: Facts = {}
    versions: Facts = {}


class FactorInfo(_Part):
    """Where a factor tap is from: an encoder applied to the stored values of another tap of the same teacher.

    ``weights_sha256`` is of the encoder's ``num_weights`` float32 values, which the cache holds; ``rate`` is channels
    of the factors per channel of the source.
    """

    source: Name
    rate: float = Field(gt=0, le=4)
    num_weights: int = Field(ge=1, le=MAX_WEIGHTS)
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SampleInfo(_Part):
    """Which positions of a map are stored: ``positions`` of them, ``share`` as it was asked for.

    ``algorithm`` names the pure function of seed, view, sample and tap that draws them, and its version: whoever does
    not know it cannot say what a stored row is of.
    """

    share: float = Field(gt=0, lt=1)
    positions: int = Field(ge=1, le=1 << 32)
    algorithm: str = Field(min_length=1, max_length=128)


class TapInfo(_Part):
    """One stored feature map.

    ``shape`` is (C, H, W), (C, N) of tokens or (C,): the network's, also where ``sample`` says that only some positions
    are stored. ``margin`` is OFD's margin per channel, which its loss needs
    whatever was stored; ``transform`` "margin" says that values were floored with it before they were encoded. ``fit``
    and ``error`` hold the pilot's measurements; like ``compression`` (a recipe may force it, for taps that are new) and
    ``margin`` they are found, not requested.
    """

    name: Name
    path: str = Field(max_length=512)
    position: Literal["pre", "post", "end"]
    shape: tuple[int, ...] = Field(min_length=1, max_length=3)
    transform: Literal["none", "margin", "factor"] = "none"
    factor: FactorInfo | None = None
    sample: SampleInfo | None = None
    margin: tuple[float, ...] | None = Field(None, max_length=MAX_MARGINS)
    codec: CodecName = "u8"
    compression: Compression = "none"
    fit: Facts = {}
    error: Facts = {}

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.shape[0]

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of a row's values: (C, P) of a sampled map, else ``shape``."""
        return self.shape if self.sample is None else (self.channels, self.sample.positions)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        codec = CODECS[self.codec]
        width = 1 if codec.quantized else codec.bits // 8
        return packed_channels(self.channels, self.codec) * width * math.prod(self.stored[1:])

    @model_serializer(mode="wrap")
    def _said(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        found = dump(self)
        if self.sample is None:  # a cache without it is read by versions that have never heard of it
            found.pop("sample", None)
        return found

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if min(self.shape) < 1 or self.channels > MAX_CHANNELS or max((0, *self.shape[1:])) > 1 << 16:
            raise ValueError(
                f"shape {list(self.shape)} has an extent outside 1..{1 << 16} (channels: 1..{MAX_CHANNELS})"
            )
        if self.row_bytes > MAX_ROW_BYTES:
            raise ValueError(
                f"shape {list(self.shape)} at {self.codec} is {self.row_bytes} bytes per row, limit {MAX_ROW_BYTES}"
            )
        if self.margin is not None and len(self.margin) != self.channels:
            raise ValueError(f"expected {self.channels} margins, found {len(self.margin)}")
        if self.transform == "margin" and self.margin is None:
            raise ValueError(f'transform "margin" needs {self.channels} margins, found none')
        if (self.transform == "factor") != (self.factor is not None):
            raise ValueError('transform "factor" and the entry "factor" belong together, found one of them')
        if self.sample is not None and (len(self.shape) != 3 or self.factor is not None or self.name == names.LOGITS):
            raise ValueError("only a map (C, H, W) of a network can be sampled")
        if self.sample is not None and not self.sample.positions <= math.prod(self.shape[1:]) <= MAX_CELLS:
            raise ValueError(f"sample: expected up to {MAX_CELLS} positions, as many as the map has at most")
        if self.name == "zarr.json":
            raise ValueError("a tap cannot be called 'zarr.json'")
        if self.name == names.LOGITS and (len(self.shape) not in (1, 3) or self.codec not in ("f16", "f32")):
            raise ValueError(
                f"logits must be (K,) or (K, H, W) in f16 or f32, found {list(self.shape)} in {self.codec}"
            )
        return self


class TeacherInfo(_Part):
    """One frozen network: its weights by hash, how it is run, and what of it is stored.

    ``mean`` and ``std`` are the normalization of its input in 0..1 units; ``size`` is the input's side where pixels
    are resized for it, 0 = the plan's. Logits are the tap "logits"; ``outputs`` is the number of classes of a network
    whose logits are not stored. ``published`` says whether the weights are those that the model's library publishes;
    None where that was not written down. Measured: ``probe`` is what it computes,
    per tap the mean and the root mean square over the first rows of view 0; ``top1`` is of ``top1_rows`` labeled rows.
    """

    name: Name
    model: str = Field(max_length=512)
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bn: Literal["eval", "batch"] = "eval"
    precision: Literal["fp32", "bf16"] = "fp32"
    mean: Triple
    std: Triple
    size: int = Field(0, ge=0, le=8192)
    outputs: int = Field(0, ge=0, le=1 << 20)
    taps: dict[Name, TapInfo] = Field({}, max_length=256)
    probe: dict[Name, tuple[float, float]] = Field({}, max_length=256)
    top1: float | None = Field(None, ge=0, le=1)
    top1_rows: int = Field(0, ge=0, lt=2**32)
    published: bool | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest stored row."""
        return max((tap.row_bytes for tap in self.taps.values()), default=0)

    @property
    def num_classes(self) -> int:
        """Classes that it tells apart."""
        return self.taps[names.LOGITS].shape[0] if names.LOGITS in self.taps else self.outputs

    @model_validator(mode="after")
    def _sound(self) -> Self:
        wrong = [key for key, tap in self.taps.items() if key != tap.name]
        if wrong:
            raise ValueError(f"taps {wrong} are filed under another name than their own")
        for tap in self.taps.values():
            source = None if tap.factor is None else self.taps.get(tap.factor.source)
            unfit = source is None or source.factor is not None or source.sample is not None
            if tap.factor is not None and (
                unfit or source is None or source.shape[1:] != tap.shape[1:] or len(tap.shape) != 3
            ):
                raise ValueError(f"tap {tap.name!r} holds factors of {tap.factor.source!r}, found no such map")
        if sum(tap.factor is not None for tap in self.taps.values()) > MAX_FACTORS:
            raise ValueError(f"expected at most {MAX_FACTORS} taps of factors")
        if self.name == "zarr.json":
            raise ValueError("a teacher cannot be called 'zarr.json'")
        return self


class Manifest(_Part):
    """The whole cache. ``num_rows`` is rows per view before padding; ``batch_rows`` the batch the teachers ran on.

    ``passes`` are the jobs that wrote to it, for people to read; of very many the first and the newest.
    ``folder`` is the number (inode) of the folder it was written into. A cache that was copied, unpacked or downloaded
    lies in another one, and the paths in it are then nobody's here.
    """

    format: Literal[2] = 2
    dataset: DatasetInfo
    plan: PlanInfo
    decoder: DecoderInfo
    images: Literal["replay", "stored"] = "replay"
    num_rows: int = Field(ge=1, lt=2**32)
    views: int = Field(ge=1, le=MAX_VIEWS)
    shard_bytes: int = Field(32 << 20, ge=1, le=1 << 31)  # 32 MiB
    batch_rows: int = Field(ge=1, le=1 << 20)
    teachers: dict[Name, TeacherInfo] = Field({}, max_length=256)
    versions: Facts = {}
    created: Text = ""
    passes: tuple[Provenance, ...] = Field((), max_length=MAX_PASSES)
    folder: int = Field(0, ge=0, lt=2**64)

    @field_validator("teachers")
    @classmethod
    def _filed_by_name(cls, teachers: dict[str, TeacherInfo]) -> dict[str, TeacherInfo]:
        wrong = [key for key, teacher in teachers.items() if key != teacher.name]
        if wrong:
            raise ValueError(f"teachers {wrong} are filed under another name than their own")
        return teachers

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.num_rows > self.dataset.num_labels:
            raise ValueError(f"num_rows {self.num_rows} exceeds the data set's {self.dataset.num_labels} samples")
        return self

    def to_attrs(self) -> dict[str, Any]:
        """The attributes of the root group, plain JSON values."""
        return {ATTRIBUTE: self.model_dump(mode="json")}

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Manifest:
        """The manifest in a root group's attributes.

        Raises:
            CacheMismatchError: it is of another format.
            CacheDamageError: no manifest is there, or a field of it is out of bounds.
        """
        found = attrs.get(ATTRIBUTE)
        if not isinstance(found, dict):
            raise CacheDamageError(
                f"no feedfast manifest: expected an object under attribute {ATTRIBUTE!r}, found {type(found).__name__}"
            )
        other = found.get("format")
        if type(other) is int and other != FORMAT:
            cure = "run `feedfast cache` again with another cache.path" if other < FORMAT else "use a newer feedfast"
            raise CacheMismatchError(f"manifest: expected cache format {FORMAT}, found {other}; {cure}")
        if other != FORMAT:
            raise CacheDamageError(f"manifest: expected cache format {FORMAT}, found {other!r}")
        try:
            # Through JSON, where lists may become tuples; nothing is coerced otherwise.
            return cls.model_validate_json(json.dumps(found), strict=True)
        except (ValidationError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            place = ".".join(str(part) for part in first["loc"]) if first else ""
            reason = first["msg"] if first else str(error)
            raise CacheDamageError(f"manifest: {place or 'root'}: {reason}") from error

    def digest_for(self, array: str) -> str:
        """Sha256 (hex) over just what the values and objects of one array depend on; names as in `layout.array_specs`.

        Not included: the number of views, other teachers and taps, versions, times, and the pilot's measurements.

        Raises:
            KeyError: there is no such array.
        """
        return hashlib.sha256(
            json.dumps(self._basis(array), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def _basis(self, array: str) -> dict[str, Any]:
        data = self.dataset.model_dump(mode="json", include={"kind", "count", "fingerprint", "id_space"})
        basis: dict[str, Any] = {"format": self.format, "array": array, "dataset": data}
        if array.startswith("samples/"):
            return basis | ({"hash": CONTENT_HASH} if array == names.CONTENT else {})
        basis["plan"] = self.plan.identity()
        basis["num_rows"] = self.num_rows
        if array in self.plan.arrays:
            return basis
        basis["decoder"] = self.decoder.model_dump(mode="json", include={"backend", "flags"})
        target = names.parse(array)
        pixels = array in (names.PIXELS, names.SUMS)
        if pixels or (target is not None and target.part == "codes"):
            basis["layout"] = [self.plan.granule, self.shard_bytes]
        if pixels:
            return basis
        if target is None:
            raise KeyError(array)
        teacher = self.teachers[target.teacher]
        basis["batch_rows"] = self.batch_rows
        # keys that came later only where they say something: caches made before keep their digests
        unsaid = {key for key in ("size", "outputs") if not getattr(teacher, key)}
        basis["teacher"] = teacher.model_dump(mode="json", exclude=_MEASURED | unsaid)
        tap = teacher.taps[target.tap]
        basis["tap"] = _identity(tap)
        if tap.factor is not None:
            basis["source"] = _identity(teacher.taps[tap.factor.source])
        return basis


def _identity(tap: TapInfo) -> dict[str, Any]:
    """A tap without what was measured; without the key ``factor``, too, where caches of yesterday have none."""
    return tap.model_dump(mode="json", exclude={"fit", "error"} | (set() if tap.factor else {"factor"}))


def differences(expected: Manifest, found: Manifest, *, missing: bool = False) -> list[Difference]:
    """What keeps two manifests from describing the same values: (dotted key, expected, found), in a stable order.

    Teachers and taps that only one of them has are not differences, nor is the number of views, unless ``missing``
    asks to report what ``expected`` has and ``found`` lacks. Fields found out while caching (see the module
    docstring) never count.
    """
    rows: list[Difference] = []

    def compare(key: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in sorted({*a, *b}):
                compare(f"{key}.{name}", a.get(name), b.get(name))
        elif a != b:
            rows.append((key, a, b))

    def requested(part: _Part, without: set[str]) -> dict[str, Any]:
        return part.model_dump(mode="json", exclude=without)

    beside = {"source", "skipped"}
    compare("dataset", requested(expected.dataset, beside), requested(found.dataset, beside))
    compare("plan", expected.plan.identity(), found.plan.identity())
    compare("decoder", requested(expected.decoder, {"versions"}), requested(found.decoder, {"versions"}))
    compare("num_rows", expected.num_rows, found.num_rows)
    compare("batch_rows", expected.batch_rows, found.batch_rows)
    if missing:
        if expected.views > found.views:
            rows.append(("views", expected.views, found.views))
        if expected.images == "stored" != found.images:
            rows.append(("images", expected.images, found.images))
    for name, teacher in sorted(expected.teachers.items()):
        other = found.teachers.get(name)
        if other is None:
            if missing:
                rows.append((f"teachers.{name}", teacher.model, None))
            continue
        without = _MEASURED | ({"model"} if any(t.model.startswith(GIVEN) for t in (teacher, other)) else set())
        compare(f"teachers.{name}", requested(teacher, without), requested(other, without))
        for tap_name, tap in sorted(teacher.taps.items()):
            other_tap = other.taps.get(tap_name)
            key = f"teachers.{name}.taps.{tap_name}"
            if other_tap is None:
                if missing:
                    rows.append((key, tap.path, None))
                continue
            measured = {"margin", "compression", "fit", "error"}
            compare(key, requested(tap, measured), requested(other_tap, measured))
    return rows


def describe_differences(rows: list[Difference], *, limit: int = 20) -> str:
    """A two-column table, expected and found, one key per line; long values are shortened."""

    def short(value: Any) -> str:
        text = "—" if value is None else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        return text if len(text) <= 40 else text[:37] + "…"

    table = [("key", "expected", "found")] + [(key, short(a), short(b)) for key, a, b in rows[:limit]]
    width = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = [f"  {key:<{width[0]}}  {a:<{width[1]}}  {b}" for key, a, b in table]
    if len(rows) > limit:
        lines.append(f"  … and {len(rows) - limit} more")
    return "\n".join(lines)


def merge(existing: Manifest, asked: Manifest) -> Manifest:
    """The existing manifest with the teachers, taps, views and stored pixels that ``asked`` adds.

    The caller has checked `differences`: they must be empty.
    """
    teachers = dict(existing.teachers)
    for name, teacher in asked.teachers.items():
        known = teachers.get(name)
        both = {key: {**getattr(teacher, key), **getattr(known or teacher, key)} for key in ("taps", "probe")}
        teachers[name] = (known or teacher).model_copy(update=both)
    images = "stored" if "stored" in (existing.images, asked.images) else "replay"
    views = max(existing.views, asked.views)
    changes: dict[str, Any] = {"teachers": teachers, "views": views, "images": images}
    if asked.folder:  # whoever extends a cache has named its images
        changes["folder"] = asked.folder
        changes["dataset"] = existing.dataset.model_copy(update={"source": asked.dataset.source})
    return existing.model_copy(update=changes)
