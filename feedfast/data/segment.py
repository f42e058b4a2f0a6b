"""Segmentation data: an image and a mask of class numbers per sample, as two folders or as Pascal VOC lays them out.

``images/`` and ``masks/`` with files of equal stems, in a folder or in its ``train/`` and ``val/``; order is by name.
VOC: the folder with ``JPEGImages/``, or files of names in its ``ImageSets/Segmentation/``; order is the file's.

Every mask that is used is decoded when the data is opened, for its size and its class numbers. What identifies it is
the decoded numbers and not the file: packing a palette as gray changes nothing that is learned.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from feedfast.data.annotations import IGNORE, Masks, turn_mask
from feedfast.data.dense import Asked, Faults, Opened, by_stem, class_names, names_in, scan
from feedfast.data.folder import list_images
from feedfast.data.headers import Header, Unreadable
from feedfast.data.images import EXTENSIONS, read_image
from feedfast.data.masks import MaskFiles, index_plane, largest_class, mask_digest
from feedfast.data.voc import VOC_CLASSES, VocList, common_root, is_voc, voc_images, voc_lists
from feedfast.errors import RequestError

__all__ = ["SEGMENT_EXPECTED", "open_segment"]

SEGMENT_EXPECTED = (
    "a folder with images/ and masks/ (or train/ and val/ with them), Pascal VOC's folder (VOC2012), or files of its "
    "ImageSets/Segmentation"
)

_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
_MOST_CLASSES = IGNORE
_SPLITS = ("train", "val", "test", "trainval")  # their names lie above them
_TOO_DEEP = "images and masks lie in images/ and masks/ themselves; with train/ and val/, these hold images/ and masks/"


@dataclass
class _Listing:
    """Images with their masks, in order."""

    root: Path
    files: list[str]  # images, relative to root
    masks: list[Path]
    classes: tuple[str, ...]
    skipped: dict[str, int] = field(default_factory=dict)


def open_segment(paths: Sequence[Path], asked: Asked) -> Opened:
    """Find images and masks, and look at those that are used.

    Args:
        paths: one folder, or VOC's folders and list files.
        asked: what else.

    Raises:
        RequestError: not one of the layouts above, or faults, all counted: a missing image or mask, two files for one
            stem, an unreadable image or mask, a mask of another size, a class number that has no name.
    """
    faults = Faults()
    listing = _listed(paths, asked, faults)
    if not listing.files:
        faults.refuse(asked.source, "images and masks")
        raise RequestError(f"{asked.source}: expected images with masks, found none")
    if len(listing.classes) > _MOST_CLASSES:
        raise RequestError(f"{asked.source}: expected at most {_MOST_CLASSES} classes, found {len(listing.classes)}")
    ids = asked.ids(len(listing.files))
    images, masks = [listing.root / listing.files[i] for i in ids], [listing.masks[i] for i in ids]
    count = len(listing.classes)
    digests, largest = [b""] * len(ids), np.full(len(ids), -1, dtype=np.int64)

    def look(at: int, header: Header | None) -> list[str]:
        try:
            plane = index_plane(read_image(masks[at]), header)
        except Unreadable as why:
            return [f"its mask {masks[at]}: {why}"]
        largest[at] = largest_class(plane)
        digests[at] = mask_digest(turn_mask(plane, 1 if header is None else header.orientation))
        if count and largest[at] >= count:
            values = ", ".join(str(value) for value in np.unique(plane) if count <= value != IGNORE)
            return [f"its mask {masks[at]}: expected classes 0 to {count - 1} and {IGNORE}, found {values}"]
        return []

    sizes, turns, remarks = scan(asked, images, faults, look)
    faults.refuse(asked.source, f"{len(ids)} images and masks")
    if count > 1 and largest.max() < 1 and len(ids) == len(listing.files):
        _refuse_one_class(asked, int(largest.max()))
    classes = listing.classes or _numbered(asked, listing, set(ids.tolist()), int(largest.max()))
    digest = hashlib.sha256(b"".join(digests)).hexdigest()
    marks = Masks(MaskFiles(tuple(masks), turns, tuple(digests)), digest, classes)
    return Opened(listing.root, tuple(listing.files), ids, sizes, marks, listing.skipped, remarks)


def _numbered(asked: Asked, listing: _Listing, seen: set[int], largest: int) -> tuple[str, ...]:
    """Names for classes that have none. A limit must not change how many there are: the other masks are read, too."""
    faults = Faults()
    for record, path in enumerate(listing.masks):
        if record not in seen:
            try:
                largest = max(largest, largest_class(index_plane(read_image(path))))
            except Unreadable as why:
                faults.add(path, str(why))
    faults.refuse(asked.source, f"{len(listing.masks)} masks")
    if largest < 1:
        _refuse_one_class(asked, largest)
    return tuple(str(number) for number in range(largest + 1))


def _refuse_one_class(asked: Asked, largest: int) -> NoReturn:
    raise RequestError(
        f"{asked.source}: expected masks of two classes or more, found none but {max(largest, 0)} and {IGNORE}, "
        "which is ignored; write classes as 0, 1, ..."
    )


def _listed(paths: Sequence[Path], asked: Asked, faults: Faults) -> _Listing:
    first = paths[0]
    if len(paths) == 1 and not is_voc(first):
        for folder in (first, first / asked.split):
            if os.path.isdir(folder / "images") and os.path.isdir(folder / "masks"):
                return _folders(folder, asked, faults)
    return _voc(voc_lists(paths, "Segmentation", asked, SEGMENT_EXPECTED), asked, faults)


def _folders(folder: Path, asked: Asked, faults: Faults) -> _Listing:
    images, masks = folder / "images", folder / "masks"
    for place in (images, masks):
        below = [name for name in names_in(place) if os.path.isdir(place / name)]
        if below:
            raise RequestError(f"{place}: expected files, found the folders {', '.join(below[:3])}; {_TOO_DEEP}")
    found = list_images(images)
    # Links and all: many images may share one mask.
    held = [name for name in names_in(masks) if os.path.splitext(name)[1].lower() in EXTENSIONS]
    image_of, mask_of = by_stem(found.files, faults, images), by_stem(held, faults, masks)
    for stem, name in image_of.items():
        if stem not in mask_of:
            faults.add(images / name, f"has no mask {masks / stem}.png")
    for stem, name in mask_of.items():
        if stem not in image_of:
            faults.add(masks / name, f"has no image of that stem in {images}")
    pairs = [(f"images/{name}", masks / mask_of[stem]) for stem, name in image_of.items() if stem in mask_of]
    return _Listing(
        folder,
        [image for image, _ in pairs],
        [mask for _, mask in pairs],
        class_names(asked, (folder, folder.absolute().parent) if folder.absolute().name in _SPLITS else (folder,)),
        found.skipped,
    )


def _voc(lists: Sequence[VocList], asked: Asked, faults: Faults) -> _Listing:
    names = class_names(asked, [folder for at in lists for folder in (at.folder, at.folder.absolute().parent)])
    out = _Listing(common_root(lists), [], [], names or ("background", *VOC_CLASSES))
    seen: set[str] = set()
    for at in lists:
        images = voc_images(at, seen, faults)
        folder = _mask_folder(at.folder, [f"{image.stem}.png" for image in images])
        for image in images:
            mask = folder / f"{image.stem}.png"
            if not os.path.isfile(mask):
                faults.add(image, f"has no mask {mask}")
                continue
            out.files.append(image.relative_to(out.root).as_posix())
            out.masks.append(mask)
    return out


def _mask_folder(folder: Path, names: Sequence[str]) -> Path:
    """The first of the two folders that has all the masks, else the one that has most."""
    places = [folder / kind for kind in _MASK_FOLDERS]
    return min(places, key=lambda place: sum(not os.path.isfile(place / name) for name in names))
