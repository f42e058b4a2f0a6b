"""Relations among the samples of a batch, which need no adapter: networks of any widths are compared.

    rkd   L = CE(y, z) + beta_distance * H(d_S - d_T) + beta_angle * H(a_S - a_T)        H = Huber's loss, mean
    sp    L = CE(y, z) + beta * mean (G_S - G_T)^2
    pkt   L = CE(y, z) + beta * mean of  P_T * log(P_T / P_S)

d: distances of all pairs over their mean, [B, B]; a: cosines of the angles of all triples, [B, B, B]; G: scalar
products of all pairs, rows of norm 1, [B, B]; P: cosines of all pairs, shifted to 0..1, rows of sum 1, [B, B]. rkd and
pkt compare embeddings (the last map's mean over its grid), sp the whole last map. Reductions, defaults and small
constants are those of RepDistiller. Several teachers are our extension: terms are averaged over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import check_taps, embedding
from feedfast_kernels import Target, as_float

TAP = "final"


class RKD(Method):
    """Distances and angles among the batch's embeddings."""

    name: ClassVar[str] = "rkd"
    paper: ClassVar[str] = "Park et al., Relational Knowledge Distillation, CVPR 2019"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    whole: ClassVar[str] = "compares images by the mean of a map"

    class Options(MethodOptions):
        """The two weights."""

        beta_distance: float = Field(25.0, ge=0, description="weight of the distances of pairs")
        beta_angle: float = Field(50.0, ge=0, description="weight of the angles of triples")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        check_taps(student, teachers, self.needs)
        self.options = options

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``distance`` and ``angle`` of the embeddings [B, C]; memory grows with B^2 * C and B^3."""
        return {
            "distance": _mean_over_teachers(distance_relation, student, targets, embedding),
            "angle": _mean_over_teachers(angle_relation, student, targets, embedding),
        }

    def weights(self, progress: float) -> dict[str, float]:
        """beta_distance and beta_angle."""
        return {"distance": self.options.beta_distance, "angle": self.options.beta_angle}


class SP(Method):
    """Similarity-preserving: scalar products among the batch's last maps."""

    name: ClassVar[str] = "sp"
    paper: ClassVar[str] = "Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    whole: ClassVar[str] = "compares images by all of their maps"

    class Options(MethodOptions):
        """beta."""

        beta: float = Field(3000.0, ge=0, description="weight of the term")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        check_taps(student, teachers, self.needs)
        self.beta = options.beta

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``similarity`` of the flattened last maps [B, C * H * W]; student and teachers may differ in all but B."""
        return {"similarity": _mean_over_teachers(similarity_relation, student, targets, _flat)}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"similarity": self.beta}


class PKT(Method):
    """Probabilistic knowledge transfer: who is whose neighbor, as probabilities from cosines."""

    name: ClassVar[str] = "pkt"
    paper: ClassVar[str] = "Passalis & Tefas, Learning Deep Representations with Probabilistic Transfer, ECCV 2018"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    whole: ClassVar[str] = "compares images by the mean of a map"

    class Options(MethodOptions):
        """beta."""

        beta: float = Field(30000.0, ge=0, description="weight of the term, a mean over B^2 pairs")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        check_taps(student, teachers, self.needs)
        self.beta = options.beta

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``neighbors`` of the embeddings [B, C]."""
        return {"neighbors": _mean_over_teachers(neighbor_relation, student, targets, embedding)}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"neighbors": self.beta}


def distance_relation(x_BD: Tensor, t_BD: Tensor) -> Tensor:
    """Huber's loss of the pairs' distances, each network's over their mean; D may differ; a scalar."""
    ours, theirs = _distances(x_BD), _distances(t_BD)
    return F.smooth_l1_loss(ours, theirs)


def angle_relation(x_BD: Tensor, t_BD: Tensor) -> Tensor:
    """Huber's loss of the cosines of the angles at every sample between every two; D may differ; a scalar."""
    ours, theirs = _angles(x_BD), _angles(t_BD)
    return F.smooth_l1_loss(ours, theirs)


def similarity_relation(x_BD: Tensor, t_BD: Tensor) -> Tensor:
    """Mean squared difference of the rows' scalar products, normalized per row; D may differ; a scalar."""
    ours, theirs = (F.normalize(x @ x.T) for x in (x_BD, t_BD))
    return (ours - theirs).square().mean()


def neighbor_relation(x_BD: Tensor, t_BD: Tensor) -> Tensor:
    """Divergence of the rows' neighborhoods, the mean over all B^2 pairs; D may differ; a scalar."""
    ours, theirs = _neighborhoods(x_BD), _neighborhoods(t_BD)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


def _distances(x: Tensor) -> Tensor:
    """[B, B] over the mean of its off-diagonal; from differences, for those of scalar products cancel in fp32."""
    squares = (x[:, None] - x).square().sum(2)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # the root has no derivative at 0: neither the diagonal nor equal samples may reach it
    distances = squares.clamp(min=1e-12).sqrt().where(others, 0)
    return distances * max(len(x) * (len(x) - 1), 1) / distances.sum().clamp(min=1e-12)


def _angles(x: Tensor) -> Tensor:
    """[i, j, k] = cosine of the angle at sample i between samples j and k."""
    directions = F.normalize(x - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def _neighborhoods(x: Tensor) -> Tensor:
    unit = x / (x.norm(dim=1, keepdim=True) + 1e-7)
    similarity = (unit @ unit.T + 1) / 2
    shares: Tensor = similarity / similarity.sum(1, keepdim=True)
    return shares


def _flat(target: Target) -> Tensor:
    return as_float(target).flatten(1)


def _mean_over_teachers(
    relation: Callable[[Tensor, Tensor], Tensor],
    student: StudentOutput,
    targets: Targets,
    vectors: Callable[[Target], Tensor],
) -> Tensor:
    """``relation`` of student and each teacher in fp32, averaged; no gradient goes to a teacher."""
    ours = student.taps[TAP]
    # scalar products in bfloat16, as autocast would have them, would lose what is compared
    with torch.autocast(ours.device.type, enabled=False):
        x = vectors(ours)
        return torch.stack([relation(x, vectors(taps[TAP]).detach()) for taps in targets.values()]).mean()
