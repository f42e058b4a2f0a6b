"""MNIST's idx files: as torchvision reads them, and one sentence per way they can be broken."""

from __future__ import annotations

import gzip
import importlib
import struct
from pathlib import Path

import numpy as np
import pytest

from feedfast.data.dataset import open_dataset
from feedfast.errors import RequestError

RNG = np.random.default_rng(0)


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, ends: tuple[str, str] = ("", "")) -> Path:
    """Images and labels as MNIST publishes them; an end of ".gz" packs the file."""
    contents = {
        f"t10k-images-idx3-ubyte{ends[0]}": struct.pack(">4I", 2051, *images.shape) + images.tobytes(),
        f"t10k-labels-idx1-ubyte{ends[1]}": struct.pack(">2I", 2049, len(labels)) + labels.astype(np.uint8).tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / f"t10k-images-idx3-ubyte{ends[0]}"


@pytest.mark.parametrize("ends", [("", ""), (".gz", ".gz"), (".gz", ""), ("", ".gz")])
def test_idx(tmp_path: Path, ends: tuple[str, str]) -> None:
    images = RNG.integers(0, 256, (5, 9, 8), dtype=np.uint8)
    path = write_idx(tmp_path, images, np.array([3, 0, 2, 2, 1]), ends)
    data = open_dataset(path)
    assert (data.kind, data.classes) == ("pixels", ("0", "1", "2", "3"))
    np.testing.assert_array_equal(data.pixels([4, 0]), np.repeat(images[[4, 0], :, :, None], 3, axis=3))
    assert data.labels.tolist() == [3, 0, 2, 2, 1]
    assert data.sizes.tolist() == [[9, 8]] * 5
    assert data.name(2) == f"{path.name}[2]"
    assert open_dataset(path, limit=1).ids.tolist() == [0, 1, 2, 4]


def test_idx_as_torchvision_reads_it(tmp_path: Path) -> None:
    mnist = importlib.import_module("torchvision.datasets.mnist")
    path = write_idx(tmp_path, RNG.integers(0, 256, (7, 5, 6), dtype=np.uint8), np.arange(7))
    data = open_dataset(path)
    np.testing.assert_array_equal(data.pixels(range(7))[..., 1], mnist.read_image_file(str(path)).numpy())
    labels = mnist.read_label_file(str(path).replace("images-idx3", "labels-idx1"))
    np.testing.assert_array_equal(data.labels, labels.numpy())


@pytest.mark.parametrize(("part", "count"), [("train", 60_000), ("t10k", 10_000)])
def test_real_mnist_is_what_torchvision_reads(shared_data: Path, tmp_path: Path, part: str, count: int) -> None:
    mnist = importlib.import_module("torchvision.datasets.mnist")
    folder = shared_data / "mnist"
    data = open_dataset(folder / f"{part}-images-idx3-ubyte.gz")
    assert (len(data), data.classes) == (count, tuple("0123456789"))
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
    images = mnist.read_image_file(str(tmp_path / f"{part}-images-idx3-ubyte")).numpy()
    assert data.pixels_store is not None
    np.testing.assert_array_equal(data.pixels_store.gather(np.arange(count)), images)
    np.testing.assert_array_equal(data.labels, mnist.read_label_file(str(tmp_path / f"{part}-labels-idx1-ubyte")))
    # the same data, packed or not
    assert open_dataset(tmp_path / f"{part}-images-idx3-ubyte").fingerprint() == data.fingerprint()


def idx(magic: int, shape: tuple[int, ...], values: int) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + b"\1" * values


BAD_IDX = {
    "no-labels": (
        idx(2051, (2, 4, 4), 32),
        None,
        r"images.*: expected its labels next to it, in t10k-labels-idx1-ubyte",
    ),
    "labels-for-images": (idx(2049, (2,), 2), idx(2049, (2,), 2), "images.*magic 0x00000803, found 0x00000801"),
    "images-for-labels": (idx(2051, (2, 4, 4), 32), idx(2051, (2, 4, 4), 32), "labels.*magic 0x00000801, found"),
    "floats": (idx(0x0D03, (2, 4, 4), 128), idx(2049, (2,), 2), "images.*found 0x00000d03"),
    "empty": (b"", idx(2049, (2,), 2), "images.*found a file of 0 bytes"),
    "header-cut": (idx(2051, (2,), 0), idx(2049, (2,), 2), "header of 16 bytes, found 8; the file is cut short"),
    "cut": (idx(2051, (2, 4, 4), 31), idx(2049, (2,), 2), "images.*(32|2, 4, 4).*found.* 31"),
    "labels-cut": (idx(2051, (2, 4, 4), 32), idx(2049, (2,), 1), "labels.*found.* 1"),
    "longer": (idx(2051, (2, 4, 4), 33), idx(2049, (2,), 2), "images.*32 bytes after the header.*found more"),
    "count": (idx(2051, (2, 4, 4), 32), idx(2049, (3,), 3), "labels.*expected 2 labels as .* has images, found 3"),
    "none": (idx(2051, (0, 4, 4), 0), idx(2049, (0,), 0), "at least one image"),
    "huge": (idx(2051, (2**32 - 1,) * 3, 10), idx(2049, (2,), 2), "images.*as its header says, found at most"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("which", BAD_IDX)
def test_idx_refuses(tmp_path: Path, which: str, end: str) -> None:
    images, labels, said = BAD_IDX[which]
    for name, content in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        if content is not None:
            (tmp_path / f"{name}{end}").write_bytes(gzip.compress(content) if end else content)
    with pytest.raises(RequestError, match=said) as caught:
        open_dataset(tmp_path / f"t10k-images-idx3-ubyte{end}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"), [("cut", "end-of-stream"), ("text", "[Nn]ot a gzip"), ("bits", "CRC check failed")]
)
def test_idx_whose_gzip_is_damaged(tmp_path: Path, damage: str, said: str) -> None:
    path = write_idx(tmp_path, RNG.integers(0, 256, (50, 9, 8), dtype=np.uint8), np.zeros(50), (".gz", ".gz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes({"cut": path.read_bytes()[:-900], "text": b"<html>404</html>", "bits": bytes(content)}[damage])
    with pytest.raises(RequestError, match=f"images.*{said}"):
        open_dataset(path)


def test_a_folder_of_idx_files_is_told_from_one_of_images(tmp_path: Path) -> None:
    path = write_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), np.zeros(2))
    with pytest.raises(
        RequestError, match="MNIST's files; expected one of its files of images, t10k-images-idx3-ubyte"
    ):
        open_dataset(tmp_path)
    with pytest.raises(RequestError, match="a list may only name CIFAR"):
        open_dataset([path, path])
