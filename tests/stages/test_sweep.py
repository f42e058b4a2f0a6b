"""A grid of runs: every point once, resumed, failures named; and what comes of comparing them."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small import as_toml, digits_recipe

import feedfast
from feedfast.cli import main
from feedfast.errors import BusyError, FeedfastError, RequestError
from feedfast.files import write_sealed
from feedfast.recipe import parse_recipe
from feedfast.report.statistics import T_95, half_interval
from feedfast.stages import sweep
from feedfast.stages.compare import compare_runs, run_compare
from feedfast.stages.folder import RunLock, comparable
from feedfast.stages.sweep import grid, run_sweep, sweep_script
from feedfast.storage.manifest import held_manifest

GRID = ("method.name=none,kd", "seed=0:2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of kd from a teacher that is tapped for its methods, one epoch."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = digits_recipe(folder, teachers=1, method={"name": "kd"}, train={"epochs": 1})
    file = as_toml(recipe, folder / "recipe.toml")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("taps =")))
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
    assert page.count("<svg viewBox") >= 2
    assert page.count("<script") == 1, "the page's own"
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
    """A network's own mistake, and a cache that cannot be made, cost the runs that they concern."""
    out = world / "failing"
    real = sweep.run_train

    def full(*_: object, **__: object) -> None:
        raise FeedfastError("no room")

    def fails(recipe: Any) -> Any:
        if recipe.train.seed == 1:
            raise ValueError("a network's own mistake")
        return real(recipe)

    monkeypatch.setattr(sweep, "run_train", fails)
    monkeypatch.setattr(sweep, "run_cache", full)
    found = run_sweep(world / "recipe.toml", GRID, out=out)
    assert found["done"] == 1
    assert found["failed"] == {
        "method.name=kd,train.seed=0": "no room",
        "method.name=kd,train.seed=1": "no room",
        "method.name=none,train.seed=1": "ValueError: a network's own mistake",
    }
    assert [group["seeds"] for group in found["compare"]["groups"]] == [(0,)]
    with pytest.raises(FeedfastError, match="no room"):
        run_sweep(world / "recipe.toml", ("method.name=kd",), out=out)
    monkeypatch.setattr(sweep, "run_train", real)
    found = run_sweep(world / "recipe.toml", ("method.name=none", "seed=0:2"), out=out)
    assert (found["done"], found["failed"]) == (2, {})


def test_one_cache_has_the_taps_of_all_methods_and_names_are_those_of_any_folder(world: Path) -> None:
    """Teachers without taps are tapped for the methods: of all points, not of the first."""
    out = world / "\u2713 \U0001f600 it's $x$"
    found = run_sweep(
        world / "recipe.toml", ("method.name=kd,fitnet",), ("cache.path=" + str(world / "b.zarr"),), out=out
    )
    assert (found["done"], found["failed"]) == (2, {})
    assert (out / "method.name=fitnet" / "result.json").is_file()
    assert len(held_manifest(world / "b.zarr").passes) == 1, "the teachers ran once"


def test_a_folder_says_whether_its_run_has_ended(world: Path, swept: tuple[Path, dict[str, Any]]) -> None:
    """Also runs that a scheduler has started; not those of another recipe, cut short, or damaged."""
    out, _ = swept

    def ended(*overrides: str) -> bool:
        points, _ = grid(world / "recipe.toml", ("method.name=none", "seed=0:1"), overrides, out)
        return sweep._has_ended(points[0])

    assert ended()
    assert ended("train.threads=1")
    assert not ended("train.lr=0.03")
    assert not ended("train.max_steps=2")
    result = out / "method.name=none,train.seed=0" / "result.json"
    whole = result.read_text()
    result.write_text(whole.replace("val_accuracy", "val_precision"))
    assert not ended()
    result.write_text(whole)
    with RunLock(out), pytest.raises(BusyError, match="--out: another process"):
        run_sweep(world / "recipe.toml", GRID, out=out)


def test_an_interrupt_ends_the_runs_once_and_waits_for_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, pathlib, signal, sys, time\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "def end(number, frame):\n"
        "    time.sleep(0.3); (place / f'{os.getpid()}.ended').write_text(str(number)); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(place / f'{os.getpid()}.begun').write_text(str(os.getsid(0)))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sweep, "_command", lambda recipe, point: [sys.executable, "-c", code, str(tmp_path)])
    points, _ = grid(world / "recipe.toml", ("seed=0:3",), (), tmp_path)

    def interrupted(_: float) -> None:
        if len(list(tmp_path.glob("*.begun"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(sweep._results(points, world / "recipe.toml", 2, tmp_path))
    begun = {file.stem: file.read_text() for file in tmp_path.glob("*.begun")}
    assert {file.stem: file.read_text() for file in tmp_path.glob("*.ended")} == dict.fromkeys(begun, "15")
    assert str(os.getsid(0)) not in begun.values(), "Ctrl-C in a terminal would come to them, too"


def test_a_job_array_passes_words_on_as_they_are(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sweep._command
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    monkeypatch.setattr(sweep, "_command", lambda recipe, point: [*show, *real(recipe, point)[3:]])
    odd = "data.train=a b'\"$(touch hurt);\\*"
    out = tmp_path / "100% it's; $HOME"
    script = sweep_script(world / "recipe.toml", ("train.lr=0.1,0.2",), (odd,), out=out)
    assert f'#SBATCH --output="{tmp_path}/100%% it\'s; $HOME/slurm-%A-%a.log"' in script.splitlines()
    assert out.is_dir(), "Slurm makes no folder for logs"
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    said = subprocess.run(["bash", "-c", script], env=env, check=True, capture_output=True, cwd=tmp_path).stdout
    folder = out / "train.lr=0.2"
    assert json.loads(said) == ["train", str(world / "recipe.toml"), odd, "train.lr=0.2", f'train.out="{folder}"']
    assert not (tmp_path / "hurt").exists()
    with pytest.raises(RequestError, match="--out: expected a path without"):
        sweep_script(world / "recipe.toml", ("train.lr=0.1,0.2",), (), out=tmp_path / "a\nrm b")


def _made(folder: Path, score: float | None, *overrides: str, **result: Any) -> Path:
    """A run that has ended, without its training."""
    tree = {
        "data": {"train": "t", "val": "v"},
        "teachers": [{"name": "a", "model": "zoo/wrn-10-1"}],
        "train": {"source": "none"},
    }
    folder.mkdir(parents=True)
    write_sealed(folder / "recipe.json", comparable(parse_recipe(tree, overrides)))
    write_sealed(folder / "result.json", {"val_accuracy": score, "steps": 9, "step_ms": 1.5, **result})
    return folder


def _groups(folder: Path, baseline: str | None = None) -> dict[str, Any]:
    return {group.name: group for group in compare_runs([folder], baseline).groups}


KD = ("method.name=kd", "train.source=cache")


def test_a_run_that_lies_there_twice_is_one_student(tmp_path: Path) -> None:
    for seed, score in ((0, 0.5), (1, 0.6)):
        _made(tmp_path / f"plain{seed}", score - 0.1 * seed, f"train.seed={seed}")
        for copy in "ab":
            _made(tmp_path / f"kd{seed}{copy}", score, *KD, f"train.seed={seed}")
    kd = _groups(tmp_path)["kd"]
    assert (kd.mean, kd.over_baseline) == (pytest.approx(0.55), pytest.approx(0.05))
    assert kd.deviation == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert kd.half_interval == pytest.approx(stats.t.ppf(0.975, 1) * 0.1 / 2, rel=1e-3)


def test_each_seed_of_the_views_has_its_cache_and_they_are_one_group(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        _made(tmp_path / f"kd{seed}", 0.5, *KD, f"seed={seed}", f"cache.path=c{seed}.zarr")
    _made(tmp_path / "other", 0.5, *KD, "seed=1", "cache.path=d.zarr")
    found = _groups(tmp_path)
    assert sorted(len(group.runs) for group in found.values()) == [1, 3]


def test_runs_of_other_lengths_and_networks_are_not_taken_for_one(tmp_path: Path) -> None:
    """A run that was cut short is no seed of a whole one, and a teacher's training no baseline of students."""
    _made(tmp_path / "teacher", 0.9, "student.model=zoo/wrn-28-4")
    _made(tmp_path / "kd0", 0.5, *KD)
    _made(tmp_path / "kd1", 0.1, *KD, "train.seed=1", steps=2)
    found = _groups(tmp_path)
    assert found["kd, steps=9"].seeds == (0,)
    assert found["kd, steps=2"].seeds == (1,)
    assert {group.baseline for group in found.values()} == {None}
    _made(tmp_path / "plain", 0.4)
    found = _groups(tmp_path)
    assert found["kd, steps=9"].over_baseline == pytest.approx(0.1)
    assert found["none, student.model=zoo/wrn-28-4"].baseline is None


def test_what_is_lost_or_odd_about_a_cache_costs_its_figures_alone(tmp_path: Path) -> None:
    cache = tmp_path / "$\\frac<b>,$.zarr"
    cache.mkdir()
    (cache / "zarr.json").write_text("{")
    for name in (json.dumps(str(cache)), "gone.zarr"):
        run = _made(tmp_path / name[-9:].strip('"'), 0.5, *KD, f"cache.path={name}")
        (run / "metrics.jsonl").write_text('{"step": 1, "ce": 2.0}\n')
    out = tmp_path / "out"
    found = run_compare([tmp_path], out)
    assert {group["bytes_per_sample"] for group in found["groups"]} == {None}
    assert {cache["paid_seconds"] for cache in found["caches"]} == {None}
    page = (out / "compare.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert {row["name"] for row in rows} == {f"kd, cache.path={cache}", "kd, cache.path=gone.zarr"}
    _made(tmp_path / "odd", 0.5, steps="many")
    with pytest.raises(FeedfastError, match="steps: expected a number, found 'many'"):
        compare_runs([tmp_path])


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
