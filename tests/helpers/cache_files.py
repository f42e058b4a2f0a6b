"""A small cache written by zarr-python, so that what reads it is tested against another implementation's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from code_samples import packed

from feedfast.storage.layout import ArraySpec, array_specs, group_metadata
from feedfast.storage.log import Commit
from feedfast.storage.schema import DatasetInfo, DecoderInfo, Manifest, PlanInfo, TapInfo, TeacherInfo

Values = dict[str, np.ndarray[Any, Any]]


def small_manifest(
    *, rows: int = 300, views: int = 2, seed: int = 0, weights: str = "0" * 64, **changes: Any
) -> Manifest:
    """Every kind of array: zstd, raw, packed, half and single floats, a vector, stored pixels; several shards each."""

    def tap(name: str, shape: tuple[int, ...], codec: Any, compression: Any = "none") -> TapInfo:
        return TapInfo(name=name, path="layer", position="post", shape=shape, codec=codec, compression=compression)

    taps = [
        tap("dense", (8, 4, 4), "u8", "zstd"),
        tap("raw", (8, 4, 4), "u8"),
        tap("packed", (5, 3, 2), "u4", "zstd"),
        tap("parts", (5, 3, 2), "u6", "zstd"),
        tap("half", (6, 2, 2), "f16", "zstd"),
        tap("exact", (7,), "f32"),
        tap("logits", (10,), "f16"),
    ]
    teacher = TeacherInfo(
        name="a", model="zoo/x", weights_sha256=weights, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        taps={t.name: t for t in taps},
    )  # fmt: skip
    fields: dict[str, Any] = {
        "dataset": DatasetInfo(kind="pixels", count=rows, fingerprint={"ids": "x"}),
        "plan": PlanInfo(algorithm="philox-1", seed=seed, size=8, augment="none", granule=16),
        "decoder": DecoderInfo(backend="pixels"),
        "images": "stored",
        "num_rows": rows,
        "views": views,
        "shard_bytes": 8192,
        "batch_rows": 16,
        "teachers": {"a": teacher},
    }
    return Manifest(**{**fields, **changes})


def random_values(spec: ArraySpec, seed: int) -> np.ndarray[Any, Any]:
    """[view, row, ...] (or the whole array without views): many zeros, as a ReLU leaves them, and no fill value."""
    rng = np.random.default_rng([seed, len(spec.name), spec.row_bytes])
    shape = (spec.views, spec.rows, *spec.row_shape) if spec.views else spec.shape
    values = np.maximum(rng.standard_normal(shape), 0) * 60
    if spec.dtype.kind == "f":
        return values.astype(spec.dtype)
    if spec.name.endswith("packed/codes"):
        low, high = rng.integers(0, 15, (2, *shape))
        return (low | high << 4).astype(np.uint8)
    if spec.name.endswith("parts/codes"):  # many bytes of it are 255, but no row
        return packed(rng.choice(np.uint8([15, 31, 47, 62]), (*shape[:-1], 5)), "u6")
    if spec.name == "pixels/codes":
        return rng.integers(0, 256, shape).astype(np.uint8)  # 255 is white
    return np.minimum(values, 254 if spec.dtype.itemsize == 1 else 10**6).astype(spec.dtype)


def write_cache(path: Path, manifest: Manifest, *, seed: int = 0) -> Values:
    """Write a complete cache and return what is in it."""
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps(group_metadata(manifest.to_attrs())))
    values: Values = {}
    for spec in array_specs(manifest).values():
        folder = path / spec.name
        folder.mkdir(parents=True)
        for parent in folder.relative_to(path).parents[:-1]:
            (path / parent / "zarr.json").write_text(json.dumps(group_metadata()))
        (folder / "zarr.json").write_text(json.dumps(spec.zarr_metadata()))
        values[spec.name] = random_values(spec, seed)
        array = zarr.open_array(store=str(folder), mode="r+", zarr_format=3)
        if spec.views:
            array[:, : spec.rows] = values[spec.name]
        else:
            array[...] = values[spec.name]
    write_log(path, manifest)
    return values


def block_ends(spec: ArraySpec, shard: int, data: bytes) -> tuple[str, ...]:
    """The last four bytes of every block, found through the object's own index."""
    if not spec.sharded:
        return (data[-4:].hex(),)
    index = np.frombuffer(data[-(16 * spec.blocks_per_shard + 4) : -4], "<u8").reshape(-1, 2)
    blocks = index[: spec.real_blocks(shard)].tolist()
    # an absent block has no end; some tests make one
    return tuple(data[at + length - 4 : at + length].hex() if at < len(data) else "0" * 8 for at, length in blocks)


def write_log(path: Path, manifest: Manifest, name: str = "part-0-of-1.jsonl") -> None:
    """Commit every object as it is on disk now."""
    lines = []
    fits: dict[str, str] = {}  # codes -> what names their scale, which comes before them
    for spec in array_specs(manifest).values():
        for view in range(spec.num_views):
            for shard in range(spec.num_shards):
                key = spec.key(view, shard)
                data = (path / spec.name / key).read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if spec.name.endswith("/scale"):
                    fits[spec.name.removesuffix("scale") + "codes"] = digest[:16]
                lines.append(
                    Commit(
                        array=spec.name, shard=key, view=view, rows=spec.shard_span(shard), bytes=len(data),
                        crc32c=f"{google_crc32c.value(data):08x}", sha256=digest,
                        manifest=manifest.digest_for(spec.name), fit=fits.get(spec.name, ""),
                        block_sums=block_ends(spec, shard, data),
                    ).to_line()
                )  # fmt: skip
    (path / "commits").mkdir(exist_ok=True)
    (path / "commits" / name).write_text("".join(lines))
