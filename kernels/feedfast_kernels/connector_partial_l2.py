"""OFD's student transform and distance as one loss: batch norm with batch statistics, then partial L2.

    mean_c, var_c over all B*H*W pixels of channel c (biased);   rstd = 1 / sqrt(var + eps)
    s = gamma * (y - mean) * rstd + beta
    loss = `partial_l2`(s, target, margin, weight, denominator)

y is the output of the connector's 1x1 convolution. Heo et al., "A Comprehensive Overhaul of Feature Distillation",
ICCV 2019, section 3: the student's regressor is a 1x1 convolution and a batch norm. The convolution stays with the
library that is best at it; everything after it is here, and the normalised map is never stored. With
g = d(loss)/ds = 2 * weight / denominator * d,

    d(loss)/dbeta = sum(g);   d(loss)/dgamma = sum(g * x),  x = (y - mean) * rstd
    d(loss)/dy    = gamma * rstd * (g - mean(g) - x * mean(g * x))

and both sums are known when the loss is, so backward is one pass. On CUDA Triton kernels do it in three passes over the
map (gpu/connector_partial_l2.py: 10 bytes an element for bf16 and u8 codes, where compiled operators move about 26).
Elsewhere, and for float64, PyTorch operators over cache-sized tiles; on a CPU whole maps cost most by the fresh memory
they need.

Statistics are those of one process: for a synchronised batch norm, and in evaluation, use a batch norm module and
`partial_l2`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from feedfast_kernels._layout import as_BHWC, tiles
from feedfast_kernels._ops import OPS, first_order_only, register, runs_triton
from feedfast_kernels.codes import Codes, Target
from feedfast_kernels.partial_l2 import Source, residual
from feedfast_kernels.partial_l2 import reference as partial_l2_reference


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
    """Partial squared distance between batch-normalised maps and max(target, margin).

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
        ValueError: if shapes differ, or there is only one value a channel.
    """
    _check(y_NCHW, target, gamma_C, beta_C, margin_C)
    scale = weight / (max(y_NCHW.shape[0], 1) if denominator is None else denominator)
    if isinstance(target, Codes):
        stored = (target.data, target.offset, target.step, target.codec)
    else:
        stored = (target.detach(), None, None, "")
    triton = runs_triton(y_NCHW)
    loss, mean_C, variance_C = _ConnectorPartialL2.apply(y_NCHW, *stored, margin_C, gamma_C, beta_C, eps, scale, triton)
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
    """`connector_partial_l2` as PyTorch's batch norm followed by the reference of `partial_l2`, with autograd's backward.

    The normalised map is fp32 here whatever ``y_NCHW`` is: rounding it to 16 bits is what the fused form avoids.
    """
    _check(y_NCHW, target, gamma_C, beta_C, margin_C)
    if y_NCHW.numel() == 0:
        return (y_NCHW.sum() + gamma_C.sum() * 0 + beta_C.sum() * 0).to(torch.float32)
    wide = y_NCHW if y_NCHW.dtype == torch.float64 else y_NCHW.float()
    parameters = (gamma_C.to(wide.dtype), beta_C.to(wide.dtype))
    s = functional.batch_norm(wide, running_mean_C, running_var_C, *parameters, True, momentum, eps)
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
            f"connector_partial_l2: expected more than one value a channel to take a variance of, got {list(y.shape)}"
        )


class _ConnectorPartialL2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        target: Tensor,  # stored bytes for codes, values in the shape of y otherwise
        offset_C: Tensor | None,
        step_C: Tensor | None,
        codec: str,  # "" for values
        margin_C: Tensor | None,
        gamma_C: Tensor,
        beta_C: Tensor,
        eps: float,
        scale: float,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (y, target, offset_C, step_C, codec, margin_C, gamma_C, beta_C, eps, scale)
        run = OPS.connector_partial_l2 if triton else _forward
        loss, statistics, sums = run(*arguments)
        ctx.save_for_backward(y, target, offset_C, step_C, margin_C, gamma_C, beta_C, statistics, sums)
        ctx.codec, ctx.scale, ctx.triton = codec, scale, triton
        mean_C, variance_C = statistics[0], statistics[1]
        ctx.mark_non_differentiable(mean_C, variance_C)
        return loss, mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, target, offset_C, step_C, margin_C, gamma_C, beta_C, statistics, sums = ctx.saved_tensors
        arguments = (y, target, offset_C, step_C, ctx.codec, margin_C, gamma_C, beta_C, ctx.scale)
        if ctx.triton:
            first_order_only("connector_partial_l2")
        run = OPS.connector_partial_l2_backward if ctx.triton else _backward
        gradient = run(upstream, *arguments, statistics, sums)
        factor = upstream * (2 * ctx.scale)
        d_gamma = sums[1] * statistics[2] * factor
        d_beta = sums[0] * factor
        return gradient, *[None] * 5, d_gamma.to(gamma_C.dtype), d_beta.to(beta_C.dtype), None, None, None


def _forward(
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
    """Loss; mean, biased variance and 1 / deviation [3, C]; sums of d and d * (y - mean) [2, C]; tile by tile."""
    source = Source(y, target, offset_C, step_C, codec, margin_C)
    batch, height, width, channels = source.student.shape

    def by_channel(sum_WC: Tensor) -> Tensor:
        # across tiles in float64: there are few tiles, and each adds numbers of very different size
        return sum_WC.view(width, channels).sum(0).double()

    pixels = batch * height * width
    if pixels == 0:
        nothing = torch.zeros(3, channels, dtype=source.dtype, device=y.device)
        return nothing.sum(), nothing, nothing[:2].clone()
    # distances from a mean of some pixels, not from 0: sums of plain squares lose their digits where |mean| >> sigma
    shift_C, total_C, square_C = None, 0.0, 0.0
    for tile in tiles(source.student.shape, y.device):
        x = source.student_values(tile)
        if shift_C is None:
            shift_C = (by_channel(x.sum(0)) / (x.shape[0] * width)).to(source.dtype)
        distance = x - shift_C.repeat(width)
        total_C = total_C + by_channel(distance.sum(0))
        square_C = square_C + by_channel(distance.mul_(distance).sum(0))
    mean = total_C / pixels
    variance_C = (square_C / pixels - mean * mean).clamp(min=0).to(source.dtype)
    assert shift_C is not None
    mean_C, rstd_C = (shift_C + mean).to(source.dtype), torch.rsqrt(variance_C + eps)

    a = (gamma_C.to(source.dtype) * rstd_C).repeat(width)
    beta, mean_WC = beta_C.to(source.dtype).repeat(width), mean_C.repeat(width)
    loss, sum_d, sum_dx = 0.0, 0.0, 0.0
    for tile in tiles(source.student.shape, y.device):
        centred = source.student_values(tile) - mean_WC
        d = residual(torch.addcmul(beta, centred, a), source.target_values(tile))
        sum_d = sum_d + by_channel(d.sum(0))
        sum_dx = sum_dx + by_channel(centred.mul_(d).sum(0))
        loss = loss + d.mul_(d).sum().double()
    sums = torch.stack([sum_d, sum_dx]).to(source.dtype)
    return (loss * scale).to(source.dtype), torch.stack([mean_C, variance_C, rstd_C]), sums


def _backward(
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
    """Gradient of y, tile by tile."""
    source = Source(y, target, offset_C, step_C, codec, margin_C)
    batch, height, width, _ = source.student.shape
    pixels = max(batch * height * width, 1)
    mean_C, _, rstd_C = statistics
    a_C = gamma_C.to(source.dtype) * rstd_C
    rows = [mean_C, a_C, beta_C.to(source.dtype), sums[0] / pixels, sums[1] * rstd_C * rstd_C / pixels]
    mean, a, beta, mean_d, slope = (value.repeat(width) for value in rows)
    factor = (a_C * (upstream * (2 * scale))).repeat(width)
    gradient = torch.empty_like(y)
    gradient_BHWC = as_BHWC(gradient)
    for tile in tiles(source.student.shape, y.device):
        centred = source.student_values(tile) - mean
        d = residual(torch.addcmul(beta, centred, a), source.target_values(tile))
        into = gradient_BHWC[tile]
        into.copy_(d.sub_(mean_d).sub_(centred.mul_(slope)).mul_(factor).view(into.shape))
    return gradient


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
    f"connector_partial_l2_backward(Tensor upstream, {_INPUTS}, float scale, Tensor statistics, Tensor sums) -> Tensor",
    "connector_partial_l2.backward",
    lambda _upstream, y, *_: torch.empty_like(y),
)
