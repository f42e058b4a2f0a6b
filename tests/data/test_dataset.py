"""Sources: what is accepted, what is refused and how, and what identifies the data."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.images import Unreadable, file_header, scan_images
from feedfast.errors import RequestError

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((61, 43), Image.Resampling.BICUBIC)


def encoded(image: Image.Image = SCENE, kind: str = "JPEG", orientation: int | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(out, kind, exif=exif, **options)
    return out.getvalue()


def cifar_records(n: int, label_bounds: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, bound, (n, 1)) for bound in label_bounds]
    return np.concatenate([*labels, rng.integers(0, 256, (n, 3072))], axis=1).astype(np.uint8)


def class_folders(root: Path, per_class: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.jpg").write_bytes(encoded(SCENE.resize((40 + i, 30))))
    return root


# --- CIFAR binary files


@pytest.mark.parametrize(("bounds", "classes"), [((10,), 10), ((20, 100), 100)])
def test_cifar(tmp_path: Path, bounds: tuple[int, ...], classes: int) -> None:
    a, b = cifar_records(40, bounds, 1), cifar_records(25, bounds, 2)
    (tmp_path / "a.bin").write_bytes(a.tobytes())
    (tmp_path / "b.bin").write_bytes(b.tobytes())
    data = open_dataset([tmp_path / "b.bin", str(tmp_path / "a.bin")])
    both = np.concatenate([b, a])
    assert (data.kind, len(data), len(data.classes)) == ("pixels", 65, classes)
    np.testing.assert_array_equal(data.ids, np.arange(65))
    np.testing.assert_array_equal(data.labels, both[:, len(bounds) - 1])
    np.testing.assert_array_equal(data.sizes, np.full((65, 2), 32))
    at = np.array([64, 0, 25, 24, 25])
    expected = both[at, len(bounds) :].reshape(5, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.pixels(at), expected)
    assert [data.name(24), data.name(25)] == ["b.bin[24]", "a.bin[0]"]
    with pytest.raises(ValueError, match="no files"):
        data.path(0)


def test_cifar_ambiguous_size(tmp_path: Path) -> None:
    """3,074 CIFAR-10 records are 3,073 whole CIFAR-100 ones: the labels decide."""
    (tmp_path / "ten.bin").write_bytes(cifar_records(3074, (10,)).tobytes())
    (tmp_path / "hundred.bin").write_bytes(cifar_records(3073, (20, 100)).tobytes())
    assert len(open_dataset(tmp_path / "ten.bin")) == 3074
    assert len(open_dataset(tmp_path / "hundred.bin")) == 3073
    with pytest.raises(RequestError, match=r"ten.bin.*CIFAR-100.*found CIFAR-10"):
        open_dataset([tmp_path / "hundred.bin", tmp_path / "ten.bin"])


@pytest.mark.parametrize(("content", "said"), [(b"", "0 bytes"), (b"x" * 5000, "5000 bytes"), (b"\xff" * 3074, "255")])
def test_cifar_refuses(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(RequestError, match=f"x.bin: expected a CIFAR.*{said}"):
        open_dataset(tmp_path / "x.bin")


def test_cifar_class_names(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(cifar_records(5, (10,)).tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert open_dataset(tmp_path / "x.bin").classes == tuple("abcdefghij")
    (tmp_path / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(RequestError, match="expected 10 class names, found 2"):
        open_dataset(tmp_path / "x.bin")


def test_real_cifar(shared_data: Path) -> None:
    path = shared_data / "cifar-100-binary" / "test.bin"
    data = open_dataset(path)
    raw = np.fromfile(path, np.uint8).reshape(-1, 3074)
    assert len(data) == 10_000
    assert data.classes[0] == "apple"
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(100, 100))
    np.testing.assert_array_equal(data.labels, raw[:, 1])
    np.testing.assert_array_equal(data.pixels([77])[0], raw[77, 2:].reshape(3, 32, 32).transpose(1, 2, 0))


# --- limit and ids


def test_limit_keeps_ids(tmp_path: Path) -> None:
    records = cifar_records(200, (10,))
    (tmp_path / "x.bin").write_bytes(records.tobytes())
    whole, some = open_dataset(tmp_path / "x.bin"), open_dataset(tmp_path / "x.bin", limit=3)
    expected = sorted(i for c in range(10) for i in np.flatnonzero(whole.labels == c)[:3])
    np.testing.assert_array_equal(some.ids, expected)
    assert some.ids.dtype == np.uint32
    np.testing.assert_array_equal(some.labels, whole.labels[expected])
    np.testing.assert_array_equal(some.pixels([4]), whole.pixels([expected[4]]))
    assert some.name(4) == whole.name(expected[4])
    with pytest.raises(RequestError, match="limit"):
        open_dataset(tmp_path / "x.bin", limit=-1)


def test_limit_of_unlabeled(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(kind="PNG"))
    (tmp_path / "4.png").write_bytes(b"broken, but beyond the limit")
    data = open_dataset(tmp_path, limit=4)
    assert data.ids.tolist() == [0, 1, 2, 3]
    assert data.labels.tolist() == [-1] * 4
    assert data.classes == ()


# --- npz


@pytest.mark.parametrize("shape", [(6, 9, 8, 3), (6, 9, 8), (6, 9, 8, 1)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.array([0, 2, 1, -1, 2, 0], dtype=np.int8))
    data = open_dataset(tmp_path / "x.npz")
    expected = images if shape[-1] == 3 else np.repeat(images.reshape(6, 9, 8, 1), 3, axis=3)
    np.testing.assert_array_equal(data.pixels(range(6)), expected)
    assert data.labels.tolist() == [0, 2, 1, -1, 2, 0]
    assert data.classes == ("0", "1", "2")
    assert data.sizes.tolist() == [[9, 8]] * 6


def test_npz_optional_arrays(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=images, labels=[1, 0], classes=["no", "yes", "maybe"])
    assert open_dataset(tmp_path / "a.npz").labels.tolist() == [-1, -1]
    assert open_dataset(tmp_path / "b.npz").classes == ("no", "yes", "maybe")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "'images', found .'pictures'"),
        ({"images": np.zeros((2, 4, 4), np.float32)}, "found float32"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, r"found uint8 \[2, 4, 4, 4\]"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "at least one image"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "2 integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0.5, 1])}, "2 integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([-2, 1])}, "2 integers >= -1"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 1]), "classes": ["one"]}, "at least 2 names"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RequestError, match=f"x.npz: .*{said}"):
        open_dataset(tmp_path / "x.npz")


def test_npz_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(RequestError, match=r"x\.npz: expected an \.npz"):
        open_dataset(tmp_path / "x.npz")


# --- folders


def test_class_folders(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "Z.PNG").write_bytes(encoded(kind="PNG"))
    (root / "dog" / "jpeg-by-content.png").write_bytes(encoded())
    (root / "dog" / "._1.jpg").write_bytes(b"what macOS leaves behind")
    (root / "dog" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    seen: list[tuple[int, int]] = []
    data = open_dataset(root, check="full", progress=lambda done, total: seen.append((done, total)))
    names = ["cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "cat/deep/Z.PNG", *(f"dog/{i}.jpg" for i in range(3))]
    assert [data.name(i) for i in range(len(data))] == [*names, "dog/jpeg-by-content.png"]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (data.kind, data.classes) == ("files", ("cat", "dog"))
    assert data.sizes.tolist()[:4] == [[30, 40], [30, 41], [30, 42], [43, 61]]
    assert seen[-1] == (8, 8)
    assert data.encoded([5])[0].tobytes() == data.path(5).read_bytes()
    with pytest.raises(ValueError, match="encoded"):
        data.pixels([0])


def test_real_folder_sizes(shared_data: Path) -> None:
    data = open_dataset(shared_data / "photos-varied", check="full")
    assert len(data) == 61
    for i in range(61):
        with Image.open(data.path(i)) as image:
            upright = ImageOps.exif_transpose(image)
        assert tuple(data.sizes[i]) == (upright.height, upright.width), data.name(i)


def test_folder_refuses(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not found: .*nowhere.*; expected CIFAR"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="empty list"):
        open_dataset([])
    with pytest.raises(RequestError, match="check: expected"):
        open_dataset(tmp_path, check="some")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="found none"):
        open_dataset(tmp_path / "empty")
    root = class_folders(tmp_path / "train")
    with pytest.raises(RequestError, match="a list may only name CIFAR"):
        open_dataset([root, root])
    (root / "emu").mkdir()
    with pytest.raises(RequestError, match="every class folder, found none in emu"):
        open_dataset(root)
    (root / "emu").rmdir()
    (root / "stray.jpg").write_bytes(encoded())
    with pytest.raises(RequestError, match=r"found both: 1 images .*stray\.jpg and cat/"):
        open_dataset(root)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"<html>404 not found</html>", "none of JPEG, PNG"),
    "cut": (encoded()[:-300], "no JPEG end marker"),
    "no-end": (encoded()[:-2], "no JPEG end marker"),
    "header-only": (encoded()[:200], "cut short inside a header|no JPEG end marker"),
    "garbled": (encoded()[:20] + b"\x00\x00" + encoded()[22:], "damaged JPEG header"),
    "no-scan": (b"\xff\xd8\xff\xd9", "without image data"),
    "png-cut": (encoded(kind="PNG")[:-20], "cut short"),
    "png-no-end": (encoded(kind="PNG")[:-12], "no PNG end chunk"),
    "huge": (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""), "60000x60000 pixels",
    ),
    "zero": (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 0, 8, 2, 0, 0, 0))
        + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""), "without a header",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", BROKEN)
def test_broken_image(tmp_path: Path, which: str) -> None:
    content, said = BROKEN[which]
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(Unreadable, match=said):
        file_header(tmp_path / "x.jpg")


def test_all_unreadable_are_listed(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train", per_class=70)
    bad = sorted([*root.glob("cat/1*.jpg"), *root.glob("dog/2*.jpg"), root / "dog" / "69.jpg"])  # 11 + 11 + 1
    for path in bad:
        path.write_bytes(encoded()[:-100])
    (root / "dog" / "69.jpg").unlink()
    (root / "dog" / "69.jpg").symlink_to(root / "gone.jpg")
    with pytest.raises(RequestError) as caught:
        open_dataset(root)
    message = str(caught.value)
    assert "23 of 140 images are unreadable" in message
    assert "and 3 more" in message
    assert sum(str(path) in message for path in bad) == 20
    assert "dog/69.jpg" not in message  # beyond the twenty
    (root / "cat" / "0.jpg").unlink()
    with pytest.raises(RequestError, match=r"1 of 2 .*\n.*cat/1\.jpg: cut short"):
        open_dataset(root, limit=1)


def test_full_check_decodes(tmp_path: Path) -> None:
    content = bytearray(encoded(kind="PNG"))
    content[200] ^= 0x55  # inside IDAT: only decoding notices
    (tmp_path / "x.png").write_bytes(bytes(content))
    assert len(open_dataset(tmp_path)) == 1
    with pytest.raises(RequestError, match=r"x\.png: does not decode"):
        open_dataset(tmp_path, check="full")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [None, 0, *range(1, 9), 9])
def test_orientation(tmp_path: Path, kind: str, orientation: int | None) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(kind=kind, orientation=orientation))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    assert file_header(path)[:2] == (upright.height, upright.width)


def test_unusual_but_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    late = encoded(kind="PNG")[:-12] + png_chunk(b"eXIf", body.removeprefix(b"Exif\0\0")) + png_chunk(b"IEND", b"")
    motorola = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 8, 0)
    app1 = b"\xff\xe1" + struct.pack(">H", len(motorola) + 2) + motorola
    cases = {
        encoded() + b"\0" * 100: (43, 61),  # padding behind the end marker
        encoded() + b"\0" * 9000: (43, 61),  # more of it than is looked at first
        encoded(progressive=True): (43, 61),
        encoded(SCENE.convert("L")): (43, 61),
        encoded(SCENE.convert("CMYK")): (43, 61),
        encoded(SCENE.convert("P"), "PNG"): (43, 61),
        late: (61, 43),
        encoded()[:2] + app1 + encoded()[2:]: (61, 43),
        encoded()[:2] + b"\xff\xff\xff" + app1 + encoded()[2:]: (61, 43),  # fill bytes before a marker
        encoded()[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff" + encoded()[2:]: (43, 61),  # points nowhere
    }
    for content, size in cases.items():
        path.write_bytes(content)
        assert file_header(path)[:2] == size


@settings(deadline=None, max_examples=300)
@given(
    base=st.sampled_from([encoded(orientation=6), encoded(kind="PNG", orientation=6)]),
    cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
)
def test_damage_never_escapes(tmp_path_factory: pytest.TempPathFactory, base: bytes, cut: int, changes: list) -> None:
    """Whatever happened to a file, the scan ends with a size or one line about it."""
    content = bytearray(base)
    for at, value in changes:
        content[at % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.jpg"
    path.write_bytes(bytes(content[: len(content) - cut % len(content)]) if cut % 3 == 0 else bytes(content))
    sizes, problems, _ = scan_images([path], full=False)
    assert (sizes.min() > 0) != bool(problems)


# --- identity


def test_fingerprint(tmp_path: Path) -> None:
    def made(where: str) -> Dataset:
        return open_dataset(class_folders(tmp_path / where))

    one, same, other = made("one"), made("elsewhere"), made("other")
    print_one = one.fingerprint()
    assert json.loads(json.dumps(print_one)) == print_one == same.fingerprint()
    assert (print_one["kind"], print_one["count"]) == ("files", 6)

    path = other.path(2)
    path.write_bytes(encoded(SCENE.resize((42, 30)), quality=50))
    changed = open_dataset(other.source).fingerprint()
    assert {key for key in changed if changed[key] != print_one[key]} == {"content_sha256"}
    limited = open_dataset(one.source, limit=2).fingerprint()
    assert limited["count"] == 4
    assert limited["ids_sha256"] != print_one["ids_sha256"]


def test_files_that_change(tmp_path: Path) -> None:
    data = open_dataset(class_folders(tmp_path / "x"))
    data.path(1).unlink()
    data.path(2).write_bytes(data.path(2).read_bytes()[:-100])
    data.path(3).write_bytes(data.path(0).read_bytes())  # the same size: cannot be told, and no crop goes wrong
    data.path(4).write_bytes(b"")
    data.path(5).write_bytes(encoded())
    with pytest.raises(RequestError, match="4 images have changed since") as caught:
        data.encoded(range(6))
    lines = [line.removeprefix(f"  {data.root}/") for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "cat/1.jpg: No such file or directory",
        "cat/2.jpg: cut short: no JPEG end marker",
        "dog/1.jpg: empty file",
        "dog/2.jpg: 43x61 pixels, 30x42 when opened",
    ]


@pytest.mark.parametrize("shape", [(3, 9, 8, 3), (3, 3, 9, 8), (3, 1, 9, 8)])
def test_npz_with_other_names(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As Keras and others write them: two splits in one file, planes or pixels, labels in a column."""
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(
        tmp_path / "x.npz", x_train=images, y_train=np.array([[2], [0], [1]]), x_test=images[:1], names=["a", "b", "c"]
    )
    data = open_dataset(tmp_path / "x.npz", arrays=("x_train", "y_train", "names"))
    expected = images if shape[3] == 3 else images.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.pixels(range(3)), np.broadcast_to(expected, (3, 9, 8, 3)))
    assert (data.labels.tolist(), data.classes) == ([2, 0, 1], ("a", "b", "c"))
    assert open_dataset(tmp_path / "x.npz", arrays=("x_test",)).labels.tolist() == [-1]
    with pytest.raises(RequestError, match=r"named 'images', found \['x_train', .*; data\.arrays = \[images, labels\]"):
        open_dataset(tmp_path / "x.npz")
    with pytest.raises(RequestError, match="named 'y_tets'"):
        open_dataset(tmp_path / "x.npz", arrays=("x_test", "y_tets"))
    with pytest.raises(RequestError, match=r"arrays: expected an \.npz"):
        open_dataset(class_folders(tmp_path / "x"), arrays=("x_test",))
