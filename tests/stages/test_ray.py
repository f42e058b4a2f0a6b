"""A real Ray cluster of one machine and two CPUs: crews whose members are killed, and caches that they write."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import in_memory
from commands import feedfast
from ray_members import Scribe
from small import KNOWN, as_toml, digits_recipe

from feedfast.errors import FeedfastError, RequestError
from feedfast.recipe import Recipe
from feedfast.stages.data import open_train, view_plan
from feedfast.stages.engine_ray import DEATHS, Crew, Needs, Size, session
from feedfast.stages.offline import run_cache
from feedfast.stages.offline_ray import run_cache_ray
from feedfast.stages.verify import run_verify
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader

HELPERS = Path(__file__).parents[1] / "helpers"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # what Ray itself warns of
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """The module ray, connected; two CPUs, no GPU, no dashboard; all of it listens on this machine and ends here."""
    folder = tempfile.mkdtemp(prefix="ray-", dir=in_memory())
    before = dict(os.environ)
    paths = [str(HELPERS), *(path for path in sys.path if path)]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let workers starve next to other tests
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on this machine alone
        "FEEDFAST_TEST_POISON": os.path.join(folder, "poison"),
    }
    os.environ.pop("RAY_ADDRESS", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


# ---- crews


def crew_of(
    ray: Any,
    folder: Path,
    *,
    deadly: set[int] = frozenset(),
    refused: set[int] = frozenset(),
    least: int = 2,
    **more: Any,
) -> Crew[int, tuple[int, int]]:
    make = partial(Scribe, str(folder), frozenset(deadly), frozenset(refused))
    options = {"together": lambda before, after: True, "ended": lambda: False, **more}
    return Crew(ray, make, Size(least, 2), Needs(1, 0), **options)


def notes(folder: Path, word: str) -> list[list[str]]:
    lines = (folder / "notes").read_text().splitlines() if (folder / "notes").exists() else []
    return [line.split()[1:] for line in lines if line.startswith(f"{word} ")]


def test_every_item_is_done_but_the_one_that_kills(cluster: Any, tmp_path: Path) -> None:
    """Members die of one item, of Ray's own kill and of SIGKILL; the one is named, all others are reported once."""
    rng, killed, reported = random.Random(5), [], []
    with crew_of(cluster, tmp_path, deadly={7}) as crew:
        for item, slot in crew.run(range(120)):
            reported.append(item)
            assert slot in (0, 1)
            if len(reported) in (20, 50, 80):
                time.sleep(rng.random() * 0.05)
                seat = rng.choice([seat for seat in crew._seats.values() if seat.ready])
                pid = next(int(pid) for pid, slot, _ in reversed(notes(tmp_path, "ready")) if int(slot) == seat.slot)
                killed.append(pid)
                if len(killed) == 2:
                    os.kill(pid, signal.SIGKILL)
                else:
                    cluster.kill(seat.actor, no_restart=False)
        assert crew.ask("told", "still there").startswith("still there, ")
        assert list(crew.lost) == [7]
        assert crew.deaths == DEATHS + 3
    assert sorted(reported) == [item for item in range(120) if item != 7]
    begun = [entry for entry in notes(tmp_path, "begun") if entry[0] == "7"]
    assert len(begun) == DEATHS
    assert [entry[1:] for entry in begun[1:]] == [["1", "1"]] * (DEATHS - 1), "after the first death it runs alone"
    handed = Counter(entry[0] for entry in notes(tmp_path, "begun"))
    assert max(handed.values()) <= DEATHS
    assert len(notes(tmp_path, "closed")) >= 1


def test_a_crew_ends_with_the_first_error_when_asked_to_and_when_none_can_start(cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "error"
    folder.mkdir()
    with crew_of(cluster, folder, refused={3}, least=1) as crew:
        with pytest.raises(RequestError, match="item 3: expected another one") as caught:
            list(crew.run(range(10)))
        assert type(caught.value) is RequestError
        assert [entry[0] for entry in notes(folder, "begun")].count("3") == 1, "no error of ours is tried again"
        assert crew.deaths == 0

    folder = tmp_path / "stop"
    folder.mkdir()
    done: list[int] = []
    with crew_of(cluster, folder, least=1, ended=lambda: len(done) >= 3) as crew:
        for item, _ in crew.run(range(1000)):
            done.append(item)
        with pytest.raises(FeedfastError, match="the job failed"):
            crew.ask("told", "bad")
    assert 3 <= len(done) < 100
    assert {int(entry[0]) for entry in notes(folder, "done")} == set(done), (
        "what was done is reported, and no more begun"
    )

    folder = tmp_path / "unborn"
    folder.mkdir()
    (folder / "unborn").touch()
    with crew_of(cluster, folder, least=1) as crew, pytest.raises(FeedfastError, match="workers in a row died as they"):
        list(crew.run(range(3)))
    assert crew.deaths == DEATHS


# ---- caches


def recipe_of(folder: Path, name: str, *overrides: str, **sections: Any) -> Recipe:
    """300 digits in units of 64 rows, several shards each."""
    sections["cache"] = {"path": str(folder / name), "shard_mb": 0.0002, "views": 8, **sections.get("cache", {})}
    return digits_recipe(folder, overrides, teachers=1, data={"limit": 30}, train={"threads": 1}, **sections)


def logged(path: Path) -> list[tuple[str, str]]:
    lines = [line for log in path.glob("commits/*.jsonl") for line in log.read_text().splitlines()]
    return [(entry["array"], entry["shard"]) for entry in map(json.loads, lines)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The cache that one ordinary process writes."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_cache(recipe_of(folder, "plain.zarr"))


class Killer(logging.Handler):
    """Kills the first members that are ready: one at any moment, the others once they have committed something."""

    def __init__(self, most: int, cache: Path) -> None:
        super().__init__(logging.DEBUG)
        self.most, self.cache, self.rng = most, cache, random.Random(11)
        self.killed: list[int] = []
        self.threads: list[threading.Thread] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"worker (\d) is ready: process (\d+)", record.getMessage())
        if found and len(self.threads) < self.most:
            slot, pid = int(found[1]), int(found[2])
            log = self.cache / f"commits/part-{slot}-of-2.jsonl"
            self.threads.append(threading.Thread(target=self.kill, args=(pid, log, log.stat().st_size)))
            self.threads[-1].start()

    def kill(self, pid: int, log: Path, size: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.threads) > 1 and log.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(self.rng.random() * 0.3)
        os.kill(pid, signal.SIGKILL)
        self.killed.append(pid)


def test_actors_killed_at_random_moments_write_the_cache_of_one_process(
    cluster: Any, plain: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = plain
    recipe = recipe_of(folder, "killed.zarr")
    killer, engine = Killer(3, Path(recipe.cache.path)), logging.getLogger("feedfast.stages.engine_ray")
    engine.addHandler(killer)
    before = engine.level
    engine.setLevel(logging.DEBUG)  # which also forgets what was asked before
    try:
        found = run_cache_ray(recipe, workers="2")
    finally:
        engine.removeHandler(killer)
        engine.setLevel(before)
        for thread in killer.threads:
            thread.join()
    assert len(killer.killed) == 3
    path = Path(recipe.cache.path)
    assert found["digest"] == expected["digest"] == cache_digest(path)
    assert found["complete"]
    assert found["rows_written"] == expected["rows_written"] == 2400
    assert found.keys() == expected.keys()
    lines = logged(path)
    assert len(lines) == len(set(lines)), "a shard is logged once"
    assert sorted(lines) == sorted(logged(folder / "plain.zarr"))
    assert {log.name for log in path.glob("commits/*.jsonl")} == {"part-0-of-2.jsonl", "part-1-of-2.jsonl"}
    assert run_verify(str(path), full=True)["ok"]
    # the rows that were run, some of them twice
    assert found["teachers"]["a"]["top1_rows"] >= 300


def test_a_driver_that_is_ended_or_killed_is_continued(cluster: Any, plain: tuple[Path, dict[str, Any]]) -> None:
    """SIGTERM: what is under way is finished, 143, one line. SIGKILL: the actors go, too. Then the rest is written."""
    folder, expected = plain
    recipe = recipe_of(folder, "ended.zarr")
    path, file = Path(recipe.cache.path), as_toml(recipe, folder / "ended.toml")
    env = {**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "feedfast", "cache", str(file), "--engine", "ray", "--workers", "1"]
    counts = [0]
    for number in (signal.SIGTERM, signal.SIGKILL):
        job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while job.poll() is None and (not path.exists() or len(logged_so_far(path)) < counts[-1] + 12):
            time.sleep(0.01)
        job.send_signal(number)
        out, errors = job.communicate(timeout=60)
        counts.append(len(logged_so_far(path)))
        assert out == ""
        if number == signal.SIGTERM:
            assert job.returncode == 143, errors
            assert errors.splitlines()[-1] == "interrupted by SIGTERM; the same command continues"
            assert "Traceback" not in errors
        else:
            assert job.returncode == -number, errors
    total = len(logged(folder / "plain.zarr"))
    assert counts[0] < counts[1] < counts[2] < total
    found = feedfast("cache", file, "--engine", "ray", "--workers", "1-2").document
    assert found["digest"] == expected["digest"]
    assert found["rows_resumed"] > 0
    assert found["rows_written"] < 2400
    lines = logged(path)
    assert len(lines) == len(set(lines)) == total


def logged_so_far(path: Path) -> list[str]:
    """Complete lines of shards that hold rows, of logs that are being written."""
    text = "".join(log.read_text() for log in path.glob("commits/*.jsonl"))
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n") and "targets/a/final/codes" in line]


def test_a_shard_that_kills_is_named_and_all_others_are_written(cluster: Any, tmp_path: Path) -> None:
    """A teacher dies at the sight of one image, in the second view; without the poison the same command ends it."""
    words = (
        *KNOWN,
        "method.name=kd",
        "teachers.0.model=networks:deadly",
        'teachers.0.weights=""',
        'teachers.0.taps=["final"]',
    )
    one = recipe_of(tmp_path, "cache.zarr", *words, cache={"views": 1})
    two = recipe_of(tmp_path, "cache.zarr", *words, cache={"views": 2})
    data = open_train(one)
    orders = [view_plan(one.data, one.seed).order(view, data.ids) for view in range(2)]
    # The teachers' probe runs the first rows of the first view, whenever an actor starts.
    victim = int(orders[0][200])
    images = dict(np.load(one.data.train[0]))
    images["images"][victim] = 255
    np.savez(one.data.train[0], **images)
    row = int(np.flatnonzero(orders[1] == victim)[0])
    assert run_cache(one)["complete"]
    poison = Path(os.environ["FEEDFAST_TEST_POISON"])
    poison.touch()
    try:
        outcome = feedfast("cache", as_toml(two, tmp_path / "two.toml"), "--engine", "ray", "--workers", "2")
    finally:
        poison.unlink()
    unit = f"view 1, rows {row // 64 * 64}..{min(row // 64 * 64 + 64, 300)}"
    assert outcome.code == 1
    assert f"{DEATHS} workers died of each of these" in outcome.error
    assert outcome.error.count("view 1, rows") == 1
    assert unit in outcome.error
    reader, codes = CacheReader(two.cache.path), "targets/a/final/codes"
    assert set(range(5)) - set(reader.committed(codes, 1)) == {row // 64}
    assert set(reader.committed(codes, 0)) == set(range(5))
    again = run_cache(two)
    assert again["complete"]
    assert again["rows_written"] == min(64, 300 - row // 64 * 64)
    whole = recipe_of(tmp_path, "whole.zarr", *words, cache={"views": 2})
    assert run_cache(whole)["digest"] == again["digest"]


@pytest.mark.parametrize(
    "override",
    ['teachers.0.weights="nowhere.pt"', "data.train=nowhere", "cache.path="],
)
def test_what_is_wrong_with_a_request_ends_the_job_in_one_sentence(cluster: Any, tmp_path: Path, override: str) -> None:
    """The same sentence and exit code as of a plain run; no actor is started twice."""
    file = as_toml(recipe_of(tmp_path, "cache.zarr"), tmp_path / "recipe.toml")
    ours, plain = (feedfast("cache", file, override, *more) for more in (("--engine", "ray", "--workers", "1"), ()))
    assert ours.code == plain.code == 2
    assert ours.error == plain.error
    assert "died" not in ours.err


def test_session_uses_the_connection_that_is_there_and_keeps_handlers(cluster: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with session() as ray:
        assert ray is cluster
    assert cluster.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
