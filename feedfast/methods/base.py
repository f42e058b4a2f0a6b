"""The words all methods share: what a student gives, what teachers give, and the loss of the labels.

A method is an `nn.Module` with

    forward(student: StudentOutput, targets: Targets, labels) -> {"loss": ..., parts ...}
    student_taps, teacher_taps: the tap names it reads ("logits" is named only where it is needed)

A cache is read for the taps in `teacher_taps` and for nothing else: a target that is not named there does not come.
`loss` is the scalar to differentiate; the parts ("ce", "kd", "feature") are its terms before their weights, detached,
so that curves of runs with different weights compare. Adapters are ordinary parameters of the method:
`method.parameters()` goes into the optimizer, and the student never carries them. There is no base class; these few
words are the whole agreement.

Methods know neither caches nor teachers: a target is codes or a float map, whoever made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from feedfast.errors import RequestError
from feedfast_kernels import Target

Targets = Mapping[str, Mapping[str, Target]]
"""Teacher name -> tap name -> target. "logits" is a float [B, K]; other taps are maps or vectors."""


@dataclass(frozen=True)
class TapInfo:
    """One tap of one teacher, as a method needs to know it.

    Attributes:
        shape: (C, H, W), or (C,) for a vector, of one sample.
        margin: fp32 [C], OFD's lower bound of a pre-activation map, or None.
    """

    shape: tuple[int, ...]
    margin: Tensor | None = None


@dataclass
class StudentOutput:
    """What the student's forward pass gives.

    Attributes:
        logits: [B, K], with gradient.
        taps: tap name -> [B, C, H, W] or [B, C], with gradient.
    """

    logits: Tensor
    taps: dict[str, Tensor]


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the hard labels, averaged over the labelled samples of the batch.

    Args:
        logits: [B, K], any float dtype; computed in fp32 (float64 stays).
        labels: int64 [B]; -1 is unlabelled.

    Returns:
        Scalar; 0 (with a zero gradient) if no sample is labelled.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)


def numbered_taps(taps: Iterable[str], prefix: str) -> tuple[str, ...]:
    """The taps called ``prefix`` and a number, by that number: ofd1, ofd2, ..."""
    found = [name for name in taps if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
    return tuple(sorted(found, key=lambda name: int(name[len(prefix) :])))


def require_teachers(teachers: Mapping[str, object], method: str) -> None:
    """Raise RequestError unless there is a teacher to learn from."""
    if not teachers:
        raise RequestError(f"method.name: {method!r} needs at least one teacher, found none")


def tap_shape(shapes: Mapping[str, tuple[int, ...]], tap: str, owner: str) -> tuple[int, ...]:
    """The shape of ``tap``, or a RequestError that lists the taps there are."""
    if tap not in shapes:
        raise RequestError(f"{owner}: expected a tap named {tap!r}, found {sorted(shapes) or 'none'}")
    return shapes[tap]
