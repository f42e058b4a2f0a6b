"""Ranks and parts from the variables of launchers, and process groups that end with one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from feedfast.errors import RequestError
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
        (Worker(), "0/1", {}, (0, 1)),
        (Worker(), "2/5", {}, (2, 5)),
        (Worker(1, 4, 1), "2/5", {}, (1, 4)),
        (Worker(), "0/1", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            Worker(),
            "0/1",
            {
                "SLURM_ARRAY_TASK_ID": "15",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_STEP": "5",
            },
            (2, 4),
        ),
        (Worker(), "1/2", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 2)),
        (Worker(), "0/1", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, (2, 3)),
        (Worker(), "0/1", {"JOB_COMPLETION_INDEX": "2"}, (0, 1)),
    ],
)
def test_parts_of_a_caching_job(worker: Worker, asked: str, env: dict[str, str], part: tuple[int, int]) -> None:
    assert worker.part(asked, env) == part


def test_a_part_outside_its_array_is_refused() -> None:
    with pytest.raises(RequestError, match="JOB_COMPLETION_INDEX: expected a place below 3, found 3"):
        Worker().part("0/1", {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "3"})


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


@pytest.mark.parametrize(("kind", "speaker"), [("none", None), ("second", 1), ("first", 0), ("both", None)])
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


def test_devices_name_the_key_that_was_given() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RequestError, match=r"^device: expected auto, cpu or one of"):
        pick_device("tpu", key="device")
    with pytest.raises(RequestError, match=r"^train\.device: expected"):
        pick_device("tpu")


def test_a_group_is_made_on_its_own_device_and_left_on_every_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL puts a context of every rank on GPU 0 unless the device is set first."""
    done: list[str] = []

    class Store:
        def add(self, *_: object) -> int:
            return 1

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"set {device}"))
    dist = torch.distributed
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **more: done.append(f"{kind} {more['device_id']}"))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Store)
    monkeypatch.setattr(dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "20000")
    begun, device = ["set cuda:1", "nccl cuda:1"], torch.device("cuda:1")
    with Worker(1, 2, 1).process_group(device):
        assert done == begun
    assert done == [*begun, "barrier", "destroyed"]
    done.clear()
    with pytest.raises(RequestError), Worker(1, 2, 1).process_group(device):
        raise RequestError("x")
    assert done == [*begun, "destroyed"]
    done.clear()
    with Worker(1, 2, 1).process_group(device, memory=True):
        assert done == ["set cuda:1", "cpu:gloo,cuda:nccl cuda:1"]
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(RequestError, match="expected 'cpu:gloo,cuda:nccl', found 'cuda:nccl'"):
        Together(Worker(1, 2, 1))
