"""From a recipe's words to a method: names, allowed parameters with their types, and the taps each method needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from feedfast.errors import RequestError
from feedfast.methods.base import TapInfo
from feedfast.methods.feed import PFEED
from feedfast.methods.kd import KD, CrossEntropy
from feedfast.methods.ofd import OFD

Param = float | bool | str
Method = CrossEntropy | KD | OFD | PFEED

PARAMS: dict[str, dict[str, type[float] | type[bool] | type[str]]] = {
    "none": {},
    "kd": {"alpha": float, "tau": float, "average": str, "direction": str},
    "ofd": {"alpha": float},
    "pfeed": {"beta": float, "reduction": str, "bn": bool, "divide_by_n": bool},
}
TAP_GROUPS: dict[str, tuple[str, ...]] = {"none": (), "kd": (), "ofd": ("ofd",), "pfeed": ("final",)}


def needs_of(name: str) -> tuple[str, ...]:
    """Selectors of the teachers' taps that a method reads: "final", "ofd*", "logits"."""
    return {"kd": ("logits",), "ofd": ("ofd*",), "pfeed": ("final",)}.get(_known(name), ())


def taps_needed(name: str) -> tuple[str, ...]:
    """The groups of maps a method needs of a model: (), ("final",) or ("ofd",), all of ofd1, ofd2, ... of it.

    They are what networks are tapped for before there is a method. A built one says itself what it reads
    (``teacher_taps``), logits included.

    Raises:
        RequestError: unknown name.
    """
    return TAP_GROUPS[_known(name)]


def build_method(
    name: str,
    params: Mapping[str, Param],
    *,
    student_taps: Mapping[str, tuple[int, ...]],
    teachers: Mapping[str, Mapping[str, TapInfo]],
) -> Method:
    """The method called ``name``.

    Args:
        name: "none", "kd", "ofd" or "pfeed".
        params: keyword arguments of the method, as a recipe has them; unnamed ones keep their defaults.
        student_taps: tap name -> (C, H, W) of the student.
        teachers: teacher name -> tap name -> shape and margin. "none" takes no teacher into account.

    Returns:
        A module as described in `feedfast.methods.base`.

    Raises:
        RequestError: unknown name or parameter, a value of the wrong type or out of range, missing or unfitting taps.
    """
    allowed = PARAMS[_known(name)]
    values: dict[str, Any] = {}
    for key, value in params.items():
        if key not in allowed:
            raise RequestError(f"method.{key}: not a parameter of {name!r}, expected {_listed(allowed)}")
        kind = allowed[key]
        whole_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, kind) and not whole_number:
            raise RequestError(f"method.{key}: expected {_WORDS[kind]}, found {value!r}")
        values[key] = float(value) if whole_number else value
    if name == "none":
        return CrossEntropy()
    if name == "kd":
        if not teachers:
            raise RequestError("method.name: 'kd' needs at least one teacher, found none")
        return KD(**values)
    return (OFD if name == "ofd" else PFEED)(student_taps, teachers, **values)


_WORDS: dict[type, str] = {float: "a number", bool: "true or false", str: "a word"}


def _known(name: str) -> str:
    if name not in PARAMS:
        close = difflib.get_close_matches(name, PARAMS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(f"method.name: expected {_listed(PARAMS)}, found {name!r}{hint}")
    return name


def _listed(names: Mapping[str, object]) -> str:
    return " | ".join(names) or "none at all"
