"""Folders as people have them: what counts as a sample, what is counted and said, links, splits, names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feedfast.data.dataset import open_dataset
from feedfast.errors import RequestError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images each."""
    for folder in ("cat", "dog"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("a.png", "b.jpg"):
            IMAGE.save(tmp_path / "data" / folder / name)
    return tmp_path / "data"


def names(root: Path) -> list[str]:
    data = open_dataset(root)
    return [data.name(i) for i in range(len(data))]


WHOLE = ["cat/a.png", "cat/b.jpg", "dog/a.png", "dog/b.jpg"]


def test_nothing_that_looks_like_an_image_is_passed_over_in_silence(root: Path) -> None:
    for name in ("a.gif", "b.gif", "c.avif"):
        IMAGE.save(root / "cat" / name)
    IMAGE.save(root / "dog" / "gif", "GIF")  # by content
    IMAGE.save(root / "dog" / "raw.nef", "TIFF")  # a camera's raw file begins with a thumbnail
    (root / "dog" / "drawing.svg").write_text("<svg/>")  # by name
    IMAGE.save(root / "dog" / ".hidden.jpg")
    (root / "dog" / "._b.jpg").write_bytes(b"\0\5\x16\7 what macOS leaves behind")
    (root / "dog" / "notes.txt").write_text("BM: not an image")
    IMAGE.save(root / "dog" / "really.gif", "PNG")
    IMAGE.save(root / "dog" / "webp", "WEBP")
    data = open_dataset(root)
    assert [data.name(i) for i in range(len(data))] == [*WHOLE, "dog/really.gif", "dog/webp"]
    assert data.skipped == {
        "(no extension)": 1, ".avif": 1, ".gif": 2, ".jpg (hidden)": 1, ".nef": 1, ".svg": 1
    }  # fmt: skip


def test_an_emptied_class_says_why(root: Path) -> None:
    (root / "emu").mkdir()
    for name in ("a", "b"):
        IMAGE.save(root / "emu" / f"{name}.gif")
    np.save(root / "emu" / "c.npy", np.zeros(3))
    (root / "fox").mkdir()
    with pytest.raises(RequestError, match=r"found none in emu \(2 \.gif, 1 \.npy\), fox \(empty\)$"):
        open_dataset(root)
    with pytest.raises(RequestError, match=r"class folders of them, found none \(2 \.gif, 1 \.npy\)$"):
        open_dataset(root / "emu")


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog"])
def test_a_loop_of_links_is_refused_by_name(root: Path, target: str) -> None:
    (root / "cat" / "again").symlink_to(target)
    (root / "dog" / "more").symlink_to("../cat")
    with pytest.raises(RequestError, match=rf"{root}/(cat|dog)/.*: expected folders without loops, found a link to"):
        open_dataset(root)


def test_each_real_file_is_one_sample(root: Path, tmp_path: Path) -> None:
    (root / "cat" / "0.png").symlink_to("a.png")
    (root / "cat" / "x").symlink_to("../dog")
    (root / "cat" / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(RequestError, match=r"self\.jpg: Too many levels of symbolic links"):
        open_dataset(root)
    (root / "cat" / "self.jpg").unlink()
    data = open_dataset(root)
    assert names(root) == WHOLE
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.skipped == {".jpg (link)": 1, ".png (link)": 2}

    farm = tmp_path / "farm"  # class folders made of links alone
    (farm / "one").mkdir(parents=True)
    (farm / "two").symlink_to(root / "dog")
    (farm / "one" / "x.png").symlink_to(root / "cat" / "a.png")
    (farm / "one" / "y.png").symlink_to(root / "cat" / "a.png")
    assert names(farm) == ["one/x.png", "two/a.png", "two/b.jpg"]
    (farm / "three").symlink_to(root / "cat" / "a.png")
    (farm / "three").unlink()
    (farm / "three").mkdir()
    (farm / "three" / "z.png").symlink_to(root / "cat" / "a.png")
    with pytest.raises(RequestError, match=r"none in three \(1 \.png \(link\)\); 2 links to files .* left out"):
        open_dataset(farm)


@pytest.mark.parametrize("classes", [("train", "val"), ("train",), ("Test", "train", "validation"), ("valid",)])
def test_splits_are_no_classes(tmp_path: Path, classes: tuple[str, ...]) -> None:
    for name in classes:
        (tmp_path / name).mkdir()
        IMAGE.save(tmp_path / name / "x.png")
    with pytest.raises(RequestError, match=rf"found {classes[0]}/.*splits of a data set; name one .*/{classes[0]}$"):
        open_dataset(tmp_path)
    (tmp_path / "tram").mkdir()
    IMAGE.save(tmp_path / "tram" / "x.png")
    assert len(open_dataset(tmp_path)) == len(classes) + 1


def test_names_that_are_not_utf8(root: Path) -> None:
    odd = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(odd)
    os.symlink(os.fsencode(root / "cat" / "a.png"), odd + b"/x.png")
    (root / "cat" / "a.png").rename(root.parent / "elsewhere.png")
    os.remove(odd + b"/x.png")
    os.symlink(os.fsencode(root.parent / "elsewhere.png"), odd + b"/x.png")
    with pytest.raises(RequestError, match=r"names in UTF-8, found 'caf\\xe9'; rename it"):
        open_dataset(root)
    os.rename(odd, root / "café")
    IMAGE.save(os.fsencode(root / "café") + b"/\xff.png", "PNG")  # a file's name is only ever shown
    assert open_dataset(root).classes == ("café", "cat", "dog")
    os.rename(root, os.fsencode(root.parent) + b"/d\xff")
    with pytest.raises(RequestError, match=r"expected a path in UTF-8, found '.*/d\\xff'"):
        open_dataset(os.fsdecode(os.fsencode(root.parent) + b"/d\xff"))


def test_names_of_classes_that_are_not_utf8_in_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 4, 4), np.uint8), labels=[0], classes=["caf\udce9"])
    with pytest.raises(RequestError, match=r"classes with names in UTF-8, found 'caf\\xe9'"):
        open_dataset(tmp_path / "x.npz")


def test_a_folder_that_cannot_be_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "cat" / "deep").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> object:  # root may list everything, so the system's answer is played
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(RequestError, match=r"cat/deep: expected a folder that can be listed, found: Permission denied"):
        open_dataset(root)
