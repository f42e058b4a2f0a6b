"""Distillation methods: what a student is trained with, given teachers' targets from a cache or live.

A method is one class in a file of its own (see `feedfast.methods.base`) and one entry of `METHODS`.
"""

import difflib
from typing import Any

from feedfast.errors import RequestError
from feedfast.methods.ab import ActivationBoundaries
from feedfast.methods.attention import AttentionTransfer
from feedfast.methods.base import (
    LOGITS,
    Method,
    MethodOptions,
    StudentOutput,
    TapInfo,
    Targets,
    Teachers,
    parse_options,
)
from feedfast.methods.camkd import CAMKD
from feedfast.methods.crd import CRD
from feedfast.methods.cwd import CWD
from feedfast.methods.ekd import EKD
from feedfast.methods.feed import PFEED, SFEED
from feedfast.methods.fitnet import FitNet
from feedfast.methods.ft import FT
from feedfast.methods.kd import BAN, KD, Plain
from feedfast.methods.locality import Locality
from feedfast.methods.logit import DIST, DKD
from feedfast.methods.mgd import MGD
from feedfast.methods.ofd import OFD
from feedfast.methods.parts import NTL, Connector, RunningMargin, margin_from_bn
from feedfast.methods.relation import PKT, RKD, SP
from feedfast.methods.reviewkd import ReviewKD
from feedfast.methods.vid import VID

_ALL: tuple[type[Method], ...] = (
    *(Plain, KD, BAN, DKD, DIST, CAMKD),
    *(FitNet, AttentionTransfer, ActivationBoundaries, VID, OFD, ReviewKD, CWD, MGD),
    *(FT, PFEED, SFEED, EKD, Locality, RKD, SP, PKT, CRD),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def method_named(name: str, where: str = "method") -> type[Method]:
    """The class of a recipe's method.

    Raises:
        RequestError: there is no such method; close names are in the message.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(f"{where}.name: expected {' | '.join(METHODS)}, found {name!r}{hint}")
    return METHODS[name]


def refuse_dense(kind: type[Method], task: str, options: Any = None, where: str = "method") -> None:
    """Raise unless a method serves a task.

    Args:
        kind: the method.
        task: "classify", "segment" or "detect".
        options: of ``kind.Options``; None = its defaults. What reads no logits serves detection, too.
        where: begins the sentence, as in ``method.0``.

    Raises:
        RequestError: with the methods that would fit.
    """
    if _serves(kind, task, options):
        return
    if kind.dense:
        why = "compares logits, which stand for boxes there"
    elif kind.one_label:
        why = "needs one class per image"
    else:
        why = "compares whole images"
    fitting = " | ".join(method.name for method in _ALL if _serves(method, task, None))
    raise RequestError(f"{where}.name: {kind.name!r} {why}, expected for task.name = {task!r} one of {fitting}")


def tasks_of(kind: type[Method]) -> tuple[str, ...]:
    """The tasks that a method serves with its default options: classify, segment, detect."""
    return tuple(task for task in ("classify", "segment", "detect") if _serves(kind, task, None))


def _serves(kind: type[Method], task: str, options: Any) -> bool:
    needed = kind.needed(kind.Options() if options is None else options)
    return task == "classify" or (kind.dense and (task == "segment" or LOGITS not in needed))


def refuse_other_logits(
    kind: type[Method], options: Any, outputs: Any, teachers: Teachers, where: str = "method"
) -> None:
    """Raise if a method compares logits, and student and teachers have not the same classes.

    Args:
        kind: the method.
        options: of ``kind.Options``.
        outputs: shape of the student's output without the batch; None or a mapping if it is no tensor.
        teachers: teacher → tap → shape; grids of logits may differ, classes not.
        where: begins the sentence.

    Raises:
        RequestError: student or teacher has no logits, or they are of other classes.
    """
    if LOGITS not in kind.needed(options):
        return
    for name, infos in teachers.items():
        if LOGITS not in infos:
            raise RequestError(f"{where}.name: {kind.name!r} compares logits, found none of teacher {name!r}")
        shape = infos[LOGITS].shape
        if not isinstance(outputs, tuple) or len(outputs) != len(shape):
            form = "[batch, class]" if len(shape) == 1 else "[batch, class, height, width]"
            found = f"{list(outputs)} per sample" if isinstance(outputs, tuple) else "no tensor"
            raise RequestError(
                f"{where}.name: {kind.name!r} compares logits, expected a student that returns them as {form}, "
                f"as teacher {name!r} does, found {found}"
            )
        if shape[0] != outputs[0]:
            raise RequestError(
                f"{where}.name: {kind.name!r} compares classes one by one, expected {outputs[0]} in every teacher, "
                f"found {shape[0]} in {name!r}"
            )


__all__ = [
    "BAN",
    "CAMKD",
    "CRD",
    "DIST",
    "DKD",
    "EKD",
    "FT",
    "KD",
    "METHODS",
    "NTL",
    "OFD",
    "PFEED",
    "PKT",
    "RKD",
    "SFEED",
    "SP",
    "Connector",
    "Locality",
    "Method",
    "MethodOptions",
    "Plain",
    "RunningMargin",
    "StudentOutput",
    "TapInfo",
    "Targets",
    "margin_from_bn",
    "method_named",
    "parse_options",
    "refuse_dense",
    "refuse_other_logits",
    "tasks_of",
]
