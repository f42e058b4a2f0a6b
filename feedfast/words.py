"""TOML and ``key=value`` as anybody may write them: read within bounds, into plain trees that `recipe.py` validates."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any, Final

from feedfast.errors import RequestError

__all__ = ["MAX_DEPTH", "override", "put", "read_toml", "refuse_odd_values", "toml_text", "toml_value"]

MAX_DEPTH: Final = 8
_MAX_TEXT: Final = 4096  # characters; no path of Linux is longer
_MAX_NUMBER: Final = 1e18  # two of them multiplied are a float32 still
_PLAIN: Final = re.compile(r"(?!(?:true|false|inf|nan)\Z)[A-Za-z_./~][\w./~@+-]*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_MANY_PARTS: Final = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


def read_toml(text: str) -> dict[str, Any]:
    """TOML from anybody's file.

    Raises:
        ValueError: not TOML, nested too deeply, or a number of thousands of digits.
    """
    # looked for first: tomllib takes time that grows with the square of a key's parts
    if _MANY_PARTS.search(text):
        raise ValueError("nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def toml_value(value: Any) -> str:
    """A value as TOML writes it on one line, tables included; text of plain letters as it is, as an override takes it.

    Raises:
        RequestError: it is none that a recipe can hold.
    """
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return _toml(value)


def toml_text(tree: Mapping[str, Any]) -> str:
    """A tree as a TOML file; keys that are None are left out, as TOML has no word for it.

    Raises:
        RequestError: as `toml_value`.
    """
    return "\n".join(_sections(tree, ())).strip() + "\n"


def _sections(tree: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of a table: its own values first, as those below a header belong to the header."""
    lines = [
        f"{_key(name)} = {_toml(value)}" for name, value in tree.items() if value is not None and not _nests(value)
    ]
    for name, value in tree.items():
        below = (*path, name)
        header = ".".join(map(_key, below))
        if isinstance(value, Mapping):
            lines += ["", f"[{header}]", *_sections(value, below)]
        elif _nests(value):
            for entry in value:
                lines += ["", f"[[{header}]]", *_sections(entry, below)]
    return lines


def _nests(value: Any) -> bool:
    """Whether it is a table, or a list of nothing else."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(str(name))} = {_toml(entry)}" for name, entry in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are called so in both
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str | os.PathLike):
        # as it is, not in JSON's pairs of halves of characters, which TOML does not know
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    raise RequestError(f"expected text, a number, a list or a table, found {type(value).__name__}")


def refuse_odd_values(node: Any, where: str, key: str) -> None:
    """Refuse what no key can mean, wherever it stands: numbers out of all bounds, control characters, endless text."""
    if isinstance(node, dict):
        for name, value in node.items():
            refuse_odd_values(name, where, key)
            refuse_odd_values(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            refuse_odd_values(value, where, f"{key}.{number}")
    elif isinstance(node, str):
        found = next((char for char in node if ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 or char == "\x7f"), "")
        if found or len(node) > _MAX_TEXT:
            what = f"the character {found!r}" if found else f"{len(node)} characters"
            raise RequestError(f"{where}: {key}: expected text of at most {_MAX_TEXT} plain characters, found {what}")
    elif isinstance(node, int):
        if not -(2**63) <= node < 2**63:
            raise RequestError(
                f"{where}: {key}: expected a number of at most 63 bits, found one of {node.bit_length()}"
            )
    elif isinstance(node, float) and not abs(node) <= _MAX_NUMBER:
        expected = f"a number of at most {_MAX_NUMBER:g}" if math.isfinite(node) else "a finite number"
        raise RequestError(f"{where}: {key}: expected {expected}, found {node}")


def override(tree: dict[str, Any], text: str) -> None:
    """Put the value of ``key=value`` into a recipe's tree, below dotted keys and numbers of list entries.

    Raises:
        RequestError: it is not ``key=value``, or leads nowhere.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RequestError(f"override {text!r}: expected key=value, for example train.epochs=5")
    try:
        value = read_toml(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    except ValueError as error:
        raise RequestError(f"override {key!r}: {error}") from None
    put(tree, key, value, text)


def put(tree: dict[str, Any], key: str, value: Any, text: str = "") -> None:
    """Put a value into a recipe's tree, below a dotted key with numbers of list entries.

    Args:
        tree: is changed.
        key: as ``train.epochs`` or ``teachers.0.weights``.
        value: as read from TOML, or an object that stands for a name.
        text: what was asked for, for messages; "" = the key.

    Raises:
        RequestError: the key leads nowhere.
    """
    text = text or key
    node: Any = tree
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise RequestError(f"override {key[:80]!r}…: expected a key of at most {MAX_DEPTH} parts")
    methods = tree.get("method")
    if parents == ["method"] and isinstance(methods, list) and len(methods) == 1:
        parents.append("0")  # method.name=… means the only [[method]] as it means [method]
    for parent in parents:
        node = _element(node, parent, key) if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, (dict, list)):
            raise RequestError(f"override {text!r}: {parent!r} is a value, not a section")
    if isinstance(node, list):
        _element(node, leaf, key)
        node[int(leaf)] = value
    else:
        node[leaf] = value


def _element(node: list[Any], index: str, key: str) -> Any:
    if not re.fullmatch("[0-9]{1,6}", index) or int(index) >= len(node):
        raise RequestError(f"override {key!r}: expected a number below {len(node)} after the list, found {index!r}")
    return node[int(index)]
