"""Files that survive a crash: written whole under another name, synced, renamed, and their folder synced.

A reader therefore sees the old file, the new file or none, also after a power cut, and on a full disk the old one
stays. Everything feedfast replaces is replaced here: objects and metadata of a cache, checkpoints, results, reports.
Anyone may import this module, as with `feedfast.errors`: it knows files and nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from feedfast.errors import FeedfastError

_IOV_MAX: Final = 1024  # buffers one writev takes on Linux and macOS
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Parts = Sequence[bytes | memoryview]


def replace_file(path: Path, parts: Parts, *, temporary: Path | None = None) -> None:
    """Write a file whole and durably, in place of any older one.

    Args:
        path: the file; its folder exists.
        parts: its content as buffers of bytes, written one after another.
        temporary: the name it has until it is whole, on the same file system. It must be nobody else's: an existing
            file of that name is an error. By default a hidden name next to ``path``, written over if it exists.

    Raises:
        FeedfastError: the disk is full or the file cannot be written; the old one is as it was.
    """
    # The default name must be free to be written over: a killed process leaves it, and its number comes round again.
    flags = os.O_TRUNC if temporary is None else os.O_EXCL
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    except OSError as error:
        raise write_error(error, path, sum(len(part) for part in parts)) from error
    try:
        try:
            write_all(fd, parts)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        fsync_dir(path.parent)
    except BaseException as error:  # an interrupt, too, leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise write_error(error, path, sum(len(part) for part in parts)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """`replace_file` of UTF-8 text."""
    replace_file(path, [text.encode()])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`replace_file` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_all(fd: int, parts: Parts) -> None:
    """Write buffers one after another, however many calls that takes."""
    waiting = [memoryview(part) for part in parts if len(part)]
    at = 0
    while at < len(waiting):
        done = os.writev(fd, waiting[at : at + _IOV_MAX])
        while done:
            taken = min(done, len(waiting[at]))
            waiting[at] = waiting[at][taken:]
            done -= taken
            at += not len(waiting[at])


def fsync_dir(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Make a directory and its missing parents, each durably in its own parent. Safe against others doing the same."""
    if path.is_dir():
        return
    make_dirs(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    fsync_dir(path.parent)


@contextlib.contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Raise an `OSError` of the block as the `FeedfastError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path, size_bytes: int | None = None) -> FeedfastError:
    """The one sentence for a write that failed; ``size_bytes`` is what was to be written."""
    if error.errno not in _FULL:
        return FeedfastError(f"{path}: cannot be written: {error.strerror or error}")
    wanted = "more" if size_bytes is None else f"{size_bytes} bytes"
    try:
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free
    except OSError:
        return FeedfastError(f"{path}: no room for {wanted} ({error.strerror})")
    return FeedfastError(
        f"{path}: no room for {wanted} ({error.strerror}; {free} bytes free on its file system). "
        "What is committed stays valid: make room and run the same command again"
    )
