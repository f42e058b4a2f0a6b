"""What the programs of normalized_l1 do with the tiles of one sample: load, add up, and store its statistics.

Legend: N teachers, R pixels, C channels; a tile is [ROWS, BLOCK_C]. The formulas, and what a row of statistics is, are
in normalized_l1.py.
"""

# mypy: disable-error-code="assignment, unreachable"
# (kernels collect tiles in tuples that grow)

from __future__ import annotations

import triton
import triton.language as tl

from feedfast_kernels.gpu.tile import inside, load_stored, values

HUGE = tl.constexpr(2.0**100)


@triton.jit
def pick(ptrs, i, N: tl.constexpr):
    """ptrs[i], for an index that only the program knows."""
    ptr = ptrs[0]
    for j in tl.static_range(1, N):
        ptr = tl.where(i == j, ptrs[j], ptr)
    return ptr


@triton.jit
def load_pair(
    student_ptr,  # [R, C] or [C, R], of one sample
    target_ptr,  # codes [R, PACKED], or floats like the student
    first,
    c0,
    offset_C,
    step_C,
    C: tl.constexpr,  # channels
    R: tl.constexpr,  # pixels per sample
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    CODEC: tl.constexpr,  # of codes, or "float"
    STUDENT_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    FULL: tl.constexpr,  # tiles without a mask along the pixels
    TILES: tl.constexpr,  # tiles at a time
):
    """s and t of TILES tiles from row `first` on, two tuples of fp32 [ROWS, BLOCK_C], 0 outside the sample.

    The first FULL tiles have all their rows inside, and no mask. All loads are ahead of all arithmetic: enough bytes
    must be on their way to hide the memory's latency, and the compiler leaves loads about where it finds them.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    s_stored, t_stored = (), ()
    for i in tl.static_range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if i < FULL else row < R
        s_stored += (load_stored(student_ptr, row, row_ok, c0, C, R, BLOCK_C, "float", STUDENT_SPATIAL_FIRST),)
        t_stored += (load_stored(target_ptr, row, row_ok, c0, C, R, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST),)
    s, t = (), ()
    for i in tl.static_range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        row_ok = tl.full((ROWS,), 1, tl.int1) if i < FULL else row < R
        s += (s_stored[i].to(tl.float32),)
        value = values(t_stored[i], offset_C, step_C, ROWS, BLOCK_C, CODEC)
        t += (tl.where(inside(row_ok, c, C, BLOCK_C), value, 0.0),)
    return s, t


@triton.jit
def half_sign(d):
    """sign(d) / 2, for |d| of at least 2^-101. A NaN gives any value: the lengths carry it."""
    return tl.clamp(tl.fma(d, HUGE, 0.5), 0.0, 1.0) - 0.5


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def sums_of_squares(ss_tile, tt_tile):
    """Sums of two tiles whose terms are added in the same order, so that equal tiles have equal sums.

    `tl.sum` of a tile takes its terms as they lie over the threads, and a map that is transposed lies otherwise than
    codes. One reduction of both makes the compiler bring them into one layout first.
    """
    ss_rows, tt_rows = tl.reduce((ss_tile, tt_tile), 1, _add_pairs)
    return tl.sum(ss_rows), tl.sum(tt_rows)


@triton.jit
def _divisor(length, eps):
    return tl.maximum(length, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lengths(ss, tt, eps):
    """||s||, r = a / b, and 0, or NaN where a sum of squares is not finite: a length would divide to a quiet zero.

    Everything is rounded to nearest, so that equal sums give r = 1. Squares that underflow belong to lengths below
    1e-19, far below any useful eps.
    """
    length = tl.sqrt_rn(ss)
    return length, tl.div_rn(_divisor(length, eps), _divisor(tl.sqrt_rn(tt), eps)), 0.0 * (ss + tt)


@triton.jit
def store_statistics(statistics_ptr, row, length, ratio, lost, sum_d, half_sq, scale, eps):
    """Store 1 / a, r, along / a and scale * distance of a sample; `half_sq` is half of <s, q>."""
    # so that backward divides by nothing: a division calls a subroutine for odd operands, around which registers spill
    inverse = tl.div_rn(1.0, _divisor(length, eps))
    # below eps the divisor is a constant, so the length contributes nothing
    along = tl.where(length >= eps, 2 * half_sq * inverse, 0.0)
    statistics_ptr += row.to(tl.int64) * 4
    tl.store(statistics_ptr, inverse)
    tl.store(statistics_ptr + 1, ratio)
    tl.store(statistics_ptr + 2, along * inverse + lost)
    tl.store(statistics_ptr + 3, (sum_d * inverse + lost) * scale)


@triton.jit
def add_squares(ss, tt, tiles, TILES: tl.constexpr):
    """Add the squares of s and of t, tile by tile, to two tiles of sums."""
    s, t = tiles
    for i in tl.static_range(TILES):
        ss = tl.fma(s[i], s[i], ss)
        tt = tl.fma(t[i], t[i], tt)
    return ss, tt


@triton.jit
def add_distances(sum_d, half_sq, tiles, ratio, TILES: tl.constexpr):
    """Add |d| and half of s * q, tile by tile, to two tiles of sums."""
    s, t = tiles
    for i in tl.static_range(TILES):
        d = s[i] - t[i] * ratio
        sum_d += tl.abs(d)
        half_sq = tl.fma(half_sign(d), s[i], half_sq)
    return sum_d, half_sq
