"""The images of a folder: which files are samples, of which class, and what was passed over.

A file is a sample if its name ends as images' do, or if its content is of a format we read whatever its name says.
Nothing that looks like an image is passed over in silence: other formats (GIF, AVIF, raw files) are counted by
extension, and a class that loses all its files says what they were. Hidden folders are not looked into, hidden images
are only counted: macOS and notebooks leave them everywhere.

Links are followed, but every real file is one sample: where a file is reached twice, the way without links counts. A
link to a folder that holds it is refused by name; following it would multiply the images without end. Order is by
name, files before sub-folders, so that ids do not depend on the file system.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from feedfast.data.images import EXTENSIONS, OTHER_EXTENSIONS, looks_like
from feedfast.errors import RequestError

__all__ = ["Listing", "list_images", "refuse_odd_text"]

_SPLITS = frozenset(
    ("train", "training", "trn", "val", "valid", "validation", "dev", "eval", "test", "testing", "tst", "unlabeled")
)
_NAMED = 3  # classes, extensions in messages


@dataclass(frozen=True)
class Listing:
    """Sample files of a folder, relative to it."""

    files: tuple[str, ...]
    labels: tuple[int, ...]  # by file; -1 in a flat folder
    classes: tuple[str, ...]  # sorted; empty for a flat folder
    skipped: dict[str, int]  # extension → files that look like images and are not used


@dataclass
class _Found:
    """Below one entry of the folder: files in order, with their real path where a link led there, and the rest."""

    files: list[tuple[str, str, bool]]  # relative path, real path, whether by a link
    skipped: Counter[str]
    others: Counter[str]  # extension → files that do not look like images


def list_images(root: Path) -> Listing:
    """Walk a folder of class folders, or of images.

    Raises:
        RequestError: no images, images and class folders in one folder, a class without images, a loop of links, a
            folder that cannot be listed, a class name that is not UTF-8, or splits (train, val) in place of classes.
    """
    flat, folders = _Found([], Counter(), Counter()), {}
    real, chain = os.path.realpath(root), {_identity(root): str(root)}
    for entry in _entries(root, flat):
        if _is_dir(entry):
            folders[entry.name] = found = _Found([], Counter(), Counter())
            _walk(root, entry.name, _real(real, entry), entry.is_symlink(), chain, found)
        else:
            _take(entry, entry.name, _real(real, entry), entry.is_symlink(), flat)
    lost = _once([flat, *folders.values()])
    with_images = {name: found for name, found in folders.items() if found.files}
    skipped = sum((found.skipped for found in (flat, *folders.values())), Counter[str]())
    if flat.files and with_images:
        raise RequestError(
            f"{root}: expected either images or class folders, found both: {len(flat.files)} images and "
            f"{len(with_images)} folders with images, such as {flat.files[0][0]} and {next(iter(with_images))}/"
        )
    if flat.files:  # a flat folder may have unrelated folders next to its images
        files = tuple(name for name, _, _ in flat.files)
        return Listing(files, (-1,) * len(files), (), _sorted(skipped))
    if not with_images:
        what = _said(skipped + flat.others + sum((found.others for found in folders.values()), Counter[str]()))
        raise RequestError(
            f"{root}: expected image files ({', '.join(EXTENSIONS[:9])}, ...) or class folders of them, "
            f"found none{what}"
        )
    empty = [
        f"{name}{_said(found.skipped + found.others) or ' (empty)'}"
        for name, found in folders.items()
        if not found.files
    ]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        raise RequestError(
            f"{root}: expected images in every class folder, found none in {', '.join(empty[:20])}{more}"
            + (f"; {lost} links to files of other classes were left out" if lost else "")
        )
    _refuse_names(root, list(folders))
    labels = tuple(label for label, found in enumerate(folders.values()) for _ in found.files)
    files = tuple(name for found in folders.values() for name, _, _ in found.files)
    return Listing(files, labels, tuple(folders), _sorted(skipped))


def refuse_odd_text(text: str, what: str) -> None:
    """Raise a `RequestError` if text is not UTF-8: names of classes and places go into manifests."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise RequestError(f"expected {what} in UTF-8, found '{shown}'; rename it") from None


def _refuse_names(root: Path, classes: Sequence[str]) -> None:
    for name in classes:
        refuse_odd_text(name, f"{root}: class folders with names")
    if all(name.lower() in _SPLITS for name in classes):
        held = " and ".join(f"{name}/" for name in classes[:_NAMED])
        raise RequestError(
            f"{root}: expected class folders, found {held}, which are splits of a data set; name one of them, "
            f"such as {root / classes[0]}"
        )


def _walk(root: Path, folder: str, real: str, linked: bool, chain: dict[tuple[int, int], str], found: _Found) -> None:
    """Files of ``folder`` (relative to ``root``) into ``found``, then those of its sub-folders."""
    waiting = [(folder, real, linked, chain)]
    while waiting:
        folder, real, linked, chain = waiting.pop()
        here = _identity(root / folder)
        if here in chain:
            raise RequestError(
                f"{root / folder}: expected folders without loops, found a link to {chain[here]}, which holds it; "
                "remove the link"
            )
        chain = {**chain, here: str(root / folder)}
        below = []
        for entry in _entries(root / folder, found):
            name, target, by_link = f"{folder}/{entry.name}", _real(real, entry), linked or entry.is_symlink()
            if _is_dir(entry):
                below.append((name, target, by_link, chain))
            else:
                _take(entry, name, target, by_link, found)
        waiting += reversed(below)


def _take(entry: os.DirEntry[str], name: str, real: str, linked: bool, found: _Found) -> None:
    extension = _extension(entry.name)
    if extension in EXTENSIONS:
        found.files.append((name, real, linked))
        return
    ours, other = looks_like(entry.path)
    # Many cameras' raw files begin as TIFF does, with a thumbnail in the first place: there the name decides.
    if ours is not None and ours != "TIFF":
        found.files.append((name, real, linked))
    elif ours or other or extension in OTHER_EXTENSIONS:
        found.skipped[extension] += 1
    else:
        found.others[extension] += 1


def _once(groups: Sequence[_Found]) -> int:
    """Drop links to files that are there already; how many."""
    seen = {real for found in groups for _, real, linked in found.files if not linked}
    dropped = 0
    for found in groups:
        kept = []
        for file in found.files:
            if file[2] and file[1] in seen:
                found.skipped[f"{_extension(file[0])} (link)"] += 1
                dropped += 1
                continue
            seen.add(file[1])
            kept.append(file)
        found.files = kept
    return dropped


def _entries(folder: Path, found: _Found) -> list[os.DirEntry[str]]:
    """Entries by name, without hidden ones; hidden images are counted."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise RequestError(f"{folder}: expected a folder that can be listed, found: {error.strerror}") from error
    for entry in entries:
        extension = _extension(entry.name)
        if entry.name.startswith(".") and extension in EXTENSIONS and looks_like(entry.path)[0]:
            found.skipped[f"{extension} (hidden)"] += 1
    return [entry for entry in entries if not entry.name.startswith(".")]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "(no extension)"


def _real(folder: str, entry: os.DirEntry[str]) -> str:
    """Real path of an entry, given that of its folder: one call for a link, none for the rest."""
    return os.path.realpath(entry.path) if entry.is_symlink() else f"{folder}/{entry.name}"


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise RequestError(f"{path}: expected a folder that can be listed, found: {error.strerror}") from error
    return found.st_dev, found.st_ino


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _said(counts: Counter[str]) -> str:
    """`` (12 .gif, 3 .txt)``, the most common first; empty for nothing."""
    common = counts.most_common(_NAMED)
    return f" ({', '.join(f'{count} {extension}' for extension, count in common)})" if common else ""
