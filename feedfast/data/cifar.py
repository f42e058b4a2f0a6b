"""CIFAR as torchvision downloads it: pickled batches in a folder, single batches, or the archive they come in.

Nothing is unpickled (see ``pickles.py``) and nothing is unpacked to the disk. A folder or an archive holds both splits:
which one is meant follows from where it is named, ``data.train`` or ``data.val``. Pixels and labels are held in memory,
3 kB per image; they and their order are those of the binary files, so that a cache knows one by the other.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from feedfast.data.arrays import PixelStore
from feedfast.data.pickles import PickleError, read_pickle
from feedfast.data.tars import first_member
from feedfast.errors import RequestError
from feedfast.files import open_regular

__all__ = ["holds_cifar", "is_cifar_archive", "is_cifar_pickle", "known_folder_below", "open_cifar_python"]

Split = Literal["train", "val"]

_MAX_BYTES = 256 << 20  # of one pickle; CIFAR-100's training images are 155 MB
_MAX_UNPACKED_BYTES = 1 << 30  # of an archive; CIFAR's are 185 MB
_ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class _Flavor:
    folder: str  # the name torchvision's archives have for it
    splits: Mapping[Split, tuple[str, ...]]
    meta: str
    labels: bytes
    names: bytes
    classes: int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.splits["train"], *self.splits["val"])


_FLAVORS = (
    _Flavor(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)},
        "batches.meta",
        b"labels",
        b"label_names",
        10,
    ),
    _Flavor(
        "cifar-100-python", {"train": ("train",), "val": ("test",)}, "meta", b"fine_labels", b"fine_label_names", 100
    ),
)


def is_cifar_archive(path: Path) -> bool:
    """Whether a file is named as an archive is."""
    return path.name.lower().endswith(_ARCHIVES)


def holds_cifar(tar: Path) -> bool:
    """Whether a tar that is not compressed begins as CIFAR's archive does."""
    folder = first_member(tar).removeprefix("./").partition("/")[0]
    return folder in {flavor.folder for flavor in _FLAVORS}


def is_cifar_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle does, or a folder holds a split of CIFAR in pickles."""
    if path.is_dir():
        return any((path / name).is_file() and is_cifar_pickle(path / name) for f in _FLAVORS for name in f.files)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # no label of a binary file is 128


def known_folder_below(root: Path) -> str | None:
    """What a folder of torchvision's downloads holds that is meant in its place, for a message."""
    for folder in (*(flavor.folder for flavor in _FLAVORS), "MNIST/raw", "FashionMNIST/raw"):
        if (root / folder).is_dir():
            return folder
    return next((entry.name for entry in sorted(root.glob("cifar-*.tar.gz"))), None)


def open_cifar_python(paths: Sequence[Path], split: Split) -> tuple[PixelStore, NDArray[np.int32], tuple[str, ...]]:
    """CIFAR-10 or CIFAR-100 from pickled batches.

    Args:
        paths: one folder, one archive (``.tar.gz``, ``.tgz``, ``.tar``), or batches of one flavor, in order.
        split: which batches of a folder or archive; batches that are named themselves are taken as they are.

    Returns:
        The pixels, the labels int32 [n] (fine ones for CIFAR-100), and the class names (from the file of names next to
        the batches, else the numbers).

    Raises:
        RequestError: a batch is missing or is not one of CIFAR's, or flavors differ.
    """
    first = paths[0]
    if first.is_dir():
        flavor = _flavor_of(first, {name for f in _FLAVORS for name in f.files if (first / name).is_file()})
        missing = [name for name in flavor.splits[split] if not (first / name).is_file()]
        if missing:
            raise RequestError(f"{first}: expected {', '.join(flavor.splits[split])}, found no {', '.join(missing)}")
        contents = {name: _content(first / name) for name in flavor.splits[split]}
        meta = _content(first / flavor.meta) if (first / flavor.meta).is_file() else None
        return _opened(first, flavor, contents, meta)
    if is_cifar_archive(first):
        flavor, contents, meta = _unpacked(first, split)
        return _opened(first, flavor, contents, meta)
    batches = {str(path): _content(path) for path in paths}
    held = _read(first, next(iter(batches.values())))
    found = next((f for f in _FLAVORS if isinstance(held, dict) and f.labels in _bytes_keys(held)), None)
    if found is None:
        raise RequestError(f"{first}: expected a batch of CIFAR's Python files, found a pickle of something else")
    beside = first.parent / found.meta
    return _opened(first.parent, found, batches, _content(beside) if beside.is_file() else None)


def _flavor_of(place: Path, names: set[str]) -> _Flavor:
    for flavor in _FLAVORS:
        if names & set(flavor.files):
            return flavor
    raise RequestError(f"{place}: expected the batches of CIFAR-10 or CIFAR-100 in it, found none")


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _MAX_BYTES:
            raise RequestError(f"{path}: expected a batch of CIFAR, a file of at most {_MAX_BYTES} bytes, found {size}")
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: expected a batch of CIFAR; {error.strerror}") from error


class _Bounded(io.RawIOBase):
    """A stream that ends in an error where an archive would unpack to more than any of CIFAR's."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, _MAX_UNPACKED_BYTES

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self.file.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {_MAX_UNPACKED_BYTES} bytes")
        return data


def _unpacked(archive: Path, split: Split) -> tuple[_Flavor, dict[str, bytes], bytes | None]:
    """The batches of a split and the file of names, by one pass over an archive."""
    found: dict[str, dict[str, bytes]] = {flavor.folder: {} for flavor in _FLAVORS}
    wanted = {f.folder: {*f.splits[split], f.meta} for f in _FLAVORS}
    try:
        os.close(open_regular(archive))  # no pipe or device
        opened: Any = open(archive, "rb") if archive.suffix.lower() == ".tar" else gzip.open(archive, "rb")  # noqa: SIM115
        with opened as file, tarfile.open(fileobj=_Bounded(file), mode="r|") as members:
            for member in members:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if not member.isreg() or name not in wanted.get(folder, ()) or member.size > _MAX_BYTES:
                    continue
                held = members.extractfile(member)
                found[folder][name] = held.read() if held is not None else b""
                if len(found[folder]) == len(wanted[folder]):
                    break
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise RequestError(f"{archive}: expected CIFAR's archive, {' or '.join(found)}; {error}") from error
    for flavor in _FLAVORS:
        contents = found[flavor.folder]
        meta = contents.pop(flavor.meta, None)
        if contents:
            missing = [name for name in flavor.splits[split] if name not in contents]
            if missing:
                raise RequestError(f"{archive}: expected {', '.join(flavor.splits[split])}, found no {missing[0]}")
            return flavor, {name: contents[name] for name in flavor.splits[split]}, meta
    raise RequestError(
        f"{archive}: expected CIFAR's archive, with {' or '.join(found)} in it, found neither; shards of WebDataset "
        "are read where they lie: unpack them to .tar"
    )


def _opened(
    place: Path, flavor: _Flavor, batches: Mapping[str, bytes], meta: bytes | None
) -> tuple[PixelStore, NDArray[np.int32], tuple[str, ...]]:
    images, labels = [], []
    for name, content in batches.items():
        where = Path(name) if Path(name).is_absolute() or "/" in name else place / name
        held = _bytes_keys(_read(where, content))
        if flavor.labels not in held:
            raise RequestError(f"{where}: expected {flavor.labels.decode()!r} in it, as in {flavor.folder}, found none")
        pixels, classes = held.get(b"data"), np.asarray(held[flavor.labels] or [-1])
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise RequestError(f"{where}: expected 'data' as uint8 [n, 3072]")
        bad = classes.shape != (len(pixels),) or classes.dtype.kind not in "iu"
        if bad or classes.min() < 0 or classes.max() >= flavor.classes:
            raise RequestError(f"{where}: expected {len(pixels)} labels from 0 to {flavor.classes - 1}")
        images.append(np.ascontiguousarray(pixels))
        labels.append(classes.astype(np.int32))
    store = PixelStore(tuple(Path(name).name for name in batches), tuple(images), "CHW", (32, 32))
    return store, np.concatenate(labels), _class_names(place, flavor, meta)


def _class_names(place: Path, flavor: _Flavor, meta: bytes | None) -> tuple[str, ...]:
    if meta is None:
        return tuple(str(number) for number in range(flavor.classes))
    names = _bytes_keys(_read(place / flavor.meta, meta)).get(flavor.names)
    if not isinstance(names, list) or len(names) != flavor.classes:
        raise RequestError(f"{place / flavor.meta}: expected {flavor.classes} names in {flavor.names.decode()!r}")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)


def _read(path: Path, content: bytes) -> Any:
    try:
        return read_pickle(content)
    except PickleError as error:
        raise RequestError(f"{path}: expected a batch of CIFAR's Python files, found {error}") from error


def _bytes_keys(held: Any) -> dict[bytes, Any]:
    """A batch by its keys, which Python 3 writes as text."""
    if not isinstance(held, dict):
        return {}
    return {key.encode(errors="replace") if isinstance(key, str) else key: value for key, value in held.items()}
