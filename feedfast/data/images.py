"""What a JPEG or PNG says about itself: size after EXIF orientation, and whether it is whole.

A job of hours must not end on image 900,001, so every file is looked at before the first is decoded. The quick look
reads headers and the end of the file only, about 25 µs of Python per file: this runs at every start on up to a million
files, and again on the bytes of every file that is handed to the decoder. The content decides the format, never the
file name (ImageNet itself holds a PNG named .JPEG).

Why the end marker matters: DALI refuses a JPEG cut short when it decodes the whole of it, but decodes a *region* above
the cut without complaint. A truncated file would train in one view and stop the job in another.

The full look decodes every pixel with PIL, a second decoder independent of the one that feeds the networks. Flipped
bits inside JPEG's entropy-coded data can still pass it: the format has no checksum. Sizes are (height, width) in
pixels as DALI and PIL's ``exif_transpose`` produce them.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feedfast.files import open_regular

__all__ = ["EXTENSIONS", "Unreadable", "encoded_size", "full_check", "image_size", "scan_images"]

EXTENSIONS = (".jpg", ".jpeg", ".png")

MAX_PIXELS = 89_478_485
"""Larger images are refused, as by PIL: 256 MiB decoded, more likely a bomb or a damaged header than a photograph."""

MAX_ENCODED_BYTES = 1 << 28
_MAX_SEGMENTS = 1 << 18  # a file made of empty segments alone would be walked for minutes

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame; those three are tables and a reserved code
_SOF_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive: what libjpeg-turbo decodes everywhere
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length: TEM, RST0..7
_PNG = b"\x89PNG\r\n\x1a\n"
_TAIL_BYTES = 4096  # trailing bytes after the end marker are common and harmless; usually fewer than this
_FILES_PER_TASK = 64


class Unreadable(Exception):
    """Why one image cannot be used; the text is shown to the user after the path."""


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width of a JPEG or PNG file after EXIF orientation; ``encoded_size`` of its content.

    Raises:
        Unreadable: as ``encoded_size``, or the file cannot be opened.
    """
    try:
        with open(open_regular(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_ENCODED_BYTES:
                raise Unreadable(f"more than {MAX_ENCODED_BYTES} bytes long")
            return encoded_size(file)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def encoded_size(file: BinaryIO) -> tuple[int, int]:
    """Height and width of an encoded image after EXIF orientation, from its headers.

    Args:
        file: a JPEG or PNG, at its beginning.

    Returns:
        (height, width) in pixels.

    Raises:
        Unreadable: empty, not JPEG or PNG, a damaged or unsupported header, implausibly large, or no end marker.
    """
    try:
        magic = file.read(8)
        if not magic:
            raise Unreadable("empty file")
        if magic[:3] == b"\xff\xd8\xff":
            height, width, orientation = _scan_jpeg(file)
        elif magic == _PNG:
            height, width, orientation = _scan_png(file)
        else:
            raise Unreadable(f"neither JPEG nor PNG: starts with {magic!r}")
    except struct.error as error:  # a read came back shorter than the field it should hold
        raise Unreadable("cut short inside a header") from error
    if height < 1 or width < 1:
        raise Unreadable(f"size {height}x{width} in the header")
    if height * width > MAX_PIXELS:
        raise Unreadable(f"{height}x{width} pixels in the header, more than {MAX_PIXELS}")
    return (width, height) if 5 <= orientation <= 8 else (height, width)


def full_check(path: Path | str) -> None:
    """Decode a whole image with PIL and throw it away.

    Raises:
        Unreadable: the file cannot be decoded to its end.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.load()
    except Exception as error:  # PIL raises what its codecs raise: OSError, SyntaxError, ValueError, struct.error, ...
        raise Unreadable(f"does not decode: {error}") from error


def scan_images(
    paths: Sequence[Path], *, full: bool, threads: int = 8, progress: Callable[[int, int], None] | None = None
) -> tuple[NDArray[np.int32], list[tuple[int, str]]]:
    """Look at every file, in threads; one bad file does not hide the next.

    Args:
        paths: the files.
        full: also decode each one completely.
        threads: reading threads.
        progress: called with (done, total) from the calling thread.

    Returns:
        int32 [n, 2] heights and widths (zeros for unreadable files), and (index, reason) of each unreadable file.
    """
    sizes = np.zeros((len(paths), 2), dtype=np.int32)
    problems: list[tuple[int, str]] = []

    def look(first: int) -> list[tuple[int, str]]:
        bad = []
        for i in range(first, min(first + _FILES_PER_TASK, len(paths))):
            try:
                sizes[i] = image_size(paths[i])
                if full:
                    full_check(paths[i])
            except Unreadable as why:
                sizes[i] = 0
                bad.append((i, str(why)))
        return bad

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="feedfast-scan") as pool:
        starts = range(0, len(paths), _FILES_PER_TASK)
        for start, bad in zip(starts, pool.map(look, starts), strict=True):
            problems += bad
            if progress is not None:
                progress(min(start + _FILES_PER_TASK, len(paths)), len(paths))
    return sizes, problems


def _scan_jpeg(file: BinaryIO) -> tuple[int, int, int]:
    """(height, width, orientation) as stored; checks that the entropy-coded data come to an end."""
    height = width = 0
    orientation: int | None = None
    file.seek(2)
    for _ in range(_MAX_SEGMENTS):
        prefix, marker = struct.unpack(">BB", file.read(2))
        if prefix != 0xFF:
            raise Unreadable(f"damaged JPEG header: 0x{prefix:02x} where a marker was expected")
        for _ in range(_MAX_SEGMENTS):
            if marker != 0xFF:  # fill bytes before a marker are allowed
                break
            (marker,) = struct.unpack(">B", file.read(1))
        if marker in _BARE:
            continue
        if marker == 0xD9:
            raise Unreadable("JPEG without image data")
        (length,) = struct.unpack(">H", file.read(2))
        if length < 2:
            raise Unreadable("damaged JPEG header: a segment shorter than its own length")
        body_at = file.tell()
        if marker in _SOF:
            bits, height, width, channels = struct.unpack(">BHHB", file.read(6))
            if marker not in _SOF_HUFFMAN or bits != 8 or channels not in (1, 3, 4):
                raise Unreadable(f"unsupported JPEG: frame type 0x{marker:02x}, {bits} bits, {channels} channels")
        elif marker == 0xE1 and orientation is None:
            orientation = _exif_orientation(file.read(length - 2))
        elif marker == 0xDA:
            if not height:
                raise Unreadable("JPEG image data before its frame header")
            _find_jpeg_end(file, body_at + length - 2)
            return height, width, orientation or 1
        file.seek(body_at + length - 2)
    raise Unreadable(f"more than {_MAX_SEGMENTS} segments before the image data")


def _find_jpeg_end(file: BinaryIO, data_at: int) -> None:
    # Inside entropy-coded data 0xFF is always followed by 0x00 or a restart marker, so FF D9 cannot occur by chance.
    size = file.seek(0, io.SEEK_END)
    for start in (max(data_at, size - _TAIL_BYTES), data_at):
        file.seek(start)
        if b"\xff\xd9" in file.read():
            return
    raise Unreadable("cut short: no JPEG end marker")


def _exif_orientation(segment: bytes) -> int | None:
    """Tag 0x0112 of the first directory, None if this segment is not EXIF; damaged EXIF counts as upright."""
    if segment[:6] != b"Exif\0\0":
        return None
    return _tiff_orientation(segment[6:])


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3:  # SHORT
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _scan_png(file: BinaryIO) -> tuple[int, int, int]:
    """(height, width, orientation) as stored; walks the chunks, because EXIF may come after the pixels."""
    height = width = 0
    orientation = 1
    has_data = False
    size = file.seek(0, io.SEEK_END)
    file.seek(len(_PNG))
    for _ in range(_MAX_SEGMENTS):
        header = file.read(8)
        if len(header) < 8:
            raise Unreadable("cut short: no PNG end chunk")
        length, kind = struct.unpack(">I4s", header)
        body_at = file.tell()
        if body_at + length + 4 > size:
            raise Unreadable(f"cut short inside PNG chunk {kind!r}")
        if kind == b"IHDR":
            width, height = struct.unpack(">II", file.read(8))
        elif kind == b"IDAT":
            has_data = True
        elif kind == b"eXIf":
            orientation = _tiff_orientation(file.read(length))
        elif kind == b"IEND":
            if not (height and has_data):
                raise Unreadable("PNG without a header or image data")
            return height, width, orientation
        file.seek(body_at + length + 4)
    raise Unreadable(f"more than {_MAX_SEGMENTS} chunks")
