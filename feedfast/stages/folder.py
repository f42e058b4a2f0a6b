"""The folder of a run: whose it is, and what in it may be replaced.

``recipe.json`` says which recipe a folder belongs to, ``identity.json`` what the run was trained on: a recipe names
files, and files change. An existing result is resumed or refused, and replaced only with ``overwrite=true``. Checking
(`check_run_dir`, `resumed_run`) and starting (`start_run_dir`) are two steps: nothing is written or removed before
data, teachers, cache and networks have all been opened. A typo in a recipe must cost neither yesterday's weights nor a
refusal of the corrected recipe. All of that, and the run, happens under the folder's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from feedfast.errors import BusyError, FeedfastError, RequestError
from feedfast.files import read_sealed, refuse_links, remove_temporary, write_json, write_sealed
from feedfast.provenance import Provenance, began_with
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.loggers import STATES
from feedfast.stages.checkpoint import CHECKPOINT
from feedfast.stages.probe import same_outputs

RECIPE = "recipe.json"
IDENTITY = "identity.json"
LOCK = "run.lock"
PROVENANCE = "provenance.json"
BRANCH = "branch.pt"
MAX_PROCESSES = 256
MAX_PROVENANCE_BYTES = 64 << 20  # 64 MiB
TENSORBOARD = "tensorboard"
WANDB = "wandb"
RESULTS = (CHECKPOINT, "student.pt", BRANCH, "metrics.jsonl", "result.json", "report.html", PROVENANCE, *STATES)


class RunLock:
    """A run folder that is this process's alone until it is closed, or the process ends. A context manager.

    The file goes when the lock does: a refused request leaves none. Whoever took it just before that begins again.
    """

    def __init__(self, out: Path, key: str = "train.out") -> None:
        """Take it.

        Raises:
            BusyError: another process has it; ``key`` begins the message.
            RequestError: files cannot be locked there.
        """
        self._fd = -1
        self._path = path = out / LOCK
        try:
            while not self._is_ours():
                self._release()
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise BusyError(
                f"{key}: another process is at work in {out}; expected a folder of its own for each run: wait for that "
                "one to end, or choose another"
            ) from None
        except OSError as error:
            self._release()
            raise RequestError(f"{key}: {path} cannot be locked ({error.strerror}); choose another folder") from error

    def _is_ours(self) -> bool:
        """Whether the file that is locked is still the one of that name."""
        if self._fd < 0:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        return False

    def close(self) -> None:
        """Give it back."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._release()

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def check_run_dir(out: Path, recipe: Recipe, key: str = "train.out") -> bool:
    """Whether ``out``, an existing folder, holds an earlier part of this very run.

    Raises:
        RequestError: it holds another run or somebody's results.
        FeedfastError: its ``recipe.json`` is damaged.
    """
    for name in (TENSORBOARD, WANDB):
        refuse_links(out, out / name)
    held = out / RECIPE
    if recipe.overwrite:
        return False
    if not held.is_file():
        foreign = [name for name in RESULTS if (out / name).exists()]
        if foreign:
            raise RequestError(
                f"{key}: {out} holds {', '.join(foreign)} without the {RECIPE} of a run; "
                "expected another folder or overwrite=true"
            )
        return False
    try:
        theirs = _with_defaults(read_sealed(held))
    except (OSError, ValueError) as error:
        raise FeedfastError(f"{held}: cannot be read ({error}); overwrite=true starts afresh") from error
    differing = differences(theirs, comparable(recipe))
    if differing:
        lines = "".join(f"\n  {name}: there {there!r}, here {here!r}" for name, there, here in differing)
        raise RequestError(f"{key}: {out} holds another run; expected the same recipe or overwrite=true, found{lines}")
    return (out / CHECKPOINT).is_file()


def _with_defaults(tree: Any) -> Any:
    """An older recipe.json with the keys that have come since: a run of yesterday's version can be continued."""
    try:
        return comparable(parse_recipe(tree if isinstance(tree, dict) else {}))
    except FeedfastError:  # of a version whose keys are no longer known: compared as it is
        return tree


def resumed_run(out: Path, identity: Mapping[str, Any], key: str = "train.out") -> str:
    """The name of the run in ``out``, which was trained on what it is to be continued with.

    Args:
        out: its folder, of which `check_run_dir` said that it can be continued.
        identity: what this run would be trained on.
        key: begins the message.

    Raises:
        RequestError: it was trained on something else.
        FeedfastError: a file of it is damaged or missing.
    """
    held = out / IDENTITY
    try:
        theirs = read_sealed(held)
    except (OSError, ValueError) as error:
        raise FeedfastError(f"{held}: cannot be read ({error}); overwrite=true starts afresh") from error
    differing = _moved(theirs, json.loads(json.dumps(identity)))
    if differing:
        lines = "".join(f"\n  {name}: there {there!r}, here {here!r}" for name, there, here in differing)
        raise RequestError(
            f"{key}: {out} was trained on something else; put the old data, cache and teachers back, choose another "
            f"folder, or say overwrite=true; found{lines}"
        )
    return _name_of(read_sealed(out / RECIPE), theirs)


def _moved(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`differences`, but what teachers compute is a measurement: it may differ by what other kernels round."""
    both = [{**tree, "teachers": dict(tree.get("teachers", {}))} for tree in (there, here)]
    for name in both[0]["teachers"].keys() & both[1]["teachers"].keys():
        one, two = (tree["teachers"][name] for tree in both)
        if same_outputs(one["precision"], one["outputs"], two["outputs"]):
            both[1]["teachers"][name] = {**two, "outputs": one["outputs"]}
    return differences(both[0], both[1])


def _name_of(recipe: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """What a checkpoint calls the run it is of: 16 hex digits over recipe and identity as they are stored."""
    text = json.dumps([recipe, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def start_run_dir(out: Path, recipe: Recipe, identity: Mapping[str, Any]) -> str:
    """Start a run in ``out``: an older result goes, recipe and identity are written; returns the run's name."""
    remove_temporary(out)
    for path in (*(out / name for name in RESULTS), *(out / TENSORBOARD).glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
    # The identity first: a folder with a recipe and without it would be one of an unknown run.
    write_sealed(out / IDENTITY, identity)
    write_sealed(out / RECIPE, comparable(recipe))
    return _name_of(read_sealed(out / RECIPE), read_sealed(out / IDENTITY))


def record_process(out: Path, process: Provenance) -> None:
    """Name a process among those that trained the run in ``out``; at its start, and again when it has ended."""
    known = began_with(processes_of(out), process, MAX_PROCESSES)
    write_json(out / PROVENANCE, {"processes": [entry.model_dump(mode="json") for entry in known]})


def processes_of(out: Path) -> tuple[Provenance, ...]:
    """The processes that trained the run in ``out``, as far as its file can be read: it is only shown."""
    path = out / PROVENANCE
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_PROVENANCE_BYTES:
            return _Processes.model_validate_json(path.read_bytes()).processes
    return ()


class _Processes(BaseModel):
    processes: tuple[Provenance, ...]


def ensure_dir(path: Path, key: str) -> Path:
    """``path``, made if need be.

    Raises:
        RequestError: it cannot be made, or not be written to; ``key`` begins the message.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{key}: expected a folder, {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise RequestError(f"{key}: expected a folder to write in, {path} is read-only")
    return path


def comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON without the keys that do not change the result of a run."""
    tree = recipe.model_dump(mode="json")
    tree.pop("overwrite")
    for section, keys in {
        "train": (
            "out",
            "max_steps",
            "threads",
            "replay",
            "check_teachers",
            "log_every",
            "checkpoint_minutes",
            "eval_every",
            "device",
            "residency",
            "loggers",
            "tags",
        ),
        "data": ("threads", "check"),
        "cache": ("threads", "part", "compression", "local", "local_gb"),
    }.items():
        for key in keys:
            tree[section].pop(key)
    return tree


def differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ between two JSON trees."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for name in sorted(there.keys() | here.keys()):
            found += differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
        return found
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [
            item for n, pair in enumerate(zip(there, here, strict=True)) for item in differences(*pair, f"{key}.{n}")
        ]
    return [] if there == here else [(key, there, here)]
