"""Durable files: nothing is visible before it is whole, and nothing is believed before it is on the disk.

Every object and every `zarr.json` is published the same way: written under a temporary name, fsynced, renamed, and
the directory fsynced; a directory that had to be made is fsynced into its parent first. A reader therefore sees the
old file, the new file or none, also after a power cut.

Temporary files all lie in ``commits/``, under a name that says whose they are, and are moved from there. So what a
killed writer left behind is found by listing one directory, and removed by the next owner of the same name.

Locks are ``flock``: the kernel releases them when a writer dies, however it dies. Some network file systems emulate
them only between processes of one machine; then nothing guards against two machines that are given the same part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from feedfast.cache.log import COMMITS
from feedfast.cache.schema import Manifest
from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, RequestError

ROOT: Final = "zarr.json"
MAX_MANIFEST_BYTES: Final = 64 << 20  # 64 MiB
_IOV_MAX: Final = 1024  # buffers one writev takes on Linux and macOS
_LOCK_PATIENCE_S: Final = 60.0
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_temporary = itertools.count()

Parts = Sequence[bytes | memoryview]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        RequestError: there is no cache at ``path``.
        CacheMismatchError: it is of another format.
        CacheDamageError: its root `zarr.json` cannot be read as one, or is implausibly large.
    """
    file = Path(path) / ROOT
    try:
        size = file.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise CacheDamageError(f"{file}: expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, found {size}")
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{path}: expected a feedfast cache, found no {ROOT} in it") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, FeedfastError):
            raise
        raise CacheDamageError(f"{file}: not readable as JSON: {error}") from error
    attributes = content.get("attributes") if isinstance(content, dict) else None
    try:
        return Manifest.from_attrs(attributes if isinstance(attributes, dict) else {})
    except (CacheDamageError, CacheMismatchError) as error:
        raise type(error)(f"{file}: {error}") from error


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


def publish(root: Path, target: Path, parts: Parts, owner: str) -> None:
    """Write a file whole and durably, in place of any older one. ``owner`` names the temporary file's writer.

    Raises:
        FeedfastError: the disk or quota is full; the temporary file has been removed.
    """
    size = sum(len(part) for part in parts)
    temporary = root / COMMITS / f".tmp-{owner}-{os.getpid()}-{next(_temporary)}"
    try:
        make_dirs(target.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_all(fd, parts)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, target)
        fsync_dir(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise write_error(error, target, size) from error


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


def write_error(error: OSError, target: Path, size: int) -> FeedfastError:
    """The one sentence for a write that failed."""
    if error.errno not in _FULL:
        return FeedfastError(f"{target}: cannot be written: {error.strerror}")
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free
        return FeedfastError(
            f"{target}: no room for {size} bytes ({error.strerror}; {free} bytes free on its file system). "
            "What is committed stays valid: make room and run the same command again"
        )
    return FeedfastError(f"{target}: no room for {size} bytes ({error.strerror})")


def publish_json(root: Path, target: Path, content: dict[str, Any], owner: str) -> bool:
    """Publish a JSON file unless it already holds exactly this; whether it was written."""
    data = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    with contextlib.suppress(OSError):
        if target.stat().st_size == len(data) and target.read_bytes() == data:
            return False
    publish(root, target, [data], owner)
    return True


def remove_stale(root: Path, *, part: tuple[int, int] | None) -> int:
    """Remove temporary files of dead writers; how many there were.

    The caller holds the lock that makes them dead: of ``part`` (then also those of any other division into parts,
    which cannot be at work), or, for None, of the manifest.
    """
    removed = 0
    for file in (root / COMMITS).glob(".tmp-*"):
        words = file.name.split("-")  # .tmp-part-I-of-N-PID-COUNT or .tmp-manifest-PID-COUNT
        if part is None:
            dead = words[1] == "manifest"
        else:
            dead = words[1] == "part" and (words[4] != str(part[1]) or words[2] == str(part[0]))
        if dead:
            file.unlink(missing_ok=True)
            removed += 1
    return removed


def take_lock(fd: int, operation: int, *, patience_s: float = 0.0) -> bool:
    """Try to ``flock`` an open file, for up to ``patience_s`` seconds; whether it succeeded."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


@contextlib.contextmanager
def manifest_lock(root: Path) -> Iterator[None]:
    """Held while the manifest, array metadata or small arrays are changed: moments, so waiting for it is fine.

    Raises:
        FeedfastError: another process held it for a minute.
    """
    file = root / COMMITS / ".lock-manifest"
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not take_lock(fd, fcntl.LOCK_EX, patience_s=_LOCK_PATIENCE_S):
            raise FeedfastError(f"{file}: another process has been changing this cache for {_LOCK_PATIENCE_S:.0f} s")
        yield
    finally:
        os.close(fd)


def lock_split(root: Path, parts: int) -> int:
    """Join the writers that divide a cache into ``parts``; the descriptor that holds the place.

    Parts are told apart by number, so all writers at work must mean the same division. The first of them writes it
    down.

    Raises:
        RequestError: writers of another division are at work.
    """
    fd = os.open(root / COMMITS / ".lock-split", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + 1.0
    while True:
        if take_lock(fd, fcntl.LOCK_EX):
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(parts).encode(), 0)
        # Turning an exclusive lock into a shared one lets go for a moment: what counts is read under the latter.
        shared = take_lock(fd, fcntl.LOCK_SH, patience_s=0.2)
        found = os.pread(fd, 32, 0).decode(errors="replace")
        if shared and found == str(parts):
            return fd
        if time.monotonic() > deadline:
            os.close(fd)
            raise RequestError(
                f"{root}: expected a division into {parts} part(s), found writers at work on one of {found}"
            )
        fcntl.flock(fd, fcntl.LOCK_UN)
        time.sleep(0.02)
