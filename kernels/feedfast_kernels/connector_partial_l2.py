"""OFD's student transform and distance as one loss: batch norm with batch statistics, then partial L2.

    mean_c, var_c over all B*H*W pixels of channel c (biased);   rstd = 1 / sqrt(var + eps)
    s = gamma * (y - mean) * rstd + beta
    loss = `partial_l2`(s, target, margin, weight, denominator);   g = d(loss)/ds = 2 * weight / denominator * d
    d(loss)/dbeta = sum(g);   d(loss)/dgamma = sum(g * x),  x = (y - mean) * rstd
    d(loss)/dy    = gamma * rstd * (g - mean(g) - x * mean(g * x))

y is the output of the connector's 1x1 convolution (Heo et al., ICCV 2019, section 3), which stays with the library that
is best at it. The normalized map is never stored: both sums are known when the loss is, so what is left of backward is
one pass over the map (gpu/connector_partial_l2.py). On a CPU the same passes go over cache-sized tiles, in the forward
pass. A compiler, float64 and other devices get `reference`.

Statistics are those of one process: for a synchronized batch norm, and in evaluation, use a batch norm module and
`partial_l2`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from feedfast_kernels._layout import along_row, as_BHWC, scratch, tiles, work_dtype
from feedfast_kernels._ops import OPS, first_order_only, register, runs_triton
from feedfast_kernels._tiled import Source, empty_gradient, finished_gradient, runs_tiled
from feedfast_kernels.codes import StoredAs, Target, stored_parts
from feedfast_kernels.partial_l2 import reference as partial_l2_reference
from feedfast_kernels.partial_l2 import residual_in, square_sum


def connector_partial_l2(
    y_NCHW: Tensor,
    target: Target,
    gamma_C: Tensor,
    beta_C: Tensor,
    running_mean_C: Tensor | None = None,
    running_var_C: Tensor | None = None,
    *,
    margin_C: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """Partial squared distance between batch-normalized maps and max(target, margin).

    Args:
        y_NCHW: float [B, C, H, W] or [B, C], any strides (channels-last is fastest); receives a gradient.
        target: codes or a float map of the same logical shape; no gradient.
        gamma_C: float [C], the batch norm's weight; receives a gradient.
        beta_C: float [C], the batch norm's bias; receives a gradient.
        running_mean_C: float [C], moved towards the batch's mean by ``momentum`` in place, or None.
        running_var_C: float [C], likewise towards the unbiased variance, or None.
        margin_C: float [C], or None.
        momentum: share of the batch in the running statistics, as in torch.nn.BatchNorm2d.
        eps: added to the variance.
        weight: factor of the sum.
        denominator: divisor of the sum; None is the batch size.

    Returns:
        fp32 scalar (float64 for a float64 ``y``); 0 for an empty batch, which leaves the running statistics alone; NaN
        if any value is NaN.

    Raises:
        ValueError: if shapes differ, or there is only one value per channel.
    """
    triton = runs_triton(y_NCHW)
    if not triton and not runs_tiled(y_NCHW):
        return reference(
            y_NCHW, target, gamma_C, beta_C, running_mean_C, running_var_C,
            margin_C=margin_C, momentum=momentum, eps=eps, weight=weight, denominator=denominator,
        )  # fmt: skip
    _check(y_NCHW, target, gamma_C, beta_C, margin_C)
    scale = weight / (max(y_NCHW.shape[0], 1) if denominator is None else denominator)
    options = (margin_C, gamma_C, beta_C, eps, scale, triton, torch.is_grad_enabled())
    loss, mean_C, variance_C = _ConnectorPartialL2.apply(y_NCHW, *stored_parts(target), *options)
    pixels = math.prod((y_NCHW.shape[0], *y_NCHW.shape[2:]))
    if pixels:
        with torch.no_grad():
            if running_mean_C is not None:
                running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), momentum)
            if running_var_C is not None:
                running_var_C.lerp_((variance_C * (pixels / (pixels - 1))).to(running_var_C.dtype), momentum)
    assert isinstance(loss, Tensor)
    return loss


def reference(
    y_NCHW: Tensor,
    target: Target,
    gamma_C: Tensor,
    beta_C: Tensor,
    running_mean_C: Tensor | None = None,
    running_var_C: Tensor | None = None,
    *,
    margin_C: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """`connector_partial_l2` as PyTorch's batch norm followed by the reference of `partial_l2`, gradients by autograd.

    The normalized map is fp32 here whatever ``y_NCHW`` is: rounding it to 16 bits is what the fused form avoids.
    """
    _check(y_NCHW, target, gamma_C, beta_C, margin_C)
    if y_NCHW.numel() == 0:
        return (y_NCHW.sum() + gamma_C.sum() * 0 + beta_C.sum() * 0).to(work_dtype(y_NCHW))
    wide = y_NCHW.to(work_dtype(y_NCHW))
    parameters = (gamma_C.to(wide.dtype), beta_C.to(wide.dtype))
    mean_C, var_C = (None if x is None else x.to(wide.dtype) for x in (running_mean_C, running_var_C))
    s = functional.batch_norm(wide, mean_C, var_C, *parameters, True, momentum, eps)
    for running_C, moved_C in ((running_mean_C, mean_C), (running_var_C, var_C)):
        if running_C is not None and moved_C is not None and moved_C is not running_C:
            running_C.copy_(moved_C)
    return partial_l2_reference(s, target, margin_C=margin_C, weight=weight, denominator=denominator)


def _check(y: Tensor, target: Target, gamma_C: Tensor, beta_C: Tensor, margin_C: Tensor | None) -> None:
    if y.ndim not in (2, 4) or target.shape != y.shape:
        raise ValueError(
            f"connector_partial_l2: expected a target of the map's shape {list(y.shape)}, [B, C, H, W] or [B, C], "
            f"got {list(target.shape)}"
        )
    channels = y.shape[1]
    for name, value in (("gamma", gamma_C), ("beta", beta_C), ("margin", margin_C)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"connector_partial_l2: {name} expected [{channels}], got {list(value.shape)}")
    if y.numel() == channels and channels:
        raise ValueError(
            f"connector_partial_l2: expected more than one value per channel to take a variance of, got {list(y.shape)}"
        )


class _ConnectorPartialL2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        target: Tensor,  # stored bytes for codes, values in the shape of y otherwise
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: StoredAs,
        margin_C: Tensor | None,
        gamma_C: Tensor,
        beta_C: Tensor,
        eps: float,
        scale: float,
        triton: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (y, target, offset_C, step_C, codec, margin_C, gamma_C, beta_C)
        ctx.codec, ctx.eps, ctx.scale, ctx.triton = codec, eps, scale, triton
        if triton:
            loss, statistics, sums = OPS.connector_partial_l2(*inputs, eps, scale)
        else:
            source, wants_gradient = Source(*inputs[:6]), grad_enabled and ctx.needs_input_grad[0]
            loss, statistics, sums, ctx.gradient = _tiled(source, y, gamma_C, beta_C, eps, scale, wants_gradient)
        ctx.save_for_backward(statistics, sums, y, target, offset_C, step_C, margin_C, gamma_C, beta_C)
        mean_C, variance_C = statistics[0], statistics[1]
        ctx.mark_non_differentiable(mean_C, variance_C)
        return loss, mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("connector_partial_l2")
        statistics, sums, y, target, offset_C, step_C, margin_C, gamma_C, beta_C = ctx.saved_tensors
        inputs = (y, target, offset_C, step_C, ctx.codec, margin_C)
        gradient: Tensor | None = None
        if ctx.triton:
            gradient = OPS.connector_partial_l2_backward(
                grad_output, *inputs, gamma_C, beta_C, ctx.scale, statistics, sums
            )
        elif ctx.needs_input_grad[0]:
            gradient = finished_gradient(
                ctx, grad_output, y.dtype,
                lambda: _tiled(Source(*inputs), y, gamma_C, beta_C, ctx.eps, ctx.scale, True)[-1],
            )  # fmt: skip
        factor = grad_output * (2 * ctx.scale)
        d_gamma = sums[1] * statistics[2] * factor
        d_beta = sums[0] * factor
        return gradient, *[None] * 5, d_gamma.to(gamma_C.dtype), d_beta.to(beta_C.dtype), *[None] * 4


def _tiled(
    source: Source, y: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float, scale: float, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the operator returns, and the gradient of y for a grad_output of 1; tile by tile.

    Loss; mean, biased variance and 1 / deviation [3, C]; sums of d and d * (y - mean) [2, C]; gradient.
    """
    shape = source.student.shape
    width, channels = shape[2:]
    pixels = y.numel() // max(channels, 1)
    gradient = empty_gradient(y) if wants_gradient else None
    if pixels == 0:
        nothing = torch.zeros(3, channels, dtype=source.dtype)
        return nothing.sum(), nothing, nothing[:2].clone(), gradient
    mean_C, variance_C = _statistics(source)
    rstd_C = torch.rsqrt(variance_C + eps)
    a_C = gamma_C.to(source.dtype) * rstd_C
    shift_C = (
        beta_C.to(source.dtype) - mean_C * a_C
    )  # one operator per element less than with y - mean, as torch has it
    a, shift = (along_row(value, width) for value in (a_C, shift_C))
    columns = _columns(width, channels)
    column_mean = along_row(mean_C, columns)
    one = torch.ones_like(column_mean)
    gradient_BHWC = d_BHWC = None if gradient is None else as_BHWC(gradient)
    if d_BHWC is not None and not (d_BHWC.dtype == source.dtype and d_BHWC.is_contiguous()):
        d_BHWC = torch.empty(shape, dtype=source.dtype)  # d of the whole map does not fit the gradient's own memory
    losses, sums_d, sums_dx = [], [], []
    # this pass leaves d in the gradient's memory, the one below turns it into the gradient
    for tile in tiles(shape):
        y_rows = source.student_rows(tile)
        s = torch.addcmul(shift, y_rows, a, out=scratch(2, y_rows.shape))
        d = residual_in(s, source.target_rows(tile), 2)
        losses.append(square_sum(d))
        # the sums of batch norm's own backward: one operator for what takes a product and two sums over rows
        d_map, y_map = (_as_map(x, one.numel()) for x in (d, y_rows))
        _, sum_dx, sum_d = torch.ops.aten.native_batch_norm_backward(
            d_map, y_map, None, None, None, column_mean, one, True, eps, [False, True, True]
        )
        sums_d.append(sum_d)
        sums_dx.append(sum_dx)
        if d_BHWC is not None:
            d_BHWC[tile].copy_(d.view(d_BHWC[tile].shape))
    # across columns and tiles in float64: they are few, and each adds numbers of very different size
    sums = torch.stack([*sums_d, *sums_dx]).double().view(2, -1, channels).sum(1).to(source.dtype)
    loss = torch.stack(losses).double().sum()
    statistics = torch.stack([mean_C, variance_C, rstd_C])
    result = (loss * scale).to(source.dtype), statistics, sums
    if gradient_BHWC is None or d_BHWC is None:
        return *result, None

    # factor * (d - mean(d) - (y - mean) * slope), multiplied out
    factor_C = a_C * (2 * scale)
    slope_C = -factor_C * sums[1] * rstd_C * rstd_C / pixels
    rows = [factor_C, -factor_C * sums[0] / pixels - mean_C * slope_C, slope_C]
    factor, constant, slope = (along_row(value, width) for value in rows)
    for tile in tiles(shape):
        y_rows = source.student_rows(tile)
        g = torch.addcmul(constant, y_rows, slope, out=scratch(2, y_rows.shape))
        d = d_BHWC[tile].view(g.shape)
        torch.addcmul(g, d, factor, out=d)
        if gradient_BHWC is not d_BHWC:
            gradient_BHWC[tile].copy_(d_BHWC[tile])
    return *result, gradient


def _statistics(source: Source) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C]: batch norm's own of some columns of every tile, put together in float64.

    They come in the dtype of what is asked, so 16-bit maps are read as fp32. Put together: Chan, Golub & LeVeque 1979.
    """
    width, channels = source.student.shape[2:]
    columns = _columns(width, channels)
    parts: list[Tensor] = []
    rows: list[int] = []
    for tile in tiles(source.student.shape):
        y_rows = source.student_rows(tile)
        parts += torch.batch_norm_update_stats(_as_map(y_rows, columns * channels), None, None, 0.0)
        rows.append(y_rows.shape[0])
    means, variances = torch.stack(parts).double().view(len(rows), 2, columns, channels).unbind(1)
    share = torch.tensor(rows, dtype=torch.float64)[:, None, None] / (sum(rows) * columns)
    mean = (means * share).sum((0, 1))
    variance = ((means - mean).square_().add_(variances) * share).sum((0, 1))
    return mean.to(source.dtype), variance.to(source.dtype)


def _columns(width: int, channels: int) -> int:
    """How many neighboring pixels of a row go into sums of their own.

    Batch norm's kernels add up pixel after pixel in fp32: more columns make the sums exact, up to 1024 sums make them
    fast (0.12 ns per element for the variance; 0.24 for 32 or for 7168 sums).
    """
    return max(k for k in range(1, width + 1) if width % k == 0 and (k == 1 or k * channels <= 1024))


def _as_map(rows: Tensor, sums: int) -> Tensor:
    """Rows [image rows, W * C] as a map of as many channels as there are sums, [1, sums, n, 1], channels-last."""
    return rows.view(1, -1, 1, sums).permute(0, 3, 1, 2)


_INPUTS = "Tensor y, Tensor target, Tensor? offset, Tensor? step, str codec, Tensor? margin, Tensor gamma, Tensor beta"


def _fake(y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    scalar, *rows = (y.new_empty(shape, dtype=torch.float32) for shape in ((), (3, y.shape[1]), (2, y.shape[1])))
    return scalar, rows[0], rows[1]


register(
    f"connector_partial_l2({_INPUTS}, float eps, float scale) -> (Tensor, Tensor, Tensor)",
    "connector_partial_l2.forward",
    _fake,
)
register(
    "connector_partial_l2_backward"
    f"(Tensor grad_output, {_INPUTS}, float scale, Tensor statistics, Tensor sums) -> Tensor",
    "connector_partial_l2.backward",
    lambda _grad_output, y, *_: torch.empty_like(y),
)
