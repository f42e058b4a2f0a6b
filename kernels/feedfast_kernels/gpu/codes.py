"""Codes from floats and back: one read of the map and one write, 3 bytes per element from bf16 to u8.

    q = (max(x, margin) - offset) / step, correctly rounded;   code = q rounded to even, clipped to 0..top

Legend: R pixels of an image, C channels; a tile is [ROWS, BLOCK_C], STEPS of them per program. In a channels-last map
FOLD pixels are one row of FOLD * C values, so that narrow maps have tiles as wide as others. A contiguous NCHW map is
read along its pixels and transposed in shared memory when it is bytes.

The codes must be those that a CPU computes, because a cache may be written on one machine and continued on another.
All the difficulty is at the ties: a value half-way between two codes goes to the even one, so the quotient must have
the bits of a true division there (see `_encode`).
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, dense, memory_format_of
from feedfast_kernels.codes import CodecName, top_code
from feedfast_kernels.gpu.launch import PER_THREAD, THREADS, Launch, ceil_div, channel_block
from feedfast_kernels.gpu.tile import channel_values, gather, inside, load_stored, map_offsets, place, values

MOST_CHANNELS = 256  # of a tile
MOST_STEPS = 4  # tiles per program, to encode; 8 need more registers than there are
FEW_TILES = 1024  # below this, one tile per program: fewer would leave multiprocessors idle
MAGIC: tl.constexpr = tl.constexpr(1.5 * 2**23)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _fused(x, y, z, FUSED: tl.constexpr):
    """x * y + z, rounded once."""
    if FUSED:
        result = tl.fma(x, y, z)
    else:  # the interpreter's fma rounds twice: here the product is exact, and the sum rounded to odd keeps fp32 right
        product, addend = x.to(tl.float64) * y.to(tl.float64), z.to(tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        toward = tl.where((error > 0) == (total > 0), 1, -1)
        bits = tl.where((error == error) & (error != 0) & (bits % 2 == 0), bits + toward, bits)
        result = bits.to(tl.float64, bitcast=True).to(tl.float32)
    return result


@triton.jit
def _encode(
    x_ptr,  # [B, R, C] or [B, C, R]
    offset_ptr,  # [C]
    step_ptr,  # [C]
    margin_ptr,  # [C], or None
    codes_ptr,  # [B, R, PACKED]
    partial_ptr,  # [programs], values that saturated
    rows,  # pixels: B * R, or R where IMAGE_ROWS is not 0
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    FOLD: tl.constexpr,  # pixels per row of a tile
    TOP: tl.constexpr,  # largest code
    CODEC: tl.constexpr,  # of the codes
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    FUSED: tl.constexpr,  # the hardware has an fma
):
    left, first, map_start, code_start = place(rows, C, PACKED, IMAGE_ROWS, ROWS * STEPS * FOLD)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    channel = c % C if FOLD > 1 else c
    offset_C = channel_values(offset_ptr, channel, channel < C)
    step_C = channel_values(step_ptr, channel, channel < C)
    margin_C = channel_values(offset_ptr if margin_ptr is None else margin_ptr, channel, channel < C)
    # for the proof below nothing may underflow: steps below 2^-64 are scaled up by a power of two together
    # with what they divide. With an offset of 2^60 a difference is 0 or more than 2^36, which saturates however roughly
    # it is divided. Steps above 2^126, whose inverse is subnormal, are not proven.
    small = (step_C < 2.0**-64) & (step_C != 0) & (tl.abs(offset_C) < 2.0**60)
    scale_C = tl.where(small, 2.0**64, 1.0)
    shift_C = -offset_C * scale_C
    step_C *= scale_C
    # finite, for 0 * infinity is no code; 0 where the step is, and so are all codes of the channel
    inverse_C = tl.minimum(tl.div_rn(1.0, tl.where(step_C == 0, 1.0, step_C)), LARGEST)
    inverse_C = tl.where(step_C == 0, 0.0, inverse_C)
    saturated = tl.zeros((ROWS, BLOCK_C), tl.int32)
    for i in tl.static_range(STEPS):
        ahead = i * ROWS + tl.arange(0, ROWS)
        row, row_ok = first + ahead, ahead < left
        offsets = map_offsets(row, c, C * FOLD, IMAGE_ROWS, SPATIAL_FIRST)
        # left * C is a multiple of what C is one of, so the mask is constant over what a thread loads
        ok = offsets < left * C if FOLD > 1 else inside(row_ok, c, C, BLOCK_C)
        value = tl.load(x_ptr + map_start + offsets, mask=ok, other=0.0).to(tl.float32)
        if margin_ptr is not None:
            value = tl.maximum(value, margin_C[None, :], propagate_nan=tl.PropagateNan.ALL)
        a = tl.fma(value, scale_C[None, :], shift_C[None, :])  # (value - offset) * scale: powers of two are exact
        # A division per element would cost 12 instructions more (28 against 19 on sm_90), and at 3 bytes per element an
        # H200 has about 23 before they, and not the memory, set the pace. So, with q0 = a * inverse and the exact
        # remainder r = a - q0 * step, q = q0 + r * inverse (Markstein, "Computation of elementary functions on the IBM
        # RISC System/6000 processor", 1990). It can differ from the rounded quotient only where a / step lies within
        # 3 * 2^-24 ulp of the midpoint of two floats, and a code only if one of the two is a tie. That leaves a few
        # thousand pairs of mantissas, and test_codes_kernel.py computes every one of them. The inverse must be the
        # correctly rounded one: off by one ulp, about 100 of the pairs fail. The minimum is there because an infinite
        # q0 would make q NaN, which is what is left of minus infinity: code 0, counted.
        q = tl.minimum(a * inverse_C[None, :], TOP + 1.0)
        remainder = _fused(-q, step_C[None, :], a, FUSED)
        q = _fused(remainder, inverse_C[None, :], q, FUSED)
        # ends that round inwards keep the lowest byte in range and say what saturated: whatever the clip changed, and
        # NaN, which differs from everything
        clipped = tl.minimum(tl.maximum(q, -0.5), TOP + 0.5)
        saturated += ((clipped != q) & ok).to(tl.int32)  # masked lanes are no zeros: 0 - offset may saturate
        # the sum has no bits left for a fraction, is rounded to even by the hardware, and its lowest byte is the code
        code = (clipped + MAGIC).to(tl.int32, bitcast=True)
        if CODEC == "u8":
            tl.store(codes_ptr + code_start + map_offsets(row, c, C * FOLD, 0, False), code.to(tl.uint8), mask=ok)
        else:
            into = codes_ptr + code_start
            lower = code if CODEC == "u4" else code & 15
            _store_part(into, lower, row, row_ok, left, c0, 0, 2, C, PACKED, ROWS, BLOCK_C, FOLD)
            if CODEC == "u6":
                _store_part(into, code >> 4, row, row_ok, left, c0, (C + 1) // 2, 4, C, PACKED, ROWS, BLOCK_C, FOLD)
            if CODEC == "u5":
                _store_part(into, code >> 4, row, row_ok, left, c0, (C + 1) // 2, 8, C, PACKED, ROWS, BLOCK_C, FOLD)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + program, tl.sum(saturated))


@triton.jit
def _store_part(
    codes_ptr,  # [R, PACKED]
    digits,  # int32 [ROWS, BLOCK_C]
    row,
    row_ok,
    left,  # pixels that exist
    c0,
    START: tl.constexpr,  # first byte of the part in a pixel
    EACH: tl.constexpr,  # codes per byte
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    FOLD: tl.constexpr,  # pixels per row of a tile
):
    """Store one part of packed codes. Channels past the last have a step of 0, and so leave 0 in the last byte."""
    at = c0 // EACH + tl.arange(0, BLOCK_C // EACH)
    if FOLD == 1:
        offsets = row[:, None] * PACKED + (START + at)[None, :]
        ok = inside(row_ok, EACH * at, C, BLOCK_C)
    elif PACKED * EACH == C:  # one part: pixels side by side are one row of it
        offsets = map_offsets(row, at, PACKED * FOLD, 0, False)
        ok = offsets < left * PACKED
    else:
        pixel = row[:, None] * FOLD + (at // (C // EACH))[None, :]
        offsets = pixel * PACKED + (START + at % (C // EACH))[None, :]
        ok = pixel < left
    tl.store(codes_ptr + offsets, gather(digits, EACH, ROWS, BLOCK_C), mask=ok)


@triton.jit
def _decode(
    codes_ptr,  # [B, R, PACKED]
    offset_ptr,  # [C]
    step_ptr,  # [C]
    values_ptr,  # [B, R, C]
    rows,  # pixels: B * R, or R where IMAGE_ROWS is not 0
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of the codes
):
    left, first, map_start, code_start = place(rows, C, PACKED, 0, ROWS * STEPS)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    offset_C = channel_values(offset_ptr, c, c < C)
    step_C = channel_values(step_ptr, c, c < C)
    for i in tl.static_range(STEPS):
        ahead = i * ROWS + tl.arange(0, ROWS)
        row, row_ok = first + ahead, ahead < left
        stored = load_stored(codes_ptr + code_start, row, row_ok, c0, C, 0, BLOCK_C, CODEC, False)
        value = values(stored, offset_C, step_C, ROWS, BLOCK_C, CODEC)
        into = values_ptr + map_start + map_offsets(row, c, C, 0, False)
        tl.store(into, value.to(values_ptr.dtype.element_ty), mask=inside(row_ok, c, C, BLOCK_C))


def _tiling(rows: int, images: int, width: int, most_channels: int, most_steps: int) -> dict[str, int]:
    """Shape and number of a program's tiles."""
    block = channel_block(width, most_channels)
    lines = max(1, THREADS * PER_THREAD // block)
    steps = 1
    if images * ceil_div(rows, lines) * ceil_div(width, block) >= FEW_TILES:
        # what a program does before its first tile costs as much as a tile, and so does a tile outside the image
        steps = min(range(most_steps, 0, -1), key=lambda n: ceil_div(rows, lines * n) * (n + 1))
    return {"ROWS": lines, "BLOCK_C": block, "STEPS": steps}


def plan_encode(
    x: Tensor, offset_C: Tensor, step_C: Tensor, codec: CodecName, margin_C: Tensor | None, out: Tensor
) -> tuple[Launch, Tensor]:
    """The launch that writes ``out``, and the int32 count of saturated values of each program.

    Args:
        x: [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C]; not empty.
        offset_C: fp32 [C], contiguous.
        step_C: fp32 [C], contiguous.
        codec: ``"u8"``, ``"u6"``, ``"u5"`` or ``"u4"``.
        margin_C: float [C], contiguous, or None.
        out: contiguous uint8 [B, H, W, C] or [B, C]; packed: `packed_channels`.
    """
    batch, channels = x.shape[:2]
    spatial_first = memory_format_of(x) == "contiguous"
    if spatial_first and x[:1].numel() >= 2**31:
        raise ValueError(f"encode: expected fewer than 2^31 values per sample in NCHW order, got {list(x.shape)}")
    pixels = x[0, 0].numel() if x.ndim == 4 else 1
    image_rows, images = (pixels, batch) if spatial_first else (batch * pixels, 1)
    # pixels side by side make a row as wide as a tile, whose threads then share the preparation of its channels
    foldable = not spatial_first and channels % 8 == 0
    fold = MOST_CHANNELS // gcd(channels, MOST_CHANNELS) if foldable else 1
    width = channels * fold
    most_channels = MOST_CHANNELS if not spatial_first else 32 if pixels > 64 else 64
    tile = _tiling(ceil_div(image_rows, fold), images, width, most_channels, MOST_STEPS)
    span = tile["ROWS"] * tile["STEPS"] * fold
    grid = (images * ceil_div(image_rows, span), ceil_div(width, tile["BLOCK_C"]))
    partial = torch.empty(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    arguments = {
        "x_ptr": x,
        "offset_ptr": offset_C,
        "step_ptr": step_C,
        "margin_ptr": margin_C,
        "codes_ptr": out,
        "partial_ptr": partial,
        "rows": image_rows,
    }
    constants = {
        "C": channels,
        "PACKED": out.shape[-1],
        "IMAGE_ROWS": pixels if spatial_first else 0,
        "FOLD": fold,
        "TOP": top_code(codec),
        "CODEC": codec,
        "SPATIAL_FIRST": spatial_first,
        "FUSED": x.device.type != "cpu",
        **tile,
    }
    return Launch(_encode, grid, arguments, constants), partial


def encode(
    x: Tensor, offset_C: Tensor, step_C: Tensor, codec: CodecName, margin_C: Tensor | None, out: Tensor
) -> Tensor:
    """Write the codes of ``x`` into the contiguous ``out``; returns the saturation count, an int64 scalar."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    vectors = offset_C.contiguous(), step_C.contiguous(), codec, contiguous(margin_C)
    launch, partial = plan_encode(dense(x), *vectors, out)
    launch.run()
    return partial.sum()


def plan_decode(data: Tensor, offset_C: Tensor, step_C: Tensor, codec: CodecName, values: Tensor) -> Launch:
    """The launch that writes ``values``.

    Args:
        data: contiguous codes [B, H, W, C] or [B, C]; packed: `packed_channels`; not empty.
        offset_C: fp32 [C], contiguous.
        step_C: fp32 [C], contiguous.
        codec: ``"u8"``, ``"u6"``, ``"u5"`` or ``"u4"``.
        values: contiguous float [B, H, W, C] or [B, C].
    """
    channels = values.shape[-1]
    rows = values.numel() // channels
    tile = _tiling(rows, 1, channels, MOST_CHANNELS, 2)
    grid = (ceil_div(rows, tile["ROWS"] * tile["STEPS"]), ceil_div(channels, tile["BLOCK_C"]))
    arguments = {"codes_ptr": data, "offset_ptr": offset_C, "step_ptr": step_C, "values_ptr": values, "rows": rows}
    constants = {"C": channels, "PACKED": data.shape[-1], "CODEC": codec, **tile}
    return Launch(_decode, grid, arguments, constants)


def decode(data: Tensor, offset_C: Tensor, step_C: Tensor, codec: CodecName, dtype: torch.dtype) -> Tensor:
    """offset + step * code in the order of the codes, [B, H, W, C] or [B, C]."""
    values = torch.empty((*data.shape[:-1], offset_C.shape[0]), dtype=dtype, device=data.device)
    if values.numel():
        plan_decode(data.contiguous(), offset_C.contiguous(), step_C.contiguous(), codec, values).run()
    return values
