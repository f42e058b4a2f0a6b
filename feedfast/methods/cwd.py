"""Channel-wise distillation: each channel's map is a distribution over places, and the two are compared.

    L = L_task + beta * tau^2 / C * sum over channels  KL(softmax(x_T / tau) || softmax(x / tau))

The softmax is over H * W places. Compared are the last maps, the student's through a 1x1 convolution where its channels
differ, or the logits of segmentation networks, one map per class, as the authors prefer. On the few places of a
classifier's last map the term says little. One teacher is the paper's method, several teachers are our extension.
At some positions only, both distributions are over those: an approximation, which needs no rescaling.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import LOGITS, Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import paired_maps, same_grid
from feedfast.tasks.base import wide
from feedfast_kernels import as_float

TAP = "final"


class CWD(Method):
    """Divergence of every channel's distribution over the places of the last map, or of a segmentation's logits."""

    name: ClassVar[str] = "cwd"
    paper: ClassVar[str] = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    dense: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    class Options(MethodOptions):
        """Which map, weight and temperature."""

        map: Literal["final", "logits"] = Field(
            "final", description="what is compared: the last maps, or the logits of segmentation networks (class maps)"
        )
        beta: float = Field(
            3.0,
            ge=0,
            description="weight of the divergence; 3 is the authors' for logits, 5 mmrazor's with tau = 1; "
            "that it suits a classifier's last map is not from the paper",
        )
        tau: float = Field(4.0, gt=0, description="temperature; 4 is the authors', 1 mmrazor's")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        if options.map == LOGITS:
            for name, infos in teachers.items():
                shape = infos[LOGITS].shape if LOGITS in infos else ()
                if len(shape) != 3:
                    raise RequestError(
                        f"method.map: 'logits' compares maps of classes, expected (class, height, width) of every "
                        f"teacher, as of task.name = 'segment', found {shape} of {name!r}; 'final' compares last maps"
                    )
            self.alignments = nn.ModuleList(nn.Identity() for _ in teachers)
            return
        # without a bias: the softmax over places does not see a constant of a channel
        self.alignments = nn.ModuleList(
            nn.Identity() if ours[0] == theirs.shape[0] else nn.Conv2d(ours[0], theirs.shape[0], 1, bias=False)
            for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True)
        )

    @classmethod
    def needed(cls, options: Options) -> tuple[str, ...]:
        """The last maps or the logits."""
        return (options.map,)

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``channels``: divergence of maps [B, C, H, W], averaged over channels, batch and teachers."""
        tau, place = self.options.tau, self.options.map
        terms = []
        for name, alignment in zip(self.teacher_names, self.alignments, strict=True):
            mine = student.output if place == LOGITS else student.at(TAP, name)[0]
            ours, theirs = same_grid(alignment(mine), targets[name][place])
            ours = wide(ours)
            log_q = F.log_softmax(ours.flatten(2) / tau, 2)
            log_p = F.log_softmax(as_float(theirs).detach().to(ours.dtype).flatten(2) / tau, 2)
            terms.append(tau**2 * (log_p.exp() * (log_p - log_q)).sum(2).mean())
        return {"channels": torch.stack(terms).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"channels": self.options.beta}
