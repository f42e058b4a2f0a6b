"""A chain of students: every generation teaches the next, over one cache; a kill anywhere changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import as_toml, digits_recipe

from feedfast.errors import RequestError
from feedfast.models.build import build_model, weights_sha256
from feedfast.recipe import Recipe
from feedfast.stages.chain import chain_recipes, run_chain
from feedfast.storage.manifest import read_manifest


def recipe_for(folder: Path, *, generations: int = 3, teachers: int = 0, **sections: Any) -> Recipe:
    return digits_recipe(
        folder,
        teachers=teachers,
        chain={"generations": generations},
        **{"method": {"name": "sfeed"}, "cache": {"path": str(folder / "chain.zarr")}, **sections},
    )


def weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "student" / f"generation-{number}" / "student.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def test_every_generation_teaches_the_next_and_stays_in_the_cache(tmp_path: Path) -> None:
    result = run_chain(recipe_for(tmp_path))
    assert [found["method"] for found in result["generations"]] == ["none", "sfeed", "sfeed"]
    assert result["val_accuracy"] == result["generations"][-1]["val_accuracy"]
    held = read_manifest(tmp_path / "chain.zarr").teachers
    assert list(held) == ["generation-1", "generation-2"]
    for number, (name, teacher) in enumerate(held.items(), start=1):
        network = build_model("zoo/wrn-10-1", num_classes=10, weights=tmp_path / "student" / name / "student.pt")
        assert teacher.weights_sha256 == weights_sha256(network), number
    starts = {float(weights(tmp_path, number)["conv1.weight"].sum()) for number in (1, 2, 3)}
    assert len(starts) == 3
    again = run_chain(recipe_for(tmp_path))
    assert [found["steps"] for found in again["generations"]] == [12, 12, 12]
    longer = run_chain(recipe_for(tmp_path, generations=4))
    assert len(longer["generations"]) == 4
    assert list(read_manifest(tmp_path / "chain.zarr").teachers) == [f"generation-{n}" for n in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["live", "record"])
def test_a_chain_may_begin_with_a_teacher(source: str, tmp_path: Path) -> None:
    """Born-again: generation 1 learns from the given teacher; live, recording and cached chains end alike, f32 in
    stored order."""
    words: dict[str, Any] = {"generations": 2, "teachers": 1, "method": {"name": "ban"}}
    found = run_chain(recipe_for(tmp_path, cache={"codec": "f32", "path": str(tmp_path / "f32.zarr")}, **words))
    cache = {"codec": "f32", "path": str(tmp_path / "other.zarr")}
    expected = run_chain(
        recipe_for(tmp_path, cache=cache, train={"source": source, "out": str(tmp_path / "other")}, **words)
    )
    for ours, theirs in zip(found["generations"], expected["generations"], strict=True):
        assert ours["final_loss"] == theirs["final_loss"]
        assert ours["method"] == theirs["method"] == "ban"


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    recipes = {}
    for name, folder in folders.items():
        folder.mkdir()
        recipes[name] = str(as_toml(recipe_for(folder), folder / "chain.toml"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    draw = np.random.default_rng(7)

    def chain(name: str, limit_s: float) -> bool:
        """Start it, and kill it after so many seconds; whether it ended by itself before."""
        with (tmp_path / "stderr").open("wb") as stderr:
            command = [sys.executable, "-m", "feedfast", "chain", recipes[name]]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return False
        assert process.returncode == 0, (tmp_path / "stderr").read_text()
        return True

    begun = time.monotonic()
    assert chain("whole", 600)
    whole_s, kills = time.monotonic() - begun, 0
    # a kill comes later each time, so that the last run ends however busy the machine is
    while not chain("killed", whole_s * draw.uniform(0.3, 0.6) * 1.3**kills):
        kills += 1
    assert kills, "it ended before it was killed once"
    for number in (1, 2, 3):
        ours, theirs = (weights(folders[name], number) for name in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), number


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"generations": 1}, "chain.generations: expected 2 or more, found 1"),
        ({"teachers": 2}, r"teachers: a chain begins with at most one \[\[teachers\]\].*found 2"),
        ({"student": {"branches": 2}}, "student.branches: expected 1 in a chain, found 2"),
        ({"method": {"name": "none"}}, "method.name: a chain needs a method that learns from a teacher"),
        ({"method": {"name": "sfed"}}, "method.name: expected .*did you mean 'sfeed'"),
        ({"train": {"source": "none"}}, "train.source: expected cache, live or record in a chain, found 'none'"),
    ],
)
def test_what_is_no_chain_is_refused(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chain_recipes(recipe_for(tmp_path, **words))
