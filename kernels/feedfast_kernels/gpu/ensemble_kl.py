"""Distillation of logits and the labels' cross-entropy: one program per row, one read of each logit from memory.

    p = teachers, q = student, both at temperature tau; r = softmax(z), the student at temperature 1
    loss      scale * (KL of the row) + label_scale * (log sum exp z - z_label)
    gradient  forward KL  scale / tau * (q - p)                              + label_scale * (r - [k = label])
              reverse KL  scale / tau * q * (log q - log p - KL of the row)  + label_scale * (r - [k = label])
    scale = weight * tau^2 / B,  label_scale = label_weight / labeled rows

Legend: B rows, K classes, N teachers; a block is a stretch of BLOCK classes. The first sweep over the row finds, tensor
by tensor, the largest logit and the sum of exponentials; the second computes loss and gradient. The reverse gradient
contains the row's KL and takes a third. Everything is in base 2, as the hardware has it. Bytes per logit, 16-bit
logits: forward 2 + 2 N + 4 for the gradient in fp32, backward 4 + 2.

What this does not do: many rows of few classes (the pixels of a segmentation map) leave most lanes of a program idle.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feedfast_kernels.gpu.launch import Launch, power_of_two

# Only the first sweep goes to memory. A row of up to 4096 classes is one block and stays in registers; a longer one is
# found again in the L2, because a program of so many threads and registers leaves room for one or two of them on a
# multiprocessor: of 21,841 classes and three teachers, 46 MB at most are under way on 132.
MOST_WARPS = 16

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of fp32; -inf would give inf - inf
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(ptr, offset, k, K: tl.constexpr):
    """fp32 [BLOCK] of one tensor; -inf beyond the last class."""
    return tl.load(ptr + offset + k, mask=k < K, other=float("-inf")).to(tl.float32)


@triton.jit
def _mean_logits(teacher_ptrs, offset, k, K: tl.constexpr, N: tl.constexpr):
    """fp32 [BLOCK], averaged over the teachers."""
    total = _logits(teacher_ptrs[0], offset, k, K)
    for j in tl.static_range(1, N):
        total += _logits(teacher_ptrs[j], offset, k, K)
    return total if N == 1 else total / N


@triton.jit
def _log2_teachers(
    teacher_ptrs,  # N of [B, K]
    tops,  # N scalars
    logs,  # N scalars
    offset,  # of the row
    k,  # [BLOCK]
    per_tau,  # log2(e) / tau
    K: tl.constexpr,  # classes
    N: tl.constexpr,  # teachers
    LOGITS: tl.constexpr,  # average logits, not probabilities
):
    """log2 p, fp32 [BLOCK]; -inf where every teacher says -inf, finite elsewhere however small p is.

    A log-sum-exp over teachers with one exponential per teacher: of the two in the usual update one is always exp(0).
    """
    if LOGITS or N == 1:
        log_p = (_mean_logits(teacher_ptrs, offset, k, K, N) - tops[0]) * per_tau - logs[0]
    else:
        # a large finite number stands for -inf meanwhile; `where`, because a maximum could lose a NaN
        best = (_logits(teacher_ptrs[0], offset, k, K) - tops[0]) * per_tau - logs[0]
        best = tl.where(best < -1e38, -1e38, best)
        total = tl.full(best.shape, 1.0, tl.float32)
        for j in tl.static_range(1, N):
            value = (_logits(teacher_ptrs[j], offset, k, K) - tops[j]) * per_tau - logs[j]
            value = tl.where(value < -1e38, -1e38, value)
            ahead = value - best
            small = tl.exp2(-tl.abs(ahead))
            total = tl.where(ahead > 0, tl.fma(total, small, 1.0), total + small)
            best = tl.where(ahead > 0, value, best)
        log_p = best + tl.log2(total) - tl.log2(N * 1.0)
        log_p = tl.where(best == -1e38, total * float("-inf"), log_p)
    return log_p


@triton.jit
def _larger(top, x):
    """The largest logit so far, a scalar."""
    return tl.maximum(top, tl.max(x, 0))


@triton.jit
def _add(total, top, larger, x, per_tau):
    """Sums of 2^((x - top) * per_tau) so far, one per lane, now for the larger top."""
    return tl.fma(total, tl.exp2((top - larger) * per_tau), tl.exp2((x - larger) * per_tau))


@triton.jit
def _forward(
    student_ptr,  # [B, K]
    teacher_ptrs,  # N of [B, K]
    labels_ptr,  # int64 [B], or None
    labeled_ptr,  # int64 scalar: labels that are not -1; None without labels
    partial_ptr,  # [1, B], with TERMS [3, B]
    gradient_ptr,  # fp32 [B, K], or None
    per_tau,  # log2(e) / tau
    mean,  # tau^2 / B
    slope,  # weight * tau / B
    weight,  # of tau^2 * KL
    label_weight,  # of the cross-entropy
    K: tl.constexpr,  # classes
    N: tl.constexpr,  # teachers
    BLOCK: tl.constexpr,  # classes at a time
    LOGITS: tl.constexpr,  # average logits, not probabilities
    REVERSE: tl.constexpr,  # KL(student || teachers)
    TERMS: tl.constexpr,  # store both terms as well
):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * K
    lane = tl.arange(0, BLOCK)
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    label_total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        z = _logits(student_ptr, offset, start + lane, K)
        larger = _larger(top, z)
        total = _add(total, top, larger, z, per_tau)
        if labels_ptr is not None:
            label_total = _add(label_total, top, larger, z, LOG2_E)
        top = larger
    log_total = tl.log2(tl.sum(total))
    label_log_total = tl.log2(tl.sum(label_total)) if labels_ptr is not None else 0.0

    tops = ()
    logs = ()
    for j in tl.static_range(1 if LOGITS else N):
        teacher_top = tl.full((), LOWEST, tl.float32)
        teacher_total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            if LOGITS:
                z = _mean_logits(teacher_ptrs, offset, start + lane, K, N)
            else:
                z = _logits(teacher_ptrs[j], offset, start + lane, K)
            larger = _larger(teacher_top, z)
            teacher_total = _add(teacher_total, teacher_top, larger, z, per_tau)
            teacher_top = larger
        # Triton has no unpacking
        tops = tops + (teacher_top,)  # type: ignore[assignment]  # noqa: RUF005
        logs = logs + (tl.log2(tl.sum(teacher_total)),)  # type: ignore[assignment]  # noqa: RUF005

    entropy = 0.0
    label_slope = 0.0
    label = -1
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        exists = (label >= 0) & (label < K)
        z_label = tl.load(student_ptr + offset + label, mask=exists, other=float("nan")).to(tl.float32)
        share = 1.0 / tl.maximum(tl.load(labeled_ptr), 1).to(tl.float32)
        entropy = tl.where(label == -1, 0.0, (top - z_label + label_log_total * LN_2) * share)
        label_slope = tl.where(label == -1, 0.0, tl.where(exists, share * label_weight, float("nan")))

    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + lane
        z = _logits(student_ptr, offset, k, K)
        log_q = (z - top) * per_tau - log_total
        log_p = _log2_teachers(teacher_ptrs, tops, logs, offset, k, per_tau, K, N, LOGITS)
        p = tl.exp2(log_p)
        q = tl.exp2(log_q)
        # 0 log 0 is 0; a NaN is not equal to 0 and stays
        if REVERSE:
            sums = tl.fma(q, tl.where(q == 0, 0.0, log_q - log_p), sums)
        else:
            sums = tl.fma(p, tl.where(p == 0, 0.0, log_p - log_q), sums)
            if gradient_ptr is not None:
                g = (q - p) * slope
                if labels_ptr is not None:
                    r = tl.exp2((z - top) * LOG2_E - label_log_total)
                    g = tl.fma(r - tl.where(k == label, 1.0, 0.0), label_slope, g)
                tl.store(gradient_ptr + offset + k, g, mask=k < K)
    divergence = tl.sum(sums) * LN_2
    rows = tl.num_programs(0)
    loss = divergence * mean * weight
    tl.store(partial_ptr + row, loss + entropy * label_weight if labels_ptr is not None else loss)
    if TERMS:
        tl.store(partial_ptr + rows + row, entropy)
        tl.store(partial_ptr + 2 * rows + row, divergence * mean)

    if REVERSE and gradient_ptr is not None:
        for start in range(0, K, BLOCK):
            k = start + lane
            z = _logits(student_ptr, offset, k, K)
            log_q = (z - top) * per_tau - log_total
            log_p = _log2_teachers(teacher_ptrs, tops, logs, offset, k, per_tau, K, N, LOGITS)
            q = tl.exp2(log_q)
            g = q * (tl.where(q == 0, 0.0, log_q - log_p) * LN_2 - divergence) * slope
            if labels_ptr is not None:
                r = tl.exp2((z - top) * LOG2_E - label_log_total)
                g = tl.fma(r - tl.where(k == label, 1.0, 0.0), label_slope, g)
            tl.store(gradient_ptr + offset + k, g, mask=k < K)


def plan(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    tau: float,
    logits: bool,
    reverse: bool,
    weight: float,
    label_weight: float,
    terms: bool,
    gradient: bool,
    labeled: Tensor | None = None,
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch, its partial sums ([1, B], with ``terms`` [3, B]: loss, cross-entropy, divergence), the gradient.

    Args:
        student: contiguous [B, K].
        teachers: contiguous [B, K], each of its own dtype.
        labels: int64 [B], or None.
        tau: temperature.
        logits: whether logits are averaged, and not probabilities.
        reverse: whether the divergence is KL(student || teachers).
        weight: factor of tau^2 * KL.
        label_weight: factor of the cross-entropy.
        terms: whether both terms are wanted by themselves.
        gradient: whether the gradient is wanted, fp32 [B, K] for a grad_output of 1. Not 16 bits:
            q - p over B is of the order of 1e-7, and a loss scaler's factor arrives only in backward.
        labeled: int64 scalar on the device, how many labels are not -1.
    """
    batch, classes = student.shape
    # classes per thread: 16 bytes of 16-bit logits where rows are aligned; elsewhere each class has an address of its
    # own, and registers for the addresses of N + 2 tensors are what is scarce
    per_thread = 8 if classes % 8 == 0 else 4 if classes % 4 == 0 or len(teachers) <= 4 else 2
    block = min(power_of_two(classes), MOST_WARPS * 32 * per_thread)
    partial = torch.empty(3 if terms else 1, batch, dtype=torch.float32, device=student.device)
    slopes = torch.empty(batch, classes, dtype=torch.float32, device=student.device) if gradient else None
    arguments: dict[str, Any] = {
        "student_ptr": student,
        "teacher_ptrs": tuple(teachers),
        "labels_ptr": labels,
        "labeled_ptr": labeled,
        "partial_ptr": partial,
        "gradient_ptr": slopes,
        "per_tau": math.log2(math.e) / tau,
        "mean": tau * tau / batch,
        "slope": weight * tau / batch,
        "weight": weight,
        "label_weight": label_weight,
    }
    constants = {
        # a constant of the compilation: a network has one number of classes, and only so does the compiler see how rows
        # are aligned. Where K is a multiple of 8, loads of 16-bit logits are 16 bytes wide; at 21,841 rows begin at odd
        # addresses and loads are 2 bytes wide, which coalesce, but take more instructions
        "K": classes,
        "N": len(teachers),
        "BLOCK": block,
        "LOGITS": logits,
        "REVERSE": reverse,
        "TERMS": terms,
    }
    warps = max(block // (32 * per_thread), 1)
    return Launch(_forward, (batch,), arguments, constants, warps), partial, slopes


def forward(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    tau: float,
    logits: bool,
    reverse: bool,
    weight: float,
    label_weight: float,
    terms: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms ([2], or [0] where not wanted), gradient ([B, K], or [0] where not wanted); all fp32."""
    if student.numel() == 0:
        zero = student.new_zeros((), dtype=torch.float32)
        shape = student.shape if gradient else (0,)
        return zero, zero.new_zeros(2 if terms else 0), zero.new_zeros(shape)
    launch, partial, slopes = plan(
        student.contiguous(),
        [teacher.contiguous() for teacher in teachers],
        None if labels is None else labels.contiguous(),
        tau,
        logits,
        reverse,
        weight,
        label_weight,
        terms,
        gradient,
        None if labels is None else (labels != -1).sum(),
    )
    launch.run()
    each = partial[1:].sum(1) if terms else partial.new_empty(0)
    return partial[0].sum(), each, partial.new_empty(0) if slopes is None else slopes
