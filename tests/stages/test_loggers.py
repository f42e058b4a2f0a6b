"""Rows told to TensorBoard, W&B and MLflow: the same as in metrics.jsonl, once each, and never at the run's cost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import feedfast
from ranks import run_ranks
from small import as_toml, digits_recipe
from wandb_files import config, history

from feedfast.errors import RequestError
from feedfast.recipe import load_recipe
from feedfast.report import loggers
from feedfast.report.events import EventLog
from feedfast.report.loggers import About, pick_loggers
from feedfast.report.run import read_metrics
from feedfast.stages.sweep import grid

# what SQLAlchemy says of MLflow's tables
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")

ALL = 'train.loggers=["tensorboard","wandb","mlflow"]'
SECRETS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "GITHUB_TOKEN": "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
}
LOGIN = "https://somebody:hunter2hunter2@example.org/x"  # in an argument


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loggers")
    plain = ("train.source=none", "method.name=none")
    return as_toml(digits_recipe(folder, plain, teachers=0), folder / "r.toml")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tools' own variables, as their users set them; where MLflow keeps its runs."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 600.0)  # of a machine that is busy with other tests
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    return tmp_path / "mlflow.db"


def mlflow_runs() -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    return list(client.search_runs([client.get_experiment_by_name("digits").experiment_id]))


def mlflow_rows(run: Any) -> dict[tuple[str, int], list[float]]:
    from mlflow import MlflowClient

    found: dict[tuple[str, int], list[float]] = {}
    for name in run.data.metrics:
        for metric in MlflowClient().get_metric_history(run.info.run_id, name):
            if not name.startswith("result/"):
                found.setdefault((name, metric.step), []).append(metric.value)
    return found


def written(out: Path) -> dict[tuple[str, int], list[float]]:
    """metrics.jsonl: (name, step) → its values, of which there is one."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in read_metrics(out / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                found.setdefault((name, row["step"]), []).append(value)
    return found


def by_name(rows: Sequence[Mapping[str, float]]) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not name.startswith("result/"):
                found.setdefault((name, int(row["step"])), []).append(value)
    return found


def tensorboard_rows(out: Path) -> dict[tuple[str, int], list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {(tag, event.step): [event.value] for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


@pytest.mark.slow
def test_all_three_keep_what_metrics_jsonl_has(
    recipe: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit (TensorBoard's are float32), with recipe, command, commit, versions and tags, and no secret."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    outcome = feedfast("train", recipe, f"train.out={out}", ALL, f'train.tags=["kind=trial", "{LOGIN}"]')
    assert outcome.code == 0, outcome.err
    assert "goes on without it" not in outcome.err
    expected = written(out)
    assert len(expected) > 12
    assert tensorboard_rows(out) == {key: [float(np.float32(value)) for value in expected[key]] for key in expected}

    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    assert by_name(history(file)) == expected
    found = config(file)
    assert (found["name"], found["project"]) == (str(out), "feedfast")
    assert found["tags"] == {"kind=trial", "https://***@example.org/x"}
    assert found["train"]["lr"] == 0.02
    assert "train.tags=" in found["provenance"]["command"]
    assert found["provenance"]["versions"]["torch"]

    (run,) = mlflow_runs()
    assert mlflow_rows(run) == expected
    assert run.info.status == "FINISHED"
    assert run.data.metrics["result/val_accuracy"] == outcome.document["val_accuracy"]
    assert run.data.params["train.lr"] == "0.02"
    assert run.data.params["data.size"] == "16"
    assert run.data.tags["kind"] == "trial"
    assert "null" not in run.data.tags.values(), "what is not known has no tag"
    assert run.data.tags["mlflow.source.name"] == found["provenance"]["command"]
    assert json.loads(run.data.tags["feedfast.versions"]) == found["provenance"]["versions"]
    assert run.info.run_name == str(out)

    kept = [path for path in [*out.rglob("*"), tools] if path.is_file()]
    for secret in (*SECRETS.values(), "hunter2hunter2"):
        assert [path for path in kept if secret.encode() in path.read_bytes()] == []


KILLED_AT_STEP_9 = """
import json, os, signal, sys, time
from pathlib import Path
sys.argv = ["feedfast", *sys.argv[1:]]
from feedfast.cli import main
from feedfast.stages.loop import Trainer
step = Trainer.step
def killed(self, index, batch):
    if index == 9:
        out = Path(os.environ["RUN"])  # the loggers have the rows before
        for _ in range(1000):
            time.sleep(0.1)
            if (out / "mlflow.json").exists() and (out / "wandb.json").exists():
                if json.loads((out / "wandb.json").read_text())["seen"].get("loss") == 9:
                    break
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index, batch)
Trainer.step = killed
main()
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_the_same_one(recipe: Path, tmp_path: Path, tools: Path) -> None:
    """Killed three steps after its checkpoint: no row twice, none missing in MLflow, one run in each tool."""
    out = tmp_path / "out"
    line = ["train", str(recipe), f"train.out={out}", ALL]
    env = {**os.environ, "RUN": str(out), "OMP_NUM_THREADS": "1"}  # as here: sums of several threads round otherwise
    env.pop("WANDB_SERVICE", None)  # of W&B in this process, which would go on holding the run after the kill
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_AT_STEP_9, *line], env=env, timeout=240, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row][-1] == 9
    assert feedfast(*line).code == 0
    expected = written(out)
    steps = {key for key in expected if key[0] not in ("images_per_second", "data_wait_fraction")}

    (run,) = mlflow_runs()
    there = mlflow_rows(run)
    assert {key: there[key] for key in steps} == {key: expected[key] for key in steps}
    assert there.keys() == expected.keys()
    assert run.info.status == "FINISHED"

    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {f"run-{config(files[1])['id']}"} == {file.stem for file in files}
    rows = by_name([row for file in files for row in history(file)])
    assert [key for key, values in rows.items() if len(values) > 1] == []
    # W&B writes in a process of its own, and what that held when ours was killed may never have reached its file
    there = steps & rows.keys()
    assert {key: rows[key] for key in there} == {key: expected[key] for key in there}
    assert {key for key in steps - there if key[1] > 9} == set()
    board = tensorboard_rows(out)
    assert {key: board[key] for key in steps} == {key: [float(np.float32(v)) for v in expected[key]] for key in steps}


@pytest.mark.slow
def test_of_several_ranks_the_first_logs(recipe: Path, tmp_path: Path, tools: Path) -> None:
    patient = (
        "from feedfast.report import loggers; loggers.FINISH_SECONDS = 600.0; from feedfast.cli import main; main()"
    )
    done = run_ranks(["-c", patient, "train", recipe, f"train.out={tmp_path}/out", 'train.loggers="mlflow"'])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr
    (run,) = mlflow_runs()
    assert mlflow_rows(run) == written(tmp_path / "out")


class Kept:
    """A logger of a list."""

    rows: list[tuple[int, Mapping[str, float]]]
    ended: tuple[Any, str]

    def __init__(self, about: About) -> None:
        type(self).rows = []

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        type(self).rows += rows

    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        type(self).ended = result, ended


class NoStart(Kept):
    def __init__(self, about: About) -> None:
        raise ConnectionError("https://me:hunter2hunter2@example.org is away")


class FullDisk(Kept):
    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        raise OSError(28, "No space left on device")


class NoEnd(Kept):
    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        raise RuntimeError("\x1b[31mno end")


class Hangs(Kept):
    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        time.sleep(3)


@pytest.fixture
def about(tmp_path: Path) -> About:
    return About(tmp_path, 0, "runs/x", {}, {})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoStart, "ConnectionError: https://***@example.org is away"),
        (FullDisk, "No space left on device"),
        (NoEnd, r"\x1b[31mno end"),
        (Hangs, "it has not taken all rows 0 s after the end"),
    ],
)
def test_a_logger_that_fails_says_so_once_and_the_run_goes_on(
    kind: type[Kept], said: str, about: About, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "bad", kind)  # type: ignore[arg-type]
    monkeypatch.setitem(loggers.LOGGERS, "good", Kept)  # type: ignore[arg-type]
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.2)
    caplog.set_level(logging.INFO, logger="feedfast")
    with EventLog(about, ["bad", "good"]) as events:
        started = time.perf_counter()
        for step in range(1, 6):
            events.scalars(step, {"loss": float(step)})
        waited = time.perf_counter() - started
        events.result({"steps": 5})
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("bad: ")
    assert said in line
    assert "the run goes on without it" in line
    assert "hunter2" not in line
    assert waited < 2.0, "no row waits for a logger"  # one of the bad ones sleeps longer than that
    assert Kept.rows == [(step, {"loss": float(step)}) for step in range(1, 6)]
    assert Kept.ended == ({"steps": 5}, "finished")
    assert len(read_metrics(about.out / "metrics.jsonl")) == 5


@pytest.mark.parametrize(("error", "word"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_how_a_run_ended_is_told(
    error: type[BaseException], word: str, about: About, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "good", Kept)  # type: ignore[arg-type]

    def run() -> None:
        with EventLog(about, ["good"]):
            raise error

    with pytest.raises(error):
        run()
    assert Kept.ended == (None, word)


def test_a_logger_that_cannot_keep_up_is_left_behind(
    about: About, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows would fill the memory."""
    monkeypatch.setitem(loggers.LOGGERS, "slow", Hangs)  # type: ignore[arg-type]
    monkeypatch.setattr(loggers, "MOST_WAITING", 10)
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.1)
    with EventLog(about, ["slow"]) as events:
        for step in range(1, 40):
            events.scalars(step, {"loss": 0.0})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "10 rows behind" in line


@pytest.mark.slow
def test_a_server_that_is_away(
    about: About, tools: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with EventLog(about, ["mlflow"]) as events:
        events.scalars(1, {"loss": 1.0})
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("feedfast")]
    assert line.startswith("mlflow: MlflowException: ")
    assert "127.0.0.1" in line


@pytest.mark.slow
def test_without_a_login_wandb_logs_offline(
    about: About, tools: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks for nothing, whatever the terminal: nobody may be there."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tools.parent))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tools.parent))
    with EventLog(about, ["wandb"]) as events:
        events.scalars(1, {"loss": 1.0})
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line == "wandb: expected a login (wandb login, or WANDB_API_KEY), found none; it logs offline"
    (file,) = about.out.glob("wandb/offline-run-*/*.wandb")
    assert by_name(history(file)) == {("loss", 1): [1.0]}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loggers.importlib.util.find_spec
    names = ("tensorboard", "wandb", "mlflow")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in names else real(name, *rest))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_package_is_refused_before_anything_runs(name: str, recipe: Path, tmp_path: Path) -> None:
    for command, *more in (["train"], ["sweep", "--set", "seed=0:2", "--out", str(tmp_path / "sweep")]):
        outcome = feedfast(command, recipe, f"train.out={tmp_path / 'out'}", f"train.loggers={name}", *more)
        assert outcome.code == 2
        assert outcome.error.startswith(f"train.loggers: {name} is not installed; expected it with pip install")
        assert (name if name == "tensorboard" else f"'feedfast[{name}]'") + ", or" in outcome.error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_installed")
def test_without_tensorboard_the_default_is_none() -> None:
    assert pick_loggers(None) == pick_loggers([]) == ()
    with pytest.raises(RequestError, match="tensorboard"):
        pick_loggers(["tensorboard"])


def test_a_sweep_names_its_points(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tags, for loggers that have them; other sweeps' commands stay short."""
    settings = ("train.lr=0.1,0.2", "seed=0:1")
    monkeypatch.setattr(loggers, "installed", lambda modules: True)
    points, _ = grid(recipe, settings, ('train.tags=["mine"]', "train.loggers=wandb"), tmp_path / "sweep")
    assert [point.recipe.train.tags for point in points] == [
        ("mine", f"sweep={tmp_path}/sweep"[:128], f"train.lr={lr}", "train.seed=0") for lr in (0.1, 0.2)
    ]
    for point in points:  # its command line says the same
        assert load_recipe(recipe, point.overrides) == point.recipe
    assert all("tags" not in word for point in grid(recipe, settings, (), tmp_path)[0] for word in point.overrides)
