"""A small cache whose every value is a pure function of (array, view, row): what the cache's tests write and expect."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feedfast.storage.layout import ArraySpec, array_specs, unit_rows
from feedfast.storage.log import cache_digest
from feedfast.storage.schema import DatasetInfo, DecoderInfo, Manifest, PlanInfo, TapInfo, TeacherInfo
from feedfast.storage.writer import CacheWriter, open_for_writing

FINAL = "targets/a/final/codes"


def in_memory() -> str | None:
    """A folder in memory where there is one: fsync costs nothing there, and the writer's tests call it very often."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """`tmp_path`, in memory where there is any to be had."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        yield Path(folder)


def object_path(root: Path, array: str, shard: str) -> Path:
    """The file of an object, put together here and not by the code under test."""
    return Path(root, array, shard)


def make_tap(name: str, shape: tuple[int, ...] = (5, 3, 2), codec: str = "u8", **fields: Any) -> TapInfo:
    return TapInfo(name=name, path=f"layers.{name}", position="pre", shape=shape, codec=codec, **fields)


def make_teacher(name: str, *taps: TapInfo, logits_codec: str = "f16", **fields: Any) -> TeacherInfo:
    given: dict[str, Any] = {
        "model": "zoo/wrn-16-2",
        "weights_sha256": f"{zlib.crc32(name.encode()):064x}",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        **fields,
    }
    logits = TapInfo(name="logits", path="", position="post", shape=(7,), codec=logits_codec)
    return TeacherInfo(name=name, taps={tap.name: tap for tap in (*taps, logits)}, **given)


def make_manifest(*teachers: TeacherInfo, rows: int = 150, views: int = 2, granule: int = 8, **fields: Any) -> Manifest:
    """Blocks of ``granule`` rows: small enough that several make a shard."""
    given: dict[str, Any] = {
        "dataset": DatasetInfo(
            kind="pixels", count=rows, fingerprint={"ids": "1a2b"}, classes=("cat", "dog"), source="x"
        ),
        "plan": PlanInfo(algorithm="philox-1", seed=3, size=4, augment="pad-crop-flip", pad=4, granule=granule),
        "decoder": DecoderInfo(backend="cpu", flags={"fancy": True}, versions={"dali": "2.2"}),
        "num_rows": rows,
        "views": views,
        "shard_bytes": 1000,
        "batch_rows": 20,
        "teachers": {teacher.name: teacher for teacher in teachers},
        "created": "2026-01-01",
        **fields,
    }
    return Manifest(**given)


def standard() -> Manifest:
    """Every codec, both compressions, a vector, odd channels, stored pixels; last shards and blocks are not full."""
    return make_manifest(
        make_teacher("a", make_tap("final"), make_tap("zip", compression="zstd"), make_tap("half", codec="f16")),
        make_teacher(
            "b",
            make_tap("nib", codec="u4"),
            make_tap("six", codec="u6"),
            make_tap("vec", (9,), "f32"),
            logits_codec="f32",
        ),
        images="stored",
    )


def tiny(rows: int = 70, views: int = 1, **fields: Any) -> Manifest:
    """One array of codes (`FINAL`, five shards at 70 rows) and what goes with it."""
    return make_manifest(make_teacher("a", make_tap("final")), rows=rows, views=views, **{"shard_bytes": 500, **fields})


def rows_of(spec: ArraySpec, view: int, start: int, stop: int) -> np.ndarray:
    """Rows of an array; compressible, never the fill value."""
    row = np.arange(start, stop, dtype=np.int64).reshape(-1, *[1] * len(spec.row_shape))
    inner = np.arange(int(np.prod(spec.row_shape))).reshape(spec.row_shape)
    value = (row * 7919 + inner * 31 + view * 101 + zlib.crc32(spec.name.encode())) % 997
    if spec.dtype.kind == "f":
        return (value / 8 - 60).astype(spec.dtype)
    if spec.name == "views/order":
        return value.astype(spec.dtype)
    return (np.where(value < 500, 0, value) % 238).astype(spec.dtype)


def fill_cache(
    path: Path, manifest: Manifest, *, part: tuple[int, int] = (0, 1), batch: int = 20, **options: Any
) -> str:
    """What the offline stage does: whole units of rows, in batches, given again where anything of a unit is missing."""
    manifest = open_for_writing(path, manifest)
    with CacheWriter(path, manifest, part=part, **options) as writer:
        for spec in writer.specs.values():
            if not spec.sharded:
                writer.put(spec.name, small_values(spec))
        append_missing(writer, part, batch)
    return cache_digest(path)


def small_values(spec: ArraySpec) -> np.ndarray:
    """The whole of a small array."""
    if spec.views:
        return np.stack([rows_of(spec, view, 0, spec.rows) for view in range(spec.views)])
    return rows_of(spec, 0, 0, spec.rows)


def append_missing(writer: CacheWriter, part: tuple[int, int] = (0, 1), batch: int = 20) -> None:
    specs = {name: spec for name, spec in writer.specs.items() if spec.sharded}
    unit = unit_rows(writer.specs)
    units = -(-writer.manifest.num_rows // unit)
    todo = sorted({(v, s * spec.shard_rows // unit) for name, spec in specs.items() for v, s in writer.missing(name)})
    for view, number in todo:
        if (view * units + number) % part[1] != part[0]:
            continue
        stop = min((number + 1) * unit, writer.manifest.num_rows)
        for start in range(number * unit, stop, batch):
            for spec in specs.values():
                rows = rows_of(spec, view, start, min(start + batch, stop))
                writer.append(spec.name, view, start, rows, saturated=start)


def objects(path: Path) -> dict[str, bytes]:
    """Every object by its path below the cache."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("c/**/*")) if file.is_file()}


def stamps(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, modification time and content of every object."""
    return {
        key: ((path / key).stat().st_ino, (path / key).stat().st_mtime_ns, data) for key, data in objects(path).items()
    }


def expected(manifest: Manifest) -> Iterable[tuple[ArraySpec, np.ndarray]]:
    """Every array with all it should hold, padding included."""
    for spec in array_specs(manifest).values():
        if not spec.sharded:
            yield spec, small_values(spec)
            continue
        values = np.full(spec.shape, spec.fill, spec.dtype)
        for view in range(spec.views):
            values[view, : spec.rows] = rows_of(spec, view, 0, spec.rows)
        yield spec, values
