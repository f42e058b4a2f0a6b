"""From the rows of a shard to the bytes of its object.

The rows are gathered in one buffer; encoding checks each block for values that would read as missing, compresses or
checksums it, and returns the object as a list of buffers to be written one after another. Raw blocks are never
copied: their buffers are views of the gathered rows, with four bytes of crc32c between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feedfast.errors import FeedfastError
from feedfast.storage.blocks import compress_block, crc32c, crc_bytes, index_bytes
from feedfast.storage.layout import ArraySpec

Array = npt.NDArray[Any]


@dataclass(slots=True)
class ShardBuffer:
    """A shard being gathered: ``rows`` [shard_rows, ...] is filled up to ``filled``."""

    spec: ArraySpec
    view: int
    shard: int
    rows: Array
    filled: int = 0
    saturated: int = 0


def holds_fill(spec: ArraySpec, values: Array) -> bool:
    """Whether any value is the fill value (or row, where ``spec`` says so); for floats, whether any is not finite."""
    if values.size == 0 or not spec.sentinel:
        return False
    if values.dtype.kind == "f":
        bits = np.ascontiguousarray(values).view(f"<u{values.dtype.itemsize}")
        sign = bits.dtype.type(1 << (8 * values.dtype.itemsize - 1))
        infinity = np.array(np.inf, values.dtype).view(bits.dtype)
        return bool((bits & ~sign).max() >= infinity)
    if spec.fill_is_row:
        return bool(values.reshape(-1, spec.row_bytes).min(axis=1).max() == spec.fill)
    # not values.max(): a row at a time is checked, and the method takes longer than a small row
    extreme = (np.minimum if spec.fill < 0 else np.maximum).reduce(values, axis=None)
    return bool(extreme == spec.fill)


def block_sums(spec: ArraySpec, parts: list[Any]) -> tuple[str, ...]:
    """The last four bytes of each block of an object about to be written, in hex; see `feedfast.storage.log`."""
    ends = [part[-4:] for part in parts[:-1]] if spec.compression == "zstd" else parts[1::2]
    return tuple(bytes(end).hex() for end in ends)


def encode_shard(shard: ShardBuffer) -> list[Any]:
    """The buffers of a shard's object, laid end to end: stored blocks, then the index.

    Raises:
        FeedfastError: a real row holds the fill value.
    """
    spec, step = shard.spec, shard.spec.block_rows
    blocks = spec.real_blocks(shard.shard)
    shard.rows[shard.filled : blocks * step] = spec.fill
    parts: list[Any] = []
    lengths: list[int | None] = [None] * spec.blocks_per_shard
    for number in range(blocks):
        block = shard.rows[number * step : (number + 1) * step]
        real = block[: shard.filled - number * step]
        if holds_fill(spec, real):
            first = spec.shard_span(shard.shard)[0] + number * step
            what = "values that are not finite" if spec.dtype.kind == "f" else f"the fill value {spec.fill:.0f}"
            what = f"a row of {what} alone" if spec.fill_is_row else what
            raise FeedfastError(
                f"{spec.name}: view {shard.view}, rows {first}..{first + len(real)}: found {what}; nothing was stored"
            )
        data = block.reshape(-1).view(np.uint8)
        if spec.compression == "zstd":
            parts.append(compress_block(data, "zstd"))
            lengths[number] = len(parts[-1])
        else:
            parts += [data, crc_bytes(crc32c(data))]
            lengths[number] = data.nbytes + 4
    return [*parts, index_bytes(lengths)]
