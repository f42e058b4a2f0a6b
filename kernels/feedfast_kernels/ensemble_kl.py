"""Logit distillation from one or more teachers.

    p = average over teachers of softmax(z_n / tau)          average="probabilities", the usual ensemble
      = softmax(average of z_n / tau)                        average="logits"
    q = softmax(z / tau)
    loss = weight * tau^2 * mean over batch of  sum_k p (log p - log q)       "forward",  KL(teacher || student)
                                                sum_k q (log q - log p)       "reverse",  KL(student || teacher)

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. Summed over classes and averaged over the batch:
an element-wise mean would divide by the number of classes as well. tau^2 keeps the gradient's size when tau changes.
The averages differ and so do the directions (a published two-teacher ImageNet recipe averages logits and, through its
framework's argument order, minimises the reverse KL), so both are explicit.

Batches of logits are small: ordinary operators and autograd are enough. log p of averaged probabilities is a
log-sum-exp, so a class that every teacher rules out does not become log 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from feedfast_kernels._layout import work_dtype


def ensemble_kl(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    tau: float,
    average: Literal["probabilities", "logits"] = "probabilities",
    direction: Literal["forward", "reverse"] = "forward",
    weight: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence between the student and the average of the teachers, at temperature ``tau``.

    Args:
        student_logits: float [B, K]; receives the gradient.
        teacher_logits: one float [B, K] a teacher, of any float dtype; no gradient.
        tau: temperature, > 0.
        average: what is averaged over the teachers.
        direction: ``"forward"`` is KL(teacher || student), ``"reverse"`` KL(student || teacher).
        weight: factor of the result.

    Returns:
        fp32 scalar (float64 for a float64 student); 0 for an empty batch; NaN if any value is NaN.

    Raises:
        ValueError: if shapes differ, no teacher is given, tau is not positive, or a word is unknown.
    """
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
    dtype = work_dtype(student_logits)
    # contiguous, so that the order of summation is that of the values and not of the strides
    teachers_NBK = torch.stack([z.detach().to(dtype) for z in teacher_logits]).contiguous() / tau
    if average == "probabilities":
        teacher_BK = torch.logsumexp(teachers_NBK.log_softmax(2), 0) - math.log(len(teacher_logits))
    else:
        teacher_BK = teachers_NBK.mean(0).log_softmax(1)
    student_BK = (student_logits.to(dtype).contiguous() / tau).log_softmax(1)
    first, second = (teacher_BK, student_BK) if direction == "forward" else (student_BK, teacher_BK)
    divergence = (first.exp() * (first - second)).sum()
    return divergence * (weight * tau * tau / max(student_logits.shape[0], 1))
