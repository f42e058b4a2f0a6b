"""The folder of a run: whose it is, and what in it may be replaced.

``recipe.json`` says which recipe a folder belongs to. An existing result is resumed or refused, and replaced only
with ``overwrite=true``. Checking (`check_run_dir`) and starting (`start_run_dir`) are two steps: nothing is written or
removed before data, teachers, cache and networks have all been opened. A typo in a recipe must cost neither yesterday's
weights nor a refusal of the corrected recipe.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_json, refuse_links, remove_temporary, write_json
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.checkpoint import CHECKPOINT

RECIPE = "recipe.json"
BRANCH = "branch.pt"
TENSORBOARD = "tensorboard"
RESULTS = (CHECKPOINT, "student.pt", BRANCH, "metrics.jsonl", "result.json", "report.html")


def check_run_dir(out: Path, recipe: Recipe, key: str = "train.out") -> bool:
    """Whether ``out`` holds an earlier part of this very run. Makes the folder, which shows that it can be made.

    Raises:
        RequestError: it holds another run or somebody's results, or it cannot be made or written to.
        FeedfastError: its ``recipe.json`` is damaged.
    """
    ensure_dir(out, key)
    refuse_links(out, out / TENSORBOARD)
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
        theirs = _with_defaults(read_json(held))
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


def start_run_dir(out: Path, recipe: Recipe) -> None:
    """Start a run in ``out``: an older result goes, also what a killed run left; ``recipe.json`` is written."""
    remove_temporary(out)
    for path in (*(out / name for name in RESULTS), *(out / TENSORBOARD).glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
    write_json(out / RECIPE, comparable(recipe))


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
        "train": ("out", "max_steps", "threads", "replay", "log_every", "checkpoint_minutes", "eval_every", "device"),
        "data": ("threads", "check"),
        "cache": ("threads", "part"),
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
