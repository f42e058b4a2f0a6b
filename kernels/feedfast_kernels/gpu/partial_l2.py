"""Partial L2 against codes: one read of the student and of the codes forward, one more and one write backward.

    t = max(offset + step * code, margin);   d = 0 where s <= t and t <= 0, else s - t;   loss = scale * sum of d^2

Legend: R pixels of an image, C channels; a tile is [ROWS, BLOCK_C]. STEPS tiles follow each other in a program, so that
a thread loads its channels' offset, step and margin once for all of them.

Bytes per element, bf16 student and u8 codes: forward 2 + 1, backward 2 + 1 + 2. Backward computes d again instead of
reading a stored gradient.

At P positions of a map the codes are [B, P, C], tiles stay inside a sample, and rows of the student's channels are
gathered (of an NCHW student single values). Backward writes those, which are distinct, into a gradient of zeros.

Every program writes one fp32 partial sum, and one more kernel adds those up: no atomics, so two runs are bit-equal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, dense, dense_target, memory_format_of
from feedfast_kernels.codes import StoredAs, packed_channels
from feedfast_kernels.gpu.launch import PER_THREAD, THREADS, Launch, ceil_div, channel_block, power_of_two
from feedfast_kernels.gpu.tile import channel_values, inside, load_stored, map_offsets, place, values

MOST_CHANNELS = 256  # of a tile
STEPS = 4  # tiles per program, where there are enough of them
FEW_TILES = 8192  # below this, one tile per program: a GPU of 132 multiprocessors is not full yet


@triton.jit
def _rows(
    positions_ptr,  # [R] of the sample, or None
    row,  # [ROWS], of the target
    row_ok,  # [ROWS]
):
    """The student's rows that the target's belong to."""
    if positions_ptr is not None:
        row = tl.load(positions_ptr + row, mask=row_ok, other=0).to(tl.int32)
    return row


@triton.jit
def _load(
    student_ptr,  # [B, S, C] or [B, C, S]
    target_ptr,  # codes [B, R, PACKED], or floats [B, R, C] or [B, C, R]
    positions_ptr,  # [R] of the sample, or None: S = R
    first,
    left,
    number,
    c0,
    C: tl.constexpr,  # channels
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    STUDENT_ROWS: tl.constexpr,  # S likewise
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, S] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """Tile `number` of the program, as stored: student and target."""
    ahead = number * ROWS + tl.arange(0, ROWS)
    row, row_ok = first + ahead, ahead < left
    here = _rows(positions_ptr, row, row_ok)
    s = load_stored(student_ptr, here, row_ok, c0, C, STUDENT_ROWS, BLOCK_C, "float", STUDENT_SPATIAL_FIRST)
    t = load_stored(target_ptr, row, row_ok, c0, C, IMAGE_ROWS, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST)
    return s, t


@triton.jit
def _residual(s, t, margin_C, ok, HAS_MARGIN: tl.constexpr):
    """d [ROWS, BLOCK_C] in fp32, 0 outside the map."""
    if HAS_MARGIN:
        t = tl.maximum(t, margin_C[None, :], propagate_nan=tl.PropagateNan.ALL)
    # `<=`, so that a NaN of the student compares false, survives, and is seen in the loss
    dead = (s <= t) & (t <= 0)
    return tl.where(ok & ~dead, s - t, 0.0)


@triton.jit
def _forward(
    student_ptr,  # [B, S, C] or [B, C, S]
    target_ptr,  # codes [B, R, PACKED], or floats [B, R, C] or [B, C, R]
    positions_ptr,  # [B, R], rows of the student's sample, or None: S = R
    offset_ptr,  # [C], None with float targets
    step_ptr,  # [C], None with float targets
    margin_ptr,  # [C], or None
    partial_ptr,  # [programs]
    rows,  # pixels: B * R, or R where IMAGE_ROWS is not 0
    scale,  # weight / denominator
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    STUDENT_ROWS: tl.constexpr,  # S likewise
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, S] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    left, first, map_start, code_start = place(rows, C, PACKED, IMAGE_ROWS, ROWS * STEPS)
    student_start = map_start
    if positions_ptr is not None:
        positions_ptr += map_start // C
        # times the channels last: the compiler then knows that a row is aligned
        student_start = map_start // (IMAGE_ROWS * C) * (STUDENT_ROWS * C)
    student_ptr += student_start
    target_ptr += code_start if CODEC != "float" else map_start
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    next_s, next_t = _load(
        student_ptr, target_ptr, positions_ptr, first, left, 0, c0,
        C, IMAGE_ROWS, STUDENT_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
    margin_C = channel_values(margin_ptr, c, c < C) if margin_ptr is not None else 0.0
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.static_range(STEPS):
        s, t = next_s, next_t
        if i + 1 < STEPS:
            next_s, next_t = _load(
                student_ptr, target_ptr, positions_ptr, first, left, i + 1, c0,
                C, IMAGE_ROWS, STUDENT_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
        ok = inside(i * ROWS + tl.arange(0, ROWS) < left, c, C, BLOCK_C)
        t = values(t, offset_C, step_C, ROWS, BLOCK_C, CODEC)
        d = _residual(s.to(tl.float32), t, margin_C, ok, margin_ptr is not None)
        total = tl.fma(d, d, total)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + program, tl.sum(total) * scale)


@triton.jit
def _backward(
    student_ptr,  # [B, S, C] or [B, C, S]
    target_ptr,  # codes [B, R, PACKED], or floats [B, R, C] or [B, C, R]
    positions_ptr,  # [B, R], rows of the student's sample, or None: S = R
    offset_ptr,  # [C], None with float targets
    step_ptr,  # [C], None with float targets
    margin_ptr,  # [C], or None
    grad_output_ptr,  # scalar
    gradient_ptr,  # like the student
    rows,  # pixels: B * R, or R where IMAGE_ROWS is not 0
    scale,  # weight / denominator
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    STUDENT_ROWS: tl.constexpr,  # S likewise
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, S] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    left, first, map_start, code_start = place(rows, C, PACKED, IMAGE_ROWS, ROWS * STEPS)
    student_start = map_start
    if positions_ptr is not None:
        positions_ptr += map_start // C
        # times the channels last: the compiler then knows that a row is aligned
        student_start = map_start // (IMAGE_ROWS * C) * (STUDENT_ROWS * C)
    student_ptr += student_start
    target_ptr += code_start if CODEC != "float" else map_start
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    next_s, next_t = _load(
        student_ptr, target_ptr, positions_ptr, first, left, 0, c0,
        C, IMAGE_ROWS, STUDENT_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
    margin_C = channel_values(margin_ptr, c, c < C) if margin_ptr is not None else 0.0
    factor = tl.load(grad_output_ptr).to(tl.float32) * (2 * scale)
    for i in tl.static_range(STEPS):
        s, t = next_s, next_t
        # before the store: the compiler must assume that a store changes what a later load reads
        if i + 1 < STEPS:
            next_s, next_t = _load(
                student_ptr, target_ptr, positions_ptr, first, left, i + 1, c0,
                C, IMAGE_ROWS, STUDENT_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
        ahead = i * ROWS + tl.arange(0, ROWS)
        ok = inside(ahead < left, c, C, BLOCK_C)
        t = values(t, offset_C, step_C, ROWS, BLOCK_C, CODEC)
        d = _residual(s.to(tl.float32), t, margin_C, ok, margin_ptr is not None)
        here = _rows(positions_ptr, first + ahead, ahead < left)
        offsets = map_offsets(here, c, C, STUDENT_ROWS, STUDENT_SPATIAL_FIRST)
        tl.store(gradient_ptr + student_start + offsets, d * factor, mask=ok)


def plan(
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: StoredAs,
    margin_C: Tensor | None,
    scale: float,
    positions: Tensor | None = None,
    grad_output: Tensor | None = None,
    gradient: Tensor | None = None,
) -> tuple[Launch, Tensor | None]:
    """The forward launch and its partial sums or, given ``grad_output`` and ``gradient``, the backward launch.

    Args:
        student: [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C].
        target: contiguous codes [B, H, W, C] (or [B, C]), or a float map like the student's, in either order.
        offset_C: fp32 [C], None for float maps.
        step_C: fp32 [C], None for float maps.
        codec: of codes, or ``"float"`` for a float map.
        margin_C: float [C], or None.
        scale: weight over denominator.
        positions: contiguous [B, P], or None; the target is then a map of one row, [B, 1, P, C] or [B, C, 1, P].
        grad_output: fp32 scalar on the device.
        gradient: to be written, in the student's memory format; zeros where there are positions.
    """
    batch, channels = student.shape[:2]
    student_spatial_first = memory_format_of(student) == "contiguous"
    target_spatial_first = codec == "float" and memory_format_of(target) == "contiguous"
    one_image = not student_spatial_first and not target_spatial_first and positions is None
    if not one_image and student[:1].numel() >= 2**31:
        raise ValueError(f"partial_l2: expected fewer than 2^31 values per sample in NCHW order, got {student.shape}")
    student_rows = student[0, 0].numel() if batch and student.ndim == 4 else 1
    pixels = student_rows if positions is None else positions.shape[1]
    image_rows, images = (batch * pixels, 1) if one_image else (pixels, batch)
    block_c = channel_block(channels, MOST_CHANNELS if not student_spatial_first else 32)
    rows = max(1, THREADS * PER_THREAD // block_c)
    if positions is not None:  # few: no lanes for rows that a sample does not have
        rows = min(rows, power_of_two(pixels))
    per_image = ceil_div(image_rows, rows)
    steps = STEPS if images * per_image * ceil_div(channels, block_c) >= FEW_TILES else 1
    if not one_image and per_image % steps:
        steps = 1
    grid = (images * ceil_div(image_rows, rows * steps), ceil_div(channels, block_c))
    arguments: dict[str, Any] = {"student_ptr": student, "target_ptr": target, "positions_ptr": positions}
    arguments |= {
        "offset_ptr": contiguous(offset_C),
        "step_ptr": contiguous(step_C),
        "margin_ptr": contiguous(margin_C),
    }
    constants = {
        "C": channels,
        "PACKED": packed_channels(channels, codec),
        "IMAGE_ROWS": 0 if one_image else pixels,
        "STUDENT_ROWS": 0 if one_image else student_rows,
        "ROWS": rows,
        "BLOCK_C": block_c,
        "STEPS": steps,
        "CODEC": codec,
        "STUDENT_SPATIAL_FIRST": student_spatial_first,
        "TARGET_SPATIAL_FIRST": target_spatial_first,
    }
    sizes = {"rows": image_rows, "scale": scale}
    if grad_output is not None and gradient is not None:
        arguments |= {"grad_output_ptr": grad_output, "gradient_ptr": gradient, **sizes}
        return Launch(_backward, grid, arguments, constants), None
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=student.device)
    return Launch(_forward, grid, arguments | {"partial_ptr": partial, **sizes}, constants), partial


def forward(
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: StoredAs,
    margin_C: Tensor | None,
    scale: float,
    positions: Tensor | None = None,
) -> Tensor:
    """scale * sum of d^2, an fp32 scalar."""
    if target.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=student.device)
    target, positions = _compact(target, codec, positions)
    launch, partial = plan(dense(student), target, offset_C, step_C, codec, margin_C, scale, positions)
    assert partial is not None
    launch.run()
    return partial.sum()


def backward(
    grad_output: Tensor,
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: StoredAs,
    margin_C: Tensor | None,
    scale: float,
    positions: Tensor | None = None,
) -> Tensor:
    """grad_output * 2 * scale * d, in the student's dtype and strides."""
    make = torch.empty_like if positions is None else torch.zeros_like
    gradient = make(student)
    if target.numel() == 0:
        return gradient
    target, positions = _compact(target, codec, positions)
    plain = dense(student)
    into = gradient if memory_format_of(gradient) == memory_format_of(plain) else make(plain)
    plan(plain, target, offset_C, step_C, codec, margin_C, scale, positions, grad_output, into)[0].run()
    return gradient if into is gradient else gradient.copy_(into)


def _compact(target: Tensor, codec: StoredAs, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `plan` takes: dense targets, of positions [B, C, P] or codes [B, P, C] as a map of one row."""
    if positions is not None:
        target = target.unsqueeze(2 if codec == "float" else 1)
    return dense_target(target, codec), None if positions is None else positions.contiguous()
