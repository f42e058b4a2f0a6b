"""Training on labels alone, and Hinton's distillation of logits from one teacher or an ensemble.

    none   L = CE(y, z)
    kd     L = (1 - alpha) * CE(y, z) + alpha * tau^2 * KL(p || q)

p is the average of the teachers' softened outputs, q the student's; the KL is summed over classes and averaged over the
batch. alpha = 0.9 and tau = 4 are the defaults of the common benchmark codes. Both methods have no parameters.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import StudentOutput, Targets, label_loss
from feedfast_kernels import Codes, as_float, ensemble_kl


class CrossEntropy(nn.Module):
    """Plain training: the labels and nothing else."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def forward(self, student: StudentOutput, targets: Targets, labels: Tensor) -> dict[str, Tensor]:
        """Loss of the labels.

        Args:
            student: its logits [B, K].
            targets: not looked at.
            labels: int64 [B]; -1 is unlabelled and ignored.

        Returns:
            ``loss`` and ``ce``, the same scalar.
        """
        ce = label_loss(student.logits, labels)
        return {"loss": ce, "ce": ce.detach()}


class KD(nn.Module):
    """Distillation of logits (Hinton et al. 2015), from any number of teachers."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ("logits",)

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        tau: float = 4.0,
        average: Literal["probabilities", "logits"] = "probabilities",
        direction: Literal["forward", "reverse"] = "forward",
    ) -> None:
        """Set the weights.

        Args:
            alpha: share of the distillation term, 0..1; 1 trains without labels.
            tau: temperature, > 0.
            average: what is averaged over the teachers.
            direction: ``"forward"`` is KL(teachers || student), as usual; ``"reverse"`` is KL(student || teachers).

        Raises:
            RequestError: if a value is out of range.
        """
        super().__init__()
        if not 0 <= alpha <= 1:
            raise RequestError(f"method.alpha: expected 0 to 1, found {alpha}")
        if not tau > 0:
            raise RequestError(f"method.tau: expected more than 0, found {tau}")
        if average not in ("probabilities", "logits"):
            raise RequestError(f"method.average: expected 'probabilities' or 'logits', found {average!r}")
        if direction not in ("forward", "reverse"):
            raise RequestError(f"method.direction: expected 'forward' or 'reverse', found {direction!r}")
        self.alpha, self.tau = alpha, tau
        self.average: Literal["probabilities", "logits"] = average
        self.direction: Literal["forward", "reverse"] = direction

    def forward(self, student: StudentOutput, targets: Targets, labels: Tensor) -> dict[str, Tensor]:
        """Loss of labels and teachers.

        Args:
            student: its logits [B, K].
            targets: "logits" [B, K] of every teacher.
            labels: int64 [B]; -1 is unlabelled: such samples learn from the teachers only.

        Returns:
            ``loss``, and before their weights ``ce`` and ``kd`` (tau^2 included).
        """
        # float logits go in as they are stored: the loss reads 16-bit values itself
        found = [taps["logits"] for taps in targets.values()]
        loss, terms = ensemble_kl(
            student.logits,
            [as_float(x) if isinstance(x, Codes) else x for x in found],
            tau=self.tau,
            average=self.average,
            direction=self.direction,
            weight=self.alpha,
            labels=labels,
            label_weight=1 - self.alpha,
            return_terms=True,
        )
        return {"loss": loss, "ce": terms[0], "kd": terms[1]}
