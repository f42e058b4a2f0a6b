"""Loading tiles of maps and codes: what the kernels of several operations share.

Legend: B batch, R = H * W pixels of a sample, C channels. A tile is [ROWS, BLOCK_C]: pixels by channels.

Stored codes are [B, R, C]. A float map is either [B, R, C] in memory (channels-last: SPATIAL_FIRST is False) or
[B, C, R]. When all maps of a call are channels-last the batch is one image of B * R pixels (IMAGE_ROWS is 0, their
number a run-time argument: the last batch of an epoch compiles nothing new). Otherwise tiles stay inside a sample of
IMAGE_ROWS pixels, a constant so that the compiler knows how rows are aligned, and one operand's tile is transposed in
shared memory.

Masked lanes read 0, and 0 is not neutral after an affine map (it becomes the offset): callers mask again afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(rows, C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Where this program's SPAN rows are.

    Returns:
        the rows that exist from its first on (at most SPAN), its first row relative to what the next two point at, and
        the int64 starts of that in maps and in stored codes.
    """
    if IMAGE_ROWS == 0:
        start = tl.program_id(0).to(tl.int64) * SPAN
        left = tl.minimum(rows - start, SPAN).to(tl.int32)
        first = 0
    else:
        chunks: tl.constexpr = (IMAGE_ROWS + SPAN - 1) // SPAN
        image = tl.program_id(0) // chunks
        first = (tl.program_id(0) - image * chunks) * SPAN
        left = tl.minimum(IMAGE_ROWS - first, SPAN)
        start = image.to(tl.int64) * IMAGE_ROWS
    return left, first, start * C, start * PACKED


@triton.jit
def map_offsets(row, c, C: tl.constexpr, IMAGE_ROWS: tl.constexpr, SPATIAL_FIRST: tl.constexpr):
    """int32 [ROWS, BLOCK_C] offsets of a float map."""
    return row[:, None] + c[None, :] * IMAGE_ROWS if SPATIAL_FIRST else row[:, None] * C + c[None, :]


@triton.jit
def inside(row_ok, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mask of a tile: constant along the channels wherever the block divides them, or accesses are one element wide."""
    return row_ok[:, None] if C % BLOCK_C == 0 else row_ok[:, None] & (c < C)[None, :]


@triton.jit
def channel_values(ptr, c, c_ok):
    """fp32 [BLOCK_C] of a per-channel vector; 0 beyond the last channel."""
    return tl.load(ptr + c, mask=c_ok, other=0.0).to(tl.float32)


@triton.jit
def load_stored(
    ptr,  # [B, R, C], [B, C, R] or codes [B, R, PACKED]
    row,  # [ROWS]
    row_ok,  # [ROWS]
    c0,  # first channel
    C: tl.constexpr,  # channels
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    BLOCK_C: tl.constexpr,  # channels per tile
    CODEC: tl.constexpr,  # of codes, or "float"
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """A tile as it is stored: codes [ROWS, BLOCK_C], values in their dtype, or the bytes of packed codes.

    These are [ROWS, BLOCK_C / 2] of u4; of u6 and u5 a tuple of them and of [ROWS, BLOCK_C / 4 or 8].

    Loading apart from converting lets a kernel ask for the next tile before it works on this one.
    """
    if CODEC == "u6":
        stored = (
            _load_part(ptr, row, row_ok, c0, C, (C + 1) // 2 + (C + 3) // 4, 0, 2, BLOCK_C),
            _load_part(ptr, row, row_ok, c0, C, (C + 1) // 2 + (C + 3) // 4, (C + 1) // 2, 4, BLOCK_C),
        )
    elif CODEC == "u5":
        stored = (
            _load_part(ptr, row, row_ok, c0, C, (C + 1) // 2 + (C + 7) // 8, 0, 2, BLOCK_C),
            _load_part(ptr, row, row_ok, c0, C, (C + 1) // 2 + (C + 7) // 8, (C + 1) // 2, 8, BLOCK_C),
        )
    elif CODEC == "u4":
        stored = _load_part(ptr, row, row_ok, c0, C, (C + 1) // 2, 0, 2, BLOCK_C)
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        offsets = map_offsets(row, c, C, IMAGE_ROWS, SPATIAL_FIRST)
        stored = tl.load(ptr + offsets, mask=inside(row_ok, c, C, BLOCK_C), other=0)
    return stored


@triton.jit
def _load_part(
    ptr,  # codes [B, R, PACKED]
    row,  # [ROWS]
    row_ok,  # [ROWS]
    c0,  # first channel
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # bytes of a pixel
    START: tl.constexpr,  # first byte of the part
    EACH: tl.constexpr,  # codes per byte
    BLOCK_C: tl.constexpr,  # channels per tile
):
    """uint8 [ROWS, BLOCK_C / EACH] of one part of packed codes."""
    at = c0 // EACH + tl.arange(0, BLOCK_C // EACH)
    offsets = row[:, None] * PACKED + (START + at)[None, :]
    return tl.load(ptr + offsets, mask=inside(row_ok, EACH * at, C, BLOCK_C), other=0)


@triton.jit
def split_parts(stored, CODEC: tl.constexpr):
    """A stored tile as two variables, since no loop carries a tuple along; the second is 0 where there is one part."""
    return stored if CODEC == "u6" or CODEC == "u5" else (stored, tl.full((), 0, tl.int32))


@triton.jit
def join_parts(stored, second, CODEC: tl.constexpr):
    """The inverse of `split_parts`."""
    return (stored, second) if CODEC == "u6" or CODEC == "u5" else stored


@triton.jit
def values(stored, offset_C, step_C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CODEC: tl.constexpr):
    """fp32 [ROWS, BLOCK_C] of a stored tile: offset + step * code, or the values themselves."""
    if CODEC == "float":
        value = stored.to(tl.float32)
    else:
        if CODEC == "u6":
            code = _spread(stored[0], 2, ROWS, BLOCK_C) | (_spread(stored[1], 4, ROWS, BLOCK_C) << 4)
        elif CODEC == "u5":
            code = _spread(stored[0], 2, ROWS, BLOCK_C) | (_spread(stored[1], 8, ROWS, BLOCK_C) << 4)
        elif CODEC == "u4":
            code = _spread(stored, 2, ROWS, BLOCK_C)
        else:
            code = stored
        value = code.to(tl.float32) * step_C[None, :] + offset_C[None, :]
    return value


@triton.jit
def _spread(part, EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """uint8 [ROWS, BLOCK_C] of bytes [ROWS, BLOCK_C / EACH] that hold so many numbers each, the lowest bits first."""
    x = tl.reshape(tl.join(part & 15, part >> 4), (ROWS, 2 * BLOCK_C // EACH))
    if EACH >= 4:
        x = tl.reshape(tl.join(x & 3, x >> 2), (ROWS, 4 * BLOCK_C // EACH))
    if EACH == 8:
        x = tl.reshape(tl.join(x & 1, x >> 1), (ROWS, BLOCK_C))
    return x


@triton.jit
def gather(digits, EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inverse of `_spread`, of int32 [ROWS, BLOCK_C]: the lowest bits, above which 8 are 0, and then anything."""
    BITS: tl.constexpr = 8 // EACH
    low, high = tl.split(tl.reshape(digits, (ROWS, BLOCK_C // 2, 2)))
    x = low + (high << BITS)
    if EACH >= 4:
        low, high = tl.split(tl.reshape(x, (ROWS, BLOCK_C // 4, 2)))
        x = low + (high << 2 * BITS)
    if EACH == 8:
        low, high = tl.split(tl.reshape(x, (ROWS, BLOCK_C // 8, 2)))
        x = low + (high << 4)
    return x.to(tl.uint8)
