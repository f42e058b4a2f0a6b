"""What segmentation and detection have in common when their data is opened: faults, names, pairs of files.

Images and annotations come as files of their own, made by other programs, and disagree in as many ways as people have
tools. Opening finds all that is wrong and names it in one error, since mending one file per run takes days: `Faults`
counts everything and keeps the first twenty. What concerns the listing (missing pairs, duplicates, unknown classes) is
looked at for all of it; what concerns one sample's content, for the samples that are used.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from feedfast.data.annotations import Boxes, Masks
from feedfast.data.folder import refuse_odd_text
from feedfast.data.headers import Header
from feedfast.data.images import scan_images
from feedfast.data.selection import chosen
from feedfast.errors import RequestError
from feedfast.files import read_file

__all__ = [
    "Asked",
    "Faults",
    "Opened",
    "by_stem",
    "class_names",
    "names_in",
    "plain_path",
    "scan",
    "shortened",
    "size_fault",
]

CLASSES_FILE = "classes.txt"

_SHOWN = 20  # faults printed; the count covers the rest
_MAX_NAMES_BYTES = 1 << 20
_MAX_NAME = 1024


@dataclass(frozen=True)
class Asked:
    """How data with boxes or masks are to be opened; fields as the parameters of `open_dataset`."""

    source: str
    split: Literal["train", "val"] = "train"
    classes: tuple[str, ...] = ()
    full: bool = False
    progress: Callable[[int, int], None] | None = None
    limit: int = 0
    fraction: float = 1.0

    def ids(self, count: int) -> NDArray[np.uint32]:
        """Ids of the samples that are used, of so many: as of one class."""
        return chosen(self.source, np.zeros(count, dtype=np.int32), self.limit, self.fraction)


@dataclass(frozen=True, eq=False)
class Opened:
    """What `open_segment` and `open_detect` give; fields as those of `Dataset`."""

    root: Path
    files: tuple[str, ...]
    ids: NDArray[np.uint32]
    sizes: NDArray[np.int32]
    marks: Boxes | Masks
    skipped: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, int] = field(default_factory=dict)


class Faults:
    """Everything that is wrong with a source, as lines ``where: why``."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, where: str | Path, why: str) -> None:
        """Count a fault; the first twenty are kept."""
        self.count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"\n  {where}: {why}")

    def refuse(self, source: str, what: str) -> None:
        """Raise a `RequestError` if there are any; ``what`` was looked at, in words."""
        if self.count:
            more = f"\n  and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            faults = f"{self.count} fault{'s' if self.count > 1 else ''}"
            raise RequestError(f"{source}: expected {what} that fit, found {faults}:{''.join(self._shown)}{more}")


def scan(
    asked: Asked, paths: Sequence[Path], faults: Faults, look: Callable[[int, Header | None], list[str]]
) -> tuple[NDArray[np.int32], NDArray[np.uint8], dict[str, int]]:
    """`scan_images` with what belongs to each image; what is wrong goes into ``faults``.

    Returns:
        int32 [n, 2] sizes after EXIF orientation, uint8 [n] EXIF orientations, and remarks.
    """
    turns = np.ones(len(paths), dtype=np.uint8)

    def looked(at: int, header: Header | None) -> list[str]:
        turns[at] = 1 if header is None else header.orientation
        return look(at, header)

    sizes, problems, remarks = scan_images(paths, full=asked.full, progress=asked.progress, look=looked)
    for at, why in problems:
        faults.add(paths[at], why)
    turned = int((turns != 1).sum())
    if turned:
        remarks["turned by EXIF; masks and boxes are taken to be in stored pixels, and turned with it"] = turned
    return sizes, turns, dict(remarks)


def class_names(asked: Asked, folders: Sequence[Path]) -> tuple[str, ...]:
    """The names of classes by number: those given, or of ``classes.txt`` in the first of some folders that has one.

    Returns:
        The names, empty where none are given and no folder has the file.

    Raises:
        RequestError: an unreadable file, or names that are empty, too long, given twice or not UTF-8.
    """
    names, where = asked.classes, f"{asked.source}: classes"
    path = next((folder / CLASSES_FILE for folder in folders if os.path.isfile(folder / CLASSES_FILE)), None)
    if not names and path is not None:
        where = str(path)
        try:
            text = read_file(path, _MAX_NAMES_BYTES).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: expected class names in UTF-8, one per line: {error}") from error
        names = tuple(line.strip() for line in text.rstrip().splitlines())
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        refuse_odd_text(name, f"{where}: names")
        if not 0 < len(name) <= _MAX_NAME:
            raise RequestError(f"{where}: expected a name for class {number}, found {'none' if not name else 'a text'}")
        if seen.setdefault(name, number) != number:
            raise RequestError(f"{where}: expected a name per class, found {name!r} for {seen[name]} and {number}")
    return names


def by_stem(files: Sequence[str], faults: Faults, folder: Path) -> dict[str, str]:
    """Stem → file name, in order; a stem of several files is a fault."""
    found: dict[str, str] = {}
    for name in files:
        first = found.setdefault(os.path.splitext(name)[0], name)
        if first != name:
            faults.add(folder / name, f"has the stem of {first}; expected one file per stem")
    return found


def names_in(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted, without hidden ones.

    Raises:
        RequestError: it cannot be listed.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise RequestError(f"{folder}: expected a folder that can be listed, found: {error.strerror}") from error


def plain_path(name: Any) -> bool:
    """Whether a name from anybody's file leads to a file below the folder it is relative to."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and path.parts != () and ".." not in path.parts


def size_fault(header: Header, declared: tuple[int, int]) -> str | None:
    """What is wrong with the size (height, width) that boxes were drawn on, None if it is the image's as stored."""
    if declared == header[:2]:
        return None
    found = f"the image has {header.height}x{header.width} pixels, its annotation says {declared[0]}x{declared[1]}"
    if header.orientation >= 5 and declared == header[1::-1]:
        return (
            f"{found}, as after its EXIF turn (orientation {header.orientation}); boxes are read in stored pixels: "
            "turn the image files themselves (jpegtran, mogrify -auto-orient) and open them again"
        )
    return found


def shortened(value: Any) -> str:
    """A value from anybody's file, for a message."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
