"""Files that survive a crash, and files from strangers: the one place where either kind is opened.

Written: whole under another name, synced, renamed, and their folder synced. A reader sees the old file, the new file or
none, also after a power cut, and on a full disk the old one stays. Nothing is written through a link that lies in a
cache or a run folder. Read: ordinary files alone (a pipe would block, a device has no end), and no more bytes than the
caller says; JSON no deeper than it says. Anyone may import this module, as with `feedfast.errors`: it knows files and
nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c

from feedfast.errors import FeedfastError

_IOV_MAX: Final = 1024  # buffers one writev takes on Linux and macOS
# Of one call: of 32 MiB ext4 takes 2 MiB pages, which costs up to eight times the processor time where free memory is
# in pieces.
_WRITE_BYTES: Final = 1 << 20
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MAX_JSON_BYTES: Final = 16 << 20  # 16 MiB; parsed it takes some 30 times that at worst
_MAX_DEPTH: Final = 64

SEAL: Final = "crc32c"

Parts = Sequence[bytes | memoryview]


def replace_file(
    path: Path, parts: Parts, *, temporary: Path | None = None, written: Callable[[], None] | None = None
) -> None:
    """Write a file whole and durably, in place of any older one.

    Args:
        path: the file; its folder exists.
        parts: its content as buffers of bytes, written one after another.
        temporary: the name it has until it is whole, on the same file system. It must be nobody else's: an existing
            file of that name is an error. By default a hidden name next to ``path``, written over if it exists.
        written: called when the kernel has the content: what is left is waiting for the disk.

    Raises:
        FeedfastError: the disk is full or the file cannot be written; the old one is as it was.
    """
    # A killed process leaves a file of the default name, and its number comes round again: what lies there is removed
    # first. Always a new file (O_EXCL), never one that somebody has put there, nor one a link of that name leads to.
    fresh = temporary is None
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if fresh:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(error, path, sum(len(part) for part in parts)) from error
    try:
        try:
            write_all(fd, parts)
            if written is not None:
                written()
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


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[int]:
    """A file that is written piece by piece, and is there under its name once the block has ended well: its descriptor.

    Raises:
        FeedfastError: the disk is full or the file cannot be written; an older one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with wrap_write_errors(path):
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
            fsync_dir(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """`replace_file` of UTF-8 text."""
    replace_file(path, [text.encode(errors="backslashreplace")])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`replace_file` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers of `replace_file` have left in a folder that now belongs to this process alone."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if re.fullmatch(r"\..+\.\d+\.tmp", name):
                with contextlib.suppress(OSError):
                    os.unlink(folder / name)


def open_in_place(path: Path, flags: int) -> int:
    """Open a file that is written in place (a lock, a log), or make it; the descriptor. Not to be cut by ``flags``.

    Raises:
        FeedfastError: it is a link, another name of somebody's file, or no ordinary file.
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR) or path.is_symlink():
            raise _foreign(path) from error
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise _foreign(path)
    return fd


def refuse_links(root: Path, path: Path) -> None:
    """Raise if ``path`` (below ``root``) is a link, or leads through one; ``root`` itself may.

    Raises:
        FeedfastError: a link lies there, which may be a stranger's.
    """
    at = root
    for part in path.relative_to(root).parts:
        at = at / part
        if at.is_symlink():
            raise _foreign(at)


def _foreign(path: Path) -> FeedfastError:
    found = "a file that has other names, too"
    if path.is_symlink():
        found = f"a link to {os.readlink(path)}"
    elif not path.is_file():
        found = "something else"
    return FeedfastError(
        f"{path}: expected a file or folder of its own, found {found}; nothing is written through it: "
        "put a copy in its place, or remove it"
    )


def open_regular(path: str | Path) -> int:
    """Open an ordinary file for reading; the descriptor.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, pipe, socket or device.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:  # a NUL, or a character that no file name can hold
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return fd


def read_file(path: str | Path, most_bytes: int) -> bytes:
    """The whole of an ordinary file.

    Raises:
        OSError: as `open_regular`, or it holds more than ``most_bytes``.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes long, expected at most {most_bytes} bytes", str(path))
        return file.read(size)  # no more than it had: what grows meanwhile has no end


def parse_json(data: bytes | str) -> Any:
    """JSON from anybody's file.

    Raises:
        ValueError: not JSON, not finite, nested deeper than 64, or a number of thousands of digits.
    """
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if deeper_than(found, _MAX_DEPTH):
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    return found


def read_json(path: Path) -> Any:
    """`parse_json` of an ordinary file of at most `MAX_JSON_BYTES`.

    Raises:
        OSError: as `read_file`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_file(path, MAX_JSON_BYTES))


def deeper_than(tree: Any, depth: int) -> bool:
    """Whether lists and mappings lie more than ``depth`` in one another."""
    level = [tree]
    for _ in range(depth + 1):
        level = [
            item
            for node in level
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> float:
    raise ValueError(f"expected finite numbers, found {name}")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` of an object with a last key, ``crc32c``, over all the others: for what a later run believes."""
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON object, or the checksum is missing or wrong; the text says which.
    """
    found: object = read_json(path)
    content = found if isinstance(found, dict) else {}
    seal = content.pop(SEAL, None)
    if seal != _seal(content):
        raise ValueError(f"expected the checksum {SEAL} of its content, found {seal!r}: it is damaged or was edited")
    return content


def _seal(value: Mapping[str, Any]) -> str:
    # Over the parsed values and not the bytes: who only reformats a file has changed nothing.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode(errors='backslashreplace')):08x}"


def check_zip(file: Path | io.BytesIO) -> None:
    """Raise unless every member of a zip file, as ``torch.save`` writes it, has its CRC-32 and is stored as it is.

    torch does not look: a flipped bit in a weight goes unnoticed, and a compressed member unpacks to whatever it likes.
    What is no zip file at all is let through; whoever reads it will tell.

    Raises:
        OSError: it cannot be read, or is no ordinary file.
        ValueError: a member is damaged or compressed, or the file is damaged.
    """
    with open(open_regular(file), "rb") if isinstance(file, Path) else file as opened:
        if not zipfile.is_zipfile(opened):
            return
        size = opened.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(opened) as archive:
                members = archive.infolist()
                # a scripted network's code is packed, too: whoever reads the file names it
                tensors = [entry for entry in members if "/code/" not in entry.filename]
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in tensors)
                total = sum(entry.file_size for entry in tensors)
                # torch takes a member with MS-DOS's bit for a folder, and gives the memory it meant to fill.
                wrong = next((entry.filename for entry in members if entry.external_attr & 0x10), None)
                wrong = wrong or (None if packed or total > size else archive.testzip())
        except OSError:
            raise
        except Exception as error:  # a damaged directory: half a dozen types
            raise ValueError(f"a damaged zip file ({error})") from error
    if wrong is not None:
        raise ValueError(f"{wrong!r} in it is damaged: its CRC-32 is another, or it is marked as a folder")
    if packed or total > size:
        raise ValueError(f"it unpacks to {total} bytes from {size}, expected tensors as torch.save stores them")


def write_all(fd: int, parts: Parts) -> None:
    """Write buffers one after another, however many calls that takes."""
    waiting = [memoryview(part) for part in parts if len(part)]
    at = 0
    while at < len(waiting):
        first = waiting[at][:_WRITE_BYTES]
        room, few = _WRITE_BYTES - len(first), [first]
        for part in waiting[at + 1 : at + _IOV_MAX]:
            if len(part) > room:
                break
            few.append(part)
            room -= len(part)
        done = os.writev(fd, few)
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


def standing_folder(path: Path) -> Path:
    """The path itself where it is a folder, or the nearest one above it that exists; absolute."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


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
        free = shutil.disk_usage(standing_folder(path)).free
    except OSError:
        return FeedfastError(f"{path}: no room for {wanted} ({error.strerror})")
    return FeedfastError(
        f"{path}: no room for {wanted} ({error.strerror}; {free} bytes free on its file system). "
        "What is committed stays valid: make room and run the same command again"
    )
