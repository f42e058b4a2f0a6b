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
    CODEC: tl.constexpr,  # "u8", "u4" or "float"
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """A tile as it is stored: codes [ROWS, BLOCK_C], bytes of two codes [ROWS, BLOCK_C / 2], or values in their dtype.

    Loading apart from converting lets a kernel ask for the next tile before it works on this one.
    """
    if CODEC == "u4":
        pair = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        offsets = row[:, None] * ((C + 1) // 2) + pair[None, :]
        ok = inside(row_ok, 2 * pair, C, BLOCK_C)
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        offsets = map_offsets(row, c, C, IMAGE_ROWS, SPATIAL_FIRST)
        ok = inside(row_ok, c, C, BLOCK_C)
    return tl.load(ptr + offsets, mask=ok, other=0)


@triton.jit
def values(stored, offset_C, step_C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CODEC: tl.constexpr):
    """fp32 [ROWS, BLOCK_C] of a stored tile: offset + step * code, or the values themselves."""
    if CODEC == "float":
        value = stored.to(tl.float32)
    elif CODEC == "u4":
        code = tl.reshape(tl.join(stored & 15, stored >> 4), (ROWS, BLOCK_C))
        value = code.to(tl.float32) * step_C[None, :] + offset_C[None, :]
    else:
        value = stored.to(tl.float32) * step_C[None, :] + offset_C[None, :]
    return value
