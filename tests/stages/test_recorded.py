"""Write-through: a recording student is the student of the finished cache, and the cache that of `feedfast cache`."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import dense_recipe
from small import as_toml, digits_recipe

from feedfast.data import loader
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker
from feedfast.storage import names
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader
from feedfast.storage.writer import CacheWriter

METHODS: dict[str, dict[str, Any]] = {
    "kd": {"name": "kd"},
    "ofd": {"name": "ofd", "alpha": 1e-3},
    "pfeed": {"name": "pfeed", "beta": 500.0},
}
TRAIN = {"epochs": 3, "eval_every": 0, "threads": 1}  # a job in a process of its own sums as this one does


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, two teachers, and a cache of their maps as u8, in batches of 24 rows; 200 rows per view."""
    folder = tmp_path_factory.mktemp("recorded")
    run_cache(recipe_for(folder, "u8", folder / "u8.zarr"))
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


@pytest.mark.parametrize(
    ("method", "codec"),
    [
        ("ofd", "u8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("kd", "f32"), ("ofd", "f32"), ("pfeed", "f32"), ("kd", "u8"), ("pfeed", "u8"))
        ),
    ],
)
def test_losses_and_digest_are_those_of_a_finished_cache(world: Path, method: str, codec: str, tmp_path: Path) -> None:
    """Two views recorded, the third epoch reads the first again and mixes its rows: every loss to the last bit."""
    if not (world / f"{codec}.zarr").exists():
        run_cache(recipe_for(world, codec, world / f"{codec}.zarr"))
    cached = losses(recipe_for(world, codec, world / f"{codec}.zarr", method, out=str(tmp_path / "c")))
    recording = recipe_for(world, codec, tmp_path / "r.zarr", method, source="record", out=str(tmp_path / "r"))
    assert losses(recording) == cached
    assert len(cached) == 18
    assert cache_digest(tmp_path / "r.zarr") == cache_digest(world / f"{codec}.zarr")
    assert CacheReader(tmp_path / "r.zarr").complete
    assert same_weights(tmp_path / "r", tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_with_equal_batches_and_stored_pixels(tmp_path: Path, bn: str) -> None:
    """A cut is then a batch as it is; statistics of a batch are those of the cache's own, its short last one too."""
    words = {"teachers": 1, "overrides": (f"teachers.0.bn={bn}", "cache.images=stored", "cache.codec=u4")}
    asked = {
        source: digits_recipe(
            tmp_path,
            cache={"path": str(tmp_path / f"{source}.zarr")},
            train={**TRAIN, "epochs": 2, "source": source, "out": str(tmp_path / source)},
            **words,
        )
        for source in ("cache", "record")
    }
    expected = run_cache(asked["cache"])["digest"]
    assert losses(asked["record"]) == losses(asked["cache"])
    assert cache_digest(tmp_path / "record.zarr") == expected


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_tasks(task: str, tmp_path: Path) -> None:
    """Masks and boxes follow when batches are cut anew."""
    cached, recorded = (
        dense_recipe(
            tmp_path,
            task,
            cache={"path": str(tmp_path / f"{source}.zarr"), "batch": 6},
            train={"source": source, "out": str(tmp_path / source), "epochs": 2, "eval_every": 0},
        )
        for source in ("cache", "record")
    )
    expected = run_cache(cached)["digest"]
    assert losses(recorded) == losses(cached)
    assert cache_digest(tmp_path / "record.zarr") == expected


@pytest.mark.slow
def test_what_a_method_learns_before_the_first_step_is_recorded_first(tmp_path: Path) -> None:
    """The paraphrasers of factor transfer read an epoch of targets; then the student reads what has become of it."""
    asked = {
        source: digits_recipe(
            tmp_path,
            teachers=1,
            cache={"path": str(tmp_path / f"{source}.zarr"), "batch": 24},
            method={"name": "ft", "paraphraser_epochs": 1},
            train={**TRAIN, "epochs": 2, "source": source, "out": str(tmp_path / source)},
        )
        for source in ("cache", "record")
    }
    expected = run_cache(asked["cache"])["digest"]
    assert losses(asked["record"]) == losses(asked["cache"])
    assert cache_digest(tmp_path / "record.zarr") == expected


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """The folder of an uninterrupted recording run of 18 steps."""
    run_train(recipe_for(world, "u8", world / "whole.zarr", source="record", out=str(world / "whole")))
    return world / "whole"


def _lose(path: Path, share: float) -> None:
    """Delete some of the stored objects of codes and checksums, the rest stay."""
    found = sorted(file for array in ("targets", "pixels") for file in (path / array).rglob("c/**/*") if file.is_file())
    found = [file for file in found if "scale" not in file.parts]
    for file in np.random.default_rng(3).permutation(found)[: int(share * len(found))].tolist():
        file.unlink()


@pytest.mark.parametrize(
    ("cache", "stop"),
    [
        ("with holes", 9),
        *(
            pytest.param(cache, stop, marks=pytest.mark.slow)
            for cache in ("as it was left", "with holes", "gone", "finished")
            for stop in (2, 9)
            if (cache, stop) != ("with holes", 9)
        ),
    ],
)
def test_checkpoint_and_cache_need_not_agree(world: Path, whole: Path, cache: str, stop: int, tmp_path: Path) -> None:
    """Stopped in either view, and the cache as it is, behind or ahead: same weights, same digest."""
    path, out = tmp_path / "r.zarr", tmp_path / "out"
    stopped = run_train(recipe_for(world, "u8", path, source="record", out=str(out), max_steps=stop))
    left = CacheReader(path)
    assert not left.complete
    assert left.committed(names.codes("a", "ofd1"), stop // 6), "an epoch left halfway keeps the shards that are full"
    assert stopped["views_complete"] == stop // 6
    assert (not left.missing(views=[0])) == (stop > 6)
    if cache == "with holes":
        _lose(path, 0.4)
    elif cache == "gone":
        shutil.rmtree(path)
    elif cache == "finished":
        run_cache(recipe_for(world, "u8", path))
    assert run_train(recipe_for(world, "u8", path, source="record", out=str(out)))["views_complete"] == 2
    assert same_weights(out, whole)
    assert cache_digest(path) == cache_digest(world / "u8.zarr")
    assert run_verify(str(path), full=True)["ok"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Teacher and number of images of every forward pass."""
    found: list[tuple[str, int]] = []
    forward = FrozenTeacher.__call__

    def counted(teacher: FrozenTeacher, images: torch.Tensor, *, widen: bool = True) -> dict[str, torch.Tensor]:
        found.append((teacher.name, len(images)))
        return forward(teacher, images, widen=widen)

    monkeypatch.setattr(FrozenTeacher, "__call__", counted)
    return found


@pytest.mark.slow
def test_rows_of_no_epoch_then_an_epoch_half_read(tmp_path: Path, seen: list[tuple[str, int]]) -> None:
    """All 1,438 digits, more than the largest shard holds. Any rows may be asked for, as for a report's pictures: what
    their shards need is recorded. The epoch after that reads those shards and runs the teacher for the rest."""

    def asked(source: str) -> Recipe:
        cache = {"path": str(tmp_path / f"{source}.zarr"), "batch": 24, "views": 1}
        train = {**TRAIN, "epochs": 1, "source": source, "out": str(tmp_path / source)}
        return digits_recipe(tmp_path, teachers=1, data={"limit": 0}, cache=cache, train=train, method=METHODS["kd"])

    expected = run_cache(asked("cache"))["digest"]
    rows, found = np.array([97, 5, 98]), []
    for source in ("cache", "record"):
        run = StudentRun(asked(source), Worker.from_env())
        seen.clear()  # of the preparation: probe and pilot
        found.append(next(iter(run.source.batches(0, rows, 3))))
        run.close()
    assert sum(count for _, count in seen) == 1032  # cuts of 24 that touch the first 1,024 rows
    assert torch.equal(found[0].images, found[1].images)
    assert torch.equal(found[0].targets["a"]["logits"], found[1].targets["a"]["logits"])
    reader, array = CacheReader(tmp_path / "record.zarr"), names.codes("a", "ofd1")
    assert len(reader.committed(array)) == 1024 // reader.specs[array].shard_rows < reader.specs[array].num_shards
    run = StudentRun(asked("record"), Worker.from_env())
    seen.clear()
    run.run()
    assert sum(count for _, count in seen) == 1438 - 1008  # the cut of row 1,024 begins at 1,008
    run_train(asked("cache"))
    assert same_weights(tmp_path / "record", tmp_path / "cache")
    assert cache_digest(tmp_path / "record.zarr") == expected


@pytest.mark.slow
def test_only_what_is_missing_is_run(world: Path, tmp_path: Path, seen: list[tuple[str, int]]) -> None:
    """Teacher a is cached: its maps are read while b's are recorded. A second student runs neither."""
    path = tmp_path / "r.zarr"
    alone = {"path": str(path), "batch": 24}
    run_cache(digits_recipe(world, teachers=1, cache=alone, method=METHODS["kd"]))
    run = StudentRun(
        recipe_for(world, "u8", path, source="record", out=str(tmp_path / "one"), epochs=2), Worker.from_env()
    )
    seen.clear()  # of the preparation: probes and pilot
    run.run()
    assert {name for name, _ in seen} == {"b"}
    assert sum(count for _, count in seen) == 400
    assert cache_digest(path) == cache_digest(world / "u8.zarr")
    second = StudentRun(
        recipe_for(world, "u8", path, "ofd", source="record", out=str(tmp_path / "two"), epochs=2), Worker.from_env()
    )
    seen.clear()
    second.run()
    assert seen == []
    expected = recipe_for(world, "u8", world / "u8.zarr", "ofd", out=str(tmp_path / "three"), epochs=2)
    run_train(expected)
    assert same_weights(tmp_path / "two", tmp_path / "three")


def test_what_cannot_be_recorded_is_refused(world: Path, tmp_path: Path) -> None:
    """One sentence each, before anything is written."""
    path, out = tmp_path / "r.zarr", tmp_path / "out"

    def ask(*overrides: str, method: dict[str, Any] = METHODS["kd"], **sections: Any) -> None:
        words = {"train": {**TRAIN, "source": "record", "out": str(out)}, "cache": {"path": str(path), "batch": 24}}
        run_train(digits_recipe(world, overrides, **{**words, "method": method, **sections}))

    for override, words in {
        "cache.path=": r"cache\.path: required with train\.source='record'",
        "cache.views=0": r"cache\.views: expected at least 1",
        "cache.part=1/2": r"cache\.part: expected 0/1",
    }.items():
        with pytest.raises(RequestError, match=words):
            ask(override)
    with pytest.raises(RequestError, match="teachers: expected at least one"):
        ask("teachers=[]", method={"name": "none"})
    with pytest.raises(RequestError, match=r"'ofd'.*found \['final', 'logits'\]"):
        ask('teachers.0.taps=["final"]', method=METHODS["ofd"])
    with pytest.raises(RequestError, match=r"method\.factors.*found 'record'"):
        ask(method={"name": "ft", "factors": "stored"})
    assert not path.exists()
    assert not list(out.glob("*"))
    other = {"cache": {"path": str(world / "u8.zarr"), "batch": 24}}
    with pytest.raises(CacheMismatchError, match=r"plan\.seed"):
        ask("seed=5", **other)
    with pytest.raises(CacheMismatchError, match="codec"):
        ask("cache.codec=u4", **other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(RequestError, match=r"thesis\.txt"):
        ask(f"cache.path={tmp_path / 'mine'}")


@pytest.mark.slow
def test_killed_at_random_moments_both_go_on(world: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL at eight random moments of both views, each time the same command again."""
    recipe = recipe_for(
        world, "u8", tmp_path / "r.zarr", source="record", out=str(tmp_path / "out"), checkpoint_minutes=1e-9
    )
    file, rng, killed = as_toml(recipe, tmp_path / "r.toml"), random.Random(5), 0
    seen = []
    for attempt in range(40):
        if killed == 8:
            break
        job = subprocess.Popen(
            [sys.executable, "-m", "feedfast", "train", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        watched = (
            tmp_path / "r.zarr" / "commits" / "part-0-of-1.jsonl" if attempt % 2 else tmp_path / "out" / "metrics.jsonl"
        )
        size = watched.stat().st_size if watched.exists() else 0
        while job.poll() is None and (not watched.exists() or watched.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
        rows = read_metrics(tmp_path / "out" / "metrics.jsonl") if (tmp_path / "out" / "metrics.jsonl").exists() else []
        seen.append((len(rows), job.returncode))
        if job.returncode == 0:
            break
    assert killed >= 2, f"the job ended before it could be killed: {seen}"
    run_train(recipe)
    assert same_weights(tmp_path / "out", whole)
    assert cache_digest(tmp_path / "r.zarr") == cache_digest(world / "u8.zarr")
    assert run_verify(str(tmp_path / "r.zarr"), full=True)["ok"]


@pytest.mark.parametrize("source", ["cache", "record"])
def test_other_pixels_than_the_teachers_saw_are_refused(
    world: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that has changed since: also where a recording student only reads what another job has recorded."""
    real = loader._owned

    def changed(*given: Any) -> torch.Tensor:
        images = real(*given)
        images[8:] = 255 - images[8:]  # not the rows that probes look at
        return images

    path = tmp_path / "cache.zarr"
    shutil.copytree(world / "u8.zarr", path)
    monkeypatch.setattr(loader, "_owned", changed)
    with pytest.raises(CacheMismatchError, match="pixels are not those"):
        run_train(recipe_for(world, "u8", path, source=source, out=str(tmp_path / "s"), replay=4))


@pytest.mark.parametrize("job", ["cache", "record"])
def test_a_lost_file_of_checksums_is_written_again(world: Path, job: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.zarr"
    shutil.copytree(world / "u8.zarr", path)
    next(file for file in (path / "pixels" / "sums" / "c").rglob("*") if file.is_file()).unlink()
    asked = recipe_for(world, "u8", path, source="record", out=str(tmp_path / "s"))
    run_cache(asked) if job == "cache" else run_train(asked)
    assert cache_digest(path) == cache_digest(world / "u8.zarr")


@pytest.mark.slow
def test_a_student_waits_for_another_that_records(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else writes when its second epoch begins; it goes on when they have ended."""
    asked = recipe_for(world, "u8", tmp_path / "cache.zarr", source="record", out=str(tmp_path / "s"), epochs=2)
    real, taken = StudentRun._evaluate_if_due, []

    def take(run: StudentRun, *given: Any) -> Any:
        if not taken:
            writer = CacheWriter(tmp_path / "cache.zarr", CacheReader(tmp_path / "cache.zarr").manifest)
            taken.append(threading.Timer(1.5, writer.close))
            taken[0].start()
        return real(run, *given)

    monkeypatch.setattr(StudentRun, "_evaluate_if_due", take)
    assert run_train(asked)["views_complete"] == 2
    assert run_cache(asked)["rows_written"] == 0
