"""A prefix of a bucket as the store of a cache: S3, Google Cloud Storage, Azure, or what speaks their language.

    NAME.zarr/commits/part-0-of-2.jsonl                  the packed lines of a log, as a folder has them
    NAME.zarr/commits/part-0-of-2.jsonl.d/000000005423   one line more, from this byte on; created where there was none
    NAME.zarr/commits/.lock-manifest                     a lease (`feedfast.storage.lease`)

An object is created where there is none; a retry that finds its own work compares the bytes. Whoever appends to a log
creates a line at its end, and is refused where somebody else already has: that, and no lock, is what keeps two writers
apart. A log is packed when it is closed, so that a finished cache in a bucket has the layout of a folder.
"""

from __future__ import annotations

import errno
import itertools
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

from feedfast.errors import FeedfastError, PartTakenError, RequestError
from feedfast.files import MAX_JSON_BYTES, Parts
from feedfast.storage.lease import LEASE_S, Lease, is_held, take
from feedfast.storage.objects import ChangedError, Objects, Version
from feedfast.storage.store import COMMITS, MADE, MAX_LINE_BYTES, Object, Reach, split_lines
from feedfast.storage.tier import Tier

# A request takes tens of milliseconds, however little it asks for; so many of this size keep a fast network busy.
REACH: Final = Reach(job_bytes=4 << 20, segment_bytes=32 << 20, segment_batches=64, threads=32)
_MADE: Final = f"{COMMITS}/{MADE}"
_LINES: Final = ".d"  # what the folder of a log's single lines adds to its name
_PACK: Final = 1000  # single lines, at most; a reader asks for each of them
_MOST_LINES: Final = 1 << 17
_ASKING: Final = 16  # requests for lines at a time


class BucketObject:
    """See `feedfast.storage.store.Object`. Every read is one request, for this very version of the object."""

    def __init__(self, objects: Objects, key: str, tail_bytes: int) -> None:
        """Ask for its last bytes, which tells its size, too.

        Raises:
            FileNotFoundError: there is none.
        """
        self._objects, self._key, self._tail_bytes = objects, key, tail_bytes
        self._ask()

    def _ask(self) -> None:
        if self._tail_bytes and self._objects.scheme != "az":  # which knows no range from the end
            found = self._objects.get(self._key, -self._tail_bytes)
        else:
            found = self._objects.head(self._key)
        self.size, self._tag, self._tail = found.size, found.tag, found.data

    def read(self, targets: Sequence[Any], offset: int) -> int:
        """See `feedfast.storage.store.Object.read`.

        Raises:
            OSError: another object has taken its place since it was opened.
        """
        wanted: int = sum(target.nbytes for target in targets)
        stop = min(offset + wanted, self.size)
        if stop <= offset:
            return 0
        kept = self.size - len(self._tail)
        try:
            if offset >= kept:
                data = self._tail[offset - kept : stop - kept]
            else:
                data = self._objects.get(self._key, offset, stop, tag=self._tag).data
        except ChangedError:
            raise OSError(errno.EIO, "another object has taken its place since it was opened") from None
        at = 0
        for target in targets:
            count = min(target.nbytes, len(data) - at)
            if count:
                memoryview(target).cast("B")[:count] = data[at : at + count]
            at += count
        return stop - offset

    def refetch(self) -> bool:
        """See `feedfast.storage.store.Object.refetch`."""
        self._ask()
        return True


class BucketLog:
    """See `feedfast.storage.store.Log`: each line an object, until they are packed into one."""

    def __init__(self, objects: Objects, key: str, lease: Lease, lines: list[bytes], tag: Version | None) -> None:
        """A log whose lines, so far all packed, are ``lines``; ``tag`` is of the packed object."""
        self._objects, self._key, self._lease = objects, key, lease
        self._lines, self._tag = lines, tag
        self._end = sum(map(len, lines))
        self._loose: list[str] = []

    def append(self, line: bytes) -> None:
        """See `feedfast.storage.store.Log.append`.

        Raises:
            PartTakenError: another process appends to this log.
        """
        self._lease.require()
        key = line_key(self._key, self._end)
        if self._objects.create(key, line) is not None:  # an equal line of another would say the same
            raise PartTakenError(
                f"{self._objects.where(self._key)}: expected to append at byte {self._end}, found that another "
                "process has done so: it is writing the same part of this cache"
            )
        self._lines.append(line)
        self._end += len(line)
        self._loose.append(key)
        if len(self._loose) >= _PACK:
            self._pack()

    def _pack(self) -> None:
        """Put all lines into one object, as a folder has them, and remove the single ones."""
        self._tag = pack(self._objects, self._key, self._lines, self._tag)
        self._objects.delete(self._loose)
        self._loose = []

    def close(self) -> None:
        """Pack the lines and give the log back.

        Raises:
            FeedfastError: another process has taken it over.
        """
        try:
            if self._loose and not self._lease.lost:
                self._pack()
        finally:
            self._lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Bucket:
    """The objects, logs and locks of one cache below a prefix of a bucket. See `feedfast.storage.store.Store`."""

    reach = REACH

    def __init__(
        self, place: str, *, tier: Tier | None = None, objects: Objects | None = None, lease_s: float = LEASE_S
    ) -> None:
        """Nothing is asked of the bucket yet.

        Args:
            place: its URL and the prefix.
            tier: where committed objects are kept as they are read.
            objects: how requests are made, in place of what the URL and the environment say.
            lease_s: see `feedfast.storage.lease`.

        Raises:
            RequestError: no such URL, or the package for buckets is missing.
        """
        self._objects = Objects(place) if objects is None else objects
        self.tier, self._lease_s = tier, lease_s

    def __repr__(self) -> str:
        return f"Bucket({self.place!r})"

    @property
    def place(self) -> str:
        """Its URL and the prefix."""
        return self._objects.place

    def where(self, key: str = "") -> str:
        """What a message calls an object, or the whole store."""
        return self._objects.where(key)

    # ---- reading

    def open(self, key: str, *, tail_bytes: int = 0, committed_bytes: int | None = None) -> Object:
        """See `feedfast.storage.store.Store.open`."""

        def far() -> Object:
            return BucketObject(self._objects, key, tail_bytes)

        if self.tier is None or committed_bytes is None:
            return far()
        return self.tier.open(self.where(key), committed_bytes, far)

    def read(self, key: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
        """See `feedfast.storage.store.Store.read`."""
        return bytes(self._objects.get(key, most=most_bytes).data)

    def lines(self, key: str, start: int = 0) -> Iterator[bytes]:
        """See `feedfast.storage.store.Store.lines`."""
        # In this order: a line that is packed and removed meanwhile is found in what is packed.
        places = self._places(key)
        loose = self._loose(key, places)
        try:
            packed = BucketObject(self._objects, key, 0)
        except FileNotFoundError:
            if not places:
                raise
            return iter([loose[place] for place in sorted(loose) if place >= start])
        more = (loose[place] for place in sorted(loose) if place >= max(packed.size, start))
        return itertools.chain(split_lines(packed, start), more)

    def _places(self, key: str) -> list[int]:
        """Where the single lines begin, in bytes from the log's first."""
        names = [found.rpartition("/")[2] for found in self._objects.below(key + _LINES)]
        places = sorted(int(name) for name in names if name.isdecimal() and len(name) < 16)
        if len(places) > _MOST_LINES:
            raise FeedfastError(f"{self.where(key)}: expected at most {_MOST_LINES} single lines, found {len(places)}")
        return places

    def _loose(self, key: str, places: list[int]) -> dict[int, bytes]:
        """The single lines that are (still) there."""

        def ask(place: int) -> bytes | None:
            try:
                return bytes(self._objects.get(line_key(key, place), most=MAX_LINE_BYTES).data)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_ASKING) as pool:
            found = zip(places, pool.map(ask, places), strict=True)
            return {place: line for place, line in found if line is not None}

    def size(self, key: str) -> int:
        """See `feedfast.storage.store.Store.size`."""
        return self._objects.head(key).size

    def sizes(self, folder: str) -> Callable[[str], int]:
        """See `feedfast.storage.store.Store.sizes`: one request per thousand objects."""
        found = self._objects.below(folder)

        def size(key: str) -> int:
            if key not in found:
                raise FileNotFoundError(errno.ENOENT, "no such object", self.where(key))
            return found[key][0]

        return size

    def names(self, folder: str = "") -> list[str]:
        """See `feedfast.storage.store.Store.names`; a log is there under its own name, however it is kept."""
        objects, folders = self._objects.names(folder)
        logs = (name.removesuffix(_LINES) if folder == COMMITS else name for name in folders)
        return sorted({*objects, *logs})

    # ---- writing

    def make(self) -> None:
        """Leave a mark, so that the place is known as a cache's, and see that the store keeps its word.

        Raises:
            RequestError: there is no such bucket, it may not be written to, or it does not know conditions.
        """
        for _ in range(2):
            try:
                self._objects.put(_MADE, b"", create=True)
            except FileExistsError:
                return
        raise RequestError(
            f"{self.place}: expected a store that can create an object only where there is none (If-None-Match), "
            "found one that writes over it: two writers could not be kept apart"
        )

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

        Raises:
            PartTakenError: another process puts the same object at this moment.
        """
        data = b"".join(parts)
        if written is not None:
            written()  # what is sent is a copy
        if taken is None:
            self._objects.put(key, data)
            return
        # An earlier writer may have died before the line: the same rows give the same bytes, and nothing is to be done.
        other = self._objects.create(key, data)
        if other is not None:
            taken()
            try:
                self._objects.put(key, data, tag=other)
            except ChangedError:
                raise PartTakenError(f"{self.where(key)}: another process is writing the same object") from None

    def sweep(self, dead: Callable[[str], bool]) -> None:
        """Nothing: an upload that was not finished is not there."""

    def open_log(self, key: str, sound_bytes: Callable[[Iterable[bytes]], int]) -> BucketLog | None:
        """See `feedfast.storage.store.Store.open_log`. An owner that died is known as such after `LEASE_S` only."""
        lease = take(self._objects, _lease_key(key), lease_s=self._lease_s, until_sure=True)
        if lease is None:
            return None
        try:
            try:
                lines, tag = list(self.lines(key)), self._tag_of(key)
            except FileNotFoundError:
                lines, tag = [], None
            sound = sound_bytes(iter(lines))
            kept = list(_within(lines, sound))
            places = self._places(key)
            if places or tag is None or len(kept) < len(lines):
                tag = pack(self._objects, key, kept, tag)
                self._objects.delete(line_key(key, place) for place in places)
        except BaseException:
            lease.close()
            raise
        return BucketLog(self._objects, key, lease, kept, tag)

    def _tag_of(self, key: str) -> Version | None:
        try:
            return self._objects.head(key).tag
        except FileNotFoundError:
            return None

    # ---- ownership

    def lock(self, key: str, *, patience_s: float = 0.0) -> Lease | None:
        """See `feedfast.storage.store.Store.lock`."""
        return take(self._objects, key, lease_s=self._lease_s, patience_s=patience_s)

    def join(self, key: str, value: str) -> Lease | str:
        """See `feedfast.storage.store.Store.join`: each who shares it has a lease of its own, under the value."""
        mine = take(self._objects, f"{key}/{value}/{uuid.uuid4().hex}", lease_s=self._lease_s)
        assert mine is not None  # nobody else has that name
        watched: dict[str, Version] | None = None
        wake, waited = threading.Event(), 0.0
        step = self._lease_s / 8
        while True:
            found = self._objects.below(key)
            others = {other: tag for other, (_, tag) in found.items() if other.split("/")[-2] != value}
            alive = next(
                (
                    o
                    for o in others
                    if is_held(self._objects, o) or (watched is not None and watched.get(o) != others[o])
                ),
                None,
            )
            if not others or (alive is None and waited > self._lease_s):
                self._objects.delete(others)  # nobody has renewed them
                return mine
            if alive is not None:
                mine.close()
                return alive.split("/")[-2]
            watched = others
            wake.wait(step)
            waited += step

    def number(self) -> int:
        """0: a URL is no proof of who made what lies there."""
        return 0

    def writable(self) -> bool:
        """True: whether it is shows when it is tried."""
        return True


def line_key(log_key: str, place: int) -> str:
    """Key of a single line of a log, by where it begins: in bytes from the log's first."""
    return f"{log_key}{_LINES}/{place:012d}"


def pack(objects: Objects, key: str, lines: Sequence[bytes], tag: Version | None) -> Version:
    """Put a log's lines into one object, in place of the one that has ``tag``, or where there is none; its tag.

    Raises:
        PartTakenError: another process has done so meanwhile.
    """
    data = b"".join(lines)
    try:
        return objects.put(key, data, create=tag is None, tag=tag)
    except (FileExistsError, ChangedError):
        found = objects.get(key)
        if bytes(found.data) == data:
            return found.tag
        raise PartTakenError(
            f"{objects.where(key)}: expected to be the only one who writes this log, found that another process has"
        ) from None


def _lease_key(key: str) -> str:
    folder, _, name = key.rpartition("/")
    return f"{folder}/.lease-{name.removesuffix('.jsonl')}"  # not the name of a log


def _within(lines: Iterable[bytes], sound: int) -> Iterator[bytes]:
    """The lines that lie within the first ``sound`` bytes."""
    ends = itertools.accumulate(map(len, lines))
    return (line for line, end in zip(lines, ends, strict=True) if end <= sound)
