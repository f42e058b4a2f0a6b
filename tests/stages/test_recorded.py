"""Write-through: a recording student is the student of the finished cache, and the cache that of `feedfast cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import dense_recipe
from small import digits_recipe

from feedfast.cache.log import cache_digest
from feedfast.cache.reader import CacheReader
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker

METHODS: dict[str, dict[str, Any]] = {
    "kd": {"name": "kd"},
    "ofd": {"name": "ofd", "alpha": 1e-3},
    "pfeed": {"name": "pfeed", "beta": 500.0},
}
TRAIN = {"epochs": 3, "eval_every": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers, and caches of the same maps as f32 and u8, in batches of 24 rows; 200 rows to a view."""
    folder = tmp_path_factory.mktemp("recorded")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, codec, folder / f"{codec}.zarr"))
    return folder


def recipe_for(folder: Path, codec: str, path: Path, method: str = "kd", **train: Any) -> Recipe:
    # Neither 24 nor 32 divides the other, or a shard, or the 200 rows.
    cache = {"codec": codec, "path": str(path), "batch": 24}
    return digits_recipe(folder, cache=cache, method=METHODS[method], train={**TRAIN, **train})


def losses(recipe: Recipe) -> list[float]:
    run_train(recipe)
    return [row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "loss" in row]


def same_weights(one: Path, two: Path) -> bool:
    ours, theirs = (torch.load(path / "student.pt", weights_only=True) for path in (one, two))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("codec", ["f32", "u8"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_digest_are_those_of_a_finished_cache(world: Path, method: str, codec: str, tmp_path: Path) -> None:
    """Two views recorded, the third epoch reads the first again and mixes its rows: every loss to the last bit."""
    cached = losses(recipe_for(world, codec, world / f"{codec}.zarr", method, out=str(tmp_path / "c")))
    recording = recipe_for(world, codec, tmp_path / "r.zarr", method, source="record", out=str(tmp_path / "r"))
    assert losses(recording) == cached
    assert len(cached) == 18
    assert cache_digest(tmp_path / "r.zarr") == cache_digest(world / f"{codec}.zarr")
    assert CacheReader(tmp_path / "r.zarr").complete
    assert same_weights(tmp_path / "r", tmp_path / "c")
