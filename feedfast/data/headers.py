"""What an encoded image says about itself: size, EXIF orientation, and whether it is whole.

One scanner per format: JPEG, PNG, WebP, BMP, TIFF, binary PNM, JPEG 2000. Each reads headers and the places that show a
file cut short, never pixels, and refuses the forms that would decode to other pixels than PIL's or not at all, so that
what passes is what the networks' authors saw. The content decides the format, never the file name (ImageNet holds a
PNG named .JPEG). Sizes are (height, width) as stored; the orientation is EXIF's, 1 to 8.

Why the end is looked for: DALI refuses a JPEG cut short when it decodes the whole of it, but decodes a *region* above
the cut without complaint. A truncated file would train in one view and stop the job in another.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

__all__ = ["CMYK_UNMARKED", "GRAY_16", "HEAD_BYTES", "SCANNERS", "Header", "Unreadable", "format_of", "other_format_of"]

HEAD_BYTES = 64
"""Bytes that `format_of` wants."""

GRAY_16 = "16-bit gray PNG, scaled to 8 bits (PIL's convert('RGB') clips it instead)"
CMYK_UNMARKED = "CMYK JPEG without an Adobe marker, read inverted as PIL does"

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame; those three are tables and a reserved code
_SOF_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive: what libjpeg-turbo decodes everywhere
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length: TEM, RST0..7
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_SEGMENTS = 1 << 18  # a file made of empty segments alone would be walked for minutes
_TAIL_BYTES = 4096  # trailing bytes after the end marker are common and harmless; usually fewer than this
_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})
_PNM = re.compile(
    rb"P([1-6])\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s+(?:#[^\n]*\n\s*)*(\d{1,9})(?:\s+(?:#[^\n]*\n\s*)*(\d{1,9}))?\s"
)
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_J2K = b"\xff\x4f\xff\x51"
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}
_TIFF_TAGS = frozenset({254, 256, 257, 258, 259, 262, 273, 274, 277, 279, 324, 325, 339, 50706})
_TIFF_MOST = 1 << 20  # values of one tag: strips or tiles
_TIFF_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes per value by type
_TIFF_COMPRESSIONS = {
    1: "none", 3: "group 3", 4: "group 4", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate",
    50000: "Zstandard",
}  # fmt: skip


class Unreadable(Exception):
    """Why one image cannot be used; the text is shown to the user after the path."""


class Header(NamedTuple):
    """Size as stored, EXIF orientation, and a remark on a form that needs one (else empty)."""

    height: int
    width: int
    orientation: int = 1
    remark: str = ""


def format_of(head: bytes) -> str | None:
    """The format of a file that begins with these bytes (`HEAD_BYTES` of them, or all there are), None if not ours."""
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == _PNG:
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and len(head) >= 26 and struct.unpack("<I", head[14:18])[0] in _BMP_HEADERS:
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    if head[:12] == _JP2 or head[:4] == _J2K:
        return "JPEG 2000"
    return "PNM" if _PNM.match(head) else None


def other_format_of(head: bytes) -> str | None:
    """The name of an image format that is recognized but not read, None if these bytes begin none."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "AVIF or HEIC"
    starts = {
        b"GIF8": "GIF", b"8BPS": "Photoshop", b"\xff\x0a": "JPEG XL",
        b"\0\0\0\x0cJXL ": "JPEG XL", b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR", b"DDS ": "DDS",
        b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF",
    }  # fmt: skip
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def _scan_jpeg(file: BinaryIO, size: int) -> Header:
    """Checks that the entropy-coded data come to an end."""
    height = width = channels = 0
    orientation: int | None = None
    adobe = False
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
        elif marker == 0xEE:
            adobe = adobe or file.read(5) == b"Adobe"
        elif marker == 0xDA:
            if not height:
                raise Unreadable("JPEG image data before its frame header")
            _find_jpeg_end(file, body_at + length - 2, size)
            return Header(height, width, orientation or 1, CMYK_UNMARKED if channels == 4 and not adobe else "")
        file.seek(body_at + length - 2)
    raise Unreadable(f"more than {_MAX_SEGMENTS} segments before the image data")


def _find_jpeg_end(file: BinaryIO, data_at: int, size: int) -> None:
    # Inside entropy-coded data 0xFF is always followed by 0x00 or a restart marker, so FF D9 cannot occur by chance.
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


def _scan_png(file: BinaryIO, size: int) -> Header:
    """Walks the chunks, because EXIF may come after the pixels."""
    height = width = 0
    orientation, remark = 1, ""
    has_data = False
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
            width, height, bits, color = struct.unpack(">IIBB", file.read(10))
            remark = GRAY_16 if (bits, color) == (16, 0) else ""
        elif kind == b"IDAT":
            has_data = True
        elif kind == b"eXIf":
            orientation = _tiff_orientation(file.read(length))
        elif kind == b"IEND":
            if not (height and has_data):
                raise Unreadable("PNG without a header or image data")
            return Header(height, width, orientation, remark)
        file.seek(body_at + length + 4)
    raise Unreadable(f"more than {_MAX_SEGMENTS} chunks")


def _scan_webp(file: BinaryIO, size: int) -> Header:
    """The canvas; of an animation the first frame, which must fill it."""
    file.seek(4)
    (riff,) = struct.unpack("<I", file.read(4))
    end = 8 + riff
    if end > size:
        raise Unreadable("cut short: shorter than its WebP header says")
    height = width = 0
    orientation, has_data, at = 1, False, 12
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > end:
            break
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if at + 8 + length > end:
            raise Unreadable(f"cut short inside WebP chunk {kind!r}")
        if kind == b"VP8X":
            _, w, h = struct.unpack("<I3s3s", file.read(10))
            width, height = 1 + int.from_bytes(w, "little"), 1 + int.from_bytes(h, "little")
        elif kind == b"VP8 " and not has_data:
            w, h = struct.unpack("<6xHH", file.read(10))
            width, height = width or w & 0x3FFF, height or h & 0x3FFF
            has_data = True
        elif kind == b"VP8L" and not has_data:
            _, bits = struct.unpack("<BI", file.read(5))
            width, height = width or 1 + (bits & 0x3FFF), height or 1 + (bits >> 14 & 0x3FFF)
            has_data = True
        elif kind == b"ANMF" and not has_data:
            x, y, w, h = (int.from_bytes(part, "little") for part in struct.unpack("3s3s3s3s", file.read(12)))
            if (x, y, w + 1, h + 1) != (0, 0, width, height):
                raise Unreadable("an animated WebP whose first frame does not fill it")
            has_data = True
        elif kind == b"EXIF":
            segment = file.read(length)
            orientation = _exif_orientation(segment) or 1
            if orientation != 1:  # PIL turns the image, DALI overlooks this form of EXIF
                raise Unreadable(f"WebP turned by an EXIF block with a JPEG prefix (orientation {orientation})")
            orientation = _tiff_orientation(segment)
        at += 8 + length + length % 2
    if not has_data:
        raise Unreadable("WebP without image data")
    return Header(height, width, orientation)


def _scan_bmp(file: BinaryIO, size: int) -> Header:
    head = file.read(70)
    (data_at,) = struct.unpack_from("<I", head, 10)
    (length,) = struct.unpack_from("<I", head, 14)
    compression = 0
    if length == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    height = abs(height)  # negative: rows from top to bottom
    masks = struct.unpack_from("<III", head, 54) if compression == 3 else (0xFF0000, 0xFF00, 0xFF)
    if bits not in (1, 4, 8, 24, 32) or compression not in (0, 3) or masks != (0xFF0000, 0xFF00, 0xFF):
        raise Unreadable(f"unsupported BMP: {bits} bits per pixel, compression {compression}")
    if data_at + (width * bits + 31) // 32 * 4 * height > size:
        raise Unreadable("cut short: shorter than its BMP header says")
    return Header(height, width)


def _scan_pnm(file: BinaryIO, size: int) -> Header:
    head = file.read(4096)
    found = _PNM.match(head)
    if found is None:
        raise Unreadable("damaged PNM header")
    kind, width, height = int(found[1]), int(found[2]), int(found[3])
    data_at = found.end(3) + 1 if kind == 4 else found.end()
    if kind < 4 or (kind > 4 and found[4] != b"255"):
        what = "as text" if kind < 4 else f"with a maximum of {(found[4] or b'none').decode()}"
        raise Unreadable(f"unsupported PNM: P{kind} {what}; binary with a maximum of 255 is read")
    row_bytes = {4: (width + 7) // 8, 5: width, 6: 3 * width}[kind]
    if data_at + row_bytes * height > size:
        raise Unreadable("cut short: shorter than its PNM header says")
    return Header(height, width)


def _scan_tiff(file: BinaryIO, size: int) -> Header:
    """The first page."""
    head = file.read(8)
    order = "<" if head[:2] == b"II" else ">"
    tags = _tiff_tags(file, order, struct.unpack(order + "I", head[4:])[0], size)

    def one(tag: int, default: int = 0) -> int:
        values = tags.get(tag)
        return values[0] if values else default

    bits, samples = tags.get(258, []), one(277, 1)
    compression, color = one(259, 1), one(262, -1)
    form = (
        f"{'/'.join(map(str, bits[:5])) or 'unsaid'} bits per sample, {samples} samples, color {color}, "
        f"compression {_TIFF_COMPRESSIONS.get(compression, compression)}"
    )
    plain = bits == [1] or (1 <= len(bits) <= 4 and set(bits) == {8})
    if not plain or len(bits) != samples or compression not in _TIFF_COMPRESSIONS or one(339, 1) != 1:
        raise Unreadable(f"unsupported TIFF: {form}; 8 bits and 1 bit are read")
    if one(254) & 1 or 50706 in tags:
        raise Unreadable("a TIFF that begins with a preview of another image (a camera's raw file)")
    strips, tiles = 273, 324
    starts, lengths = (tags.get(tag, []) for tag in ((strips, 279) if strips in tags else (tiles, 325)))
    if not starts or len(starts) != len(lengths):
        raise Unreadable("TIFF without image data")
    if any(at + length > size for at, length in zip(starts, lengths, strict=True)):
        raise Unreadable("cut short: TIFF data beyond the end of the file")
    orientation = one(274, 1)
    return Header(one(257), one(256), orientation if 1 <= orientation <= 8 else 1)


def _tiff_tags(file: BinaryIO, order: str, at: int, size: int) -> dict[int, list[int]]:
    """Integer tags of the directory at ``at``."""
    file.seek(at)
    (entries,) = struct.unpack(order + "H", file.read(2))
    listing = file.read(12 * entries)
    tags: dict[int, list[int]] = {}
    for entry in range(entries):
        tag, kind, count = struct.unpack_from(order + "HHI", listing, 12 * entry)
        length = count * _TIFF_WIDTHS.get(kind, 1)
        body = listing[12 * entry + 8 : 12 * entry + 12]
        if length > 4:
            (body_at,) = struct.unpack(order + "I", body)
            if body_at + length > size:
                raise Unreadable(f"cut short: TIFF tag {tag} beyond the end of the file")
        if kind not in _TIFF_TYPES or tag not in _TIFF_TAGS:
            continue
        if count > _TIFF_MOST:
            raise Unreadable(f"damaged TIFF: {count} values of tag {tag}")
        if length > 4:
            file.seek(body_at)
            body = file.read(length)
        tags[tag] = list(struct.unpack(f"{order}{count}{_TIFF_TYPES[kind]}", body[:length]))
    return tags


def _scan_jp2(file: BinaryIO, size: int) -> Header:
    """A JP2 file's boxes, or a raw codestream."""
    if file.read(4) == _J2K:
        return _scan_codestream(file, 0, size)
    at, color = 0, 0
    inner = False
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > size:
            break
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        body_at = at + 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            body_at += 8
        end = size if length == 0 else at + length
        if end > size or end < body_at:
            raise Unreadable(f"cut short inside JPEG 2000 box {kind!r}")
        if kind == b"jp2h":
            at, inner = body_at, True  # its boxes follow one another like those outside
            continue
        if inner and kind == b"colr" and not color:
            method, _, _, color = struct.unpack(">BBBI", file.read(7).ljust(7, b"\0"))
            color = color if method == 1 else 16
        elif kind == b"pclr":
            raise Unreadable("unsupported JPEG 2000: a palette")
        elif kind == b"jp2c":
            if color not in (16, 17):
                raise Unreadable(f"unsupported JPEG 2000: color space {color}; sRGB and gray are read")
            return _scan_codestream(file, body_at, end)
        at = end
    raise Unreadable("JPEG 2000 without image data")


def _scan_codestream(file: BinaryIO, at: int, end: int) -> Header:
    file.seek(at)
    start, _, _, right, bottom, left, top, *_, parts = struct.unpack(">4sHHIIIIIIIIH", file.read(42))
    if start != _J2K:
        raise Unreadable("damaged JPEG 2000: no image size where it was expected")
    forms = {tuple(file.read(3)) for _ in range(min(parts, 5))}  # bits - 1 (with a sign), horizontal, vertical step
    if parts not in (1, 2, 3, 4) or forms != {(7, 1, 1)}:
        raise Unreadable(f"unsupported JPEG 2000: {parts} components of forms {sorted(forms)}; 8 bits are read")
    file.seek(max(at, end - 2))
    if file.read(2) != b"\xff\xd9":
        raise Unreadable("cut short: no JPEG 2000 end marker")
    return Header(bottom - top, right - left)


SCANNERS: dict[str, Callable[[BinaryIO, int], Header]] = {
    "JPEG": _scan_jpeg,
    "PNG": _scan_png,
    "WebP": _scan_webp,
    "BMP": _scan_bmp,
    "TIFF": _scan_tiff,
    "PNM": _scan_pnm,
    "JPEG 2000": _scan_jp2,
}
"""Format → its scanner, given the file and its length in bytes. It may raise `struct.error` where a read came short."""
