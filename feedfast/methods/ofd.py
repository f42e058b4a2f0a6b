"""OFD: maps before their ReLU, compared by a partial distance (Heo et al., ICCV 2019).

    L = CE(y, z) + alpha * (1/N) * sum over teachers n, taps i = 1..k of  1/2^(k-i) * (1/B) * sum d(t_ni, r_ni(s_i))
    t = max(teacher map, m),  d = 0 where r <= t <= 0, else (t - r)^2
    r = 1x1 convolution without bias, then batch norm          the student's side; the teacher's map is not transformed

The margin m < 0 of a channel is the mean of its negative responses: from the batch norm before the tap in closed form
(`margin_from_bn`), or measured where there is none (`RunningMargin`). Maps clipped at m before they were stored may be
clipped again. Which statistics the teachers' batch norms used is up to the caller; this loss is the same. Grids must
agree: the authors never resize. At P of H * W positions the distances are multiplied with H * W / P: unbiased but for
the connector's batch statistics, which are then those of the positions that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods.base import (
    Method,
    MethodOptions,
    Shapes,
    StudentOutput,
    Targets,
    Teachers,
    numbered_taps,
)
from feedfast.methods.parts import Connector, paired_maps, shared_taps

SMALL_SIDE = 32  # of the first map, in pixels: CIFAR's networks have 32 there, ImageNet's 56 at 224
ALPHA_SMALL, ALPHA_LARGE = 1e-3, 1e-4
# DeepLabV3+: four stages, the head (ASPP), and the decoder, whose map is as large as the first stage's. The authors
# divide the distances by 8, 4, 2, 1, 1, 16; they also divide the mean cross-entropy by the batch (task.weight).
DECODER_WEIGHTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 1.0, 1 / 16)
ALPHA_DENSE, CLASSIFIER_TAPS = 1e-5, 4  # classifiers have four taps at most, segmenters and detectors five or six


class OFD(Method):
    """Partial distance to pre-activation maps at the end of every stage."""

    name: ClassVar[str] = "ofd"
    paper: ClassVar[str] = "Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019"
    needs: ClassVar[tuple[str, ...]] = ("ofd*",)
    student_needs: ClassVar[tuple[str, ...] | None] = ("ofd*",)
    dense: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    class Options(MethodOptions):
        """alpha, which taps, and their weights."""

        # The distance is a sum over all elements, so alpha is small: the authors' rule, from a search over tenfolds.
        alpha: float | None = Field(
            None,
            ge=0,
            description="weight of the feature term; default: the authors' 1e-3 where the first map has up to 32 "
            "pixels per side (CIFAR), 1e-4 where it has more (ImageNet), 1e-5 where there are more than four taps "
            "(segmentation, detection)",
        )
        taps: tuple[int, ...] | None = Field(
            None,
            strict=False,
            description="numbers of the taps that are read and compared, as [2, 3, 4]; default: all. Without the large "
            "first map there is far less to read; not from the paper",
        )
        tap_weights: tuple[float, ...] | None = Field(
            None,
            strict=False,
            description="one per compared tap, first to last; default: the authors' ..., 1/4, 1/2, 1, and of "
            "DeepLabV3+'s six (the last map larger than the one before) their 1/8, 1/4, 1/2, 1, 1, 1/16; for SSD's six "
            "the halving is not from the paper",
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        """Build one connector per teacher and tap.

        Args:
            options: see `Options`.
            student: tap name -> (C, H, W); those called ofd1, ofd2, ... are used, in this order.
            teachers: teacher -> tap name -> shape and margin, with the same ofd taps as the student and equal H and W.

        Raises:
            RequestError: a tap or a margin is missing, or the spatial sizes differ.
        """
        super().__init__(options, student, teachers)
        every, self.taps = self._compared(options, student, teachers)
        alpha, authors = _authors([student[tap] for tap in every])
        self.alpha = alpha if options.alpha is None else options.alpha
        self.tap_weights = options.tap_weights or tuple(
            weight for tap, weight in zip(every, authors, strict=True) if tap in self.taps
        )
        if len(self.tap_weights) != len(self.taps) or min(self.tap_weights) < 0:
            raise RequestError(
                f"method.tap_weights: expected {len(self.taps)} numbers of 0 or more, one per tap, "
                f"found {list(self.tap_weights)}"
            )
        # lists, not dictionaries: module names may not hold the dots that teacher names may
        self.teacher_names = tuple(teachers)
        self.connectors = nn.ModuleList(nn.ModuleList() for _ in teachers)
        for name, tap, ours, theirs in paired_maps(student, teachers, self.taps):
            channels = theirs.shape[0]
            if theirs.margin is None or tuple(theirs.margin.shape) != (channels,):
                raise RequestError(
                    f"tap {tap!r} of teacher {name!r}: expected a margin of {channels} channels, "
                    f"found {'none' if theirs.margin is None else list(theirs.margin.shape)}"
                )
            connector = Connector(ours[0], channels)
            connector.register_buffer("margin", theirs.margin.detach().clone().float())
            of_teacher = self.connectors[self.teacher_names.index(name)]
            assert isinstance(of_teacher, nn.ModuleList)
            of_teacher.append(connector)

    @classmethod
    def needed(cls, options: Options) -> tuple[str, ...]:
        """The taps that are compared."""
        return cls.needs if options.taps is None else tuple(f"ofd{number}" for number in options.taps)

    @staticmethod
    def _compared(options: Options, student: Shapes, teachers: Teachers) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All taps of the student, and those of them that are compared."""
        if options.taps is None:
            taps = shared_taps(student, teachers, "ofd")
            return taps, taps
        every = numbered_taps(student, "ofd")
        chosen = tuple(f"ofd{number}" for number in options.taps)
        if not chosen or list(chosen) != [tap for tap in every if tap in chosen]:
            expected = [int(tap[3:]) for tap in every]
            raise RequestError(
                f"method.taps: expected some of the student's {expected}, ascending, found {list(options.taps)}"
            )
        return every, chosen

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``feature``: the distances of the stages' maps [B, C, H, W], clipped at the margin or not.

        The last tap weighs 1 and those before it, with their larger maps, 1/2, 1/4, ... (but see ``tap_weights``);
        one teacher is the paper's method, more are our extension: their terms are averaged so that alpha keeps its
        meaning.
        """
        distances: list[Tensor] = []
        for name, connectors in zip(self.teacher_names, self.connectors, strict=True):
            assert isinstance(connectors, nn.ModuleList)
            for index, (tap, connector) in enumerate(zip(self.taps, connectors, strict=True)):
                assert isinstance(connector, Connector)
                margin = connector.get_buffer("margin")
                ours, rescale = student.at(tap, name)
                weight = self.tap_weights[index] / len(self.teacher_names) * rescale
                distances.append(connector.distance(ours, targets[name][tap], margin, weight))
        feature = distances[0]
        for distance in distances[1:]:
            feature = torch.add(feature, distance)
        return {"feature": feature}

    def weights(self, progress: float) -> dict[str, float]:
        """alpha."""
        return {"feature": self.alpha}


def _authors(shapes: Sequence[tuple[int, ...]]) -> tuple[float, tuple[float, ...]]:
    """The authors' alpha and weights of taps of a network with maps of these shapes (C, H, W), first to last."""
    count = len(shapes)
    sides = [max(shape[1:], default=1) for shape in shapes]
    alpha = ALPHA_SMALL if sides[0] <= SMALL_SIDE else ALPHA_LARGE
    if count > CLASSIFIER_TAPS:
        alpha = ALPHA_DENSE
    if count == len(DECODER_WEIGHTS) and sides[-1] > sides[-2]:
        return alpha, DECODER_WEIGHTS
    return alpha, tuple(0.5 ** (count - index) for index in range(1, count + 1))
