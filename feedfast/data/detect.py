"""Detection data: any number of boxes per image, from COCO's JSON or Pascal VOC's XML files.

Boxes become edges in float32 pixels of the image as the loader turns it. They are drawn on the pixels as stored: that
is what pycocotools, torchvision's data sets and VOC's own kit show, none of which turns an image. So they are turned
with it, and a file that says a box was drawn on the turned image is refused: other files of that tool would be wrong
without a sign (a half turn has the same size).

Up to one pixel outside the image is cut off without a word, for rounding and for tools that count from 0 where VOC
counts from 1; more is a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedfast.data.annotations import Boxes, turn_boxes
from feedfast.data.coco import image_folder, read_coco
from feedfast.data.dense import Asked, Faults, Opened, class_names, names_in, scan, shortened, size_fault
from feedfast.data.headers import Header, Unreadable
from feedfast.data.voc import VOC_CLASSES, common_root, is_voc, read_boxes, voc_images, voc_lists
from feedfast.errors import RequestError

__all__ = ["DETECT_EXPECTED", "open_detect"]

DETECT_EXPECTED = (
    "COCO's JSON (.json), Pascal VOC's folder (VOC2007), a file of its ImageSets/Main, or a list of these two"
)

_OUTSIDE_PIXELS = 1.0


@dataclass
class _Objects:
    """What is marked on one image, in pixels as stored."""

    size: tuple[int, int] | None = None  # height, width of the image that boxes were drawn on, if it is said
    said: list[str] = field(default_factory=list)  # what each box is called in messages
    xyxy: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)

    def add(self, said: str, xyxy: tuple[float, float, float, float], label: int, difficult: bool) -> None:
        self.said.append(said)
        self.xyxy.append(xyxy)
        self.labels.append(label)
        self.difficult.append(difficult)


@dataclass(frozen=True)
class _Listing:
    """Images in order, and how to find what is marked on one of them, with what is wrong there."""

    root: Path
    files: Sequence[str]
    classes: tuple[str, ...]
    objects: Callable[[int], tuple[_Objects, list[str]]]
    taught: bool
    remarks: dict[str, int] = field(default_factory=dict)


def open_detect(paths: Sequence[Path], asked: Asked) -> Opened:
    """Find images and boxes, and look at those that are used.

    Args:
        paths: one JSON file, or VOC's folders and list files.
        asked: what else.

    Raises:
        RequestError: not one of the formats above, or faults, all counted: a missing image or XML file, what is named
            twice, an annotation of an unknown image, an unknown class, an unreadable file, an image of another size
            than is said, a box that is inverted or leaves its image.
    """
    faults = Faults()
    is_coco = paths[0].suffix.lower() == ".json"
    if is_coco and len(paths) > 1:
        raise RequestError(f"{asked.source}: expected one JSON file, found {len(paths)}")
    if len(paths) == 1 and os.path.isdir(paths[0]) and not is_voc(paths[0]):
        held = [name for name in names_in(paths[0]) if name.lower().endswith(".json")]
        if held:
            raise RequestError(
                f"{paths[0]}: expected {DETECT_EXPECTED}, found {', '.join(held[:3])} in it; name {paths[0] / held[0]}"
            )
    listing = _coco(paths[0], asked, faults) if is_coco else _voc(paths, asked, faults)
    if not listing.files:
        faults.refuse(asked.source, "images and boxes")
        raise RequestError(f"{asked.source}: expected images, found none")
    if not listing.classes:
        raise RequestError(f"{asked.source}: expected categories, found none")
    ids = asked.ids(len(listing.files))
    found: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]] | None] = [None] * len(ids)

    def look(at: int, header: Header | None) -> list[str]:
        try:
            objects, wrong = listing.objects(int(ids[at]))
        except Unreadable as why:
            return [str(why)]
        if header is None:
            return wrong
        doubtful = size_fault(header, objects.size) if objects.size is not None else None
        if doubtful:
            return [*wrong, doubtful]
        xyxy, outside = _within(objects, header)
        turned = turn_boxes(xyxy, header.orientation, header.height, header.width)
        found[at] = turned.astype(np.float32), np.array(objects.labels, np.int64), np.array(objects.difficult, np.bool_)
        return wrong + outside

    images = [listing.root / listing.files[i] for i in ids]
    sizes, _, remarks = scan(asked, images, faults, look)
    faults.refuse(asked.source, f"{len(ids)} images and their boxes")
    whole = [each for each in found if each is not None]
    marks = Boxes(
        np.concatenate([each[0] for each in whole]),
        np.concatenate([each[1] for each in whole]),
        np.concatenate([[0], np.cumsum([len(each[1]) for each in whole])]).astype(np.int64),
        listing.classes,
        difficult=np.concatenate([each[2] for each in whole]),
        taught=listing.taught,
    )
    return Opened(listing.root, tuple(listing.files), ids, sizes, marks, remarks={**listing.remarks, **remarks})


def _within(objects: _Objects, header: Header) -> tuple[NDArray[np.float64], list[str]]:
    """Boxes cut to the image as stored, and what is wrong with those that leave it."""
    xyxy = np.array(objects.xyxy, dtype=np.float64).reshape(-1, 4)
    limits = np.array([header.width, header.height] * 2, dtype=np.float64)
    cut = xyxy.clip(0, limits)
    far = (np.abs(cut - xyxy) > _OUTSIDE_PIXELS).any(axis=1)
    gone = (cut[:, 2:].astype(np.float32) <= cut[:, :2].astype(np.float32)).any(axis=1)
    wrong = [
        f"{objects.said[at]}: expected a box within the image of {header.height}x{header.width} pixels, found "
        f"left {xyxy[at, 0]:g}, top {xyxy[at, 1]:g}, right {xyxy[at, 2]:g}, bottom {xyxy[at, 3]:g}"
        for at in np.flatnonzero(far | gone).tolist()
    ]
    return cut, wrong


def _coco(path: Path, asked: Asked, faults: Faults) -> _Listing:
    if asked.classes:
        raise RequestError(f"classes: expected none with COCO's JSON, which names its own, found {asked.classes[:3]}")
    read = read_coco(path, faults)
    root = image_folder(path, read.files)
    present = []
    for record, name in enumerate(read.files):
        if os.path.isfile(root / name):
            present.append(record)
        else:
            faults.add(root / name, "no such image; images lie next to the JSON file, or in a folder of its name")

    def objects(place: int) -> tuple[_Objects, list[str]]:
        record = present[place]
        out = _Objects(read.sizes[record])
        for box in read.boxes[record]:
            out.add(f"annotation {box.id} of {path.name}", box.xyxy, box.label, box.crowd)
        return out, []

    remarks = {"a box without width or height, which is left out": read.empty} if read.empty else {}
    return _Listing(root, [read.files[record] for record in present], read.classes, objects, False, remarks)


def _voc(paths: Sequence[Path], asked: Asked, faults: Faults) -> _Listing:
    lists = voc_lists(paths, "Main", asked, DETECT_EXPECTED)
    classes = class_names(asked, [folder for at in lists for folder in (at.folder, at.folder.absolute().parent)])
    classes = classes or VOC_CLASSES
    number_of = {name: number for number, name in enumerate(classes)}
    root, seen = common_root(lists), set[str]()
    files: list[str] = []
    marked: list[Path] = []
    for at in lists:
        for image in voc_images(at, seen, faults):
            file = at.folder / "Annotations" / f"{image.stem}.xml"
            if not os.path.isfile(file):
                faults.add(image, f"has no annotation {file}")
                continue
            files.append(image.relative_to(root).as_posix())
            marked.append(file)

    def objects(place: int) -> tuple[_Objects, list[str]]:
        path = marked[place]
        try:
            size, boxes, wrong = read_boxes(path)
        except Unreadable as why:
            raise Unreadable(f"its annotation {path}: {why}") from why
        out = _Objects(size)
        wrong = [f"its annotation {path}: {why}" for why in wrong]
        for number, box in enumerate(boxes):
            if box.name not in number_of:
                wrong.append(
                    f"its annotation {path}: expected a class of {_named(classes)}, found {_named((box.name,))}"
                )
                continue
            out.add(f"box {number} of {path}", box.xyxy, number_of[box.name], box.difficult)
        return out, wrong

    return _Listing(root, files, classes, objects, True)


def _named(names: Sequence[Any]) -> str:
    shown = ", ".join(repr(shortened(name)) for name in names[:5])
    return shown + (f" and {len(names) - 5} more (classes.txt names others)" if len(names) > 5 else "")
