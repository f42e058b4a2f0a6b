"""Methods that compare maps stage by stage, as jobs: both phases from codes, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits_recipe

from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "fitnet": {"hint_share": 0.6},
    "at": {},
    "ab": {"first_share": 0.6},
    "vid": {},
    "cwd": {"beta": 50.0},
    "mgd": {"alpha": 1e-3},
    "reviewkd": {},
}
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers with every group of taps, and caches of the same maps as f32 and u8."""
    folder = tmp_path_factory.mktemp("hints")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, codec, "at"))
    return folder


def recipe_for(folder: Path, codec: str, method: str, **train: Any) -> Recipe:
    overrides = tuple(f'teachers.{n}.taps=["final","stage","ofd+margin"]' for n in (0, 1))
    return digits_recipe(
        folder,
        overrides,
        cache={"codec": codec, "path": str(folder / f"{codec}.zarr")},
        method={"name": method, **METHODS[method]},
        train={"epochs": 4, "max_steps": STEPS, "eval_every": 0, **train},
    )


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    run_train(recipe)
    return [row for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_u8_loss_and_gradient(world: Path, method: str, tmp_path: Path) -> None:
    """In either phase u8 codes change the loss by less than 0.5 % and turn the gradient by less than acos(0.999)."""
    found = {}
    for source in ("cache", "live"):
        run = StudentRun(recipe_for(world, "u8", method, source=source, out=str(tmp_path / source)), Worker.from_env())
        batch = next(iter(run.loop.batches(0)))
        for progress in (0.1, 0.9):
            torch.manual_seed(3)
            run.trainer.trainee.zero_grad()
            loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, progress)["loss"]
            loss.backward()
            grads = [p.grad.double().flatten() for p in run.trainer.trainee.parameters() if p.grad is not None]
            found[source, progress] = float(loss.detach()), torch.cat(grads)
        run.close()
    for progress in (0.1, 0.9):
        (loss_u8, ours), (loss_live, theirs) = found["cache", progress], found["live", progress]
        assert abs(loss_u8 - loss_live) <= 0.005 * abs(loss_live)
        assert float(ours @ theirs / (ours.norm() * theirs.norm())) >= 0.999


@pytest.mark.parametrize(("method", "stop"), [("mgd", 7), ("fitnet", 13), ("reviewkd", 1)])
def test_a_resumed_run_draws_the_masks_and_keeps_the_phase(world: Path, method: str, stop: int, tmp_path: Path) -> None:
    rows = rows_of(recipe_for(world, "f32", method, max_steps=0, out=str(tmp_path / "whole")))
    parts = recipe_for(world, "f32", method, max_steps=stop, out=str(tmp_path / "parts"))
    assert run_train(parts)["steps"] == stop
    resumed = rows_of(recipe_for(world, "f32", method, max_steps=0, out=str(tmp_path / "parts")))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    states = [torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
