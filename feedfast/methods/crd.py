"""CRD: the student's embedding of a sample must be told from other samples by the teacher's, and the other way round.

    L = CE(y, z) + beta * (N(s, M_T) + N(t, M_S))
    N(v, M) = -mean over the batch of  log h(v . m_i) + sum over negatives j of  log (1 - h(v . m_j))
    h(x) = e / (e + k/n),   e = exp(x / tau) / Z

s and t are linear embeddings of norm 1 of the two networks' pooled last maps, trained with the student and thrown away.
M_S and M_T remember s and t of all n samples, [n, width], each a running mean: k negatives are too many for a batch.
Negatives are samples of other classes (of an unlabeled sample: all but itself), drawn with replacement in every step
from the generator that the step has seeded. Z is set by the first batch, so that e is 1/n on average.
The memories are in the checkpoint: 8 * n * width bytes per teacher. Several teachers, each with embeddings and memories
of its own, are our extension: terms are averaged over them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import check_taps, embedding

TAP = "final"
LEAST = 1e-7  # the authors' constant in the denominator of h


class CRD(Method):
    """Contrast with a memory of every sample."""

    name: ClassVar[str] = "crd"
    paper: ClassVar[str] = "Tian et al., Contrastive Representation Distillation, ICLR 2020"
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    remembers: ClassVar[bool] = True
    whole: ClassVar[str] = "compares images by the mean of a map"
    one_label: ClassVar[bool] = True

    class Options(MethodOptions):
        """beta, and what is contrasted with what."""

        beta: float = Field(0.8, ge=0, description="weight of the term")
        width: int = Field(128, ge=1, description="values of an embedding")
        negatives: int = Field(16384, ge=1, description="other samples that each sample is told from, in every step")
        tau: float = Field(0.07, gt=0, description="temperature")
        momentum: float = Field(0.5, ge=0, lt=1, description="share of what is remembered that stays when it is seen")

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        check_taps(student, teachers, self.needs)
        self.options, self.teacher_names = options, tuple(teachers)
        self.contrasts = nn.ModuleList(
            Contrast(student[TAP][0], infos[TAP].shape[0], options.width) for infos in teachers.values()
        )
        self.negatives: Negatives | None = None

    def meet(self, ids: Tensor, labels: Tensor) -> None:
        """See `Method.meet`.

        Raises:
            RequestError: there is nothing to contrast with, or several ranks, which would each remember their part.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            ranks = torch.distributed.get_world_size()
            raise RequestError(f"method.name: {self.name!r} remembers every sample and needs one rank, found {ranks}")
        self.negatives = Negatives(ids, labels)
        for contrast in self.contrasts:
            assert isinstance(contrast, Contrast)
            contrast.remember(len(ids))

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``contrast`` of the embeddings [B, C], a sum over 1 + negatives per sample; both are remembered."""
        assert self.negatives is not None, "a method that remembers meets its samples first"
        assert student.ids is not None
        at = self.negatives.positions(student.ids)
        shown = torch.cat([at[:, None], self.negatives.draw(at, self.options.negatives)], 1)
        with torch.autocast(at.device.type, enabled=False):
            x = embedding(student.taps[TAP])
            found = []
            for name, contrast in zip(self.teacher_names, self.contrasts, strict=True):
                t = embedding(targets[name][TAP]).detach()
                found.append(contrast(x, t, shown, self.options.tau, self.options.momentum))
        return {"contrast": torch.stack(found).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"contrast": self.options.beta}


class Negatives(nn.Module):
    """Which samples are of other classes: all samples by class, and where each class lies among them.

    Buffers, int64 [n] by position, in no checkpoint: ``ids``, ``order``, ``start`` and ``size`` of a sample's class.
    """

    ids: Tensor
    order: Tensor
    start: Tensor
    size: Tensor

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        """``ids``: int64 [n], ascending; ``labels``: int64 [n], -1 = a class of its own.

        Raises:
            RequestError: all samples are of one class.
        """
        super().__init__()
        n = len(labels)
        alone = labels.max() + 1 + torch.arange(n)
        _, group, counts = torch.unique(torch.where(labels < 0, alone, labels), return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise RequestError(f"data.train: 'crd' needs samples of at least two classes, found {n} of one")
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", group.argsort(stable=True), persistent=False)
        self.register_buffer("start", (counts.cumsum(0) - counts)[group], persistent=False)
        self.register_buffer("size", counts[group], persistent=False)

    def positions(self, ids_B: Tensor) -> Tensor:
        """Where samples are among the run's, int64 [B]."""
        return torch.searchsorted(self.ids, ids_B)

    def draw(self, positions_B: Tensor, count: int) -> Tensor:
        """Positions of other classes' samples, int64 [B, count], each as likely as any other."""
        start, size = self.start[positions_B, None], self.size[positions_B, None]
        others = len(self.ids) - size
        drawn = (torch.rand(len(positions_B), count, device=others.device, dtype=torch.float64) * others).long()
        # the class itself is stepped over
        return self.order[drawn + size * (drawn >= start)]


class Contrast(nn.Module):
    """Embeddings and memories of student and one teacher."""

    student_memory: Tensor
    teacher_memory: Tensor
    z: Tensor

    def __init__(self, student_channels: int, teacher_channels: int, width: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student_channels, width), nn.Linear(teacher_channels, width)

    def remember(self, samples: int) -> None:
        """Make room: memories fp32 [samples, width], random of about norm 1 at first; ``z``: both Z, 0 = not set."""
        width = self.student.out_features
        bound = 1 / math.sqrt(width / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("z", torch.zeros(2))

    def forward(self, x_BC: Tensor, t_BC: Tensor, shown: Tensor, tau: float, momentum: float) -> Tensor:
        """The loss of a batch; ``shown``: positions int64 [B, 1 + k], the sample itself first."""
        s, t = F.normalize(self.student(x_BC)), F.normalize(self.teacher(t_BC))
        # all products and then the k of them: n rows are read once, not k rows per sample
        scores = [
            ((v @ memory.T).gather(1, shown) / tau).exp()
            for v, memory in ((s, self.teacher_memory), (t, self.student_memory))
        ]
        n = len(self.student_memory)
        first = torch.stack([e.detach().mean() * n for e in scores])
        self.z = torch.where(self.z > 0, self.z, first)
        self.student_memory = _remembered(self.student_memory, shown[:, 0], s.detach(), momentum)
        self.teacher_memory = _remembered(self.teacher_memory, shown[:, 0], t.detach(), momentum)
        return nce(scores[0] / self.z[0], n) + nce(scores[1] / self.z[1], n)


def nce(e: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation: -log h of the first column and -log (1 - h) of the others, summed; mean of rows."""
    noise = (e.shape[1] - 1) / samples
    total = (e + noise + LEAST).log()
    own = e[:, 0].log() - total[:, 0]
    others = math.log(noise) - total[:, 1:]
    loss: Tensor = -(own.sum() + others.sum()) / len(e)
    return loss


def _remembered(memory: Tensor, at: Tensor, v: Tensor, momentum: float) -> Tensor:
    """The memory with these rows moved towards ``v`` and of norm 1 again; a new tensor, for backward reads the old."""
    return memory.index_copy(0, at, F.normalize(momentum * memory[at] + (1 - momentum) * v))
