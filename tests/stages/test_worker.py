"""Ranks and parts from the variables of launchers, and process groups that end with one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from feedfast.errors import FeedfastError, RequestError
from feedfast.stages.together import Together
from feedfast.stages.worker import Worker, _first_host, _set_rendezvous, pick_device

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize(
    ("env", "worker"),
    [
        ({}, Worker(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Worker(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Worker(3, 4, 1)),
        # a batch script itself: it asked for tasks and is none of them
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Worker(0, 1, 0)),
        # torchrun inside a step of srun
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "9", "WORLD_SIZE": "16"}, Worker(9, 16, 0)),
    ],
)
def test_ranks_from_launchers(env: dict[str, str], worker: Worker) -> None:
    assert Worker.from_env(env) == worker


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: expected a whole number.*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected a rank below WORLD_SIZE = 2, found 2"),
        ({"RANK": "1"}, "below WORLD_SIZE = 1, found 1"),
    ],
)
def test_ranks_that_cannot_be(env: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Worker.from_env(env)


@pytest.mark.parametrize(
    ("worker", "asked", "env", "part"),
    [
        (Worker(), "auto", {}, (0, 1)),
        (Worker(), "2/5", {}, (2, 5)),
        (Worker(1, 4, 1), "auto", {}, (1, 4)),
        # ranks divide what they were given
        (Worker(1, 4, 1), "2/5", {}, (9, 20)),
        (Worker(1, 2), "auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (7, 8)),
        (Worker(), "auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            Worker(),
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "15",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_STEP": "5",
            },
            (2, 4),
        ),
        (Worker(), "1/2", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 2)),
        # what is asked for counts, also all of it
        (Worker(), "0/1", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (0, 1)),
        (Worker(), "auto", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, (2, 3)),
        # an operator that starts ranks
        (Worker(1, 2), "auto", {"JOB_COMPLETION_INDEX": "2"}, (1, 2)),
    ],
)
def test_parts_of_a_caching_job(worker: Worker, asked: str, env: dict[str, str], part: tuple[int, int]) -> None:
    assert worker.share(asked, env).part == part


def test_all_ranks_of_all_tasks_do_all_parts_once() -> None:
    env = [{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3"} for task in range(3)]
    parts = [Worker(rank, 4).share("auto", task).part for task in env for rank in range(4)]
    assert sorted(parts) == [(index, 12) for index in range(12)]


@pytest.mark.parametrize(
    ("worker", "asked", "env", "said"),
    [
        (Worker(), "auto", {}, ""),
        (Worker(), "1/2", {}, "--part or cache.part"),
        (
            Worker(),
            "1/2",
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"},
            "--part or cache.part, not by SLURM_ARRAY_TASK_ID=3",
        ),
        (
            Worker(),
            "auto",
            {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"},
            "JOB_COMPLETION_INDEX=0, JOB_COMPLETIONS=3",
        ),
        (
            Worker(1, 2),
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            "SLURM_ARRAY_TASK_ID=3, SLURM_ARRAY_TASK_COUNT=4, SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2",
        ),
    ],
)
def test_who_named_a_part(worker: Worker, asked: str, env: dict[str, str], said: str) -> None:
    assert worker.share(asked, env).said == said


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "3"},
            "JOB_COMPLETION_INDEX: expected a place below 3, found 3",
        ),
        # every pod would write everything
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS: expected .* with JOB_COMPLETION_INDEX=0, found nothing"),
        # --array=3,7,9 has no division of its own
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3"},
            r"SLURM_ARRAY_TASK_ID: expected a place below 3, found 6; .* --part \$SLURM_ARRAY_TASK_ID/N",
        ),
        ({"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "3"}, "SLURM_ARRAY_TASK_ID: expected a whole number"),
    ],
)
def test_parts_that_cannot_be(env: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Worker().share("auto", env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu3", "gpu3"), ("gpu[03-05,9],cpu1", "gpu03"), ("gpu[7,9]", "gpu7"), ("a1,b[2-3]", "a1"), ("n[12-14]", "n12")],
)
def test_the_first_host_of_a_step(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first


def test_srun_ranks_meet_without_being_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RequestError, match="MASTER_ADDR, MASTER_PORT: expected in the environment of 2 ranks"):
        _set_rendezvous(Worker(0, 2, 0))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[03-05]")
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.setenv("MASTER_ADDR", "")  # restored afterwards
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    _set_rendezvous(Worker(0, 2, 0))
    assert os.environ["MASTER_ADDR"] == "gpu03"
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.parametrize(
    ("kind", "speaker"),
    [("none", None), ("second", 1), ("first", 0), ("both", None), pytest.param("device", 1, marks=pytest.mark.slow)],
)
def test_one_rank_fails_and_all_end_with_one_message(kind: str, speaker: int | None) -> None:
    done = run_ranks([HELPERS / "failing_rank.py", kind], timeout=120)
    said = [line for job in done for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert not any("Traceback" in job.stderr for job in done), done[0].stderr + done[1].stderr
    if kind == "none":
        assert [job.returncode for job in done] == [0, 0]
        assert said == []
        return
    assert [job.returncode for job in done] == [1, 1]
    assert len(said) == 1
    assert said[0] in (f"error: rank {rank} is broken" for rank in ((speaker,) if speaker is not None else (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first killed", "second killed"])
def test_a_rank_is_killed_and_the_others_end_with_one_message(kind: str) -> None:
    """Rank 0 keeps the store in which the others would find its word."""
    done = run_ranks([HELPERS / "failing_rank.py", kind], world=3, timeout=120)
    said = [line for job in done for line in job.stderr.splitlines() if line.startswith("error: ")]
    dead = 0 if kind == "first killed" else 1
    assert [job.returncode for job in done] == [-signal.SIGKILL if rank == dead else 1 for rank in range(3)]
    assert not any("Traceback" in job.stderr for job in done), [job.stderr for job in done]
    assert len(said) == 1, said
    assert "expected all 3 ranks to answer, found one gone without a word" in said[0]


@pytest.mark.slow
def test_ranks_end_before_the_one_that_failed_is_gone() -> None:
    """Its connections stay open that long, and a collective would wait for half an hour."""
    waits, fails = start_ranks([HELPERS / "failing_rank.py", "stuck"])
    try:
        assert waits.wait(timeout=90) == 1
        assert fails.poll() is None, "it was to outlive the other"
    finally:
        fails.kill()
        waits.kill()
    assert "Traceback" not in waits.communicate()[1]
    assert "error: rank 1 is broken" in fails.communicate()[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MASTER_PORT": "x"}, "MASTER_PORT: expected a whole number in the environment, found 'x'"),
        ({"MASTER_PORT": "70000"}, "expected the 2 ranks to meet at 127.0.0.1:70000, found: port"),
    ],
)
def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FeedfastError, match=words), Worker(0, 2).process_group(torch.device("cpu")):
        pass


def test_devices_name_the_key_that_was_given() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RequestError, match=r"^device: expected auto, cpu or one of"):
        pick_device("tpu", key="device")
    with pytest.raises(RequestError, match=r"^train\.device: expected"):
        pick_device("tpu")


def test_a_group_is_made_on_its_own_device_and_left_on_every_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL puts a context of every rank on GPU 0 unless the device is set first."""
    done: list[str] = []

    class Store(dict[str, int]):
        """Of a rank whose peers have all heard."""

        def clone(self) -> Store:
            return self

        def check(self, keys: list[str]) -> bool:
            return all(key in self for key in keys)

        def add(self, key: str, count: int) -> int:
            self[key] = self.get(key, 0) + count
            return self[key]

        def set(self, key: str, _: str) -> None:
            self[key] = 0

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"set {device}"))
    dist = torch.distributed
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **more: done.append(f"{kind} {more['device_id']}"))
    monkeypatch.setattr("feedfast.stages.worker._met", lambda _: Store())
    monkeypatch.setattr(dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "20000")
    begun, device = ["set cuda:1", "nccl cuda:1"], torch.device("cuda:1")
    with Worker(1, 2, 1).process_group(device):
        assert done == begun
    assert done == [*begun, "barrier", "destroyed"]
    done.clear()
    for way_out in (RequestError("x"), KeyboardInterrupt(), SystemExit(3), ZeroDivisionError()):
        with pytest.raises(type(way_out)), Worker(1, 2, 1).process_group(device):
            raise way_out
        assert done == [*begun, "destroyed"]
        done.clear()
    with Worker(1, 2, 1).process_group(device, memory=True):
        assert done == ["set cuda:1", "cpu:gloo,cuda:nccl cuda:1"]
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(RequestError, match="expected 'cpu:gloo,cuda:nccl', found 'cuda:nccl'"):
        Together(Worker(1, 2, 1))
