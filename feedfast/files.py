"""Files that survive a crash: written whole under another name, synced, renamed, and their folder synced.

A reader therefore sees the old file, the new file or none, also after a power cut, and on a full disk the old one
stays. Everything feedfast replaces is replaced here: objects and metadata of a cache, checkpoints, results, reports.
Anyone may import this module, as with `feedfast.errors`: it knows files and nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c

from feedfast.errors import FeedfastError

_IOV_MAX: Final = 1024  # buffers one writev takes on Linux and macOS
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SEAL: Final = "crc32c"

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


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` of an object with a last key, ``crc32c``, over all the others: for what a later run believes."""
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON object, or the checksum is missing or wrong; the text says which.
    """
    found: object = json.loads(path.read_bytes())
    content = found if isinstance(found, dict) else {}
    seal = content.pop(SEAL, None)
    if seal != _seal(content):
        raise ValueError(f"expected the checksum {SEAL} of its content, found {seal!r}: it is damaged or was edited")
    return content


def _seal(value: Mapping[str, Any]) -> str:
    # Over the parsed values and not the bytes: who only reformats a file has changed nothing.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"


def check_zip(file: Path | io.BytesIO) -> None:
    """Raise unless every member of a zip file, as ``torch.save`` and ``np.savez`` write them, has its CRC-32.

    torch does not look: a flipped bit in a weight goes unnoticed. What is no zip file at all is let through; whoever
    reads it will tell.

    Raises:
        OSError: it cannot be read.
        ValueError: a member is damaged, or the file is.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            # torch takes a member with MS-DOS's bit for a folder, and gives the memory it meant to fill.
            wrong = next((entry.filename for entry in archive.infolist() if entry.external_attr & 0x10), None)
            wrong = wrong or archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged directory: half a dozen types
        raise ValueError(f"a damaged zip file ({error})") from error
    if wrong is not None:
        raise ValueError(f"{wrong!r} in it is damaged: its CRC-32 is another, or it is marked as a folder")


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
