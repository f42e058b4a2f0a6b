"""Segmentation data: masks as they are stored, both layouts, and every way in which masks and images disagree."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import Mutation, apply, plans
from numpy.typing import NDArray
from PIL import Image, ImageOps

from feedfast.data.annotations import IGNORE, Masks
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.headers import Unreadable
from feedfast.data.loader import Loader
from feedfast.data.masks import index_plane
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError, RequestError

Plane = NDArray[np.uint8]
SIZE = (12, 17)
VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
       "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
       "tvmonitor")  # fmt: skip


def numbers(seed: int, most: int = 3, size: tuple[int, int] = SIZE) -> Plane:
    plane = np.random.default_rng(seed).integers(0, most, size, dtype=np.uint8)
    plane[0, :3] = IGNORE
    return plane


def gray(plane: Plane) -> bytes:
    out = io.BytesIO()
    Image.fromarray(plane).save(out, "PNG")
    return out.getvalue()


def voc_palette() -> bytes:
    """The 256 colors of VOC's masks: three bits of the index after another into red, green and blue."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        rest = index
        for shift in range(7, -1, -1):
            colors[index] |= np.array([rest & 1, rest >> 1 & 1, rest >> 2 & 1], dtype=np.uint8) << shift
            rest >>= 3
    return colors.tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(plane: Plane, bits: int = 8, color: int = 3, palette: bytes | None = None, filters: int = 5) -> bytes:
    """A PNG written by hand, from its specification: samples of ``bits``, all kinds of filters in turn."""
    height, width = plane.shape
    rows = np.packbits(np.unpackbits(plane[:, :, None], axis=2)[:, :, 8 - bits :].reshape(height, -1), axis=1)
    above, data = np.zeros(rows.shape[1], dtype=np.int64), b""
    for number, row in enumerate(rows.astype(np.int64)):
        left, corner = np.r_[0, row[:-1]], np.r_[0, above[:-1]]
        near = np.stack([left, above, corner])
        paeth = np.take_along_axis(near, np.abs(near - (left + above - corner)).argmin(0)[None], 0)[0]
        guess = [0, left, above, (left + above) // 2, paeth][number % filters]
        data += bytes([number % filters]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    colors = chunk(b"PLTE", (voc_palette() if palette is None else palette)[: 3 << bits]) if color == 3 else b""
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + colors + body + chunk(b"IEND", b"")


def photo(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (9, 99, 199)).save(path, exif=exif)


def folders(root: Path, count: int = 4, classes: str | None = "a\nb\nc\n") -> Path:
    (root / "masks").mkdir(parents=True)
    for number in range(count):
        photo(root / "images" / f"{number}.jpg")
        (root / "masks" / f"{number}.png").write_bytes(gray(numbers(number)))
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


def segment(source: Path | list[Path], **options: object) -> Dataset:
    return open_dataset(source, task="segment", **options)  # type: ignore[arg-type]


def read(data: Dataset, position: int) -> Plane:
    assert isinstance(data.annotations, Masks)
    return data.annotations.read(position)


# --- one file


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_is_read_as_its_indexes(bits: int) -> None:
    """Written by hand, so the numbers in the file are known; PIL agrees that the file is one, colors and all."""
    plane = np.random.default_rng(bits).integers(0, 1 << bits, (11, 13), dtype=np.uint8)
    content = packed(plane, bits)
    np.testing.assert_array_equal(index_plane(content), plane)
    with Image.open(io.BytesIO(content)) as image:
        colors = np.frombuffer(voc_palette(), dtype=np.uint8).reshape(-1, 3)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colors[plane])


def test_vocs_colors_are_no_class_numbers(tmp_path: Path) -> None:
    plane = numbers(0, 21)
    image = Image.fromarray(plane, mode="P")
    image.putpalette(voc_palette())
    image.save(tmp_path / "mask.png")
    found = index_plane((tmp_path / "mask.png").read_bytes())
    np.testing.assert_array_equal(found, plane)
    assert not np.array_equal(found, np.asarray(image.convert("L")))
    found[0, 0] = 1  # the caller's own


def damaged(content: bytes, at: bytes, offset: int) -> bytes:
    place = content.index(at) + offset
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_file(Image.fromarray(numbers(0)), exif=exif)


GRAYS = bytes(value for index in range(256) for value in [255 - index] * 3)
REFUSED: dict[str, tuple[bytes, str]] = {
    "colors": (as_file(Image.new("RGB", (5, 5))), "found RGB of 8 bits; write class numbers as an 8-bit gray PNG"),
    "alpha": (as_file(Image.new("LA", (5, 5))), "found gray with alpha of 8 bits"),
    "16 bits": (as_file(Image.fromarray(np.zeros((5, 5), np.uint16))), "found gray of 16 bits"),
    "1 bit": (as_file(Image.new("1", (5, 5))), "found gray of 1 bits"),
    "4 bits": (packed(numbers(0, 3) % 16, 4, color=0), "found gray of 4 bits"),
    "JPEG": (as_file(Image.new("L", (5, 5)), "JPEG"), "expected a PNG, found JPEG"),
    "GIF": (as_file(Image.new("L", (5, 5)), "GIF"), "expected a PNG, found GIF"),
    "text": (b"mask", "expected a PNG, found a file that starts with b'mask'"),
    "nothing": (b"", "an empty file"),
    "grays in a palette": (packed(numbers(0), palette=GRAYS), "index 0 is gray 255, and either may be the class"),
    "turned": (turned(), r"turned by EXIF \(orientation 6\)"),
    "cut short": (gray(numbers(0))[:-20], "cut short"),
    "a bit of its pixels": (damaged(gray(numbers(0)), b"IDAT", 9), "checksum of PNG chunk b'IDAT'"),
    "a bit of its palette": (damaged(packed(numbers(0)), b"PLTE", 9), "checksum of PNG chunk b'PLTE'"),
    "no header": (gray(numbers(0))[:8] + gray(numbers(0))[33:], "PNG"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_as_a_mask(what: str) -> None:
    content, said = REFUSED[what]
    with pytest.raises(Unreadable, match=said):
        index_plane(content)


# --- folders


def test_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "set")
    (root / "masks" / "2.png").write_bytes(packed(numbers(2)))
    data = segment(root)
    assert (data.kind, len(data), data.classes, data.annotations.classes) == ("files", 4, ("a", "b", "c"), data.classes)
    assert [data.name(at) for at in range(4)] == [f"images/{at}.jpg" for at in range(4)]
    assert data.labels.tolist() == [-1] * 4
    for at in range(4):
        np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(data)), at), numbers(at))
    print_of = data.fingerprint()
    # packed another way it is the same; another number is not
    (root / "masks" / "2.png").write_bytes(gray(numbers(2)))
    assert segment(root).fingerprint() == print_of
    (root / "masks" / "2.png").write_bytes(gray(np.where(numbers(2) == 1, 2, numbers(2)).astype(np.uint8)))
    assert segment(root).fingerprint()["labels_sha256"] != print_of["labels_sha256"]


def test_splits_and_names(tmp_path: Path) -> None:
    """Names from the folder, from the one above, given, or by number."""
    train, val = folders(tmp_path / "train", 3, None), folders(tmp_path / "val", 2, None)
    (train / "masks" / "1.png").write_bytes(gray(numbers(1, 7)))
    assert (len(segment(tmp_path)), len(segment(tmp_path, split="val"))) == (3, 2)
    seven = tuple("0123456")
    assert segment(train).classes == seven
    assert segment(train, limit=1).classes == seven  # of all masks, not of those that are used
    assert segment(train, classes=list("tuvwxyz")).classes == tuple("tuvwxyz")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbf sky \r\nroad\r\ncar\r\n\r\n")
    assert segment(val).classes == ("sky", "road", "car")
    (val / "classes.txt").write_text("x\ny\nz")
    assert segment(val).classes == ("x", "y", "z")


def test_a_limit_and_a_fraction_count_the_whole(tmp_path: Path) -> None:
    root = folders(tmp_path, 10)
    assert segment(root, limit=3).ids.tolist() == [0, 1, 2]
    some = segment(root, fraction=0.3)
    assert len(some) == 3
    assert set(some.ids.tolist()) <= set(segment(root, fraction=0.6).ids.tolist())
    for position, record in enumerate(some.ids.tolist()):
        np.testing.assert_array_equal(read(some, position), numbers(record))
    # what is not used is not looked at, but for its name
    (root / "masks" / "9.png").write_bytes(b"")
    assert len(segment(root, limit=3)) == 3
    with pytest.raises(RequestError, match=r"1 fault:\n.*images/9.jpg: its mask .*masks/9.png: expected a PNG"):
        segment(root)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_turns_with_its_image(tmp_path: Path, orientation: int) -> None:
    """Stored pixels on stored pixels: what DALI turns by EXIF, the mask follows."""
    plane = numbers(3, 200, (24, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "masks").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(plane).save(tmp_path / "images" / "a.png", exif=exif)
    (tmp_path / "masks" / "a.png").write_bytes(gray(plane))
    data = segment(tmp_path)
    with Image.open(tmp_path / "images" / "a.png") as image:
        np.testing.assert_array_equal(read(data, 0), np.asarray(ImageOps.exif_transpose(image)))
    assert list(data.remarks.values()) == [1] * (orientation != 1)
    with Loader(data, ViewPlan(0, 24, "none"), batch_size=1) as loader:
        batch = next(iter(loader.stream(0, np.array([0]))))
    assert torch.equal(batch.annotations, batch.images[..., 0].long())


def test_a_mask_that_changes_later_is_named(tmp_path: Path) -> None:
    data = segment(folders(tmp_path))
    for content, said in ((gray(numbers(7)), "open it again"), (b"x", "expected a PNG")):
        (tmp_path / "masks" / "1.png").write_bytes(content)
        with pytest.raises(RequestError, match=rf"masks/1.png: the mask has changed since .*{said}"):
            read(data, 1)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mask": (lambda root: (root / "masks/1.png").unlink(), r"images/1.jpg: has no mask .*masks/1.png"),
    "no image": (lambda root: (root / "images/1.jpg").unlink(), r"masks/1.png: has no image of that stem in .*images"),
    "two images": (lambda root: photo(root / "images/1.png"), r"images/1.png: has the stem of 1.jpg"),
    "another size": (
        lambda root: photo(root / "images/1.jpg", (17, 12)),
        "its mask .*masks/1.png: 12x17 pixels, its image has 17x12$",
    ),
    "size of the turned image": (
        lambda root: photo(root / "images/1.jpg", (17, 12), 6),
        r"12x17 pixels, its image has 17x12 as stored and is turned by EXIF \(orientation 6\).*mogrify",
    ),
    "no such class": (
        lambda root: (root / "masks/1.png").write_bytes(gray(numbers(1, 5))),
        "masks/1.png: expected classes 0 to 2 and 255, found 3, 4$",
    ),
    "an image cut short": (
        lambda root: (root / "images/1.jpg").write_bytes(b"\xff\xd8\xff"),
        "images/1.jpg: cut short",
    ),
    "a mask of colors": (
        lambda root: (root / "masks/1.png").write_bytes(REFUSED["colors"][0]),
        "masks/1.png: expected a palette or 8-bit gray",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_named(tmp_path: Path, what: str) -> None:
    root = folders(tmp_path)
    harm, said = FAULTS[what]
    harm(root)
    with pytest.raises(RequestError, match=rf"(?m){said}"):
        segment(root)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    root = folders(tmp_path, 30)
    photo(root / "images" / "lone.jpg")
    for number in range(24):
        (root / "masks" / f"{number}.png").write_bytes(gray(numbers(number, size=(5, 6))))
    (root / "images" / "3.jpg").write_bytes(b"")
    with pytest.raises(RequestError) as caught:
        segment(root)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{root}: expected 30 images and masks that fit, found 25 faults:"
    assert len(lines) == 21
    assert lines[0] == f"  {root}/images/lone.jpg: has no mask {root}/masks/lone.png"
    assert lines[-1] == "  and 5 more"
    assert f"  {root}/images/3.jpg: empty file" in lines


REQUESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no layout": (lambda root: shutil.rmtree(root / "masks"), "expected a folder with images/ and masks/"),
    "deeper folders": (
        lambda root: (root / "images/train").mkdir(),
        r"images: expected files, found the folders train",
    ),
    "a class twice": (lambda root: (root / "classes.txt").write_text("a\nb\na"), "found 'a' for 0 and 2"),
    "a class without name": (
        lambda root: (root / "classes.txt").write_text("a\n\nb"),
        "a name for class 1, found none",
    ),
    "names in another code": (lambda root: (root / "classes.txt").write_bytes(b"a\n\xff"), "class names in UTF-8"),
    "too many": (
        lambda root: (root / "classes.txt").write_text("\n".join(map(str, range(300)))),
        "at most 255 classes",
    ),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_no_segmentation_set(tmp_path: Path, what: str) -> None:
    root = folders(tmp_path)
    harm, said = REQUESTS[what]
    harm(root)
    with pytest.raises(RequestError, match=said):
        segment(root)


def test_masks_may_be_links_to_one(tmp_path: Path) -> None:
    root = folders(tmp_path, 3)
    for number in (1, 2):
        (root / "masks" / f"{number}.png").unlink()
        (root / "masks" / f"{number}.png").symlink_to("0.png")
    data = segment(root)
    assert len(data) == 3
    np.testing.assert_array_equal(read(data, 2), read(data, 0))


def test_names_above_are_those_of_splits_only(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("of\nanother\nset\nall\ntogether\n")
    assert segment(folders(tmp_path / "mine", classes=None)).classes == ("0", "1", "2")
    assert len(segment(folders(tmp_path / "train", classes=None)).classes) == 5


@pytest.mark.parametrize("classes", [None, "background\nroad\n"])
def test_black_and_white_is_not_taken_for_classes(tmp_path: Path, classes: str | None) -> None:
    root = folders(tmp_path, classes=classes)
    for path in (root / "masks").iterdir():
        path.write_bytes(gray(((numbers(0) > 0) * 255).astype(np.uint8)))
    with pytest.raises(RequestError, match="two classes or more, found none but 0 and 255"):
        segment(root)


def test_what_other_tasks_take(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="task: expected one of classify, segment, detect, found 'sing'"):
        open_dataset(tmp_path, task="sing")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="arrays: expected none for task 'segment'"):
        segment(tmp_path, arrays=["images"])
    with pytest.raises(RequestError, match="classes: expected none for task 'classify'"):
        open_dataset(tmp_path, classes=["a"])
    with pytest.raises(
        RequestError, match=r"expected a folder with images/ and masks/.*, found an object of type list"
    ):
        open_dataset([(np.zeros((2, 2, 3), np.uint8), 0)], task="segment")  # type: ignore[arg-type]


# --- Pascal VOC


def voc(root: Path, names: dict[str, list[str]], augmented: tuple[str, ...] = ()) -> Path:
    for kind, listed in names.items():
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{kind}.txt").write_text("\n".join(listed) + "\n")
        for name in listed:
            photo(root / "JPEGImages" / f"{name}.jpg")
            for folder in ("SegmentationClassAug", *(("SegmentationClass",) if name not in augmented else ())):
                (root / folder).mkdir(exist_ok=True)
                plane = numbers(int(name), 21)
                content = packed(plane) if folder == "SegmentationClass" else gray(plane)
                (root / folder / f"{name}.png").write_bytes(content)
    return root


def test_voc(tmp_path: Path) -> None:
    names = {"train": ["7", "2"], "val": ["5"], "trainaug": ["2", "9", "7"]}
    root = voc(tmp_path / "VOC2012", names, augmented=("9",))
    lists = root / "ImageSets" / "Segmentation"
    for source, split, listed, folder in (
        (root, "train", ["7", "2"], "SegmentationClass"),
        (root, "val", ["5"], "SegmentationClass"),
        (lists / "trainaug.txt", "train", ["2", "9", "7"], "SegmentationClassAug"),
        ([lists / "val.txt", lists / "train.txt"], "train", ["5", "7", "2"], "SegmentationClass"),
    ):
        data = segment(source, split=split)
        assert data.classes == VOC
        assert [data.path(at) for at in range(len(data))] == [root / "JPEGImages" / f"{name}.jpg" for name in listed]
        assert {path.parent.name for path in data.marks.read.paths} == {folder}  # type: ignore[union-attr]
        for at, name in enumerate(listed):
            np.testing.assert_array_equal(read(data, at), numbers(int(name), 21))
    with pytest.raises(RequestError, match=r"expected .* found VOC2012 in it; name .*/VOC2012"):
        segment(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\n4\n1\n", "2 faults:\n.*val.txt: 4: expected one image .*found none\n.*val.txt: 1: listed twice"),
        ("1\nJPEGImages/1.jpg SegmentationClass/1.png\n", "line 2: expected the name of one image without folder"),
        ("../1\n", "line 1: expected the name of one image"),
        ("\n", "expected image names, one per line, found none"),
    ],
)
def test_damaged_lists(tmp_path: Path, text: str, said: str) -> None:
    root = voc(tmp_path, {"val": ["1"]})
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(text)
    with pytest.raises(RequestError, match=said):
        segment(root, split="val")
    with pytest.raises(RequestError, match=r"Segmentation/train.txt: expected VOC's list .*, found no file"):
        segment(root)


HARMED = (
    "plain/masks/1.png",
    "plain/classes.txt",
    "plain/images/0.jpg",
    "voc/SegmentationClass/1.png",
    "voc/ImageSets/Segmentation/train.txt",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    folders(root / "plain", 2)
    voc(root / "voc", {"train": ["1", "2"]})
    return root


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(HARMED), plans("bytes"))
def test_any_damage_is_a_sentence(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, name: str, plan: list[Mutation]
) -> None:
    root = tmp_path_factory.mktemp("harmed") / "set"
    source = root / name.split("/")[0]
    shutil.copytree(sound / source.name, source)
    apply(root / name, "bytes", plan)
    with contextlib.suppress(FeedfastError):
        data = segment(source)
        assert all(read(data, at).shape == tuple(data.sizes[at]) for at in range(len(data)))
    shutil.rmtree(root)


def test_real_camvid(shared_data: Path) -> None:
    data = segment(shared_data / "camvid", limit=12)
    assert (len(data), len(data.classes), data.classes[8]) == (12, 11, "Car")
    assert len(segment(shared_data / "camvid", split="val")) == 80
    for position in (0, 11):
        path = shared_data / "camvid" / "train" / "masks" / f"{data.path(position).stem}.png"
        np.testing.assert_array_equal(read(data, position), np.asarray(Image.open(path)))
        assert read(data, position).shape == tuple(data.sizes[position])
