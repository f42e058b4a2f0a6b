"""Lines for schedulers: sized to what is missing, and what they start makes the cache that one process makes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import feedfast
from hypothesis import given, settings
from hypothesis import strategies as st
from small import as_toml, digits_recipe

from feedfast.data.loader import Loader
from feedfast.stages.launch import _lead_s, even_parts
from feedfast.storage.log import cache_digest

VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_", "JOB_COMPLETION")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose views of 200 rows are four units of 64 rows each, and its cache as one process makes it."""
    folder = tmp_path_factory.mktemp("launch")
    recipe = digits_recipe(folder, teachers=1, cache={"shard_mb": 3e-4, "path": str(folder / "whole.zarr")})
    file = as_toml(recipe, folder / "recipe.toml")
    assert feedfast("cache", file).code == 0
    return file


@pytest.fixture(autouse=True)
def nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)


def printed(launcher: str, recipe: Path, *more: object) -> str:
    outcome = feedfast("cache", recipe, *more, "--print", launcher)
    assert outcome.code == 0, outcome.err
    return outcome.out


def array_of(lines: str) -> int:
    found = re.search(r"^#SBATCH --array=0-(\d+)$", lines, re.MULTILINE)
    assert found, lines
    return int(found[1]) + 1


@settings(deadline=None, max_examples=60)
@given(units=st.sets(st.integers(0, 400), min_size=1), most=st.integers(1, 90))
def test_every_part_has_work(units: set[int], most: int) -> None:
    found = even_parts(np.array(sorted(units)), most)
    assert 1 <= found <= min(most, len(units))
    assert {unit % found for unit in units} == set(range(found))


def test_parts_are_even() -> None:
    """No more of them than make the largest smaller; also where a lost part of eight leaves every eighth unit."""
    assert even_parts(np.arange(1500), 1001) == 750
    assert even_parts(np.arange(1000), 1001) == 1000
    eighth = np.arange(3, 800, 8)
    loads = np.bincount(eighth % even_parts(eighth, 10))
    assert len(loads) >= 8
    assert loads.max() <= 2 * loads.min()


def test_lines_are_sized_to_what_is_missing(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.zarr"
    here = f"cache.path={path}"
    assert array_of(printed("slurm", world, here)) == 8
    assert not list(tmp_path.iterdir()), "printing writes nothing"
    assert array_of(printed("slurm", world, here, "--tasks", "3")) == 3
    # units 2 and 5 are done; 0, 1, 3, 4, 6 and 7 would leave two of six parts, and one of three, without any
    assert feedfast("cache", world, here, "--part", "2/3").code == 0
    assert array_of(printed("slurm", world, here)) == 5
    assert array_of(printed("slurm", world, here, "--tasks", "3")) == 2


def test_a_complete_cache_needs_nothing(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(world.parent / "whole.zarr", path)
    here = f"cache.path={path}"
    for launcher in ("slurm", "kubernetes", "torchrun"):
        assert printed(launcher, world, here) == f"# {path}: nothing is missing, all 8 units of rows are there\n"
    # what a recipe adds is missing: a view, another tap of the same teacher
    assert array_of(printed("slurm", world, here, "cache.views=3")) == 4
    assert array_of(printed("slurm", world, here, 'teachers.0.taps=["final", "ofd+margin", "stage1"]')) == 8
    # and so is what was lost, though the log has it
    (path / "targets/a/final/codes/c/1/2/0/0/0").unlink()
    assert array_of(printed("slurm", world, here)) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--print", "pbs"], "--print: expected slurm, kubernetes or torchrun, found 'pbs'"),
        (["--print", "slurm", "--part", "0/2"], "cache.part: expected auto with --print"),
        (["--print", "slurm", "cache.batch=16"], "made from something else"),
        (["--tasks", "2"], "--tasks: expected with --print, found 2 without"),
        (["--print", "slurm", "cache.path="], "cache.path: required"),
        (["--print", "slurm", "method.name=rkd", "teachers.0.taps=[]", "student.model=none"], "student"),
    ],
)
def test_what_the_job_would_refuse_is_refused_at_once(world: Path, more: list[str], words: str) -> None:
    outcome = feedfast("cache", world, *more)
    assert outcome.code == 2
    assert words in outcome.error


def test_a_node_without_a_gpu_prints_for_those_with_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another decoder is another cache, but it is the tasks' that counts."""
    describe = Loader.describe
    monkeypatch.setattr(Loader, "describe", lambda self: {**describe(self), "backend": "dali-mixed"})
    assert "nothing is missing" in printed("slurm", world)
    assert "dali-mixed" in feedfast("cache", world).error


def test_the_time_to_finish_follows_from_the_plan() -> None:
    assert _lead_s(None, 10) == 120
    assert _lead_s({"bytes": 1.0, "seconds": 50.0}, 10) == 120
    assert _lead_s({"bytes": 1.0, "seconds": 36_000.0}, 100) == 780


def test_slurm_lines_name_what_matters(world: Path, tmp_path: Path) -> None:
    lines = printed("slurm", world, f"cache.path={tmp_path}/a b.zarr", "train.device=auto")
    assert subprocess.run(["bash", "-n"], input=lines, text=True, capture_output=True, check=False).stderr == ""
    for words in (
        str(world),
        f"mkdir -p '{tmp_path}/a b.zarr.logs'",
        f'#SBATCH --output="{tmp_path}/a b.zarr.logs/%A_%a.log"',
        "#SBATCH --signal=B:TERM@120",
        "#SBATCH --requeue",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --job-name=feedfast-a-b",
    ):
        assert words in lines, words
    assert "gpus" not in printed("slurm", world, f"cache.path={tmp_path}/c.zarr")


def kubernetes_job(text: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text)


def test_kubernetes_lines_are_a_job(world: Path, tmp_path: Path) -> None:
    job = kubernetes_job(printed("kubernetes", world, f"cache.path={tmp_path}/c_1.zarr", "train.device=auto"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", "feedfast-c-1")
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    assert spec["backoffLimitPerIndex"] == 3
    refused, evicted = spec["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod["restartPolicy"] == "Never", "what a pod failure policy needs"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert {"name": "JOB_COMPLETIONS", "value": "8"} in container["env"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


# ---- what is printed, run as the scheduler would


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def with_programs(folder: Path) -> dict[str, str]:
    """The environment in which programs of ``folder``, and those of this Python, are found."""
    paths = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(paths)}


@pytest.mark.slow
def test_a_slurm_array_makes_the_cache(world: Path, tmp_path: Path) -> None:
    """A scheduler that keeps the script; then each of its tasks, with the variables that Slurm sets."""
    program(tmp_path, "sbatch", f"#!/bin/sh\ncat > {tmp_path}/job.sh\n")
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    path, env = tmp_path / "c.zarr", with_programs(tmp_path)
    lines = printed("slurm", world, f"cache.path={path}", "--tasks", "2")
    subprocess.run(["bash"], input=lines, text=True, check=True, env=env)
    assert (tmp_path / "c.zarr.logs").is_dir(), "Slurm does not make it"
    for task in range(array_of(lines)):
        own = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(array_of(lines))}
        done = subprocess.run(
            ["bash", tmp_path / "job.sh"], env={**env, **own}, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert f"cache: part {task}/2, by SLURM_ARRAY_TASK_ID={task}, SLURM_ARRAY_TASK_COUNT=2" in done.stderr
    assert cache_digest(path) == cache_digest(world.parent / "whole.zarr")
    assert not (tmp_path / "scontrol.txt").exists(), "nothing was to be queued again"


@pytest.mark.parametrize(("code", "restarts", "again"), [(0, 0, 0), (1, 0, 1), (1, 3, 0), (2, 0, 0), (143, 9, 1)])
def test_a_slurm_task_queues_again(world: Path, tmp_path: Path, code: int, restarts: int, again: int) -> None:
    """By exit code; 143 is a task that has been told to end."""
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    program(tmp_path, "job", f"#!/bin/sh\nexit {code}\n")
    script = script_of(world, tmp_path)
    env = {**with_programs(tmp_path), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash"], input=script, text=True, env=env, check=False, timeout=60)
    assert done.returncode == code
    said = tmp_path / "scontrol.txt"
    assert (said.read_text() if said.exists() else "") == "requeue 7\n" * again


def test_a_slurm_task_is_told_to_end(world: Path, tmp_path: Path) -> None:
    """The signal goes to the script alone, which passes it on, waits for the shards, and queues the task again."""
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    ending = f"sleep 0.3; touch {tmp_path}/finished; exit 143"
    program(
        tmp_path, "job", f"#!/bin/bash\ntrap '{ending}' TERM\ntouch {tmp_path}/begun\nwhile :; do sleep 0.05; done\n"
    )
    env = {**with_programs(tmp_path), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "-c", script_of(world, tmp_path)], env=env)
    try:
        while not (tmp_path / "begun").exists() and job.poll() is None:
            time.sleep(0.01)
        job.terminate()
        assert job.wait(timeout=60) == 143
    finally:
        job.kill()
    assert (tmp_path / "finished").exists()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def script_of(world: Path, folder: Path) -> str:
    """The batch script, with a program of the test in place of feedfast."""
    lines = printed("slurm", world, f"cache.path={folder}/c.zarr")
    script = lines[lines.index("#!/bin/bash") : lines.rindex("FEEDFAST")]
    changed, count = re.subn(r"^\S+ -m feedfast .* &$", f"{folder}/job &", script, flags=re.MULTILINE)
    assert count == 1
    return changed


@pytest.mark.slow
def test_a_kubernetes_job_makes_the_cache(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    job = kubernetes_job(printed("kubernetes", world, f"cache.path={path}", "--tasks", "2"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    for index in range(job["spec"]["completions"]):
        own = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": str(index)}
        done = subprocess.run(
            container["command"], cwd=container["workingDir"], env={**with_programs(tmp_path), **own},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"cache: part {index}/2, by JOB_COMPLETION_INDEX={index}, JOB_COMPLETIONS=2" in done.stderr
    assert cache_digest(path) == cache_digest(world.parent / "whole.zarr")


@pytest.mark.slow
def test_torchrun_makes_the_cache(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    lines = printed("torchrun", world, f"cache.path={path}", "--tasks", "2")
    done = subprocess.run(
        ["bash"], input=lines, env=with_programs(tmp_path), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert cache_digest(path) == cache_digest(world.parent / "whole.zarr")
    assert len(list((path / "commits").glob("part-*-of-2.jsonl"))) == 2
    assert len(list((tmp_path / "c.zarr.logs").rglob("stderr.log"))) == 2
