"""Partial L2 against codes: one read of the student and of the codes forward, one more and one write backward.

    t = max(offset + step * code, margin);   d = 0 where s <= t and t <= 0, else s - t;   loss = scale * sum of d^2

Legend: R pixels of an image, C channels; a tile is [ROWS, BLOCK_C]. STEPS tiles follow each other in a program, so that
a thread loads its channels' offset, step and margin once for all of them.

Bytes an element, bf16 student and u8 codes: forward 2 + 1, backward 2 + 1 + 2. Backward computes d again instead of
reading a stored gradient: a kept gradient costs 2 bytes to write, 2 to read, 2 to write back scaled, and 2 bytes of
memory from forward to backward. torch.compile keeps the mask as well and moves 10.

Every program writes one fp32 partial sum, and one more kernel adds those up: no atomics, so two runs are bit-equal.
`dead` is written with `<=` on purpose: a NaN of the student compares false, survives, and is seen in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, memory_order, ordered, ordered_target
from feedfast_kernels.codes import packed_channels
from feedfast_kernels.gpu.launch import PER_THREAD, THREADS, Launch, ceil_div, channel_block
from feedfast_kernels.gpu.tile import channel_values, inside, load_stored, map_offsets, place, values

MOST_CHANNELS = 256  # of a tile
STEPS = 4  # tiles a program, where there are enough of them
FEW_TILES = 8192  # below this, one tile a program: a GPU of 132 multiprocessors is not full yet


@triton.jit
def _load(
    student, target, first, left, step, c0,
    C: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Tile number `step` of the program, as stored: student and target."""
    ahead = step * ROWS + tl.arange(0, ROWS)
    s = load_stored(student, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, "", STUDENT_SPATIAL_FIRST)
    t = load_stored(target, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST)
    return s, t


@triton.jit
def _residual(s, t, margin_C, ok, HAS_MARGIN: tl.constexpr):
    """d [ROWS, BLOCK_C] in fp32, 0 outside the map."""
    if HAS_MARGIN:
        t = tl.maximum(t, margin_C[None, :], propagate_nan=tl.PropagateNan.ALL)
    dead = (s <= t) & (t <= 0)
    return tl.where(ok & ~dead, s - t, 0.0)


@triton.jit
def _forward(
    student, target, offset, step, margin, partial, rows, scale,
    C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    left, first, map_start, code_start = place(rows, C, PACKED, IMAGE_ROWS, ROWS * STEPS)
    student += map_start
    target += code_start if CODEC != "" else map_start
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    next_s, next_t = _load(
        student, target, first, left, 0, c0,
        C, IMAGE_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
    margin_C = channel_values(margin, c, c < C) if margin is not None else 0.0
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.static_range(STEPS):
        s, t = next_s, next_t
        if i + 1 < STEPS:
            next_s, next_t = _load(
                student, target, first, left, i + 1, c0,
                C, IMAGE_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
        ok = inside(i * ROWS + tl.arange(0, ROWS) < left, c, C, BLOCK_C)
        t = values(t, offset_C, step_C, ROWS, BLOCK_C, CODEC)
        d = _residual(s.to(tl.float32), t, margin_C, ok, margin is not None)
        total = tl.fma(d, d, total)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + program, tl.sum(total) * scale)


@triton.jit
def _backward(
    student, target, offset, step, margin, upstream, gradient, rows, scale,
    C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    left, first, map_start, code_start = place(rows, C, PACKED, IMAGE_ROWS, ROWS * STEPS)
    student += map_start
    target += code_start if CODEC != "" else map_start
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    next_s, next_t = _load(
        student, target, first, left, 0, c0,
        C, IMAGE_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
    margin_C = channel_values(margin, c, c < C) if margin is not None else 0.0
    factor = tl.load(upstream).to(tl.float32) * (2 * scale)
    for i in tl.static_range(STEPS):
        s, t = next_s, next_t
        # before the store: the compiler must assume that a store changes what a later load reads
        if i + 1 < STEPS:
            next_s, next_t = _load(
                student, target, first, left, i + 1, c0,
                C, IMAGE_ROWS, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
        ahead = i * ROWS + tl.arange(0, ROWS)
        ok = inside(ahead < left, c, C, BLOCK_C)
        t = values(t, offset_C, step_C, ROWS, BLOCK_C, CODEC)
        d = _residual(s.to(tl.float32), t, margin_C, ok, margin is not None)
        offsets = map_offsets(first + ahead, c, C, IMAGE_ROWS, STUDENT_SPATIAL_FIRST)
        tl.store(gradient + map_start + offsets, d * factor, mask=ok)


def plan(
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: str,
    margin_C: Tensor | None,
    scale: float,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
) -> tuple[Launch, Tensor | None]:
    """The forward launch and its partial sums or, given ``upstream`` and ``gradient``, the backward launch.

    Args:
        student: [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C].
        target: contiguous codes [B, H, W, C] (or [B, C]), or a float map like the student's, in either order.
        offset_C: fp32 [C], None for float maps.
        step_C: fp32 [C], None for float maps.
        codec: ``"u8"``, ``"u4"``, or ``""`` for float maps.
        margin_C: float [C], or None.
        scale: weight over denominator.
        upstream: fp32 scalar on the device.
        gradient: to be written, in the student's memory order.
    """
    batch, channels = student.shape[:2]
    student_spatial_first = memory_order(student) == "contiguous"
    target_spatial_first = not codec and memory_order(target) == "contiguous"
    one_image = not student_spatial_first and not target_spatial_first
    if not one_image and student[:1].numel() >= 2**31:
        raise ValueError(f"partial_l2: expected fewer than 2^31 values a sample in NCHW order, got {student.shape}")
    pixels = student[0, 0].numel() if batch and student.ndim == 4 else 1
    image_rows, images = (batch * pixels, 1) if one_image else (pixels, batch)
    block_c = channel_block(channels, MOST_CHANNELS if not student_spatial_first else 32)
    rows = max(1, THREADS * PER_THREAD // block_c)
    per_image = ceil_div(image_rows, rows)
    steps = STEPS if images * per_image * ceil_div(channels, block_c) >= FEW_TILES else 1
    if not one_image and per_image % steps:
        steps = 1
    grid = (images * ceil_div(image_rows, rows * steps), ceil_div(channels, block_c))
    arguments: dict[str, Any] = {"student": student, "target": target}
    arguments |= {"offset": contiguous(offset_C), "step": contiguous(step_C), "margin": contiguous(margin_C)}
    constants = {
        "C": channels,
        "PACKED": packed_channels(channels, codec),
        "IMAGE_ROWS": 0 if one_image else pixels,
        "ROWS": rows,
        "BLOCK_C": block_c,
        "STEPS": steps,
        "CODEC": codec,
        "STUDENT_SPATIAL_FIRST": student_spatial_first,
        "TARGET_SPATIAL_FIRST": target_spatial_first,
    }
    sizes = {"rows": image_rows, "scale": scale}
    if upstream is not None and gradient is not None:
        arguments |= {"upstream": upstream, "gradient": gradient, **sizes}
        return Launch(_backward, grid, arguments, constants), None
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=student.device)
    return Launch(_forward, grid, arguments | {"partial": partial, **sizes}, constants), partial


def forward(
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: str,
    margin_C: Tensor | None,
    scale: float,
) -> Tensor:
    """scale * sum of d^2, an fp32 scalar."""
    if student.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=student.device)
    target = ordered_target(target, codec)
    launch, partial = plan(ordered(student), target, offset_C, step_C, codec, margin_C, scale)
    assert partial is not None
    launch.run()
    return partial.sum()


def backward(
    upstream: Tensor,
    student: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: str,
    margin_C: Tensor | None,
    scale: float,
) -> Tensor:
    """upstream * 2 * scale * d, in the student's dtype and strides."""
    gradient = torch.empty_like(student)
    if student.numel() == 0:
        return gradient
    target = ordered_target(target, codec)
    plain = ordered(student)
    into = gradient if memory_order(gradient) == memory_order(plain) else torch.empty_like(plain)
    plan(plain, target, offset_C, step_C, codec, margin_C, scale, upstream, into)[0].run()
    return gradient if into is gradient else gradient.copy_(into)
