"""Datasets that are arrays of pixels: CIFAR's binary files and ``.npz``.

CIFAR files stay on disk as a memory map: a batch gathers its records, and every rank and loader shares the page cache.
The two flavors have no header, so they are told apart by arithmetic: the size must be whole records of 3,073 bytes
(CIFAR-10: label, pixels) or 3,074 (CIFAR-100: coarse label, fine label, pixels), and every label must lie in range.
Where both fit, the labels decide; a file that fits neither is refused with the reason for each.

Pixels keep their stored layout until a batch is gathered: CIFAR is planar (CHW), npz is that, HWC or gray (HW). Labels
of CIFAR-100 are the fine ones. Nothing here executes data: an npz with objects in it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feedfast.data.npz import read_npz
from feedfast.errors import RequestError
from feedfast.files import read_file

__all__ = ["ARRAYS", "PixelStore", "open_cifar", "open_npz"]

Layout = Literal["CHW", "HWC", "HW"]

_PIXEL_BYTES = 3 * 32 * 32
_MAX_CLASSES = 1 << 20  # each gets a name, also where a label is damaged


@dataclass(frozen=True)
class _Flavor:
    name: str
    record_bytes: int
    label_bounds: tuple[int, ...]  # one per label byte; the last label is the one used
    names_file: str


_FLAVOURS = (
    _Flavor("CIFAR-10", 1 + _PIXEL_BYTES, (10,), "batches.meta.txt"),
    _Flavor("CIFAR-100", 2 + _PIXEL_BYTES, (20, 100), "fine_label_names.txt"),
)


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Records of equally sized images in one or more arrays, in the layout they are stored in."""

    files: tuple[str, ...]  # where each part came from, for messages
    parts: tuple[NDArray[np.uint8], ...]  # each [n, ...] in ``layout``
    layout: Layout
    size: tuple[int, int]  # height, width

    @property
    def starts(self) -> NDArray[np.int64]:
        """First record of each part, and the number of records in all, [parts + 1]."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])]).astype(np.int64)

    def gather(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copies of some records as stored: [b, 3, H, W], [b, H, W, 3] or [b, H, W]."""
        if len(self.parts) == 1:
            return self._shaped(self.parts[0][records])
        starts = self.starts
        part_of = np.searchsorted(starts, records, side="right") - 1
        out = np.empty((len(records), *self.parts[0].shape[1:]), dtype=np.uint8)
        for part in np.unique(part_of):
            mask = part_of == part
            out[mask] = self.parts[part][records[mask] - starts[part]]
        return self._shaped(out)

    def rgb(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copies of some records as RGB [b, H, W, 3]; gray is repeated into the three channels."""
        stored = self.gather(records)
        if self.layout == "CHW":
            return np.ascontiguousarray(stored.transpose(0, 2, 3, 1))
        return stored if self.layout == "HWC" else np.repeat(stored[..., None], 3, axis=3)

    def name(self, record: int) -> str:
        """File and record number within it, for messages."""
        starts = self.starts
        part = int(np.searchsorted(starts, record, side="right")) - 1
        return f"{self.files[part]}[{record - starts[part]}]"

    def _shaped(self, flat: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # mapped records are strided rows of bytes: the map cannot be reshaped, the gathered copy can, for free
        return flat.reshape(len(flat), 3, *self.size) if self.layout == "CHW" else flat


def open_cifar(paths: Sequence[Path]) -> tuple[PixelStore, NDArray[np.int32], tuple[str, ...]]:
    """CIFAR-10 or CIFAR-100 binary files, concatenated in the order given.

    Args:
        paths: existing files of one flavor.

    Returns:
        The pixels, the labels int32 [n] (fine ones for CIFAR-100), and the class names (from ``fine_label_names.txt``
        or ``batches.meta.txt`` next to the first file, else the numbers).

    Raises:
        RequestError: a file is not whole records with labels in range, flavors differ, or the name file is wrong.
    """
    flavors = [_flavor(path) for path in paths]
    flavor = flavors[0]
    for path, other in zip(paths, flavors, strict=True):
        if other is not flavor:
            raise RequestError(f"{path}: expected {flavor.name} like {paths[0]}, found {other.name}")
    records = [_records(path, flavor) for path in paths]
    head = len(flavor.label_bounds)
    labels = np.concatenate([r[:, head - 1] for r in records]).astype(np.int32)
    store = PixelStore(tuple(p.name for p in paths), tuple(r[:, head:] for r in records), "CHW", (32, 32))
    return store, labels, _class_names(paths[0].parent / flavor.names_file, flavor.label_bounds[-1])


ARRAYS = ("images", "labels", "classes")
"""Names of an ``.npz``'s arrays, where no others are given."""


def open_npz(path: Path, arrays: Sequence[str] = ()) -> tuple[PixelStore, NDArray[np.int32], tuple[str, ...]]:
    """An ``.npz`` holding images and, optionally, labels and class names.

    Args:
        path: the file. Images: uint8 [n, H, W, 3], [n, 3, H, W], or gray [n, H, W], [n, H, W, 1] or [n, 1, H, W].
            Labels: integers [n] or [n, 1], -1 for unlabeled (all unlabeled if absent). Class names: strings.
        arrays: their names, the last ones may be left out; `ARRAYS` without it, where the last two need not be there.

    Returns:
        The pixels, the labels int32 [n], and the class names (numbers up to the largest label if not given).

    Raises:
        RequestError: not a readable npz without pickled objects, or an array has the wrong name, type or shape.
    """
    called = dict(zip(ARRAYS, arrays or ARRAYS, strict=False))
    read, names = read_npz(path, called.values())
    found = {kind: read[name] for kind, name in called.items() if name in read}
    lacking = [name for kind, name in called.items() if kind not in found and (arrays or kind == "images")]
    if lacking:
        hint = "" if arrays else "; data.arrays = [images, labels] says which are which"
        raise RequestError(f"{path}: expected an array named {lacking[0]!r}, found {names[:20]}{hint}")
    images = found["images"]
    planar = images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3)
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or not (images.ndim == 3 or planar or images.shape[3] in (1, 3))
    ):
        raise RequestError(
            f"{path}: expected {called['images']!r} as uint8 [n, H, W, 3], [n, 3, H, W] or gray [n, H, W], "
            f"found {images.dtype} {list(images.shape)}"
        )
    if 0 in images.shape:
        raise RequestError(
            f"{path}: expected at least one image with pixels, found {called['images']!r} of {list(images.shape)}"
        )
    labels = found.get("labels", np.full(len(images), -1, dtype=np.int32))
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if (
        labels.shape != (len(images),)
        or labels.dtype.kind not in "iu"
        or labels.min() < -1
        or labels.max() >= _MAX_CLASSES
    ):
        raise RequestError(
            f"{path}: expected {called['labels']!r} as {len(images)} integers >= -1 and below {_MAX_CLASSES}, "
            f"found {labels.dtype} {list(labels.shape)}"
        )
    needed = int(labels.max()) + 1
    classes = tuple(str(c) for c in found["classes"].reshape(-1)) if "classes" in found else _numbers(needed)
    if len(classes) < needed:
        raise RequestError(f"{path}: expected at least {needed} names in {called['classes']!r}, found {len(classes)}")
    height, width = images.shape[2:] if planar else images.shape[1:3]
    gray = images.size == len(images) * height * width
    shape = (len(images), height, width) if gray else (len(images), 3 * height * width) if planar else images.shape
    pixels = np.ascontiguousarray(images.reshape(shape))
    layout: Layout = "HW" if gray else "CHW" if planar else "HWC"
    return PixelStore((path.name,), (pixels,), layout, (height, width)), labels.astype(np.int32), classes


def _flavor(path: Path) -> _Flavor:
    size = path.stat().st_size
    reasons = []
    for flavor in _FLAVOURS:
        if size == 0 or size % flavor.record_bytes:
            reasons.append(f"{flavor.name}: not whole records of {flavor.record_bytes} bytes")
            continue
        records = _records(path, flavor)
        largest = [int(records[:, i].max()) for i in range(len(flavor.label_bounds))]
        if all(found < bound for found, bound in zip(largest, flavor.label_bounds, strict=True)):
            return flavor
        reasons.append(f"{flavor.name}: largest labels {largest}, expected below {list(flavor.label_bounds)}")
    raise RequestError(
        f"{path}: expected a CIFAR-10 or CIFAR-100 binary file, found {size} bytes ({'; '.join(reasons)})"
    )


def _records(path: Path, flavor: _Flavor) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, flavor.record_bytes)


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    if not path.is_file():
        return _numbers(count)
    try:
        text = read_file(path, 1 << 20).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: expected {count} class names; {error}") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != count:
        raise RequestError(f"{path}: expected {count} class names, found {len(names)}")
    return names


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count))
