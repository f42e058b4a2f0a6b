"""Mask files: the class number of each pixel, exactly as stored, or a sentence that says why not.

Two forms hold class numbers without a doubt: a PNG with a palette, whose indexes they are (Pascal VOC's are: the colors
are for the eye), and an 8-bit gray PNG. All others are refused, because every reader makes other numbers of them: JPEG
blurs them, colors need a table, gray of 1, 2 or 4 bits is scaled by some readers, 16 bits are clipped. DALI never sees
a mask: it decodes a palette to the brightness of its colors, without an error.

PIL decodes; checksums of chunks are compared here, as it skips those of the pixels. A mask is read again whenever it is
used, and must be what it was when the data was opened.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feedfast.data.annotations import IGNORE, turn_mask
from feedfast.data.headers import HEAD_BYTES, Header, Unreadable, format_of, other_format_of
from feedfast.data.images import read_image, stored_header
from feedfast.errors import RequestError

__all__ = ["MaskFiles", "index_plane", "largest_class", "mask_digest"]

_FORMS = {0: "gray", 2: "RGB", 3: "a palette", 4: "gray with alpha", 6: "RGB with alpha"}
_HELP = (
    "write class numbers as an 8-bit gray PNG: PIL.Image.fromarray(numbers), numbers uint8 [H, W], "
    f"{IGNORE} where no class is"
)
_GRAY, _PALETTE = 0, 3  # PNG's color types


def index_plane(content: bytes, header: Header | None = None) -> NDArray[np.uint8]:
    """The class numbers of a mask file.

    Args:
        content: the file.
        header: of the image that it belongs to, as stored: its size is expected, and looked at before decoding.

    Returns:
        uint8 [H, W] as stored, writable: indexes of a palette, or gray values.

    Raises:
        Unreadable: not a PNG of one of the two forms, damaged, or of another size.
    """
    kind = format_of(content[:HEAD_BYTES])
    if kind != "PNG":
        found = kind or other_format_of(content[:HEAD_BYTES]) or f"a file that starts with {content[:8]!r}"
        raise Unreadable(f"expected a PNG, found {found if content else 'an empty file'}; {_HELP}")
    mask = stored_header(io.BytesIO(content))
    if content[12:16] != b"IHDR":
        raise Unreadable("damaged: a PNG that does not begin with its header")
    bits, color = content[24:26]
    if not (color == _PALETTE or (bits, color) == (8, _GRAY)):
        raise Unreadable(f"expected a palette or 8-bit gray, found {_FORMS.get(color, color)} of {bits} bits; {_HELP}")
    if mask.orientation != 1:
        raise Unreadable(f"turned by EXIF (orientation {mask.orientation}), which masks are not; remove the tag")
    if header is not None and mask[:2] != header[:2]:
        raise Unreadable(_other_size(mask, header))
    palette = _checked_chunks(content)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            plane = np.array(image)
            mode = image.mode
    except Exception as error:  # as in full_check
        raise Unreadable(f"does not decode: {error}") from error
    if plane.shape != mask[:2] or plane.dtype != np.uint8:
        raise Unreadable(f"does not decode to one class per pixel: {mode} {list(plane.shape)}")
    if color == _PALETTE:
        _refuse_gray_palette(palette, plane)
    return plane


def largest_class(plane: NDArray[np.uint8]) -> int:
    """The largest class number of a mask, -1 if all its pixels are `IGNORE`."""
    # one more, in eight bits, sends IGNORE (255) below all others
    return int((plane + np.uint8(1)).max()) - 1


def mask_digest(plane: NDArray[np.uint8]) -> bytes:
    """Sha256 of a mask's size and class numbers: the same however the file is packed."""
    digest = hashlib.sha256(b"%d %d;" % plane.shape)
    digest.update(np.ascontiguousarray(plane).data)
    return digest.digest()


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """``Masks.read`` of files; pickles.

    Attributes:
        paths: by position.
        orientations: uint8 [n], EXIF orientation of the image each belongs to.
        digests: `mask_digest` of each, turned as its image.
    """

    paths: tuple[Path, ...]
    orientations: NDArray[np.uint8]
    digests: tuple[bytes, ...]

    def __call__(self, position: int) -> NDArray[np.uint8]:
        """uint8 [H, W], turned as the image is.

        Raises:
            RequestError: the mask is gone, damaged, or not what it was when the data was opened.
        """
        path = self.paths[position]
        try:
            plane = turn_mask(index_plane(read_image(path)), int(self.orientations[position]))
        except Unreadable as why:
            raise RequestError(f"{path}: the mask has changed since the dataset was opened: {why}") from why
        if mask_digest(plane) != self.digests[position]:
            raise RequestError(f"{path}: the mask has changed since the dataset was opened; open it again")
        return plane


def _other_size(mask: Header, header: Header) -> str:
    found = f"{mask.height}x{mask.width} pixels, its image has {header.height}x{header.width}"
    if header.orientation >= 5 and mask[:2] == header[1::-1]:
        return (
            f"{found} as stored and is turned by EXIF (orientation {header.orientation}); masks lie on stored "
            "pixels: turn the image files themselves (jpegtran, mogrify -auto-orient) and open them again"
        )
    return found


def _checked_chunks(content: bytes) -> bytes:
    """The palette of a PNG whose chunks all have their checksums; `stored_header` has walked it before."""
    at, palette = 8, b""
    while True:
        length, kind = struct.unpack_from(">I4s", content, at)
        (expected,) = struct.unpack_from(">I", content, at + 8 + length)
        if zlib.crc32(memoryview(content)[at + 4 : at + 8 + length]) != expected:
            raise Unreadable(f"damaged: the checksum of PNG chunk {kind!r} is wrong")
        if kind == b"PLTE":
            palette = content[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return palette
        at += 12 + length


def _refuse_gray_palette(palette: bytes, plane: NDArray[np.uint8]) -> None:
    """Programs that shrink PNGs put gray values into a palette in any order: then they are the classes, or are they?"""
    colors = np.frombuffer(palette[: len(palette) // 3 * 3], dtype=np.uint8).reshape(-1, 3)
    if not (colors == colors[:, :1]).all():
        return
    used = np.flatnonzero(np.bincount(plane.reshape(-1), minlength=256))
    for index in used.tolist():
        if index < len(colors) and colors[index, 0] != index:
            raise Unreadable(
                f"a palette of grays in which index {index} is gray {colors[index, 0]}, and either may be the class; "
                + _HELP
            )
