"""EKD: a student of parallel branches, each taught by a teacher of its own (after Asif, Tang & Harrer, ECAI 2020).

    L = a * [ CE(y, z) + mean over branches b of CE(y, z_b) ]
      + k * mean over b of  tau^2 * KL(p_t(b) || p_b)  +  f * mean over b of  mean (A_b(h_b) - h_t(b))^2
    z = mean over b of z_b     the student's output, also at test time

h_b and z_b are branch b's last map and logits, t(b) its teacher, A_b a 1x1 convolution with batch norm, thrown away. A
reconstruction: that different teachers feed parallel branches, which ensembling couples, is in the abstract; a
re-implementation has these three kinds of term. Pairing, weights and tau are not known to us; the defaults are that
re-implementation's. `feedfast.models.branched` makes the student.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import same_grid
from feedfast.tasks.base import wide
from feedfast.tasks.classify import label_loss
from feedfast_kernels import as_float, ensemble_kl

FINAL = "final"


class EKD(Method):
    """Ensemble distillation into branches."""

    name: ClassVar[str] = "ekd"
    paper: ClassVar[str] = (
        "after Asif et al., Ensemble Knowledge Distillation for Learning Improved and Efficient Networks, ECAI 2020 "
        "(reconstruction: pairing, weights and tau are not from the paper)"
    )
    needs: ClassVar[tuple[str, ...]] = (LOGITS, FINAL)
    student_needs: ClassVar[tuple[str, ...] | None] = ("branch*",)
    whole: ClassVar[str] = "has one student map per branch, which are not gathered"

    class Options(MethodOptions):
        """Weights of the terms, temperature, and who teaches which branch."""

        label_weight: float = Field(0.5, ge=0, description="a, of the cross-entropies; not from the paper")
        kd_weight: float = Field(0.6, ge=0, description="k, of the divergences; not from the paper")
        feature_weight: float = Field(0.6, ge=0, description="f, of the maps' squared distances; not from the paper")
        tau: float = Field(10.0, gt=0, description="temperature; not from the paper")
        pairing: tuple[int, ...] | None = Field(
            None,
            strict=False,
            description="per branch the number of its teacher, from 0; default: in turn, which needs as many branches "
            "as teachers or a multiple; not from the paper",
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options = options
        self.branches = sum(tap.endswith(f".{LOGITS}") for tap in student)
        names = list(teachers)
        self.pairs = tuple(names[number] for number in self._pairing(len(names)))
        self.adapters = nn.ModuleList()
        for branch, name in enumerate(self.pairs, start=1):
            ours, theirs = student[f"branch{branch}.{FINAL}"], teachers[name][FINAL].shape
            self.adapters.append(nn.Sequential(nn.Conv2d(ours[0], theirs[0], 1, bias=False), nn.BatchNorm2d(theirs[0])))

    def _pairing(self, teachers: int) -> tuple[int, ...]:
        asked = self.options.pairing
        if asked is None:
            if self.branches % teachers:
                raise RequestError(
                    f"student.branches: expected {teachers} or a multiple, as there are {teachers} teachers, "
                    f"found {self.branches}; or say who teaches whom in method.pairing"
                )
            return tuple(branch % teachers for branch in range(self.branches))
        if len(asked) != self.branches or any(not 0 <= number < teachers for number in asked):
            raise RequestError(
                f"method.pairing: expected {self.branches} numbers from 0 to {teachers - 1}, one per branch, "
                f"found {list(asked)}"
            )
        return asked

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``branches``, ``kd`` and ``feature``, each a mean over branches; labels int64 [B], -1 = none."""
        labels, kd, feature = [], [], []
        for branch, (name, adapter) in enumerate(zip(self.pairs, self.adapters, strict=True), start=1):
            logits = student.taps[f"branch{branch}.{LOGITS}"]
            labels.append(label_loss(logits, annotations))
            kd.append(ensemble_kl(logits, [as_float(targets[name][LOGITS])], tau=self.options.tau))
            ours, theirs = same_grid(adapter(student.taps[f"branch{branch}.{FINAL}"]), targets[name][FINAL])
            feature.append(F.mse_loss(wide(ours), as_float(theirs)))
        return {
            name: torch.stack(terms).mean() for name, terms in (("branches", labels), ("kd", kd), ("feature", feature))
        }

    def weights(self, progress: float) -> dict[str, float]:
        """a, k and f."""
        options = self.options
        return {"branches": options.label_weight, "kd": options.kd_weight, "feature": options.feature_weight}

    def task_weight(self, progress: float) -> float:
        """a."""
        return self.options.label_weight
