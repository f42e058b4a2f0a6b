"""Encoded images packed in large files: read where they lie, one read per image, nothing extracted.

Whatever packs them (WebDataset's tar shards, Arrow files as Hugging Face's datasets keep them, Parquet), an index says
in which file, at which byte and how long each image is (``index.py``, made by ``indexing.py``), and from there on it is
the same: the bytes are those a file of its own would have, so ids, fingerprint, decoding and errors are those of
folders. DALI's own reader of tars is not used: it goes through them in its own order, while here each sample's place,
box and flip come from a plan.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from feedfast.data.images import Unreadable
from feedfast.data.index import Index
from feedfast.files import open_regular

__all__ = ["Packed"]

_OPEN_FILES: Final = 128
_BUFFER_BYTES: Final = 4096


class _File:
    """A file open for reading; it closes when nothing refers to it any more."""

    def __init__(self, path: str, size: int) -> None:
        self.fd = -1
        try:
            self.fd = open_regular(path)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        found = os.fstat(self.fd).st_size
        if found != size:
            raise Unreadable(f"its file has {found} bytes, {size} when it was opened")

    def __del__(self) -> None:
        if self.fd >= 0 and os is not None:
            os.close(self.fd)


@lru_cache(
    _OPEN_FILES
)  # of the whole process: a data set can be pickled, and a thread may hold what has left the cache
def _opened(path: str, size: int, _stamp: int) -> _File:
    return _File(path, size)


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: _File, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)[: max(0, self._length - self._at)]
        done = os.preadv(self._file.fd, [target], self._offset + self._at) if target else 0
        self._at += done
        return done


@dataclass(frozen=True, eq=False)
class Packed:
    """Images by record number.

    Attributes:
        folder: what the paths in the index are relative to.
        index: where each image lies.
    """

    folder: Path
    index: Index

    def __len__(self) -> int:
        return len(self.index)

    def name(self, record: int) -> str:
        """``shard.tar/key.jpg`` or ``file.arrow[row]``, relative to the data's folder."""
        arrays = self.index.arrays
        source = self._source(record)
        name = self.index.sources[source][0]
        if not len(arrays["name_end"]):
            return f"{name}[{record - int(arrays['first'][source])}]"
        start = int(arrays["name_end"][record - 1]) if record else 0
        text = bytes(arrays["name_text"][start : int(arrays["name_end"][record])])
        return f"{name}/{text.decode(errors='backslashreplace')}"

    def where(self, record: int) -> str:
        """`name` with the folder, for messages."""
        return str(self.folder / self.name(record))

    def read(self, record: int) -> bytes:
        """The content of an image.

        Raises:
            Unreadable: its file has gone, has another length than when it was indexed, or cannot be read.
        """
        file, offset, length = self._place(record)
        try:
            data = os.pread(file.fd, length, offset)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        if len(data) != length:
            raise Unreadable(f"cut short: {len(data)} of {length} bytes")
        return data

    def open(self, record: int) -> BinaryIO:
        """An image as a file; raises as `read`."""
        return cast("BinaryIO", io.BufferedReader(_Window(*self._place(record)), _BUFFER_BYTES))

    def _source(self, record: int) -> int:
        return int(np.searchsorted(self.index.arrays["first"], record, side="right")) - 1

    def _place(self, record: int) -> tuple[_File, int, int]:
        arrays, files = self.index.arrays, self.index.files
        name, size, stamp = files[0] if len(files) == 1 else files[self._source(record)]
        file = _opened(os.path.join(self.folder, name), size, stamp)
        return file, int(arrays["offset"][record]), int(arrays["length"][record])
