"""Files of a bench of storage: in the page cache or out of it, and with a bit flipped."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def drop(files: Sequence[Path]) -> None:
    """Have the page cache forget files; pages that a process has mapped stay."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(files: Sequence[Path]) -> None:
    """Have all of the files in the page cache."""
    if cached_share(files) > 0.999:
        return
    piece = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass


def cached_share(files: Sequence[Path], most: int = 200) -> float:
    """The share of the files' pages (of ``most`` files) that is in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for file in files[:: max(1, len(files) // most)]:
        size = file.stat().st_size
        if not size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as mapped:
            count = -(-size // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * count)()
            view = np.frombuffer(mapped, np.uint8)
            if libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), found):
                raise OSError(ctypes.get_errno(), "mincore")
            del view
            pages += count
            resident += int((np.frombuffer(found, np.uint8) & 1).sum())
    return resident / max(pages, 1)


def flip(files: Sequence[Path], row: Bytes) -> tuple[Path, int]:
    """Flip one bit of a row's stored bytes, in the middle of the row; where. In compressed files, of any row's."""
    largest = sorted(files, key=lambda file: -file.stat().st_size)
    middle = len(row) // 2
    pattern = row[middle : middle + 64].tobytes()
    place = None
    for file in largest:
        if file.stat().st_size and (at := file.read_bytes().find(pattern)) >= 0:
            place = file, at + 17
            break
    if place is None:
        place = largest[0], largest[0].stat().st_size // 2
    toggle(*place)
    return place


def toggle(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 4]))
