"""The index of a large cache's logs: the same commits as columns of numbers, so that opening does not read every line.

A line takes 500 bytes and 10 µs to check, and there is one per thousand rows, array and view: of a million rows and 64
views that is seconds and hundreds of megabytes of objects, in every process. Whoever completes a cache of many lines
therefore puts ``commits/index`` next to the logs (`feedfast.sealed`): per array what all its lines have in common,
and a column of lengths, checksums and block sums. A commit is made of it when it is asked for.

The logs stay what counts. An index names each log it was made from, its length then, and a checksum of that length's
last 64 KiB; lines that were appended since are read from the log, and where a log is another, or an index is damaged,
it is passed over. ``verify`` reads the logs alone and compares.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from feedfast.sealed import pack, unpack
from feedfast.storage.commit import Commit
from feedfast.storage.layout import ArraySpec
from feedfast.storage.store import COMMITS, Store

INDEX: Final = f"{COMMITS}/index"
MIN_LINES: Final = 4096  # below, reading the lines takes 40 ms
_NAME: Final = "feedfast-log-index"
_VERSION: Final = 1
_MAX_BYTES: Final = 16 << 30
_TAIL_BYTES: Final = 64 << 10
_MAX_DIMENSIONS: Final = 16  # a key has one word for each

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class ArrayIndex:
    """All objects of one array; object (view, shard) is in place ``view * shards + shard`` of each column.

    Attributes:
        array: its name.
        manifest: of every line.
        fit: of every line.
        layout: what keys and rows follow from: views (0 = none), dimensions, shards per view, rows per shard, rows per
            view, rows per block.
        size: bytes of each object, uint64.
        crc: crc32c, uint32.
        sha: sha256, uint8 [n, 32].
        saturated: uint64.
        attempt: uint32.
        sums: block sums, uint32 [n, blocks]; a view's last shard may have fewer.
    """

    array: str
    manifest: str
    fit: str
    layout: tuple[int, ...]
    size: NDArray[np.uint64]
    crc: NDArray[np.uint32]
    sha: NDArray[np.uint8]
    saturated: NDArray[np.uint64]
    attempt: NDArray[np.uint32]
    sums: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.size)

    def fits(self, spec: ArraySpec) -> bool:
        """Whether it is of an array that is stored like this, which may have got more views since."""
        views, *others = _layout_of(spec)
        return [*self.layout[1:]] == others and bool(views) == bool(self.layout[0]) and self.layout[0] <= views

    def commit(self, place: int) -> Commit:
        """The commit in a place."""
        _, dimensions, shards, shard_rows, rows, block_rows = self.layout
        view, shard = divmod(place, shards)
        start = shard * shard_rows
        stop = min(start + shard_rows, rows)
        sums = self.sums[place, : -(-(stop - start) // block_rows)].tolist()
        head = (view, shard) if self.layout[0] else (shard,)
        return Commit(
            array=self.array,
            shard="/".join(["c", *map(str, head), *["0"] * (dimensions - len(head))]),
            view=view,
            rows=(start, stop),
            bytes=int(self.size[place]),
            crc32c=f"{self.crc[place]:08x}",
            sha256=self.sha[place].tobytes().hex(),
            manifest=self.manifest,
            saturated=int(self.saturated[place]),
            fit=self.fit,
            block_sums=tuple(f"{number:08x}" for number in sums),
            attempt=int(self.attempt[place]),
        )

    def place(self, shard: str) -> int | None:
        """Where the object of a key is, None if this array has no such object."""
        views, dimensions, shards = self.layout[:3]
        words = shard.split("/")
        numbers = words[1 : 3 if views else 2]
        if len(words) != dimensions + 1 or words[0] != "c" or any(word != "0" for word in words[1 + len(numbers) :]):
            return None
        if not all(word.isascii() and word.isdigit() and str(int(word)) == word for word in numbers):
            return None
        view, number = (int(numbers[0]), int(numbers[1])) if views else (0, int(numbers[0]))
        return view * shards + number if view < (views or 1) and number < shards else None


class ViewCommits(Mapping[int, Commit]):
    """The commits of one view of an array by shard number, made when they are asked for.

    Attributes:
        lines: commits that count instead of the index's, or besides; to be filled by whoever has read them.
    """

    def __init__(self, index: ArrayIndex, view: int, hidden: set[int]) -> None:
        self.lines: dict[int, Commit] = {}
        self._index, self._first, self._shards = index, view * index.layout[2], index.layout[2]
        self._hidden = {place - self._first for place in hidden}

    def __getitem__(self, shard: int) -> Commit:
        found = self.lines.get(shard)
        if found is not None:
            return found
        if not 0 <= shard < self._shards or shard in self._hidden:
            raise KeyError(shard)
        return self._index.commit(self._first + shard)

    def __iter__(self) -> Iterator[int]:
        yield from (shard for shard in range(self._shards) if shard not in self._hidden and shard not in self.lines)
        yield from self.lines

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each object."""
        of_index = dict(enumerate(self._index.size[self._first : self._first + self._shards].tolist()))
        kept = {shard: size for shard, size in of_index.items() if shard not in self._hidden}
        return kept | {shard: commit.bytes for shard, commit in self.lines.items()}


class BlockSums(Mapping[int, tuple[str, ...]]):
    """The block sums of some commits, by shard number; those that were asked for are kept."""

    def __init__(self, commits: Mapping[int, Commit]) -> None:
        self._commits = commits
        self._known: dict[int, tuple[str, ...]] = {}

    def __getitem__(self, shard: int) -> tuple[str, ...]:
        found = self._known.get(shard)
        if found is None:
            found = self._known[shard] = self._commits[shard].block_sums
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._commits)

    def __len__(self) -> int:
        return len(self._commits)


class Commits(MutableMapping[Key, Commit]):
    """The commits of a cache by array and key: those of an index, and lines that count instead of them or besides.

    Attributes:
        indexed: the arrays of the index, by name.
        lines: commits read from lines.
    """

    def __init__(self, indexed: Mapping[str, ArrayIndex] | None = None) -> None:
        self.indexed: dict[str, ArrayIndex] = dict(indexed or {})
        self.lines: dict[Key, Commit] = {}
        self._shadowed: dict[str, set[int]] = {}  # per array, places whose line counts instead

    def __getitem__(self, key: Key) -> Commit:
        found = self.lines.get(key)
        if found is not None:
            return found
        place = self._place(key)
        if place is None or place in self._shadowed.get(key[0], ()):
            raise KeyError(key)
        return self.indexed[key[0]].commit(place)

    def __setitem__(self, key: Key, commit: Commit) -> None:
        self._hide(key)
        self.lines[key] = commit

    def __delitem__(self, key: Key) -> None:
        if key not in self:
            raise KeyError(key)
        self._hide(key)
        self.lines.pop(key, None)

    def __iter__(self) -> Iterator[Key]:
        for commit in self._from_index():
            yield commit.array, commit.shard
        yield from self.lines

    def __len__(self) -> int:
        hidden = sum(map(len, self._shadowed.values()))
        return len(self.lines) + sum(map(len, self.indexed.values())) - hidden

    def items(self) -> ItemsView[Key, Commit]:
        """Keys and commits, each made once."""
        return _Items(self)

    def all(self) -> Iterator[Commit]:
        """The commits, each made once."""
        yield from self._from_index()
        yield from self.lines.values()

    def of(self, array: str) -> Iterator[Commit]:
        """Those of one array, without those that are read from lines."""
        index, hidden = self.indexed.get(array), self._shadowed.get(array, ())
        if index is not None:
            yield from (index.commit(place) for place in range(len(index)) if place not in hidden)

    def of_view(self, array: str, view: int) -> ViewCommits | None:
        """Those of one view of an array, without those that are read from lines; None if the index has none of it."""
        index = self.indexed.get(array)
        if index is None or view >= (index.layout[0] or 1):
            return None
        return ViewCommits(index, view, self._shadowed.get(array, set()))

    @property
    def total_bytes(self) -> int:
        """Bytes of all objects."""
        total = sum(int(index.size.sum()) for index in self.indexed.values())
        for array, places in self._shadowed.items():
            if array in self.indexed:
                total -= int(self.indexed[array].size[sorted(places)].sum())
        return total + sum(commit.bytes for commit in self.lines.values())

    def drop(self, array: str) -> list[Commit]:
        """Take an array out of the index; its commits."""
        found = list(self.of(array))
        del self.indexed[array]
        self._shadowed.pop(array, None)
        return found

    def _place(self, key: Key) -> int | None:
        index = self.indexed.get(key[0])
        return None if index is None else index.place(key[1])

    def _hide(self, key: Key) -> None:
        place = self._place(key)
        if place is not None:
            self._shadowed.setdefault(key[0], set()).add(place)

    def _from_index(self) -> Iterator[Commit]:
        for array in self.indexed:
            yield from self.of(array)


class _Items(ItemsView[Key, Commit]):
    _mapping: Commits

    def __iter__(self) -> Iterator[tuple[Key, Commit]]:
        for commit in self._mapping.all():
            yield (commit.array, commit.shard), commit


@dataclass(frozen=True)
class LogIndex:
    """What an index says: how much of each log it covers, in bytes, and the arrays."""

    covered: Mapping[str, int]
    arrays: Mapping[str, ArrayIndex]


def read_index(store: Store) -> LogIndex | None:
    """The index of a cache's logs as they are now; None if there is none that can be believed."""
    try:
        size = store.size(INDEX)
        data = np.frombuffer(store.read(INDEX, _MAX_BYTES), dtype=np.uint8) if size else np.empty(0, np.uint8)
        head, arrays = unpack(_NAME, _VERSION, data)
        covered = {str(name): int(length) for name, (length, _) in head["logs"].items()}
        for name, (length, tail) in head["logs"].items():
            if _tail_sum(store, name, length) != tail:
                return None
        found = {}
        for number, said in enumerate(head["arrays"]):
            index = ArrayIndex(
                said["array"],
                said["manifest"],
                said["fit"],
                tuple(int(value) for value in said["layout"]),
                **{column: arrays[f"{column}{number}"] for column in _COLUMNS},
            )
            if not _sound(index):
                return None
            found[index.array] = index
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return LogIndex(covered, found)


def write_index(store: Store, commits: Commits, specs: Mapping[str, ArraySpec], logs: Mapping[str, int]) -> bool:
    """Put the index of a complete cache; whether there is one now.

    Args:
        store: the cache.
        commits: all of it, every line checked.
        specs: its arrays.
        logs: name → length in bytes of the sound part of each log that the commits are from.
    """
    if len(commits) < MIN_LINES or len(commits) != sum(spec.num_views * spec.num_shards for spec in specs.values()):
        return False
    by_array: dict[str, list[Commit | None]] = {
        name: [None] * (spec.num_views * spec.num_shards) for name, spec in specs.items()
    }
    for commit in commits.all():
        view, shard = specs[commit.array].locate(commit.shard)
        by_array[commit.array][view * specs[commit.array].num_shards + shard] = commit
    said: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for number, (name, found) in enumerate(by_array.items()):
        entries = [commit for commit in found if commit is not None]
        index = _indexed(specs[name], entries)
        if index is None:
            return False
        said.append({"array": name, "manifest": index.manifest, "fit": index.fit, "layout": index.layout})
        arrays |= {f"{column}{number}": getattr(index, column) for column in _COLUMNS}
    try:
        ends = {name: [size, _tail_sum(store, name, size)] for name, size in logs.items()}
    except (OSError, ValueError):  # somebody is writing
        return False
    head = {"logs": ends, "arrays": said}
    store.put(INDEX, pack(_NAME, _VERSION, head, arrays), "manifest")
    return True


_COLUMNS: Final = {"size": "<u8", "crc": "<u4", "sha": "|u1", "saturated": "<u8", "attempt": "<u4", "sums": "<u4"}


def _layout_of(spec: ArraySpec) -> tuple[int, ...]:
    return spec.views, len(spec.shape), spec.num_shards, spec.shard_rows, spec.rows, spec.block_rows


def _indexed(spec: ArraySpec, commits: list[Commit]) -> ArrayIndex | None:
    """An array's commits in order as columns; None where its lines do not agree, or hold what is no checksum."""
    first = commits[0]
    if any((commit.manifest, commit.fit) != (first.manifest, first.fit) for commit in commits):
        return None
    sums = np.zeros((len(commits), spec.blocks_per_shard), dtype="<u4")
    try:
        for place, commit in enumerate(commits):
            sums[place, : len(commit.block_sums)] = [int(number, 16) for number in commit.block_sums]
        sha = b"".join(bytes.fromhex(commit.sha256) for commit in commits)
        crc = np.array([int(commit.crc32c, 16) for commit in commits], dtype="<u4")
        return ArrayIndex(
            spec.name,
            first.manifest,
            first.fit,
            _layout_of(spec),
            np.array([commit.bytes for commit in commits], dtype="<u8"),
            crc,
            np.frombuffer(sha, dtype=np.uint8).reshape(len(commits), 32),
            np.array([commit.saturated for commit in commits], dtype="<u8"),
            np.array([commit.attempt for commit in commits], dtype="<u4"),
            sums,
        )
    except (ValueError, OverflowError):
        return None


def _sound(index: ArrayIndex) -> bool:
    if not all(isinstance(text, str) for text in (index.array, index.manifest, index.fit)):
        return False
    views, dimensions, shards, shard_rows, rows, block_rows = index.layout
    if dimensions > _MAX_DIMENSIONS or not (
        views >= 0 and dimensions > 0 and min(shards, shard_rows, rows, block_rows) > 0
    ):
        return False
    count, blocks = (views or 1) * shards, -(-shard_rows // block_rows)
    shapes = {"size": (count,), "crc": (count,), "sha": (count, 32), "saturated": (count,), "attempt": (count,)}
    return -(-rows // shard_rows) == shards and all(
        (getattr(index, name).shape, getattr(index, name).dtype.str) == (shape, _COLUMNS[name])
        for name, shape in {**shapes, "sums": (count, blocks)}.items()
    )


def _tail_sum(store: Store, name: str, length: int) -> str:
    """A checksum of the last 64 KiB of the first ``length`` bytes of a log.

    Raises:
        OSError: there is no such log.
        ValueError: it is shorter, no line ends there, or no log's name.
    """
    if "/" in name or not name.endswith(".jsonl"):
        raise ValueError(f"{name!r} is no log")
    log = store.open(f"{COMMITS}/{name}")
    tail = bytearray(min(length, _TAIL_BYTES))
    if log.size < length or log.read([memoryview(tail)], length - len(tail)) != len(tail):
        raise ValueError(f"{name} is shorter than {length} bytes")
    if tail and not tail.endswith(b"\n"):
        raise ValueError(f"{name} has no whole line that ends there")
    return f"{google_crc32c.value(bytes(tail)):08x}"
