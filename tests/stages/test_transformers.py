"""Teachers that are no ResNets: tokens and channels-last maps from network to cache to student, at their own input.

A ViT, a Swin and a ConvNeXt of timm at the size of a test, with random weights: what is compared is what they compute.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
import zarr
from small import digits_recipe
from torch import Tensor

from feedfast.errors import CacheMismatchError, RequestError
from feedfast.methods import OFD, StudentOutput, TapInfo
from feedfast.models.build import build_model
from feedfast.models.taps import Tapped
from feedfast.recipe import Recipe, load_recipe, parse_recipe
from feedfast.stages.accuracy import chance_limit, near_chance
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import FrozenTeacher, load_teachers, tap_requests
from feedfast.stages.inputs import teacher_input
from feedfast.stages.inspect import run_inspect
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.proof import stored_values
from feedfast.stages.student import run_train
from feedfast.stages.trainee import build_methods, method_entries, names_of
from feedfast.stages.verify import run_verify
from feedfast.storage.reader import CacheReader

pytest.importorskip("timm")

CPU = torch.device("cpu")


def recipe_of(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    """100 digits of 32 pixels and the teachers vit, swin and convnext."""
    teachers = [
        {"name": "vit", "model": "networks:vit", "taps": ["final", "mine=blocks.0", "stage"]},
        {"name": "swin", "model": "networks:swin", "taps": ["final"]},
        {"name": "convnext", "model": "networks:convnext", "taps": ["final", "ofd+margin"]},
    ]
    given: dict[str, Any] = {
        "data": {"size": 32, "limit": 10, "augment": "none"},
        "cache": {"views": 1, "pilot": 64, "codec": "f32"},
        "teachers": teachers,
        "method": [{"name": "pfeed"}, {"name": "kd"}],
        "train": {"epochs": 1, "replay": 0},
    }
    tree = digits_recipe(folder, teachers=0, method={"name": "none"}).model_dump(mode="json", exclude_none=True)
    for name, section in {**given, **sections}.items():
        tree[name] = {**tree[name], **section} if name != "method" and isinstance(section, dict) else section
    return parse_recipe(tree, overrides)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    recipe = recipe_of(tmp_path_factory.mktemp("transformers"))
    return recipe, run_cache(recipe)


@pytest.fixture(scope="module")
def rows(world: tuple[Recipe, dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The pixels of view 0, row by row, in 0..1 as [100, 3, 32, 32], and the labels."""
    recipe, _ = world
    data = open_train(recipe)
    with pixel_loader(data, view_plan(recipe.data, recipe.seed), 100, CPU) as loader:
        batch = next(iter(loader.stream(0, np.arange(100))))
        return batch.images.permute(0, 3, 1, 2).float() / 255, batch.labels


def network_of(name: str) -> torch.nn.Module:
    """As the stages seed it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(networks, name)().eval()


def test_tokens_are_stored_as_tokens_and_as_their_grid(world: tuple[Recipe, Any], rows: tuple[Tensor, Tensor]) -> None:
    """By a network of its own, its published normalization (0.5, 0.5), and plain slicing."""
    recipe, _ = world
    vit, caught = network_of("vit"), {}
    for name in ("norm", "blocks.0"):
        vit.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: caught.update({name: out}))
    with torch.no_grad():
        logits = vit((rows[0] - 0.5) / 0.5)
    stored = zarr.open_group(recipe.cache.path, mode="r")
    mine = stored["targets/vit/mine/codes"]
    assert mine.metadata.dimension_names == ("view", "row", "token", "channel")
    np.testing.assert_allclose(mine[0, :100], caught["blocks.0"].numpy(), rtol=1e-4, atol=1e-5)
    grid = caught["norm"][:, 1:].reshape(100, 4, 4, 24)
    np.testing.assert_allclose(stored["targets/vit/final/codes"][0, :100], grid.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stored["targets/vit/logits/codes"][0, :100], logits.numpy(), rtol=1e-4, atol=1e-5)


def test_channels_last_maps_are_stored_as_maps(world: tuple[Recipe, Any], rows: tuple[Tensor, Tensor]) -> None:
    recipe, _ = world
    swin = network_of("swin")
    mean, std = (torch.tensor(swin.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = swin.forward_features((rows[0] - mean) / std)
    found = stored_values(CacheReader(recipe.cache.path), "swin", "final", 0, np.arange(100))
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_cache_trains_as_live_teachers_do_and_is_verified(world: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, _ = world
    found = run_verify(recipe.cache.path, full=True, teachers_percent=100.0, recipe=recipe)
    assert found["ok"], found["problems"]
    assert found["cosine"]["targets/vit/mine/codes"] > 0.999999
    losses = []
    for source in ("cache", "live"):
        run = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"source": source, "out": str(tmp_path / source)})}
        )
        losses.append(run_train(run)["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("codec", ["u8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("u4", "f16"))])
def test_tokens_in_every_codec(codec: str, tmp_path: Path, rows: tuple[Tensor, Tensor]) -> None:
    given = {"teachers": [{"name": "vit", "model": "networks:vit", "taps": ["mine=norm"]}]}
    recipe = recipe_of(tmp_path, f"cache.codec={codec}", **given)
    cached = run_cache(recipe, check=False)["taps"]["vit/mine"]  # a cache for others: no method reads it
    reader = CacheReader(recipe.cache.path)
    vit, caught = network_of("vit"), {}
    vit.norm.register_forward_hook(lambda _, __, out: caught.update(norm=out))
    with torch.no_grad():
        vit((rows[0] - 0.5) / 0.5)
    found = stored_values(reader, "vit", "mine", 0, np.arange(100))
    expected = caught["norm"].transpose(1, 2)
    assert found.shape == (100, 24, 17)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert error < {"u8": 0.01, "u4": 0.15, "f16": 0.001}[codec]
    assert cached["shape"] == [24, 17]
    live = load_teachers(recipe, 10, CPU)["vit"]
    batch = next(iter(reader.stream(["targets/vit/mine/codes"], 0, np.arange(8), 8)))
    assert live.shapes["mine"] == (24, 17)
    assert batch["targets/vit/mine/codes"].shape == ((8, 17, 12) if codec == "u4" else (8, 17, 24))


def test_margins_of_a_network_without_batch_norm_are_measured(
    world: tuple[Recipe, Any], rows: tuple[Tensor, Tensor]
) -> None:
    """Mean negative response per batch of the pilot and channel, averaged over batches; the student's loss is built."""
    recipe, _ = world
    convnext = network_of("convnext")
    mean, std = (torch.tensor(convnext.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    info = CacheReader(recipe.cache.path).manifest.teachers["convnext"]
    with torch.no_grad():
        maps = convnext.forward_intermediates((rows[0][:64] - mean) / std, intermediates_only=True)
    teachers = {
        tap: TapInfo(entry.shape, torch.tensor(entry.margin)) for tap, entry in info.taps.items() if entry.margin
    }
    assert list(teachers) == ["ofd1", "ofd2", "ofd3", "ofd4"]
    for number, values in enumerate(maps, start=1):
        expected = [
            np.mean([v[v < 0].mean() if (v < 0).any() else 0.0 for v in values[:, channel].reshape(2, -1).numpy()])
            for channel in range(values.shape[1])
        ]
        np.testing.assert_allclose(teachers[f"ofd{number}"].margin, expected, rtol=1e-3, atol=1e-5)
    shapes = {tap: (4, *entry.shape[1:]) for tap, entry in teachers.items()}
    student = {tap: torch.randn(2, *shape, requires_grad=True) for tap, shape in shapes.items()}
    terms = OFD(OFD.Options(), shapes, {"t": teachers})(
        StudentOutput(None, student), {"t": {f"ofd{n}": m[:2] for n, m in enumerate(maps, 1)}}, None
    )
    assert torch.isfinite(terms["feature"])


def test_top1_is_measured_told_and_judged(
    world: tuple[Recipe, dict[str, Any]], rows: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, document = world
    teachers = load_teachers(recipe, 10, CPU)
    images = (rows[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    with caplog.at_level(logging.INFO, "feedfast"):
        again = run_cache(recipe)  # nothing to do: what the pilot measured is told
    held = run_inspect(recipe.cache.path)["teachers"]
    for name, teacher in teachers.items():
        right = float((teacher(images)["logits"].argmax(1) == rows[1]).float().mean())
        assert document["teachers"][name]["top1"] == pytest.approx(right)
        assert document["teachers"][name]["top1_rows"] == 100
        assert 0 <= held[name]["top1"] <= 1
        assert held[name]["top1_rows"] >= 64
        assert again["teachers"][name]["top1"] == held[name]["top1"]
        assert document["teachers"][name]["near_chance"] == (right < 0.19)
    assert any("near chance" in record.message for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize(
    ("top1", "rows", "classes", "judged"),
    [
        (0.10, 1000, 10, True),
        (0.185, 1000, 10, True),
        (0.21, 1000, 10, False),
        (0.0, 20, 10, False),  # too few rows to tell
        (0.52, 1000, 2, True),
        (0.60, 1000, 2, False),
        (0.0015, 2560, 1000, True),
        (0.004, 2560, 1000, False),
        (None, 0, 10, False),
    ],
)
def test_near_chance(top1: float | None, rows: int, classes: int, judged: bool) -> None:
    assert near_chance(top1, rows, classes) is judged
    assert 1 / classes < chance_limit(classes) < 1


@pytest.mark.parametrize("key", ["data.mean", "data.std", "teachers.0.mean", "teachers.0.std"])
def test_normalization_of_pixels_in_0_to_255_is_refused_with_the_division(key: str) -> None:
    tree = {"data": {"train": "x"}, "teachers": [{"name": "a", "model": "zoo/wrn-10-1"}], "method": {"name": "kd"}}
    with pytest.raises(RequestError, match=rf"{key}: .*0\.\.1.*divided by 255: \[0\.4854, 0\.456, 0\.4059\]") as caught:
        parse_recipe(tree, (f"{key}=[123.78, 116.28, 103.5]",))
    assert "123.78" in str(caught.value)


@pytest.mark.slow
def test_networks_that_return_mappings_teach_and_learn(tmp_path: Path) -> None:
    given = {"teachers": [{"name": "a", "model": "networks:InMapping"}], "method": {"name": "kd"}}
    recipe = recipe_of(tmp_path, "data.size=16", "student.model=networks:InMapping", **given)
    assert run_cache(recipe)["teachers"]["a"]["top1_rows"] == 100
    assert run_train(recipe)["val_accuracy"] is not None
    assert run_plan(recipe)["student_ms"] > 0


@pytest.mark.slow
def test_a_recipe_of_ten_lines(tmp_path: Path) -> None:
    """The example: its networks are built with random weights, and its methods meet their maps."""
    file = Path(__file__).parents[2] / "docs" / "recipes" / "vit-convnext.toml"
    assert len(file.read_text().splitlines()) == 10
    recipe = load_recipe(file)
    shapes = {}
    for spec in recipe.teachers:
        network = build_model(spec.model, num_classes=10, seed=0)
        size = teacher_input(spec, recipe.data, network).size
        taps = tap_requests(network, ("final",), torch.zeros(2, 3, size, size), spec.name)
        tapped = Tapped(network, [request.tap for request in taps], torch.zeros(2, 3, size, size))
        shapes[spec.name] = {tap: TapInfo(shape) for tap, shape in tapped.shapes.items()} | {
            "logits": TapInfo(tapped.outputs or ())
        }
    assert shapes["vit"]["final"].shape == (192, 14, 14)
    assert shapes["convnext"]["final"].shape == (320, 3, 3)
    entries = method_entries(recipe.method)
    assert names_of(entries) == "pfeed + kd"
    assert len(build_methods(entries, {"final": (512, 3, 3)}, shapes, (10,), 0)) == 2


def shown(recipe: Recipe) -> FrozenTeacher:
    return next(iter(load_teachers(recipe, 10, CPU).values()))


def test_a_model_is_shown_what_its_weights_were_made_for(tmp_path: Path) -> None:
    """In this order: the recipe, the run that saved the weights, the library, the data."""
    plain = {"teachers": [{"name": "a", "model": "zoo/wrn-10-1", "weights": str(tmp_path / "run" / "student.pt")}]}
    run = recipe_of(
        tmp_path,
        *("train.source=none", "data.size=16", "data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]"),
        teachers=[],
        method={"name": "none"},
        train={"out": str(tmp_path / "run"), "max_steps": 1},
    )
    run_train(run)
    teacher = shown(recipe_of(tmp_path, **plain))
    assert (teacher.mean, teacher.std, teacher.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 16)
    said = shown(recipe_of(tmp_path, "teachers.0.mean=[0.5,0.5,0.5]", "teachers.0.size=24", **plain))
    assert (said.mean, said.std, said.size) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6), 24)
    (tmp_path / "run" / "student.pt").rename(tmp_path / "elsewhere.pt")
    moved = recipe_of(
        tmp_path, **plain | {"teachers": [{**plain["teachers"][0], "weights": str(tmp_path / "elsewhere.pt")}]}
    )
    assert (shown(moved).mean, shown(moved).size) == (moved.data.normalization[0], 32)
    vit = {"teachers": [{"name": "vit", "model": "networks:vit"}]}
    small = shown(recipe_of(tmp_path, "data.size=16", **vit))  # runs at 32 pixels only
    assert (small.mean, small.size) == ((0.5, 0.5, 0.5), 32)


@pytest.mark.slow
def test_images_are_resized_for_a_teacher_and_the_cache_knows(tmp_path: Path) -> None:
    given = {"teachers": [{"name": "vit", "model": "networks:vit", "taps": ["final"]}]}
    recipe = recipe_of(tmp_path, "data.size=16", "cache.codec=f32", **given)
    run_cache(recipe)
    reader = CacheReader(recipe.cache.path)
    assert reader.manifest.teachers["vit"].size == 32
    data = open_train(recipe)
    with pixel_loader(data, view_plan(recipe.data, recipe.seed), 32, CPU) as loader:
        images = next(iter(loader.stream(0, np.arange(32)))).images
    large = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float() / 255, size=(32, 32), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        expected = network_of("vit")((large - 0.5) / 0.5)
    found = stored_values(reader, "vit", "logits", 0, np.arange(32))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert run_verify(recipe.cache.path, teachers_percent=100.0, recipe=recipe)["ok"]
    run_train(recipe)
    other = recipe.model_copy(update={"teachers": (recipe.teachers[0].model_copy(update={"size": 16}),)})
    with pytest.raises((CacheMismatchError, RequestError), match=r"\[2, 3, 16, 16\]: Input height"):
        run_train(other.model_copy(update={"train": other.train.model_copy(update={"out": str(tmp_path / "other")})}))
