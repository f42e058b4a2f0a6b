"""What a cache is kept in: the verbs its other modules rely on, and the promises behind them.

A `Store` holds *objects* by key (``targets/a/final/codes/c/0/1/0/0/0``), append-only *logs* of lines, and *locks*.
An object is visible whole or not at all, and durable when `Store.put` returns. A line is durable when `Log.append`
returns; a crash tears the last line at most. A lock, and the right to append to a log, have one owner at a time and
end with it, however it ends. Reads take buffers to fill, so that blocks go straight to where they are wanted.

There are two: a folder (`feedfast.storage.disk`) and a bucket (`feedfast.storage.bucket`); `feedfast.storage.places`
opens either. Nothing else in `feedfast.storage` touches a file or sends a request.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, runtime_checkable

from feedfast.errors import FeedfastError
from feedfast.files import MAX_JSON_BYTES, Parts

COMMITS: Final = "commits"  # the folder of logs and locks
MADE: Final = ".made"  # in it: the mark of a place that was made, in a store that has no folders
MAX_LINE_BYTES: Final = 1 << 20  # 1 MiB; a line of a log is about 300 bytes
_PIECE_BYTES: Final = 1 << 20
# What says nothing about the bytes on the disk: the same call may succeed later, or for somebody else.
_NOT_DAMAGE: Final = {
    errno.EACCES: "permission to read it is needed",
    errno.EPERM: "permission to read it is needed",
    errno.EMFILE: "ulimit -n allows this process more open files",
    errno.ENFILE: "this machine has too many open files",
    errno.ENOMEM: "run again when memory is free",
    errno.EINTR: "run again",
    errno.ESTALE: "mount its file system again",
    errno.ETIMEDOUT: "its file system does not answer; run again",
    errno.ENAMETOOLONG: "give a shorter path",
}

Place = Path | str
"""Where a cache is: a folder, or the URL of a bucket with a prefix (``s3://bucket/runs/c100.zarr``)."""


@dataclass(frozen=True)
class Reach:
    """How far a reader reaches ahead in a store: what takes longer to come is asked for earlier and in larger pieces.

    Attributes:
        job_bytes: smaller neighboring blocks are read by one job.
        segment_bytes: what is planned at once, at least.
        segment_batches: likewise, in batches; the lesser of the two counts.
        threads: so many threads may come to read for one stream, where the consumer has to wait for those it has.
    """

    job_bytes: int = 1 << 20  # 1 MiB, for fewer GIL hand-overs
    segment_bytes: int = 4 << 20  # 4 MiB; planning a segment costs the consumer some 50 microseconds
    segment_batches: int = 16
    threads: int = 0


NEAR: Final = Reach()


class Object(Protocol):
    """An object open for reading; it closes when nothing refers to it any more. Safe to read from several threads."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def read(self, targets: Sequence[Any], offset: int) -> int:
        """Fill buffers, one after another, with the bytes from ``offset`` on.

        Args:
            targets: writable buffers of bytes that have ``nbytes``, such as uint8 arrays.
            offset: of the first byte.

        Returns:
            Bytes read; fewer than the buffers hold only where the object ends.

        Raises:
            OSError: it cannot be read.
            FeedfastError: the store does not answer.
        """

    def refetch(self) -> bool:
        """For a reader that found damage: whether a second look can help, because the bytes came from elsewhere.

        What was copied nearby is then dropped, and the object opened again.
        """


@runtime_checkable
class Lock(Protocol):
    """A lock that is held until it is closed, or this process ends. A context manager."""

    def close(self) -> None:
        """Give it back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Log(Lock, Protocol):
    """A log this process alone may append to, until it is closed."""

    def append(self, line: bytes) -> None:
        """Add a line, newline included. Durable on return. Not for two threads at once.

        Raises:
            FeedfastError: it cannot be written; it is not in the log.
        """


class Store(Protocol):
    """The objects, logs and locks of one cache. The place need not exist before `make`.

    Keys are relative paths with ``/``, made by this program: a key read from a file must be checked first. What is
    asked for wrongly (no such bucket, no permission to look) is a `RequestError`, whatever the verb.
    """

    @property
    def place(self) -> Place:
        """Where it is: `feedfast.storage.places.open_store` of it opens the same store in another process."""

    @property
    def reach(self) -> Reach:
        """How far readers reach ahead."""

    def where(self, key: str = "") -> str:
        """What a message calls an object, or the whole store."""

    # ---- reading

    def open(self, key: str, *, tail_bytes: int = 0, committed_bytes: int | None = None) -> Object:
        """Open an object.

        Args:
            key: its key.
            tail_bytes: so many of its last bytes will be read first.
            committed_bytes: its length as it was committed. Such an object does not change: a copy of it may be kept.

        Raises:
            OSError: there is none, or it cannot be opened.
        """

    def read(self, key: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
        """The whole of an object.

        Raises:
            OSError: there is none, it cannot be read, or it is longer than ``most_bytes``.
        """

    def lines(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The lines of a log from a byte on, one after another, newline included; the last may lack it.

        A line of more than `MAX_LINE_BYTES` is cut after one byte more, and ends the iteration: whatever the log's
        length, a few MiB are held.

        Raises:
            OSError: there is none, or it cannot be read.
        """

    def size(self, key: str) -> int:
        """Bytes of an object, without opening it.

        Raises:
            OSError: there is none.
        """

    def sizes(self, folder: str) -> Callable[[str], int]:
        """`size` for keys below a folder of which many will be asked for, as of now."""

    def names(self, folder: str = "") -> list[str]:
        """Names directly in a folder, of objects and of folders, sorted; none if there is no such folder.

        Raises:
            RequestError: the place is no folder, or cannot be looked into.
        """

    # ---- writing

    def make(self) -> None:
        """Make the place itself, so that objects can be put there.

        Raises:
            RequestError: it cannot be made.
        """

    def put(
        self,
        key: str,
        parts: Parts,
        owner: str,
        *,
        taken: Callable[[], None] | None = None,
        written: Callable[[], None] | None = None,
    ) -> None:
        """Write an object whole and durably.

        Args:
            key: its key.
            parts: its content as buffers of bytes, written one after another.
            owner: who writes it, for `sweep`.
            taken: nobody knows of an older one. If there is one all the same, with other bytes, in a store that more
                than one process could be putting it into, this is called: it raises, or the object is replaced.
                Without it any older one is.
            written: called when nothing is left but to wait until it is durable: the buffers may be used again.

        Raises:
            FeedfastError: the disk or quota is full, or it cannot be written; any older object is as it was.
        """

    def sweep(self, dead: Callable[[str], bool]) -> None:
        """Remove what unfinished `put` calls left behind, of all owners of whom ``dead`` is true."""

    def open_log(self, key: str, sound_bytes: Callable[[Iterable[bytes]], int]) -> Log | None:
        """Open a log for appending, or make it; None while another process has it open.

        Args:
            key: its key.
            sound_bytes: given the lines of the log as `lines` yields them, the length of its sound part; the torn line
                after that is cut off.

        Raises:
            FeedfastError: it cannot be opened, or not by this name (a link).
        """

    # ---- ownership

    def lock(self, key: str, *, patience_s: float = 0.0) -> Lock | None:
        """Take a lock, waiting for it up to ``patience_s`` seconds; None if another holds it for that long."""

    def join(self, key: str, value: str) -> Lock | str:
        """Share a lock with all who mean the same ``value`` by it; the first of them writes it down.

        Returns:
            The shared lock, or, while others hold it who mean something else, the value they mean.
        """

    def number(self) -> int:
        """What tells this very place from a copy of it: a folder's inode; 0 where nothing does."""

    def writable(self) -> bool:
        """Whether it may be written to, as far as can be told without trying."""


def split_lines(found: Object, at: int = 0) -> Iterator[bytes]:
    """`Store.lines` of one open object."""
    piece = bytearray(_PIECE_BYTES)
    rest = b""
    while got := found.read([memoryview(piece)], at):
        at += got
        *whole, rest = (rest + piece[:got]).split(b"\n")
        for line in whole:
            yield line + b"\n"
        if len(rest) > MAX_LINE_BYTES:
            break
    if rest:
        yield rest


def refuse_not_damage(error: OSError, where: str = "") -> None:
    """Raise if an error says nothing about what is stored, such as a missing permission or too many open files.

    Raises:
        FeedfastError: never a `CacheDamageError`: nothing is to be deleted or written again.
    """
    if error.errno in _NOT_DAMAGE:
        raise FeedfastError(
            f"{where or error.filename}: cannot be read: {error.strerror}. That is no damage: "
            f"{_NOT_DAMAGE[error.errno]}"
        ) from error
