"""Looking at image files: what each is, how large, and whether it is whole; the quick look and the full one.

A job of hours must not end on image 900,001, so every file is looked at before the first is decoded. The quick look
reads headers and the end of the file only (`headers.py`), about 25 µs of Python per file: this runs at every start on
up to a million files, and again on the bytes of every file that is handed to the decoder.

The full look decodes every pixel with PIL, a second decoder independent of the one that feeds the networks. Flipped
bits inside JPEG's entropy-coded data can still pass it: the format has no checksum. Sizes are (height, width) in
pixels as DALI and PIL's ``exif_transpose`` produce them.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from feedfast.data.headers import (
    CMYK_UNMARKED,
    HEAD_BYTES,
    SCANNERS,
    Header,
    Unreadable,
    format_of,
    other_format_of,
)

__all__ = [
    "EXTENSIONS",
    "OTHER_EXTENSIONS",
    "Unreadable",
    "encoded_header",
    "file_header",
    "for_dali",
    "full_check",
    "looks_like",
    "read_image",
    "scan_images",
    "scan_opened",
    "stored_header",
    "upright",
]

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc",
)  # fmt: skip
"""Names of files that must be images we read: one that is not is an error."""

OTHER_EXTENSIONS = (
    ".gif", ".avif", ".heic", ".heif", ".jxl", ".jxr", ".apng", ".svg", ".ico", ".tga", ".psd", ".exr", ".hdr", ".dds",
    ".pcx", ".xbm", ".xpm", ".pfm", ".pam", ".raw", ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2",
    ".srf", ".srw", ".orf", ".rw2", ".raf", ".pef", ".3fr", ".erf", ".kdc", ".dcr", ".mef", ".mos", ".mrw", ".iiq",
    ".x3f",
)  # fmt: skip
"""Names of other images: not read (unless their content is of a format we read), but counted."""

MAX_PIXELS = 89_478_485
"""Larger images are refused, as by PIL: 256 MiB decoded, more likely a bomb or a damaged header than a photograph."""

MAX_ENCODED_BYTES = 1 << 28
"""Longer files are refused before they are read."""

_FILES_PER_TASK = 64
_THREADS = 8
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
_DECODED_HERE = frozenset({"TIFF", "JPEG 2000"})
_ADOBE_CMYK = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # inverted CMYK, as Adobe's own files are


def open_image(path: Path | str) -> BinaryIO:
    """A file for reading: regular and of a plausible length, or `Unreadable`. Never waits, as on a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_ENCODED_BYTES:
        return os.fdopen(fd, "rb")
    os.close(fd)
    what = f"{found.st_size} bytes long" if stat.S_ISREG(found.st_mode) else "not a regular file"
    raise Unreadable(what)


def read_image(path: Path | str) -> bytes:
    """The content of an image file.

    Raises:
        Unreadable: it cannot be opened or read, or is no regular file of at most `MAX_ENCODED_BYTES`.
    """
    try:
        with open_image(path) as file:
            return file.read()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def looks_like(path: Path | str) -> tuple[str | None, str | None]:
    """What a file is by content: (its format if it is one we read, else None; its name if it is another image format).

    A file that is no regular one, or cannot be opened, is neither.
    """
    try:
        with open_image(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, Unreadable):
        return None, None
    return format_of(head), other_format_of(head)


def file_header(path: Path | str) -> Header:
    """What an image file is, see `encoded_header`; height and width after EXIF orientation come first.

    Raises:
        Unreadable: as `encoded_header`, or the file cannot be opened.
    """
    return upright(_stored_header_of(path))


def _stored_header_of(path: Path | str) -> Header:
    try:
        with open_image(path) as file:
            return stored_header(file)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def encoded_header(file: BinaryIO) -> Header:
    """What an encoded image is, from its headers.

    Args:
        file: a JPEG, PNG, WebP, BMP, TIFF, binary PNM or JPEG 2000, at its beginning.

    Returns:
        Height and width in pixels *after* EXIF orientation (which is then 1), and the remark on its form.

    Raises:
        Unreadable: as `stored_header`.
    """
    return upright(stored_header(file))


def stored_header(file: BinaryIO) -> Header:
    """`encoded_header` with the size as stored, and the EXIF orientation that turns it.

    Raises:
        Unreadable: empty, of another format, a damaged or unsupported header, implausibly large, or cut short.
    """
    try:
        head = file.read(HEAD_BYTES)
        if not head:
            raise Unreadable("empty file")
        kind = format_of(head)
        if kind is None:
            other = other_format_of(head)
            found = f"{other}, which is not read" if other else f"starts with {head[:8]!r}"
            raise Unreadable(f"none of {', '.join(SCANNERS)}: {found}")
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        header = SCANNERS[kind](file, size)
    except struct.error as error:  # a read came back shorter than the field it should hold
        raise Unreadable("cut short inside a header") from error
    height, width = header[:2]
    if height < 1 or width < 1:
        raise Unreadable(f"size {height}x{width} in the header")
    if height * width > MAX_PIXELS:
        raise Unreadable(f"{height}x{width} pixels in the header, more than {MAX_PIXELS}")
    return header


def upright(stored: Header) -> Header:
    """A header as the loader turns the image: its orientation becomes 1."""
    height, width, orientation, remark = stored
    return Header(width, height, 1, remark) if 5 <= orientation <= 8 else Header(height, width, 1, remark)


def for_dali(content: NDArray[np.uint8], *, unmarked_cmyk: bool = True) -> NDArray[np.uint8]:
    """The bytes DALI is given of an encoded image, so that its pixels are PIL's.

    TIFF and JPEG 2000 are decoded here and go on as PNM: damaged files of these formats bring DALI 2.4.0's process down
    now and then (SIGSEGV, SIGFPE), which cannot be caught. A CMYK JPEG without Adobe's marker gets one: PIL takes every
    such file as inverted, DALI only marked ones.

    Args:
        content: the file, uint8 [n].
        unmarked_cmyk: whether it may be a JPEG of that kind; False saves looking.

    Raises:
        Unreadable: it does not decode.
    """
    kind = format_of(content[:HEAD_BYTES].tobytes())
    if kind == "JPEG" and unmarked_cmyk and encoded_header(io.BytesIO(content.data)).remark == CMYK_UNMARKED:
        return np.concatenate([content[:2], np.frombuffer(_ADOBE_CMYK, dtype=np.uint8), content[2:]])
    if kind not in _DECODED_HERE:
        return content
    try:
        with Image.open(io.BytesIO(content.data), formats=_PIL_FORMATS) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # as in full_check
        raise Unreadable(f"does not decode: {error}") from error
    return np.frombuffer(b"P6\n%d %d\n255\n" % pixels.size + pixels.tobytes(), dtype=np.uint8)


def full_check(image: Path | str | BinaryIO) -> None:
    """Decode a whole image, a file or one that is open, with PIL and throw it away.

    Raises:
        Unreadable: the file cannot be decoded to its end.
    """
    try:
        with Image.open(image, formats=_PIL_FORMATS) as opened:
            opened.load()
    except Exception as error:  # PIL raises what its codecs raise: OSError, SyntaxError, ValueError, struct.error, ...
        raise Unreadable(f"does not decode: {error}") from error


def scan_images(
    paths: Sequence[Path],
    *,
    full: bool,
    progress: Callable[[int, int], None] | None = None,
    look: Callable[[int, Header | None], list[str]] | None = None,
) -> tuple[NDArray[np.int32], list[tuple[int, str]], Counter[str]]:
    """`scan_opened` of files of their own."""
    return scan_opened(len(paths), lambda at: open_image(paths[at]), full=full, progress=progress, look=look)


def scan_opened(
    count: int,
    opened: Callable[[int], BinaryIO],
    *,
    full: bool,
    progress: Callable[[int, int], None] | None = None,
    look: Callable[[int, Header | None], list[str]] | None = None,
) -> tuple[NDArray[np.int32], list[tuple[int, str]], Counter[str]]:
    """Look at every image, in threads; one bad image does not hide the next.

    Args:
        count: how many.
        opened: an image by its number, at its beginning; raises `Unreadable`.
        full: also decode each one completely.
        progress: called with (done, total) from the calling thread.
        look: called by the threads with the number of each image and its header as stored (None if it is
            unreadable), to look at what belongs to it; the reasons it returns are counted as the file's own.

    Returns:
        int32 [n, 2] heights and widths (zeros for unreadable ones), (number, reason) of each unreadable one, and on how
        many each remark was made (see `Header`).
    """
    sizes = np.zeros((count, 2), dtype=np.int32)
    problems: list[tuple[int, str]] = []
    remarks: Counter[str] = Counter()

    def look_at(first: int) -> tuple[list[tuple[int, str]], list[str]]:
        bad, said = [], []
        for i in range(first, min(first + _FILES_PER_TASK, count)):
            stored = None
            try:
                with opened(i) as file:
                    stored = stored_header(file)
                    sizes[i] = upright(stored)[:2]
                    if full:
                        file.seek(0)
                        full_check(file)
                if stored.remark:
                    said.append(stored.remark)
            except (Unreadable, OSError) as why:
                sizes[i] = 0
                bad.append((i, str(getattr(why, "strerror", None) or why)))
            if look is not None:
                bad += [(i, reason) for reason in look(i, stored)]
        return bad, said

    # Eight wait for the disk at a time; decoding, which runs without the GIL, takes every core.
    threads = max(_THREADS, len(os.sched_getaffinity(0))) if full else _THREADS
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="feedfast-scan") as pool:
        starts = range(0, count, _FILES_PER_TASK)
        for start, (bad, said) in zip(starts, pool.map(look_at, starts), strict=True):
            problems += bad
            remarks.update(said)
            if progress is not None:
                progress(min(start + _FILES_PER_TASK, count), count)
    return sizes, problems, remarks
