"""A grid of runs over one cache: every combination of values for some keys of a recipe, each in a folder of its own.

    recipe + {method.name: kd, ofd} x {train.seed: 0, 1, 2} ──► caches, once ──► runs ──► compare

A point of the grid is nothing but `feedfast train RECIPE KEY=VALUE...`, so it can be run by hand or by a scheduler, and
a sweep has little state of its own: ``sweep.json`` says which points have ended. All points are checked before the
first one runs. One that fails is named and left out; the same command tries it again, and what is done stays done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, write_sealed
from feedfast.recipe import Recipe, load_recipe
from feedfast.stages.compare import RESULT, run_compare
from feedfast.stages.folder import RECIPE, comparable, ensure_dir
from feedfast.stages.offline import run_cache
from feedfast.stages.record import usable_cores
from feedfast.stages.student import run_train
from feedfast.stages.trainee import method_entries
from feedfast.stages.worker import Worker

log = logging.getLogger(__name__)

STATE = "sweep.json"
MAX_POINTS = 10_000
_LONGEST_NAME = 120  # of a folder; file systems take 255 bytes
_PATIENCE_S = 0.1  # between two looks at running processes


@dataclass(frozen=True)
class Point:
    """One run of the grid.

    Attributes:
        name: of its folder below the sweep's.
        overrides: what follows `feedfast train RECIPE`.
        recipe: the recipe with them.
    """

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def key(self) -> str:
        """16 hex digits over all that decides the result: points of one key are one run."""
        return hashlib.sha256(json.dumps(comparable(self.recipe), sort_keys=True).encode()).hexdigest()[:16]


def run_sweep(
    recipe: Path,
    settings: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    out: Path,
    jobs: int = 1,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Run every point of the grid that has not ended, and compare them all.

    Args:
        recipe: a TOML recipe.
        settings: ``key=v1,v2,…`` or ``key=first:stop`` (whole numbers, without stop) per swept key.
        overrides: ``key=value`` for all points.
        out: folder of the sweep.
        jobs: runs at a time; several are processes of their own, which share cores and GPUs evenly.
        baseline: see `run_compare`.

    Returns:
        The JSON of `feedfast sweep`: ``runs`` (name → folder), ``shared`` (name → the point of equal settings that runs
        for it), ``done``, ``failed`` (name → why), ``seconds``, and ``compare`` (see `run_compare`; None where no
        run has ended).

    Raises:
        RequestError: a key, value or combination that is none, before anything runs.
        FeedfastError: a cache cannot be made.
    """
    started = time.perf_counter()
    world = Worker.from_env().world
    if world > 1:
        raise RequestError(f"sweep: expected one process, found {world} ranks; its runs can be started one by one")
    points, shared = grid(recipe, settings, overrides, out)
    ensure_dir(out, "--out")
    ended = _ended(out, points)
    waiting = [point for point in points if point.name not in ended]
    log.info("sweep: %d runs in %s, %d of them done%s", len(points), out, len(ended), _shared_words(shared))
    for cached in _caches(waiting):
        run_cache(cached)
    failed: dict[str, str] = {}
    for point, error in _results(waiting, recipe, jobs, out):
        if error is None:
            ended[point.name] = point.key
            write_sealed(out / STATE, ended)
        else:
            failed[point.name] = error
            log.error("sweep: %s failed: %s", point.name, error)
        _tell(len(ended), len(failed), len(points), len(waiting), started)
    folders = [point.recipe.train.out for point in points if point.name in ended]
    return {
        "runs": {point.name: point.recipe.train.out for point in points},
        "shared": shared,
        "done": len(ended),
        "failed": failed,
        "seconds": time.perf_counter() - started,
        "compare": run_compare(folders, out, baseline) if folders else None,
    }


def sweep_script(recipe: Path, settings: Sequence[str], overrides: Sequence[str] = (), *, out: Path) -> str:
    """A Slurm array of the points that have not ended, one task each; caches must be there, or are made first.

    Raises:
        RequestError: as `run_sweep`.
    """
    points, _ = grid(recipe, settings, overrides, out)
    ended = _ended(out, points)
    waiting = [point for point in points if point.name not in ended and not _has_result(point)]
    if not waiting:
        return f"# all {len(points)} runs of this sweep have ended; feedfast sweep compares them"
    commands = "\n".join(f"  {shlex.quote(shlex.join(_words(recipe, point)))}" for point in waiting)
    return f"""#!/bin/bash
#SBATCH --job-name=feedfast-sweep
#SBATCH --array=0-{len(waiting) - 1}
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --output={shlex.quote(str(out))}/slurm-%A-%a.log
# {len(waiting)} of {len(points)} runs; the cache must be there: feedfast cache {shlex.quote(str(recipe))}
# afterwards the same feedfast sweep without --print compares them
runs=(
{commands}
)
eval "feedfast ${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


def grid(
    recipe: Path, settings: Sequence[str], overrides: Sequence[str], out: Path
) -> tuple[list[Point], dict[str, str]]:
    """The points in order, of equal ones the first, and name → its name for the others.

    Raises:
        RequestError: see `run_sweep`.
    """
    axes = [_axis(text) for text in settings]
    if not axes:
        raise RequestError("--set: expected at least one key=v1,v2,... to sweep over, found none")
    keys = [key for key, _ in axes]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise RequestError(f"--set: {repeated[0]}: expected each key once, found it {keys.count(repeated[0])} times")
    size = 1
    for _, values in axes:
        size *= len(values)
    if size > MAX_POINTS:
        raise RequestError(
            f"--set: expected at most {MAX_POINTS:,} combinations, found {size:,}; sweep over fewer values"
        )
    points: dict[str, Point] = {}
    shared: dict[str, str] = {}
    for combination in itertools.product(*(values for _, values in axes)):
        point = _point(recipe, list(zip(keys, combination, strict=True)), overrides, out)
        first = points.setdefault(point.key, point)
        if first is not point:
            shared[point.name] = first.name
    _refuse_shared_caches(list(points.values()))
    return list(points.values()), shared


def _axis(text: str) -> tuple[str, list[str]]:
    """``method.name=kd,ofd`` → the key and its values as they stand; ``seed=0:3`` → 0, 1, 2."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or not raw.strip():
        raise RequestError(f"--set {text!r}: expected key=v1,v2,... or key=first:stop, as train.seed=0:3")
    # views are the cache's: one cache serves every seed of a sweep
    key = "train.seed" if key == "seed" else key
    numbers = re.fullmatch(r"\s*(\d{1,9}):(\d{1,9})\s*", raw)
    values = [str(number) for number in range(int(numbers[1]), int(numbers[2]))] if numbers else _split(raw)
    if not values or not all(values):
        raise RequestError(f"--set {text!r}: expected values, found an empty one")
    doubled = sorted({value for value in values if values.count(value) > 1})
    if doubled:
        raise RequestError(f"--set {text!r}: expected different values, found {doubled[0]!r} more than once")
    return key, values


def _split(raw: str) -> list[str]:
    """At commas that are in no brackets and no quotes."""
    found, depth, quote = [""], 0, ""
    for letter in raw:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            found.append("")
            continue
        found[-1] += letter
    return [value.strip() for value in found]


def _point(recipe: Path, chosen: Sequence[tuple[str, str]], overrides: Sequence[str], out: Path) -> Point:
    name = ",".join(f"{key}={value}" for key, value in chosen)
    safe = re.sub(r"[^A-Za-z0-9._=,+@-]+", "-", name)
    if safe != name or len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    filled = [_filled(text, dict(chosen)) for text in overrides]
    words = [*filled, *(f"{key}={value}" for key, value in chosen), f"train.out={json.dumps(str(out / safe))}"]
    if dict(chosen).get("method.name") == "none":
        words.append("train.source=none")
    found = load_recipe(recipe, words)
    if found.chain.generations:
        raise RequestError(
            "chain.generations: expected 0 in a sweep, found a chain; run feedfast chain for each of its settings"
        )
    try:
        method_entries(found.method)
    except RequestError as error:
        raise RequestError(f"--set {name}: {error}") from None
    return Point(safe, tuple(words), found)


def _filled(text: str, chosen: Mapping[str, str]) -> str:
    """``cache.path=c-{cache.codec}.zarr`` with the point's value in it."""
    for key, value in chosen.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _cache_identity(recipe: Recipe) -> dict[str, Any]:
    """What every cache at one path must agree in; teachers, taps and views can be added to one."""
    tree = comparable(recipe)
    return {"seed": tree["seed"], "data": tree["data"], **{f"cache.{k}": tree["cache"][k] for k in ("codec", "batch")}}


def _refuse_shared_caches(points: Sequence[Point]) -> None:
    held: dict[str, Point] = {}
    for point in points:
        if point.recipe.train.source not in ("cache", "record") or not point.recipe.cache.path:
            continue
        first = held.setdefault(point.recipe.cache.path, point)
        one, two = (_cache_identity(p.recipe) for p in (first, point))
        differing = [key for key in one if one[key] != two[key]]
        if differing:
            raise RequestError(
                f"cache.path: expected a cache of its own for each {', '.join(differing)}, found "
                f"{first.recipe.cache.path} for {first.name} and {point.name}; name the swept key in it, as "
                "cache.path=c-{cache.codec}.zarr"
            )


def _caches(points: Sequence[Point]) -> list[Recipe]:
    """Of the recipes that read a cache one per cache's content."""
    found: dict[str, Recipe] = {}
    for point in points:
        if point.recipe.train.source == "cache":
            tree = comparable(point.recipe)
            key = json.dumps([tree["seed"], tree["data"], tree["cache"], tree["teachers"]], sort_keys=True)
            found.setdefault(key, point.recipe)
    return list(found.values())


def _ended(out: Path, points: Sequence[Point]) -> dict[str, str]:
    """Name → key of the points that ``sweep.json`` knows to have ended as they are asked for now."""
    held: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):  # without it, each run says so itself
        held = read_sealed(out / STATE)
    return {point.name: point.key for point in points if held.get(point.name) == point.key and _has_result(point)}


def _has_result(point: Point) -> bool:
    folder = Path(point.recipe.train.out)
    return (folder / RESULT).is_file() and (folder / RECIPE).is_file()


def _words(recipe: Path, point: Point) -> list[str]:
    return ["train", str(recipe), *point.overrides]


def _results(points: Sequence[Point], recipe: Path, jobs: int, out: Path) -> Iterator[tuple[Point, str | None]]:
    """Each point as it ends, and why it failed; None = it did not."""
    if jobs == 1:
        for point in points:
            log.info("sweep: %s", point.name)
            yield point, _run_here(point)
        return
    waiting, slots = list(points), list(range(jobs))
    running: dict[subprocess.Popen[bytes], tuple[Point, int]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                point, slot = waiting.pop(0), slots.pop(0)
                log.info("sweep: %s", point.name)
                running[_start(point, recipe, out, slot, jobs)] = point, slot
            for process in [process for process in running if process.poll() is not None]:
                point, slot = running.pop(process)
                slots.append(slot)
                yield point, _said(process.returncode, _log_of(out, point))
            time.sleep(_PATIENCE_S)
    finally:  # on an interrupt the runs save what they have
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _run_here(point: Point) -> str | None:
    try:
        run_train(point.recipe)
    except FeedfastError as error:
        return str(error)
    except Exception as error:  # a network's own code: the others go on
        log.debug("sweep: %s", point.name, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return None


def _log_of(out: Path, point: Point) -> Path:
    return out / "logs" / f"{point.name}.log"


def _start(point: Point, recipe: Path, out: Path, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    """A run in a process of its own, whose messages go to ``logs/NAME.log``."""
    path = _log_of(out, point)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "feedfast", *_words(recipe, point)]
    with path.open("wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, env=_environment(slot, jobs)
        )


def _said(code: int, path: Path) -> str | None:
    """Why a process failed: the last line it wrote."""
    if code == 0:
        return None
    last = path.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"exit code {code}: {last.removeprefix('error: ') or 'no message'} ({path})"


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """A share of the cores, and one of the GPUs that this process sees."""
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
    count = torch.cuda.device_count()
    if count > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
        env["CUDA_VISIBLE_DEVICES"] = (seen or [str(number) for number in range(count)])[slot % count]
    return env


def _shared_words(shared: Mapping[str, str]) -> str:
    return f"; {len(shared)} more have the settings of one of these and share it" if shared else ""


def _tell(done: int, failed: int, total: int, asked: int, started: float) -> None:
    """Progress over all runs."""
    ran = asked - (total - done - failed)
    left = (total - done - failed) * (time.perf_counter() - started) / max(ran, 1)
    said = f", {failed} failed" if failed else ""
    log.info("sweep: %d of %d runs done%s, about %s s left", done, total, said, f"{left:,.0f}")
