"""Training from the cache is training with the teachers: losses and gradients of the two sources compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import digits_recipe

from feedfast.models.build import build_model
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker
from feedfast.storage.reader import CacheReader

METHODS: dict[str, dict[str, Any]] = {
    "kd": {"name": "kd"},
    "ofd": {"name": "ofd", "alpha": 1e-3},
    "pfeed": {"name": "pfeed", "beta": 500.0},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers, and caches of the same maps as f32 and u8."""
    folder = tmp_path_factory.mktemp("parity")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, codec, "kd"))
    return folder


def recipe_for(folder: Path, codec: str, method: str, **train: Any) -> Recipe:
    return digits_recipe(
        folder, cache={"codec": codec, "path": str(folder / f"{codec}.zarr")}, method=METHODS[method], train=train
    )


def losses(recipe: Recipe) -> list[float]:
    run_train(recipe)
    return [row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_f32_losses_are_those_of_live_teachers(world: Path, method: str, steps: int, tmp_path: Path) -> None:
    """Two views of six batches: the later epochs read mixed, permuted blocks, the first two the stored order."""
    epochs = 17  # 6 steps each
    train = {"epochs": epochs, "max_steps": steps, "eval_every": 0}
    cached = losses(recipe_for(world, "f32", method, source="cache", out=str(tmp_path / "c"), **train))
    live = losses(recipe_for(world, "f32", method, source="live", out=str(tmp_path / "l"), **train))
    assert len(live) == steps
    # The stored order (two epochs of 6 steps) has the batches the teachers saw: every bit is the same.
    assert cached[:12] == live[:12]
    # In later passes a live teacher sees samples in other batches than the cache's; a convolution may then differ in
    # its last bit.
    np.testing.assert_allclose(cached, live, rtol=1e-6)


def _first_step(recipe: Recipe) -> tuple[float, list[torch.Tensor]]:
    run = StudentRun(recipe, Worker.from_env())
    batch = next(iter(run.loop.batches(0)))
    loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, 0.0)["loss"]
    loss.backward()
    run.close()
    gradients = [parameter.grad for parameter in run.trainer.trainee.parameters() if parameter.grad is not None]
    return float(loss.detach()), gradients


@pytest.mark.parametrize("method", METHODS)
def test_u8_loss_and_gradient(world: Path, method: str, tmp_path: Path) -> None:
    """A u8 cache changes the loss by less than 0.5 % and turns the gradient by less than acos(0.999)."""
    loss_u8, grads_u8 = _first_step(recipe_for(world, "u8", method, source="cache", out=str(tmp_path / "c")))
    loss_live, grads_live = _first_step(recipe_for(world, "u8", method, source="live", out=str(tmp_path / "l")))
    assert abs(loss_u8 - loss_live) <= 0.005 * abs(loss_live)
    ours, theirs = (torch.cat([grad.double().flatten() for grad in grads]) for grads in (grads_u8, grads_live))
    cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
    assert cosine >= 0.999
    assert not torch.equal(ours, theirs), "codes were compared with themselves"


def test_u8_error_is_small_and_reported(world: Path) -> None:
    """Relative RMS error of all taps and sign flips of pre-activation taps are in the manifest and match a recount."""
    manifest = CacheReader(world / "u8.zarr").manifest
    exact, coded = CacheReader(world / "f32.zarr"), CacheReader(world / "u8.zarr")
    rows = np.arange(100)
    for teacher, info in manifest.teachers.items():
        for tap, entry in info.taps.items():
            array = f"targets/{teacher}/{tap}/codes"
            offset, step = coded.scale(teacher, tap)
            want = exact.read_rows(array, 1, rows).astype(np.float64)
            found = coded.read_rows(array, 1, rows).astype(np.float64) * step + offset
            error = np.sqrt(((found - want) ** 2).sum() / (want**2).sum())
            assert error <= 0.01, (tap, error)
            if tap == "logits":  # stored as they are, in half precision; nothing is fitted
                assert 0 < error < 2**-11
                continue
            assert entry.error["relative_rms_error"] == pytest.approx(error, rel=0.2)
            if entry.position == "pre":
                assert entry.transform == "margin"
                flips = ((want > 0) != (found > 0)).mean()
                assert entry.error["mask_flip_rate"] == pytest.approx(flips, rel=0.5, abs=1e-3)
            else:
                assert "mask_flip_rate" not in entry.error


def test_none_is_plain_training_of_the_same_student(world: Path, tmp_path: Path) -> None:
    """With weight 0 on the teachers, KD from the cache is plain training: same data, same start, same steps."""
    plain = losses(digits_recipe(world, method={"name": "none"}, train={"source": "none", "out": str(tmp_path / "p")}))
    cache = {"codec": "f32", "path": str(world / "f32.zarr")}
    method = {"name": "kd", "alpha": 0.0}
    zero = losses(digits_recipe(world, cache=cache, method=method, train={"out": str(tmp_path / "z")}))
    assert plain == zero


def test_the_saved_student_carries_no_adapters(world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(world, "u8", "ofd", out=str(tmp_path / "o"), max_steps=2)
    result = run_train(recipe)
    state = torch.load(tmp_path / "o" / "student.pt", weights_only=True)
    bare = build_model("zoo/wrn-10-1", num_classes=10, weights=None)
    assert set(state) == set(bare.state_dict())
    assert result["parameters"] == sum(parameter.numel() for parameter in bare.parameters())
    assert json.loads((tmp_path / "o" / "result.json").read_text())["steps"] == 2
