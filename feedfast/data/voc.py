"""Pascal VOC's files: lists of image names, one XML file of boxes per image, and where they lie.

    VOC2007/JPEGImages/000005.jpg
            Annotations/000005.xml
            SegmentationClass/000032.png
            ImageSets/Main/trainval.txt, ImageSets/Segmentation/train.txt

Coordinates in the XML count pixels from 1 and include the last one: (xmin - 1, ymin - 1, xmax, ymax) are the edges.
XML may come from anybody: it is UTF-8 of at most 1 MiB without DOCTYPE, so that no entity is ever expanded.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feedfast.data.dense import Asked, Faults, names_in, plain_path, shortened
from feedfast.data.images import EXTENSIONS, Unreadable
from feedfast.errors import RequestError
from feedfast.files import read_file

__all__ = ["VOC_CLASSES", "VocBox", "VocList", "common_root", "is_voc", "read_boxes", "voc_images", "voc_lists"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_MAX_LIST_BYTES = 64 << 20
_MAX_XML_BYTES = 1 << 20
_MAX_NUMBER = 1e9


@dataclass(frozen=True)
class VocList:
    """The images one of VOC's lists names."""

    path: Path
    folder: Path  # absolute, VOC2007/ or the like
    names: tuple[str, ...]


@dataclass(frozen=True)
class VocBox:
    """An object of an XML file: class name, left, top, right, bottom as edges in pixels, whether it is difficult."""

    name: str
    xyxy: tuple[float, float, float, float]
    difficult: bool


def is_voc(folder: Path) -> bool:
    """Whether a folder is laid out as VOC's."""
    return os.path.isdir(folder / "JPEGImages")


def voc_lists(
    paths: Sequence[Path], part: Literal["Main", "Segmentation"], asked: Asked, expected: str
) -> list[VocList]:
    """The lists that some paths name: list files, or VOC's folders, of which the split decides.

    In ``Main``, a folder that has ``test.txt`` (VOC2007) is trained on ``trainval.txt`` and validated on ``test.txt``;
    else it is ``train.txt`` and ``val.txt``, as always in ``Segmentation``.

    Raises:
        RequestError: another path, a list that is missing or cannot be read, or a line that is not one image name.
    """
    found = []
    for path in paths:
        if is_voc(path):
            sets = path / "ImageSets" / part
            whole = part == "Main" and all(os.path.isfile(sets / f"{kind}.txt") for kind in ("trainval", "test"))
            kind = {"train": "trainval", "val": "test"}[asked.split] if whole else asked.split
            if not os.path.isfile(sets / f"{kind}.txt"):
                raise RequestError(
                    f"{sets / kind}.txt: expected VOC's list of image names, one per line, found no file"
                )
            found.append(_list(sets / f"{kind}.txt", path.absolute()))
        elif os.path.isfile(path) and path.absolute().parent.parent.name == "ImageSets":
            found.append(_list(path, path.absolute().parent.parent.parent))
        else:
            below = [name for name in names_in(path) if is_voc(path / name)] if os.path.isdir(path) else []
            hint = f", found {', '.join(below[:3])} in it; name {path / below[0]}" if below else ""
            raise RequestError(f"{path}: expected {expected}{hint}")
    return found


def _list(path: Path, folder: Path) -> VocList:
    try:
        lines = read_file(path, _MAX_LIST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: expected a list of image names in UTF-8, one per line: {error}") from error
    names = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if not plain_path(name) or "/" in name or len(name.split()) > 1:
            raise RequestError(
                f"{path}, line {number}: expected the name of one image without folder and extension, "
                f"found {shortened(name)!r}"
            )
        names.append(name)
    if not names:
        raise RequestError(f"{path}: expected image names, one per line, found none")
    return VocList(path, folder, tuple(names))


def common_root(lists: Sequence[VocList]) -> Path:
    """The folder that names of images are relative to; the lists' folders are below it."""
    return Path(os.path.commonpath([at.folder for at in lists]))


def voc_images(at: VocList, seen: set[str], faults: Faults) -> list[Path]:
    """The images that a list names, those that are missing or listed twice going into ``faults``.

    Args:
        at: the list.
        seen: paths of images that were listed before; more are put in.
        faults: where they go.
    """
    place = at.folder / "JPEGImages"
    held: dict[str, list[str]] = {}
    for name in names_in(place):
        stem, extension = os.path.splitext(name)
        if extension.lower() in EXTENSIONS:
            held.setdefault(stem, []).append(name)
    found = []
    for name in at.names:
        files = held.get(name, [])
        if len(files) != 1:
            what = f"several: {', '.join(files[:3])}" if files else "none"
            faults.add(at.path, f"{name}: expected one image of that name in {place}, found {what}")
            continue
        path = place / files[0]
        real = os.path.realpath(path)
        if real in seen:
            faults.add(at.path, f"{name}: listed twice")
            continue
        seen.add(real)
        found.append(path)
    return found


def read_boxes(path: Path) -> tuple[tuple[int, int] | None, list[VocBox], list[str]]:
    """Objects of an XML file.

    Returns:
        Height and width that it says the image has (None if it does not say), the boxes, and what is wrong with others.

    Raises:
        Unreadable: no XML file of VOC's kind.
    """
    try:
        text = read_file(path, _MAX_XML_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"expected UTF-8: {error}") from error
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise Unreadable("expected XML without DOCTYPE and entities, which could be anything")
    try:
        tree = ET.fromstring(text)  # text, not bytes: what encoding the file says it has is not asked
    except (ET.ParseError, ValueError) as error:
        raise Unreadable(f"no XML: {error}") from error
    if tree.tag != "annotation":
        raise Unreadable(f"expected <annotation>, found <{shortened(tree.tag)}>")
    boxes, wrong = [], []
    for number, node in enumerate(tree.findall("object")):
        try:
            boxes.append(_box(node))
        except ValueError as error:
            wrong.append(f"object {number}: {error}")
    return _size(tree), boxes, wrong


def _size(tree: ET.Element) -> tuple[int, int] | None:
    size = tree.find("size")
    if size is None:
        return None
    sides = [(size.findtext(key) or "").strip() for key in ("height", "width")]
    if not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        raise Unreadable(f"expected a size in pixels, found {shortened(' x '.join(sides))!r}")
    return int(sides[0]), int(sides[1])


def _box(node: ET.Element) -> VocBox:
    name = (node.findtext("name") or "").strip()
    corners = node.find("bndbox")
    if corners is None:
        raise ValueError("expected a <bndbox>, found none")
    values = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = (corners.findtext(key) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) <= _MAX_NUMBER:
            raise ValueError(f"expected a number as {key}, found {shortened(text)!r}")
        values.append(value)
    left, top, right, bottom = values
    if right < left or bottom < top:
        raise ValueError(f"expected xmin <= xmax and ymin <= ymax, found {left:g} {top:g} {right:g} {bottom:g}")
    difficult = (node.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"expected 0 or 1 as difficult, found {shortened(difficult)!r}")
    return VocBox(name, (left - 1, top - 1, right, bottom), difficult == "1")
