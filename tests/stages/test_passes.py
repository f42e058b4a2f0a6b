"""How later passes mix rows: derived from bytes once, kept in the cache, the same for a cached and for a live run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small import digits_recipe

from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker
from feedfast.storage.reader import CacheReader


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream may hold, shrunk as much as the digits' maps are smaller than real ones."""
    monkeypatch.setattr("feedfast.stages.pilot.MAX_BUFFER_BYTES", 4 * 20_000 * 40)


def recipe_for(folder: Path, source: str, **cache: object) -> Recipe:
    train = {"source": source, "out": str(folder / source), "epochs": 6, "eval_every": 0}
    return digits_recipe(folder, teachers=1, cache={"codec": "f32", **cache}, method={"name": "pfeed"}, train=train)


@pytest.mark.usefixtures("small_bound")
def test_cached_and_live_runs_mix_the_same_rows(tmp_path: Path) -> None:
    """In six epochs every view is walked three times; the later ones in an order that follows from the bytes."""
    run_cache(recipe_for(tmp_path, "cache"))
    plan = CacheReader(tmp_path / "digits.zarr").manifest.plan
    assert plan.granule * plan.window < 200, "else nothing here depends on the sizes"
    assert plan.granule < 64
    orders = {}
    for source in ("cache", "live"):
        run = StudentRun(recipe_for(tmp_path, source), Worker())
        assert (run.source.plan.granule, run.source.plan.window) == (plan.granule, plan.window)
        orders[source] = np.concatenate([batch.rows for batch in run.loop.batches(4 * 6)])
        run.close()
        run_train(recipe_for(tmp_path, source))
    assert np.array_equal(orders["cache"], orders["live"])
    assert not np.array_equal(orders["cache"], np.sort(orders["cache"]))
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / source / "metrics.jsonl") if "loss" in row]
        for source in ("cache", "live")
    ]
    assert len(losses[0]) == 36
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.usefixtures("small_bound")
def test_a_later_teacher_keeps_the_sizes(tmp_path: Path) -> None:
    """Its rows are wider together with the first one's; the blocks that are stored were made for the old granule."""
    run_cache(recipe_for(tmp_path, "cache"))
    before = CacheReader(tmp_path / "digits.zarr").manifest.plan
    two = digits_recipe(tmp_path, teachers=2, cache={"codec": "f32"})
    assert run_cache(two)["complete"]
    reader = CacheReader(tmp_path / "digits.zarr")
    assert reader.manifest.plan == before
    assert max(spec.block_rows for spec in reader.specs.values() if spec.sharded) == before.granule
