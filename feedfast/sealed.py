"""Named arrays in one piece of bytes that says when it is damaged: what an index is stored in.

A line ``NAME VERSION LENGTH CRC32C``, JSON of that length and checksum, then the arrays, each at a multiple of 64 bytes
and with a crc32c of its own. Arrays that are read are views of the bytes: of a file that is mapped, they are shared by
all processes and cost no memory of their own. Anyone may import this module, as with `feedfast.files`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from feedfast.files import parse_json

__all__ = ["pack", "unpack"]

_ALIGNED: Final = 64
_MAX_HEAD_BYTES: Final = 64 << 20  # 64 MiB; names of 100,000 files are 10
_DTYPES: Final = {"|u1", "<u4", "<u8", "<i4", "<i8"}

Arrays = Mapping[str, NDArray[Any]]


def pack(name: str, version: int, head: Mapping[str, Any], arrays: Arrays) -> list[bytes | memoryview]:
    """The bytes of some arrays, in pieces to be written one after the other; nothing is copied.

    Args:
        name: what this is; one word.
        version: of what head and arrays mean.
        head: JSON values.
        arrays: contiguous ones of little-endian integers.
    """
    at = 0
    said: dict[str, list[Any]] = {}
    for key, array in arrays.items():
        at += -at % _ALIGNED
        said[key] = [array.dtype.str, list(array.shape), at, _sum(array)]
        at += array.nbytes
    body = json.dumps({"head": dict(head), "arrays": said}).encode(errors="backslashreplace")
    first = f"{name} {version} {len(body)} {google_crc32c.value(body):08x}\n".encode()
    parts: list[bytes | memoryview] = [first, body, bytes(-(len(first) + len(body)) % _ALIGNED)]
    done = 0
    for key, array in arrays.items():
        start = said[key][2]
        parts += [bytes(start - done), _bytes(array)]
        done = start + array.nbytes
    return parts


def unpack(name: str, version: int, data: NDArray[np.uint8]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Head and arrays.

    Args:
        name: as it was packed.
        version: likewise.
        data: the bytes, [n].

    Raises:
        ValueError: something else, another version, or damaged.
    """
    first = bytes(data[:128]).partition(b"\n")[0]
    words = first.split(b" ")
    if len(words) != 4 or words[:2] != [name.encode(), str(version).encode()] or not words[2].isdigit():
        raise ValueError(f"not of the form {name} {version}")
    start = len(first) + 1
    body = bytes(data[start : start + min(int(words[2]), _MAX_HEAD_BYTES)])
    if f"{google_crc32c.value(body):08x}".encode() != words[3]:
        raise ValueError("damaged: its head has another checksum")
    tree = parse_json(body)
    start += len(body)
    start += -start % _ALIGNED
    arrays: dict[str, NDArray[Any]] = {}
    try:
        for key, (kind, shape, at, expected) in tree["arrays"].items():
            if kind not in _DTYPES or min([at, *shape], default=0) < 0:
                raise ValueError(f"no plain array {key!r}")
            dtype = np.dtype(kind)
            size = math.prod(shape) * dtype.itemsize
            piece = data[start + at : start + at + size]
            if len(piece) != size or _sum(piece) != expected:
                raise ValueError(f"damaged: {key!r} has another checksum")
            arrays[key] = piece.view(dtype).reshape(shape)
        return tree["head"], arrays
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no list of arrays in its head ({error})") from error


def _bytes(array: NDArray[Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat) if array.size else memoryview(b"")


def _sum(array: NDArray[Any]) -> int:
    found: int = (
        google_crc32c.extend(0, array.reshape(-1).view(np.uint8)) if array.size else 0
    )  # value() takes no arrays
    return found
