"""The offline stage as a job: kills, resumes, parts, extensions, refusals. Digits and small real teachers."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import as_toml, digits_recipe, write_teacher

from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.stages.ensemble import teacher_from_recipe
from feedfast.stages.offline import run_cache
from feedfast.stages.open_cache import open_cache
from feedfast.stages.proof import plan_of, stored_values
from feedfast.stages.student import run_train
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader

KILLS = 10


def objects(path: Path) -> dict[str, tuple[str, int]]:
    """Every stored object: content hash and modification time."""
    return {
        str(file.relative_to(path)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if "c" in file.relative_to(path).parts and file.is_file()
    }


def test_stored_maps_are_those_of_the_teachers_on_those_pixels(tmp_path: Path) -> None:
    """Rows of an f32 cache equal a live forward of the same batch, bit for bit, for every view, teacher and tap."""
    recipe = digits_recipe(tmp_path, cache={"codec": "f32"})
    result = run_cache(recipe)
    assert (result["rows_written"], result["rows_resumed"], result["complete"]) == (400, 0, True)
    reader = CacheReader(recipe.cache.path)
    data = open_dataset(recipe.data.train, limit=recipe.data.limit)
    loader = Loader(data, plan_of(reader), batch_size=32)
    for spec in recipe.teachers:
        teacher = teacher_from_recipe(spec, recipe.data, (), classes=10, seed=0, device=torch.device("cpu"))
        for view in range(2):
            for batch in loader.stream(view, np.arange(len(data))):
                assert np.array_equal(batch.ids, reader.read_array("views/order", view)[batch.rows])
                for tap, values in teacher(batch.images).items():
                    if tap.startswith("ofd"):
                        values = torch.maximum(values, teacher.margins[tap].view(1, -1, 1, 1))
                    stored = stored_values(reader, spec.name, tap, view, batch.rows)
                    assert torch.equal(values, stored), (spec.name, tap)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_digest(tmp_path: Path) -> None:
    """SIGKILL at ten random moments, each time the same command again: digest and bytes equal an uninterrupted run."""
    whole = digits_recipe(
        tmp_path, cache={"path": str(tmp_path / "whole.zarr"), "shard_mb": 0.02, "views": 6}, train={"threads": 1}
    )
    began = time.monotonic()
    expected = run_cache(whole)
    seconds = time.monotonic() - began
    torn = digits_recipe(
        tmp_path, cache={"path": str(tmp_path / "torn.zarr"), "shard_mb": 0.02, "views": 6}, train={"threads": 1}
    )
    file = as_toml(torn, tmp_path / "torn.toml")
    rng = random.Random(7)
    killed, committed = 0, []
    for _ in range(60):
        if killed == KILLS:
            break
        job = subprocess.Popen(
            [sys.executable, "-m", "feedfast", "cache", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = tmp_path / "torn.zarr" / "commits" / "part-0-of-1.jsonl"
        size = log.stat().st_size if log.exists() else 0
        wanted = rng.random()
        # Wait until this attempt has committed something (or, sometimes, has not yet), then a random moment more.
        while job.poll() is None and wanted > 0.2 and (not log.exists() or log.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(rng.random() * seconds / 40)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
        committed.append(len(log.read_bytes().splitlines()) if log.exists() else 0)
    assert killed == KILLS, f"the job finished before it could be killed {KILLS} times: {committed}"
    result = run_cache(torn)
    assert result["digest"] == expected["digest"] == cache_digest(torn.cache.path)
    assert result["complete"]
    ours, theirs = (objects(Path(recipe.cache.path)) for recipe in (torn, whole))
    assert {name: entry[0] for name, entry in ours.items()} == {name: entry[0] for name, entry in theirs.items()}
    assert not list((tmp_path / "torn.zarr").rglob(".tmp-*"))
    assert run_verify(torn.cache.path, full=True)["ok"]


def test_a_second_teacher_tap_and_view_leave_what_is_there_untouched(tmp_path: Path) -> None:
    small = digits_recipe(tmp_path, teachers=1, cache={"views": 1}, overrides=('teachers.0.taps=["final"]',))
    run_cache(small)
    before = objects(Path(small.cache.path))
    result = run_cache(digits_recipe(tmp_path, cache={"views": 2}))
    after = objects(Path(small.cache.path))
    assert {name: after[name] for name in before} == before
    assert result["complete"]
    assert len(after) > 3 * len(before)
    # and the result is that of one job with everything in it
    whole = digits_recipe(tmp_path, cache={"views": 2, "path": str(tmp_path / "whole.zarr")})
    assert run_cache(whole)["digest"] == result["digest"]
    again = run_cache(digits_recipe(tmp_path, cache={"views": 2}))
    assert (again["rows_written"], again["rows_resumed"], again["bytes_written"]) == (0, 400, 0)


@pytest.mark.slow
def test_two_parts_at_once_make_the_cache_of_one(tmp_path: Path) -> None:
    whole = digits_recipe(tmp_path, cache={"path": str(tmp_path / "whole.zarr")}, train={"threads": 1})
    expected = run_cache(whole)["digest"]
    files = [
        as_toml(digits_recipe(tmp_path, cache={"part": f"{part}/2"}, train={"threads": 1}), tmp_path / f"{part}.toml")
        for part in (0, 1)
    ]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "feedfast", "cache", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for file in files
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=240)
        assert job.returncode == 0, errors
    reader = CacheReader(tmp_path / "digits.zarr")
    assert not reader.missing()
    assert reader.digest() == expected
    assert len(list((tmp_path / "digits.zarr" / "commits").glob("part-*-of-2.jsonl"))) == 2


def test_odd_batches_and_the_last_short_one(tmp_path: Path) -> None:
    """Batches that fit neither blocks nor shards nor the data give a complete cache whose pixels replay."""
    recipe = digits_recipe(tmp_path, teachers=1, cache={"batch": 23, "images": "stored"})
    assert run_cache(recipe)["complete"]
    checked = run_verify(recipe.cache.path, full=True, replay=8)
    assert checked["ok"], checked["problems"]
    assert checked["replayed"] == 8


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_teachers_recomputed(tmp_path: Path, bn: str) -> None:
    recipe = digits_recipe(tmp_path, teachers=1, overrides=(f"teachers.0.bn={bn}",))
    run_cache(recipe)
    checked = run_verify(recipe.cache.path, teachers_percent=50, recipe=recipe)
    assert checked["ok"], checked["problems"]
    assert set(checked["cosine"]) == {f"targets/a/{tap}/codes" for tap in ("final", "ofd1", "ofd2", "ofd3", "logits")}
    assert min(checked["cosine"].values()) > 0.9995


def test_batch_statistics_make_other_maps(tmp_path: Path) -> None:
    """``bn = "batch"`` is another teacher: its maps differ, and its running averages are not touched by caching."""
    spec = digits_recipe(tmp_path, teachers=1)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (32, 16, 16, 3), dtype=np.uint8))
    plain, batch = (
        teacher_from_recipe(
            spec.teachers[0].model_copy(update={"bn": bn}),
            spec.data,
            (),
            classes=10,
            seed=0,
            device=torch.device("cpu"),
        )
        for bn in ("eval", "batch")
    )
    assert plain.weights_sha256 == batch.weights_sha256
    first = batch(images)["final"]
    assert not torch.allclose(plain(images)["final"], first, rtol=1e-2)
    assert torch.equal(batch(images)["final"], first)


def test_refusals_name_what_differs(tmp_path: Path) -> None:
    recipe = digits_recipe(tmp_path, teachers=1)
    run_cache(recipe)
    for override, words in {
        "seed=5": ["plan.seed", "5", "0"],
        "data.limit=10": ["dataset", "count"],
        "data.fraction=0.5": ["dataset", "count", "100", "200"],
        "data.augment=none": ["plan.augment"],
        "cache.batch=16": ["batch_rows", "16", "32"],
        "teachers.0.bn=batch": ["teachers.a.bn"],
        "cache.codec=u4": ["final", "codec", "u4", "u8"],
    }.items():
        with pytest.raises(CacheMismatchError) as caught:
            run_cache(digits_recipe(tmp_path, teachers=1, overrides=(override,)))
        for word in words:
            assert word in str(caught.value), (override, str(caught.value))
    write_teacher(tmp_path / "a.pt", seed=99)
    with pytest.raises(CacheMismatchError, match="weights_sha256"):
        run_cache(recipe)


def test_a_cache_of_a_fraction_is_verified_opened_and_trained_from_as_such(tmp_path: Path) -> None:
    """Everything that opens the images again takes the fraction from the manifest, or refuses another one."""
    recipe = digits_recipe(tmp_path, teachers=1, data={"fraction": 0.5}, train={"epochs": 1})
    assert run_cache(recipe)["rows_written"] == 200
    taken = open_dataset(recipe.data.train, limit=20, fraction=0.5)
    assert np.bincount(taken.labels).tolist() == [10] * 10
    reader = CacheReader(recipe.cache.path)
    assert sorted(reader.read_array("views/order", 0).tolist()) == taken.ids.tolist()
    for given in (None, recipe):
        result = run_verify(recipe.cache.path, recipe=given, replay=2)
        assert result["ok"]
        assert result["replayed"] > 0
    rows = [ids for batch in open_cache(recipe.cache.path).stream(batch_size=10) for ids in batch.ids.tolist()]
    assert sorted(rows) == taken.ids.tolist()
    assert run_train(recipe)["steps"] == 3  # whole batches of 32 in 100 samples
    # as many samples, but others
    other = digits_recipe(tmp_path, teachers=1, data={"limit": 10})
    with pytest.raises(CacheMismatchError, match=r"dataset\.fingerprint\.ids_sha256"):
        run_cache(other)
    with pytest.raises(CacheMismatchError, match=r"dataset"):
        run_train(digits_recipe(tmp_path, teachers=1, data={"fraction": 0.25}, train={"out": str(tmp_path / "other")}))


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    recipe = digits_recipe(tmp_path, teachers=1, cache={"path": str(tmp_path / "mine")})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(RequestError, match=r"thesis\.txt"):
        run_cache(recipe)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_diverged_teacher_is_found_before_anything_is_stored(tmp_path: Path) -> None:
    recipe = digits_recipe(tmp_path, teachers=1)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    name = next(key for key in state if key.endswith("conv1.weight") or key == "conv.weight")
    state[name][0] = float("nan")
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(FeedfastError, match=r"'a'.*NaN"):
        run_cache(recipe)
    assert not list(Path(recipe.cache.path).rglob("c/*"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    """The peak of a job of twelve views stays close to that of one of two."""
    script = (
        "import resource, sys\n"
        "from feedfast.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for views in (2, 12):
        recipe = digits_recipe(
            tmp_path,
            cache={"views": views, "path": str(tmp_path / f"{views}.zarr"), "codec": "f32"},
            train={"threads": 1},
        )
        file = as_toml(recipe, tmp_path / f"{views}.toml")
        job = subprocess.run(
            [sys.executable, "-c", script, "cache", str(file)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "RANK": "0"},
            timeout=240,
        )
        peaks.append(int(job.stderr.split()[-1]) / 1024)
    stored = sum(file.stat().st_size for file in (tmp_path / "12.zarr").rglob("*") if file.is_file()) / 2**20
    assert stored > 100, "too small a cache to show anything"
    assert peaks[1] - peaks[0] < 0.35 * stored, (peaks, stored)
    assert Worker.from_env().world == 1


def test_a_teacher_that_the_recipe_does_not_name_is_left_to_its_own(tmp_path: Path) -> None:
    """A kill between manifest and scale leaves a teacher half made; a job of another teacher goes on all the same."""
    first = digits_recipe(tmp_path, teachers=1)
    run_cache(first)
    root = Path(first.cache.path)
    log = root / "commits" / "part-0-of-1.jsonl"
    kept = [line for line in log.read_text().splitlines() if "targets/a/" not in line]
    log.write_text("".join(line + "\n" for line in kept))
    both = digits_recipe(tmp_path)
    other = both.model_copy(update={"teachers": both.teachers[1:]})
    result = run_cache(other)
    assert (result["rows_written"], result["complete"]) == (400, False)
    assert not [entry for entry in CacheReader(root).missing() if entry[0].startswith("targets/b/")]
    assert run_cache(both)["complete"]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    """Logits are float16: a teacher whose logits leave its range is one sentence, not infinities in a cache."""
    recipe = digits_recipe(tmp_path, teachers=1)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    name = next(key for key in reversed(state) if key.endswith("weight") and state[key].dim() == 2)
    state[name] *= 1e6
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(FeedfastError, match=r"'logits'.*65504"):
        run_cache(recipe)
