"""Logits compared otherwise than by one divergence: decoupled (dkd) and by correlation (dist).

    dkd    L = CE(y, z) + ramp * tau^2 * (alpha * KL(b_T || b_S) + beta * KL(o_T || o_S))
    dist   L = CE(y, z) + tau^2 * (beta * mean over rows of 1 - r(p_S, p_T) + gamma * mean over columns of the same)

p = softmax(z / tau), [B, K]. b holds two probabilities, of the labeled class and of all others; o is the distribution
over the others alone. r is Pearson's correlation: of a sample's classes (rows), or of a class over the batch (columns).
For `dist`, places of a segmentation network's logits are rows, as in the authors' code.
Several teachers are our extension: terms are averaged over them. Neither has learnable parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import STANDARDIZE, logit_rows, standardized
from feedfast.tasks.base import wide
from feedfast_kernels import as_float


class DKD(Method):
    """Decoupled distillation: the labeled class, and the others among each other."""

    name: ClassVar[str] = "dkd"
    paper: ClassVar[str] = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    needs: ClassVar[tuple[str, ...]] = (LOGITS,)
    one_label: ClassVar[bool] = True

    class Options(MethodOptions):
        """The two weights, the temperature, and the ramp."""

        alpha: float = Field(1.0, ge=0, description="weight of the divergence of the labeled class against the rest")
        beta: float = Field(8.0, ge=0, description="weight of the divergence among the other classes")
        tau: float = Field(4.0, gt=0, description="temperature")
        warmup: float = Field(
            20 / 240,
            ge=0,
            le=1,
            description="share of the run over which both weights rise from 0; the authors' 20 of 240 epochs",
        )
        standardize: bool = Field(False, description=STANDARDIZE)

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options = options

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``target`` and ``nontarget``: tau^2 times the divergences of logits [B, K], averaged over the labeled rows.

        Labels are int64 [B]. Without a label a row has no class to decouple: it is left out; no labeled row gives 0.
        """
        pairs = _logit_pairs(student, targets, standardize=self.options.standardize)
        found = [decoupled(ours, theirs, annotations, self.options.tau) for ours, theirs in pairs]
        target, nontarget = (torch.stack(terms).mean() for terms in zip(*found, strict=True))
        return {"target": target, "nontarget": nontarget}

    def weights(self, progress: float) -> dict[str, float]:
        """alpha and beta, times min(progress / warmup, 1)."""
        options = self.options
        ramp = min(progress / options.warmup, 1.0) if options.warmup else 1.0
        return {"target": ramp * options.alpha, "nontarget": ramp * options.beta}


class DIST(Method):
    """Relations instead of values: correlation per sample and per class."""

    name: ClassVar[str] = "dist"
    paper: ClassVar[str] = "Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022"
    needs: ClassVar[tuple[str, ...]] = (LOGITS,)
    dense: ClassVar[bool] = True

    class Options(MethodOptions):
        """The two weights and the temperature."""

        beta: float = Field(
            2.0, ge=0, description="weight of the relation between classes, per sample; as in the authors' runs"
        )
        gamma: float = Field(
            2.0, ge=0, description="weight of the relation within a class, over the batch; as in the authors' runs"
        )
        tau: float = Field(1.0, gt=0, description="temperature")
        standardize: bool = Field(False, description=STANDARDIZE)

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options = options

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``inter`` and ``intra``: tau^2 times 1 - correlation of softened logits [B, K], per row and per column."""
        tau = self.options.tau
        inter, intra = [], []
        for ours, theirs in _logit_pairs(student, targets, standardize=self.options.standardize):
            p_S, p_T = (ours / tau).softmax(1), (theirs / tau).softmax(1)
            inter.append(tau**2 * uncorrelated(p_S, p_T))
            intra.append(tau**2 * uncorrelated(p_S.T, p_T.T))
        return {"inter": torch.stack(inter).mean(), "intra": torch.stack(intra).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        """beta and gamma."""
        return {"inter": self.options.beta, "intra": self.options.gamma}


def decoupled(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """DKD's two divergences, each times tau^2 and averaged over the labeled rows.

    In logarithms throughout: 1 - p of a confident teacher is 0 in fp32, its logarithm is not.

    Args:
        student_BK: logits, fp32 or float64, with gradient.
        teacher_BK: logits, of the same type.
        labels_B: int64, -1 = unlabeled.
        tau: temperature.

    Returns:
        Of the labeled class against the rest, and among the rest: scalars.
    """
    labeled = labels_B >= 0
    own = labels_B.clamp(min=0)[:, None]
    (q_own, q_rest, q), (p_own, p_rest, p) = (_split(z / tau, own) for z in (student_BK, teacher_BK))
    target = p_own.exp() * (p_own - q_own) + p_rest.exp() * (p_rest - q_rest)
    nontarget = (p.exp() * (p - q)).sum(1)
    count = labeled.sum().clamp(min=1)
    first, second = (tau**2 * x.where(labeled, 0).sum() / count for x in (target, nontarget))
    return first, second


def _split(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of p(own class) [B], of p(any other) [B], and of p(class | not its own) [B, K], 0 at its own."""
    log_p = logits.log_softmax(1)
    rest = log_p.scatter(1, own, -torch.inf).logsumexp(1)
    # not log_p - rest: of a sure teacher both are large, and their difference is what is compared
    among = logits.scatter(1, own, -torch.inf).log_softmax(1).scatter(1, own, 0)
    return log_p.gather(1, own)[:, 0], rest, among


def uncorrelated(x_BK: Tensor, y_BK: Tensor) -> Tensor:
    """1 - Pearson's correlation of two matrices' rows, averaged over the rows; a constant row correlates with none."""
    x, y = x_BK - x_BK.mean(1, keepdim=True), y_BK - y_BK.mean(1, keepdim=True)
    correlation = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)
    distance: Tensor = 1 - correlation.mean()
    return distance


def _logit_pairs(student: StudentOutput, targets: Targets, *, standardize: bool) -> list[tuple[Tensor, Tensor]]:
    """The student's logits with each teacher's, rows [R, K] of one type; no gradient goes to a teacher."""
    output, found = logit_rows(student.output, (as_float(taps[LOGITS]).detach() for taps in targets.values()))
    ours = wide(output)
    theirs = [z.to(ours.dtype) for z in found]
    if standardize:
        ours, theirs = standardized(ours), [standardized(z) for z in theirs]
    return [(ours, z) for z in theirs]
