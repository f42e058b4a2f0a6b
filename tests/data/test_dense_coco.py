"""COCO's JSON: boxes as pycocotools reads them, where the images lie, and every way in which it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boxed import boxes_of, coco, detect, edited, listed

from feedfast.data.geometry import Geometry
from feedfast.errors import RequestError


def test_coco(tmp_path: Path) -> None:
    data = detect(coco(tmp_path))
    assert (data.kind, data.root, data.files) == ("files", tmp_path / "train", ("0.jpg", "1.jpg", "2.jpg"))
    assert (data.classes, boxes_of(data).classes) == (("cat", "dog"), ("cat", "dog"))  # by category id
    assert listed(data) == [
        [(0, (1.5, 2, 11, 12), False), (1, (0, 0, 40, 30), False)],
        [],
        [(1, (18, 13, 22, 17), False)],
    ]
    assert boxes_of(data).xyxy.dtype == np.float32
    assert data.labels.tolist() == [-1] * 3
    last = detect(tmp_path / "train.json", limit=1)
    assert (last.ids.tolist(), len(listed(last)[0])) == ([0], 2)
    assert len(detect(tmp_path / "train.json", fraction=0.4)) == 1


def test_the_fingerprint_covers_what_is_marked(tmp_path: Path) -> None:
    path = coco(tmp_path)
    before = detect(path).fingerprint()
    edited(path, lambda content: content["annotations"].reverse())  # of other images: nothing changes between them
    edited(path, lambda content: content["annotations"].sort(key=lambda entry: entry["id"]))
    assert detect(path).fingerprint() == before
    found = {before["labels_sha256"]}
    for key, value in (("bbox", [1.5, 2, 9, 10]), ("category_id", 7), ("iscrowd", 1), ("image_id", 20)):
        edited(path, lambda content, key=key, value=value: content["annotations"][0].update({key: value}))  # type: ignore[misc]
        found.add(detect(path).fingerprint()["labels_sha256"])
    assert len(found) == 5


def test_crowds_are_marked_and_not_taught(tmp_path: Path) -> None:
    path = coco(tmp_path)
    edited(path, lambda content: content["annotations"][0].update(iscrowd=1))
    data = detect(path)
    assert [hard for _, _, hard in listed(data)[0]] == [True, False]
    same = [np.array([value], np.int32) for value in ((30, 40), (0, 0, 30, 40), (40, 40), (0, 0))]
    geometry = Geometry(*same, np.zeros(1, np.int32))
    assert boxes_of(data).at(np.array([0]), geometry, 40)[0]["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("train.json", "."), ("train.json", "train"), ("all.json", "images"), ("val.json", "val2017"),
        ("annotations/instances_val2017.json", "val2017"), ("annotations/train.json", "images/train"),
    ],
)  # fmt: skip
def test_where_cocos_images_lie(tmp_path: Path, file: str, images: str) -> None:
    path = coco(tmp_path, name=file)
    (tmp_path / "train").rename(tmp_path / "moved")
    (tmp_path / images).parent.mkdir(exist_ok=True)
    if images == ".":
        for image in (tmp_path / "moved").iterdir():
            image.rename(tmp_path / image.name)
    else:
        (tmp_path / "moved").rename(tmp_path / images)
    assert detect(path).root.resolve() == (tmp_path / images).resolve()  # type: ignore[union-attr]


def test_a_box_without_area_is_left_out(tmp_path: Path) -> None:
    """COCO's own train2017 has two of them."""
    path = coco(tmp_path)
    edited(path, lambda content: content["annotations"][2].update(bbox=[5, 6, 1.03, 0.0]))
    data = detect(path)
    assert listed(data)[2] == []
    assert data.remarks == {"a box without width or height, which is left out": 1}


def test_a_pixel_outside_is_cut_off(tmp_path: Path) -> None:
    path = coco(tmp_path, [[(0, (-0.7, -1, 41, 30.01))]])
    assert listed(detect(path)) == [[(0, (0, 0, 40, 30), False)]]
    edited(path, lambda content: content["annotations"][0].update(bbox=[-1.01, 0, 5, 5]))
    with pytest.raises(RequestError, match=r"annotation 100 of train.json: expected a box within the image of 30x40 "
                       r"pixels, found left -1.01, top 0, right 3.99, bottom 5"):  # fmt: skip
        detect(path)


Edit = Callable[[dict[str, Any]], object]
COCO_FAULTS: dict[str, tuple[Edit, str]] = {
    "outside": (lambda c: c["annotations"][0].update(bbox=[39, 0, 3, 3]), "annotation 100 of train.json: .* right 42"),
    "beyond": (lambda c: c["annotations"][0].update(bbox=[40, 0, 1, 3]), "annotation 100 of train.json: .* left 40"),
    "inverted": (lambda c: c["annotations"][0].update(bbox=[9, 9, -3, 3]), r"annotations\[0\]: id 100: .* -3 x 3"),
    "not finite": (lambda c: c["annotations"][0].update(bbox=[9, 9, float("inf"), 3]), "four numbers of pixels"),
    "true": (lambda c: c["annotations"][0].update(bbox=[9, 9, True, 3]), "four numbers of pixels"),
    "three numbers": (lambda c: c["annotations"][0].update(bbox=[9, 9, 3]), r"pixels, found \[9, 9, 3\]"),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "pixels, found None"),
    "unknown class": (lambda c: c["annotations"][0].update(category_id=4), "id 100: of category 4, which"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=4), "id 100: of image 4, which images do not name"),
    "annotation twice": (lambda c: c["annotations"][1].update(id=100), r"annotations\[1\]: id 100 is given twice"),
    "image twice": (lambda c: c["images"][1].update(id=10), r"images\[1\]: id 10 is given twice"),
    "file twice": (lambda c: c["images"][1].update(file_name="./0.jpg"), r"images\[1\]: file_name 0.jpg is given"),
    "name twice": (lambda c: c["categories"][1].update(name="dog"), r"categories\[1\]: name dog is given twice"),
    "class twice": (lambda c: c["categories"].append({"id": 7, "name": "x"}), r"categories\[2\]: id 7 is given twice"),
    "nameless class": (lambda c: c["categories"][1].pop("name"), r"categories\[1\]: expected a name, found 'None'"),
    "half a character": (lambda c: c["categories"][1].update(name="\ud800"), r"categories\[1\]: expected a name"),
    "text as id": (lambda c: c["images"].append({"id": "10"}), r"images\[3\]: expected a whole number as id, found 10"),
    "elsewhere": (lambda c: c["images"][0].update(file_name="../0.jpg"), r"images\[0\]: expected a file_name below"),
    "anywhere": (lambda c: c["images"][0].update(file_name="/etc/passwd"), r"images\[0\]: expected a file_name below"),
    "long name": (lambda c: c["images"][0].update(file_name="x" * 500), "x: no such image"),
    "missing image": (lambda c: c["images"][0].update(file_name="9.jpg"), "train/9.jpg: no such image"),
    "another size": (lambda c: c["images"][0].update(width=41), "0.jpg: the image has 30x40 pixels, .* says 30x41"),
    "no size": (lambda c: c["images"][0].update(width=0), r"images\[0\]: 0.jpg: expected height and width"),
    "crowd": (lambda c: c["annotations"][0].update(iscrowd=2), "id 100: expected 0 or 1 as iscrowd, found 2"),
    "a number": (lambda c: c["annotations"].append(7), r"annotations\[3\]: expected an object, found 7"),
}  # fmt: skip


@pytest.mark.parametrize("what", COCO_FAULTS)
def test_cocos_faults_are_named(tmp_path: Path, what: str) -> None:
    path, (edit, said) = coco(tmp_path), COCO_FAULTS[what]
    edited(path, edit)
    with pytest.raises(RequestError, match=said) as caught:
        detect(path)
    assert "images and their boxes that fit, found 1 fault:\n" in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = coco(tmp_path, [[(0, (1, 1, 99, 2)) for _ in range(30)], []])
    edited(path, lambda content: content["annotations"].append({"id": 1}))
    (tmp_path / "train" / "1.jpg").unlink()
    with pytest.raises(RequestError) as caught:
        detect(path)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("found 32 faults:")
    assert len(lines) == 21
    assert "annotations[30]" in lines[0]
    assert "1.jpg: no such image" in lines[1]
    assert lines[-1] == "  and 12 more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected COCO's JSON, found none"),
        ("[" * 100_000, "expected COCO's JSON, found none"),
        ("[]", "no images and no annotations and no categories"),
        ('{"images": [], "annotations": {}, "categories": []}', "found no annotations$"),
        ('{"images": [], "annotations": [], "categories": []}', "expected images, found none"),
        ("9" * 5000, "expected COCO's JSON, found none"),
    ],
)
def test_what_is_no_coco_file(tmp_path: Path, text: str, said: str) -> None:
    path = coco(tmp_path)
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        detect(path)


def test_requests(tmp_path: Path) -> None:
    path = coco(tmp_path)
    with pytest.raises(RequestError, match=r"found train.json in it; name .*/train.json"):
        detect(tmp_path)
    with pytest.raises(RequestError, match="expected one JSON file, found 2"):
        detect([path, path])
    with pytest.raises(RequestError, match="which names its own"):
        detect(path, classes=["a"])
    with pytest.raises(RequestError, match=r"dataset not found: .*; expected COCO's JSON"):
        detect(tmp_path / "x.json")


@pytest.mark.parametrize("which", ["train", "val"])
def test_real_coco_as_pycocotools_reads_it(shared_data: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    reader = pytest.importorskip("pycocotools.coco").COCO(str(shared_data / "coco128" / f"{which}.json"))
    capsys.readouterr()
    data = detect(shared_data / "coco128" / f"{which}.json")
    categories = sorted(reader.getCatIds())
    assert data.classes == tuple(entry["name"] for entry in reader.loadCats(categories))
    images = reader.loadImgs(reader.getImgIds())
    by_name = {image["file_name"]: image for image in images}
    assert sorted(data.files) == sorted(by_name)
    total = 0
    for at, own in enumerate(listed(data)):
        image = by_name[data.name(at)]
        expected = reader.loadAnns(reader.getAnnIds(imgIds=image["id"]))
        assert tuple(data.sizes[at]) == (image["height"], image["width"])
        assert [categories[label] for label, _, _ in own] == [entry["category_id"] for entry in expected]
        corners = np.array([entry["bbox"] for entry in expected], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found = np.array([box for _, box, _ in own]).reshape(-1, 4)
        np.testing.assert_allclose(found, corners, atol=0.011)  # two decimals, some a hundredth outside the image
        total += len(own)
    assert total == len(reader.anns)
