"""Training on annotations alone, and Hinton's distillation of logits from one teacher or an ensemble.

    none   L = CE(y, z)
    kd     L = (1 - alpha) * CE(y, z) + alpha * tau^2 * KL(p || q)
    ban    L = CE(y, z) + KL(p || q)       tau = 1; the teacher is the student of the generation before

p is the average of the teachers' softened outputs, q the student's; the KL is summed over classes and averaged over the
batch. alpha = 0.9 and tau = 4 are the defaults of the common benchmark codes. None has learnable parameters. Logits of
segmentation networks are compared place by place, what surrounds an image too, and the KL is averaged over places.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import STANDARDIZE, logit_rows, standardized
from feedfast.tasks import Classify, label_loss
from feedfast_kernels import ensemble_kl


class Plain(Method):
    """Plain training: the task and nothing else."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "plain training, no teacher"
    dense: ClassVar[bool] = True


class KD(Method):
    """Distillation of logits from any number of teachers."""

    name: ClassVar[str] = "kd"
    paper: ClassVar[str] = "Hinton et al., Distilling the Knowledge in a Neural Network, NIPS workshop 2014"
    needs: ClassVar[tuple[str, ...]] = (LOGITS,)
    dense: ClassVar[bool] = True
    fuses: ClassVar[type | None] = Classify

    class Options(MethodOptions):
        """alpha, tau, and how teachers are averaged and compared."""

        alpha: float = Field(0.9, ge=0, le=1, description="share of the distillation term; 1 trains without labels")
        tau: float = Field(4.0, gt=0, description="temperature")
        average: Literal["probabilities", "logits"] = Field(
            "probabilities", description="what is averaged over the teachers"
        )
        direction: Literal["forward", "reverse"] = Field(
            "forward", description="forward is KL(teachers || student), as usual; reverse is KL(student || teachers)"
        )
        standardize: bool = Field(
            False,
            description=f"{STANDARDIZE}; the authors then take tau = 2 and weigh the term 9",
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options = options

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``kd``: tau^2 times the divergence of the logits [B, K] or [B, K, h, w], averaged over batch and places."""
        options = self.options
        ours, theirs = self._rows(student, targets)
        return {"kd": ensemble_kl(ours, theirs, tau=options.tau, average=options.average, direction=options.direction)}

    def weights(self, progress: float) -> dict[str, float]:
        """alpha."""
        return {"kd": self.options.alpha}

    def task_weight(self, progress: float) -> float:
        """1 - alpha."""
        return 1 - self.options.alpha

    def fused(
        self,
        student: StudentOutput,
        targets: Targets,
        annotations: Any,
        weight: float,
        task_weight: float,
        progress: float,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Divergence and cross-entropy in one kernel; labels int64 [B], -1 learns from the teachers only.

        Standardized logits are not those that cross-entropy reads, and mixed images have two labels: then the two are
        computed one after the other.
        """
        options = self.options
        if options.standardize or not isinstance(annotations, Tensor):
            own, terms = label_loss(student.output, annotations), self(student, targets, annotations)
            total = task_weight * own + weight * options.alpha * terms["kd"]
            return total, own.detach(), {"kd": terms["kd"].detach()}
        ours, theirs = self._rows(student, targets)
        loss, values = ensemble_kl(
            ours,
            theirs,
            tau=options.tau,
            average=options.average,
            direction=options.direction,
            weight=weight * options.alpha,
            labels=annotations,
            label_weight=task_weight,
            return_terms=True,
        )
        return loss, values[0], {"kd": values[1]}

    def _rows(self, student: StudentOutput, targets: Targets) -> tuple[Tensor, list[Tensor]]:
        # float logits go in as they are stored: the loss reads 16-bit values itself
        ours, theirs = logit_rows(student.output, (taps[LOGITS] for taps in targets.values()))
        if self.options.standardize:
            return standardized(ours), [standardized(x) for x in theirs]
        return ours, theirs


class BAN(KD):
    """Born-again networks: each generation learns from labels and from the generation before, without softening."""

    name: ClassVar[str] = "ban"
    paper: ClassVar[str] = "Furlanello et al., Born-Again Neural Networks, ICML 2018"

    class Options(KD.Options):
        """weight of the divergence, and the rest as for ``kd``."""

        alpha: float = Field(1.0, ge=0, description="weight of the distillation term; cross-entropy weighs 1")
        tau: float = Field(1.0, gt=0, description="temperature; the paper's generations learn without softening")

    def task_weight(self, progress: float) -> float:
        """1: cross-entropy is added, not shared with."""
        return 1.0
