"""The index of packed images: one file that says where each image lies, so that data of any size open at once.

It is made when the data are opened first, and written next to them (hidden, ``.feedfast-….index``) or, where that is
not allowed, below ``$XDG_CACHE_HOME/feedfast``. It holds the size and modification time of every file it was made from
and is made again when one of them differs. What it says is derived: an index that is damaged, of another version or
in doubt is made again without a word, and readers compare every image with it anyway.

It is mapped (`feedfast.sealed`), so that processes share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import make_dirs, open_regular, replace_file
from feedfast.sealed import pack, unpack

__all__ = ["Index", "Place", "Stamp", "images_path", "load", "locked", "place_of", "save", "stamps_of"]

log = logging.getLogger(__name__)

FORMAT: Final = 1  # also of what headers.py lets pass: raise it when that changes
_NAME: Final = "feedfast-index"
_ARRAYS: Final = {
    "first": "<i8", "offset": "<u8", "length": "<u4", "label": "<i4", "size": "<i4", "remark": "|u1", "name_end": "<u8",
    "name_text": "|u1",
}  # fmt: skip
Stamp = tuple[str, int, int]
"""A file's path relative to the data's folder, its length in bytes, and its modification time in nanoseconds."""


@dataclass(frozen=True, eq=False)
class Index:
    """Where n images lie.

    Attributes:
        facts: JSON values: ``classes``, ``skipped``, ``remarks`` (texts by number - 1), ``faults`` ([image, why] of
            the unreadable ones).
        sources: the files it was made from.
        files: the files that hold the bytes: the sources, or one that was made of them all.
        arrays: ``first`` int64 [sources + 1] (the first image of each source, and n), ``offset`` uint64 [n], ``length``
            uint32 [n], ``label`` int32 [n] (-1 = none), ``size`` int32 [n, 2] (height and width after EXIF orientation;
            0 = unreadable), ``remark`` uint8 [n] (0 = none), ``name_end`` uint64 [n] into ``name_text`` uint8, the
            UTF-8 names one after the other (both empty: rows without names).
    """

    facts: Mapping[str, Any]
    sources: tuple[Stamp, ...]
    files: tuple[Stamp, ...]
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["length"])

    @property
    def sound(self) -> bool:
        """Whether every number in it leads to something that is there."""
        arrays, count = self.arrays, len(self)
        first, ends = arrays["first"], arrays["name_end"]
        shapes = {name: arrays[name].shape for name in ("offset", "label", "remark")}
        if (
            set(shapes.values()) != {(count,)}
            or arrays["size"].shape != (count, 2)
            or ends.shape not in ((0,), (count,))
        ):
            return False
        if first.shape != (len(self.sources) + 1,) or first[0] != 0 or first[-1] != count or (np.diff(first) < 0).any():
            return False
        one = len(self.files) == 1 != len(self.sources)
        if not one and len(self.files) != len(self.sources):
            return False
        sizes = np.array([size for _, size, _ in self.files], dtype=np.uint64)
        most = sizes[0] if one else np.repeat(sizes, np.diff(first))
        lengths = arrays["length"].astype(np.uint64)
        inside = (lengths <= most).all() and (arrays["offset"] <= most - lengths).all()
        named = not len(ends) or (ends[0] <= ends[-1] == len(arrays["name_text"]) and (ends[1:] >= ends[:-1]).all())
        labels, classes = arrays["label"], self.facts["classes"]
        if any(not 0 <= at < count for at, _ in self.facts["faults"]) or arrays["remark"].max(initial=0) > len(
            self.facts["remarks"]
        ):
            return False
        numbered = not count or (labels.min() >= -1 and labels.max() < max(len(classes), 1))
        return bool(inside and named and numbered)


@dataclass(frozen=True)
class Place:
    """Where an index is looked for, best first."""

    folder: Path  # of the data; paths within the index are relative to it
    paths: tuple[Path, ...]


def place_of(sources: Sequence[Path], what: Sequence[str]) -> Place:
    """Where the index of some files lies; ``what`` tells it from other indexes of the same files."""
    folder = sources[0].absolute().parent
    named = [os.path.relpath(path.absolute(), folder) for path in sources]
    here = hashlib.sha256(json.dumps([FORMAT, list(what), named]).encode()).hexdigest()[:16]
    away = hashlib.sha256(json.dumps([here, str(folder)]).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "feedfast"
    return Place(folder, (folder / f".feedfast-{here}.index", home / f"{away}.index"))


def stamps_of(folder: Path, files: Sequence[Path]) -> tuple[Stamp, ...]:
    """What tells each file from a later one.

    Raises:
        OSError: one cannot be looked up.
    """
    found = []
    for path in files:
        status = path.stat()
        found.append((os.path.relpath(path.absolute(), folder), status.st_size, status.st_mtime_ns))
    return tuple(found)


def load(place: Place, sources: Sequence[Stamp]) -> Index | None:
    """The index of some files as they are now; None if there is none."""
    for path in place.paths:
        try:
            index = _read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            log.info("data: %s: made again: %s", path, error)
            continue
        if index.sources != tuple(sources):
            log.info("data: %s: made again: the files are others than it was made from", path)
            continue
        # never a file that only the index names: it may be a stranger's
        with contextlib.suppress(OSError):
            if index.files == index.sources or index.files == stamps_of(place.folder, [images_beside(path)]):
                return index
    return None


def images_beside(index: Path) -> Path:
    """Where the images of an index lie that cannot be read where they were."""
    return index.with_suffix(".images")


def images_path(place: Place, source: str) -> Path:
    """Where images go that cannot be read where they lie: next to the index, at the first place that can be written.

    Raises:
        RequestError: there is none.
    """
    for path in place.paths:
        with contextlib.suppress(OSError):
            make_dirs(path.parent)
            if os.access(path.parent, os.W_OK | os.X_OK):
                return images_beside(path)
    folders = " or ".join(str(path.parent) for path in place.paths)
    raise RequestError(f"{source}: its images are unpacked once; expected a folder that can be written, {folders}")


def save(place: Place, index: Index) -> None:
    """Write it at the first place that can be written; where none can be, it is made again the next time."""
    arrays = {name: np.ascontiguousarray(index.arrays[name], dtype=kind) for name, kind in _ARRAYS.items()}
    head = {"facts": dict(index.facts), "sources": index.sources, "files": index.files}
    parts = pack(_NAME, FORMAT, head, arrays)
    why = ""
    for path in place.paths:
        try:
            make_dirs(path.parent)
            replace_file(path, parts)
        except (OSError, FeedfastError) as error:
            why = str(error)
            continue
        return
    log.warning("data: the index of %s cannot be kept and is made again every time: %s", place.folder, why)


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """Held while an index is made, so that several processes of a machine make it once; a file system without such
    locks makes it more often, which harms nothing."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fd = os.open(place.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Index:
    with open(open_regular(path), "rb") as file:
        data = np.memmap(file, dtype=np.uint8, mode="r") if os.fstat(file.fileno()).st_size else np.empty(0, np.uint8)
    head, arrays = unpack(_NAME, FORMAT, data)
    if {name: array.dtype.str for name, array in arrays.items()} != _ARRAYS:
        raise ValueError("other arrays than an index has")
    index = Index(head["facts"], _stamps(head["sources"]), _stamps(head["files"]), arrays)
    if not index.sound:
        raise ValueError("it is damaged")
    return index


def _stamps(tree: Any) -> tuple[Stamp, ...]:
    return tuple((str(name), int(size), int(stamp)) for name, size, stamp in tree)
