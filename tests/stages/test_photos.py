"""The whole job on photographs: JPEG folders with every oddity, 224 pixels, a torchvision network, its four OFD taps.

`photos-varied` is flat (no labels) and holds large, tiny, gray and turned (EXIF) images. The weights are random, but
BatchNorm has seen these photographs, so that maps, margins and codes are those of a network in use. What the cache
holds is compared with PIL, torchvision and a forward pass written out here, not with the code that wrote it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from feedfast.errors import RequestError
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.pilot import PILOT_VIEWS, pilot_batches
from feedfast.stages.proof import stored_values
from feedfast.stages.student import run_train
from feedfast.stages.verify import run_verify
from feedfast.storage.layout import array_specs
from feedfast.storage.reader import CacheReader

pytestmark = pytest.mark.slow  # the shared cache of photographs takes twelve seconds

MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]),
    torch.tensor([0.229, 0.224, 0.225]),
)  # what torchvision's networks expect
SHAPES = {"ofd1": (64, 56, 56), "ofd2": (128, 28, 28), "ofd3": (256, 14, 14), "ofd4": (512, 7, 7), "final": (512, 7, 7)}


def write_teacher(path: Path, photos: Path) -> Path:
    """A ResNet-18 of 10 classes, uneven scales and shifts, statistics of 24 photographs; written as a state_dict."""
    torch.manual_seed(0)
    network = resnet18(num_classes=10).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches seen
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    images = [load(file, (0, 0, 0, 0), flip=False, size=224) for file in sorted(photos.iterdir())[:24]]
    with torch.no_grad():
        network(torch.stack(images))
    torch.save(network.state_dict(), path)
    return path


def load(file: Path, box: tuple[int, int, int, int], *, flip: bool, size: int) -> torch.Tensor:
    """A photograph through PIL and torchvision: upright, cut to ``box`` (top, left, height, width; zeros = all)."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    top, left, height, width = box if any(box) else (0, 0, upright.height, upright.width)
    cut = resized_crop(upright, top, left, height, width, [size, size], InterpolationMode.BILINEAR)
    pixels = torch.from_numpy(np.asarray(ImageOps.mirror(cut) if flip else cut).copy())
    return ((pixels / 255 - MEAN) / STD).permute(2, 0, 1)


def forward(network: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """ResNet-18 written out: every stage's last residual sum before its ReLU, the last map after it, the logits."""
    maps = {}
    x = network.maxpool(torch.relu(network.bn1(network.conv1(x))))
    for number in range(1, 5):
        for block in getattr(network, f"layer{number}"):
            branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            total = branch + (x if block.downsample is None else block.downsample(x))
            x = torch.relu(total)
        maps[f"ofd{number}"] = total
    return {**maps, "final": x, "logits": network.fc(x.mean((2, 3)))}


def photo_recipe(folder: Path, source: Path, **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "seed": 3,
        "data": {"train": str(source), "size": 224, "augment": "resized-crop-flip", "threads": 1},
        "cache": {"path": str(folder / "photos.zarr"), "views": 2, "batch": 16, "pilot": 64},
        "teachers": [
            {
                "name": "r18",
                "model": "torchvision/resnet18",
                "weights": str(folder / "r18.pt"),
                "classes": 10,
                "taps": ["ofd+margin", "final"],
            }
        ],
        "student": {"model": "torchvision/mobilenet_v3_small"},
        "method": {"name": "ofd", "alpha": 1e-4},
        "train": {"epochs": 2, "batch": 8, "lr": 0.01, "device": "cpu", "out": str(folder / "student"), "log_every": 1},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if name in ("data", "cache", "train") else section
    return parse_recipe(tree)


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> Path:
    return shared_data / "photos-varied"


@pytest.fixture(scope="module")
def world(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All photographs, two views at u8; the folder and what `feedfast cache` reported."""
    folder = tmp_path_factory.mktemp("photos")
    write_teacher(folder / "r18.pt", photos)
    return folder, run_cache(photo_recipe(folder, photos))


def test_the_cache_is_complete_small_and_exact_enough(world: tuple[Path, dict[str, Any]]) -> None:
    folder, result = world
    assert (result["complete"], result["rows_written"]) == (True, 2 * 61)
    assert {tap.removeprefix("r18/"): tuple(entry["shape"]) for tap, entry in result["taps"].items()} == SHAPES
    for name, entry in result["taps"].items():
        assert entry["bytes_per_sample"] <= math.prod(entry["shape"]) * 1.02, name
        assert entry["relative_rms_error"] <= 0.015, name
        assert entry.get("mask_flip_rate", 0.0) <= 0.01, name
        assert ("mask_flip_rate" in entry) == ("ofd" in name)
    reader = CacheReader(folder / "photos.zarr")
    assert (reader.read_array("samples/label") == -1).all(), "a flat folder has no labels"
    info = reader.manifest.teachers["r18"].taps
    assert {name: (tap.path, tap.position, tap.transform) for name, tap in info.items()} == {
        **{f"ofd{stage}": (f"layer{stage}", "pre", "margin") for stage in range(1, 5)},
        "final": ("layer4", "post", "none"),
        "logits": ("", "post", "none"),
    }


def test_stored_maps_are_those_of_pil_torchvision_and_a_plain_forward(
    world: tuple[Path, dict[str, Any]], photos: Path
) -> None:
    """Every ninth row of both views; a wrong order, crop, flip, EXIF turn, normalization, tap or margin is far off."""
    folder, result = world
    reader = CacheReader(folder / "photos.zarr")
    network = resnet18(num_classes=10).eval()
    network.load_state_dict(torch.load(folder / "r18.pt", weights_only=True))
    files = sorted(photos.iterdir())
    exact: dict[str, list[torch.Tensor]] = {}
    stored: dict[str, list[torch.Tensor]] = {}
    for view in range(2):
        rows = np.arange(view, 61, 9)
        order, crops, flips = (reader.read_array(f"views/{name}", view)[rows] for name in ("order", "window", "flip"))
        pixels = [
            load(files[sample], tuple(map(int, crop)), flip=bool(flip), size=224)
            for sample, crop, flip in zip(order, crops, flips, strict=True)
        ]
        with torch.no_grad():
            maps = forward(network, torch.stack(pixels))
        for tap, values in maps.items():
            if tap.startswith("ofd"):
                margin = reader.manifest.teachers["r18"].taps[tap].margin
                assert margin is not None
                values = values.maximum(torch.tensor(margin).view(1, -1, 1, 1))
            exact.setdefault(tap, []).append(values.double())
            stored.setdefault(tap, []).append(stored_values(reader, "r18", tap, view, rows).double())
    for tap in (*SHAPES, "logits"):
        ours, theirs = torch.cat(stored[tap]).flatten(1), torch.cat(exact[tap]).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(ours, theirs)
        assert cosine.min() >= 0.99, (tap, cosine)  # DALI and PIL differ by one step of 255, more along edges
        assert result["taps"].get(f"r18/{tap}", {"relative_rms_error": 0})["relative_rms_error"] < 0.02


def test_margins_are_the_expected_negative_response(world: tuple[Path, dict[str, Any]]) -> None:
    """E[x | x < 0] of a normal with the last BatchNorm's shift and scale, by numerical integration."""
    state = torch.load(world[0] / "r18.pt", weights_only=True)
    info = CacheReader(world[0] / "photos.zarr").manifest.teachers["r18"].taps["ofd3"]
    gamma, beta = (state[f"layer3.1.bn2.{name}"].double().numpy() for name in ("weight", "bias"))
    for channel in range(0, 256, 51):
        x = np.linspace(beta[channel] - 12 * gamma[channel], 0, 200_001)
        density = np.exp(-0.5 * ((x - beta[channel]) / gamma[channel]) ** 2)
        assert info.margin is not None
        assert info.margin[channel] == pytest.approx((x * density).sum() / density.sum(), rel=1e-3)


def test_verify_reads_decodes_and_recomputes(world: tuple[Path, dict[str, Any]], photos: Path) -> None:
    folder, _ = world
    recipe = photo_recipe(folder, photos)
    checked = run_verify(recipe.cache.path, full=True, replay=4, teachers_percent=25, recipe=recipe)
    assert (checked["ok"], checked["problems"], checked["replayed"]) == (True, [], 4)
    assert set(checked["cosine"]) == {f"targets/r18/{tap}/codes" for tap in (*SHAPES, "logits")}
    assert min(checked["cosine"].values()) > 0.999


def test_verify_finds_another_photograph_and_other_weights(
    world: tuple[Path, dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    """Pixels that changed behind the same name, and weights that are not the cache's."""
    folder, _ = world
    moved = tmp_path / "photos"
    moved.mkdir()
    for file in photos.iterdir():
        (moved / file.name).symlink_to(file)
    recipe = photo_recipe(folder, moved)
    assert run_verify(recipe.cache.path, replay=4, recipe=recipe)["ok"], "the place of a folder is not its content"
    for file in sorted(photos.iterdir()):
        with Image.open(file) as image:
            size, exif = image.size, image.getexif()
        (moved / file.name).unlink()
        Image.new("RGB", size, "gray").save(moved / file.name, exif=exif)
    checked = run_verify(recipe.cache.path, replay=4, recipe=recipe)
    assert not checked["ok"]
    assert {entry["kind"] for entry in checked["problems"]} == {"pixels"}
    with pytest.raises(RequestError, match=r"give --recipe"):
        run_verify(recipe.cache.path, teachers_percent=10)


@pytest.mark.parametrize("method", [{"name": "ofd", "alpha": 1e-4}, {"name": "pfeed"}, {"name": "kd"}])
def test_a_student_learns_from_unlabeled_photographs(
    world: tuple[Path, dict[str, Any]], photos: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Three steps at 224 from u8 codes: no label, so no cross-entropy; the teacher alone moves the weights."""
    recipe = photo_recipe(world[0], photos, method=method, train={"max_steps": 3, "out": str(tmp_path / "s")})
    result = run_train(recipe)
    assert (result["steps"], result["val_accuracy"]) == (3, None)
    rows = [row for row in read_metrics(tmp_path / "s" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["ce"] == 0.0
        assert row["loss"] > 0
        assert math.isfinite(row["loss"])
    assert len({row["loss"] for row in rows}) == 3
    assert torch.load(tmp_path / "s" / "student.pt", weights_only=True)["classifier.3.weight"].shape == (10, 1024)


@pytest.mark.parametrize(
    "method",
    [{"name": "ofd", "alpha": 1e-4}, {"name": "pfeed"}, {"name": "kd"}],
    ids=lambda method: str(method["name"]),
)
def test_class_folders_cached_and_live_are_the_same_steps(
    world: tuple[Path, dict[str, Any]],
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    method: dict[str, Any],
) -> None:
    """imagenette-small, four a class, labels and teacher together: losses bit for bit, f32 against live.

    The student has a dropout, so this also holds its draws to be those of the step.
    """
    base = tmp_path_factory.getbasetemp() / "imagenette"
    base.mkdir(exist_ok=True)
    losses: dict[str, list[float]] = {}
    for kind in ("cache", "live"):
        out = base / f"{method['name']}-{kind}"
        recipe = photo_recipe(
            world[0],
            shared_data / "imagenette-small" / "train",
            data={"size": 64, "limit": 4},
            cache={"codec": "f32", "batch": 20, "path": str(base / "f32.zarr")},
            method=method,
            train={"source": kind, "batch": 20, "out": str(out), "max_steps": 3},
        )
        if kind == "cache":
            run_cache(recipe)
        run_train(recipe)
        rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        assert all(row["ce"] > 1 for row in rows)
        losses[kind] = [row["loss"] for row in rows]
    assert len(losses["live"]) == 3
    assert losses["cache"] == losses["live"]


def test_a_student_with_dropout_resumes_exactly(
    world: tuple[Path, dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    states = []
    for name, stops in (("whole", [4]), ("parts", [1, 4])):
        for stop in stops:
            recipe = photo_recipe(
                world[0],
                photos,
                data={"size": 32, "limit": 20},
                student={"model": "torchvision/mobilenet_v3_small"},
                method={"name": "kd"},
                train={"source": "live", "max_steps": stop, "out": str(tmp_path / name)},
            )
            torch.manual_seed(stop)
            run_train(recipe)
        states.append(torch.load(tmp_path / name / "student.pt", weights_only=True))
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


def test_unlabeled_photographs_need_the_teachers_classes(world: tuple[Path, dict[str, Any]], photos: Path) -> None:
    """Nothing says how many outputs the file's network has: the message names the key."""
    teachers = [{"name": "r18", "model": "torchvision/resnet18", "weights": str(world[0] / "r18.pt")}]
    with pytest.raises(
        RequestError, match=r"fc\.weight expected \[1000, 512\], found \[10, 512\].*teachers\[r18\]\.classes"
    ):
        run_cache(photo_recipe(world[0], photos, teachers=teachers, cache={"path": str(world[0] / "other.zarr")}))
    assert not (world[0] / "other.zarr").exists()


def test_blocks_shrink_as_rows_grow(world: tuple[Path, dict[str, Any]]) -> None:
    """A row of ofd1 is 196 KiB at 224 pixels: a block stays below 8 MiB, a shard near 32 MiB."""
    manifest = CacheReader(world[0] / "photos.zarr").manifest
    specs = {name: spec for name, spec in array_specs(manifest).items() if spec.sharded}
    maps = {tap: specs[f"targets/r18/{tap}/codes"].block_rows for tap in (*SHAPES, "logits")}
    assert maps == {"ofd1": 32, "ofd2": 64, "ofd3": 64, "ofd4": 64, "final": 64, "logits": 64}
    assert (manifest.plan.granule, manifest.plan.window) == (64, 16)
    for name, spec in specs.items():
        row = math.prod(spec.shape[2:]) * np.dtype(spec.dtype).itemsize
        assert spec.block_rows * row <= 8 * 2**20, name
        assert spec.shard_rows * row <= max(manifest.shard_bytes, spec.block_rows * row), name


@given(st.integers(1, 300), st.integers(16, 600), st.integers(1, 64), st.booleans())
def test_the_pilot_is_measured_on_pixels_it_was_not_fitted_on(
    count: int, pilot: int, batch: int, augmented: bool
) -> None:
    total = -(-count // batch)
    fit, held = (
        [(view, number) for view, part in group for number in part]
        for group in pilot_batches(count, pilot, batch, augmented=augmented)
    )
    assert fit
    assert held
    assert all(0 <= number < total for _, number in fit + held)
    assert len(set(fit)) == len(fit) <= max(1, -(-pilot // batch))
    assert len(set(held)) == len(held) <= -(-len(fit) // 4)
    if augmented or len(fit) < total:
        assert not set(fit) & set(held)
    if len(fit) < -(-pilot // batch):
        assert len(fit) == total * (PILOT_VIEWS if augmented else 1), "fewer than asked for, though there are more"
    if not augmented:
        assert {view for view, _ in fit + held} == {0}
