"""Logit distillation from one or more teachers, with the labels' cross-entropy in the same pass.

    p = average over teachers of softmax(z_n / tau)          average="probabilities", the usual ensemble
      = softmax(average of z_n / tau)                        average="logits"
    q = softmax(z / tau)
    KL   = mean over batch of  sum_k p (log p - log q)       direction="forward",  KL(teacher || student)
                               sum_k q (log q - log p)       direction="reverse",  KL(student || teacher)
    CE   = mean over labeled rows of  -log softmax(z)[label]
    loss = weight * tau^2 * KL + label_weight * CE

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. Both averages and both directions are in published
recipes, so both are explicit. tau^2 keeps the gradient's size when tau changes.

On CUDA one Triton kernel reads every logit once and computes the gradient together with the loss (gpu/ensemble_kl.py);
elsewhere, and for float64, ordinary operators and autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from feedfast_kernels._layout import work_dtype
from feedfast_kernels._ops import OPS, first_order_only, register, runs_triton

Average = Literal["probabilities", "logits"]
Direction = Literal["forward", "reverse"]


@overload
def ensemble_kl(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    tau: float,
    average: Average = ...,
    direction: Direction = ...,
    weight: float = ...,
    labels: Tensor | None = ...,
    label_weight: float = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def ensemble_kl(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    tau: float,
    average: Average = ...,
    direction: Direction = ...,
    weight: float = ...,
    labels: Tensor | None = ...,
    label_weight: float = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ensemble_kl(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    tau: float,
    average: Average = "probabilities",
    direction: Direction = "forward",
    weight: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 1.0,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence between the student and the average of the teachers, at temperature ``tau``.

    Args:
        student_logits: float [B, K]; receives the gradient.
        teacher_logits: one float [B, K] per teacher, of any float dtype; no gradient.
        tau: temperature, > 0.
        average: what is averaged over the teachers.
        direction: ``"forward"`` is KL(teacher || student), ``"reverse"`` KL(student || teacher).
        weight: factor of tau^2 * KL.
        labels: int64 [B] to add the cross-entropy with, or None; -1 is unlabeled and ignored. The mean is over the
            labeled rows, 0 if there is none. A label outside -1..K-1 raises on the CPU as F.cross_entropy does;
            on CUDA nobody waits to look, and the loss and its row of the gradient become NaN.
        label_weight: factor of the cross-entropy.
        return_terms: return the two terms as well.

    Returns:
        fp32 scalar (float64 for a float64 student); 0 for an empty batch; NaN if any value is NaN; infinite if the
        first distribution of the KL has a class that the second rules out (-inf). With ``return_terms`` a pair: that,
        and [2], detached: CE (0 without labels) and tau^2 * KL before their weights.

    Raises:
        ValueError: if shapes differ, no teacher is given, tau is not positive, labels are not int64, or a word is
            unknown.

    Example:
        >>> import torch
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> ensemble_kl(same, [same, same], tau=4.0).item()
        0.0
    """
    _check(student_logits, teacher_logits, tau, average, direction, labels)
    if not runs_triton(student_logits):
        loss, terms = _plain(student_logits, teacher_logits, tau, average, direction, weight, labels, label_weight)
        return (loss, terms) if return_terms else loss
    loss, terms = _EnsembleKL.apply(
        student_logits,
        tau,
        average == "logits",
        direction == "reverse",
        weight,
        labels,
        label_weight,
        return_terms,
        student_logits.requires_grad and torch.is_grad_enabled(),
        *(z.detach() for z in teacher_logits),
    )
    return (loss, terms) if return_terms else loss


def reference(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    tau: float,
    average: Average = "probabilities",
    direction: Direction = "forward",
    weight: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 1.0,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ensemble_kl` in PyTorch operators on any device: what the kernel is compared with."""
    _check(student_logits, teacher_logits, tau, average, direction, labels)
    loss, terms = _plain(student_logits, teacher_logits, tau, average, direction, weight, labels, label_weight)
    return (loss, terms) if return_terms else loss


def _check(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    tau: float,
    average: str,
    direction: str,
    labels: Tensor | None,
) -> None:
    if average not in ("probabilities", "logits"):
        raise ValueError(f"ensemble_kl: average expected 'probabilities' or 'logits', got {average!r}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"ensemble_kl: direction expected 'forward' or 'reverse', got {direction!r}")
    if not tau > 0:
        raise ValueError(f"ensemble_kl: tau expected > 0, got {tau}")
    if not teacher_logits:
        raise ValueError("ensemble_kl: expected the logits of at least one teacher, got none")
    for index, logits in enumerate(teacher_logits):
        if student_logits.ndim != 2 or logits.shape != student_logits.shape:
            raise ValueError(
                f"ensemble_kl: expected teacher {index} of the student's shape {list(student_logits.shape)} ([B, K]), "
                f"got {list(logits.shape)}"
            )
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != student_logits.shape[:1]):
        raise ValueError(
            f"ensemble_kl: labels expected int64 [{student_logits.shape[0]}], got {labels.dtype} {list(labels.shape)}"
        )


def _plain(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    tau: float,
    average: Average,
    direction: Direction,
    weight: float,
    labels: Tensor | None,
    label_weight: float,
) -> tuple[Tensor, Tensor]:
    """Loss and terms, by autograd."""
    # summed over classes, averaged over the batch: an element-wise mean would divide by the number of classes as well
    dtype = work_dtype(student_logits)
    # contiguous, so that the order of summation is that of the values and not of the strides
    teachers_NBK = torch.stack([z.detach().to(dtype) for z in teacher_logits]).contiguous() / tau
    if average == "probabilities":
        # a log-sum-exp, so a class that every teacher finds next to impossible does not become log 0
        teacher_BK = torch.logsumexp(teachers_NBK.log_softmax(2), 0) - math.log(len(teacher_logits))
    else:
        teacher_BK = teachers_NBK.mean(0).log_softmax(1)
    logits_BK = student_logits.to(dtype).contiguous()
    student_BK = (logits_BK / tau).log_softmax(1)
    first, second = (teacher_BK, student_BK) if direction == "forward" else (student_BK, teacher_BK)
    probability = first.exp()
    # 0 log 0 is 0; a NaN is not equal to 0 and stays
    log_ratio = torch.where(probability == 0, 0.0, first - second)
    divergence = (probability * log_ratio).sum() * (tau * tau / max(student_logits.shape[0], 1))
    if labels is None:
        return weight * divergence, torch.stack((torch.zeros_like(divergence), divergence)).detach()
    entropy = F.cross_entropy(logits_BK, labels, ignore_index=-1, reduction="sum") / (labels != -1).sum().clamp(min=1)
    loss = label_weight * entropy + weight * divergence
    return loss, torch.stack((entropy, divergence)).detach()


class _EnsembleKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        tau: float,
        logits: bool,
        reverse: bool,
        weight: float,
        labels: Tensor | None,
        label_weight: float,
        return_terms: bool,
        wants_gradient: bool,
        *teachers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, terms, gradient = OPS.ensemble_kl(
            student, list(teachers), labels, tau, logits, reverse, weight, label_weight, return_terms, wants_gradient
        )
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("ensemble_kl")
        (gradient,) = ctx.saved_tensors
        # one kernel, which multiplies in fp32 and rounds once
        scaled = torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=ctx.dtype))
        return scaled, *[None] * (len(ctx.needs_input_grad) - 1)


register(
    "ensemble_kl(Tensor student, Tensor[] teachers, Tensor? labels, float tau, bool logits, bool reverse, "
    "float weight, float label_weight, bool terms, bool gradient) -> (Tensor, Tensor, Tensor)",
    "ensemble_kl.forward",
    lambda student, _teachers, _labels, _tau, _logits, _reverse, _weight, _label_weight, terms, gradient: (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(2 if terms else 0, dtype=torch.float32),
        student.new_empty(student.shape if gradient else (0,), dtype=torch.float32),
    ),
)
