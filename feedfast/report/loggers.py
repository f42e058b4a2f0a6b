"""Loggers people already have: TensorBoard, Weights & Biases and MLflow, each behind the same three calls.

    start (making one) ──► log(rows)... ──► finish(result)

Each runs in a thread of its own (`Background`), so that a server that is slow or away costs a run nothing: its first
failure is said once, as a warning, and the run goes on without it. What a run is called and where it goes is decided by
the tools' own environment variables, as their users know them; the recipe only names the tools.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from feedfast.errors import RequestError, printable
from feedfast.files import parse_json
from feedfast.provenance import redacted

__all__ = ["LOGGERS", "MODULES", "About", "Background", "Logger", "installed", "pick_loggers"]

log = logging.getLogger(__name__)

Row = tuple[int, Mapping[str, float]]
"""Step, and values by name."""

WANDB_STATE: Final = "wandb.json"
MLFLOW_STATE: Final = "mlflow.json"
STATES: Final = (WANDB_STATE, MLFLOW_STATE)
"""Files in a run's folder that say which run of a tool it is."""

FINISH_SECONDS: Final = 60.0  # what a run waits for its loggers at its end
MOST_WAITING: Final = 20_000  # rows; a logger that is further behind will never catch up
_MLFLOW_METRICS, _MLFLOW_PARAMS = 1000, 100  # of one request
_MLFLOW_VALUE = 5000  # characters


@dataclass(frozen=True)
class About:
    """A run, as its loggers are told of it when they start.

    Attributes:
        out: its folder.
        step: that it is continued from; 0 = it begins.
        name: what people call it: ``train.out``.
        recipe: as JSON values.
        provenance: command, commit, versions, machine and environment, as JSON values.
        tags: words, or ``key=value``, by which it is to be found.
    """

    out: Path
    step: int
    name: str
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    tags: tuple[str, ...] = ()


class Logger(Protocol):
    """A tool that keeps the rows of a run. It is made with an `About`; any of it may raise whatever it likes."""

    def log(self, rows: Sequence[Row]) -> None:
        """Keep rows; those that it has from before a resume may come again, and are left out."""

    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        """The run has ended.

        Args:
            result: the JSON of `feedfast train`; None where it was not reached.
            ended: "finished", "failed" or "interrupted".
        """


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = about.out / "tensorboard"
        self._after = about.step if any(folder.glob("events.out.tfevents.*")) else 0
        purged = about.step + 1 if about.step else None
        self._board: Any = SummaryWriter(str(folder), purge_step=purged)

    def log(self, rows: Sequence[Row]) -> None:
        """See `Logger`."""
        for step, values in rows:
            if step > self._after:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        """See `Logger`."""
        self._board.close()


class WandB:
    """A run of Weights & Biases, whose files lie in ``wandb/`` of the run's folder (or in WANDB_DIR).

    Rows carry ``step`` as a value that charts are drawn over, because W&B's own count only ever grows.
    """

    def __init__(self, about: About) -> None:
        import wandb

        self._path = about.out / WANDB_STATE
        held = _held(self._path)
        self._id = str(held.get("id") or secrets.token_hex(8))
        self._seen: dict[str, int] = dict(held.get("seen") or {})  # value → the last step it was logged for
        mode: Literal["offline"] | None = None
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            log.warning("wandb: expected a login (wandb login, or WANDB_API_KEY), found none; it logs offline")
        self._run: Any = wandb.init(
            id=self._id,
            resume="allow",
            mode=mode,
            project=None if "WANDB_PROJECT" in os.environ else "feedfast",
            name=None if "WANDB_NAME" in os.environ else about.name[-128:],
            dir=os.environ.get("WANDB_DIR", str(about.out)),
            config={**about.recipe, "provenance": dict(about.provenance)},
            tags=[*filter(None, os.environ.get("WANDB_TAGS", "").split(",")), *(tag[:64] for tag in about.tags)],
            # Its run stays out of the way of a caller's own, and of what this process prints. What W&B collects itself
            # (x_*_meta) holds arguments with whatever logins stand there; `provenance` says the same without them.
            settings=wandb.Settings(console="off", silent=True, reinit="create_new", x_disable_meta=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        offline = f"offline; wandb sync {Path(self._run.dir).parent} uploads it"
        log.info("wandb: %s", offline if self._run.offline else self._run.url)

    def log(self, rows: Sequence[Row]) -> None:
        """See `Logger`."""
        new: list[dict[str, float]] = []
        for step, values in rows:
            fresh = {name: value for name, value in values.items() if step > self._seen.get(name, -1)}
            self._seen.update(dict.fromkeys(fresh, step))
            if fresh:
                new.append({"step": step, **fresh})
        if new:
            # first: what is killed in between has a row less, which is better than one twice
            _hold(self._path, {"id": self._id, "seen": self._seen})
        for row in new:
            self._run.log(row)

    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        """See `Logger`."""
        self._run.summary.update({f"result/{name}": value for name, value in _numbers(result)})
        self._run.finish(exit_code=0 if ended == "finished" else 1)


class MLflow:
    """A run of MLflow, in the experiment of MLFLOW_EXPERIMENT_NAME at MLFLOW_TRACKING_URI.

    What it has already, its server knows: rows that are new to it are the only ones that are sent.
    """

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # how it makes its tables
        self._client = MlflowClient()
        self._there: dict[str, set[int]] = {}
        path = about.out / MLFLOW_STATE
        self._id, self._known = self._earlier(str(_held(path).get("run", ""))), True
        if self._id:
            self._client.set_terminated(self._id, status="RUNNING")
            return
        self._known = False
        made = self._client.create_run(self._experiment(), run_name=about.name[-250:], tags=_mlflow_tags(about))
        self._id = made.info.run_id
        _hold(path, {"run": self._id, "tracking_uri": redacted(self._client.tracking_uri)})
        self._describe(about.recipe)

    def _earlier(self, run: str) -> str:
        """``run`` if the server has it; else "": it may be another server than before."""
        from mlflow.exceptions import MlflowException

        if run:
            try:
                self._client.get_run(run)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return ""
        return run

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "feedfast")
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run of a sweep was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _describe(self, recipe: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_mlflow_name(key), str(value)[:_MLFLOW_VALUE]) for key, value in _flat(recipe)]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MLFLOW_PARAMS])

    def _has(self, name: str) -> set[int]:
        """Steps for which the server has a value."""
        if name not in self._there:
            history = self._client.get_metric_history(self._id, name) if self._known else []
            self._there[name] = {metric.step for metric in history}
        return self._there[name]

    def log(self, rows: Sequence[Row]) -> None:
        """See `Logger`."""
        from mlflow.entities import Metric

        now, new = int(time.time() * 1000), []
        for step, values in rows:
            for name, value in values.items():
                key = _mlflow_name(name)
                if step not in self._has(key):
                    self._there[key].add(step)
                    new.append(Metric(key, float(value), now, step))
        for start in range(0, len(new), _MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=new[start : start + _MLFLOW_METRICS])

    def finish(self, result: Mapping[str, Any] | None, ended: str) -> None:
        """See `Logger`."""
        if result is not None:
            self.log([(int(result["steps"]), {f"result/{name}": value for name, value in _numbers(result)})])
        self._client.set_terminated(
            self._id, status={"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[ended]
        )


LOGGERS: Final[Mapping[str, Callable[[About], Logger]]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
MODULES: Final = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "tensorboard": ("tensorboard",)}
"""What each logger imports."""


def pick_loggers(asked: Sequence[str] | None) -> tuple[str, ...]:
    """The loggers of a run.

    Args:
        asked: names of `LOGGERS`; None = TensorBoard, where it is installed.

    Raises:
        RequestError: one is not installed; the sentence names the extra.
    """
    if asked is None:
        return ("tensorboard",) if installed(MODULES["tensorboard"]) else ()
    for name in asked:
        if not installed(MODULES[name]):
            package = f"'feedfast[{name}]'" if name in ("wandb", "mlflow") else name
            raise RequestError(
                f"train.loggers: {name} is not installed; expected it with pip install {package}, "
                "or another list of loggers"
            )
    return tuple(dict.fromkeys(asked))


def installed(modules: Sequence[str]) -> bool:
    """Whether all of some modules could be imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


class Background:
    """A logger in a thread of its own. Nothing here raises, and only `join` waits, for so long at most."""

    def __init__(self, name: str, start: Callable[[About], Logger], about: About) -> None:
        self._name, self._start, self._about = name, start, about
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._end: tuple[Mapping[str, Any] | None, str] = (None, "interrupted")
        self._failed = threading.Lock()  # taken by the first thread that fails, and never given back
        # a daemon: one that hangs does not keep the process
        self._thread = threading.Thread(target=self._work, name=f"feedfast-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A row, for later."""
        if self._failed.locked():
            return
        if self._rows.qsize() > MOST_WAITING:
            self._fail(f"it is {MOST_WAITING:,} rows behind")
            return
        self._rows.put((step, values))

    def ending(self, result: Mapping[str, Any] | None, ended: str) -> None:
        """There are no more rows; see `Logger.finish`."""
        self._end = result, ended
        self._rows.put(None)

    def join(self) -> None:
        """Wait until all is kept, at most `FINISH_SECONDS`."""
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._fail(f"it has not taken all rows {FINISH_SECONDS:.0f} s after the end")

    def _work(self) -> None:
        try:
            logger = self._start(self._about)
            rows: list[Row | None] = []
            while not self._failed.locked() and None not in rows:
                rows = [self._rows.get(), *_waiting(self._rows)]
                logger.log([row for row in rows if row is not None])
            if not self._failed.locked():
                logger.finish(*self._end)
        except Exception as error:  # of tools that are not ours: whatever it is, the run does not end of it
            log.debug("%s", self._name, exc_info=True)
            self._fail(redacted(f"{type(error).__name__}: {error}").strip().partition("\n")[0][:300])

    def _fail(self, why: str) -> None:
        if self._failed.acquire(blocking=False):
            log.warning("%s: %s; the run goes on without it, metrics.jsonl has every row", self._name, printable(why))


def _waiting(rows: queue.SimpleQueue[Row | None]) -> Iterator[Row | None]:
    while True:
        try:
            yield rows.get_nowait()
        except queue.Empty:
            return


def _held(path: Path) -> dict[str, Any]:
    """A state file, as far as it can be read."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hold(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a state file. Not synced: it is written for every row, and a crash of the machine costs a few at most."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(state))
    temporary.replace(path)


def _numbers(result: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    for name, value in (result or {}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    if isinstance(tree, (dict, list, tuple)) and tree:
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def _mlflow_name(text: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _mlflow_tags(about: About) -> dict[str, str]:
    made = about.provenance
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": made.get("command")}
    tags["mlflow.source.git.commit"] = made.get("commit")
    for name, value in made.items():
        tags[f"feedfast.{name}"] = value if value is None or isinstance(value, str) else json.dumps(value)
    for tag in about.tags:
        name, equals, value = tag.partition("=")
        tags[_mlflow_name(name)] = value if equals else "true"
    return {name: str(value)[:_MLFLOW_VALUE] for name, value in tags.items() if value is not None}
