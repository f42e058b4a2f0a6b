"""Operations of a view from the recipe to the student: cached, verified, live as from the cache, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small import digits_recipe

from feedfast.data.augment import PRESETS, plan_with
from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.report.run import read_metrics
from feedfast.stages.identity import plan_info
from feedfast.stages.offline import run_cache
from feedfast.stages.open_cache import open_cache
from feedfast.stages.proof import check_views, plan_of
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import PlanInfo

STRONG: list[dict[str, Any]] = [
    {"op": "pad-crop", "pad": 2},
    {"op": "rand-augment", "magnitude": 9},
    {"op": "random-erasing", "p": 0.3},
    {"op": "mixup", "alpha": 0.8, "p": 0.4},
    {"op": "cutmix", "p": 0.4},
]


def recipe_for(folder: Path, augment: Any = STRONG, **sections: Any) -> Any:
    cache = {"codec": "f32", "path": str(folder / "c.zarr"), **sections.pop("cache", {})}
    return digits_recipe(folder, data={"augment": augment}, cache=cache, method={"name": "kd"}, **sections)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers and a cache of mixed, erased views."""
    folder = tmp_path_factory.mktemp("augment")
    run_cache(recipe_for(folder))
    return folder


def test_what_is_stored_is_what_the_plan_draws(world: Path) -> None:
    reader = CacheReader(world / "c.zarr")
    plan, operations = plan_of(reader), reader.manifest.plan.operations
    assert operations is not None
    assert (operations.slots, operations.mixed, operations.table) == (3, True, "1")
    data = open_cache(world / "c.zarr").data
    order = plan.order(1, data.ids)
    program, mixing = plan.program(1, order), plan.mixing(1, order)
    assert program is not None and mixing is not None  # noqa: PT018
    assert np.array_equal(reader.read_array("views/steps", 1), program.codes)
    assert np.array_equal(reader.read_array("views/parameters", 1), program.parameters)
    assert np.array_equal(reader.read_array("views/weight", 1), mixing.weight)
    assert np.array_equal(reader.read_array("views/box", 1), mixing.box)
    assert program.codes.any()


def test_cached_is_live_and_verifies(world: Path, tmp_path: Path) -> None:
    assert run_verify(world / "c.zarr", full=True, replay=4)["ok"]
    found = []
    for source in ("cache", "live"):
        train = {"source": source, "out": str(tmp_path / source), "epochs": 2, "max_steps": 8, "eval_every": 0}
        run_train(recipe_for(world, train=train))
        found.append([row["loss"] for row in read_metrics(tmp_path / source / "metrics.jsonl") if "loss" in row])
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_a_stream_hands_out_two_labels(world: Path) -> None:
    batch = next(iter(open_cache(world / "c.zarr").stream(0, batch_size=16)))
    assert len(batch.annotations.first) == len(batch.annotations.second) == 16
    assert ((batch.annotations.weight >= 0) & (batch.annotations.weight <= 1)).all()
    with pytest.raises(TypeError, match="MixedLabels"):
        _ = batch.labels


@pytest.mark.slow
def test_stored_pixels_come_with_their_labels(world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(world, cache={"images": "stored", "path": str(tmp_path / "s.zarr")})
    run_cache(recipe)
    stored, replayed = (
        next(iter(open_cache(path).stream(1, batch_size=32))) for path in (tmp_path / "s.zarr", world / "c.zarr")
    )
    assert np.array_equal(stored.images.numpy(), replayed.images.numpy())
    assert np.array_equal(stored.annotations.second.numpy(), replayed.annotations.second.numpy())
    assert np.array_equal(stored.annotations.weight.numpy(), replayed.annotations.weight.numpy())


@pytest.mark.parametrize("array", ["steps", "parameters", "weight", "box"])
def test_a_changed_array_is_found_before_training(world: Path, array: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CacheReader(world / "c.zarr")
    data = open_cache(world / "c.zarr").data
    genuine = CacheReader.read_array

    def changed(self: CacheReader, name: str, *view: int) -> np.ndarray:
        found = genuine(self, name, *view).copy()
        if name == f"views/{array}":
            found[-1] = found[-1] + 1
        return found

    monkeypatch.setattr(CacheReader, "read_array", changed)
    with pytest.raises(CacheDamageError, match=rf"views/{array}: view 0, row {len(data) - 1}"):
        check_views(reader, data, plan_of(reader), 1)


@pytest.mark.parametrize("augment", [
    "pad-crop-flip", STRONG[:-1], [*STRONG[:2], {"op": "random-erasing", "p": 0.31}, *STRONG[3:]], "ml-dr",
])  # fmt: skip
def test_another_list_is_another_cache(world: Path, augment: Any) -> None:
    with pytest.raises(CacheMismatchError, match=r"plan"):
        run_cache(recipe_for(world, augment))


def test_a_method_with_one_label_refuses_two(world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(world, train={"out": str(tmp_path)})
    recipe = recipe.model_copy(update={"method": (recipe.method[0].model_copy(update={"name": "dkd"}),)})
    with pytest.raises(
        RequestError, match=r"'dkd' needs one class per image, data.augment mixes two \(mixup, cutmix\)"
    ):
        StudentRun(recipe, Worker.from_env())


def test_windows_of_several_kinds_are_cached_verified_and_not_taken_for_others(tmp_path: Path) -> None:
    table = {"op": "multi-crop", "windows": [{"scale": [0.4, 1.0]}, {"scale": [0.1, 0.4], "count": 3}]}
    recipe = recipe_for(tmp_path, [table], teachers=1)
    run_cache(recipe)
    reader = CacheReader(tmp_path / "c.zarr")
    assert plan_of(reader) == plan_with([table], seed=recipe.seed, size=recipe.data.size, flip=0)
    assert run_verify(tmp_path / "c.zarr", full=True, replay=2)["ok"]
    table["windows"][1]["count"] = 2
    with pytest.raises(CacheMismatchError, match=r"plan"):
        run_cache(recipe_for(tmp_path, [table], teachers=1))


def test_a_plan_is_what_its_manifest_says() -> None:
    """Through JSON, whatever the crop; a plan without options of its own has the identity that it always had."""
    for augment in ("ssd", "deeplab", "expand-crop-flip", [{"op": "multi-crop"}], "resized-crop-flip"):
        plan = plan_with(augment, seed=1, size=32, flip=0.5)
        info = PlanInfo.model_validate_json(plan_info(plan).model_dump_json())
        assert info == plan_info(plan)
        reader: Any = SimpleNamespace(manifest=SimpleNamespace(plan=info))
        read = plan_of(reader)
        assert read == replace(plan, granule=read.granule, window=read.window)
        assert ("crop" in info.identity()) == (plan.crop is not None)
    other = plan_with([{"op": "expand-crop", "fill": [0, 0, 0]}], seed=1, size=32, flip=0.5)
    assert plan_info(other).identity() != plan_info(plan_with("expand-crop-flip", seed=1, size=32, flip=0)).identity()


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ssd"])  # that one needs boxes
def test_every_preset_is_cached_and_replayed(preset: str, tmp_path: Path) -> None:
    run_cache(recipe_for(tmp_path, preset, cache={"codec": "u8"}))
    result = run_verify(tmp_path / "c.zarr", full=True, replay=8)
    assert result["ok"]
    assert result["replayed"] == 8
