"""Boxes for detection from masks of classes: each connected part of a class becomes a box of a COCO JSON.

    python tools/boxes_of_masks.py DATA/camvid/train --classes DATA/camvid/classes.txt \\
        --of Car Pedestrian Bicyclist --out runs/camvid-boxes/train.json

A folder holds images/ and masks/ of equal stems; masks are 8-bit gray PNGs of class numbers. Masks know classes, not
objects: cars that touch become one box, and a car behind a pole becomes two unless the boxes of its parts overlap,
which are merged. So the boxes serve to measure whether a detector learns, and are no benchmark. The images lie behind
a link next to the JSON, named as it is; the folder of the masks is only read. With ``--tiles`` images are cut first, so
that a small network sees objects at their own scale. The same masks give the same bytes. The last line of stdout is one
JSON document: images and boxes per class.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def boxes_of(region: NDArray[np.bool_], least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Boxes around the connected parts of a region; those that overlap are one.

    Args:
        region: bool [H, W], the pixels of one class.
        least: pixels that a part must have; smaller ones are left out before any are merged.

    Returns:
        int64 [boxes, 4], left, top, right, bottom (the last two one past the last pixel), sorted by top, then left; and
        int64 [boxes], the class's pixels in the parts of each.
    """
    labeled, _ = ndimage.label(region, np.ones((3, 3)))  # corners connect
    pixels = np.bincount(labeled.ravel())
    found: list[list[int]] = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labeled), start=1):
        if pixels[number] >= least:
            found.append([columns.start, rows.start, columns.stop, rows.stop, int(pixels[number])])
    while (pair := _first_overlap(found)) is not None:
        one, other = pair
        b = found.pop(other)
        a = found[one]
        found[one] = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]), a[4] + b[4]]
    table = np.array(sorted(found, key=lambda box: (box[1], box[0], box[3], box[2])), np.int64).reshape(-1, 5)
    return table[:, :4], table[:, 4]


def _first_overlap(boxes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    for one, a in enumerate(boxes):
        for other in range(one + 1, len(boxes)):
            b = boxes[other]
            if all(min(a[axis + 2], b[axis + 2]) > max(a[axis], b[axis]) for axis in (0, 1)):
                return one, other
    return None


def coco_of(folder: Path, classes: Sequence[str], wanted: Sequence[str], least: int) -> dict[str, Any]:
    """The COCO document of a folder of images/ and masks/.

    Args:
        folder: holds both.
        classes: names by the masks' class numbers.
        wanted: those that get boxes; category 1 is the first.
        least: see `boxes_of`.

    Raises:
        ValueError: a class is unknown, an image or its mask is missing, a mask is no 8-bit gray PNG or of another size
            than its image; every such file is named.
    """
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise ValueError(f"--of: expected some of {', '.join(classes)}; found {', '.join(unknown)}")
    files = sorted(path for path in _listed(folder / "images") if path.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{folder / 'images'}: expected images ({', '.join(IMAGES)}), found none")
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(wanted, start=1)],
    }
    problems = [
        f"{path}: no image of its stem in images/"
        for path in sorted(_listed(folder / "masks"))
        if path.stem not in {file.stem for file in files}
    ]
    for number, path in enumerate(files, start=1):
        mask_path = folder / "masks" / f"{path.stem}.png"
        with Image.open(path) as image:
            size = image.size
        try:
            mask = _mask(mask_path, size)
        except (OSError, ValueError) as why:
            problems.append(f"{mask_path}: {why}")
            continue
        document["images"].append({"id": number, "file_name": path.name, "width": size[0], "height": size[1]})
        for category, name in enumerate(wanted, start=1):
            boxes, pixels = boxes_of(mask == classes.index(name), least)
            document["annotations"] += [
                {
                    "id": len(document["annotations"]) + offset,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": area,
                    "iscrowd": 0,
                }
                for offset, ((left, top, right, bottom), area) in enumerate(
                    zip(boxes.tolist(), pixels.tolist(), strict=True), start=1
                )
            ]
    if problems:
        raise ValueError("\n  ".join([f"{folder}: {len(problems)} files do not fit together:", *problems]))
    return document


def tiled(folder: Path, out: Path, side: int) -> Path:
    """Cut images and masks into squares, as few per row and column as cover them; neighbors overlap alike.

    Args:
        folder: holds images/ and masks/ of equal stems.
        out: becomes such a folder, of PNGs named STEM-row-column.
        side: of the squares in pixels; no image may be smaller.

    Raises:
        ValueError: an image is smaller.
    """
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for path in sorted(path for path in _listed(folder / "images") if path.suffix.lower() in IMAGES):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        mask = _mask(folder / "masks" / f"{path.stem}.png", (pixels.shape[1], pixels.shape[0]))
        if min(mask.shape) < side:
            raise ValueError(f"{path}: expected at least {side} pixels per side, found {list(mask.shape)}")
        tops, lefts = (np.linspace(0, n - side, -(-n // side)).round().astype(int).tolist() for n in mask.shape)
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                window = np.s_[top : top + side, left : left + side]
                name = f"{path.stem}-{row}-{column}.png"
                Image.fromarray(pixels[window]).save(out / "images" / name)
                Image.fromarray(mask[window]).save(out / "masks" / name)
    return out


def without_empty(document: dict[str, Any]) -> dict[str, Any]:
    """The document without the images that have no box."""
    boxed = {entry["image_id"] for entry in document["annotations"]}
    return {**document, "images": [image for image in document["images"] if image["id"] in boxed]}


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found none")
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _mask(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        if image.mode != "L":  # of a palette PNG the numbers are there, too, but then it is not what this was made for
            raise ValueError(f"expected an 8-bit gray PNG of class numbers, found mode {image.mode}")
        if image.size != size:
            raise ValueError(f"expected the image's {size[0]}x{size[1]} pixels, found {image.size[0]}x{image.size[1]}")
        return np.asarray(image)


def write(document: dict[str, Any], images: Path, out: Path) -> None:
    """Write ``out`` and the link to ``images`` next to it that bears its stem.

    Raises:
        ValueError: something else lies there.
    """
    link = out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() != images.resolve():
        raise ValueError(f"{link}: expected a link to {images.resolve()}, found one to {link.resolve()}")
    if not link.is_symlink():
        if link.exists():
            raise ValueError(f"{link}: expected nothing or a link to {images.resolve()}, found something else")
        link.symlink_to(images.resolve(), target_is_directory=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document) + "\n")
    temporary.replace(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds images/ and masks/")
    parser.add_argument("--classes", type=Path, required=True, help="names of the masks' classes, one per line")
    parser.add_argument("--of", nargs="+", required=True, help="names of the classes that get boxes")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--least", type=int, default=200, help="pixels of the smallest part that gets a box")
    parser.add_argument(
        "--tiles", type=int, default=0, help="cut squares of this side first, and keep those with boxes"
    )
    args = parser.parse_args(argv)
    try:
        folder = args.folder
        if args.tiles:
            folder = tiled(folder, args.out.with_name(f"{args.out.stem}-{args.tiles}"), args.tiles)
        classes = [line.strip() for line in args.classes.read_text(encoding="utf-8").splitlines() if line.strip()]
        document = coco_of(folder, classes, args.of, args.least)
        write(without_empty(document) if args.tiles else document, folder / "images", args.out)
    except (OSError, ValueError) as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    numbers = [entry["category_id"] for entry in document["annotations"]]
    counts = {entry["name"]: numbers.count(entry["id"]) for entry in document["categories"]}
    empty = len(document["images"]) - len({entry["image_id"] for entry in document["annotations"]})
    said = {"out": str(args.out), "images": len(document["images"]), "images_without_boxes": empty, "boxes": counts}
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
