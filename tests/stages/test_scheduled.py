"""A caching job as schedulers start and end it: whose part it does, exit codes, SIGTERM, and going on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import feedfast, in_a_process
from small import as_toml, digits_recipe

from feedfast.recipe import load_recipe
from feedfast.stages import chain, sweep
from feedfast.stages.interrupt import HoldShards, interruptible
from feedfast.stages.offline import run_cache
from feedfast.stages.progress import Meter
from feedfast.storage.log import cache_digest
from feedfast.storage.manifest import read_manifest
from feedfast.storage.writer import CacheWriter

UNIT = 64  # rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose views of 200 rows are four units each, and its cache as one process makes it."""
    folder = tmp_path_factory.mktemp("scheduled")
    cache = {"shard_mb": 3e-4, "path": str(folder / "whole.zarr")}
    file = as_toml(digits_recipe(folder, teachers=1, cache=cache, train={"threads": 1}), folder / "recipe.toml")
    assert feedfast("cache", file).code == 0
    return file


@pytest.fixture(autouse=True)
def nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("RANK", "WORLD_SIZE", "SLURM_", "JOB_COMPLETION"))]:
        monkeypatch.delenv(name)


SLURM = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "{}"}
PODS = {"JOB_COMPLETIONS": "2", "JOB_COMPLETION_INDEX": "{}"}
RANKS = {"WORLD_SIZE": "2", "RANK": "{}"}


@pytest.mark.parametrize("variables", [SLURM, PODS, RANKS])
def test_two_tasks_do_a_part_each_and_say_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """One after the other and without any place to meet: they need no process group."""
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: pytest.fail("a group"))
    path = tmp_path / "c.zarr"
    for task in range(2):
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(task))
        outcome = feedfast("-v", "cache", world, f"cache.path={path}")
        assert outcome.code == 0, outcome.err
        (said,) = re.findall(r"cache: part (\d/\d), by (.*)", outcome.err)
        assert said[0] == outcome.document["part"] == f"{task}/2"
        assert said[1] == outcome.document["part_said"]
        assert sorted(said[1].split(", ")) == sorted(f"{n}={v.format(task)}" for n, v in variables.items())
        assert outcome.document["complete"] == (task == 1)
        assert outcome.document["rows_written"] == (2 * (64 + 64), 2 * (64 + 8))[task]
    assert cache_digest(path) == cache_digest(world.parent / "whole.zarr")


def test_who_needs_the_cache_next_makes_all_of_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain or a sweep that is one of an array's tasks: no other task writes the other parts of its cache."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value.format(1))
    path = f"cache.path={tmp_path / 'c.zarr'}"
    made = run_cache(load_recipe(world, [path]), whole=True)
    assert (made["part"], made["complete"]) == ("0/1", True)

    class Begun(Exception):
        pass

    def begin(*_: object, whole: bool = False, **__: object) -> None:
        raise Begun(whole)

    for stage in (chain, sweep):
        monkeypatch.setattr(stage, "run_cache", begin)
    with pytest.raises(Begun, match="True"):
        sweep.run_sweep(world, ["method.name=pfeed"], [path], out=tmp_path / "sweep")
    words = ["chain.generations=2", "method.name=ban", f"train.out={tmp_path / 'chain'}"]
    with pytest.raises(Begun, match="True"):
        chain.run_chain(load_recipe(world, [path, *words]))


def test_what_is_asked_for_counts(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also all of it, as where each task of an array has a cache of its own."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value.format(1))
    outcome = feedfast("cache", world, f"cache.path={tmp_path}/c.zarr", "--part", "0/1")
    assert outcome.document["complete"] is True
    assert "cache: part 0/1, by --part or cache.part, not by SLURM_ARRAY_TASK_ID=1" in outcome.err


# ---- exit codes: a scheduler tries again after 1, and not after 2


def taken(folder: Path) -> Callable[[], None]:
    writer = CacheWriter(folder / "whole.zarr", read_manifest(folder / "whole.zarr"))
    return writer.close


def blocked(folder: Path) -> Callable[[], None]:
    (folder / "blocked.zarr/pixels/sums/c/0/0").mkdir(parents=True)
    (folder / "blocked.zarr/commits").mkdir()
    (folder / "blocked.zarr/commits/.lock-manifest").touch()
    return lambda: None


def diverged(folder: Path) -> Callable[[], None]:
    state = torch.load(folder / "a.pt", weights_only=True)
    torch.save({name: value * float("nan") if value.is_floating_point() else value for name, value in state.items()},
               folder / "nan.pt")  # fmt: skip
    return lambda: None


def nothing(folder: Path) -> Callable[[], None]:
    return lambda: None


WRONG = [
    (["data.train=nowhere.npz"], {}, nothing, "nowhere.npz"),
    (["cache.path={}/whole.zarr", "cache.batch=16"], {}, nothing, "made from something else"),
    ([], {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2"}, nothing, "a place below 2, found 5"),
    ([], {"JOB_COMPLETION_INDEX": "0"}, nothing, "JOB_COMPLETIONS: expected"),
]
FAILED = [
    # the pod before may still be ending
    (["cache.path={}/whole.zarr"], {}, taken, "part 0/1 is already being written"),
    (["cache.path={}/blocked.zarr"], {}, blocked, "cannot be written"),
    (["cache.path={}/nan.zarr", "teachers.0.weights={}/nan.pt"], {}, diverged, "expected finite maps"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "more", "env", "before", "words"), [(2, *case) for case in WRONG] + [(1, *case) for case in FAILED]
)
def test_exit_codes_say_whether_to_try_again(
    world: Path, code: int, more: list[str], env: dict[str, str], before: Callable[[Path], Callable[[], None]],
    words: str,
) -> None:  # fmt: skip
    after = before(world.parent)
    try:
        arguments = [text.replace("{}", str(world.parent)) for text in more]
        outcome = in_a_process("cache", world, *arguments, env={**os.environ, **env})
    finally:
        after()
    assert outcome.code == code, outcome.err
    assert words in outcome.error


def test_a_run_folder_that_is_in_use_may_be_tried_again(world: Path) -> None:
    from feedfast.errors import BusyError
    from feedfast.stages.folder import RunLock

    with RunLock(world.parent), pytest.raises(BusyError) as caught:
        RunLock(world.parent)
    assert caught.value.exit_code == 1


# ---- SIGTERM


@pytest.mark.parametrize(("batches", "rows"), [(1, UNIT), (2, UNIT), (3, 2 * UNIT), (7, 200)])
def test_a_signal_waits_for_the_shards_that_are_begun(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, rows: int
) -> None:
    """After some batches of 32 rows; nothing is lost, so a task that is ended again and again gets on."""
    number, before = signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL)
    advance, calls, here = Meter.advance, [], f"cache.path={tmp_path}/c.zarr"

    def end(self: Meter, count: int, remark: str = "") -> None:
        calls.append(count)
        if len(calls) == batches:
            os.kill(os.getpid(), number)
        advance(self, count, remark)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(Meter, "advance", end)
            outcome = feedfast("cache", world, here)
    finally:
        signal.signal(number, before)
    assert outcome.code == 143, outcome.err
    assert f"cache: part 0/1: {rows} of 400 rows are durable, {400 - rows} are left" in outcome.err
    assert outcome.err.splitlines()[-1] == "interrupted by SIGTERM; the same command continues"
    again = feedfast("cache", world, here)
    assert again.document["rows_written"] == 400 - rows
    assert again.document["digest"] == cache_digest(world.parent / "whole.zarr")


def test_a_signal_after_the_last_check_is_not_lost() -> None:
    def end() -> None:
        with HoldShards(frozenset) as hold:
            hold.check()
            signal.raise_signal(signal.SIGTERM)

    with interruptible() as ending, pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        end()
    assert ending.exit_code == 143


def test_shards_that_are_begun_later_are_not_waited_for() -> None:
    open_shards: set[int] = {1, 2}
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        with HoldShards(lambda: frozenset(open_shards)) as hold:
            hold.check()
            signal.raise_signal(signal.SIGTERM)
            hold.check()
            open_shards ^= {1, 3}
            hold.check()
            assert ended == []
            open_shards ^= {2, 4}
            hold.check()
            assert ended == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            assert len(ended) == 2, "a second one does not wait"
    finally:
        signal.signal(signal.SIGTERM, before)


def rows_logged(log: Path) -> int:
    """Shards of rows, not what is written before the first of them."""
    return log.read_bytes().count(b"pixels/sums") if log.exists() else 0


@pytest.mark.slow
def test_a_task_is_ended_and_the_same_command_goes_on(world: Path, tmp_path: Path) -> None:
    """A real process, a real signal, more than once."""
    path, views = tmp_path / "c.zarr", "cache.views=30"
    command = [sys.executable, "-m", "feedfast", "cache", str(world), f"cache.path={path}", views]
    log, ended, left = path / "commits" / "part-0-of-1.jsonl", 0, [6000]
    for _ in range(3):
        before = rows_logged(log)
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while job.poll() is None and rows_logged(log) < before + 4:
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=120)
        if job.returncode == 0:
            break
        assert (job.returncode, out) == (143, ""), err
        (said,) = re.findall(r"cache: part 0/1: ([\d,]+) of 6,000 rows are durable, ([\d,]+) are left", err)
        done, rest = (int(text.replace(",", "")) for text in said)
        assert done + rest == 6000
        assert rest < left[-1], "it got on"
        assert (done % 200) % UNIT == 0, "nothing that was begun was lost"
        left.append(rest)
        ended += 1
    assert ended >= 1, "it was over before it could be ended"
    again = feedfast("cache", world, f"cache.path={path}", views)
    assert again.document["rows_written"] == left[-1]
    whole = feedfast("cache", world, f"cache.path={tmp_path}/whole.zarr", views)
    assert again.document["digest"] == whole.document["digest"]
