"""Shards of WebDataset: plain tar files whose members come together under a key, as ``0001.jpg`` and ``0001.cls``.

A tar is a row of headers of 512 bytes, each followed by its member, so one walk over the headers finds every image's
place, and images are then read where they lie. Nothing is ever extracted. The walk is our own: Python's ``tarfile``
takes 40 µs per member, and takes an archive that was cut between two members for a whole one; here the end mark must
be there.

Keys are WebDataset's: the path up to the first dot of its last part; what follows, in lower case, is the member's
*ending*. The members of a key follow one another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from feedfast.data.images import EXTENSIONS, OTHER_EXTENSIONS
from feedfast.data.listing import Label, Listed, Wanted
from feedfast.errors import RequestError
from feedfast.files import open_regular, parse_json

__all__ = ["first_member", "walk_tar"]

_BLOCK: Final = 512
_END: Final = bytes(_BLOCK)
_READ_BYTES: Final = 8192  # at a time: a header, a small member and the next header come with one call
_MAX_EXTENDED_BYTES: Final = 1 << 20  # of a long name or a pax header
_MAX_CLASS_BYTES: Final = 1 << 10
_MAX_JSON_BYTES: Final = 1 << 20
_MAX_TAIL_BYTES: Final = 1 << 20  # after the end mark: tar pads to 10 KiB, and to more if asked
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's base_plus_ext
_META: Final = re.compile(r"__[^/]*__($|/)")  # members that WebDataset's own reader leaves out
_IMAGES: Final = frozenset(name[1:] for name in EXTENSIONS)
_OTHERS: Final = frozenset(name[1:] for name in OTHER_EXTENSIONS)


class _BrokenTarError(Exception):
    """Why a tar cannot be read on."""


class _Member(NamedTuple):
    name: str
    kind: bytes  # the type flag
    offset: int  # of the content
    size: int


@dataclass
class _Sample:
    """The members of one key."""

    key: str
    images: list[tuple[str, _Member]] = field(default_factory=list)  # ending, member
    others: list[str] = field(default_factory=list)  # endings
    label: _Member | None = None
    twice: str = ""  # an ending that came again


class _Reader:
    """A file by offset, a few KiB at a time."""

    def __init__(self, path: Path) -> None:
        self._fd = open_regular(path)
        self.size = os.fstat(self._fd).st_size
        self._at, self._held = 0, b""

    def read(self, offset: int, count: int) -> bytes:
        """Bytes from ``offset`` on; fewer where the file ends."""
        start = offset - self._at
        if start < 0 or start + count > len(self._held):
            self._at, self._held, start = offset, os.pread(self._fd, max(count, _READ_BYTES), offset), 0
        return self._held[start : start + count]

    def close(self) -> None:
        os.close(self._fd)


def first_member(path: Path) -> str:
    """The name of a tar's first member; "" if it is no tar or has none."""
    try:
        reader = _Reader(path)
    except OSError:
        return ""
    try:
        return next(_members(reader)).name
    except (OSError, StopIteration, _BrokenTarError):
        return ""
    finally:
        reader.close()


def walk_tar(path: Path, wanted: Wanted) -> Listed:
    """The images of one shard.

    Args:
        path: the shard.
        wanted: names of the image's and the label's endings. An image is by default the one member of its key whose
            ending is that of a format we read; a label is ``cls``, or ``json:KEY``, an entry of the member ``json``.

    Returns:
        The images in the order of the shard, and all faults: a tar that is damaged or cut short, a key without image
        or with several, one that comes again, a label that cannot be read.

    Raises:
        RequestError: it cannot be opened.
    """
    try:
        reader = _Reader(path)
    except OSError as error:
        raise RequestError(f"{path}: expected a tar file; {error.strerror or error}") from error
    found = Listed()
    walk = _Walk(path, wanted, reader, found)
    try:
        for member in _members(reader):
            walk.take(member)
        walk.finish()
    except (OSError, _BrokenTarError) as error:
        found.faults.append((str(path), str(error)))
    finally:
        reader.close()
    return found


class _Walk:
    """Members in, samples out."""

    def __init__(self, path: Path, wanted: Wanted, reader: _Reader, found: Listed) -> None:
        self._path, self._reader, self._found = path, reader, found
        self._image = wanted.image.lower()
        label = wanted.label.lower() if wanted.label.partition(":")[0].lower() != "json" else wanted.label
        self._label_ending, _, self._entry = (label or "cls").partition(":")
        self._now: _Sample | None = None
        self._seen: set[str] = set()

    def take(self, member: _Member) -> None:
        if member.kind not in (b"0", b"\0", b"7"):  # a folder, a link or a device holds no bytes
            return
        named = _NAME.fullmatch(member.name)
        if named is None or _META.match(member.name):
            ending = member.name.rpartition("/")[2].rpartition(".")[2].lower()
            if ending in _IMAGES:
                self._found.skipped[f".{ending} (hidden)"] += 1
            return
        key, ending = named[1], named[2].lower()
        if self._now is None or key != self._now.key:
            self.finish()
            self._now = _Sample(key)
            if key in self._seen:
                self._fault(key, "its members do not follow one another; sort them by name before they are packed")
            self._seen.add(key)
        now = self._now
        if ending in now.others or any(ending == other for other, _ in now.images):
            now.twice = ending
        if ending == self._image if self._image else ending in _IMAGES:
            now.images.append((ending, member))
        else:
            now.others.append(ending)
        if ending == self._label_ending:
            now.label = member

    def finish(self) -> None:
        """The sample that has been gathered, if any."""
        now, self._now = self._now, None
        if now is None:
            return
        if now.twice:
            self._fault(now.key, f"two members end in .{now.twice}; expected one of each")
            return
        if len(now.images) > 1:
            endings = " and ".join(f".{ending}" for ending, _ in now.images)
            self._fault(now.key, f"two images, {endings}; data.arrays = [ending, ...] says which is meant")
            return
        if not now.images:
            unread = [ending for ending in now.others if ending.rpartition(".")[2] in _IMAGES | _OTHERS]
            held = ", ".join(f".{ending}" for ending in (unread or now.others)[:3])
            what = f"a member .{self._image}" if self._image else "an image"
            self._fault(now.key, f"expected {what}, found {held}")
            return
        ending, image = now.images[0]
        label: Label = None
        if now.label is not None:
            try:
                label = self._labeled(now.label)
            except ValueError as why:
                self._fault(now.key, f".{self._label_ending}: {why}")
                return
        name = f"{now.key.removeprefix('./')}.{ending}"
        self._found.add(f"{self._path}/{name}", name, image.offset, image.size, label)

    def _labeled(self, member: _Member) -> Label:
        most = _MAX_JSON_BYTES if self._entry else _MAX_CLASS_BYTES
        if member.size > most:
            raise ValueError(f"expected at most {most} bytes, found {member.size}")
        content = self._reader.read(member.offset, member.size)
        if not self._entry:
            text = content.decode().strip()
            if not text:
                raise ValueError("expected a class, found nothing")
            return text
        tree = parse_json(content)
        value = tree.get(self._entry) if isinstance(tree, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
            raise ValueError(f"expected a number or a name as {self._entry!r}, found {value!r:.60}")
        return value

    def _fault(self, key: str, why: str) -> None:
        self._found.faults.append((f"{self._path}/{key}", why))


def _members(reader: _Reader) -> Iterator[_Member]:
    """All members with their content's place, pax and GNU headers taken into account."""
    at = 0
    name, size = "", -1  # as an extended header says of the member that follows it
    while True:
        block = reader.read(at, _BLOCK)
        if block == _END:
            _refuse_tail(reader, at)
            return
        if len(block) < _BLOCK:
            what = "a header" if block else "no end mark"
            raise _BrokenTarError(f"cut short: {what} at byte {at:,}, where the file ends" if at else _no_tar(block))
        checksum, length = _number(block[148:156]), _number(block[124:136])
        if checksum != sum(block[:148]) + sum(block[156:]) + 8 * 32 or length < 0:
            raise _BrokenTarError(f"damaged: a header with a wrong checksum at byte {at:,}" if at else _no_tar(block))
        kind, content = block[156:157], at + _BLOCK
        if kind in b"LxKg":
            if length > _MAX_EXTENDED_BYTES:
                raise _BrokenTarError(f"damaged: a name of {length} bytes at byte {at:,}")
            extended = reader.read(content, length)
            if kind == b"L":
                name = _text(extended.rstrip(b"\0"))
            elif kind == b"x":
                said = _pax(extended, at)
                name = said.get("path", name)
                size = int(said["size"]) if said.get("size", "").isdecimal() else size
        else:
            if kind == b"S":
                raise _BrokenTarError(f"a sparse member at byte {at:,}; pack it without --sparse")
            length = 0 if kind in b"123456" else size if size >= 0 else length  # links and folders have no content
            member = _Member(name or _own_name(block), kind, content, length)
            if content + length > reader.size:
                missing = content + length - reader.size
                raise _BrokenTarError(f"cut short: {missing:,} of {length:,} bytes of {member.name} are missing")
            yield member
            name, size = "", -1
        at = content + -(-length // _BLOCK) * _BLOCK


def _refuse_tail(reader: _Reader, at: int) -> None:
    # What lies behind an end mark is seen by no reader: of tars put one behind the other, samples would be lost in
    # silence.
    left = reader.size - at
    if left > _MAX_TAIL_BYTES or any(reader.read(at, left)):
        raise _BrokenTarError(f"{left:,} bytes lie behind its end mark at byte {at:,}; expected one archive per file")


def _no_tar(block: bytes) -> str:
    return f"no tar file: begins with {block[:8]!r}" if block else "no tar file: it is empty"


def _own_name(block: bytes) -> str:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return _text(prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name)


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _number(raw: bytes) -> int:
    """An octal field, or GNU's base 256 for what has no room there; -1 if it is neither."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    text = raw.partition(b"\0")[0].strip()
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else -1


def _pax(raw: bytes, at: int) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n``."""
    found: dict[str, str] = {}
    while raw:
        length, _, _ = raw.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        key, equals, value = raw[len(length) + 1 : count].partition(b"=")
        if not equals or not value.endswith(b"\n") or count > len(raw):
            raise _BrokenTarError(f"damaged: a pax header at byte {at:,}")
        found[_text(key)] = _text(value[:-1])
        raw = raw[count:]
    return found
