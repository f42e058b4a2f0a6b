"""A grid of runs: every point once, resumed, failures named; and what comes of comparing them."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small import as_toml, digits_recipe

import feedfast
from feedfast.cli import main
from feedfast.errors import RequestError
from feedfast.report.statistics import T_95, half_interval
from feedfast.stages import sweep
from feedfast.stages.compare import compare_runs, run_compare
from feedfast.stages.sweep import grid, run_sweep, sweep_script

GRID = ("method.name=none,kd", "seed=0:2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of kd from two teachers, one epoch."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = digits_recipe(folder, method={"name": "kd"}, train={"epochs": 1})
    as_toml(recipe, folder / "recipe.toml")
    return folder


@pytest.fixture(scope="module")
def swept(world: Path) -> tuple[Path, dict[str, Any]]:
    """The grid of two methods and two seeds, run once."""
    out = world / "swept"
    return out, run_sweep(world / "recipe.toml", GRID, out=out)


def test_every_point_is_a_run_of_its_own_and_done_points_stay_done(
    world: Path, swept: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = swept
    names = [f"method.name={method},train.seed={seed}" for method in ("none", "kd") for seed in (0, 1)]
    assert list(found["runs"]) == names
    assert (found["done"], found["failed"], found["shared"]) == (4, {}, {})
    recipes = [json.loads((out / name / "recipe.json").read_text()) for name in names]
    assert [recipe["train"]["source"] for recipe in recipes] == ["none", "none", "cache", "cache"]
    assert [recipe["train"]["seed"] for recipe in recipes] == [0, 1, 0, 1]
    assert {recipe["seed"] for recipe in recipes} == {0}, "views are the cache's, whatever the student's seed"

    def ran(*_: object) -> None:
        raise AssertionError("a run that has ended was run again")

    monkeypatch.setattr(sweep, "run_train", ran)
    again = run_sweep(world / "recipe.toml", GRID, out=out)
    assert again["done"] == 4
    assert again["compare"] == found["compare"]


def test_groups_are_compared_seed_by_seed(swept: tuple[Path, dict[str, Any]]) -> None:
    """Mean, deviation, paired difference and interval against NumPy and SciPy on the results in the folders."""
    out, found = swept
    table = found["compare"]
    scores = {
        method: np.array(
            [
                json.loads((out / f"method.name={method},train.seed={s}/result.json").read_text())["val_accuracy"]
                for s in (0, 1)
            ]
        )
        for method in ("none", "kd")
    }
    groups = {group["name"]: group for group in table["groups"]}
    for method, values in scores.items():
        assert groups[method]["mean"] == pytest.approx(values.mean())
        assert groups[method]["deviation"] == pytest.approx(values.std(ddof=1))
        assert groups[method]["seeds"] == (0, 1)
    differences = scores["kd"] - scores["none"]
    low, high = stats.t.interval(0.95, 1, differences.mean(), stats.sem(differences))
    assert groups["kd"]["over_baseline"] == pytest.approx(differences.mean())
    if differences.std():
        assert groups["kd"]["half_interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert groups["kd"]["baseline"] == "none"
    assert groups["none"]["baseline"] is groups["none"]["over_baseline"] is None
    assert groups["none"]["bytes_per_sample"] is None
    assert groups["kd"]["bytes_per_sample"] > 0
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [group["name"] for group in table["groups"]]
    page = (out / "compare.html").read_text()
    assert "kd" in page
    assert "data:image/png" in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_intervals_are_students() -> None:
    for degrees in range(1, len(T_95)):
        assert T_95[degrees] == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)
    values = [0.1, -0.2, 0.4, 0.05]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert half_interval(values) == pytest.approx((high - low) / 2, rel=1e-3)
    assert half_interval([0.1]) == math.inf


def test_points_of_equal_settings_share_one_run(world: Path) -> None:
    """What changes no result, as the number of threads, makes no other run."""
    points, shared = grid(world / "recipe.toml", ("train.threads=1,2", "method.name=kd"), (), world / "shared")
    assert len(points) == 1, "threads change no result"
    assert list(shared.values()) == [points[0].name]


def test_a_run_that_fails_is_named_and_tried_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = world / "failing"
    real = sweep.run_train

    def fails(recipe: Any) -> Any:
        if recipe.train.seed == 1:
            raise ValueError("a network's own mistake")
        return real(recipe)

    monkeypatch.setattr(sweep, "run_train", fails)
    found = run_sweep(world / "recipe.toml", ("seed=0:2",), ("method.name=none", "train.source=none"), out=out)
    assert found["done"] == 1
    assert found["failed"] == {"train.seed=1": "ValueError: a network's own mistake"}
    assert [group["seeds"] for group in found["compare"]["groups"]] == [(0,)]
    monkeypatch.setattr(sweep, "run_train", real)
    found = run_sweep(world / "recipe.toml", ("seed=0:2",), ("method.name=none", "train.source=none"), out=out)
    assert (found["done"], found["failed"]) == (2, {})


@pytest.mark.slow
def test_processes_and_a_job_array_give_the_runs_of_one_process(
    world: Path, swept: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _out, found = swept
    apart = run_sweep(world / "recipe.toml", (*GRID, "train.epochs=1"), out=tmp_path / "apart", jobs=2)
    assert (apart["done"], apart["failed"]) == (4, {})
    for group, other in zip(found["compare"]["groups"], apart["compare"]["groups"], strict=True):
        assert (group["name"], group["mean"]) == (other["name"], other["mean"])
    script = sweep_script(world / "recipe.toml", ("seed=0:2",), ("method.name=kd",), out=tmp_path / "array")
    assert "--array=0-1" in script
    (tmp_path / "job.sh").write_text(script)
    for task in "01":
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": task}
        subprocess.run(["bash", str(tmp_path / "job.sh")], env=env, check=True, capture_output=True)
    done = sweep_script(world / "recipe.toml", ("seed=0:2",), ("method.name=kd",), out=tmp_path / "array")
    assert "all 2 runs" in done


@pytest.mark.parametrize(
    ("settings", "overrides", "said"),
    [
        ((), (), "--set: expected at least one"),
        (("method.name",), (), "expected key=v1,v2"),
        (("train.lr=",), (), "expected key=v1,v2"),
        (("train.lr=0.1,",), (), "found an empty one"),
        (("train.lr=0.1,0.1",), (), "'0.1' more than once"),
        (("seed=3:3",), (), "found an empty one"),
        (("seed=0:2", "train.seed=0:2"), (), "expected each key once"),
        (("seed=0:200", "train.lr=0.1,0.2", "data.limit=1:100"), (), "at most 10,000 combinations"),
        (("method.name=kd,no-such",), (), "no-such"),
        (("train.no_such=1,2",), (), "train.no_such"),
        (("method.tau=1,-2",), (), "method.tau"),
        (("cache.codec=u8,u4",), (), "name the swept key in it"),
        (("train.lr=0.1,0.2",), ("chain.generations=2",), "chain.generations"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_runs(
    settings: tuple[str, ...], overrides: tuple[str, ...], said: str, world: Path
) -> None:
    with pytest.raises(RequestError) as error:
        run_sweep(world / "recipe.toml", settings, overrides, out=world / "refused")
    assert said in str(error.value)
    assert not (world / "refused").exists()


def test_values_keep_their_commas_in_brackets_and_quotes(world: Path) -> None:
    out = world / "names"
    points, _ = grid(
        world / "recipe.toml", ("data.mean=[0.1, 0.2, 0.3],[0, 0, 0]",), ("cache.path=c-{data.mean}.zarr",), out
    )
    assert [point.recipe.data.mean for point in points] == [(0.1, 0.2, 0.3), (0.0, 0.0, 0.0)]
    assert len({point.name for point in points}) == 2
    assert all("/" not in point.name and " " not in point.name for point in points)
    assert len({point.recipe.cache.path for point in points}) == 2


def test_what_cannot_be_compared_is_refused(swept: tuple[Path, dict[str, Any]], tmp_path: Path, world: Path) -> None:
    out, _ = swept
    with pytest.raises(RequestError, match=r"found no result\.json"):
        compare_runs([tmp_path])
    with pytest.raises(RequestError, match="--baseline: expected one of"):
        compare_runs([out], baseline="ofd")
    found = run_compare([out], tmp_path, baseline="kd")
    assert {group["name"]: group["baseline"] for group in found["groups"]} == {"none": "kd", "kd": None}
    assert {group.baseline for group in feedfast.compare_runs([out]).groups} == {"none", None}


def test_the_command_line_says_a_wrong_grid_in_one_sentence(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["sweep", str(world / "recipe.toml"), "--print", "pbs"], ["compare", str(world / "nothing")]):
        monkeypatch.setattr("sys.argv", ["feedfast", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("error: ")
