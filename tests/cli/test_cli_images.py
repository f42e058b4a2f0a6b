"""Images as people have them, through the commands: what is odd is used, what is unusable is named.

Grey, palette, transparent, rotated, 16-bit and one-pixel images are trained and cached alike. Unreadable files, other
classes and arrays of something else end in one sentence with the path; `commands.feedfast` fails on anything like a
traceback.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Outcome, feedfast
from PIL import Image
from small import as_toml, digits_recipe, write_teacher


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that each test gives data of its own."""
    folder = tmp_path_factory.mktemp("images")
    return as_toml(digits_recipe(folder, ("method.name=kd",), teachers=1), folder / "recipe.toml")


def photograph(path: Path, size: tuple[int, ...], mode: str = "RGB", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))
    (image if image.mode == mode else image.convert(mode)).save(path, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images as people have them."""
    folder = tmp_path_factory.mktemp("zoo")
    for kind in ("cat", "dog"):
        for number in range(4):
            photograph(folder / kind / f"{number}.png", (30 + number, 24, 3))
    photograph(folder / "cat" / "gray.jpg", (30, 20), "L")
    photograph(folder / "cat" / "gray.png", (30, 20), "L")
    photograph(folder / "cat" / "press.jpg", (30, 20, 3), "CMYK")
    photograph(folder / "cat" / "clear.png", (30, 20, 4), "RGBA")
    photograph(folder / "dog" / "palette.PNG", (30, 20, 3), "P")
    photograph(folder / "dog" / "bits.png", (30, 20), "1")
    photograph(folder / "dog" / "dot.png", (1, 1, 3))
    photograph(folder / "dog" / "wide.jpeg", (2, 300, 3))
    turned = Image.Exif()
    turned[0x112] = 6
    photograph(folder / "dog" / "turned.jpg", (30, 20, 3), exif=turned)
    deep = np.random.default_rng(0).integers(0, 65535, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "dog" / "deep.png")
    (folder / "dog" / "notes.txt").write_text("not an image, and not called one")
    photograph(folder / "dog" / "moving.gif", (30, 20, 3))
    photograph(folder / "cat" / "moving.gif", (30, 20, 3))
    return folder


def plain(recipe: Path, train: Path, out: Path, *more: str) -> Outcome:
    """Plain training for an epoch on a folder."""
    fixed = ("data.limit=0", "method.name=none", "train.source=none", "train.batch=4", "train.epochs=1")
    return feedfast("train", recipe, f"data.train={train}", f"train.out={out}", *fixed, *more)


@pytest.mark.parametrize("augment", ["resized-crop-flip", "pad-crop-flip", "none"])
def test_odd_images(recipe: Path, zoo: Path, tmp_path: Path, augment: str) -> None:
    outcome = plain(recipe, zoo, tmp_path / "out", f"data.val={zoo}", f"data.augment={augment}", "data.check=full")
    assert outcome.code == 0, outcome.err
    assert outcome.document["steps"] == 18 // 4
    assert outcome.document["val_accuracy"] is not None


def test_odd_images_are_cached_as_they_are_trained(recipe: Path, zoo: Path, tmp_path: Path) -> None:
    weights = write_teacher(tmp_path / "two.pt", classes=10)
    more = (
        f"data.train={zoo}",
        "data.limit=0",
        "data.augment=resized-crop-flip",
        "cache.batch=5",
        "teachers.0.classes=10",
        "method.name=pfeed",
    )
    cache = tmp_path / "odd.zarr"
    more = (*more, f"teachers.0.weights={weights}", f"cache.path={cache}")
    outcomes = [feedfast("plan", recipe, *more), feedfast("cache", recipe, *more), feedfast("inspect", cache)]
    for outcome in outcomes:  # what the images are, and what was passed over, is said by all that open them
        assert outcome.code == 0, outcome.err
        facts = {"images": 18, "classes": 2, "first_classes": ["cat", "dog"], "skipped": {".gif": 2}}
        assert facts.items() <= outcome.document["data"].items()
    for outcome in outcomes[:2]:
        first, second = outcome.err.splitlines()[:2]
        assert f"data: 18 images, 2 classes (cat, dog), from {zoo}" in first
        assert f"data: {zoo}: look like images and are not read: 2 .gif" in second
        assert "1 of 18 files: 16-bit gray PNG" in outcome.err
    outcome = feedfast("verify", cache, "--full", "--replay", "9")
    assert outcome.code == 0, outcome.err
    assert outcome.document["replayed"] > 0


def test_unreadable_images_are_all_named(recipe: Path, zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    bad = {"cat/empty.jpg": b"", "dog/text.png": b"hello", "dog/cut.png": (zoo / "dog" / "0.png").read_bytes()[:100],
           "cat/cut.jpg": (zoo / "cat" / "gray.jpg").read_bytes()[:-40]}  # fmt: skip
    for name, content in bad.items():
        (tmp_path / "zoo" / name).write_bytes(content)
    for command in ("plan", "cache", "train"):
        outcome = feedfast(
            command,
            recipe,
            f"data.train={tmp_path / 'zoo'}",
            f"cache.path={tmp_path / 'c'}",
            f"train.out={tmp_path / 'o'}",
        )
        assert outcome.code == 2
        assert "4 of 22 images" in outcome.error
        for name in bad:
            assert str(tmp_path / "zoo" / name) in outcome.error


def test_validation_images_of_other_classes(recipe: Path, zoo: Path, tmp_path: Path) -> None:
    """Labels are numbers by sorted folder name: with other folders an accuracy means nothing."""
    for name, folders in {
        "other": ("cat", "fox"),
        "more": ("ant", "cat", "dog"),
        "second": ("dog",),
        "flat": (".",),
    }.items():
        for folder in folders:
            photograph(tmp_path / name / folder / "0.png", (20, 20, 3))
        outcome = plain(recipe, zoo, tmp_path / "out", f"data.val={tmp_path / name}")
        assert outcome.code == 2
        assert "data.val" in outcome.error
        assert str(tmp_path / name) in outcome.error
    assert (
        "'dog' as in data.train, found 'fox'"
        in plain(recipe, zoo, tmp_path / "o", f"data.val={tmp_path / 'other'}").error
    )
    assert (
        "'cat' as in data.train, found 'dog'"
        in plain(recipe, zoo, tmp_path / "o", f"data.val={tmp_path / 'second'}").error
    )
    photograph(tmp_path / "part" / "cat" / "0.png", (20, 20, 3))  # its one class has the number it has in training
    assert plain(recipe, zoo, tmp_path / "o", f"data.val={tmp_path / 'part'}").code == 0
    ten = recipe.parent / "digits-val.npz"
    assert "expected the 2 classes" in plain(recipe, zoo, tmp_path / "p", f"data.val={ten}").error


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((9, 8, 8, 3), np.float32)}, ["uint8", "float32"]),
        ({"images": np.zeros((9, 8, 8, 3), np.uint8), "labels": np.zeros(4, int)}, ["labels", "9", "[4]"]),
        ({"pictures": np.zeros((9, 8, 8, 3), np.uint8)}, ["'images'", "pictures"]),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, ["at least one image"]),
        ({"images": np.zeros((9, 8, 8, 3), np.uint8)}, ["expected labeled images"]),
        ({"images": np.array([{}], dtype=object)}, ["plain arrays"]),
        (None, ["expected an .npz"]),
    ],
)
def test_an_npz_of_something_else(
    recipe: Path, tmp_path: Path, arrays: dict[str, np.ndarray] | None, words: list[str]
) -> None:
    file = tmp_path / "my.npz"
    if arrays is None:
        file.write_bytes((recipe.parent / "digits-train.npz").read_bytes()[:4000])
    else:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    outcome = plain(recipe, file, tmp_path / "out", "data.val=[]")
    assert outcome.code == 2
    for word in [str(file), *words]:
        assert word in outcome.error
