"""A bounded folder on a local disk, in which objects of a bucket are kept as they are read.

An object is copied whole when it is opened first, and read from there as long as there is room for it; what was used
longest ago goes first. Several processes may share the folder: room is found under a lock, a copy has its name only
when it is whole, and whoever finds that another process is copying an object reads it from the bucket meanwhile.

Nothing here is believed: a reader checks every block against the commit log, wherever it comes from, and asks for a
second look where one is wrong (`feedfast.storage.store.Object.refetch`); the copy is then dropped. A disk that is full
or broken costs the speed-up only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from feedfast.errors import RequestError
from feedfast.files import open_in_place
from feedfast.storage.disk import FileObject
from feedfast.storage.store import Object

log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 8 << 20  # 8 MiB: what is copied by one request
_COPYING: Final = ".part"
_NAME: Final = 40  # hex digits
_GATES: Final = 64


class Tier:
    """The folder. Safe to use from several threads and processes; pickles."""

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        """Make the folder.

        Args:
            folder: which may hold copies already, of any bucket.
            most_bytes: what the copies in it may take together.

        Raises:
            RequestError: it cannot be made, or not be written to.
        """
        self.folder, self.most_bytes = Path(folder), most_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cache.local: {folder}: cannot be made: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise RequestError(f"cache.local: expected a folder to write in, {folder} is read-only")
        # one thread copies an object, others that want the same wait for it
        self._gates = [threading.Lock() for _ in range(_GATES)]
        self._first_failure = threading.Lock()  # taken by the thread that says so, and never given back

    def __reduce__(self) -> tuple[type[Tier], tuple[Path, int]]:
        return Tier, (self.folder, self.most_bytes)

    def open(self, url: str, size: int, far: Callable[[], Object]) -> Object:
        """An object, from here if it is or can be.

        Args:
            url: of the object.
            size: its bytes, as committed.
            far: opens the object in the bucket; raises what that raises.
        """
        name = hashlib.sha256(f"{url} {size}".encode()).hexdigest()[:_NAME]
        path = self.folder / name
        with self._gates[int(name[:8], 16) % _GATES]:
            with contextlib.suppress(OSError):
                return NearObject(self._opened(path, size), path, far)
            if size > self.most_bytes:
                return far()
            found = far()
            if found.size != size:
                return found  # whoever opens it will say what is wrong
            try:
                if self._copied(found, path):
                    return NearObject(self._opened(path, size), path, far)
            except OSError as error:
                if self._first_failure.acquire(blocking=False):
                    log.warning("cache.local: %s: nothing is kept: %s", self.folder, error.strerror or error)
        return found

    def _opened(self, path: Path, size: int) -> FileObject:
        file = FileObject(str(path))
        if file.size != size:
            path.unlink(missing_ok=True)
            raise OSError("of another length")
        os.utime(path)  # when it was used: file systems do not keep the time of reading
        return file

    def _copied(self, found: Object, path: Path) -> bool:
        """Copy an object; False where there is no room, or another process is at it."""
        fd = self._reserved(path, found.size)
        if fd is None:
            return False
        part = path.with_name(path.name + _COPYING)
        try:
            piece = bytearray(min(_PIECE_BYTES, found.size))
            for offset in range(0, found.size, _PIECE_BYTES):
                want = memoryview(piece)[: min(_PIECE_BYTES, found.size - offset)]
                if found.read([want], offset) < len(want) or os.pwrite(fd, want, offset) < len(want):
                    raise OSError("the copy was cut short")  # noqa: TRY301
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        finally:
            os.close(fd)
        return True

    def _reserved(self, path: Path, size: int) -> int | None:
        """A locked file of this size for the copy; None where there is no room, or another process has it."""
        part = path.with_name(path.name + _COPYING)
        with self._room():
            known = self._entries()
            if path.name in known:
                return None  # another process was faster
            if part.name in known:
                if _is_locked(part):
                    return None
                part.unlink(missing_ok=True)  # whoever made it is gone
                known.pop(part.name)
            taken = sum(held for held, _ in known.values())
            for name, (held, _) in sorted(known.items(), key=lambda item: item[1][1]):
                if taken + size <= self.most_bytes:
                    break
                if name.endswith(_COPYING) and _is_locked(self.folder / name):
                    continue
                (self.folder / name).unlink(missing_ok=True)
                taken -= held
            if taken + size > self.most_bytes:
                return None
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.truncate(fd, size)  # counts for whoever looks for room next
            except BaseException:
                os.close(fd)
                part.unlink(missing_ok=True)
                raise
            return fd

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        fd = open_in_place(self.folder / ".lock", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _entries(self) -> dict[str, tuple[int, int]]:
        """Name → bytes and when it was used, of all copies and copies in the making; nothing else is ever touched."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(_COPYING)
                if len(stem) == _NAME and not set(stem) - set("0123456789abcdef"):
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name] = (status.st_size, status.st_mtime_ns)
        return found


class NearObject:
    """See `feedfast.storage.store.Object`: a copy, or the object itself once the copy was found to be wrong."""

    def __init__(self, file: FileObject, path: Path, far: Callable[[], Object]) -> None:
        self._found: Object = file
        self._path = path
        self._far: Callable[[], Object] | None = far  # None once the copy is dropped
        self._dropping = threading.Lock()  # several threads may find at once that the copy cannot be read

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._found.size

    def read(self, targets: Sequence[Any], offset: int) -> int:
        """See `feedfast.storage.store.Object.read`."""
        found = self._found
        try:
            return found.read(targets, offset)
        except OSError:
            if not self._dropped(found):
                raise
            return self._found.read(targets, offset)

    def refetch(self) -> bool:
        """See `feedfast.storage.store.Object.refetch`: first the copy is dropped, then it is the bucket's turn."""
        found = self._found
        return self._dropped(found) or found.refetch()

    def _dropped(self, found: Object) -> bool:
        """Whether ``found`` was the copy; by then it is dropped, by this thread or another, and the bucket read."""
        with self._dropping:
            if self._far is not None:
                log.warning("cache.local: %s: a damaged copy is dropped, the object read from the bucket", self._path)
                with contextlib.suppress(OSError):
                    self._path.unlink()
                self._found, self._far = self._far(), None
                return True
            return found is not self._found


def _is_locked(path: Path) -> bool:
    """Whether another process holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
