"""Factor transfer: a translator's factors of the student's map against a paraphraser's of the teacher's (NeurIPS 2018).

    L = CE(y, z) + beta * sum over teachers n of  mean | F_n / ||F_n||_2  -  G_n(x) / ||G_n(x)||_2 |
    F_n = encoder of paraphraser n on the teacher's last map, without gradient;   G_n = translator, on the student's

The paraphraser is an autoencoder of teacher maps: it is trained before the first step, on targets alone, so from a
cache it needs neither teacher nor images. It is frozen then, and lies in the checkpoint with the translator; the
student carries neither. Layers, defaults and order are the authors' code's (Kim et al., ResNet-56 on CIFAR-10); several
teachers are our extension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import FeedfastError, RequestError
from feedfast.methods.base import Method, MethodOptions, Passes, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import NTL, paired_maps, same_grid
from feedfast_kernels import Target, as_float, normalized_l1

log = logging.getLogger(__name__)

TAP = "final"
FACTOR = "factor"


def factor_channels(channels: int, rate: float) -> int:
    """Channels of the factors of a map of ``channels``."""
    return max(round(channels * rate), 1)


class Paraphraser(nn.Module):
    """Autoencoder of maps: C -> C -> kC -> kC, and back by transposed convolutions; the grid stays as it is.

    A LeakyReLU(0.1) follows every layer, the last one too; no batch norm, as in the authors' code.
    """

    def __init__(self, channels: int, rate: float) -> None:
        """``rate``: k, channels of the factors per channel of the map."""
        super().__init__()
        self.factors = factor_channels(channels, rate)
        widths = ((channels, channels), (channels, self.factors), (self.factors, self.factors))
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for c_in, c_out in widths:
            encoder += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.1)]
        for c_out, c_in in reversed(widths):
            decoder += [nn.ConvTranspose2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def forward(self, map_NCHW: Tensor) -> Tensor:
        """The reconstruction [B, C, H, W]."""
        reconstruction: Tensor = self.decoder(self.encoder(map_NCHW))
        return reconstruction

    @torch.no_grad()
    def encode(self, map_NCHW: Tensor) -> Tensor:
        """The factors [B, kC, H, W], fp32, without gradient."""
        factors: Tensor = self.encoder(map_NCHW)
        return factors.float()


def train_paraphraser(
    paraphraser: Paraphraser,
    epochs: Iterable[Iterator[Tensor]],
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    loss: Literal["l1", "mse"] = "l1",
    key: str = "method.paraphraser_lr",
) -> Iterator[float]:
    """Train on maps, one epoch at a time, by SGD as in the authors' code.

    Args:
        paraphraser: trained in place.
        epochs: per epoch an iterator of float maps [B, C, H, W].
        lr: of the whole training; the authors' schedule never lowers it in so few epochs.
        momentum: of SGD.
        weight_decay: of SGD.
        loss: mean absolute (the authors' code) or mean squared difference (other codes).
        key: what the learning rate is called where it was asked for, for messages.

    Yields:
        The mean loss of each epoch.

    Raises:
        FeedfastError: the loss is not finite.
    """
    optimizer = torch.optim.SGD(paraphraser.parameters(), lr, momentum, weight_decay=weight_decay)
    distance = F.l1_loss if loss == "l1" else F.mse_loss
    paraphraser.train().requires_grad_(True)
    for maps in epochs:
        total, batches = torch.zeros(()), 0
        for map_NCHW in maps:
            found = distance(paraphraser(map_NCHW), map_NCHW)
            optimizer.zero_grad(set_to_none=True)
            found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, batches = total.to(found.device) + found.detach(), batches + 1
        mean = float(total) / max(batches, 1)
        if not mean < float("inf"):
            raise FeedfastError(f"{key}: expected a finite reconstruction loss, found {mean}; lower it")
        yield mean
    paraphraser.eval().requires_grad_(False)


class FT(Method):
    """Factor transfer with a paraphraser per teacher."""

    name: ClassVar[str] = "ft"
    paper: ClassVar[str] = (
        "Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018"
    )
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    student_needs: ClassVar[tuple[str, ...] | None] = (TAP,)
    whole: ClassVar[str] = "makes factors by 3x3 convolutions, which read neighbors"

    class Options(MethodOptions):
        """The paraphraser and its training, and the weight of the term."""

        beta: float = Field(500.0, ge=0, description="weight of the term, a mean over the factors' values")
        rate: float = Field(0.5, gt=0, le=4, description="channels of the factors per channel of the teacher's map")
        factors: Literal["own", "stored"] = Field(
            "own",
            description="own: a paraphraser per teacher, trained before the first step; stored: the factors that "
            "`feedfast factors` added to the cache, whose paraphrasers count then, not `rate` and the options of one",
        )
        paraphraser_epochs: int = Field(5, ge=1, description="passes of the paraphraser over the targets")
        paraphraser_lr: float = Field(0.1, gt=0, description="of the paraphraser's SGD")
        reconstruction: Literal["l1", "mse"] = Field(
            "l1", description="the paraphraser's loss: l1 as in the authors' code, mse as in torchdistill's recipe"
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        self.paraphrasers, self.translators = nn.ModuleList(), nn.ModuleList()
        if options.factors == "stored":
            for name, infos in teachers.items():
                if FACTOR not in infos or TAP not in student:
                    raise RequestError(f"method.factors: expected tap {FACTOR!r} of {name!r}, found {sorted(infos)}")
                self.translators.append(NTL(student[TAP][0], infos[FACTOR].shape[0]))
            return
        for _, _, ours, theirs in paired_maps(student, teachers, (TAP,), pooled=True):
            paraphraser = Paraphraser(theirs.shape[0], options.rate)
            self.paraphrasers.append(paraphraser.eval().requires_grad_(False))
            self.translators.append(NTL(ours[0], paraphraser.factors))

    @classmethod
    def needed(cls, options: Options) -> tuple[str, ...]:
        """The factors alone where they are stored."""
        return (FACTOR,) if options.factors == "stored" else cls.needs

    def train(self, mode: bool = True) -> FT:
        """The paraphrasers stay as they are."""
        super().train(mode)
        self.paraphrasers.eval()
        return self

    def prepare(self, passes: Passes) -> None:
        """Train every teacher's paraphraser on its maps."""
        options = self.options
        if options.factors == "stored":
            return
        for name, paraphraser in zip(self.teacher_names, self.paraphrasers, strict=True):
            assert isinstance(paraphraser, Paraphraser)
            epochs = (
                (as_float(targets[name][TAP]) for targets in passes(epoch))
                for epoch in range(options.paraphraser_epochs)
            )
            means = train_paraphraser(paraphraser, epochs, lr=options.paraphraser_lr, loss=options.reconstruction)
            for epoch, mean in enumerate(means, start=1):
                log.info(
                    "ft: paraphraser of %s, epoch %d of %d: %s %.4g",
                    name,
                    epoch,
                    options.paraphraser_epochs,
                    options.reconstruction,
                    mean,
                )

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``factor``: the distances of factors [B, kC, H, W], normalized per sample, summed over teachers."""
        ours, theirs = [], []
        for number, (name, translator) in enumerate(zip(self.teacher_names, self.translators, strict=True)):
            factor: Target
            if self.options.factors == "stored":
                factor = targets[name][FACTOR]
            else:
                paraphraser = self.paraphrasers[number]
                assert isinstance(paraphraser, Paraphraser)
                factor = paraphraser.encode(as_float(targets[name][TAP]))
            mine, factor = same_grid(translator(student.taps[TAP]), factor)
            ours.append(mine)
            theirs.append(factor)
        return {"factor": normalized_l1(ours, theirs, reduction="mean")}

    def weights(self, progress: float) -> dict[str, float]:
        """beta."""
        return {"factor": self.options.beta}
