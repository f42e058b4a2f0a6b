"""Images from a Python object with ``__len__`` and ``__getitem__``: torch's Datasets, and those of Hugging Face.

The object is asked for its samples when it is opened, once each, for sizes, labels and a checksum of the pixels, and
again whenever a sample is used: it may hold more than memory. Whatever it returns must be the same each time. feedfast
draws crops and flips itself, from a plan that teachers and student share; a random transform inside the object would
give them different pixels. So some samples are asked for twice at once, and each later answer compared with the first.

An item is (image, label), or a mapping with both. An image is a PIL image, an array [H, W, 3], [H, W] or [H, W, 1], or
a tensor [3, H, W], [1, H, W] or [H, W], of uint8.
An object is asked by one thread at a time.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from feedfast.data.listing import BY_DEFAULT, IMAGE, LABEL, Wanted
from feedfast.errors import RequestError

__all__ = ["ObjectStore", "Samples", "open_object"]

MAX_CLASSES = 1 << 20  # each gets a name

_TWICE = 16  # samples asked for a second time on opening
_ASKING = threading.Lock()  # one for all: a lock in the store could not be pickled


@runtime_checkable
class Samples(Protocol):
    """What `open_object` takes."""

    def __len__(self) -> int:
        """How many samples."""

    def __getitem__(self, index: int, /) -> Any:
        """(image, label) of a sample."""


@dataclass(frozen=True, eq=False)
class ObjectStore:
    """Records of an object, with the surface of a `PixelStore`; sizes may differ."""

    samples: Samples
    name_of_kind: str
    sums: NDArray[np.uint32]  # crc32 of each record's RGB pixels when it was opened
    wanted: Wanted
    layout: Literal["HWC"] = "HWC"

    def rgb(self, records: NDArray[np.int64]) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Some records as RGB: [b, H, W, 3] if their sizes are equal, else a list of [H, W, 3].

        Raises:
            RequestError: a record is not what it was when the object was opened.
        """
        images = []
        for record in records.tolist():
            image, _ = _asked(self.samples, record, self.name(record), self.wanted)
            if zlib.crc32(image.data) != self.sums[record]:
                raise _changing(self.name(record))
            images.append(image)
        return np.stack(images) if len({image.shape for image in images}) == 1 else images

    def gather(self, records: NDArray[np.int64]) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """`rgb`: an object has no other stored form."""
        return self.rgb(records)

    def name(self, record: int) -> str:
        """Kind of object and number, for messages."""
        return f"{self.name_of_kind}[{record}]"


def open_object(
    samples: Samples, progress: Callable[[int, int], None] | None = None, wanted: Wanted = BY_DEFAULT
) -> tuple[ObjectStore, NDArray[np.int32], NDArray[np.int32], tuple[str, ...]]:
    """Ask an object for all its samples.

    Args:
        samples: the object.
        progress: called with (samples asked for, total).
        wanted: what image and label are called in items that are mappings; "" = ``image``, and ``label`` if there is
            one.

    Returns:
        The store, labels int32 [n] (-1 where the label is None), sizes int32 [n, 2], and the class names: its
        ``classes``, or those of the label's feature, if that are as many names as labels need, else the numbers.

    Raises:
        RequestError: no samples, a sample that is not (image, label) of the kinds above, or one that changes when it is
            asked for twice.
    """
    kind = type(samples).__name__
    count = len(samples)
    if not 1 <= count < 2**32:
        raise RequestError(f"{kind}: expected at least one sample, found {count}")
    labels, sizes = np.empty(count, np.int32), np.empty((count, 2), np.int32)
    sums = np.empty(count, np.uint32)
    for record in range(count):
        image, labels[record] = _asked(samples, record, f"{kind}[{record}]", wanted)
        sizes[record] = image.shape[:2]
        sums[record] = zlib.crc32(image.data)
        if progress is not None and (record % 256 == 255 or record + 1 == count):
            progress(record + 1, count)
    store = ObjectStore(samples, kind, sums, wanted)
    store.rgb(np.unique(np.linspace(0, count - 1, num=min(count, _TWICE)).astype(np.int64)))
    needed = int(labels.max()) + 1
    names = _class_names(samples, wanted)
    if not isinstance(names, (list, tuple)) or len(names) < needed:
        names = range(needed)
    return store, labels, sizes, tuple(str(name) for name in names)


def _class_names(samples: Any, wanted: Wanted) -> Any:
    """As torchvision's data sets say them, or Hugging Face's."""
    names = getattr(samples, "classes", None)
    features = getattr(samples, "features", None)
    if names is None and isinstance(features, Mapping):
        names = getattr(features.get(wanted.label or LABEL), "names", None)
    return names


def _changing(name: str) -> RequestError:
    return RequestError(
        f"{name}: expected the same pixels each time it is asked for, found others; give the data set without random "
        "transforms (feedfast draws crops and flips itself, see data.augment)"
    )


def _asked(samples: Samples, record: int, name: str, wanted: Wanted) -> tuple[NDArray[np.uint8], int]:
    """RGB [H, W, 3] and label of a sample."""
    try:
        with _ASKING:
            sample = samples[record]
    except Exception as error:
        raise RequestError(f"{name}: cannot be had: {type(error).__name__}: {error}") from error
    if isinstance(sample, Mapping):
        image, label = wanted.image or IMAGE, wanted.label or LABEL
        lacking = [key for key in (image, *((label,) if wanted.label else ())) if key not in sample]
        if lacking:
            raise RequestError(
                f"{name}: expected a key {lacking[0]!r}, found {[str(key) for key in sample][:20]}; "
                "data.arrays = [images, labels] says which are which"
            )
        return _rgb(sample[image], name), _label(sample.get(label), name)
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise RequestError(f"{name}: expected (image, label), found {_described(sample)}")
    if wanted.image:
        raise RequestError(f"{name}: expected a mapping with the key {wanted.image!r} of data.arrays, found a pair")
    return _rgb(sample[0], name), _label(sample[1], name)


def _rgb(image: Any, name: str) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        pixels: Any = np.asarray(image.convert("RGB"))
    elif isinstance(image, torch.Tensor):
        pixels = image.detach().cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    else:
        pixels = image
    if isinstance(pixels, np.ndarray) and pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[2] not in (1, 3)
        or 0 in pixels.shape
    ):
        raise RequestError(
            f"{name}: expected a PIL image, or uint8 as an array [H, W, 3] or a tensor [3, H, W], found "
            f"{_described(image)}; leave ToTensor and Normalize out of its transform"
        )
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _label(label: Any, name: str) -> int:
    if label is None:
        return -1
    try:
        number = int(label)
        whole = number == label and not isinstance(label, (str, bytes))
    except (TypeError, ValueError):
        number, whole = 0, False
    if not whole or not -1 <= number < MAX_CLASSES:
        raise RequestError(f"{name}: expected a class number or None as its label, found {_described(label)}")
    return number


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    return (
        f"{type(value).__name__} {str(value)[:60]!r}" if isinstance(value, (str, int, float)) else type(value).__name__
    )
