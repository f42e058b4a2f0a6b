"""Arrays of an ``.npz``, read with suspicion: it is a zip of arrays that each say how large they are.

NumPy believes a header and takes the memory it asks for. Here the header, the length in the zip's directory and the
bytes that are really there must agree before memory is taken, objects are never unpickled, and the checksum that every
member carries is compared.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from feedfast.errors import RequestError
from feedfast.files import open_regular

_PACKINGS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy.savez and savez_compressed write
_DEFLATE_RATIO: Final = 1032  # the most that deflate packs into one byte


def read_npz(path: Path, names: Iterable[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Some arrays of a file by name, those that are there, and the names of all.

    Raises:
        RequestError: not a readable npz of plain arrays.
    """
    try:
        with open(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {name: _array(archive, members[name]) for name in names if name in members}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen types for what is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{path}: expected an .npz of plain arrays; {reason[:300]}") from error
    return found, list(members)


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    if info.compress_type not in _PACKINGS or info.file_size > (info.compress_size + 64) * _DEFLATE_RATIO:
        raise ValueError(f"{info.filename}: {info.file_size} bytes cannot come from {info.compress_size}")
    with archive.open(info) as member:
        version = npy.read_magic(member)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read_header(member)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != info.file_size - member.tell():
            raise ValueError(f"{info.filename}: {dtype} {list(shape)} is not {info.file_size - member.tell()} bytes")
        data = member.read(size + 1)  # one more: at its end a member's checksum is compared
    array: NDArray[Any] = np.frombuffer(bytearray(data), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
