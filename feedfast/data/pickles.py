"""Plain data out of a pickle without running it: what CIFAR's Python files hold, and nothing else.

`pickle.load` calls whatever a file names. Here `pickletools` only *reads* the instructions, and a small machine carries
out those that build dicts, lists, tuples, numbers, text, bytes and NumPy arrays of plain numbers. The callables that
pickled arrays name (`numpy ... _reconstruct`, `_frombuffer`, `dtype`, `_codecs.encode`) are recognized by name and
never called; any other name, and any other instruction, is refused. Nothing is imported, no method of a foreign object
runs, and nothing grows beyond the file: every value is a part of it, and the instructions are counted.

Text of Python 2 (`str`) is bytes; array content arrives as such, as bytes, or encoded in text (Python 3, protocol 2).
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PickleError", "read_pickle"]

MAX_STEPS = 1 << 22
"""Instructions of one pickle; CIFAR-100's training file has half a million."""

_MARK = object()
_ARRAY_NAMES = frozenset(
    {
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "_frombuffer")),
        *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    }
)
_DTYPE = re.compile(r"[<>|=]?[biuf][1248]")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_BYTES_OF_PYTHON_2 = frozenset({"STRING", "SHORT_BINSTRING", "BINSTRING"})
_VALUES = _BYTES_OF_PYTHON_2 | {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip


class PickleError(Exception):
    """Why a pickle is not plain data; the text is shown to the user after the path."""


@dataclass
class _Named:
    """A global that was named and is not looked up."""

    name: str


@dataclass
class _Type:
    """A NumPy dtype: its letter and width, then its byte order."""

    kind: str
    order: str = ""

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.kind.lstrip("<>|="))


@dataclass
class _Array:
    """An array whose content comes later, and then in ``found``."""

    found: np.ndarray | None = None


def read_pickle(content: bytes) -> Any:
    """The value of a pickle of plain data.

    Args:
        content: the whole file, protocol 0 to 5.

    Returns:
        dict, list, tuple, int, float, bool, None, str, bytes or arrays of them; NumPy arrays are read-only.

    Raises:
        PickleError: it is damaged, names anything but NumPy's arrays, or does what plain data do not need.
    """
    try:
        return _plain(_Machine().run(content))
    except PickleError:
        raise
    except (
        Exception
    ) as error:  # pickletools, and values of the wrong kind in the right places: ValueError, KeyError, ...
        raise PickleError(f"a damaged pickle: {error or type(error).__name__}") from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            name = opcode.name
            if count > MAX_STEPS:
                raise PickleError(f"more than {MAX_STEPS} instructions")
            if name == "STOP":
                return self.stack.pop()
            self.step(name, argument)
        raise PickleError("a pickle without an end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            text_is_bytes = name in _BYTES_OF_PYTHON_2 and isinstance(argument, str)
            stack.append(argument.encode("latin-1") if text_is_bytes else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("DICT", "LIST", "TUPLE"):
            items = self.marked()
            stack.append(_pairs(items) if name == "DICT" else items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.marked()
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.marked()
            _of(stack[-1], dict).update(_pairs(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                argument = f"{module} {attribute}"
            if argument not in _ARRAY_NAMES:
                raise PickleError(
                    f"it names {str(argument)[:80]!r}; plain data and NumPy arrays are read, nothing is run"
                )
            stack.append(_Named(argument))
        elif name == "REDUCE":
            arguments, called = _of(stack.pop(), tuple), _of(stack.pop(), _Named)
            stack.append(_reduced(called.name, arguments))
        elif name == "BUILD":
            state = _of(stack.pop(), tuple)
            _build(stack[-1], state)
        else:
            raise PickleError(f"it uses the instruction {name}; plain data and NumPy arrays are read, nothing is run")

    def marked(self) -> list[Any]:
        """Everything above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError("a damaged pickle: no mark where one was expected")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items


def _reduced(name: str, arguments: tuple[Any, ...]) -> Any:
    """What one of the known callables stands for."""
    kind = name.rpartition(" ")[2]
    if kind == "encode":
        text, encoding = arguments
        if _text(encoding) not in ("latin1", "latin-1"):
            raise PickleError(f"bytes in the encoding {str(encoding)[:40]!r}")
        return _of(text, str).encode("latin-1")
    if kind == "dtype":
        letter = _text(arguments[0])
        if not _DTYPE.fullmatch(letter):
            raise PickleError(f"an array of {letter[:40]!r}; numbers are read")
        return _Type(letter)
    if kind == "_reconstruct":
        return _Array()
    if kind == "_frombuffer":
        content, dtype, shape, order = arguments
        return _Array(_array(content, dtype, shape, _text(order) == "F"))
    raise PickleError(f"it calls {name}")


def _build(value: Any, state: tuple[Any, ...]) -> None:
    if isinstance(value, _Type):
        order = _text(state[1])
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise PickleError("an array of records; plain numbers are read")
        value.order = order
    elif isinstance(value, _Array):
        _, shape, dtype, fortran, content = state
        value.found = _array(content, dtype, shape, bool(fortran))
    else:
        raise PickleError("it sets the state of an object")


def _array(content: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    kind = _of(dtype, _Type).numpy()
    sizes = tuple(_of(size, int) for size in _of(shape, tuple))
    found = len(_of(content, (bytes, bytearray)))
    if any(size < 0 for size in sizes) or math.prod(sizes) * kind.itemsize != found:
        raise PickleError(f"an array of shape {list(sizes)[:8]} in {found} bytes")
    array = np.frombuffer(content, kind).reshape(sizes, order="F" if fortran else "C")
    array.flags.writeable = False
    return array


def _plain(value: Any) -> Any:
    """The value, with arrays in place of their holders in its first two levels, which is where CIFAR has them."""
    if isinstance(value, dict):
        return {key: _finished(item) for key, item in value.items()}
    return _finished(value)


def _finished(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.found is None:
            raise PickleError("an array without content")
        return value.found
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    # keys of these kinds only: to hash a tuple of tuples of tuples ... is a recursion without a limit
    keys = [_of(key, (str, bytes, int)) for key in items[::2]]
    return dict(zip(keys, items[1::2], strict=True))


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else _of(value, str)


def _of(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleError(
            f"a damaged pickle: {type(value).__name__} where {getattr(kind, '__name__', kind)} was expected"
        )
    return value
