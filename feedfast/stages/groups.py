"""Finished runs, read from their folders alone, and the groups that differ in nothing but seeds.

A group is called after its method, and after those keys of its recipe that tell it from others of that method.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.folder import RECIPE, comparable
from feedfast.stages.trainee import method_entries, names_of

RESULT = "result.json"
_DEEPEST = 4  # folders below one that is given in which runs are looked for
_SEEDS = ("seed", "train.seed")  # what two runs of one kind may differ in
# What differs as a consequence of something else: named only where nothing else tells two groups apart.
_CONSEQUENCES = ("cache.path", "train.source", "steps")


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        path: its folder.
        recipe: its recipe, without the keys that change no result.
        result: its ``result.json``.
        metric: the name of its score, as ``val_accuracy``; its value is ``score``, None where nothing was validated.
    """

    path: Path
    recipe: Recipe
    result: Mapping[str, Any]
    metric: str
    score: float | None

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the views, and of the student's start."""
        return self.recipe.seed, self.recipe.train_seed


def find_runs(places: Sequence[str | Path]) -> list[Run]:
    """The finished runs in folders, or below them, by path; each once.

    Raises:
        RequestError: a folder has none.
    """
    found: dict[Path, Run] = {}
    for place in map(Path, places):
        folders = [place] if (place / RESULT).is_file() else sorted(_below(place, _DEEPEST))
        if not folders:
            raise RequestError(
                f"{place}: expected a finished run of feedfast train, or a folder of some, found no {RESULT}"
            )
        for folder in folders:
            found.setdefault(folder.resolve(), _read(folder))
    return list(found.values())


def _below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                if (entry / RESULT).is_file() and (entry / RECIPE).is_file():
                    found.append(entry)
                elif depth > 1:
                    found += _below(entry, depth - 1)
    return found


def _read(folder: Path) -> Run:
    trees = []
    for name in (RECIPE, RESULT):
        try:
            trees.append(read_sealed(folder / name))
        except FileNotFoundError:
            raise RequestError(f"{folder}: expected a finished run of feedfast train, found no {name}") from None
        except (OSError, ValueError) as error:
            raise FeedfastError(f"{folder / name}: cannot be read ({error}); train this run again") from error
    tree, result = trees
    metric = next((key for key in result if key.startswith("val_") and key != "val_metrics"), "val_accuracy")
    score = result.get(metric)
    if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
        raise FeedfastError(f"{folder / RESULT}: {metric}: expected a number, found {score!r}; train this run again")
    for key in ("steps", "parameters", "step_ms", "seconds"):
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FeedfastError(f"{folder / RESULT}: {key}: expected a number, found {value!r}; train this run again")
    return Run(folder, parse_recipe(tree, where=str(folder / RECIPE)), result, metric, score)


def planned_names(recipes: Sequence[Recipe]) -> list[str]:
    """What `grouped` will call the runs of these recipes."""
    return list(grouped([Run(Path(), recipe, {"steps": 0}, "", None) for recipe in recipes]))


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their group, in the order they were given.

    Raises:
        RequestError: they are of several tasks.
    """
    metrics = sorted({run.metric for run in runs})
    if len(metrics) > 1:
        raise RequestError(f"runs: expected those of one task, found scores {', '.join(metrics)}; compare them apart")
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        members[json.dumps(kind_of(run), sort_keys=True)].append(run)
    together = _without_caches_of_seeds(list(members.values()))
    return dict(zip(_names(together), together, strict=True))


def _without_caches_of_seeds(groups: Sequence[list[Run]]) -> list[list[Run]]:
    """Groups, those as one that differ in nothing but the cache, because their views have other seeds."""
    found: dict[str, list[list[Run]]] = defaultdict(list)
    for runs in groups:
        alike = found[json.dumps({**kind_of(runs[0]), "cache.path": ""}, sort_keys=True)]
        seeds = {run.recipe.seed for run in runs}
        other = next((some for some in alike if not seeds & {run.recipe.seed for run in some}), None)
        if other is None:
            alike.append(list(runs))
        else:
            other += runs
    return [runs for alike in found.values() for runs in alike]


def kind_of(run: Run) -> dict[str, Any]:
    """Dotted keys of what a run is, seeds aside; teachers and methods by name, lists as they are."""
    tree = comparable(run.recipe)
    listed = "+".join(entry["name"] for entry in tree["teachers"])
    tree["teachers"] = {entry.pop("name"): entry for entry in tree["teachers"]}
    several = len(tree["method"]) > 1
    tree["method"] = {str(n): entry for n, entry in enumerate(tree["method"])} if several else tree["method"][0]
    flat = {**_flat(tree), "teachers": listed, "steps": run.result.get("steps")}
    return {key: value for key, value in flat.items() if key not in _SEEDS}


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {key: tree}
    parts = [_flat(value, f"{key}.{name}" if key else name) for name, value in tree.items()]
    return {name: value for part in parts for name, value in part.items()}


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The method's name of each group, and `key=value` for what tells it from the others of that method."""
    kinds, methods = [kind_of(runs[0]) for runs in groups], [method_of(runs[0]) for runs in groups]
    telling = {
        name: telling_keys([kind for kind, method in zip(kinds, methods, strict=True) if method == name])
        for name in dict.fromkeys(methods)
    }
    found = []
    for kind, method in zip(kinds, methods, strict=True):
        said = [f"{key}={_value(kind[key])}" for key in telling[method] if key in kind]
        found.append(", ".join([method, *said]))
    if len(set(found)) == len(found):
        return found
    return [f"{name} ({number})" if found.count(name) > 1 else name for number, name in enumerate(found, start=1)]


def telling_keys(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A few keys by which all of these differ; the first is the one that tells most of them apart, and so on."""
    chosen: list[str] = []
    keys = sorted({key for kind in kinds for key in kind}, key=lambda key: (key in _CONSEQUENCES, key.count("."), key))

    def apart(by: Sequence[str]) -> int:
        return len({json.dumps([kind.get(key) for key in by], sort_keys=True) for kind in kinds})

    while apart(chosen) < len(kinds):
        best = max(keys, key=lambda key: apart([*chosen, key]))  # of equal ones the first
        if apart([*chosen, best]) == apart(chosen):
            break
        chosen.append(best)
    return sorted(chosen)


def method_of(run: Run) -> str:
    """``kd``, or ``kd + ofd``."""
    return names_of(method_entries(run.recipe.method))


def _value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "op" in item for item in value):
        return "+".join(str(item["op"]) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
