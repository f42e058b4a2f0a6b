"""From a stage's dictionary to a frozen dataclass, in one place, and back.

A stage returns the document of its command as plain values. Each command's document is declared once as a dataclass;
`document_of` makes it, and refuses a key that nobody has declared, so that the two cannot drift apart. A key that only
some runs have is None in the others: the keys of a document do not depend on the run. Where names of keys are data
(teachers, taps, methods), the field is a mapping.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["Document", "document_of"]


@dataclass(frozen=True)
class Document:
    """What a command found: the fields are the keys of its JSON document, which `to_json` gives."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and tuples: the same as `dataclasses.asdict`."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The line that the command prints last on stdout."""
        return json.dumps(self.to_dict())


D = TypeVar("D")


def document_of(kind: type[D], found: Mapping[str, Any], where: str = "") -> D:
    """A dataclass from a mapping, nested ones included.

    Args:
        kind: the dataclass; its annotations say what is nested.
        found: field → value; fields with a default may be left out.
        where: the key it lies under, for the message.

    Raises:
        TypeError: a key is not declared, or a required one is missing. That is a mistake of this package.
    """
    declared = _hints(kind)
    unknown = sorted(found.keys() - declared.keys())
    if unknown:
        raise TypeError(f"{kind.__name__}: {where}{unknown[0]}: expected a declared key, found one that is not")
    values = {key: _value(declared[key], value, f"{where}{key}.") for key, value in found.items()}
    return kind(**values)  # a missing one is named by Python itself


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(declared: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(declared), get_args(declared)
    if value is None or declared is Any or origin is Literal:
        return value
    if origin in (Union, types.UnionType):
        return _value(next(one for one in inner if one is not types.NoneType), value, where)
    if dataclasses.is_dataclass(declared) and isinstance(declared, type) and isinstance(value, Mapping):
        return document_of(declared, value, where)
    if origin is tuple:
        each = inner[0] if len(inner) == 2 and inner[1] is Ellipsis else Any
        return tuple(_value(each, entry, where) for entry in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _value(inner[1], entry, f"{where}{key}.") for key, entry in value.items()}
    return value
