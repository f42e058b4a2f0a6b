"""A folder as the store of a cache: each object a file, each log a file, each lock a file that is locked.

An object is written under a temporary name, synced, renamed, and its folder synced. A log is appended to and synced.
Locks are the kernel's (`flock`): they end with the process that holds them, however it ends. Nothing is written
through a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from feedfast.errors import RequestError
from feedfast.files import (
    MAX_JSON_BYTES,
    Parts,
    fsync_dir,
    make_dirs,
    open_in_place,
    open_regular,
    refuse_links,
    replace_file,
    write_all,
    write_error,
)
from feedfast.storage.store import COMMITS, NEAR, split_lines

_temporary = itertools.count()


class FileObject:
    """See `feedfast.storage.store.Object`."""

    def __init__(self, path: str) -> None:
        """Open it.

        Raises:
            OSError: there is none, it cannot be opened, or it is no ordinary file.
        """
        self._fd = -1
        self._fd = open_regular(path)
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        # at the end of a process the modules may be gone before the objects are
        if self._fd >= 0 and os is not None and contextlib is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)

    def read(self, targets: Sequence[Any], offset: int) -> int:
        """See `feedfast.storage.store.Object.read`."""
        # Announcing ranges to the kernel ahead of time (`posix_fadvise`) was tried on a cold page cache and changed
        # nothing: the threads' own reads keep a local disk busy.
        wanted: int = sum(target.nbytes for target in targets)
        if os.preadv(self._fd, targets, offset) == wanted:
            return wanted
        # a signal, or the kernel's limit of 2 GiB per call: rare, so one buffer at a time is good enough
        total = 0
        for target in targets:
            done = 0
            while done < target.nbytes:
                got = os.preadv(self._fd, [target[done:]], offset + total)
                if got == 0:
                    return total
                done += got
                total += got
        return total

    def refetch(self) -> bool:
        """False: these bytes are what is stored."""
        return False


class FileLock:
    """A lock that is held until it is closed, or this process ends. A context manager."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Give it back."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FileLog(FileLock):
    """A log this process alone may append to, until it is closed."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(fd)
        self._path = path

    def append(self, line: bytes) -> None:
        """See `feedfast.storage.store.Log.append`."""
        end = os.fstat(self._fd).st_size
        try:
            write_all(self._fd, [line])
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)  # else whoever opens the log next cuts it
            raise write_error(error, self._path, len(line)) from error


class Disk:
    """The objects, logs and locks of one cache: files below a folder. See `feedfast.storage.store.Store`."""

    reach = NEAR

    def __init__(self, place: str | Path) -> None:
        self.root = Path(place)
        self._prefix = os.path.join(place, "")  # the hot path opens by string

    def __repr__(self) -> str:
        return f"Disk({str(self.root)!r})"

    @property
    def place(self) -> Path:
        """The folder."""
        return self.root

    def where(self, key: str = "") -> str:
        """What a message calls an object, or the whole store."""
        return str(self.root / key)

    # ---- reading

    def open(self, key: str, *, tail_bytes: int = 0, committed_bytes: int | None = None) -> FileObject:
        """See `feedfast.storage.store.Store.open`."""
        return FileObject(self._prefix + key)

    def read(self, key: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
        """See `feedfast.storage.store.Store.read`."""
        found = self.open(key)
        if found.size > most_bytes:
            raise OSError(errno.EFBIG, f"{found.size} bytes long, expected at most {most_bytes} bytes")
        data = bytearray(found.size)
        return bytes(data[: found.read([memoryview(data)], 0)])

    def lines(self, key: str, start: int = 0) -> Iterator[bytes]:
        """See `feedfast.storage.store.Store.lines`."""
        return split_lines(self.open(key), start)

    def size(self, key: str) -> int:
        """See `feedfast.storage.store.Store.size`."""
        return os.stat(self._prefix + key).st_size

    def sizes(self, folder: str) -> Callable[[str], int]:
        """See `feedfast.storage.store.Store.sizes`: looking up a file costs microseconds."""
        return self.size

    def names(self, folder: str = "") -> list[str]:
        """See `feedfast.storage.store.Store.names`."""
        path = self.root / folder
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            file = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
            raise RequestError(f"{path}: expected a directory or nothing, found a file at {file}") from None
        except OSError as error:
            raise RequestError(f"{path}: cannot be listed: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a character that no file name can hold
            raise RequestError(f"{path}: no path of this system: {error}") from error

    # ---- writing

    def make(self) -> None:
        """See `feedfast.storage.store.Store.make`."""
        refuse_links(self.root, self.root / COMMITS)
        try:
            make_dirs(self.root.absolute() / COMMITS)
        except OSError as error:
            raise RequestError(f"{self.root}: cannot be made: {error.strerror}") from error

    def put(
        self,
        key: str,
        parts: Parts,
        owner: str,
        *,
        taken: Callable[[], None] | None = None,
        written: Callable[[], None] | None = None,
    ) -> None:
        """See `feedfast.storage.store.Store.put`.

        ``taken`` is never called: a part has one writer, and what an earlier one left is written over.
        """
        target = self.root / key
        # All temporary files lie in one folder, so that what a killed writer left is found by listing it.
        temporary = self.root / COMMITS / f".tmp-{owner}-{os.getpid()}-{next(_temporary)}"
        refuse_links(self.root, target.parent)
        refuse_links(self.root, temporary.parent)
        try:
            make_dirs(target.parent)
        except OSError as error:
            raise write_error(error, target, sum(len(part) for part in parts)) from error
        replace_file(target, parts, temporary=temporary, written=written)

    def sweep(self, dead: Callable[[str], bool]) -> None:
        """See `feedfast.storage.store.Store.sweep`."""
        refuse_links(self.root, self.root / COMMITS)
        for name in self.names(COMMITS):
            if name.startswith(".tmp-") and dead(name.removeprefix(".tmp-").rsplit("-", 2)[0]):
                (self.root / COMMITS / name).unlink(missing_ok=True)

    def open_log(self, key: str, sound_bytes: Callable[[Iterable[bytes]], int]) -> FileLog | None:
        """See `feedfast.storage.store.Store.open_log`."""
        file = self.root / key
        new = not file.exists()
        fd = self._in_place(key, os.O_RDWR | os.O_APPEND)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            if not _flock(fd, fcntl.LOCK_EX):
                return None
            if new:
                os.fsync(fd)
                fsync_dir(file.parent)
            sound = sound_bytes(self.lines(key))
            if sound < os.fstat(fd).st_size:
                os.ftruncate(fd, sound)
                os.fsync(fd)
            undo.pop_all()
        return FileLog(fd, file)

    # ---- locks

    # `flock`: the kernel releases it when a writer dies, however it dies. Some network file systems emulate it only
    # between processes of one machine; then nothing guards against two machines that are given the same part.

    def lock(self, key: str, *, patience_s: float = 0.0) -> FileLock | None:
        """See `feedfast.storage.store.Store.lock`."""
        fd = self._in_place(key, os.O_RDWR)
        if _flock(fd, fcntl.LOCK_EX, patience_s=patience_s):
            return FileLock(fd)
        os.close(fd)
        return None

    def join(self, key: str, value: str) -> FileLock | str:
        """See `feedfast.storage.store.Store.join`."""
        fd = self._in_place(key, os.O_RDWR)
        deadline = time.monotonic() + 1.0
        while True:
            if _flock(fd, fcntl.LOCK_EX):
                os.ftruncate(fd, 0)
                os.pwrite(fd, value.encode(), 0)
            # An exclusive lock is released for a moment where it becomes a shared one: what counts is read after that.
            shared = _flock(fd, fcntl.LOCK_SH, patience_s=0.2)
            found = os.pread(fd, 32, 0).decode(errors="replace")
            if shared and found == value:
                return FileLock(fd)
            if time.monotonic() > deadline:
                os.close(fd)
                return found
            fcntl.flock(fd, fcntl.LOCK_UN)
            time.sleep(0.02)

    def number(self) -> int:
        """The folder's inode."""
        return self.root.stat().st_ino

    def writable(self) -> bool:
        """Whether this user may write into the folder."""
        return os.access(self.root, os.W_OK)

    def _in_place(self, key: str, flags: int) -> int:
        file = self.root / key
        refuse_links(self.root, file.parent)
        try:
            return open_in_place(file, flags)
        except OSError as error:
            raise write_error(error, file) from error


def _flock(fd: int, operation: int, *, patience_s: float = 0.0) -> bool:
    """Try to lock an open file, for up to ``patience_s`` seconds; whether it succeeded."""
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
