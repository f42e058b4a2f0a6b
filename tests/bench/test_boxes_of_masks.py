"""Boxes derived from masks: what is drawn into a mask comes back as its box; what does not fit together is named."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MODULE = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "boxes_of_masks.py"))
main, boxes_of = MODULE["main"], MODULE["boxes_of"]
VOID = 255


def flooded(region: np.ndarray, least: int) -> list[tuple[int, ...]]:
    """The same by flood fill and by hand: parts of enough pixels, then unions until no two boxes share a pixel."""
    seen = np.zeros_like(region)
    boxes = []
    for start in zip(*np.nonzero(region), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        stack, part = [start], []
        while stack:
            y, x = stack.pop()
            part.append((int(y), int(x)))
            for v in range(max(y - 1, 0), min(y + 2, region.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, region.shape[1])):
                    if region[v, u] and not seen[v, u]:
                        seen[v, u] = True
                        stack.append((v, u))
        if len(part) >= least:
            ys, xs = zip(*part, strict=True)
            boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1, len(part)))
    while True:
        for a in boxes:
            hit = [b for b in boxes if b is not a and a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
            if hit:
                b = hit[0]
                union = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]), a[4] + b[4])
                boxes = [box for box in boxes if box not in (a, b)] + [union]
                break
        else:
            return sorted(boxes, key=lambda box: (box[1], box[0]))


@pytest.mark.parametrize("seed", range(6))
def test_random_regions_against_a_flood_fill(seed: int) -> None:
    region = np.random.default_rng(seed).random((24, 31)) < (0.1, 0.14, 0.2)[seed % 3]
    boxes, pixels = boxes_of(region, 3)
    expected = flooded(region, 3)
    assert len(expected) > 0
    assert [(*box, count) for box, count in zip(boxes.tolist(), pixels.tolist(), strict=True)] == expected


def test_a_region_without_a_large_part_has_no_box() -> None:
    region = np.zeros((8, 8), bool)
    region[1:3, 1:3] = True
    assert [len(found) for found in boxes_of(region, 5)] == [0, 0]
    assert boxes_of(region, 4)[0].tolist() == [[1, 1, 3, 3]]
    assert len(boxes_of(np.zeros((8, 8), bool), 1)[0]) == 0


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two images of 20x16: one with two cars, one of them behind a pole, and a bicyclist; one with none."""
    folder = tmp_path / "scenes"
    masks = np.full((2, 16, 20), 0, np.uint8)
    masks[0, 2:6, 1:5] = 2
    masks[0, 8:14, 3:12] = 2
    masks[0, 8:14, 6] = 1  # the pole: two parts whose boxes touch no more
    masks[0, 10:15, 14:19] = 3
    masks[0, 0, 19] = 3  # a speck
    masks[1, :4] = VOID
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for name, mask in zip("ab", masks, strict=True):
        Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    (folder / "classes.txt").write_text("Road\nPole\nCar\nBicyclist\n")
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    named = ["--classes", str(folder / "classes.txt"), "--of", "Bicyclist", "Car", "--least", "4", "--out", str(out)]
    return [str(folder), *named, *more]


def test_what_was_drawn_comes_back_as_coco(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "boxes" / "train.json"
    assert main(words(scenes, out)) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"out": str(out), "images": 2, "images_without_boxes": 1, "boxes": {"Bicyclist": 1, "Car": 3}}
    document = json.loads(out.read_text())
    assert document["categories"] == [{"id": 1, "name": "Bicyclist"}, {"id": 2, "name": "Car"}]
    assert document["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 20, "height": 16},
        {"id": 2, "file_name": "b.jpg", "width": 20, "height": 16},
    ]
    found = [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in document["annotations"]]
    assert found == [(1, 1, [14, 10, 5, 5]), (1, 2, [1, 2, 4, 4]), (1, 2, [3, 8, 3, 6]), (1, 2, [7, 8, 5, 6])]
    assert [entry["area"] for entry in document["annotations"]] == [25, 16, 18, 30]
    assert [entry["id"] for entry in document["annotations"]] == [1, 2, 3, 4]
    assert (tmp_path / "boxes" / "train" / "a.jpg").samefile(scenes / "images" / "a.jpg")
    first = out.read_bytes()
    assert main(words(scenes, out)) == 0
    assert out.read_bytes() == first


def test_what_does_not_fit_together_is_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    assert main([*words(scenes, out), "--of", "Cat"]) == 2
    assert "expected some of Road, Pole, Car, Bicyclist; found Cat" in capsys.readouterr().err
    for name, image in (("c", Image.new("P", (20, 16))), ("d", Image.new("L", (16, 20)))):
        Image.new("RGB", (20, 16)).save(scenes / "images" / f"{name}.png")
        image.save(scenes / "masks" / f"{name}.png")
    Image.new("RGB", (20, 16)).save(scenes / "images" / "e.png")
    Image.new("L", (20, 16)).save(scenes / "masks" / "f.png")
    assert main(words(scenes, out)) == 2
    said = capsys.readouterr().err
    assert "4 files do not fit together" in said
    for part in ("c.png: expected an 8-bit gray PNG", "d.png: expected the image's 20x16", "e.png", "f.png: no image"):
        assert part in said
    assert not out.exists()


def test_nothing_is_written_over(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    assert main(words(scenes, tmp_path / "train.json")) == 2
    assert "found something else" in capsys.readouterr().err
    (tmp_path / "val").symlink_to(tmp_path / "train")
    assert main(words(scenes, tmp_path / "val.json")) == 2
    assert "found one to" in capsys.readouterr().err


def test_tiles_are_the_image_s_own_pixels_and_cover_it(scenes: Path, tmp_path: Path) -> None:
    """Every tile is found at its place, every pixel is in one, and every tile left has the boxes of its own mask."""
    rng = np.random.default_rng(0)
    for image in (scenes / "images").iterdir():
        Image.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(image)
    out = tmp_path / "cut" / "tiles.json"
    assert main(words(scenes, out, "--tiles", "12")) == 0
    document = json.loads(out.read_text())
    folder = out.with_name("tiles-12")
    for image in sorted((scenes / "images").iterdir()):
        pixels = np.asarray(Image.open(image).convert("RGB"))
        covered = np.zeros(pixels.shape[:2], bool)
        tops, lefts = (
            {round(i * (n - 12) / max(-(-n // 12) - 1, 1)) for i in range(-(-n // 12))} for n in covered.shape
        )
        for row, top in enumerate(sorted(tops)):
            for column, left in enumerate(sorted(lefts)):
                window = np.s_[top : top + 12, left : left + 12]
                tile = np.asarray(Image.open(folder / "images" / f"{image.stem}-{row}-{column}.png"))
                np.testing.assert_array_equal(tile, pixels[window])
                covered[window] = True
        assert covered.all()
    assert 0 < len(document["images"]) < len(list((folder / "images").iterdir()))
    kept = {entry["image_id"] for entry in document["annotations"]}
    assert kept == {image["id"] for image in document["images"]}
