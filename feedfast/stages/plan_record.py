"""What a plan predicted, kept so that the job it was made for can say how far off it was.

``NAME.zarr.plan.json`` lies next to the cache's folder (of a bucket: in the user's ~/.cache/feedfast/plans) and not in
it: a plan comes before there is a cache, and no digest, check or copy of a cache has to know it. It counts for the same
recipe on the same kind of device alone; any other finds no prediction, and so does one whose file is damaged or was
edited. The last plan counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from feedfast.errors import FeedfastError
from feedfast.files import make_dirs, read_sealed, write_sealed
from feedfast.recipe import Recipe
from feedfast.stages.folder import comparable
from feedfast.stages.progress import format_bytes
from feedfast.storage.places import place_of
from feedfast.storage.schema import Compression

log = logging.getLogger(__name__)

_TRAINING = ("batch", "precision", "channels_last", "compile", "optimizer")


def keep_plan(recipe: Recipe, device: torch.device, document: Mapping[str, Any], batch: int) -> None:
    """Write down what `run_plan` found for ``recipe``; a folder that cannot be written to costs only that.

    Args:
        recipe: what was planned.
        device: what it was measured on.
        document: of `run_plan`.
        batch: rows of the batches that were timed.
    """
    share = recipe.train.batch / batch
    student, cached = document["step_ms"] or document["student_ms"], document["cached_step_ms"]
    content = {
        "caching": _key(recipe, device),
        "training": _key(recipe, device, training=True),
        "bytes": document["bytes"],
        "seconds": document["seconds"],
        "compression": document["compression"],
        "cached_step_ms": None if cached is None else cached * share,
        "live_step_ms": None if student is None else (document["teachers_ms"] + student) * share,
        "pays": document["pays"],
    }
    try:
        path = _path(recipe)
        make_dirs(path.parent)
        write_sealed(path, content)
    except (OSError, ValueError, FeedfastError) as error:
        log.info("plan: not kept for later comparison: %s", error)


def predicted_cache(recipe: Recipe, device: torch.device) -> dict[str, Any] | None:
    """``bytes`` and ``seconds`` that were predicted for this recipe's cache, if any were."""
    held = _held(recipe)
    if held is None or held.get("caching") != _key(recipe, device):
        return None
    return {name: held.get(name) for name in ("bytes", "seconds")}


def planned_compression(recipe: Recipe, device: torch.device) -> dict[str, Compression]:
    """Teacher/tap → how its codes are best stored, where this recipe was planned and ``cache.compression`` is auto."""
    held = _held(recipe)
    if recipe.cache.compression != "auto" or held is None or held.get("caching") != _key(recipe, device):
        return {}
    found = held.get("compression")
    return {name: kind for name, kind in found.items() if kind in ("none", "zstd")} if isinstance(found, dict) else {}


def predicted_step(recipe: Recipe, device: torch.device) -> dict[str, Any] | None:
    """``step_ms`` that was predicted for this recipe's student with its source, if any was."""
    held = _held(recipe)
    if held is None or held.get("training") != _key(recipe, device, training=True):
        return None
    if recipe.train.source in ("none", "record"):  # a recording run has steps of both kinds
        return None
    return {"step_ms": held.get("cached_step_ms" if recipe.train.source == "cache" else "live_step_ms")}


def prediction_error(
    job: str, predicted: Mapping[str, Any] | None, found: Mapping[str, float | None]
) -> dict[str, float | None] | None:
    """Found over predicted, minus 1, of each key; logged in one line.

    Args:
        job: begins the line.
        predicted: what was predicted, None = there was no plan.
        found: what came of it; None = not comparable, as the time of half a job.
    """
    if predicted is None:
        return None
    errors = {name: _error(predicted.get(name), value) for name, value in found.items()}
    said = [
        f"{_shown(name, found[name])}, planned {_shown(name, predicted[name])} ({error:+.1%})"
        for name, error in errors.items()
        if error is not None
    ]
    if said:
        log.info("%s: %s", job, "; ".join(said))
    return errors


def _error(predicted: object, found: float | None) -> float | None:
    if found is None or not isinstance(predicted, int | float) or not predicted > 0 or not math.isfinite(found):
        return None
    return found / predicted - 1


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return format_bytes(value)
    return f"{value:,.1f} ms per step" if name == "step_ms" else f"{value:,.1f} s"


def _path(recipe: Recipe) -> Path:
    place = place_of(recipe.cache.path)
    if isinstance(place, str):  # of a bucket: a plan is of this machine in any case
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(home, "feedfast", "plans", f"{name}.plan.json")
    path = Path(os.path.abspath(recipe.cache.path))
    return path.with_name(f"{path.name}.plan.json")


def _held(recipe: Recipe) -> dict[str, Any] | None:
    if recipe.cache.path:
        with contextlib.suppress(OSError, ValueError):
            return read_sealed(_path(recipe))
    return None


def _key(recipe: Recipe, device: torch.device, *, training: bool = False) -> str:
    """16 hex digits over all that decides bytes and times of the caching pass, or of a student's step."""
    tree = comparable(recipe)
    parts = {name: tree[name] for name in ("seed", "data", "cache", "teachers", "method")}
    parts["cache"] = {key: value for key, value in parts["cache"].items() if key != "path"}
    parts["compression"] = recipe.cache.compression  # no part of a run, but of its bytes and times
    parts["device"], parts["threads"] = device.type, recipe.train.threads
    if training:
        parts |= {"student": tree["student"], "task": tree["task"]}
        parts["train"] = {name: tree["train"][name] for name in _TRAINING}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
