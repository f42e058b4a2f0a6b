"""Training-mode batch norm and partial L2 in one loss: two reads of the map forward, one read and one write backward.

    statistics   mean, variance of every channel                                    reads y                 2 bytes
    loss         d from y and the codes; sums of d^2, d and d * (y - mean)           reads y, codes          3 bytes
    backward     dy from y, the codes and those sums                                 reads y, codes; writes  5 bytes

(bytes an element for bf16 and u8: 10 in all.) With a = gamma * rstd and u = upstream * 2 * scale,

    s = a * (y - mean) + beta;   d = 0 where s <= t and t <= 0, else s - t;   R = pixels
    dy     = a * u * (d - sum(d) / R - (y - mean) * rstd^2 * sum(d * (y - mean)) / R)
    dgamma = u * rstd * sum(d * (y - mean));   dbeta = u * sum(d)

The loss pass sums what batch norm's backward needs, so that backward is a single pass. The normalized map never exists.

Legend: R pixels, C channels; a tile is [ROWS, BLOCK_C], 8 elements a thread: six vectors of parameters a channel and
three accumulators leave no registers for 16. A program walks STEPS tiles with its sums in registers and writes one row
of partial sums, [P, C]; a second kernel (or torch.sum) adds those rows in a fixed order.

Variance: every program subtracts the mean of its own first tile before it squares, and programs are combined by the
formula of Chan, Golub and LeVeque (1979). Sums of plain squares lose all digits where |mean| is far above sigma.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels._ops import contiguous, memory_order, ordered, ordered_target
from feedfast_kernels.codes import packed_channels
from feedfast_kernels.gpu.launch import THREADS, Launch, ceil_div, channel_block, power_of_two
from feedfast_kernels.gpu.tile import channel_values, inside, load_stored, map_offsets, values

PER_THREAD = 8
MOST_CHANNELS = 64  # of a tile: 128 bytes of bf16 a row
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
    y, means, squares, counts, rows,
    C: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
    SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared distances from it, of the pixels of one program."""
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    ahead = tl.arange(0, ROWS)
    left, first, start, _ = _tile(rows, 0, C, C, IMAGE_ROWS, ROWS, STEPS)
    x = load_stored(y + start, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, "", SPATIAL_FIRST)
    then_left, first, start, _ = _tile(rows, 1, C, C, IMAGE_ROWS, ROWS, STEPS)
    then_x = load_stored(y + start, first + ahead, ahead < then_left, c0, C, IMAGE_ROWS, BLOCK_C, "", SPATIAL_FIRST)
    shift_C = tl.sum(x.to(tl.float32), axis=0) / tl.maximum(left, 1)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    square = tl.zeros((ROWS, BLOCK_C), tl.float32)
    count = left * 0
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            ask, first, start, _ = _tile(rows, i + j + 2, C, C, IMAGE_ROWS, ROWS, STEPS)
            ask = tl.where(i + j + 2 < STEPS, ask, 0)
            asked = load_stored(y + start, first + ahead, ahead < ask, c0, C, IMAGE_ROWS, BLOCK_C, "", SPATIAL_FIRST)
            ok = inside(ahead < left, c, C, BLOCK_C)
            distance = tl.where(ok, x.to(tl.float32) - shift_C[None, :], 0.0)
            total += distance
            square = tl.fma(distance, distance, square)
            count += left
            x, left, then_x, then_left = then_x, then_left, asked, ask
    total_C = tl.sum(total, axis=0)
    mean_C = total_C / tl.maximum(count, 1)
    at = tl.program_id(0) * C + c
    tl.store(means + at, shift_C + mean_C, mask=c < C)
    tl.store(squares + at, tl.sum(square, axis=0) - total_C * mean_C, mask=c < C)
    if tl.program_id(1) == 0:
        tl.store(counts + tl.program_id(0), count.to(tl.float32))


@triton.jit
def _merge(
    means, squares, counts, statistics, rows, programs, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance and 1 / deviation of every channel, [3, C], from those of the programs."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift_C = tl.load(means + c, mask=c < C, other=0.0)
    moved = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS):
        p = i * ROWS + tl.arange(0, ROWS)
        ok = inside(p < programs, c, C, BLOCK_C)
        n = tl.load(counts + p, mask=p < programs, other=0.0)
        mean = tl.load(means + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        moved += tl.where(ok, (mean - shift_C[None, :]) * n[:, None], 0.0)
    mean_C = shift_C + tl.sum(moved, axis=0) / rows
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS):
        p = i * ROWS + tl.arange(0, ROWS)
        ok = inside(p < programs, c, C, BLOCK_C)
        n = tl.load(counts + p, mask=p < programs, other=0.0)
        mean = tl.load(means + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        square = tl.load(squares + p[:, None] * C + c[None, :], mask=ok, other=0.0)
        away = mean - mean_C[None, :]
        total += tl.where(ok, square + away * away * n[:, None], 0.0)
    # rounding can leave a constant channel a hair below zero
    variance_C = tl.maximum(tl.sum(total, axis=0) / rows, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(statistics + c, mean_C, mask=c < C)
    tl.store(statistics + C + c, variance_C, mask=c < C)
    tl.store(statistics + 2 * C + c, tl.rsqrt(variance_C + eps), mask=c < C)


@triton.jit
def _load(
    y, target, rows, i, c0,
    C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr, CODEC: tl.constexpr, SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Tile i as it is stored, y and target, and how many of its rows exist (none past the last tile)."""
    ahead = tl.arange(0, ROWS)
    left, first, start, code_start = _tile(rows, i, PACKED, C, IMAGE_ROWS, ROWS, STEPS)
    left = tl.where(i < STEPS, left, 0)
    target += code_start if CODEC != "" else start
    x = load_stored(y + start, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, "", SPATIAL_FIRST)
    t = load_stored(target, first + ahead, ahead < left, c0, C, IMAGE_ROWS, BLOCK_C, CODEC, TARGET_SPATIAL_FIRST)
    return x, t, left


@triton.jit
def _residual(
    x, t, ok, mean_C, a_C, beta_C, offset_C, step_C, margin_C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CODEC: tl.constexpr, HAS_MARGIN: tl.constexpr,
):  # fmt: skip
    """d, 0 outside the map, and y - mean, anything there."""
    t = values(t, offset_C, step_C, ROWS, BLOCK_C, CODEC)
    if HAS_MARGIN:
        t = tl.maximum(t, margin_C[None, :], propagate_nan=tl.PropagateNan.ALL)
    centred = x.to(tl.float32) - mean_C[None, :]
    s = tl.fma(centred, a_C[None, :], beta_C[None, :])
    dead = (s <= t) & (t <= 0)
    return tl.where(ok & ~dead, s - t, 0.0), centred


@triton.jit
def _forward(
    y, target, offset, step, margin, gamma, beta, statistics, partial, rows, programs,
    C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr, CODEC: tl.constexpr, SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Sums of d, d * (y - mean) and d^2 over the pixels of one program: partial [3, P, C]."""
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    x, t, left = _load(
        y, target, rows, 0, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    then_x, then_t, then_left = _load(
        y, target, rows, 1, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    mean_C = channel_values(statistics, c, c < C)
    a_C = channel_values(gamma, c, c < C) * channel_values(statistics + 2 * C, c, c < C)
    beta_C = channel_values(beta, c, c < C)
    offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
    margin_C = channel_values(margin, c, c < C) if margin is not None else 0.0
    sum_d = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_dx = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_dd = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            asked_x, asked_t, asked = _load(
                y, target, rows, i + j + 2, c0,
                C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
            ok = inside(tl.arange(0, ROWS) < left, c, C, BLOCK_C)
            d, centred = _residual(
                x, t, ok, mean_C, a_C, beta_C, offset_C, step_C, margin_C, ROWS, BLOCK_C, CODEC, margin is not None
            )
            sum_d += d
            sum_dx = tl.fma(d, centred, sum_dx)
            sum_dd = tl.fma(d, d, sum_dd)
            x, t, left, then_x, then_t, then_left = then_x, then_t, then_left, asked_x, asked_t, asked
    at = partial + tl.program_id(0) * C + c
    tl.store(at, tl.sum(sum_d, axis=0), mask=c < C)
    tl.store(at + programs * C, tl.sum(sum_dx, axis=0), mask=c < C)
    tl.store(at + 2 * programs * C, tl.sum(sum_dd, axis=0), mask=c < C)


@triton.jit
def _backward(
    y, target, offset, step, margin, gamma, beta, statistics, sums, upstream, gradient, rows, scale,
    C: tl.constexpr, PACKED: tl.constexpr, IMAGE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr, CODEC: tl.constexpr, SPATIAL_FIRST: tl.constexpr, TARGET_SPATIAL_FIRST: tl.constexpr,
):  # fmt: skip
    UNROLL: tl.constexpr = min(STEPS, 4)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    ahead = tl.arange(0, ROWS)
    x, t, left = _load(
        y, target, rows, 0, c0,
        C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
    )  # fmt: skip
    mean_C = channel_values(statistics, c, c < C)
    rstd_C = channel_values(statistics + 2 * C, c, c < C)
    a_C = channel_values(gamma, c, c < C) * rstd_C
    beta_C = channel_values(beta, c, c < C)
    offset_C = channel_values(offset, c, c < C) if CODEC != "" else 0.0
    step_C = channel_values(step, c, c < C) if CODEC != "" else 0.0
    margin_C = channel_values(margin, c, c < C) if margin is not None else 0.0
    mean_d_C = channel_values(sums, c, c < C) / rows
    slope_C = channel_values(sums + C, c, c < C) / rows * (rstd_C * rstd_C)
    factor_C = a_C * (tl.load(upstream).to(tl.float32) * (2 * scale))
    for i in tl.range(0, STEPS, UNROLL):
        for j in tl.static_range(UNROLL):
            # before the store: the compiler must assume that a store changes what a later load reads
            then_x, then_t, then_left = _load(
                y, target, rows, i + j + 1, c0,
                C, PACKED, IMAGE_ROWS, ROWS, BLOCK_C, STEPS, CODEC, SPATIAL_FIRST, TARGET_SPATIAL_FIRST,
            )  # fmt: skip
            ok = inside(ahead < left, c, C, BLOCK_C)
            d, centred = _residual(
                x, t, ok, mean_C, a_C, beta_C, offset_C, step_C, margin_C, ROWS, BLOCK_C, CODEC, margin is not None
            )
            dy = tl.fma(centred, -slope_C[None, :], d - mean_d_C[None, :]) * factor_C[None, :]
            _, first, start, _ = _tile(rows, i + j, PACKED, C, IMAGE_ROWS, ROWS, STEPS)
            tl.store(gradient + start + map_offsets(first + ahead, c, C, IMAGE_ROWS, SPATIAL_FIRST), dy, mask=ok)
            x, t, left = then_x, then_t, then_left


class Plan:
    """How one call is cut up; makes the launches of all its passes, from real or from meta tensors.

    Args:
        y: [B, C, H, W] in channels-last or contiguous order, or contiguous [B, C]; output of the 1x1 convolution.
        target: contiguous codes [B, H, W, C] (or [B, C]), or a float map like ``y``, in either order.
        offset_C: fp32 [C], None for float maps.
        step_C: fp32 [C], None for float maps.
        codec: ``"u8"``, ``"u4"``, or ``""`` for float maps.
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
        codec: str,
        margin_C: Tensor | None,
        gamma_C: Tensor,
        beta_C: Tensor,
    ) -> None:
        batch, channels = y.shape[:2]
        spatial_first = memory_order(y) == "contiguous"
        target_spatial_first = not codec and memory_order(target) == "contiguous"
        one_image = not spatial_first and not target_spatial_first
        if not one_image and y[:1].numel() >= 2**31:
            raise ValueError(f"connector_partial_l2: expected < 2^31 values a sample in NCHW order, got {y.shape}")
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
        vectors = {"offset": offset_C, "step": step_C, "margin": margin_C, "gamma": gamma_C, "beta": beta_C}
        self.inputs: dict[str, Any] = {"y": y, "target": target}
        self.inputs |= {name: contiguous(vector) for name, vector in vectors.items()}

    def empty(self, *shape: int) -> Tensor:
        """An fp32 tensor beside ``y``."""
        return torch.empty(shape, dtype=torch.float32, device=self.y.device)

    def statistics(self, eps: float) -> tuple[list[Launch], Tensor]:
        """The two launches that compute mean, biased variance and 1 / sqrt(variance + eps), and their fp32 [3, C]."""
        means, squares = self.empty(2, self.programs, self.channels)
        counts, statistics = self.empty(self.programs), self.empty(3, self.channels)
        parts = {"means": means, "squares": squares, "counts": counts}
        steps = {"STEPS": self.steps}
        first = Launch(_statistics, self.grid, {"y": self.y, **parts, "rows": self.rows}, self.tiling | steps)
        block_c = min(8, power_of_two(self.channels))
        merging = {
            "C": self.channels,
            "ROWS": MERGE_ROWS,
            "BLOCK_C": block_c,
            "STEPS": power_of_two(ceil_div(self.programs, MERGE_ROWS)),
        }
        arguments = parts | {"statistics": statistics, "rows": self.rows, "programs": self.programs, "eps": eps}
        return [first, Launch(_merge, (ceil_div(self.channels, block_c),), arguments, merging)], statistics

    def loss(self, statistics: Tensor) -> tuple[Launch, Tensor]:
        """The launch of the loss pass, and its partial sums of d, d * (y - mean) and d^2: fp32 [3, P, C]."""
        partial = self.empty(3, self.programs, self.channels)
        arguments = self.inputs | {"statistics": statistics, "partial": partial, "rows": self.rows}
        return Launch(_forward, self.grid, arguments | {"programs": self.programs}, self.constants), partial

    def gradient(self, statistics: Tensor, sums: Tensor, upstream: Tensor, scale: float, gradient: Tensor) -> Launch:
        """The launch of the backward pass; ``gradient`` has the memory order of ``y``."""
        arguments = self.inputs | {"statistics": statistics, "sums": sums, "upstream": upstream, "gradient": gradient}
        return Launch(_backward, self.grid, arguments | {"rows": self.rows, "scale": scale}, self.constants)


def forward(
    y: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: str,
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
    target = ordered_target(target, codec)
    plan = Plan(ordered(y), target, offset_C, step_C, codec, margin_C, gamma_C, beta_C)
    launches, statistics = plan.statistics(eps)
    for launch in launches:
        launch.run()
    launch, partial = plan.loss(statistics)
    launch.run()
    sums = partial.sum(1)
    return sums[2].sum() * scale, statistics, sums[:2].clone()


def backward(
    upstream: Tensor,
    y: Tensor,
    target: Tensor,
    offset_C: Tensor | None,
    step_C: Tensor | None,
    codec: str,
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
    plain = ordered(y)
    target = ordered_target(target, codec)
    plan = Plan(plain, target, offset_C, step_C, codec, margin_C, gamma_C, beta_C)
    gradient = torch.empty_like(y)
    into = gradient if memory_order(gradient) == memory_order(plain) else torch.empty_like(plain)
    plan.gradient(statistics, sums, upstream, scale, into).run()
    return gradient if into is gradient else gradient.copy_(into)
