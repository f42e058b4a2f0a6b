"""Pascal VOC's XML: boxes as they are written, lists and splits, and every way in which it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from boxed import boxes_of, detect, listed, photo, voc

from feedfast.data.geometry import Geometry
from feedfast.errors import RequestError


def test_voc(tmp_path: Path) -> None:
    """Pixels are counted from 1 and the last one belongs to the box."""
    root = voc(tmp_path / "VOC2007", {"trainval": ["000002", "000001"], "test": ["000003"], "train": ["000001"]})
    data = detect(root)
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (20, "aeroplane", "tvmonitor")
    assert data.files == ("JPEGImages/000002.jpg", "JPEGImages/000001.jpg")
    assert listed(data)[1] == [(11, (7, 8, 17, 20), True), (14, (0, 0, 40, 30), False)]
    assert detect(root, split="val").files == ("JPEGImages/000003.jpg",)
    same = [np.array([value], np.int32) for value in ((30, 40), (0, 0, 30, 40), (40, 40), (0, 0))]
    taught = boxes_of(data).at(np.array([1]), Geometry(*same, np.zeros(1, np.int32)), 40)[0]
    assert taught["labels"].tolist() == [11, 14]  # VOC's difficult objects are learned from
    # without test.txt, trainval would hold what is validated on
    (root / "ImageSets" / "Main" / "test.txt").unlink()
    assert detect(root).files == ("JPEGImages/000001.jpg",)
    with pytest.raises(RequestError, match=r"Main/val.txt: expected VOC's list of image names"):
        detect(root, split="val")


def test_voc_07_and_12(tmp_path: Path) -> None:
    first = voc(tmp_path / "VOC2007", {"trainval": ["000001"], "test": ["000009"]})
    second = voc(tmp_path / "VOC2012", {"trainval": ["2008_000002", "2008_000001"]})
    lists = [folder / "ImageSets" / "Main" / "trainval.txt" for folder in (first, second)]
    data = detect(lists)
    assert data.root == tmp_path
    assert [data.name(at) for at in range(3)] == [
        "VOC2007/JPEGImages/000001.jpg",
        "VOC2012/JPEGImages/2008_000002.jpg",
        "VOC2012/JPEGImages/2008_000001.jpg",
    ]
    assert [len(own) for own in listed(data)] == [2, 2, 2]
    assert detect([first, lists[1]]).fingerprint() == data.fingerprint()
    with pytest.raises(RequestError, match="000001: listed twice"):
        detect([first, first])


def test_other_classes_in_vocs_form(tmp_path: Path) -> None:
    root = voc(tmp_path / "own", {"train": ["1"]})
    (root / "classes.txt").write_text("person\ndog\n")
    data = detect(root)
    assert (data.classes, [label for label, _, _ in listed(data)[0]]) == (("person", "dog"), [1, 0])
    assert [label for label, _, _ in listed(detect(root, classes=["x", "dog", "person"]))[0]] == [1, 2]
    with pytest.raises(RequestError, match="expected a class of 'cat', found 'dog'"):
        detect(root, classes=["cat"])


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>'
XML_FAULTS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "unknown class": (lambda t: t.replace("dog", "dragon"), "expected a class of 'aeroplane', .* found 'dragon'"),
    "inverted": (lambda t: t.replace("<xmin>8<", "<xmin>18<"), "object 0: expected xmin <= xmax"),
    "outside": (lambda t: t.replace("<xmax>17<", "<xmax>42<"), "box 0 of .*1.xml: expected a box within"),
    "no number": (lambda t: t.replace("<xmin>8<", "<xmin>nan<"), "object 0: expected a number as xmin, found 'nan'"),
    "no corner": (lambda t: t.replace("<xmin>8</xmin>", ""), "object 0: expected a number as xmin, found ''"),
    "no box": (lambda t: t.replace("bndbox", "box", 2), "object 0: expected a <bndbox>, found none"),
    "difficult": (lambda t: t.replace("difficult>1", "difficult>2"), "expected 0 or 1 as difficult, found '2'"),
    "another size": (lambda t: t.replace("<width>40", "<width>41"), "has 30x40 pixels, its annotation says 30x41"),
    "no size": (lambda t: t.replace("<width>40", "<width>"), "expected a size in pixels"),
    "no XML": (lambda t: t[:-9], "1.xml: no XML"),
    "another XML": (lambda t: t.replace("annotation>", "svg>"), "expected <annotation>, found <svg>"),
    "a bomb": (lambda t: BOMB + t.replace("Left", "&y;"), "expected XML without DOCTYPE and entities"),
    "a file of the system": (
        lambda t: '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + t.replace("Left", "&x;"),
        "expected XML without DOCTYPE",
    ),
    "another code": (lambda t: (BOMB + t).encode("utf-16"), "expected UTF-8"),
    "deep": (lambda t: t.replace("Left", "<a>" * 70_000 + "</a>" * 70_000), ""),
    "long": (lambda t: t.replace("Left", "x" * (1 << 20)), "expected at most 1048576"),
}


@pytest.mark.parametrize("what", XML_FAULTS)
def test_vocs_faults_are_named(tmp_path: Path, what: str) -> None:
    root = voc(tmp_path, {"train": ["1", "2"]})
    edit, said = XML_FAULTS[what]
    path = root / "Annotations" / "1.xml"
    content = edit(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not said:  # strange and harmless
        assert len(listed(detect(root))[0]) == 2
        return
    with pytest.raises(RequestError, match=said) as caught:
        detect(root)
    assert len(str(caught.value).splitlines()) == 2
    assert str(caught.value).splitlines()[1].startswith(f"  {root}/JPEGImages/1.jpg: ")


def test_vocs_missing_files(tmp_path: Path) -> None:
    root = voc(tmp_path, {"train": ["1", "2", "3"]})
    (root / "Annotations" / "1.xml").unlink()
    (root / "JPEGImages" / "2.jpg").unlink()
    photo(root / "JPEGImages" / "3.png")
    with pytest.raises(RequestError) as caught:
        detect(root)
    assert str(caught.value).splitlines()[1:] == [
        f"  {root}/ImageSets/Main/train.txt: 2: expected one image of that name in {root}/JPEGImages, found none",
        f"  {root}/ImageSets/Main/train.txt: 3: expected one image of that name in {root}/JPEGImages, found several: "
        "3.jpg, 3.png",
        f"  {root}/JPEGImages/1.jpg: has no annotation {root}/Annotations/1.xml",
    ]
