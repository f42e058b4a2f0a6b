"""Boxes of either form: written and read back, turned with their images, in batches, and damaged in any way."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from boxed import HEIGHT, WIDTH, Box, coco, detect, document, edited, listed, voc, xml
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import Mutation, apply, plans
from numpy.typing import NDArray
from PIL import Image, ImageOps

from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError, RequestError


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 39), st.integers(0, 29), st.integers(1, 40),
                                   st.integers(1, 30)), max_size=3), min_size=1, max_size=3))  # fmt: skip
def test_boxes_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[int, int, int, int, int]]]
) -> None:
    """Whole pixels, in which both formats can say the same."""
    wanted: list[list[tuple[int, Box]]] = [
        [(label, (x, y, min(x + w, 40), min(y + h, 30))) for label, x, y, w, h in own] for own in drawn
    ]
    root = tmp_path_factory.mktemp("written")
    names = [str(at) for at in range(len(wanted))]
    folder = voc(root / "voc", {"train": names})
    (folder / "classes.txt").write_text("cat\ndog\n")
    for name, own in zip(names, wanted, strict=True):
        objects = [(("cat", "dog")[label], (x0 + 1, y0 + 1, x1, y1), False) for label, (x0, y0, x1, y1) in own]
        (folder / "Annotations" / f"{name}.xml").write_text(xml(name, objects))
    (root / "coco").mkdir()
    (folder / "JPEGImages").rename(root / "coco" / "train")
    (folder / "JPEGImages").symlink_to(root / "coco" / "train")
    (root / "coco" / "train.json").write_text(json.dumps(document(wanted)))
    expected = [[(label, box, False) for label, box in own] for own in wanted]
    assert listed(detect(root / "coco" / "train.json")) == expected
    assert listed(detect(folder)) == expected
    shutil.rmtree(root)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_image(tmp_path: Path, orientation: int) -> None:
    """A bright rectangle, marked in stored pixels: after PIL has turned the image, the box is still around it."""
    pixels: NDArray[np.uint8] = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[5:9, 10:30] = 255
    path = coco(tmp_path, [[(0, (10, 5, 30, 9))]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train" / "0.jpg").unlink()
    Image.fromarray(pixels).save(tmp_path / "train" / "0.png", exif=exif)
    edited(path, lambda content: content["images"][0].update(file_name="0.png"))
    data = detect(path)
    with Image.open(tmp_path / "train" / "0.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    rows, columns = np.flatnonzero(upright.any(axis=1)), np.flatnonzero(upright.any(axis=0))
    assert listed(data) == [[(0, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), False)]]
    assert tuple(data.sizes[0]) == upright.shape
    if orientation >= 5:  # marked on the turned image, by its size
        edited(path, lambda content: content["images"][0].update(height=WIDTH, width=HEIGHT))
        with pytest.raises(RequestError, match=rf"after its EXIF turn \(orientation {orientation}\).*mogrify"):
            detect(path)


def test_a_batch_of_boxes(tmp_path: Path) -> None:
    data = detect(coco(tmp_path))
    plan = ViewPlan(0, 16, "none")
    with Loader(data, plan, batch_size=3) as loader:
        batch = next(iter(loader.stream(0, np.array([2, 0, 1]))))
    found = {int(sample): own for sample, own in zip(batch.ids, batch.annotations, strict=True)}
    assert {sample: own["labels"].tolist() for sample, own in found.items()} == {0: [0, 1], 1: [], 2: [1]}
    assert all(own["boxes"].dtype == torch.float32 for own in found.values())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    coco(root / "coco")
    (voc(root / "voc", {"train": ["1", "2"]}) / "classes.txt").write_text("dog\nperson\n")
    return root


PLAIN = ("coco/train.json", "voc/Annotations/1.xml", "voc/ImageSets/Main/train.txt", "voc/classes.txt")
HARMS = st.one_of(
    st.tuples(st.just("coco/train.json"), st.just("json"), plans("json")),
    st.tuples(st.sampled_from(PLAIN), st.just("bytes"), plans("bytes")),
)


@settings(max_examples=80, deadline=None)
@given(HARMS)
def test_any_damage_is_a_sentence(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, harm: tuple[str, str, list[Mutation]]
) -> None:
    """What is still accepted has boxes within its images, and classes with names."""
    name, content, plan = harm
    root = tmp_path_factory.mktemp("harmed") / "set"
    shutil.copytree(sound / name.split("/")[0], root / name.split("/")[0])
    apply(root / name, content, plan)
    with contextlib.suppress(FeedfastError):
        data = detect(root / "coco" / "train.json" if name.startswith("coco") else root / "voc")
        for (height, width), own in zip(data.sizes.tolist(), listed(data), strict=True):
            for label, (left, top, right, bottom), _ in own:
                assert 0 <= label < len(data.classes)
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height
    shutil.rmtree(root)
