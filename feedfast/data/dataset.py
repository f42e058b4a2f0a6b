"""Where images come from: one small description of a dataset, whatever its files look like.

A sample is known by a stable id (its place in the complete dataset, whatever ``limit`` and ``fraction`` leave of it)
and by its name (a path relative to the source, or file[record]). Everything downstream asks for *positions* into
``ids``; views are drawn from ids, so a limited run sees the same crops of the same images as a full one.

There are two kinds. ``"pixels"``: images in arrays (CIFAR, npz, MNIST), see ``arrays.py``, or from a Python object.
``"files"``: encoded images of any size, in files of their own (``images.py``) or packed in large ones (``packed.py``);
they are read here and decoded in the loader. Boxes and masks come with files of their own, see ``detect.py`` and
``segment.py``.
Opening a dataset finds *every* unreadable image and names them all in one error. Nothing here decodes for training,
augments, or knows of the cache; ``fingerprint`` is what a cache stores to recognize its data again.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from feedfast.data.annotations import Boxes, ClassLabels, Masks
from feedfast.data.arrays import PixelStore, open_cifar, open_npz
from feedfast.data.cifar import holds_cifar, is_cifar_archive, is_cifar_pickle, known_folder_below, open_cifar_python
from feedfast.data.content import content_hash
from feedfast.data.dense import Asked, Opened
from feedfast.data.detect import DETECT_EXPECTED, open_detect
from feedfast.data.folder import list_images, refuse_odd_text
from feedfast.data.headers import CMYK_UNMARKED
from feedfast.data.idx import idx_images_below, idx_of_split, is_idx, open_idx
from feedfast.data.images import Unreadable, encoded_header, for_dali, full_check, read_image, scan_images, scan_opened
from feedfast.data.indexing import open_packed
from feedfast.data.listing import Wanted
from feedfast.data.objects import ObjectStore, Samples, open_object
from feedfast.data.packed import Packed
from feedfast.data.segment import SEGMENT_EXPECTED, open_segment
from feedfast.data.selection import chosen
from feedfast.data.shards import Kind, expanded, packed_files
from feedfast.errors import RequestError

__all__ = ["Dataset", "ImageSource", "open_dataset"]

ImageSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Samples
"""What `open_dataset` opens: a path, several, or an object that gives samples."""

_SHOWN = 20  # unreadable paths printed; the count covers the rest
_HASHING_THREADS = 4
_HASHED_SAMPLES = 256  # samples whose bytes go into the fingerprint, evenly spaced
_EXPECTED = {
    "classify": "CIFAR's files (binary, Python or .tar.gz), a folder of images or of class folders, an .npz, MNIST's "
    "files, shards of WebDataset (.tar), Arrow or Parquet files, or in Python an object whose items are "
    "(image, label) or mappings with both",
    "segment": SEGMENT_EXPECTED,
    "detect": DETECT_EXPECTED,
}
"""By task, what `open_dataset` takes."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with ids, labels and sizes. Made by ``open_dataset``.

    Attributes:
        source: what was asked for, as text.
        kind: ``"pixels"`` or ``"files"``.
        ids: uint32 [n], ascending; places in the complete dataset.
        labels: int32 [n], -1 where there is none, as always where there are boxes or masks.
        sizes: int32 [n, 2], height and width after EXIF orientation.
        classes: class names by label; empty for unlabeled folders.
        pixels_store: the arrays of a ``"pixels"`` dataset, or the object that gives them; else None.
        root: folder of images in files of their own, else None.
        files: paths relative to ``root`` by id (the complete listing), empty for others.
        packed: the images of a ``"files"`` dataset that are packed in large files, else None.
        skipped: extension → files that look like images and are no samples.
        remarks: a remark on the form of some samples' files → how many it was made on.
        marks: boxes or masks by position, None where samples have class labels.
    """

    source: str
    kind: Literal["pixels", "files"]
    ids: NDArray[np.uint32]
    labels: NDArray[np.int32]
    sizes: NDArray[np.int32]
    classes: tuple[str, ...]
    pixels_store: PixelStore | ObjectStore | None = None
    root: Path | None = None
    files: tuple[str, ...] = ()
    packed: Packed | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, int] = field(default_factory=dict)
    marks: Boxes | Masks | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def annotations(self) -> ClassLabels | Boxes | Masks:
        """What the samples are labeled with, by position."""
        return ClassLabels(self.labels, self.classes) if self.marks is None else self.marks

    def name(self, position: int) -> str:
        """Path of a sample relative to the source, or ``file[record]``."""
        record = int(self.ids[position])
        store = self.pixels_store if self.packed is None else self.packed
        return self.files[record] if store is None else store.name(record)

    def path(self, position: int) -> Path:
        """Full path of a sample's file; only for images in files of their own."""
        if self.root is None:
            raise ValueError(f"{self.source}: its samples have no files of their own")
        return self.root / self.files[int(self.ids[position])]

    def where(self, position: int) -> str:
        """A sample of ``kind == "files"`` in messages: the path of its file, or its name in the one it is packed in."""
        return str(self.path(position)) if self.packed is None else self.packed.where(int(self.ids[position]))

    def check(self, position: int) -> None:
        """Decode a sample of ``kind == "files"`` completely and throw it away.

        Raises:
            Unreadable: it cannot be decoded to its end.
        """
        full_check(io.BytesIO(self._content(position)))

    def pixels(
        self, positions: Sequence[int] | NDArray[np.integer[Any]]
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Decoded samples, only for ``kind == "pixels"``: uint8 RGB [b, H, W, 3], copies.

        Of a Python object, whose images may differ in size, a list of [H, W, 3] where they do.
        """
        if self.pixels_store is None:
            raise ValueError(f"{self.source}: samples of kind 'files' are encoded; use encoded() or a Loader")
        return self.pixels_store.rgb(self._records(positions))

    def encoded(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> list[NDArray[np.uint8]]:
        """Encoded images, only for ``kind == "files"``: one 1-D uint8 array per sample.

        Headers and end markers are looked at again. A file replaced since the dataset was opened would get a crop made
        for another image; one cut short meanwhile would pass region decoding, or bring a native decoder down.

        Raises:
            RequestError: files have gone, been damaged or changed size; all of this batch are named.
        """
        contents, problems = [], []
        for position in positions:
            size = (int(self.sizes[position, 0]), int(self.sizes[position, 1]))
            try:
                content = self._content(int(position))
                found = encoded_header(io.BytesIO(content))
            except Unreadable as why:
                problems.append(f"\n  {self.where(int(position))}: {why}")
                continue
            if found[:2] != size:
                problems.append(
                    f"\n  {self.where(int(position))}: {found[0]}x{found[1]} pixels, {size[0]}x{size[1]} when opened"
                )
            contents.append(np.frombuffer(content, dtype=np.uint8))
        if problems:
            raise RequestError(
                f"{self.source}: {len(problems)} images have changed since the dataset was opened:{''.join(problems)}"
            )
        return contents

    def stored(
        self, positions: Sequence[int] | NDArray[np.integer[Any]]
    ) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
        """Some samples as they are stored: `encoded` files, or copies of pixels.

        Pixels are uint8 RGB [b, H, W, 3]; of a store of planes (CIFAR) they are [b, 3, H, W], as in the file.

        Raises:
            RequestError: as `encoded`.
        """
        if self.pixels_store is None:
            return self.encoded(positions)
        if self.pixels_store.layout == "CHW":
            return self.pixels_store.gather(self._records(positions))
        return self.pixels(positions)

    def decodable(
        self, positions: Sequence[int] | NDArray[np.integer[Any]], contents: Sequence[NDArray[np.uint8]]
    ) -> list[NDArray[np.uint8]]:
        """`encoded` samples as DALI is given them, see `for_dali`.

        Raises:
            RequestError: files that do not decode, all of them named.
        """
        ready, problems, unmarked = [], [], CMYK_UNMARKED in self.remarks
        for position, content in zip(positions, contents, strict=True):
            try:
                ready.append(for_dali(content, unmarked_cmyk=unmarked))
            except Unreadable as why:
                problems.append(f"\n  {self.where(int(position))}: {why}")
        if problems:
            raise RequestError(f"{self.source}: {len(problems)} images cannot be decoded:{''.join(problems)}")
        return ready

    def content(self, positions: Sequence[int] | NDArray[np.integer[Any]] | None = None) -> NDArray[np.uint64]:
        """A hash of each sample's bytes (see `stored` and `content_hash`), to find one that has changed.

        Args:
            positions: which samples; None = all. Their bytes are all read, by a few threads.

        Returns:
            uint64 [n].

        Raises:
            RequestError: as `encoded`.
        """
        wanted = np.arange(len(self)) if positions is None else np.asarray(positions, dtype=np.int64)
        parts = [wanted[at : at + 256] for at in range(0, len(wanted), 256)]
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            hashed = list(pool.map(lambda part: content_hash(self.stored(part)), parts))
        return np.concatenate([np.empty(0, np.uint64), *hashed])

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this selection of samples: JSON-able, the same on every machine and wherever the files lie.

        Returns:
            ``kind``, ``count`` and SHA-256 digests of ids, sizes, labels, and of the content of up to 256 evenly
            spaced samples (stored bytes for files, RGB bytes for pixels). Names and folders are not part of it.
        """
        sampled = np.unique(np.linspace(0, len(self) - 1, num=min(len(self), _HASHED_SAMPLES)).astype(np.int64))
        content = hashlib.sha256()
        for position in sampled:
            data = self.encoded([position])[0] if self.pixels_store is None else self.pixels([position])[0]
            content.update(f"{self.ids[position]}:{data.size};".encode())
            content.update(data.tobytes())
        return {
            "kind": self.kind,
            "count": len(self),
            "ids_sha256": hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest(),
            "sizes_sha256": hashlib.sha256(self.sizes.astype("<i4").tobytes()).hexdigest(),
            "labels_sha256": self.annotations.fingerprint(),
            "content_sha256": content.hexdigest(),
        }

    def _content(self, position: int) -> bytes:
        return read_image(self.path(position)) if self.packed is None else self.packed.read(int(self.ids[position]))

    def _records(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        return self.ids[np.asarray(positions, dtype=np.int64)].astype(np.int64)


def open_dataset(
    source: ImageSource,
    *,
    limit: int = 0,
    fraction: float = 1.0,
    arrays: Sequence[str] = (),
    split: Literal["train", "val"] = "train",
    check: Literal["fast", "full"] = "fast",
    progress: Callable[[int, int], None] | None = None,
    task: Literal["classify", "segment", "detect"] = "classify",
    classes: Sequence[str] = (),
) -> Dataset:
    """Open a dataset and look at every image of it.

    Args:
        source: CIFAR-10 or CIFAR-100: a binary file or a list of them, or Python's batches: a folder
            (``cifar-10-batches-py``), its archive (``.tar.gz``), or a list of batches. A folder of class folders
            (labels by sorted folder name) or a flat folder (unlabeled) of image files. An ``.npz`` (``images``,
            ``labels``, ``classes``). MNIST's files: one of its files of images (``train-images-idx3-ubyte.gz``),
            gzipped or not, whose labels lie next to it, or their folder. Shards of WebDataset, Arrow or Parquet files,
            or their folder; braces in a path stand for several files, see ``shards.py``. Or an object with ``__len__``
            and ``__getitem__`` that gives (image, label) or a mapping with both, see ``objects.py``.
        limit: 0 for all samples, n for the first n of each class (of the whole, where there are no labels). Ids stay
            those of the complete dataset.
        fraction: of the samples of each class that ``limit`` leaves, above 0 to 1: the nearest whole number of them, at
            least one. A function of the class's number and size alone: the same fraction takes the same samples always,
            a smaller one some of those of a larger one.
        arrays: names of an ``.npz``'s arrays, see `open_npz`; of tables the columns of images and labels, of tar shards
            the endings of their members, see `walk_tar`.
        split: which part of a source that holds both (CIFAR's folder or archive, MNIST's folder, a folder of shards).
        check: for encoded images, ``"fast"`` reads headers and end markers, ``"full"`` decodes every image.
        progress: called with (images looked at, total).
        task: what is learned. For ``"segment"`` the source is a folder with ``images/`` and ``masks/``, or Pascal VOC's
            folder or lists; for ``"detect"`` it is COCO's JSON, or VOC's: see ``segment.py`` and ``detect.py``. Then
            ``limit`` and ``fraction`` count samples of the whole.
        classes: names of a segmentation's or VOC's classes by number, in place of those in ``classes.txt``.

    Returns:
        The dataset.

    Raises:
        RequestError: the path is missing or not one of the above, or images are unreadable (all are counted, the first
            twenty named with the reason), or a fraction is asked of images without labels; all that is wrong with
            boxes and masks, likewise.
    """
    if limit < 0:
        raise RequestError(f"limit: expected 0 (all) or a number of samples per class, found {limit}")
    if not 0 < fraction <= 1:
        raise RequestError(f"fraction: expected a share of the samples, above 0 to 1, found {fraction}")
    if check not in ("fast", "full"):
        raise RequestError(f"check: expected 'fast' or 'full', found {check!r}")
    if task not in _EXPECTED:
        raise RequestError(f"task: expected one of {', '.join(_EXPECTED)}, found {task!r}")
    if task != "classify" and arrays:
        raise RequestError(f"arrays: expected none for task {task!r}, found {', '.join(arrays)}")
    if task == "classify" and classes:
        raise RequestError("classes: expected none for task 'classify', whose data name their own")
    paths = _paths(source, _EXPECTED[task])
    if paths is None and task == "classify":
        return _open_object(source, limit, fraction, arrays, progress)
    if not paths:
        found = "an empty list" if paths is not None else f"an object of type {type(source).__name__}"
        raise RequestError(f"dataset: expected {_EXPECTED[task]}, found {found}")
    name = ", ".join(str(path) for path in paths)
    for path in paths:
        refuse_odd_text(str(path), "a path")
    paths = [Path(path) for text in paths for path in expanded(str(text))]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise RequestError(f"dataset not found: {', '.join(missing[:_SHOWN])}{more}; expected {_EXPECTED[task]}")
    if task != "classify":
        asked = Asked(name, split, tuple(classes), check == "full", progress, limit, fraction)
        return _open_marked(open_segment(paths, asked) if task == "segment" else open_detect(paths, asked), name)
    return _open_labeled(paths, name, limit, fraction, arrays, split, check, progress)


def _open_marked(found: Opened, name: str) -> Dataset:
    labels = np.full(len(found.ids), -1, dtype=np.int32)
    return Dataset(name, "files", labels=labels, classes=found.marks.classes, **vars(found))


def _open_labeled(
    paths: Sequence[Path],
    name: str,
    limit: int,
    fraction: float,
    arrays: Sequence[str],
    split: Literal["train", "val"],
    check: Literal["fast", "full"],
    progress: Callable[[int, int], None] | None,
) -> Dataset:
    packed = None if _is_unpacked(paths, split) else packed_files(paths, split)
    if packed is not None:
        return _open_packed(*packed, name, limit, fraction, arrays, check == "full", progress)
    whole = [path.is_dir() or path.suffix.lower() == ".npz" or is_idx(path) or is_cifar_archive(path) for path in paths]
    if len(paths) > 1 and any(whole):
        raise RequestError(
            f"a list may only name CIFAR binary files or batches, or shards (.tar, .arrow, .parquet), found {name}"
        )
    if arrays and paths[0].suffix.lower() != ".npz":
        raise RequestError(
            f"arrays: expected an .npz, tables or tar shards, whose arrays, columns or endings they name, found {name}"
        )
    idx = idx_of_split(paths[0], split) if paths[0].is_dir() else paths[0] if is_idx(paths[0]) else None
    if idx is not None:
        store, labels, classes = open_idx(idx)
    elif is_cifar_archive(paths[0]) or is_cifar_pickle(paths[0]):
        store, labels, classes = open_cifar_python(paths, split)
    elif paths[0].is_dir():
        return _open_folder(paths[0], name, limit, fraction, check == "full", progress)
    elif paths[0].suffix.lower() == ".npz":
        store, labels, classes = open_npz(paths[0], arrays)
    else:
        store, labels, classes = open_cifar(paths)
    for kind in classes:
        refuse_odd_text(kind, f"{name}: classes with names")
    ids = chosen(name, labels, limit, fraction)
    sizes = np.tile(np.array(store.size, dtype=np.int32), (len(ids), 1))
    return Dataset(name, "pixels", ids, labels[ids], sizes, classes, pixels_store=store)


def _is_unpacked(paths: Sequence[Path], split: Literal["train", "val"]) -> bool:
    """Whether paths mean MNIST's files or CIFAR's, which come in folders and tars, too."""
    first = paths[0]
    if first.is_dir():
        return idx_of_split(first, split) is not None or is_cifar_pickle(first)
    return len(paths) == 1 and is_cifar_archive(first) and (first.suffix.lower() != ".tar" or holds_cifar(first))


def _two(arrays: Sequence[str]) -> Wanted:
    if len(arrays) > 2:
        raise RequestError(f"arrays: expected names for images and labels, found {len(arrays)}: {list(arrays)}")
    return Wanted(*arrays)


def _open_packed(
    kind: Kind,
    files: Sequence[Path],
    source: str,
    limit: int,
    fraction: float,
    arrays: Sequence[str],
    full: bool,
    progress: Callable[[int, int], None] | None,
) -> Dataset:
    wanted = _two(arrays)
    packed = open_packed(files, kind, source, wanted, full=full, progress=None if full else progress)
    index = packed.index
    ids = chosen(source, index.arrays["label"], limit, fraction)
    unreadable: Mapping[int, str] = dict(index.facts["faults"])
    if full:
        _, found, _ = scan_opened(len(ids), lambda at: packed.open(int(ids[at])), full=True, progress=progress)
        unreadable = {int(ids[at]): why for at, why in found}
    wrong = np.intersect1d(list(unreadable), ids).tolist() if unreadable else []
    _refuse_unreadable(source, len(ids), [(packed.where(record), unreadable[record]) for record in wrong])
    counts = np.bincount(index.arrays["remark"][ids], minlength=1)[1:]
    return Dataset(
        source,
        "files",
        ids,
        index.arrays["label"][ids],
        index.arrays["size"][ids],
        tuple(index.facts["classes"]),
        packed=packed,
        skipped=index.facts["skipped"],
        remarks={index.facts["remarks"][at]: int(count) for at, count in enumerate(counts) if count},
    )


def _paths(source: Any, expected: str) -> list[Path] | None:
    """The paths a source names; None if it is an object that gives samples."""
    if isinstance(source, (str, os.PathLike)):
        return [Path(source)]
    if isinstance(source, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in source):
        return [Path(item) for item in source]
    if isinstance(source, Samples):
        return None
    raise RequestError(f"dataset: expected {expected}, found {type(source).__name__}")


def _open_object(
    source: Any,
    limit: int,
    fraction: float,
    arrays: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> Dataset:
    store, labels, sizes, classes = open_object(source, progress, _two(arrays))
    name = f"a {type(source).__name__} object"
    for kind in classes:
        refuse_odd_text(kind, f"{name}: classes with names")
    ids = chosen(name, labels, limit, fraction)
    return Dataset(name, "pixels", ids, labels[ids], sizes[ids], classes, pixels_store=store)


def _open_folder(
    root: Path,
    source: str,
    limit: int,
    fraction: float,
    full: bool,
    progress: Callable[[int, int], None] | None,
) -> Dataset:
    if arrays := idx_images_below(root):
        raise RequestError(f"{root}: holds MNIST's files; expected one of its files of images, {' or '.join(arrays)}")
    if held := known_folder_below(root):
        raise RequestError(f"{root}: expected images, found {held} in it; name {root / held}")
    found = list_images(root)
    labels = np.array(found.labels, dtype=np.int32)
    ids = chosen(source, labels, limit, fraction)
    paths = [root / found.files[i] for i in ids]
    sizes, problems, remarks = scan_images(paths, full=full, progress=progress)
    _refuse_unreadable(source, len(paths), [(str(paths[i]), why) for i, why in problems])
    return Dataset(
        source,
        "files",
        ids,
        labels[ids],
        sizes,
        found.classes,
        root=root,
        files=found.files,
        skipped=found.skipped,
        remarks=dict(remarks),
    )


def _refuse_unreadable(source: str, count: int, problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        shown = "".join(f"\n  {where}: {why}" for where, why in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RequestError(f"{source}: {len(problems)} of {count} images are unreadable:{shown}{more}")
