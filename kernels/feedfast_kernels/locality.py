"""LP's distance: samples that are neighbors for the teacher stay close for the student; widths need not agree.

    alpha_ij = exp(-|t_i - t_j|^2 / sigma^2)  where j is one of the k samples nearest to i for the teacher; else 0
    loss     = weight / denominator * sum over i, j of  alpha_ij * |s_i - s_j|^2
             = scale * trace(S^T M S),   d(loss)/dS = 2 * scale * M S,   M = diag(row + column sums of W) - W - W^T

Chen et al., "Learning Student Networks via Feature Embedding", TNNLS 2021. Legend: m samples of the batch, d values per
sample; W is alpha as [m, m], S and T are [m, d]: flattened maps in channels-last order, or vectors. A sample is no
neighbor of its own. Neighbors are of the mini-batch and one-sided: j may be near i without i being near j. The loss is
least for a student that is constant, so it needs a task loss next to it and a small weight.

The second form needs no [m, m, d]: one product [m, m] x [m, d] gives loss and gradient. There is no kernel of our own:
products are what libraries are for (kernels/README.md, "What lost").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from feedfast_kernels._layout import as_BHWC, is_eager_cpu, tile_elements, work_dtype
from feedfast_kernels._ops import first_order_only
from feedfast_kernels.codes import Codes, Target, decode


def locality(
    student: Tensor,
    teacher: Target,
    *,
    k: int,
    sigma_squared: float | None = None,
    weight: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """Squared distances in the student's space between samples that are neighbors in the teacher's.

    Args:
        student: float [m, ...], flattened per sample; receives the gradient.
        teacher: codes or float [m, ...] of any width; no gradient.
        k: neighbors per sample, >= 1. A batch of k or fewer samples takes all others.
        sigma_squared: > 0, in squared units of the teacher's features. None is the mean over the batch of the squared
            distances to the k neighbors, found on the device: a constant that does not fit the features' scale makes
            every alpha 0. `locality_weights` shows alpha.
        weight: factor of the sum.
        denominator: divisor of the sum; None is the batch size m.

    Returns:
        fp32 scalar (float64 for a float64 student); 0 for fewer than two samples; NaN if any value is NaN. Of
        neighbors equally far the one with the lower index counts.

    Raises:
        ValueError: if batches differ, k is below 1, or sigma_squared is not positive.
    """
    if student.ndim < 2 or len(teacher.shape) < 2 or teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"locality: expected features [m, ...] of one batch, got a student {list(student.shape)} "
            f"and a teacher {list(teacher.shape)}"
        )
    _check(k, sigma_squared)
    scale = weight / (max(student.shape[0], 1) if denominator is None else denominator)
    weights = _weights(teacher, k, sigma_squared, work_dtype(student))
    loss = _Locality.apply(student, weights, scale, student.requires_grad and torch.is_grad_enabled())
    assert isinstance(loss, Tensor)
    return loss


def locality_weights(teacher: Target, *, k: int, sigma_squared: float | None = None) -> Tensor:
    """The alpha that `locality` uses, to look at: a mean of those above 0 below 1e-6 means that nothing is learned.

    Args:
        teacher: codes or float [m, ...].
        k: neighbors per sample, >= 1; at most m - 1 are taken.
        sigma_squared: > 0, or None for the mean of the neighbors' squared distances.

    Returns:
        [m, m], fp32 (float64 for float64 features), no gradient: row i has alpha_ij at its k neighbors, 0 elsewhere
        and on the diagonal.

    Raises:
        ValueError: if k is below 1 or sigma_squared not positive.
    """
    if len(teacher.shape) < 2:
        raise ValueError(f"locality: expected features [m, ...], got {list(teacher.shape)}")
    _check(k, sigma_squared)
    dtype = torch.float32 if isinstance(teacher, Codes) else work_dtype(teacher)
    return _weights(teacher, k, sigma_squared, dtype)


def _check(k: int, sigma_squared: float | None) -> None:
    if k < 1:
        raise ValueError(f"locality: k expected >= 1, got {k}")
    if sigma_squared is not None and not sigma_squared > 0:
        raise ValueError(f"locality: sigma_squared expected > 0 or None, got {sigma_squared}")


@torch.no_grad()
def _weights(teacher: Target, k: int, sigma_squared: float | None, dtype: torch.dtype) -> Tensor:
    """W [m, m]."""
    samples = teacher.shape[0]
    # fp32 under autocast too, because neighbors found in bf16 would be others; TF32 where the user allows it
    with torch.autocast(teacher.device.type, enabled=False):
        product = reduce(torch.add, (features @ features.T for features in _centered(teacher, dtype)))
    # this subtracts numbers of the size of |t|^2, which is why features are relative to the batch's mean
    square = product.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * product).clamp(min=0)
    # NaN sorts behind every number, so a sample is no neighbor of its own; and where all is NaN, NaN is what is found
    own = torch.eye(samples, dtype=torch.bool, device=distance.device)
    found = distance.masked_fill(own, float("nan")).sort(dim=1, stable=True)
    near, index = (x[:, : min(k, samples - 1)] for x in found)
    if sigma_squared is None:
        # neighbors that are all duplicates: 0 / tiny, so alpha is 1
        alpha = torch.exp(-near / near.mean().clamp(min=torch.finfo(dtype).tiny))
    else:
        alpha = torch.exp(-near / sigma_squared)
    return torch.zeros_like(distance).scatter(1, index, alpha)


def _centered(x: Target, dtype: torch.dtype) -> Iterator[Tensor]:
    """Features relative to their mean, new tensors [m, columns]; exactly 0 where all samples agree.

    That changes neither distances nor M S (M 1 = 0), and what is left of rounding is that of |s|^2: where neighbors are
    1,000 times closer than the batch is wide, the gradient keeps four digits and the value one or two.

    Together the columns are [m, d] in channels-last order; maps come in pieces that stay in the cache of a CPU.
    """
    stored = x.data if isinstance(x, Codes) else as_BHWC(x) if x.ndim == 4 else x
    image_rows = stored.shape[1]
    if is_eager_cpu(stored) and len(x.shape) == 4:
        image_rows = tile_elements() * image_rows // max(math.prod(x.shape), 1)
    for piece in torch.split(stored, max(image_rows, 1), dim=1):
        values = piece
        if isinstance(x, Codes):
            values = decode(Codes(piece, x.offset, x.step, x.codec), dtype)
            values = as_BHWC(values) if values.ndim == 4 else values
        rows = values.to(dtype).reshape(values.shape[0], math.prod(values.shape[1:]))
        # the mean of equal numbers is not always that number, the difference of equal numbers is always 0
        rows = rows - rows[:1]
        yield rows.sub_(rows.mean(0)) if rows.shape[0] else rows


class _Locality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor, scale: float, wants_gradient: bool) -> Tensor:
        laplacian = torch.diag(weights.sum(0) + weights.sum(1)) - weights - weights.T
        laplacian.mul_(2 * scale)
        gradients, sums = [], []
        for features in _centered(student, weights.dtype):
            with torch.autocast(features.device.type, enabled=False):
                gradients.append(laplacian @ features)
            sums.append((features * gradients[-1]).sum())
        if wants_gradient:
            # fp32, 4 bytes per value from forward on: to compute it again would move 26 and multiply once more
            ctx.save_for_backward(gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1))
            ctx.shape, ctx.dtype = student.shape, student.dtype
        loss = reduce(torch.add, sums) / 2
        return loss.clamp(min=0) if scale >= 0 else loss.clamp(max=0)  # rounding, where it should be 0

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("locality", "there are no second ones")
        (gradient,) = ctx.saved_tensors
        # one kernel, which multiplies in the gradient's dtype and rounds once
        scaled = torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=ctx.dtype))
        if len(ctx.shape) != 4:
            return scaled.view(ctx.shape), None, None, None
        batch, channels, height, width = ctx.shape
        return scaled.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None, None
