"""Opening packed images: from their index, or else by walking the files and looking at every header, which makes one.

The walk goes over the files in threads, then the headers of all images are looked at as those of a folder are
(`feedfast.data.images.scan_opened`). What is wrong with the *structure* (a tar cut short, a key without image, a label
that cannot be read) is refused for the whole source; an image that cannot be read only where it is used, as in folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from feedfast.data.columns import refuse_full_disk, unpack_parquet, unpacked_bytes, walk_arrow
from feedfast.data.dense import Asked, class_names
from feedfast.data.headers import Header
from feedfast.data.images import scan_opened
from feedfast.data.index import Index, Place, Stamp, images_path, load, locked, place_of, save, stamps_of
from feedfast.data.listing import Label, Listed, Wanted, numbered
from feedfast.data.packed import Packed
from feedfast.data.shards import Kind
from feedfast.data.tars import walk_tar
from feedfast.errors import RequestError
from feedfast.files import replaced_file

__all__ = ["open_packed"]

_SHOWN: Final = 20  # faults printed; the count covers the rest
_WALKERS: Final = 8
_MOST_UNREADABLE: Final = 1000  # that an index keeps; data with more are looked at again when they are mended

Progress = Callable[[int, int], None]


def open_packed(
    files: Sequence[Path], kind: Kind, source: str, wanted: Wanted, *, full: bool, progress: Progress | None
) -> Packed:
    """Images packed in some files.

    Args:
        files: the files, in order.
        kind: what they are.
        source: what was asked for, for messages.
        wanted: what images and labels are called.
        full: look at everything again, whatever index there is.
        progress: called with (images looked at, total) while an index is made.

    Raises:
        RequestError: a file cannot be opened, or faults of structure: all are counted, the first twenty named.
    """
    classes = class_names(Asked(source), list(dict.fromkeys(path.parent for path in files)))
    place = place_of(files, [kind, wanted.image, wanted.label, *classes])
    try:
        stamps = stamps_of(place.folder, files)
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be opened: {error.strerror}") from error
    index = None if full else load(place, stamps)
    if index is None:
        with locked(place):
            index = None if full else load(place, stamps)  # another process may have made it meanwhile
            if index is None:
                index = _made(files, kind, source, wanted, classes, place, stamps, progress)
    return Packed(place.folder, index)


def _made(
    files: Sequence[Path],
    kind: Kind,
    source: str,
    wanted: Wanted,
    classes: tuple[str, ...],
    place: Place,
    stamps: tuple[Stamp, ...],
    progress: Progress | None,
) -> Index:
    if kind == "parquet":
        walked, held = _unpacked(files, source, wanted, place, progress)
    else:
        walk = walk_tar if kind == "tar" else walk_arrow
        with ThreadPoolExecutor(_WALKERS, thread_name_prefix="feedfast-walk") as pool:
            walked, held = list(pool.map(lambda path: walk(path, wanted), files)), stamps
    _refuse(source, [fault for listed in walked for fault in listed.faults])
    index = _joined(files, source, classes, walked, stamps, held)
    _refuse(source, _unlabeled(Packed(place.folder, index), wanted, kind))
    index = _looked_at(Packed(place.folder, index), progress)
    if len(index.facts["faults"]) <= _MOST_UNREADABLE:
        save(place, index)
    return index


def _unpacked(
    files: Sequence[Path], source: str, wanted: Wanted, place: Place, progress: Progress | None
) -> tuple[list[Listed], tuple[Stamp, ...]]:
    """The images of Parquet files, one after the other in a file of our own at the first place that can be written."""
    rows, size_bytes = unpacked_bytes(files, wanted)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, rows)

    path = images_path(place, source)
    refuse_full_disk(path.parent, size_bytes, source)
    walked: list[Listed] = []
    with replaced_file(path) as fd:
        at = 0
        for file in files:
            walked.append(unpack_parquet(file, wanted, fd, at, advance))
            at += sum(walked[-1].lengths)
    return walked, stamps_of(place.folder, [path])


def _refuse(source: str, faults: Sequence[tuple[str, str]]) -> None:
    if faults:
        shown = "".join(f"\n  {where}: {why}" for where, why in faults[:_SHOWN])
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RequestError(f"{source}: expected images and labels that can be read, found {count}:{shown}{more}")


def _joined(
    files: Sequence[Path],
    source: str,
    named: tuple[str, ...],
    walked: Sequence[Listed],
    stamps: tuple[Stamp, ...],
    held: tuple[Stamp, ...],
) -> Index:
    """What was found in all files as one index, sizes not yet looked at; ``named`` where files name no classes."""
    counts = [len(listed) for listed in walked]
    if not sum(counts):
        raise RequestError(f"{source}: expected images, found none")
    classes = next((listed.classes for listed in walked if listed.classes), ())
    for path, listed in zip(files, walked, strict=True):
        if listed.classes not in ((), classes):
            raise RequestError(f"{path}: expected the classes of {files[0].name}, found {list(listed.classes[:5])}")
    every: dict[Label, None] = {label: None for listed in walked for label in listed.kinds}
    numbers, names = numbered(source, every, classes or named)
    labels = [
        np.array([numbers[kind] for kind in listed.kinds], dtype=np.int32)[np.asarray(listed.labels)]
        for listed in walked
        if len(listed)
    ]
    lengths_of_names = np.concatenate(
        [np.diff(np.asarray(listed.name_ends, dtype=np.int64), prepend=0) for listed in walked]
    )
    skipped = sum((listed.skipped for listed in walked), Counter[str]())
    count = sum(counts)
    arrays = {
        "first": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "offset": np.concatenate([np.asarray(listed.offsets, dtype=np.uint64) for listed in walked]),
        "length": np.concatenate([np.asarray(listed.lengths, dtype=np.uint32) for listed in walked]),
        "label": np.concatenate(labels),
        "size": np.zeros((count, 2), dtype=np.int32),
        "remark": np.zeros(count, dtype=np.uint8),
        "name_end": np.cumsum(lengths_of_names.astype(np.uint64), dtype=np.uint64),
        "name_text": np.concatenate([np.array(listed.name_text, dtype=np.uint8) for listed in walked]),
    }
    facts = {"classes": list(names), "skipped": dict(sorted(skipped.items())), "remarks": [], "faults": []}
    return Index(facts, stamps, held, arrays)


def _unlabeled(packed: Packed, wanted: Wanted, kind: Kind) -> list[tuple[str, str]]:
    """Images of tars without a label where others have one; a row of a table without is -1."""
    labels = packed.index.arrays["label"]
    if kind != "tar" or (not wanted.label and not packed.index.facts["classes"]):
        return []
    ending = wanted.label or "cls"
    return [(packed.where(int(at)), f"expected its class, found no .{ending}") for at in np.flatnonzero(labels < 0)]


def _looked_at(packed: Packed, progress: Progress | None) -> Index:
    """The index with what the images' headers say."""
    index = packed.index
    remarks: dict[str, int] = {}

    def look(at: int, header: Header | None) -> list[str]:
        if header is not None and header.remark:
            index.arrays["remark"][at] = remarks.setdefault(header.remark, len(remarks) + 1)
        return []

    sizes, unreadable, _ = scan_opened(len(packed), packed.open, full=False, progress=progress, look=look)
    index.arrays["size"][...] = sizes
    return Index(
        {**index.facts, "remarks": list(remarks), "faults": unreadable}, index.sources, index.files, index.arrays
    )
