"""What is read as an image, held to PIL bit for bit; what is refused, and files cut short."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from feedfast.data import headers
from feedfast.data.dataset import open_dataset
from feedfast.data.headers import CMYK_UNMARKED, GRAY_16
from feedfast.data.images import Unreadable, encoded_header, file_header
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
SCENE = NOISE.resize((32, 32), Image.Resampling.BICUBIC)
ALPHA = SCENE.copy()
ALPHA.putalpha(SCENE.convert("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bare_cmyk() -> bytes:
    """A CMYK JPEG as PIL writes it, without its Adobe marker."""
    content = saved(SCENE.convert("CMYK"), "JPEG", quality=95)
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]


def bmp(bits: int, compression: int, body: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 32, 32, 1, bits, compression, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + head + body


def tiff(parts: list[np.ndarray], *, tiles: bool = False, order: str = "<", **tags: int) -> bytes:
    """A TIFF of strips or tiles as no library here writes it; ``t256=…`` sets a tag."""
    values = {256: [32], 257: [32], 258: [8] * 3, 259: [1], 262: [2], 277: [3], 278: [32]}
    values |= {int(tag[1:]): [value] for tag, value in tags.items()}
    values[258] = [8] * values[277][0]
    out = bytearray({"<": b"II*\0", ">": b"MM\0*"}[order] + bytes(4))
    values[324 if tiles else 273] = []
    for part in parts:
        values[324 if tiles else 273].append(len(out))
        out += part.tobytes()
    values[325 if tiles else 279] = [part.nbytes for part in parts]
    entries = b""
    for tag, numbers in sorted(values.items()):
        body = struct.pack(f"{order}{len(numbers)}I", *numbers)
        at = struct.pack(order + "I", len(out))
        out += body if len(numbers) > 1 else b""
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + (body if len(numbers) == 1 else at)
    struct.pack_into(order + "I", out, 4, len(out))
    return bytes(out + struct.pack(order + "H", len(values)) + entries + bytes(4))


def prefixed(content: bytes) -> bytes:
    """A WebP whose EXIF block begins as in a JPEG: PIL turns the image by it, DALI does not."""
    at = content.index(b"EXIF")
    block = b"Exif\0\0" + content[at + 8 :]
    out = content[: at + 4] + struct.pack("<I", len(block)) + block + bytes(len(block) % 2)
    return out[:4] + struct.pack("<I", len(out) - 8) + out[8:]


PIXELS, PLANES = np.asarray(SCENE), np.asarray(SCENE).transpose(2, 0, 1)
TILES = [np.ascontiguousarray(PIXELS[y : y + 16, x : x + 16]) for y in (0, 16) for x in (0, 16)]
READ = {
    "lossy.webp": saved(SCENE, "WEBP"),
    "lossless.webp": saved(SCENE, "WEBP", lossless=True),
    "alpha.webp": saved(ALPHA, "WEBP", lossless=True, exact=True),
    "turned.webp": saved(SCENE, "WEBP", exif=turned(6)),
    "animated.webp": saved(SCENE, "WEBP", save_all=True, append_images=[NOISE.resize((32, 32))]),
    "rgb.bmp": saved(SCENE, "BMP"),
    "palette.bmp": saved(SCENE.convert("P"), "BMP"),
    "bit.bmp": saved(SCENE.convert("1"), "BMP"),
    "alpha.bmp": saved(ALPHA, "BMP"),
    "rgb.tif": saved(SCENE, "TIFF"),
    "gray.tiff": saved(SCENE.convert("L"), "TIFF"),
    "alpha.tif": saved(ALPHA, "TIFF"),
    "lzw.tif": saved(SCENE, "TIFF", compression="tiff_lzw"),
    "deflate.tif": saved(SCENE, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg.tif": saved(SCENE, "TIFF", compression="jpeg"),
    "fax.tif": saved(SCENE.convert("1"), "TIFF", compression="group4"),
    "turned.tif": saved(SCENE, "TIFF", tiffinfo={0x0112: 5}),
    "pages.tif": saved(SCENE, "TIFF", save_all=True, append_images=[NOISE]),
    "tiles.tif": tiff(TILES, tiles=True, t322=16, t323=16),
    "strips.tif": tiff([PIXELS[:20], PIXELS[20:]], order=">", t278=20),
    "planes.tif": tiff([np.ascontiguousarray(plane) for plane in PLANES], t284=2),
    "white-is-0.tif": tiff([np.ascontiguousarray(PIXELS[:, :, 0])], t262=0, t277=1),
    "palette.tif": saved(SCENE.convert("P"), "TIFF"),
    "cmyk.tif": saved(SCENE.convert("CMYK"), "TIFF"),
    "lab.tif": saved(SCENE.convert("LAB"), "TIFF"),
    "alpha-gray.tif": saved(SCENE.convert("LA"), "TIFF"),
    "premultiplied.tif": tiff([np.asarray(ALPHA)], t277=4, t338=1),
    "rgb.ppm": saved(SCENE, "PPM"),
    "gray.pgm": saved(SCENE.convert("L"), "PPM"),
    "bit.pbm": saved(SCENE.convert("1"), "PPM"),
    "lossless.jp2": saved(SCENE, "JPEG2000"),
    "lossy.jp2": saved(SCENE, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[8]),
    "gray.jp2": saved(SCENE.convert("L"), "JPEG2000"),
    "alpha-gray.jp2": saved(SCENE.convert("LA"), "JPEG2000"),
    "raw.j2k": saved(SCENE, "JPEG2000", no_jp2=True),
    "palette.png": saved(SCENE.convert("P"), "PNG", transparency=3),
    "cmyk.jpg": saved(SCENE.convert("CMYK"), "JPEG"),
    "cmyk-bare.jpg": bare_cmyk(),
    "jpeg.gif": saved(SCENE, "JPEG"),  # by content, whatever the name says
    "png-without-a-name": saved(SCENE, "PNG"),
}
REFUSED = {
    "gif": (saved(SCENE, "GIF"), "GIF, which is not read"),
    "avif": (saved(SCENE, "AVIF"), "AVIF or HEIC"),
    "16-bit.tif": (saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "TIFF"), "TIFF: 16 bits"),
    "float.tif": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "TIFF: 32 bits"),
    "preview.tif": (tiff([PIXELS], t254=1), "preview of another image"),
    "dng.tif": (tiff([PIXELS], t50706=1), "preview of another image"),
    "turned.webp": (prefixed(READ["turned.webp"]), "EXIF block with a JPEG prefix"),
    "16-bit.pgm": (saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PPM"), "maximum of 65535"),
    "text.ppm": (b"P3\n1 1\n255\n1 2 3\n", "P3 as text"),
    "16-bit.jp2": (saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "JPEG2000"), r"forms \[\(15"),
    "16-bit.bmp": (bmp(16, 0, bytes(32 * 32 * 2)), "16 bits per pixel"),
    "packed.bmp": (bmp(8, 1, b"\1\0" * 9), "compression 1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in READ.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_read_is_what_pil_reads(folder: Path, device: str) -> None:
    data = open_dataset(folder, check="full")
    assert {data.name(i) for i in range(len(data))} == set(READ)
    assert data.skipped == {}
    assert data.remarks == {CMYK_UNMARKED: 1}
    loader = Loader(data, ViewPlan(0, 32, "none"), batch_size=8, threads=1, device=device)
    images = torch.cat([batch.images for batch in loader.evaluation()]).cpu().numpy()
    for i, found in enumerate(images):
        with Image.open(data.path(i)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        if device == "cpu":
            np.testing.assert_array_equal(found, expected, err_msg=data.name(i))
        else:  # lossy decoders of the GPU round differently; a wrong color, turn or plane is off by tens
            assert np.abs(found.astype(int) - expected).mean() < 2, data.name(i)


@pytest.mark.parametrize("which", REFUSED)
def test_what_would_differ_is_refused(tmp_path: Path, which: str) -> None:
    content, said = REFUSED[which]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Unreadable, match=said):
        file_header(tmp_path / "x.png")


CUT = [name for name in READ if name.rsplit(".")[-1] not in ("jpg", "gif", "png") and name != "pages.tif"]


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_short(name: str) -> None:
    """Wherever it is cut: no header is believed beyond the end of the file, and nothing but `Unreadable` is raised."""
    content = READ[name]
    for length in {*range(min(200, len(content))), *range(0, len(content), 97), len(content) - 20}:
        with pytest.raises(Unreadable):
            encoded_header(io.BytesIO(content[:length]))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8" + b"\xff" * (1 << 12),
        b"\xff\xd8\xff\xfe\0\2" + b"\xff\xfe\0\2" * (1 << 12),
        READ["png-without-a-name"][:33] + b"\0\0\0\0tEXt\0\0\0\0" * (1 << 12),
        b"RIFF" + struct.pack("<I", 4 + 8 * (1 << 12)) + b"WEBP" + b"JUNK\0\0\0\0" * (1 << 12),
        READ["lossless.jp2"][:12] + struct.pack(">I4s", 8, b"free") * (1 << 12),
        READ["lossless.jp2"][:12] + struct.pack(">I4s", 8, b"jp2h") * (1 << 12),
    ],
    ids=["fill", "comments", "chunks", "webp", "boxes", "headers"],
)
def test_headers_without_end_are_left(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_MAX_SEGMENTS", 100)
    reads = Counted(content)
    with pytest.raises(Unreadable):
        encoded_header(reads)
    assert reads.count < 500


class Counted(io.BytesIO):
    """A file that counts its reads."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.count += 1
        return super().read(size)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_has_a_header_or_a_reason(data: st.DataObject) -> None:
    content = bytearray(READ[data.draw(st.sampled_from(sorted(READ)))])
    places = st.one_of(st.integers(0, 99), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[at % len(content)] = value
    with contextlib.suppress(Unreadable):
        header = encoded_header(io.BytesIO(content))
        assert min(header[:2]) > 0


def test_16_bit_gray_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "x.png")
    assert open_dataset(tmp_path).remarks == {GRAY_16: 1}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    os.mkfifo(tmp_path / "notes")
    with pytest.raises(RequestError, match=r"1 of 1 images are unreadable:\n.*x\.jpg: not a regular file"):
        open_dataset(tmp_path)
