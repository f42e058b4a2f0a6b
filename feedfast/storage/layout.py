"""Arrays: from a manifest to shapes, shards, blocks, object keys and the `zarr.json` any Zarr v3 implementation reads.

Layout, all little-endian: maps ``[view, row, height, width, channel]``, some positions of maps ``[view, row, position,
channel]``, tokens ``[view, row, token, channel]``, vectors and logits ``[view, row, channel]``.

Target and pixel arrays are sharded along rows alone. A *shard* (one object, ``c/VIEW/SHARD/0/0/0``) is the unit of
writing, committing and retrying; a *block* (inner chunk) is the unit of reading and checking. Rows are padded to
whole shards, so no two views share an object and a view can be appended by changing one number in `zarr.json`. Blocks
past the last row are absent from the shard's index; the rows that fill up the last block hold the fill value.

Small arrays (view parameters, labels, scales) are one object a view, or one in all, with a crc32c.

Fill values are chosen to be impossible as data, because Zarr reads whatever is missing as the fill value without a
word: 0xFF for codes, NaN for floats, the lowest int32, the highest uint32. Pixels are the exception (255 is white):
their ``sentinel`` is False and only lengths, indexes and checksums guard them. No code of u6 and u5 is all ones, but a
byte that holds parts of several may be: there a row of nothing but 0xFF is what is never data (``fill_is_row``).

This module touches no files.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from feedfast.storage import names
from feedfast.storage.schema import Compression, Manifest
from feedfast_kernels.codes import CODECS, packed_channels

MAX_SHARD_ROWS: Final = 1024
MAX_BLOCK_BYTES: Final = 8 << 20  # 8 MiB, unless a single row is larger
ZSTD_LEVEL: Final = 1
NO_CHUNK: Final = 2**64 - 1
_MAX_KEY: Final = 100  # characters
_CRC: Final[dict[str, Any]] = {"name": "crc32c"}
_BYTES: Final[dict[str, Any]] = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One stored array. ``chunk`` is the shape of an object, ``block`` of an inner chunk (None: not sharded).

    ``views`` is 0 for arrays without a view axis; those count as one view, number 0. ``rows`` is the number of real
    rows per view (for arrays without rows: the extent of the first axis), before padding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float
    chunk: tuple[int, ...]
    block: tuple[int, ...] | None
    compression: Compression
    dims: tuple[str, ...]
    views: int
    rows: int
    sentinel: bool = True
    fill_is_row: bool = False

    @property
    def sharded(self) -> bool:
        """Whether objects are shards of blocks."""
        return self.block is not None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, e.g. (height, width, channel)."""
        return self.shape[2:] if self.views else self.shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, not compressed."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows of a block; of the whole object where there are no blocks."""
        return self.block[1] if self.block else self.shard_rows

    @property
    def shard_rows(self) -> int:
        """Rows of an object."""
        return self.chunk[1] if self.views else self.chunk[0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block."""
        return self.block_rows * self.row_bytes

    @property
    def blocks_per_shard(self) -> int:
        """Entries in a shard's index; 1 where there are no blocks."""
        return self.shard_rows // self.block_rows

    @property
    def num_shards(self) -> int:
        """Objects per view."""
        return -(-self.rows // self.shard_rows)

    @property
    def num_views(self) -> int:
        """Views; 1 for arrays without a view axis."""
        return self.views or 1

    def shard_span(self, shard: int) -> tuple[int, int]:
        """Real rows [start, stop) of a shard."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def real_blocks(self, shard: int) -> int:
        """Blocks of a shard that hold at least one real row; the others are absent."""
        start, stop = self.shard_span(shard)
        return -(-(stop - start) // self.block_rows)

    def key(self, view: int, shard: int) -> str:
        """Object key below the array, e.g. ``c/0/3/0/0/0``.

        Raises:
            IndexError: there is no such view or shard.
        """
        if not (0 <= view < self.num_views and 0 <= shard < self.num_shards):
            raise IndexError(
                f"{self.name}: no shard {shard} of view {view} (has {self.num_shards} of {self.num_views})"
            )
        head = [view, shard] if self.views else [shard]
        return "/".join(["c", *map(str, head), *["0"] * (len(self.shape) - len(head))])

    def locate(self, key: str) -> tuple[int, int]:
        """(view, shard) of an object key.

        Raises:
            IndexError: not a key of this array, in the one spelling `key` gives it.
        """
        parts = key.split("/") if len(key) <= _MAX_KEY else []
        with contextlib.suppress(ValueError, IndexError):
            view, shard = (int(parts[1]), int(parts[2])) if self.views else (0, int(parts[1]))
            if self.key(view, shard) == key:  # whatever else `int` takes for a number is spelled otherwise
                return view, shard
        raise IndexError(f"{self.name}: {key!r} is not an object of this array")

    def zarr_metadata(self) -> dict[str, Any]:
        """The content of the array's `zarr.json`."""
        coded: list[dict[str, Any]] = [_BYTES, _CRC]
        if self.compression == "zstd":
            coded = [_BYTES, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}}]
        codecs = coded
        if self.block is not None:
            sharding = {
                "chunk_shape": list(self.block),
                "codecs": coded,
                "index_codecs": [_BYTES, _CRC],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if math.isnan(self.fill) else int(self.fill),
            "codecs": codecs,
            "dimension_names": list(self.dims),
            "storage_transformers": [],
            "attributes": {},
        }


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a group's `zarr.json`."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def block_rows_for(row_bytes: int, granule: int) -> int:
    """Rows per block: the most that keep it within 8 MiB, a power of two and at least 1.

    No more than the plan's ``granule``: later passes move granules, and a block must not lie in two of them.
    """
    rows = granule
    while rows > 1 and rows * row_bytes > MAX_BLOCK_BYTES:
        rows //= 2
    return rows


def shard_rows_for(row_bytes: int, block_rows: int, shard_bytes: int) -> int:
    """Rows per shard: the largest power-of-two multiple of ``block_rows`` within ``shard_bytes`` and 1024 rows.

    At least one block.
    """
    rows = block_rows
    while 2 * rows <= MAX_SHARD_ROWS and 2 * rows * row_bytes <= shard_bytes:
        rows *= 2
    return rows


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of a cache by its path below the root, in the order they should be written."""
    specs: dict[str, ArraySpec] = {}
    views, rows = manifest.views, manifest.num_rows

    def small(
        name: str, shape: tuple[int, ...], dtype: str, fill: float, dims: tuple[str, ...], *, per_view: bool
    ) -> None:
        chunk = (1, *shape[1:]) if per_view else shape
        specs[name] = ArraySpec(
            name=name,
            shape=shape,
            dtype=np.dtype(dtype),
            fill=fill,
            chunk=chunk,
            block=None,
            compression="none",
            dims=dims,
            views=views if per_view else 0,
            rows=shape[1] if per_view else shape[0],
        )

    def sharded(
        name: str,
        row: tuple[int, ...],
        dtype: str,
        compression: Compression,
        *,
        second: str = "token",
        sentinel: bool = True,
        fill_is_row: bool = False,
    ) -> None:
        kind = np.dtype(dtype)
        fill = math.nan if kind.kind == "f" else 2 ** (8 * kind.itemsize) - 1
        row_bytes = math.prod(row) * kind.itemsize
        per_block = block_rows_for(row_bytes, manifest.plan.granule)
        per_shard = shard_rows_for(row_bytes, per_block, manifest.shard_bytes)
        padded = -(-rows // per_shard) * per_shard
        dims = (
            "view",
            "row",
            *{3: ("height", "width", "channel"), 2: (second, "channel"), 1: ("channel",), 0: ()}[len(row)],
        )
        specs[name] = ArraySpec(
            name=name,
            shape=(views, padded, *row),
            dtype=kind,
            fill=fill,
            chunk=(1, per_shard, *row),
            block=(1, per_block, *row),
            compression=compression,
            dims=dims,
            views=views,
            rows=rows,
            sentinel=sentinel,
            fill_is_row=fill_is_row,
        )

    samples = (manifest.dataset.num_labels,)
    small(names.ORDER, (views, rows), "<u4", 2**32 - 1, ("view", "row"), per_view=True)
    small(names.WINDOW, (views, rows, 4), "<i4", -(2**31), ("view", "row", "box"), per_view=True)
    small(names.FLIP, (views, rows), "<u1", 0xFF, ("view", "row"), per_view=True)
    if manifest.plan.operations is not None:
        slots, numbers = manifest.plan.operations.slots, manifest.plan.operations.parameters
        if slots:
            small(names.STEPS, (views, rows, slots), "<u1", 0xFF, ("view", "row", "step"), per_view=True)
            shape = (views, rows, slots, numbers)
            small(names.PARAMETERS, shape, "<f4", math.nan, ("view", "row", "step", "number"), per_view=True)
        if manifest.plan.operations.mixed:
            small(names.WEIGHT, (views, rows), "<f4", math.nan, ("view", "row"), per_view=True)
            small(names.BOX, (views, rows, 4), "<i4", -(2**31), ("view", "row", "box"), per_view=True)
    small(names.LABEL, samples, "<i4", -(2**31), ("sample",), per_view=False)
    small(names.CONTENT, samples, "<u8", 2**64 - 1, ("sample",), per_view=False)
    sharded(names.SUMS, (), "<u4", "none")
    for teacher in manifest.teachers.values():
        for tap in teacher.taps.values():
            codec = CODECS[tap.codec]
            channels = packed_channels(tap.channels, tap.codec)
            dtype = "<u1" if codec.quantized else f"<f{codec.bits // 8}"
            small(
                names.scale(teacher.name, tap.name),
                (2, tap.channels),
                "<f4",
                math.nan,
                ("offset-step", "channel"),
                per_view=False,
            )
            if tap.factor is not None:
                small(
                    names.weights(teacher.name, tap.name),
                    (tap.factor.num_weights,),
                    "<f4",
                    math.nan,
                    ("weight",),
                    per_view=False,
                )
            second = "token" if tap.sample is None else "position"
            parts = len(codec.parts) > 1
            codes = names.codes(teacher.name, tap.name)
            sharded(codes, (*tap.stored[1:], channels), dtype, tap.compression, second=second, fill_is_row=parts)
    if manifest.images == "stored":
        side = manifest.plan.size
        sharded(names.PIXELS, (side, side, 3), "<u1", "none", sentinel=False)
    return specs


def unit_rows(specs: dict[str, ArraySpec]) -> int:
    """Rows that hold whole shards of every sharded array: the unit in which rows are divided among writers.

    Every ``shard_rows`` is a power of two, so the largest is a multiple of all.
    """
    return max((spec.shard_rows for spec in specs.values() if spec.sharded), default=1)
