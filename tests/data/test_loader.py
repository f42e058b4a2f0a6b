"""Pixels against NumPy, PIL and torchvision; the same pixels whatever the batching; clean ends.

Tolerances, stated once: decoding, padding, cropping and flipping are exact. A resize may differ from PIL by one step,
0.3 on average (PIL rounds between its passes), except in the outermost row and column of a downscaled box, where DALI
repeats the edge and PIL renormalizes its filter: up to 21 was seen on the shared photographs, 40 is allowed there.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import resized_crop

from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

INNER, EDGE, MEAN = 1, 40, 0.3


@pytest.fixture(scope="module")
def cifar(shared_data: Path) -> Dataset:
    return open_dataset(shared_data / "cifar-100-binary" / "test.bin", limit=3)


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> Dataset:
    return open_dataset(shared_data / "photos-varied")


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Every EXIF orientation as JPEG and PNG, some in other formats; gray, palette, CMYK, alpha, odd and tiny sizes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8))
    scene = noise.resize((171, 118), Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for subsampling in (0, 1, 2):
            scene.save(tmp_path / f"o{orientation}-{subsampling}.jpg", exif=exif, subsampling=subsampling)
        scene.save(tmp_path / f"o{orientation}-progressive.JPEG", exif=exif, progressive=True)
        scene.convert("L").save(tmp_path / f"o{orientation}-gray.jpg", exif=exif)
        scene.save(tmp_path / f"o{orientation}.png", exif=exif)
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        scene.save(tmp_path / f"o{orientation}.webp", exif=exif)
        scene.save(tmp_path / f"o{orientation}.tif", tiffinfo={0x0112: orientation}, compression="tiff_lzw")
    for name in ("x.bmp", "x.ppm", "x.jp2"):
        scene.save(tmp_path / name)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        scene.convert(mode).save(tmp_path / f"{mode}.png")
    scene.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for side in (1, 2, 9, 33):
        scene.resize((side, 2 * side)).save(tmp_path / f"side{side}.jpg")
    return tmp_path


def upright(data: Dataset, position: int) -> Image.Image:
    if data.kind == "pixels":
        return Image.fromarray(data.pixels([position])[0])
    with Image.open(data.path(position)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def collected(batches: Iterator[Batch]) -> dict[str, np.ndarray]:
    kept = list(batches)  # held all at once: a reused buffer would show
    return {
        "images": torch.cat([b.images for b in kept]).numpy(),
        "ids": np.concatenate([b.ids for b in kept]),
        "labels": torch.cat([b.labels for b in kept]).numpy(),
        "rows": np.concatenate([b.rows for b in kept]),
    }


def assert_close(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    off = np.abs(found.astype(int) - expected.astype(int))
    inner = off[1:-1, 1:-1]
    assert inner.max() <= INNER, name
    assert inner.mean() <= MEAN, name
    assert off.max() <= EDGE, name


# --- pixels


def test_cifar_views_are_exact(cifar: Dataset) -> None:
    plan = ViewPlan(3, 32, "pad-crop-flip")
    loader = Loader(cifar, plan, batch_size=64, threads=2)
    for view in (0, 5):
        got = collected(loader.stream(view, np.arange(len(cifar))))
        order = plan.order(view, cifar.ids)
        np.testing.assert_array_equal(got["ids"], order)
        at = np.searchsorted(cifar.ids, order)
        np.testing.assert_array_equal(got["labels"], cifar.labels[at])
        assert got["labels"].dtype == np.int64
        padded = np.pad(cifar.pixels(at), ((0, 0), (4, 4), (4, 4), (0, 0)))
        crops, flips = plan.crops(view, order, cifar.sizes[at]), plan.flips(view, order)
        for i, (top, left, _, _) in enumerate(crops):
            expected = padded[i, top + 4 : top + 36, left + 4 : left + 36]
            np.testing.assert_array_equal(got["images"][i], expected[:, ::-1] if flips[i] else expected)


@pytest.mark.parametrize("shape", [(30, 12, 12, 3), (30, 12, 12)])
def test_npz_views_are_exact(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    data = open_dataset(tmp_path / "x.npz")
    plan = ViewPlan(0, 12, "pad-crop-flip", pad=3)
    got = collected(Loader(data, plan, batch_size=7).stream(0, np.arange(30)))
    padded = np.pad(data.pixels(got["ids"]), ((0, 0), (3, 3), (3, 3), (0, 0)))
    crops, flips = plan.crops(0, got["ids"], data.sizes), plan.flips(0, got["ids"])
    for i, (top, left, _, _) in enumerate(crops):
        expected = padded[i, top + 3 : top + 15, left + 3 : left + 15]
        np.testing.assert_array_equal(got["images"][i], expected[:, ::-1] if flips[i] else expected)
    assert (got["labels"] == -1).all()


@pytest.mark.parametrize("size", [224, 64])
def test_resized_crop_is_torchvisions(photos: Dataset, size: int) -> None:
    assert_resized_crops(photos, ViewPlan(1, size, "resized-crop-flip"), views=(0, 1))


def test_resized_crop_of_every_orientation(drawn: Path) -> None:
    """Region decoding in the upright frame: a wrong orientation is off by far more than the tolerance."""
    assert_resized_crops(open_dataset(drawn), ViewPlan(0, 96, "resized-crop-flip"), views=(0, 1, 2))


def assert_resized_crops(data: Dataset, plan: ViewPlan, views: tuple[int, ...]) -> None:
    loader = Loader(data, plan, batch_size=16, threads=2)
    for view in views:
        got = collected(loader.stream(view, np.arange(len(data))))
        at = np.searchsorted(data.ids, got["ids"])
        crops, flips = plan.crops(view, got["ids"], data.sizes[at]), plan.flips(view, got["ids"])
        for i, position in enumerate(at):
            top, left, h, w = (int(v) for v in crops[i])
            image = resized_crop(upright(data, position), top, left, h, w, [plan.size] * 2, InterpolationMode.BILINEAR)
            expected = np.asarray(ImageOps.mirror(image) if flips[i] else image)
            assert_close(got["images"][i], expected, data.name(position))


@pytest.mark.parametrize("augment", ["resized-crop-flip", "none"])
@pytest.mark.parametrize("size", [224, 64, 31])
def test_evaluation_is_torchvisions(photos: Dataset, augment: Any, size: int) -> None:
    loader = Loader(photos, ViewPlan(1, size, augment), batch_size=25, threads=2)
    got = collected(loader.evaluation())
    np.testing.assert_array_equal(got["rows"], np.arange(61))
    np.testing.assert_array_equal(got["ids"], photos.ids)
    for i in range(61):
        image = upright(photos, i)
        if image.size != (size, size):
            image = Resize(round(size * 256 / 224))(image)
        assert_close(got["images"][i], np.asarray(CenterCrop(size)(image)), photos.name(i))


def test_evaluation_of_drawn(drawn: Path) -> None:
    data = open_dataset(drawn)
    got = collected(Loader(data, ViewPlan(1, 64, "none"), batch_size=25).evaluation())
    for i in range(len(data)):
        assert_close(got["images"][i], np.asarray(CenterCrop(64)(Resize(73)(upright(data, i)))), data.name(i))


def test_evaluation_leaves_equal_sizes_alone(cifar: Dataset, shared_data: Path) -> None:
    for augment in ("pad-crop-flip", "none"):
        got = collected(Loader(cifar, ViewPlan(0, 32, augment), batch_size=128).evaluation())
        np.testing.assert_array_equal(got["images"], cifar.pixels(range(len(cifar))))
        np.testing.assert_array_equal(got["labels"], cifar.labels)
    small = open_dataset(shared_data / "imagenette-small" / "val", limit=2)
    got = collected(Loader(small, ViewPlan(0, 224, "resized-crop-flip"), batch_size=9).evaluation())
    for i in range(len(small)):
        np.testing.assert_array_equal(got["images"][i], np.asarray(upright(small, i)))


def test_view_without_augmentation_is_evaluation(photos: Dataset) -> None:
    loader = Loader(photos, ViewPlan(2, 48, "none"), batch_size=16)
    view, evaluation = collected(loader.stream(4, np.arange(61))), collected(loader.evaluation())
    assert (view["ids"] != evaluation["ids"]).any()
    np.testing.assert_array_equal(view["images"], evaluation["images"][view["ids"]])


def test_pad_crop_of_other_sizes(photos: Dataset) -> None:
    """The shifted central square, black outside, resized; evaluation then shows objects at the same scale."""
    plan = ViewPlan(1, 40, "pad-crop-flip")
    loader = Loader(photos, plan, batch_size=16)
    got = collected(loader.stream(0, np.arange(61)))
    crops, flips = plan.crops(0, got["ids"], photos.sizes[got["ids"]]), plan.flips(0, got["ids"])
    assert (crops[:, 0] < 0).any()
    for i, position in enumerate(got["ids"]):
        top, left, h, w = (int(v) for v in crops[i])
        image = (
            upright(photos, position).crop((left, top, left + w, top + h)).resize((40, 40), Image.Resampling.BILINEAR)
        )
        assert_close(got["images"][i], np.asarray(ImageOps.mirror(image) if flips[i] else image), photos.name(position))
    evaluation = collected(loader.evaluation())
    for i in range(0, 61, 7):
        assert_close(evaluation["images"][i], np.asarray(CenterCrop(40)(Resize(40)(upright(photos, i)))), str(i))


def test_a_step_left_out_moves_nothing(tmp_path: Path) -> None:
    """Samples that need no resize get the same pixels alone as together with samples that need one."""
    rng = np.random.default_rng(0)
    for i, side in enumerate((32, 32, 50)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    for augment in ("pad-crop-flip", "resized-crop-flip", "none"):
        loader = Loader(open_dataset(tmp_path), ViewPlan(5, 32, augment, scale=(1, 1), ratio=(1, 1)), batch_size=3)
        mixed = collected(loader.stream(0, np.arange(3)))
        for row in range(3):
            alone = collected(loader.stream(0, np.array([row])))
            np.testing.assert_array_equal(alone["images"][0], mixed["images"][row])


# --- batching


@pytest.mark.parametrize("kind", ["cifar", "photos"])
def test_same_pixels_however_batched(kind: str, request: pytest.FixtureRequest) -> None:
    data: Dataset = request.getfixturevalue(kind)
    plan = ViewPlan(9, 32, "pad-crop-flip" if kind == "cifar" else "resized-crop-flip")
    n = len(data)
    whole = collected(Loader(data, plan, batch_size=n, threads=1, prefetch=1).stream(2, np.arange(n)))
    for batch_size, threads, prefetch in ((1, 2, 3), (7, 1, 1), (64, 3, 2)):
        loader = Loader(data, plan, batch_size=batch_size, threads=threads, prefetch=prefetch)
        rows = np.arange(n)[: 30 if batch_size == 1 else n]
        got = collected(loader.stream(2, rows))
        for key in whole:
            np.testing.assert_array_equal(got[key], whole[key][rows])

    loader = Loader(data, plan, batch_size=8, threads=2)
    rows = np.random.default_rng(0).integers(0, n, 50)  # any rows, with repeats
    some = collected(loader.stream(2, rows))
    np.testing.assert_array_equal(some["rows"], rows)
    np.testing.assert_array_equal(some["images"], whole["images"][rows])
    resumed = collected(loader.stream(2, rows, start_batch=3))
    np.testing.assert_array_equal(resumed["rows"], rows[24:])
    np.testing.assert_array_equal(resumed["images"], whole["images"][rows[24:]])
    full = collected(loader.stream(2, rows, start_batch=1, drop_last=True))
    np.testing.assert_array_equal(full["rows"], rows[8:48])


def test_limited_data_get_the_same_pixels(shared_data: Path, cifar: Dataset) -> None:
    plan = ViewPlan(1, 32, "pad-crop-flip")
    fewer = open_dataset(cifar.source, limit=1)
    many = collected(Loader(cifar, plan, batch_size=50).stream(0, np.arange(len(cifar))))
    few = collected(Loader(fewer, plan, batch_size=50).stream(0, np.arange(len(fewer))))
    among = np.flatnonzero(np.isin(many["ids"], fewer.ids))
    np.testing.assert_array_equal(many["ids"][among], few["ids"])
    np.testing.assert_array_equal(many["images"][among], few["images"])


def test_empty_streams(cifar: Dataset) -> None:
    loader = Loader(cifar, ViewPlan(1, 32, "none"), batch_size=50)
    assert list(loader.stream(0, np.array([], dtype=np.int64))) == []
    assert list(loader.stream(0, np.arange(60), start_batch=2)) == []
    assert list(loader.stream(0, np.arange(49), drop_last=True)) == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"threads": -1}, "threads: expected"),
        ({"prefetch": 0}, "prefetch: expected"),
        ({"device": "tpu"}, "device: expected"),
        ({"device": "cuda:99"}, "device: expected"),
    ],
)
def test_refuses(cifar: Dataset, what: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Loader(cifar, ViewPlan(1, 32, "none"), **{"batch_size": 4, **what})


def test_refuses_rows(cifar: Dataset) -> None:
    loader = Loader(cifar, ViewPlan(1, 32, "none"), batch_size=50)
    for rows in ([len(cifar)], [-1], [[0]]):
        with pytest.raises(RequestError, match="rows: expected"):
            loader.stream(0, np.array(rows))
    with pytest.raises(RequestError, match="start_batch"):
        loader.stream(0, np.arange(3), start_batch=-1)


# --- trouble


def test_changed_files_are_named_before_they_are_decoded(drawn: Path) -> None:
    data = open_dataset(drawn)
    good = (drawn / "o1-0.jpg").read_bytes()
    (drawn / "o3-1.jpg").write_bytes(good[: len(good) // 2])
    (drawn / "o5.png").write_bytes(b"not a PNG any more")
    (drawn / "o6-2.jpg").write_bytes(good)
    (drawn / "o2-0.jpg").unlink()
    loader = Loader(data, ViewPlan(0, 64, "resized-crop-flip"), batch_size=len(data))
    for stream in (loader.evaluation(), loader.stream(0, np.arange(len(data)))):
        with pytest.raises(RequestError, match="4 images have changed") as caught:
            list(stream)
        for said in ("o2-0.jpg: No such", "o3-1.jpg: cut", "o5.png: none of", "o6-2.jpg: 118x171 pixels, 171x118 when"):
            assert said in str(caught.value)


def test_all_undecodable_are_named(drawn: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What no header tells: damage inside compressed data, in two batches in flight."""
    for name in ("o1.png", "o5.png"):
        content = bytearray((drawn / name).read_bytes())
        content[len(content) // 2] ^= 0x55
        (drawn / name).write_bytes(bytes(content))
    data = open_dataset(drawn)
    loader = Loader(data, ViewPlan(0, 64, "none"), batch_size=len(data) // 2)
    with pytest.raises(RequestError, match=r"2 images cannot be decoded:\n.*o1\.png.*\n.*o5\.png: does not decode"):
        list(loader.evaluation())
    capfd.readouterr()  # libpng's own complaints


def threads() -> set[str]:
    """Which, not how many: those of earlier tests may end at any time."""
    return set(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds threads through /proc")
def test_abandoned_streams_leave_no_threads(cifar: Dataset, photos: Dataset) -> None:
    train = Loader(cifar, ViewPlan(0, 32, "pad-crop-flip"), batch_size=10)
    val = Loader(photos, ViewPlan(0, 32, "resized-crop-flip"), batch_size=4)
    for loader in (train, val):
        next(loader.stream(0, np.arange(10)))  # libraries start threads of their own once
    before = threads()
    for _ in range(3):
        one, two, three = train.stream(0, np.arange(300)), val.evaluation(), val.stream(1, np.arange(61))
        for stream in (one, two, three):
            next(stream)
        assert threads() - before
        del one  # dropped
        two.close()  # type: ignore[attr-defined]  # closed
        val.close()  # all of a loader's at once
        assert next(three, None) is None
    del stream
    assert not threads() - before
    assert len(list(train.stream(0, np.arange(300)))) == 30


def test_two_loaders_side_by_side(cifar: Dataset, photos: Dataset) -> None:
    train = Loader(cifar, ViewPlan(0, 32, "pad-crop-flip"), batch_size=16)
    with Loader(photos, ViewPlan(0, 64, "none"), batch_size=16) as val:
        apart = [collected(train.stream(1, np.arange(64))), collected(val.evaluation())]
        streams = [train.stream(1, np.arange(64)), val.evaluation()]
        together = [[next(s) for s in streams] for _ in range(4)]
    for which in (0, 1):
        images = torch.cat([pair[which].images for pair in together]).numpy()
        np.testing.assert_array_equal(images, apart[which]["images"])


SCRIPT = """
import sys
import numpy as np
from feedfast.data import dataset, loader, views
assert "nvidia.dali" not in sys.modules
data = dataset.open_dataset(sys.argv[1], limit=2)
train = loader.Loader(data, views.ViewPlan(0, 32, "pad-crop-flip"), batch_size=16)
stream = train.stream(0, np.arange(len(data)))
print(next(stream).images.float().mean().item() > 0)
sys.exit(0)  # with a stream half-way
"""


def test_process_ends_cleanly(shared_data: Path) -> None:
    """DALI is imported late; a forgotten stream does not hold up or upset the end of the process."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(shared_data / "cifar-100-binary" / "test.bin")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "True", "")


def test_describe(cifar: Dataset) -> None:
    said = Loader(cifar, ViewPlan(0, 32, "none"), batch_size=16).describe()
    assert json.loads(json.dumps(said)) == said
    assert said["backend"] == "dali-cpu"
    assert said["dali"][0].isdigit()
    assert said["nvimgcodec"] != "unknown"


def test_the_bench_still_runs(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "bench" / "bench_loader.py"
    runpy.run_path(str(file))["main"](["--tiny", "--data", str(shared_data)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(row["images_per_second"] > 0 for name, row in said["rows"].items() if name != "plan")


@pytest.mark.gpu
def test_gpu_is_close_to_cpu(cifar: Dataset, photos: Dataset) -> None:
    for data, plan in ((cifar, ViewPlan(0, 32, "pad-crop-flip")), (photos, ViewPlan(0, 96, "resized-crop-flip"))):
        rows = np.arange(len(data))
        cpu = collected(Loader(data, plan, batch_size=16).stream(0, rows))
        batches = list(Loader(data, plan, batch_size=16, device="cuda").stream(0, rows))
        assert all(b.images.is_cuda and b.labels.is_cuda for b in batches)
        off = np.abs(torch.cat([b.images for b in batches]).cpu().numpy().astype(int) - cpu["images"].astype(int))
        if data.kind == "pixels":
            assert off.max() == 0
        else:
            assert off.mean() < 1.0
            assert np.mean(off > 8) < 0.001
