"""Distance of unit-length maps: all teachers in one launch, each sample read from memory once where it fits on chip.

With the lengths a = max(||s||, eps) and b = max(||t||, eps) of a sample, everything is computed at the student's scale:

    r = a / b;   d = s - t * r;   q = sign(d);   |s/a - t/b| = |d| / a
    distance = sum of |d| / a;    along = <s, q> / a
    gradient = upstream * scale / a * (q - s * along / a)         without the second term where ||s|| < eps

so that an element costs one multiplication and one subtraction instead of two divisions, and a student equal to its
teacher has r = 1 and d = 0 to the bit. Forward also sums <s, q>: backward is then elementwise, one pass. Kernels use
q / 2, a saturating multiply-add and a subtraction.

Bytes an element, bf16 student and u8 codes: forward 2 + 1, backward 2 + 1 + 2. Kept in between: 16 bytes a sample.

Forward gives a sample to one program. Up to ON_CHIP elements it stays in registers between the lengths and the
distance. Beyond, a program sweeps over its sample twice, the second time backwards, so that what was read last, and
is still in the L2 cache, is read first. Backward needs no sums and cuts samples into as many programs as it likes.

N teachers whose maps look alike share a launch: kernels take tuples of pointers, and a program selects its own.

Legend: N teachers, B samples, R pixels, C channels; a tile is [ROWS, BLOCK_C]. A row of statistics is one sample of one
teacher: 1 / a, r, along / a (0 where ||s|| < eps), scale * distance: backward divides by nothing. (A division calls a
subroutine for odd operands, around which registers spill.) Rows follow `groups`, not the order of the teachers.

A NaN or an infinity anywhere, or a length whose square overflows (1.8e19), makes the loss NaN and the gradient of that
sample. Squares that underflow belong to lengths below 1e-19, far below any useful eps.

What it does not do: split a sample over programs in forward. A few samples of more than ON_CHIP elements leave most
of a GPU idle.
"""

# mypy: disable-error-code="assignment, unreachable"
# (kernels collect tiles in tuples that grow)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, memory_order, ordered, ordered_target
from feedfast_kernels.codes import packed_channels
from feedfast_kernels.gpu.launch import THREADS, Launch, ceil_div, channel_block, power_of_two
from feedfast_kernels.gpu.tile import channel_values, inside, load_stored, map_offsets, values

ON_CHIP = 16384  # elements
MOST_TEACHERS = 8  # a launch
STATISTICS = 4
PER_THREAD = 8  # elements of a tile: offset and step of 16 channels would take 32 registers
MOST_CHANNELS = 2048  # of a tile: whole rows leave the fewest idle lanes on maps of 7 x 7
ON_CHIP_TILES = 4  # 32 elements a thread, kept in fp32
# tiles that a sweep loads before it computes; twice as many took 120 registers with codes, and 4 of float maps spilled,
# because there the compiler aims at 64
SWEPT_TILES, SWEPT_FLOAT_TILES = 4, 2
SWEPT_ELEMENTS = 2048, 4096  # of a tile, for samples up to LARGE elements and beyond
# What the programs that run together read in their first sweep should stay in an H200's 50 MB of L2 for the second.
# With 8 warps three run on a multiprocessor, 396 in all: samples of 32 Ki elements are then 39 MB. Larger ones get 16
# warps, one program a multiprocessor: 132 samples of 2048 x 7 x 7 are 40 MB. (bf16 and u8; arithmetic, not measured.)
LARGE = 32768
MOST_STEPS = 8  # tiles that a backward program walks, its channels' offset and step in registers
HUGE = tl.constexpr(2.0**100)


@triton.jit
def _pick(pointers, i, N: tl.constexpr):
    """pointers[i]."""
    pointer = pointers[0]
    for j in tl.static_range(1, N):
        pointer = tl.where(i == j, pointers[j], pointer)
    return pointer


@triton.jit
def _load(
    student, target, first, c0, offset_C, step_C,
    C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
    FULL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """s and t of TILES tiles from row `first` on, two tuples of fp32 [ROWS, BLOCK_C], 0 outside the sample.

    The first FULL tiles have all their rows inside, and no mask. All loads are ahead of all arithmetic: enough bytes
    must be on their way to hide the memory's latency, and the compiler leaves loads about where it finds them.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    s_stored, t_stored = (), ()
    for i in tl.static_range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if i < FULL else row < R
        s_stored += (load_stored(student, row, row_ok, c0, C, R, BLOCK_C, "", STUDENT_SPATIAL_FIRST),)
        t_stored += (load_stored(target, row, row_ok, c0, C, R, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST),)
    s, t = (), ()
    for i in tl.static_range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if i < FULL else row < R
        s += (s_stored[i].to(tl.float32),)
        value = values(t_stored[i], offset_C, step_C, ROWS, BLOCK_C, CODEC)
        t += (tl.where(inside(row_ok, c, C, BLOCK_C), value, 0.0),)
    return s, t


@triton.jit
def _half_sign(d):
    """sign(d) / 2, for |d| of at least 2^-101. A NaN gives any value: the lengths carry it."""
    return tl.clamp(tl.fma(d, HUGE, 0.5), 0.0, 1.0) - 0.5


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _sums(ss_tile, tt_tile):
    """Sums of two tiles whose terms are added in the same order, so that equal tiles have equal sums.

    `tl.sum` of a tile takes its terms as they lie over the threads, and a map that is turned round lies otherwise than
    codes. One reduction of both makes the compiler bring them into one layout first.
    """
    ss_rows, tt_rows = tl.reduce((ss_tile, tt_tile), 1, _add_pairs)
    return tl.sum(ss_rows), tl.sum(tt_rows)


@triton.jit
def _divisor(length, eps):
    return tl.maximum(length, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lengths(ss, tt, eps):
    """||s||, r = a / b, and 0, or NaN where a sum of squares is not finite: a length would divide to a quiet zero.

    Everything is rounded to nearest, so that equal sums give r = 1.
    """
    length = tl.sqrt_rn(ss)
    return length, tl.div_rn(_divisor(length, eps), _divisor(tl.sqrt_rn(tt), eps)), 0.0 * (ss + tt)


@triton.jit
def _store_statistics(statistics, row, length, ratio, lost, sum_d, half_sq, scale, eps):
    """Store 1 / a, r, along / a and scale * distance of a sample; `half_sq` is half of <s, q>."""
    inverse = tl.div_rn(1.0, _divisor(length, eps))
    # below eps the divisor is a constant, so the length contributes nothing
    along = tl.where(length >= eps, 2 * half_sq * inverse, 0.0)
    statistics += row.to(tl.int64) * 4
    tl.store(statistics, inverse)
    tl.store(statistics + 1, ratio)
    tl.store(statistics + 2, along * inverse + lost)
    tl.store(statistics + 3, (sum_d * inverse + lost) * scale)


@triton.jit
def _add_lengths(ss, tt, tiles, TILES: tl.constexpr):
    s, t = tiles
    for i in tl.static_range(TILES):
        ss = tl.fma(s[i], s[i], ss)
        tt = tl.fma(t[i], t[i], tt)
    return ss, tt


@triton.jit
def _add_distances(sum_d, half_sq, tiles, ratio, TILES: tl.constexpr):
    s, t = tiles
    for i in tl.static_range(TILES):
        d = s[i] - t[i] * ratio
        sum_d += tl.abs(d)
        half_sq = tl.fma(_half_sign(d), s[i], half_sq)
    return sum_d, half_sq


@triton.jit
def _forward_on_chip(
    students, targets, offsets, steps, statistics, batch, scale, eps,
    N: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    teacher = program // batch
    sample = (program - teacher * batch).to(tl.int64)
    student = _pick(students, teacher, N) + sample * (R * C)
    target = _pick(targets, teacher, N) + sample * (R * PACKED)
    c = tl.arange(0, BLOCK_C)
    offset_C = channel_values(_pick(offsets, teacher, N), c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(_pick(steps, teacher, N), c, c < C) if CODEC != "" else 0.0
    tiles = _load(
        student, target, 0, 0, offset_C, step_C,
        C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, R // ROWS, TILES,
    )  # fmt: skip
    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    ss_tile, tt_tile = _add_lengths(zero, zero, tiles, TILES)
    ss, tt = _sums(ss_tile, tt_tile)
    length, ratio, lost = _lengths(ss, tt, eps)
    d_tile, half_sq_tile = _add_distances(zero, zero, tiles, ratio, TILES)
    sum_d = tl.sum(d_tile)
    half_sq = tl.sum(half_sq_tile)
    _store_statistics(statistics, program, length, ratio, lost, sum_d, half_sq, scale, eps)


@triton.jit
def _forward_swept(
    students, targets, offsets, steps, statistics, batch, scale, eps,
    N: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    teacher = program // batch
    sample = (program - teacher * batch).to(tl.int64)
    student = _pick(students, teacher, N) + sample * (R * C)
    target = _pick(targets, teacher, N) + sample * (R * PACKED)
    offset = _pick(offsets, teacher, N) if CODEC != "" else None
    step = _pick(steps, teacher, N) if CODEC != "" else None
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
        offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
        step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
        if LOOPED > 0:
            row = tl.full((), 0, tl.int32)
            while row < LOOPED:
                looped = _load(
                    student, target, row, c0, offset_C, step_C,
                    C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, TILES, TILES,
                )  # fmt: skip
                ss_tile, tt_tile = _add_lengths(ss_tile, tt_tile, looped, TILES)
                row += SPAN
        if REST > 0:
            rest = _load(
                student, target, LOOPED, c0, offset_C, step_C,
                C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, FULL, REST,
            )  # fmt: skip
            ss_tile, tt_tile = _add_lengths(ss_tile, tt_tile, rest, REST)
        c0 += BLOCK_C
    ss, tt = _sums(ss_tile, tt_tile)
    length, ratio, lost = _lengths(ss, tt, eps)
    d_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    half_sq_tile = tl.zeros((ROWS, BLOCK_C), tl.float32)
    c0 = tl.full((), (C - 1) // BLOCK_C * BLOCK_C, tl.int32)
    while c0 >= 0:
        c = c0 + tl.arange(0, BLOCK_C)
        offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
        step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
        if REST > 0:
            rest_again = _load(
                student, target, LOOPED, c0, offset_C, step_C,
                C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, FULL, REST,
            )  # fmt: skip
            d_tile, half_sq_tile = _add_distances(d_tile, half_sq_tile, rest_again, ratio, REST)
        if LOOPED > 0:
            row = tl.full((), LOOPED - SPAN, tl.int32)
            while row >= 0:
                looped_again = _load(
                    student, target, row, c0, offset_C, step_C,
                    C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, TILES, TILES,
                )  # fmt: skip
                d_tile, half_sq_tile = _add_distances(d_tile, half_sq_tile, looped_again, ratio, TILES)
                row -= SPAN
        c0 -= BLOCK_C
    sum_d = tl.sum(d_tile)
    half_sq = tl.sum(half_sq_tile)
    _store_statistics(statistics, program, length, ratio, lost, sum_d, half_sq, scale, eps)


@triton.jit
def _backward(
    students, targets, offsets, steps, statistics, upstream, gradients, batch, scale,
    N: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, CODEC: tl.constexpr,
    STUDENT_SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (R + ROWS * TILES - 1) // (ROWS * TILES)
    EVEN: tl.constexpr = R % (ROWS * TILES) == 0
    number = tl.program_id(0) // CHUNKS
    first = (tl.program_id(0) - number * CHUNKS) * (ROWS * TILES)
    teacher = number // batch
    sample = (number - teacher * batch).to(tl.int64)
    statistics += number.to(tl.int64) * 4
    ratio = tl.load(statistics + 1)
    factor = tl.load(upstream).to(tl.float32) * scale * tl.load(statistics)
    pull = tl.load(statistics + 2) * factor
    twice = 2 * factor
    student = _pick(students, teacher, N) + sample * (R * C)
    target = _pick(targets, teacher, N) + sample * (R * PACKED)
    gradient = _pick(gradients, teacher, N) + sample * (R * C)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    offset_C = channel_values(_pick(offsets, teacher, N), c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(_pick(steps, teacher, N), c, c < C) if CODEC != "" else 0.0
    for i in tl.static_range(TILES):
        s, t = _load(
            student, target, first + i * ROWS, c0, offset_C, step_C,
            C, R, ROWS, BLOCK_C, CODEC, STUDENT_SPATIAL_FIRST, TARGET_SPATIAL_FIRST, 1 if EVEN else 0, 1,
        )  # fmt: skip
        half_q = _half_sign(s[0] - t[0] * ratio)
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if EVEN else row < R
        into = gradient + map_offsets(row, c, C, R, STUDENT_SPATIAL_FIRST)
        tl.store(into, half_q * twice - s[0] * pull, mask=inside(row_ok, c, C, BLOCK_C))


def plan(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codec: str,
    scale: float,
    statistics: Tensor,
    *,
    eps: float = 0.0,
    upstream: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
) -> Launch:
    """The forward launch of teachers that look alike or, given ``upstream`` and ``gradients``, the backward launch.

    Args:
        students: N maps [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C]; all of one kind.
        targets: N arrays of contiguous codes [B, H, W, C] (or [B, C]), or float maps in either order.
        offsets: fp32 [C] each, None for float maps.
        steps: fp32 [C] each, None for float maps.
        codec: ``"u8"``, ``"u4"``, or ``""`` for float maps.
        scale: weight over denominator, and over C * H * W for a mean.
        statistics: fp32 [N * B, 4], written by forward and read by backward.
        eps: least length a map is divided by; of no use to backward.
        upstream: fp32 scalar on the device.
        gradients: to be written, in the students' memory order.
    """
    first = students[0]
    batch, channels = first.shape[:2]
    pixels = first[:1, :1].numel()
    student_spatial_first = memory_order(first) == "contiguous"
    target_spatial_first = not codec and memory_order(targets[0]) == "contiguous"
    if channels * pixels >= 2**31:
        raise ValueError(f"normalized_l1: expected fewer than 2^31 values a sample, got {list(first.shape)}")
    turned = student_spatial_first or target_spatial_first
    arguments: dict[str, Any] = {
        "students": tuple(students),
        "targets": tuple(targets),
        "offsets": tuple(offsets) if codec else None,
        "steps": tuple(steps) if codec else None,
        "statistics": statistics,
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
    if upstream is not None and gradients is not None:
        block_c = channel_block(channels, 32 if turned else MOST_CHANNELS)
        rows = min(max(THREADS * PER_THREAD // block_c, 1), power_of_two(pixels))
        tiles = ceil_div(pixels, rows)
        chunks = ceil_div(tiles, MOST_STEPS)
        constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": ceil_div(tiles, chunks)}
        arguments |= {"upstream": upstream, "gradients": tuple(gradients), **sizes}
        grid = (samples * chunks, ceil_div(channels, block_c))
        return Launch(_backward, grid, arguments, constants, _warps(rows * block_c))
    sizes["eps"] = eps
    block_c = max(power_of_two(channels), 2)
    if block_c * power_of_two(pixels) <= ON_CHIP:
        tile = max(block_c * power_of_two(pixels) // ON_CHIP_TILES, 32 * PER_THREAD)
        rows = min(max(tile // block_c, 1), power_of_two(pixels))
        constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": ceil_div(pixels, rows)}
        return Launch(_forward_on_chip, (samples,), arguments | sizes, constants, _warps(rows * block_c))
    block_c = channel_block(channels, 64 if turned else MOST_CHANNELS)
    most = SWEPT_TILES if codec else SWEPT_FLOAT_TILES
    rows = min(max(SWEPT_ELEMENTS[channels * pixels > LARGE] // block_c, 1), power_of_two(pixels))
    constants |= {"ROWS": rows, "BLOCK_C": block_c, "TILES": min(max(pixels // rows, 1), most)}
    return Launch(_forward_swept, (samples,), arguments | sizes, constants, _warps(rows * block_c))


def _warps(elements: int) -> int:
    """Warps of 32 threads, for PER_THREAD elements each."""
    return max(elements // (32 * PER_THREAD), 1)


def groups(
    students: Sequence[Tensor], targets: Sequence[Tensor], codecs: Sequence[str], scales: Sequence[float]
) -> list[list[int]]:
    """Teachers that can share a launch: same shape, dtypes, codec, memory orders and scale, at most MOST_TEACHERS.

    Teachers without values are in none.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (student, target, codec, scale) in enumerate(zip(students, targets, codecs, scales, strict=True)):
        if student.numel():
            order = "" if codec else memory_order(target)
            key = (student.shape, student.dtype, memory_order(student), target.dtype, codec, order, scale)
            alike.setdefault(key, []).append(i)
    return [some[i : i + MOST_TEACHERS] for some in alike.values() for i in range(0, len(some), MOST_TEACHERS)]


def _parts(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[str],
    scales: Sequence[float],
    statistics: Tensor,
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Teachers of each launch, and the arguments of `plan` for them."""
    students = [ordered(x) for x in students]
    targets = [ordered_target(x, codec) for x, codec in zip(targets, codecs, strict=True)]
    offsets, steps = [contiguous(x) for x in offsets], [contiguous(x) for x in steps]
    row = 0
    for some in groups(students, targets, codecs, scales):
        rows = len(some) * students[some[0]].shape[0]
        named: dict[str, Sequence[Any]] = {"students": students, "targets": targets, "offsets": offsets, "steps": steps}
        arguments: dict[str, Any] = {name: [x[i] for i in some] for name, x in named.items()}
        arguments |= {"codec": codecs[some[0]], "scale": scales[some[0]]}
        yield some, arguments | {"statistics": statistics[row : row + rows]}
        row += rows


def forward(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[str],
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
    upstream: Tensor,
    statistics: Tensor,
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    codecs: Sequence[str],
    scales: Sequence[float],
) -> list[Tensor]:
    """The students' gradients, in their dtypes and strides."""
    gradients = [torch.empty_like(x) for x in students]
    for some, arguments in _parts(students, targets, offsets, steps, codecs, scales, statistics):
        plain = arguments["students"]
        into = [
            gradients[i] if memory_order(gradients[i]) == memory_order(x) else torch.empty_like(x)
            for i, x in zip(some, plain, strict=True)
        ]
        plan(**arguments, upstream=upstream, gradients=into).run()
        for i, written in zip(some, into, strict=True):
            if written is not gradients[i]:
                gradients[i].copy_(written)
    return gradients
