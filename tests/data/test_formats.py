"""What is read as an image, held to PIL bit for bit; what is refused, and files cut short."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from feedfast.data.dataset import open_dataset
from feedfast.data.headers import CMYK_UNMARKED, GRAY_16
from feedfast.data.images import Unreadable, encoded_header, image_size
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
    "rgb.ppm": saved(SCENE, "PPM"),
    "gray.pgm": saved(SCENE.convert("L"), "PPM"),
    "bit.pbm": saved(SCENE.convert("1"), "PPM"),
    "lossless.jp2": saved(SCENE, "JPEG2000"),
    "lossy.jp2": saved(SCENE, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[8]),
    "gray.jp2": saved(SCENE.convert("L"), "JPEG2000"),
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
    "palette.tif": (saved(SCENE.convert("P"), "TIFF"), "TIFF: 8 bits per sample, 1 samples, color 3"),
    "alpha-gray.tif": (saved(SCENE.convert("LA"), "TIFF"), "TIFF: 8/8 bits"),
    "lab.tif": (saved(SCENE.convert("LAB"), "TIFF"), "color 8"),
    "16-bit.pgm": (saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PPM"), "maximum of 65535"),
    "text.ppm": (b"P3\n1 1\n255\n1 2 3\n", "P3 as text"),
    "16-bit.jp2": (saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "JPEG2000"), r"forms \[\(15"),
    "alpha-gray.jp2": (saved(SCENE.convert("LA"), "JPEG2000"), "2 components"),
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
        image_size(tmp_path / "x.png")


CUT = [name for name in READ if name.rsplit(".")[-1] not in ("jpg", "gif", "png") and name != "pages.tif"]


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_short(name: str) -> None:
    """Wherever it is cut: no header is believed beyond the end of the file, and nothing but `Unreadable` is raised."""
    content = READ[name]
    for length in {*range(min(200, len(content))), *range(0, len(content), 97), len(content) - 20}:
        with pytest.raises(Unreadable):
            encoded_header(io.BytesIO(content[:length]))


def test_16_bit_gray_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "x.png")
    assert open_dataset(tmp_path).remarks == {GRAY_16: 1}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    os.mkfifo(tmp_path / "notes")
    with pytest.raises(RequestError, match=r"1 of 1 images are unreadable:\n.*x\.jpg: not a regular file"):
        open_dataset(tmp_path)
