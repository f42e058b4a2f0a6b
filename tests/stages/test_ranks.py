"""Training on many processes: the same samples, the same losses, one evaluation, whatever the number of ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import as_toml, digits_recipe

from feedfast.data.loader import Loader
from feedfast.errors import RequestError
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker
from feedfast.storage.reader import CacheReader

HELPERS = Path(__file__).parents[1] / "helpers"
BATCH, STEPS = 32, 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_cache(digits_recipe(folder, teachers=1))
    return folder


def recipe_for(folder: Path, out: Path, **train: Any) -> Recipe:
    options = {"epochs": 2, "eval_every": 0, "threads": 1, "out": str(out), "batch": BATCH, **train}
    method = options.pop("method", {"name": "kd"})
    student = {"model": "networks:plain"}
    return digits_recipe(folder, teachers=1, method=method, student=student, train=options)


# ---- samples


@pytest.fixture
def run(world: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StudentRun]:
    """Of source "cache", or of what the test names."""
    source = getattr(request, "param", "cache")
    kind = {"method": {"name": "none"}} if source == "none" else {}
    made = StudentRun(
        recipe_for(world, tmp_path / "out", epochs=6, source=source, replay=0, residency="disk", **kind), Worker()
    )
    yield made
    made.close()


@pytest.mark.parametrize("step", [0, 6, 15], ids=["the first pass", "another view", "amid a later pass"])
def test_every_world_walks_the_same_samples(run: StudentRun, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Batch by batch the ranks' rows, one after the other, are those of one process, in its order."""

    def batches(view: int, rows: Any, size: int, start: int) -> Iterator[tuple[int, list[int]]]:
        """What a source is asked for: those are the rows it reads (see below)."""
        for number in range(start, len(rows) // size):
            yield view, rows[number * size : (number + 1) * size].tolist()

    monkeypatch.setattr(run.source, "batches", batches)

    def walk(rank: int, ranks: int) -> list[Any]:
        run.loop.worker = Worker(rank, ranks)
        return list(run.loop.batches(step))

    alone = walk(0, 1)
    assert len(alone) == 6 - step % 6
    for ranks in (2, 4, 8, 16, 32):
        shares = [walk(rank, ranks) for rank in range(ranks)]
        assert [
            (parts[0][0], [row for _, rows in parts for row in rows]) for parts in zip(*shares, strict=True)
        ] == alone
        assert all(len(rows) == BATCH // ranks for share in shares for _, rows in share)


@pytest.mark.parametrize("run", ["cache", "none"], indirect=True)
def test_a_rank_decodes_and_reads_its_own_rows_alone(run: StudentRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[type, list[int]] = {Loader: [], CacheReader: []}
    pixels, targets = Loader.stream, CacheReader.stream

    def decode(self: Loader, view: int, rows: Any, *more: Any, **options: Any) -> Any:
        asked[Loader] += np.asarray(rows).tolist()
        return pixels(self, view, rows, *more, **options)

    def fetch(self: CacheReader, arrays: Any, view: int, rows: Any, *more: Any, **options: Any) -> Any:
        asked[CacheReader] += np.asarray(rows).tolist()
        return targets(self, arrays, view, rows, *more, **options)

    everyone = [row for batch in run.loop.batches(0) for row in batch.rows.tolist()]
    monkeypatch.setattr(Loader, "stream", decode)
    monkeypatch.setattr(CacheReader, "stream", fetch)
    run.loop.worker = Worker(2, 4)
    got = [row for batch in run.loop.batches(0) for row in batch.rows.tolist()]
    assert got == [row for place, row in enumerate(everyone) if place % BATCH // 8 == 2]
    for kind, rows in asked.items():
        assert rows == (got if kind is Loader or run.recipe.train.source == "cache" else [])


def test_a_world_that_does_not_divide_the_batch_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^train\.batch: expected a multiple of the 3 ranks, found 32$"):
        StudentRun(recipe_for(world, tmp_path / "out"), Worker(0, 3))
    assert not (tmp_path / "out").exists()


# ---- losses


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def weights(out: Path) -> torch.Tensor:
    state = torch.load(out / "student.pt", weights_only=True)
    return torch.cat([value.reshape(-1) for value in state.values()])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_of_one_two_and_four_processes_and_of_a_run_that_changes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal within the order of summation.

    A mean over 32 images is a mean of means: the same numbers in float32, added in another order. Each step may so
    differ by some units in the last place (6e-8), and 12 steps of SGD with a learning rate of 0.02 amplify that by
    little: 1e-5 is a hundredfold of it, and thousands of times less than what a wrong sample does (tested below).
    """
    monkeypatch.setattr(sys, "path", [str(HELPERS), *sys.path])

    def files(*outs: str, **train: Any) -> list[Path]:
        return [as_toml(recipe_for(world, tmp_path / out, **train), tmp_path / f"{out}.toml") for out in outs]

    alone = run_train(recipe_for(world, tmp_path / "one"))
    assert alone["steps"] == STEPS
    for ranks, out, stop in ((4, "four", 3), (2, "two", 7)):
        asked = [*files(out), *files("changes", max_steps=stop)]
        done = run_ranks([HELPERS / "train_all.py", *asked], ranks, timeout=600)
        assert [job.returncode for job in done] == [0] * ranks, done[0].stderr + done[-1].stderr
    assert run_train(recipe_for(world, tmp_path / "changes"))["steps"] == STEPS
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    for out in ("two", "four", "changes"):
        assert losses(tmp_path / out) == pytest.approx(expected, rel=1e-5), out
        assert torch.allclose(weights(tmp_path / out), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6), out
        result = json.loads((tmp_path / out / "result.json").read_text())
        assert result["val_accuracy"] == pytest.approx(alone["val_accuracy"], abs=0.005), out
    # what one other sample in a batch would do
    run_train(recipe_for(world, tmp_path / "other", batch=BATCH - 1, epochs=2, max_steps=STEPS))
    assert losses(tmp_path / "other")[0] != pytest.approx(expected[0], rel=1e-4)


# ---- evaluation


def test_more_ranks_than_validation_images(world: Path, tmp_path: Path) -> None:
    """A rank without a share of them has nothing to show, and nothing to fail on."""
    run = StudentRun(recipe_for(world, tmp_path / "out"), Worker())
    assert run.val is not None
    assert list(run.val.evaluation(np.arange(0))) == []
    metric = run.task.metric()
    metric.merge([run.task.metric().state()])
    run.close()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_learn_what_one_learns(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(HELPERS), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    run_train(recipe_for(world, tmp_path / "one", device="cuda"))
    file = as_toml(recipe_for(world, tmp_path / "two", device="auto"), tmp_path / "two.toml")
    done = run_ranks(["-m", "feedfast", "train", file])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr
    # TF32 is off by default for matrix products; convolutions may choose another algorithm for another batch
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
