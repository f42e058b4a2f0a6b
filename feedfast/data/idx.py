"""MNIST's own files: images and labels in two idx files, gzipped or not (Fashion-MNIST and EMNIST use the same).

An idx file is a header of big-endian words (magic with type and number of dimensions, then the sizes) and the bytes.
Plain files stay on disk as a memory map; gzipped ones are unpacked into memory, 47 MB for MNIST's training images.
Labels are found next to the images by name. Both headers and lengths are compared before anything is unpacked.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from feedfast.data.arrays import PixelStore
from feedfast.errors import RequestError
from feedfast.files import open_regular

__all__ = ["idx_images_below", "idx_of_split", "is_idx", "open_idx"]

_NAME = re.compile(r"(.*)images([-.])idx3(.*?)(\.gz)?")  # train-images-idx3-ubyte.gz
_MAGIC = 0x0800  # type uint8; the last byte is the number of dimensions
_DEFLATE_RATIO = 1032  # no deflate stream holds more bytes per byte


def is_idx(path: Path) -> bool:
    """Whether a file is named as MNIST's files of images are."""
    return _NAME.fullmatch(path.name) is not None


def idx_images_below(folder: Path) -> list[str]:
    """Names of the files of images in a folder; of a file that lies there packed and unpacked, the unpacked one."""
    names = {path.name for path in folder.iterdir() if is_idx(path)}
    return sorted(name for name in names if name.removesuffix(".gz") == name or name.removesuffix(".gz") not in names)


def idx_of_split(folder: Path, split: Literal["train", "val"]) -> Path | None:
    """The one file of images of a split in a folder: named train, or t10k or test; None where it is none or several."""
    words = ("train",) if split == "train" else ("t10k", "test")
    fitting = [name for name in idx_images_below(folder) if any(word in name.lower() for word in words)]
    return folder / fitting[0] if len(fitting) == 1 else None


def open_idx(path: Path) -> tuple[PixelStore, NDArray[np.int32], tuple[str, ...]]:
    """A file of gray images, uint8 [n, H, W], with the file of its labels, uint8 [n], next to it.

    Args:
        path: named like ``train-images-idx3-ubyte`` or ``….gz``; the labels are ``train-labels-idx1-ubyte`` with or
            without ``.gz``, whichever there is (the same as the images' if there are both).

    Returns:
        The pixels (gray), the labels int32 [n], and the numbers up to the largest label as class names.

    Raises:
        RequestError: no file of labels, a wrong magic, a length other than the header's, or unequal counts.
    """
    labels_path = _labels_of(path)
    shape, (count,) = _header(path, 3), _header(labels_path, 1)
    if count != shape[0]:
        raise RequestError(f"{labels_path}: expected {shape[0]} labels as {path.name} has images, found {count}")
    if 0 in shape:
        raise RequestError(f"{path}: expected at least one image with pixels, found {list(shape)}")
    labels = _content(labels_path, (count,)).astype(np.int32)
    store = PixelStore((path.name,), (_content(path, shape),), "HW", (shape[1], shape[2]))
    return store, labels, tuple(str(number) for number in range(int(labels.max()) + 1))


def _labels_of(path: Path) -> Path:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise ValueError(f"{path}: not named as a file of images")
    plain = f"{named[1]}labels{named[2]}idx1{named[3]}"
    names = [plain + ".gz", plain] if named[4] else [plain, plain + ".gz"]
    for name in names:
        if (path.parent / name).is_file():
            return path.parent / name
    raise RequestError(f"{path}: expected its labels next to it, in {names[0]} or {names[1]}, found neither")


def _opened(path: Path) -> IO[bytes]:
    os.close(open_regular(path))  # no pipe or device
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _header(path: Path, dimensions: int) -> tuple[int, ...]:
    """The sizes a file says it has, if it is long enough for them."""
    head_bytes = 4 + 4 * dimensions
    kind = "images" if dimensions == 3 else "labels"
    try:
        with _opened(path) as file:
            head = file.read(head_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: expected an idx file of {kind}; {error}") from error
    magic = struct.unpack(">I", head[:4])[0] if len(head) >= 4 else None
    if magic != _MAGIC + dimensions:
        found = f"a file of {len(head)} bytes" if magic is None else f"{magic:#010x}"
        raise RequestError(f"{path}: expected an idx file of {kind}, magic {_MAGIC + dimensions:#010x}, found {found}")
    if len(head) < head_bytes:
        raise RequestError(f"{path}: expected a header of {head_bytes} bytes, found {len(head)}; the file is cut short")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    size = path.stat().st_size
    # told from the length on the disk, so that a damaged header cannot ask for the machine's memory
    most = size - head_bytes if path.suffix != ".gz" else size * _DEFLATE_RATIO
    if math.prod(shape) > most:
        raise RequestError(f"{path}: expected {list(shape)} bytes of {kind} as its header says, found at most {most}")
    return shape


def _content(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    head_bytes, expected = 4 + 4 * len(shape), math.prod(shape)
    if path.suffix != ".gz":
        found = path.stat().st_size - head_bytes
        content: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r", offset=head_bytes)
    else:
        try:
            with _opened(path) as file:
                file.read(head_bytes)
                content = np.frombuffer(file.read(expected + 1), dtype=np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise RequestError(f"{path}: expected {expected} bytes after the header; {error}") from error
        found = len(content)
    if found != expected:
        more = "more" if found > expected else str(found)
        raise RequestError(f"{path}: expected {expected} bytes after the header, {list(shape)}, found {more}")
    return content.reshape(shape)
