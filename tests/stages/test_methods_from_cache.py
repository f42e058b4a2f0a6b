"""Every method as a whole job: it trains from a cache, computes the same with live teachers, its student is plain."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import as_toml, digits_recipe

from feedfast.methods import METHODS
from feedfast.models.build import build_model
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker

# Options and students that a tiny network and ten steps need; {} = the defaults.
WORDS: dict[str, dict[str, Any]] = {
    "kd": {},
    "ban": {},
    "ofd": {},
    "pfeed": {},
    "sfeed": {},
    "ft": {"paraphraser_epochs": 2, "paraphraser_lr": 0.02},
    "ekd": {},
    "locality": {},
    "fitnet": {"hint_share": 0.6},
    "at": {},
    "ab": {"first_share": 0.6},
    "vid": {},
    "cwd": {"beta": 50.0},
    "mgd": {"alpha": 1e-3},
    "reviewkd": {},
    "dkd": {},
    "dist": {},
    "camkd": {},
    "rkd": {},
    "sp": {},
    "pkt": {},
    "crd": {},
}
ONE_TEACHER = ("sfeed", "ban")
STUDENT = {"ekd": {"branches": 2}}
TAPS = '["final", "ofd+margin", "stage"]'


def test_every_method_is_here() -> None:
    assert set(WORDS) == set(METHODS) - {"none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers, and caches of the same maps as f32 and u8."""
    folder = tmp_path_factory.mktemp("methods")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, "kd", codec))
    return folder


def recipe_for(folder: Path, method: str, codec: str = "u8", **train: Any) -> Recipe:
    teachers = 1 if method in ONE_TEACHER else 2
    return digits_recipe(
        folder,
        tuple(f"teachers.{number}.taps={TAPS}" for number in range(teachers)),
        teachers=teachers,
        cache={"codec": codec, "path": str(folder / f"{codec}.zarr")},
        method={"name": method, **WORDS[method]},
        student=STUDENT.get(method, {}),
        train={"out": str(folder / "unused"), "eval_every": 0, **train},
    )


def rows_of(recipe: Recipe) -> list[dict[str, float]]:
    run_train(recipe)
    return [row for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("method", WORDS)
def test_f32_losses_are_those_of_live_teachers(world: Path, method: str, tmp_path: Path) -> None:
    """20 steps: two epochs in stored order, two of mixed passes."""
    train = {"epochs": 4, "max_steps": 20}
    cached = rows_of(recipe_for(world, method, "f32", source="cache", out=str(tmp_path / "c"), **train))
    live = rows_of(recipe_for(world, method, "f32", source="live", out=str(tmp_path / "l"), **train))
    assert len(live) == 20
    assert [row["loss"] for row in cached[:12]] == [row["loss"] for row in live[:12]]
    np.testing.assert_allclose([row["loss"] for row in cached], [row["loss"] for row in live], rtol=1e-6)


def first_step(recipe: Recipe) -> tuple[float, torch.Tensor]:
    run = StudentRun(recipe, Worker.from_env())
    run._prepare()
    batch = next(iter(run.loop.batches(0)))
    torch.manual_seed(3)  # masks and negatives are drawn from it, in a run seeded by the step
    loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, 0.5, batch.ids)["loss"]
    loss.backward()
    run.close()
    gradients = [p.grad.double().flatten() for p in run.trainer.trainee.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("method", WORDS)
def test_u8_loss_and_gradient(world: Path, method: str, tmp_path: Path) -> None:
    """A u8 cache changes the loss by less than 0.5 % and turns the gradient by less than acos(0.999)."""
    loss_u8, ours = first_step(recipe_for(world, method, "u8", source="cache", out=str(tmp_path / "c")))
    loss_live, theirs = first_step(recipe_for(world, method, "u8", source="live", out=str(tmp_path / "l")))
    assert abs(loss_u8 - loss_live) <= 0.005 * abs(loss_live)
    assert float(ours @ theirs / (ours.norm() * theirs.norm())) >= 0.999
    assert not torch.equal(ours, theirs), "codes were compared with themselves"


@pytest.mark.slow
@pytest.mark.parametrize("method", WORDS)
def test_a_method_lowers_its_own_terms_and_its_student_is_plain(world: Path, method: str, tmp_path: Path) -> None:
    """Eight epochs from the u8 cache: each term is lower at the end than at the beginning."""
    recipe = recipe_for(world, method, out=str(tmp_path / "o"), epochs=8, lr=0.01)
    rows = rows_of(recipe)
    kind = METHODS[method]
    terms = [name for name in rows[0] if name in _terms(kind, recipe)]
    assert terms
    for name in terms:
        first, last = (np.mean([row[name] for row in part if row[name]]) for part in (rows[:6], rows[-6:]))
        assert math.isfinite(last)
        assert last < first, name
    state = torch.load(tmp_path / "o" / ("branch.pt" if method in STUDENT else "student.pt"), weights_only=True)
    plain = build_model("zoo/wrn-10-1", num_classes=10)
    plain.load_state_dict(state)  # strict: exactly the plain network's tensors


def _terms(kind: Any, recipe: Recipe) -> set[str]:
    """Names of the terms the method weighs at any time of a run."""
    run = StudentRun(recipe, Worker.from_env())
    run.close()
    (method,) = run.trainer.methods
    return {name for progress in (0.0, 0.5, 0.99) for name in method.weights(progress)}  # type: ignore[operator]


def test_a_student_of_branches_is_saved_whole_and_as_its_best_branch(world: Path, tmp_path: Path) -> None:
    result = run_train(recipe_for(world, "ekd", out=str(tmp_path / "o"), epochs=3, eval_every=1))
    whole = torch.load(tmp_path / "o" / "student.pt", weights_only=True)
    best = torch.load(tmp_path / "o" / "branch.pt", weights_only=True)
    number = int(np.argmax(result["branch_accuracy"]))
    assert len(result["branch_accuracy"]) == 2
    assert torch.equal(best["fc.weight"], whole[f"branches.{number}.fc.weight"])
    assert torch.equal(best["conv1.weight"], whole["branches.0.conv1.weight"])


def test_ft_resumes_with_the_paraphraser_it_began_with(world: Path, tmp_path: Path) -> None:
    """Stopped after five steps and continued: the same weights as in one go, without training a paraphraser again."""
    run_train(recipe_for(world, "ft", out=str(tmp_path / "a"), epochs=2))
    run_train(recipe_for(world, "ft", out=str(tmp_path / "b"), epochs=2, max_steps=5))
    resumed = recipe_for(world, "ft", out=str(tmp_path / "b"), epochs=2)
    run_train(resumed)
    ours, theirs = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in "ab")
    assert set(ours["method"]) == set(theirs["method"])
    assert any(key.startswith("0.paraphrasers") for key in ours["method"])
    for part in ("student", "method"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in ours[part])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ft", "ekd"])
def test_two_ranks_learn_what_one_does(world: Path, method: str, tmp_path: Path) -> None:
    """What the first rank prepares reaches the other: the first loss is one process's, and both report one accuracy."""
    train = {"epochs": 1, "max_steps": 3, "threads": 1, "eval_every": 1}
    recipe = recipe_for(world, method, out=str(tmp_path / "ranks"), **train)
    done = run_ranks(["-m", "feedfast", "train", as_toml(recipe, tmp_path / "r.toml")])
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads(rank.stdout.splitlines()[-1]) for rank in done)
    assert first["val_accuracy"] == second["val_accuracy"]
    assert first.get("branch_accuracy") == second.get("branch_accuracy")
    alone = rows_of(recipe_for(world, method, out=str(tmp_path / "one"), **train))
    rows = [row for row in read_metrics(tmp_path / "ranks" / "metrics.jsonl") if "loss" in row]
    # each rank normalizes with its half of the batch and reports its half's loss
    assert rows[0]["loss"] == pytest.approx(alone[0]["loss"], rel=0.2)
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["method"] for name in ("ranks", "one")]
    prepared = [key for key in states[0] if "paraphraser" in key]
    assert bool(prepared) == (method == "ft")
    for key in prepared:
        torch.testing.assert_close(states[0][key], states[1][key])
