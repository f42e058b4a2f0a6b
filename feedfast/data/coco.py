"""COCO's JSON of boxes: ``images``, ``annotations`` and ``categories``, and the folder its images lie in.

COCO's training file has 448 MB, nearly all of it outlines: what is not needed is thrown away as each object is parsed.
Class numbers are the places of categories sorted by id (COCO's ids run to 90 with gaps). Order is that of ``images``.
Boxes are (left, top, width, height) in pixels of the image as stored; edges are left, top, left + width, top + height.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from feedfast.data.dense import Faults, plain_path, shortened
from feedfast.errors import RequestError
from feedfast.files import read_file

__all__ = ["CocoBox", "CocoFile", "image_folder", "read_coco"]

_MAX_BYTES = 2 << 30
_MAX_NUMBER = 1e9
_MAX_NAME = 1024
_KEPT = frozenset(
    ("images", "annotations", "categories", "id", "file_name", "height", "width", "image_id", "category_id", "bbox",
     "iscrowd", "name")
)  # fmt: skip
_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoBox:
    """An annotation: its id, class number, left, top, right, bottom in pixels, whether it is a crowd."""

    id: int
    label: int
    xyxy: tuple[float, float, float, float]
    crowd: bool


@dataclass(frozen=True, eq=False)
class CocoFile:
    """What a file says, in order of its images.

    Attributes:
        files: names of images.
        sizes: (height, width) of each, None where it does not say.
        boxes: of each.
        classes: names by number.
        empty: boxes of no width or height, which were left out.
    """

    files: list[str]
    sizes: list[tuple[int, int] | None]
    boxes: list[list[CocoBox]]
    classes: tuple[str, ...]
    empty: int


def read_coco(path: Path, faults: Faults) -> CocoFile:
    """Read a file; entries that are wrong are left out and go into ``faults``.

    Raises:
        RequestError: not a JSON object with the three lists.
    """
    document = _parsed(path)
    categories = _each(path, document, "categories", _Categories(), faults)
    images = _each(path, document, "images", _Images(), faults)
    ordered = sorted(categories.ids)
    labels = {category: label for label, category in enumerate(ordered)}
    boxes = _each(path, document, "annotations", _Boxes(labels, {image: [] for image in images.ids}), faults)
    return CocoFile(
        [file for file, _ in images.found.values()],
        [size for _, size in images.found.values()],
        [boxes.of_image[image] for image in images.found],
        tuple(categories.found.get(category, "") for category in ordered),
        boxes.empty,
    )


def image_folder(path: Path, files: Sequence[str]) -> Path:
    """The first folder near a file that has all the images it names, else the one that has most.

    Looked at are the file's folder, there the folder of its own name (``train.json``: ``train/``), ``images/`` and the
    name with 2017, then those of ``images/`` and of the folder above (``annotations/instances_val2017.json``:
    ``val2017/``).
    """
    here, stem = path.parent, path.stem
    short = stem.removeprefix("instances_")
    names = dict.fromkeys((stem, "images", f"{stem}2017", short, f"images/{stem}", f"images/{short}"))
    places = [here, *(here / name for name in names)]
    places += [here.absolute().parent / name for name in (short, f"{short}2017", f"images/{short}", "images")]
    missing: dict[Path, int] = {}
    for place in places:
        if os.path.isdir(place):
            missing[place] = sum(not os.path.isfile(place / name) for name in files)
            if not missing[place]:
                return place
    return min(missing, key=lambda place: missing[place])


def _parsed(path: Path) -> dict[str, list[Any]]:
    try:
        text = read_file(path, _MAX_BYTES).decode("utf-8-sig")
        found = json.loads(text, object_hook=lambda entry: {key: entry[key] for key in entry if key in _KEPT})
    except OSError as error:
        raise RequestError(f"{path}: expected COCO's JSON: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: expected COCO's JSON, found none: {shortened(str(error))}") from error
    missing = [key for key in _LISTS if not isinstance(found, dict) or not isinstance(found.get(key), list)]
    if missing:
        raise RequestError(f"{path}: expected COCO's JSON, an object with lists {', '.join(_LISTS)}, found no "
                           f"{' and no '.join(missing)}")  # fmt: skip
    return {key: found[key] for key in _LISTS}


class _WrongEntryError(Exception):
    """Why an entry of the JSON is not used."""


class _Takes(Protocol):
    def take(self, entry: dict[str, Any]) -> None: ...


Taker = TypeVar("Taker", bound=_Takes)
Value = TypeVar("Value", int, str)


def _each(path: Path, document: dict[str, list[Any]], key: str, taker: Taker, faults: Faults) -> Taker:
    """Give every entry of a list to ``taker``, and what is wrong with it to ``faults``."""
    for at, entry in enumerate(document[key]):
        try:
            if isinstance(entry, dict):
                taker.take(entry)
            else:
                faults.add(path, f"{key}[{at}]: expected an object, found {shortened(entry)}")
        except _WrongEntryError as why:
            faults.add(path, f"{key}[{at}]: {why}")
    return taker


class _Categories:
    def __init__(self) -> None:
        self.ids: set[int] = set()  # also of entries that are wrong: what refers to them is no fault of its own
        self.found: dict[int, str] = {}  # id → name
        self._names: set[str] = set()

    def take(self, entry: dict[str, Any]) -> None:
        number, name = _once("id", _id(entry, "id"), self.ids), entry.get("name")
        if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME or not _utf8(name):
            raise _WrongEntryError(f"expected a name, found {shortened(name)!r}")
        self.found[number] = _once("name", name, self._names)


class _Images:
    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.found: dict[int, tuple[str, tuple[int, int] | None]] = {}  # id → file, size
        self._files: set[str] = set()

    def take(self, entry: dict[str, Any]) -> None:
        number, name = _once("id", _id(entry, "id"), self.ids), entry.get("file_name")
        sides = entry.get("height"), entry.get("width")
        if not plain_path(name):
            raise _WrongEntryError(f"expected a file_name below the folder of images, found {shortened(name)!r}")
        name = _once("file_name", PurePosixPath(str(name)).as_posix(), self._files)
        if sides != (None, None) and not all(type(side) is int and 0 < side <= _MAX_NUMBER for side in sides):
            raise _WrongEntryError(f"{name}: expected height and width in pixels, found {shortened(list(sides))}")
        self.found[number] = name, None if sides == (None, None) else (int(str(sides[0])), int(str(sides[1])))


class _Boxes:
    def __init__(self, labels: dict[int, int], of_image: dict[int, list[CocoBox]]) -> None:
        self.of_image = of_image  # by the image's id
        self.empty = 0
        self._labels = labels  # by the category's id
        self._ids: set[int] = set()

    def take(self, entry: dict[str, Any]) -> None:
        number = _once("id", _id(entry, "id"), self._ids)
        image, category = _id(entry, "image_id"), _id(entry, "category_id")
        if image not in self.of_image:
            raise _WrongEntryError(f"id {number}: of image {image}, which images do not name")
        if category not in self._labels:
            raise _WrongEntryError(f"id {number}: of category {category}, which categories do not name")
        box, crowd = entry.get("bbox"), entry.get("iscrowd", 0)
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise _WrongEntryError(f"id {number}: expected bbox as four numbers of pixels, found {shortened(box)}")
        left, top, width, height = map(float, box)
        if width < 0 or height < 0:
            raise _WrongEntryError(f"id {number}: expected width and height >= 0, found {width:g} x {height:g}")
        if isinstance(crowd, float) or crowd not in (0, 1):
            raise _WrongEntryError(f"id {number}: expected 0 or 1 as iscrowd, found {shortened(crowd)}")
        right, bottom = left + width, top + height
        if left == right or top == bottom:  # COCO's own training file has two (cocodataset/cocoapi#355)
            self.empty += 1
        else:
            self.of_image[image].append(
                CocoBox(number, self._labels[category], (left, top, right, bottom), bool(crowd))
            )


def _id(entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _WrongEntryError(f"expected a whole number as {key}, found {shortened(value)}")
    return value


def _once(key: str, value: Value, seen: set[Value]) -> Value:
    if value in seen:
        raise _WrongEntryError(f"{key} {shortened(value)} is given twice")
    seen.add(value)
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_NUMBER  # NaN is not


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
