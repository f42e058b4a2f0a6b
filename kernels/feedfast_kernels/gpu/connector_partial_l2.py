"""Training-mode batch norm and partial L2 in one loss: two reads of the map forward, one read and one write backward.

    statistics   mean, variance of every channel                                    reads y                 2 bytes
    loss         d from y and the codes; sums of d^2, d and d * (y - mean)           reads y, codes          3 bytes
    backward     dy from y, the codes and those sums                                 reads y, codes; writes  5 bytes

(bytes per element for bf16 and u8.) With a = gamma * rstd, u = grad_output * 2 * scale and R pixels,

    s = a * (y - mean) + beta;   d = 0 where s <= t and t <= 0, else s - t
    dy     = a * u * (d - sum(d) / R - (y - mean) * rstd^2 * sum(d * (y - mean)) / R)
    dgamma = u * rstd * sum(d * (y - mean));   dbeta = u * sum(d)

Legend: R pixels, C channels, P programs; a tile is [ROWS, BLOCK_C]. A program walks STEPS tiles with its sums in
registers and writes one row of partial sums, [P, C]; a second kernel (or torch.sum) adds those rows in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, dense, dense_target, memory_format_of
from feedfast_kernels.codes import StoredAs, packed_channels
from feedfast_kernels.gpu.launch import THREADS, Launch, ceil_div, channel_block, power_of_two
from feedfast_kernels.gpu.tile import channel_values, inside, join_parts, load_stored, map_offsets, split_parts, values

PER_THREAD = 8  # elements: with six parameters per channel and three accumulators, 16 leave no registers
MOST_CHANNELS = 64  # of a tile: 128 bytes of bf16 per row
MOST_STEPS, PROGRAMS = 32, 2048  # tiles a program walks at most; fewer where that leaves too few programs
MERGE_ROWS = 256  # partial sums that the merging kernel takes at a time


@triton.jit
def _tile(
    rows, i, PACKED: tl.constexpr, C: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """Where tile i of this program is.

    Returns:
        the rows that exist in it (at least none), its first row relative to what the next two point at, and the int64
        starts of that in maps and in stored codes.
    """
    if IMAGE_ROWS == 0:
        # everything but i * ROWS stays the same from tile to tile
        start = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
        first = i * ROWS
        left = tl.minimum(rows - start, ROWS * STEPS).to(tl.int32) - first
    else:
        tiles: tl.constexpr = (IMAGE_ROWS + ROWS - 1) // ROWS
        tile = tl.program_id(0) * STEPS + i
        image = tile // tiles
        first = (tile - image * tiles) * ROWS
        # `rows` counts all pixels of the batch: tiles past the last image are empty
        left = tl.where(image * IMAGE_ROWS < rows, IMAGE_ROWS - first, 0)
        start = image.to(tl.int64) * IMAGE_ROWS
    return tl.minimum(tl.maximum(left, 0), ROWS), first, start * C, start * PACKED


@triton.jit
def _statistics(
    y_ptr,  # [B, R, C] or [B, C, R]
    means_ptr,  # [P, C]
    squares_ptr,  # [P, C]
    counts_ptr,  # [P]
    rows,  # pixels of the batch, B * R
    C: tl.constexpr,  # channels
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """Count, mean and sum of squared distances from it, of the pixels of one program.

    Relative to the mean of its first tile: sums of plain squares lose all digits where |mean| is far above sigma.
    """
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    ahead = tl.arange(0, ROWS)
    left, first, start, _ = _tile(rows, 0, C, C, IMAGE_ROWS, ROWS, STEPS)
    x = load_stored(y_ptr + start, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, "float", SPATIAL_FIRST)
    then_left, first, start, _ = _tile(rows, 1, C, C, IMAGE_ROWS, ROWS, STEPS)
    then_x = load_stored(
        y_ptr + start, first + ahead, ahead < then_left, c0, C, IMAGE_ROWS, BLOCK_C, "float", SPATIAL_FIRST
    )
    shift_C = tl.sum(x.to(tl.float32), axis=0) / tl.maximum(left, 1)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    square = tl.zeros((ROWS, BLOCK_C), tl.float32)
    count = left * 0
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            ask, first, start, _ = _tile(rows, i + j + 2, C, C, IMAGE_ROWS, ROWS, STEPS)
            ask = tl.where(i + j + 2 < STEPS, ask, 0)
            asked = load_stored(
                y_ptr + start, first + ahead, ahead < ask, c0, C, IMAGE_ROWS, BLOCK_C, "float", SPATIAL_FIRST
            )
            ok = inside(ahead < left, c, C, BLOCK_C)
            distance = tl.where(ok, x.to(tl.float32) - shift_C[None, :], 0.0)
            total += distance
            square = tl.fma(distance, distance, square)
            count += left
            x, left, then_x, then_left = then_x, then_left, asked, ask
    total_C = tl.sum(total, axis=0)
    mean_C = total_C / tl.maximum(count, 1)
    at = tl.program_id(0) * C + c
    tl.store(means_ptr + at, shift_C + mean_C, mask=c < C)
    tl.store(squares_ptr + at, tl.sum(square, axis=0) - total_C * mean_C, mask=c < C)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + tl.program_id(0), count.to(tl.float32))


@triton.jit
def _merge(
    means_ptr,  # [P, C]
    squares_ptr,  # [P, C]
    counts_ptr,  # [P]
    statistics_ptr,  # [3, C]: mean, variance, 1 / deviation
    rows,  # pixels of the batch, B * R
    programs,  # P
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
):
    """Mean, biased variance and 1 / deviation of every channel, [3, C], from those of the programs.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift_C = tl.load(means_ptr + c, mask=c < C, other=0.0)
    moved = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS):
        p = i * ROWS + tl.arange(0, ROWS)
        ok = inside(p < programs, c, C, BLOCK_C)
        n = tl.load(counts_ptr + p, mask=p < programs, other=0.0)
        mean = tl.load(means_ptr + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        moved += tl.where(ok, (mean - shift_C[None, :]) * n[:, None], 0.0)
    mean_C = shift_C + tl.sum(moved, axis=0) / rows
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS):
        p = i * ROWS + tl.arange(0, ROWS)
        ok = inside(p < programs, c, C, BLOCK_C)
        n = tl.load(counts_ptr + p, mask=p < programs, other=0.0)
        mean = tl.load(means_ptr + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        square = tl.load(squares_ptr + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        away = mean - mean_C[None, :]
        total += tl.where(ok, square + away * away * n[:, None], 0.0)
    # rounding can leave a constant channel a hair below zero
    variance_C = tl.maximum(tl.sum(total, axis=0) / rows, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(statistics_ptr + c, mean_C, mask=c < C)
    tl.store(statistics_ptr + C + c, variance_C, mask=c < C)
    tl.store(statistics_ptr + 2 * C + c, tl.rsqrt(variance_C + eps), mask=c < C)


@triton.jit
def _load(
    y_ptr,  # [B, R, C] or [B, C, R]
    target_ptr,  # codes [B, R, PACKED], or floats like y
    rows,  # pixels of the batch, B * R
    i,
    c0,
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of codes, or "float"
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """Tile i as it is stored, y and both parts of the target, and how many of its rows exist (none past the last)."""
    ahead = tl.arange(0, ROWS)
    left, first, start, code_start = _tile(rows, i, PACKED, C, IMAGE_ROWS, ROWS, STEPS)
    left = tl.where(i < STEPS, left, 0)
    target_ptr += code_start if CODEC != "float" else start
    x = load_stored(y_ptr + start, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, "float", SPATIAL_FIRST)
    t = load_stored(target_ptr, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST)
    t, upper = split_parts(t, CODEC)
    return x, t, upper, left


@triton.jit
def _residual(
    x,
    t,
    upper,
    ok,
    mean_C,
    a_C,
    beta_C,
    offset_C,
    step_C,
    margin_C,
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    CODEC: tl.constexpr,  # of codes, or "float"
    HAS_MARGIN: tl.constexpr,
):
    """d, 0 outside the map, and y - mean, anything there."""
    t = values(join_parts(t, upper, CODEC), offset_C, step_C, ROWS, BLOCK_C, CODEC)
    if HAS_MARGIN:
        t = tl.maximum(t, margin_C[None, :], propagate_nan=tl.PropagateNan.ALL)
    centered = x.to(tl.float32) - mean_C[None, :]
    s = tl.fma(centered, a_C[None, :], beta_C[None, :])
    dead = (s <= t) & (t <= 0)
    return tl.where(ok & ~dead, s - t, 0.0), centered


@triton.jit
def _forward(
    y_ptr,  # [B, R, C] or [B, C, R]
    target_ptr,  # codes [B, R, PACKED], or floats like y
    offset_ptr,  # [C], None with float targets
    step_ptr,  # [C], None with float targets
    margin_ptr,  # [C], or None
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    statistics_ptr,  # [3, C]: mean, variance, 1 / deviation
    partial_ptr,  # [3, P, C]
    rows,  # pixels of the batch, B * R
    programs,  # P
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of codes, or "float"
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    """Sums of d, d * (y - mean) and d^2 over the pixels of one program: partial [3, P, C]."""
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    x, t, upper, left = _load(
        y_ptr, target_ptr, rows, 0, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    then_x, then_t, then_upper, then_left = _load(
        y_ptr, target_ptr, rows, 1, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    mean_C = channel_values(statistics_ptr, c, c < C)
    a_C = channel_values(gamma_ptr, c, c < C) * channel_values(statistics_ptr + 2 * C, c, c < C)
    beta_C = channel_values(beta_ptr, c, c < C)
    offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
    margin_C = channel_values(margin_ptr, c, c < C) if margin_ptr is not None else 0.0
    sum_d = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_dx = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_dd = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            asked_x, asked_t, asked_upper, asked = _load(
                y_ptr, target_ptr, rows, i + j + 2, c0,
                C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
            ok = inside(tl.arange(0, ROWS) < left, c, C, BLOCK_C)
            d, centered = _residual(
                x, t, upper, ok, mean_C, a_C, beta_C, offset_C, step_C, margin_C,
                ROWS, BLOCK_C, CODEC, margin_ptr is not None,
            )  # fmt: skip
            sum_d += d
            sum_dx = tl.fma(d, centered, sum_dx)
            sum_dd = tl.fma(d, d, sum_dd)
            x, t, upper, left = then_x, then_t, then_upper, then_left
            then_x, then_t, then_upper, then_left = asked_x, asked_t, asked_upper, asked
    at = partial_ptr + tl.program_id(0) * C + c
    tl.store(at, tl.sum(sum_d, axis=0), mask=c < C)
    tl.store(at + programs * C, tl.sum(sum_dx, axis=0), mask=c < C)
    tl.store(at + 2 * programs * C, tl.sum(sum_dd, axis=0), mask=c < C)


@triton.jit
def _backward(
    y_ptr,  # [B, R, C] or [B, C, R]
    target_ptr,  # codes [B, R, PACKED], or floats like y
    offset_ptr,  # [C], None with float targets
    step_ptr,  # [C], None with float targets
    margin_ptr,  # [C], or None
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    statistics_ptr,  # [3, C]: mean, variance, 1 / deviation
    sums_ptr,  # [2, C]: of d and of d * (y - mean)
    grad_output_ptr,  # scalar
    gradient_ptr,  # like y
    rows,  # pixels of the batch, B * R
    scale,  # weight / denominator
    C: tl.constexpr,  # channels
    PACKED: tl.constexpr,  # last axis of stored codes
    IMAGE_ROWS: tl.constexpr,  # R where tiles stay inside a sample, else 0
    ROWS: tl.constexpr,  # pixels per tile
    BLOCK_C: tl.constexpr,  # channels per tile
    STEPS: tl.constexpr,  # tiles per program
    CODEC: tl.constexpr,  # of codes, or "float"
    SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
    TARGET_SPATIAL_FIRST: tl.constexpr,  # [B, C, R] in memory
):
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    ahead = tl.arange(0, ROWS)
    x, t, upper, left = _load(
        y_ptr, target_ptr, rows, 0, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    mean_C = channel_values(statistics_ptr, c, c < C)
    rstd_C = channel_values(statistics_ptr + 2 * C, c, c < C)
    a_C = channel_values(gamma_ptr, c, c < C) * rstd_C
    beta_C = channel_values(beta_ptr, c, c < C)
    offset_C = channel_values(offset_ptr, c, c < C) if CODEC != "float" else 0.0
    step_C = channel_values(step_ptr, c, c < C) if CODEC != "float" else 0.0
    margin_C = channel_values(margin_ptr, c, c < C) if margin_ptr is not None else 0.0
    mean_d_C = channel_values(sums_ptr, c, c < C) / rows
    slope_C = channel_values(sums_ptr + C, c, c < C) / rows * (rstd_C * rstd_C)
    factor_C = a_C * (tl.load(grad_output_ptr).to(tl.float32) * (2 * scale))
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            # before the store: the compiler must assume that a store changes what a later load reads
            then_x, then_t, then_upper, then_left = _load(
                y_ptr, target_ptr, rows, i + j + 1, c0,
                C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
            ok = inside(ahead < left, c, C, BLOCK_C)
            d, centered = _residual(
                x, t, upper, ok, mean_C, a_C, beta_C, offset_C, step_C, margin_C,
                ROWS, BLOCK_C, CODEC, margin_ptr is not None,
            )  # fmt: skip
            dy = tl.fma(centered, -slope_C[None, :], d - mean_d_C[None, :]) * factor_C[None, :]
            _, first, start, _ = _tile(rows, i + j, PACKED, C, IMAGE_ROWS, ROWS, STEPS)
            tl.store(gradient_ptr + start + map_offsets(first + ahead, c, C, IMAGE_ROWS, SPATIAL_FIRST), dy, mask=ok)
            x, t, upper, left = then_x, then_t, then_upper, then_left


class Plan:
    """How one call is cut up; makes the launches of all its passes, from real or from meta tensors.

    Args:
        y: [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C]; output of the 1x1 convolution.
        target: contiguous codes [B, H, W, C] (or [B, C]), or a float map like ``y``, in either order.
        offset_C: fp32 [C], None for float maps.
        step_C: fp32 [C], None for float maps.
        codec: of codes, or ``"float"`` for a float map.
        margin_C: float [C], or None.
        gamma_C: float [C], batch norm's weight.
        beta_C: float [C], batch norm's bias.
    """

    def __init__(
        self,
        y: Tensor,
        target: Tensor,
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: StoredAs,
        margin_C: Tensor | None,
        gamma_C: Tensor,
        beta_C: Tensor,
    ) -> None:
        batch, channels = y.shape[:2]
        spatial_first = memory_format_of(y) == "contiguous"
        target_spatial_first = codec == "float" and memory_format_of(target) == "contiguous"
        one_image = not spatial_first and not target_spatial_first
        if not one_image and y[:1].numel() >= 2**31:
            raise ValueError(f"connector_partial_l2: expected < 2^31 values per sample in NCHW order, got {y.shape}")
        self.y, self.channels = y, channels
        self.rows = y.numel() // channels
        pixels = self.rows // batch
        block_c = channel_block(channels, 32 if spatial_first else MOST_CHANNELS)
        tile_rows = max(1, THREADS * PER_THREAD // block_c)
        tiles = ceil_div(self.rows, tile_rows) if one_image else batch * ceil_div(pixels, tile_rows)
        blocks = ceil_div(channels, block_c)
        wanted = max(1, tiles * blocks // PROGRAMS)
        self.steps = min(MOST_STEPS, power_of_two(wanted + 1) // 2)
        self.programs = ceil_div(tiles, self.steps)
        self.grid = (self.programs, blocks)
        self.tiling = {
            "C": channels,
            "IMAGE_ROWS": 0 if one_image else pixels,
            "ROWS": tile_rows,
            "BLOCK_C": block_c,
            "SPATIAL_FIRST": spatial_first,
        }
        self.constants = self.tiling | {
            "STEPS": self.steps,
            "PACKED": packed_channels(channels, codec),
            "CODEC": codec,
            "TARGET_SPATIAL_FIRST": target_spatial_first,
        }
        vectors = {
            "offset_ptr": offset_C,
            "step_ptr": step_C,
            "margin_ptr": margin_C,
            "gamma_ptr": gamma_C,
            "beta_ptr": beta_C,
        }
        self.inputs: dict[str, Any] = {"y_ptr": y, "target_ptr": target}
        self.inputs |= {name: contiguous(vector) for name, vector in vectors.items()}

    def empty(self, *shape: int) -> Tensor:
        """fp32, on the device of ``y``."""
        return torch.empty(shape, dtype=torch.float32, device=self.y.device)

    def statistics(self, eps: float) -> tuple[list[Launch], Tensor]:
        """The two launches that compute mean, biased variance and 1 / sqrt(variance + eps), and their fp32 [3, C]."""
        means, squares = self.empty(2, self.programs, self.channels)
        counts, statistics = self.empty(self.programs), self.empty(3, self.channels)
        parts = {"means_ptr": means, "squares_ptr": squares, "counts_ptr": counts}
        steps = {"STEPS": self.steps}
        first = Launch(_statistics, self.grid, {"y_ptr": self.y, **parts, "rows": self.rows}, self.tiling | steps)
        block_c = min(8, power_of_two(self.channels))
        merging = {
            "C": self.channels,
            "ROWS": MERGE_ROWS,
            "BLOCK_C": block_c,
            "STEPS": power_of_two(ceil_div(self.programs, MERGE_ROWS)),
        }
        arguments = parts | {"statistics_ptr": statistics, "rows": self.rows, "programs": self.programs, "eps": eps}
        return [first, Launch(_merge, (ceil_div(self.channels, block_c),), arguments, merging)], statistics

    def loss(self, statistics: Tensor) -> tuple[Launch, Tensor]:
        """The launch of the loss pass, and its partial sums of d, d * (y - mean) and d^2: fp32 [3, P, C]."""
        partial = self.empty(3, self.programs, self.channels)
        arguments = self.inputs | {"statistics_ptr": statistics, "partial_ptr": partial, "rows": self.rows}
        return Launch(_forward, self.grid, arguments | {"programs": self.programs}, self.constants), partial

    def gradient(self, statistics: Tensor, sums: Tensor, grad_output: Tensor, scale: float, gradient: Tensor) -> Launch:
        """The launch of the backward pass; ``gradient`` has the memory format of ``y``."""
        arguments = self.inputs | {
            "statistics_ptr": statistics,
            "sums_ptr": sums,
            "grad_output_ptr": grad_output,
            "gradient_ptr": gradient,
        }
        return Launch(_backward, self.grid, arguments | {"rows": self.rows, "scale": scale}, self.constants)


def forward(
    y: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: StoredAs,
    margin_C: Tensor | None,
    gamma_C: Tensor,
    beta_C: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, a scalar; mean, biased variance, 1 / deviation [3, C]; sums of d and d * (y - mean) [2, C]; all fp32."""
    if y.numel() == 0:
        nothing = torch.zeros(3, y.shape[1], dtype=torch.float32, device=y.device)
        return nothing.sum(), nothing, nothing[:2].clone()
    target = dense_target(target, codec)
    plan = Plan(dense(y), target, offset_C, step_C, codec, margin_C, gamma_C, beta_C)
    launches, statistics = plan.statistics(eps)
    for launch in launches:
        launch.run()
    launch, partial = plan.loss(statistics)
    launch.run()
    sums = partial.sum(1)
    return sums[2].sum() * scale, statistics, sums[:2].clone()


def backward(
    grad_output: Tensor,
    y: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: StoredAs,
    margin_C: Tensor | None,
    gamma_C: Tensor,
    beta_C: Tensor,
    scale: float,
    statistics: Tensor,
    sums: Tensor,
) -> Tensor:
    """Gradient of ``y``, in its dtype and strides."""
    if y.numel() == 0:
        return torch.empty_like(y)
    plain = dense(y)
    target = dense_target(target, codec)
    plan = Plan(plain, target, offset_C, step_C, codec, margin_C, gamma_C, beta_C)
    gradient = torch.empty_like(y)
    into = gradient if memory_format_of(gradient) == memory_format_of(plain) else torch.empty_like(plain)
    plan.gradient(statistics, sums, grad_output, scale, into).run()
    return gradient if into is gradient else gradient.copy_(into)
