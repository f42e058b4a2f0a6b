"""Small detection sets in COCO's and VOC's form, and what of them is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from feedfast.data.annotations import Boxes
from feedfast.data.dataset import Dataset, open_dataset

HEIGHT, WIDTH = 30, 40
Box = tuple[float, float, float, float]  # left, top, right, bottom


def photo(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (9, 99, 199)).save(path, exif=exif)


def detect(source: Path | list[Path], **options: Any) -> Dataset:
    return open_dataset(source, task="detect", **options)


def boxes_of(data: Dataset) -> Boxes:
    assert isinstance(data.annotations, Boxes)
    return data.annotations


def listed(data: Dataset) -> list[list[tuple[int, Box, bool]]]:
    """Per sample class number, edges and difficulty of each box."""
    marks, out = boxes_of(data), []
    for start, end in zip(marks.starts[:-1], marks.starts[1:], strict=True):
        rows = zip(marks.labels[start:end], marks.xyxy[start:end], marks.difficult[start:end], strict=True)
        out.append([(int(label), tuple(box.tolist()), bool(hard)) for label, box, hard in rows])
    return out


def document(boxes: list[list[tuple[int, Box]]]) -> dict[str, Any]:
    """COCO's JSON of images 0.jpg, 1.jpg, ... with ids 10, 20, ...; categories 7 and 3, out of order."""
    annotations = [
        {"image_id": 10 * (at + 1), "category_id": (3, 7)[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
         "segmentation": [[x0, y0, x1, y1]], "area": 1.0}
        for at, own in enumerate(boxes)
        for label, (x0, y0, x1, y1) in own
    ]  # fmt: skip
    return {
        "info": {"year": 2026},
        "images": [
            {"id": 10 * (at + 1), "file_name": f"{at}.jpg", "height": HEIGHT, "width": WIDTH}
            for at in range(len(boxes))
        ],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(annotations, 100)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


THREE: list[list[tuple[int, Box]]] = [[(0, (1.5, 2, 11, 12)), (1, (0, 0, 40, 30))], [], [(1, (18, 13, 22, 17))]]


def coco(root: Path, boxes: list[list[tuple[int, Box]]] | None = None, name: str = "train.json") -> Path:
    content = document(THREE if boxes is None else boxes)
    for image in content["images"]:
        photo(root / "train" / image["file_name"])
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return root / name


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


XML = """<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>{difficult}<bndbox><xmin>{box[0]}</xmin>
<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def xml(name: str, objects: list[tuple[str, tuple[Any, ...], bool | None]]) -> str:
    """A file in VOC's manner; boxes are (xmin, ymin, xmax, ymax) as written there."""
    texts = [
        OBJECT.format(name=kind, box=box, difficult="" if hard is None else f"<difficult>{int(hard)}</difficult>")
        for kind, box, hard in objects
    ]
    return XML.format(name=name, objects="".join(texts))


def voc(root: Path, lists: dict[str, list[str]]) -> Path:
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for kind, names in lists.items():
        (root / "ImageSets" / "Main" / f"{kind}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            photo(root / "JPEGImages" / f"{name}.jpg")
            content = xml(name, [("dog", (8, 9, 17, 20), True), ("person", (1, 1, 40, 30), None)])
            (root / "Annotations" / f"{name}.xml").write_text(content)
    return root
