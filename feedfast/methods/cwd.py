"""Channel-wise distillation: each channel's map is a distribution over places, and the two are compared.

    L = L_task + beta * tau^2 / C * sum over channels  KL(softmax(x_T / tau) || softmax(x / tau))

The softmax is over H * W places. The student's map is the last one, through a 1x1 convolution where its channels
differ. The authors compare maps of dense tasks: on the few places of a small image's last map the term says little. One
teacher is the paper's method, several teachers are our extension.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid
from feedfast_kernels import as_float

TAP = "final"


class CWD(Method):
    """Divergence of every channel's distribution over the places of the last map."""

    name: ClassVar[str] = "cwd"
    paper: ClassVar[str] = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    needs: ClassVar[tuple[str, ...]] = (TAP,)

    class Options(MethodOptions):
        """Weight and temperature."""

        beta: float = Field(
            3.0,
            ge=0,
            description="weight of the divergence; 3 is the authors' for logit maps, 5 mmrazor's with tau = 1; "
            "that it suits a classifier's last map is not from the paper",
        )
        tau: float = Field(4.0, gt=0, description="temperature; 4 is the authors', 1 mmrazor's")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        # without a bias: the softmax over places does not see a constant of a channel
        self.alignments = nn.ModuleList(
            nn.Identity() if ours[0] == theirs.shape[0] else nn.Conv2d(ours[0], theirs.shape[0], 1, bias=False)
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True)
        )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``channels``: divergence of maps [B, C, H, W], averaged over channels, batch and teachers."""
        tau = self.options.tau
        terms = []
        for name, alignment in zip(self.teacher_names, self.alignments, strict=True):
            ours, theirs = same_grid(alignment(student.taps[TAP]), targets[name][TAP])
            log_q = F.log_softmax(ours.float().flatten(2) / tau, 2)
            log_p = F.log_softmax(as_float(theirs).detach().flatten(2) / tau, 2)
            terms.append(tau**2 * (log_p.exp() * (log_p - log_q)).sum(2).mean())
        return {"channels": torch.stack(terms).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"channels": self.options.beta}
