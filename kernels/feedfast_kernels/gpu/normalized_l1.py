"""Distance of unit-length maps: all teachers in one launch, each sample read from memory once where it fits on chip.

With the lengths a = max(||s||, eps) and b = max(||t||, eps) of a sample, everything is computed at the student's scale:

    r = a / b;   d = s - t * r;   q = sign(d);   distance = sum of |d| / a;    along = <s, q> / a
    gradient = grad_output * scale / a * (q - s * along / a)         without the second term where ||s|| < eps

A student equal to its teacher has r = 1 and d = 0 to the bit. Forward also sums <s, q>: backward is elementwise, one
pass. Bytes per element, bf16 student and u8 codes: forward 2 + 1, backward 2 + 1 + 2; kept in between: 16 per sample.

Legend: N teachers, B samples, R pixels, C channels; a tile is [ROWS, BLOCK_C]. A row of statistics is one sample of one
teacher: 1 / a, r, along / a (0 where ||s|| < eps), scale * distance. Rows follow `groups`, not the order of teachers.

What it does not do: split a sample over programs in forward. A few samples of more than ON_CHIP elements leave most
of a GPU idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, dense, dense_target, memory_format_of
from feedfast_kernels.codes import StoredAs, packed_channels
from feedfast_kernels.gpu.launch import THREADS, Launch, ceil_div, channel_block, power_of_two
from feedfast_kernels.gpu.tile import channel_values, inside, map_offsets
from feedfast_kernels.gpu.unit_length import (
    add_distances,
    add_squares,
    half_sign,
    lengths,
    load_pair,
    pick,
    store_statistics,
    sums_of_squares,
)

ON_CHIP = 16384  # elements of a sample that stay in registers between the lengths and the distance
MOST_TEACHERS = 8  # per launch
STATISTICS = 4
PER_THREAD = 8  # elements of a tile: offset and step of 16 channels would take 32 registers
MOST_CHANNELS = 2048  # of a tile: whole rows leave the fewest idle lanes on maps of 7 x 7
ON_CHIP_TILES = 4  # 32 elements per thread, kept in fp32
# tiles that a sweep loads before it computes; twice as many took 120 registers with codes, and 4 of float maps spilled,
# because there the compiler aims at 64
SWEPT_TILES, SWEPT_FLOAT_TILES = 4, 2
SWEPT_ELEMENTS = 2048, 4096  # of a tile, for samples up to LARGE elements and beyond
# What the programs that run together read in their first sweep should stay in an H200's 50 MB of L2 for the second.
# With 8 warps three run on a multiprocessor, 396 in all: samples of 32 Ki elements are then 39 MB. Larger ones get 16
# warps, one program per multiprocessor: 132 samples of 2048 x 7 x 7 are 40 MB. (bf16 and u8; arithmetic, not measured.)
LARGE = 32768
MOST_STEPS = 8  # tiles that a backward program walks, its channels' offset and step in registers


@triton.jit
def _forward_on_chip(
    student_ptrs,  # N of [B, R, C] or [B, C, R]
    target_ptrs,  # N of codes [B, R, PACKED], or of floats like the student
    offset_ptrs,  # N of [C], None with float targets
    step_ptrs,  # N of [C], None with float targets
    statistics_ptr,  # [N * B, 4]
    batch,  # B
    scale,  # weight / denominator, for a mean also / (R * C)
    eps,  # least length
    N: tl.constexpr,  # teachers
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    R: tl.constexpr,  # pixels per sample
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    TILES: tl.constexpr,  # tiles at a time
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    program = tl.program_id(0)
    teacher = program // batch
    sample = (program - teacher * batch).to(tl.int64)
    student_ptr = pick(student_ptrs, teacher, N) + sample * (R * C)
    target_ptr = pick(target_ptrs, teacher, N) + sample * (R * PACKED)
    c = tl.arange(0, BLOCK_C)
    offset_C = channel_values(pick(offset_ptrs, teacher, N), c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(pick(step_ptrs, teacher, N), c, c < C) if CODEC != "float" else 0.0
    tiles = load_pair(
        student_ptr, target_ptr, 0, 0, offset_C, step_C,
        C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, R // ROWS, TILES,
    )  # fmt: skip
    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    ss_tile, tt_tile = add_squares(zero, zero, tiles, TILES)
    ss, tt = sums_of_squares(ss_tile, tt_tile)
    length, ratio, lost = lengths(ss, tt, eps)
    d_tile, half_sq_tile = add_distances(zero, zero, tiles, ratio, TILES)
    sum_d = tl.sum(d_tile)
    half_sq = tl.sum(half_sq_tile)
    store_statistics(statistics_ptr, program, length, ratio, lost, sum_d, half_sq, scale, eps)


@triton.jit
def _forward_swept(
    student_ptrs,  # N of [B, R, C] or [B, C, R]
    target_ptrs,  # N of codes [B, R, PACKED], or of floats like the student
    offset_ptrs,  # N of [C], None with float targets
    step_ptrs,  # N of [C], None with float targets
    statistics_ptr,  # [N * B, 4]
    batch,  # B
    scale,  # weight / denominator, for a mean also / (R * C)
    eps,  # least length
    N: tl.constexpr,  # teachers
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    R: tl.constexpr,  # pixels per sample
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    TILES: tl.constexpr,  # tiles at a time
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    program = tl.program_id(0)
    teacher = program // batch
    sample = (program - teacher * batch).to(tl.int64)
    student_ptr = pick(student_ptrs, teacher, N) + sample * (R * C)
    target_ptr = pick(target_ptrs, teacher, N) + sample * (R * PACKED)
    offset_ptr = pick(offset_ptrs, teacher, N) if CODEC != "float" else None
    step_ptr = pick(step_ptrs, teacher, N) if CODEC != "float" else None
    # rows in the loop, TILES full tiles at a time; then the tiles that are left, the last of them perhaps not full
    # (Triton 3.6 does not survive a loop that never runs, nor any version a tuple that a loop carries along)
    SPAN: tl.constexpr = ROWS * TILES
    LOOPED: tl.constexpr = R // SPAN * SPAN
    FULL: tl.constexpr = (R - LOOPED) // ROWS
    REST: tl.constexpr = (R - LOOPED + ROWS - 1) // ROWS
    ss_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    tt_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    c0 = tl.full((), 0, tl.int32)
    while c0 < C:
        c = c0 + tl.arange(0, BLOCK_C)
        offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
        step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
        if LOOPED > 0:
            row = tl.full((), 0, tl.int32)
            while row < LOOPED:
                looped = load_pair(
                    student_ptr, target_ptr, row, c0, offset_C, step_C,
                    C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, TILES, TILES,
                )  # fmt: skip
                ss_tile, tt_tile = add_squares(ss_tile, tt_tile, looped, TILES)
                row += SPAN
        if REST > 0:
            rest = load_pair(
                student_ptr, target_ptr, LOOPED, c0, offset_C, step_C,
                C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, FULL, REST,
            )  # fmt: skip
            ss_tile, tt_tile = add_squares(ss_tile, tt_tile, rest, REST)
        c0 += BLOCK_C
    ss, tt = sums_of_squares(ss_tile, tt_tile)
    length, ratio, lost = lengths(ss, tt, eps)
    d_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    half_sq_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    # backwards: what was read last, and is still in the L2 cache, is read first
    c0 = tl.full((), (C - 1) // BLOCK_C * BLOCK_C, tl.int32)
    while c0 >= 0:
        c = c0 + tl.arange(0, BLOCK_C)
        offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
        step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
        if REST > 0:
            rest_again = load_pair(
                student_ptr, target_ptr, LOOPED, c0, offset_C, step_C,
                C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, FULL, REST,
            )  # fmt: skip
            d_tile, half_sq_tile = add_distances(d_tile, half_sq_tile, rest_again, ratio, REST)
        if LOOPED > 0:
            row = tl.full((), LOOPED - SPAN, tl.int32)
            while row >= 0:
                looped_again = load_pair(
                    student_ptr, target_ptr, row, c0, offset_C, step_C,
                    C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, TILES, TILES,
                )  # fmt: skip
                d_tile, half_sq_tile = add_distances(d_tile, half_sq_tile, looped_again, ratio, TILES)
                row -= SPAN
        c0 -= BLOCK_C
    sum_d = tl.sum(d_tile)
    half_sq = tl.sum(half_sq_tile)
    store_statistics(statistics_ptr, program, length, ratio, lost, sum_d, half_sq, scale, eps)


@triton.jit
def _backward(
    student_ptrs,  # N of [B, R, C] or [B, C, R]
    target_ptrs,  # N of codes [B, R, PACKED], or of floats like the student
    offset_ptrs,  # N of [C], None with float targets
    step_ptrs,  # N of [C], None with float targets
    statistics_ptr,  # [N * B, 4]
    grad_output_ptr,  # scalar
    gradient_ptrs,  # N, like the students
    batch,  # B
    scale,  # weight / denominator, for a mean also / (R * C)
    N: tl.constexpr,  # teachers
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    R: tl.constexpr,  # pixels per sample
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    TILES: tl.constexpr,  # tiles at a time
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    CHUNKS: tl.constexpr = (R + ROWS * TILES - 1) // (ROWS * TILES)
    EVEN: tl.constexpr = R % (ROWS * TILES) == 0
    number = tl.program_id(0) // CHUNKS
    first = (tl.program_id(0) - number * CHUNKS) * (ROWS * TILES)
    teacher = number // batch
    sample = (number - teacher * batch).to(tl.int64)
    statistics_ptr += number.to(tl.int64) * 4
    ratio = tl.load(statistics_ptr + 1)
    factor = tl.load(grad_output_ptr).to(tl.float32) * scale * tl.load(statistics_ptr)
    pull = tl.load(statistics_ptr + 2) * factor
    twice = 2 * factor
    student_ptr = pick(student_ptrs, teacher, N) + sample * (R * C)
    target_ptr = pick(target_ptrs, teacher, N) + sample * (R * PACKED)
    gradient_ptr = pick(gradient_ptrs, teacher, N) + sample * (R * C)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    offset_C = channel_values(pick(offset_ptrs, teacher, N), c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(pick(step_ptrs, teacher, N), c, c < C) if CODEC != "float" else 0.0
    for i in tl.static_range(TILES):
        s, t = load_pair(
            student_ptr, target_ptr, first + i * ROWS, c0, offset_C, step_C,
            C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, 1 if EVEN else 0, 1,
        )  # fmt: skip
        half_q = half_sign(s[0] - t[0] * ratio)
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if EVEN else row < R
        into = gradient_ptr + map_offsets(row, c, C, R, STUDENT_SPATIAL_FIRST)
        tl.store(into, half_q * twice - s[0] * pull, mask=inside(row_ok, c, C, BLOCK_C))


def plan(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codec: StoredAs,
    scale: float,
    statistics: Tensor,
    *,
    eps: float = 0.0,
    grad_output: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
) -> Launch:
    """The forward launch of teachers that look alike or, given ``grad_output`` and ``gradients``, the backward launch.

    Args:
        students: N maps [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C]; all of one kind.
        targets: N arrays of contiguous codes [B, H, W, C] (or [B, C]), or float maps in either order.
        offsets: fp32 [C] each, None for float maps.
        steps: fp32 [C] each, None for float maps.
        codec: of codes, or ``"float"`` for a float map.
        scale: weight over denominator, and over C * H * W for a mean.
        statistics: fp32 [N * B, 4], written by forward and read by backward.
        eps: least length a map is divided by; of no use to backward.
        grad_output: fp32 scalar on the device.
        gradients: to be written, in the students' memory format.
    """
    first = students[0]
    batch, channels = first.shape[:2]
    pixels = first[:1, :1].numel()
    student_spatial_first = memory_format_of(first) == "contiguous"
    target_spatial_first = codec == "float" and memory_format_of(targets[0]) == "contiguous"
    if channels * pixels >= 2**31:
        raise ValueError(f"normalized_l1: expected fewer than 2^31 values per sample, got {list(first.shape)}")
    transposed = student_spatial_first or target_spatial_first
    arguments: dict[str, Any] = {
        "student_ptrs": tuple(students),
        "target_ptrs": tuple(targets),
        "offset_ptrs": None if codec == "float" else tuple(offsets),
        "step_ptrs": None if codec == "float" else tuple(steps),
        "statistics_ptr": statistics,
    }
    sizes = {"batch": batch, "scale": scale}
    constants: dict[str, Any] = {
        "N": len(students),
        "C": channels,
        "PACKED": packed_channels(channels, codec),
        "R": pixels,
        "CODEC": codec,
        "STUDENT_SPATIAL_FIRST": student_spatial_first,
        "TARGET_SPATIAL_FIRST": target_spatial_first,
    }
    samples = len(students) * batch
    if grad_output is not None and gradients is not None:
        block_c = channel_block(channels, 32 if transposed else MOST_CHANNELS)
        rows = min(max(THREADS * PER_THREAD // block_c, 1), power_of_two(pixels))
        tiles = ceil_div(pixels, rows)
        chunks = ceil_div(tiles, MOST_STEPS)
        constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": ceil_div(tiles, chunks)}
        arguments |= {"grad_output_ptr": grad_output, "gradient_ptrs": tuple(gradients), **sizes}
        grid = (samples * chunks, ceil_div(channels, block_c))
        return Launch(_backward, grid, arguments, constants, _warps(rows * block_c))
    sizes["eps"] = eps
    block_c = max(power_of_two(channels), 8)  # the codes whose upper bits u5 keeps in one byte
    if block_c * power_of_two(pixels) <= ON_CHIP:
        tile = max(block_c * power_of_two(pixels) // ON_CHIP_TILES, 32 * PER_THREAD)
        rows = min(max(tile // block_c, 1), power_of_two(pixels))
        constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": ceil_div(pixels, rows)}
        return Launch(_forward_on_chip, (samples,), arguments | sizes, constants, _warps(rows * block_c))
    block_c = channel_block(channels, 64 if transposed else MOST_CHANNELS)
    most = SWEPT_FLOAT_TILES if codec == "float" else SWEPT_TILES
    rows = min(max(SWEPT_ELEMENTS[channels * pixels > LARGE] // block_c, 1), power_of_two(pixels))
    constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": min(max(pixels // rows, 1), most)}
    return Launch(_forward_swept, (samples,), arguments | sizes, constants, _warps(rows * block_c))


def _warps(elements: int) -> int:
    """Warps of 32 threads, for PER_THREAD elements each."""
    return max(elements // (32 * PER_THREAD), 1)


def groups(
    students: Sequence[Tensor], targets: Sequence[Tensor], codecs: Sequence[StoredAs], scales: Sequence[float]
) -> list[list[int]]:
    """Teachers that can share a launch: same shape, dtypes, codec, memory formats and scale, at most MOST_TEACHERS.

    Teachers without values are in none.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (student, target, codec, scale) in enumerate(zip(students, targets, codecs, scales, strict=True)):
        if student.numel():
            target_format = memory_format_of(target) if codec == "float" else None
            key = (student.shape, student.dtype, memory_format_of(student), target.dtype, codec, target_format, scale)
            alike.setdefault(key, []).append(i)
    return [some[i : i + MOST_TEACHERS] for some in alike.values() for i in range(0, len(some), MOST_TEACHERS)]


def _parts(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[StoredAs],
    scales: Sequence[float],
    statistics: Tensor,
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Teachers of each launch, and the arguments of `plan` for them."""
    students = [dense(x) for x in students]
    targets = [dense_target(x, codec) for x, codec in zip(targets, codecs, strict=True)]
    offsets, steps = [contiguous(x) for x in offsets], [contiguous(x) for x in steps]
    row = 0
    for some in groups(students, targets, codecs, scales):
        rows = len(some) * students[some[0]].shape[0]
        named: dict[str, Sequence[Any]] = {
            "students": students,
            "targets": targets,
            "offsets": offsets,
            "steps": steps,
        }
        arguments: dict[str, Any] = {name: [x[i] for i in some] for name, x in named.items()}
        arguments |= {"codec": codecs[some[0]], "scale": scales[some[0]]}
        yield some, arguments | {"statistics": statistics[row : row + rows]}
        row += rows


def forward(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[StoredAs],
    scales: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The loss, an fp32 scalar, and what `backward` needs, fp32 [all samples, 4]."""
    shape = (sum(x.shape[0] for x in students), STATISTICS)
    written = all(x.numel() for x in students)
    statistics = (torch.empty if written else torch.zeros)(shape, dtype=torch.float32, device=students[0].device)
    for _, arguments in _parts(students, targets, offsets, steps, codecs, scales, statistics):
        plan(**arguments, eps=eps).run()
    return statistics[:, 3].sum(), statistics


def backward(
    grad_output: Tensor,
    statistics: Tensor,
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[StoredAs],
    scales: Sequence[float],
) -> list[Tensor]:
    """The students' gradients, in their dtypes and strides."""
    gradients = [torch.empty_like(x) for x in students]
    for some, arguments in _parts(students, targets, offsets, steps, codecs, scales, statistics):
        plain = arguments["students"]
        into = [
            gradients[i] if memory_format_of(gradients[i]) == memory_format_of(x) else torch.empty_like(x)
            for i, x in zip(some, plain, strict=True)
        ]
        plan(**arguments, grad_output=grad_output, gradients=into).run()
        for i, written in zip(some, into, strict=True):
            if written is not gradients[i]:
                gradients[i].copy_(written)
    return gradients
