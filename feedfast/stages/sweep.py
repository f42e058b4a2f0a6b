"""A grid of runs over one cache: every combination of values for some keys of a recipe, each in a folder of its own.

    recipe + {method.name: kd, ofd} x {train.seed: 0, 1, 2} ──► caches, once ──► runs ──► compare

A point of the grid is nothing but `feedfast train RECIPE KEY=VALUE...`, so it can be run by hand or by a scheduler, and
a sweep has no state of its own: a run's folder says whether it has ended. All points are checked before the first one
runs. One that fails is named and left out; the same command tries it again, and what is done stays done.
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
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feedfast.data.dali import require_dali
from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, write_text
from feedfast.recipe import Recipe, load_recipe, parse_recipe
from feedfast.report.loggers import pick_loggers
from feedfast.stages.compare import run_compare
from feedfast.stages.folder import RECIPE, RunLock, comparable, ensure_dir
from feedfast.stages.groups import RESULT, planned_names
from feedfast.stages.offline import run_cache
from feedfast.stages.record import usable_cores
from feedfast.stages.student import run_train
from feedfast.stages.trainee import method_entries
from feedfast.stages.worker import Worker
from feedfast.words import toml_text

log = logging.getLogger(__name__)

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
        decides = [comparable(self.recipe), self.recipe.train.max_steps]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


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
        RequestError: a key, value, combination or baseline that is none, before anything runs.
        BusyError: another sweep is at work in ``out``.
        FeedfastError: the cache of every run that is left cannot be made; if others can go on, its runs have failed.
    """
    started = time.perf_counter()
    world = Worker.from_env().world
    if world > 1:
        raise RequestError(f"sweep: expected one process, found {world} ranks; its runs can be started one by one")
    points, shared = grid(recipe, settings, overrides, out)
    _refuse_baseline(points, baseline)
    require_dali()
    ensure_dir(out, "--out")
    with RunLock(out, "--out"):
        ended = {point.name for point in points if _has_ended(point)}
        waiting = [point for point in points if point.name not in ended]
        log.info("sweep: %d runs in %s, %d of them done%s", len(points), out, len(ended), _shared_words(shared))
        failed = _make_caches(waiting)
        trainable = [point for point in waiting if point.name not in failed]
        # closed, so that an interrupt leaves no process behind
        with closing(_results(trainable, recipe, jobs, out)) as results:
            for point, error in results:
                if error is None:
                    ended.add(point.name)
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


def recipe_file(recipe: Recipe, out: Path) -> Path:
    """A recipe as a file in the folder of its sweep, from which runs start; what it leaves unsaid is left out."""
    path = ensure_dir(out, "out") / "recipe.toml"
    write_text(path, toml_text(recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)))
    return path


def sweep_script(recipe: Path, settings: Sequence[str], overrides: Sequence[str] = (), *, out: Path) -> str:
    """A Slurm array of the points that have not ended, one task each; caches must be there, or are made first.

    Raises:
        RequestError: as `run_sweep`.
    """
    for key, path in (("recipe", recipe), ("--out", out)):
        if re.search('[\x00-\x1f\x7f"]', str(path)):  # a second line of a comment would be a command
            raise RequestError(
                f"{key}: expected a path without quotes and line breaks for --print, found {str(path)!r}"
            )
    points, _ = grid(recipe, settings, overrides, out)
    waiting = [point for point in points if not _has_ended(point)]
    if not waiting:
        return f"# all {len(points)} runs of this sweep have ended; feedfast sweep compares them"
    ensure_dir(out, "--out")  # Slurm makes no folder for its logs: the task would fail without a word
    here, logs = (str(path).replace("%", "%%") for path in (Path.cwd(), out.absolute()))
    gpu = "#SBATCH --gpus-per-node=1\n" if any(point.recipe.train.device != "cpu" for point in waiting) else ""
    commands = "\n".join(f"  {shlex.quote(shlex.join(_command(recipe, point)))}" for point in waiting)
    return f"""#!/bin/bash
#SBATCH --job-name=feedfast-sweep
#SBATCH --array=0-{len(waiting) - 1}
#SBATCH --ntasks=1
{gpu}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --chdir="{here}"
#SBATCH --output="{logs}/slurm-%A-%a.log"
# {len(waiting)} of {len(points)} runs; Slurm's MaxArraySize is 1,001 unless a site has set another
# the cache must be there: the same feedfast sweep without --print makes it, or feedfast cache with the keys of a run
# afterwards the same feedfast sweep without --print compares them
runs=(
{commands}
)
eval "exec ${{runs[$SLURM_ARRAY_TASK_ID]}}"  # in the shell's place: Slurm's signals reach it
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
    # as it is, not in JSON's pairs of halves of characters, which TOML does not know
    folder = json.dumps(str(out / safe), ensure_ascii=False)
    words = [*filled, *(f"{key}={value}" for key, value in chosen), f"train.out={folder}"]
    found = load_recipe(recipe, words)
    swept = any(key.partition(".")[0] == "method" for key, _ in chosen)
    if swept and all(entry.name == "none" for entry in found.method):
        words.append("train.source=none")
        found = load_recipe(recipe, words)
    if set(pick_loggers(found.train.loggers)) - {"tensorboard"}:  # where a run is found again by what was swept
        tags = [*found.train.tags, f"sweep={out}"[:128], *(f"{key}={value}"[:128] for key, value in chosen)]
        words.append(f"train.tags={json.dumps(tags, ensure_ascii=False)}")
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
        text = text.replace("{seed}", value) if key == "train.seed" else text  # as `_axis` takes it
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


def _caches(points: Sequence[Point]) -> list[tuple[Recipe, list[Point]]]:
    """A recipe per cache's content, and the points that read it.

    Teachers whose taps a recipe does not name are tapped for its methods: those of all points, in one pass.
    """
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.recipe.train.source == "cache":
            tree = comparable(point.recipe)
            content = [tree["seed"], tree["data"], tree["task"], tree["cache"], tree["teachers"]]
            found.setdefault(json.dumps(content, sort_keys=True), []).append(point)
    caches = []
    for readers in found.values():
        methods = {entry.model_dump_json(): entry for point in readers for entry in point.recipe.method}
        caches.append((readers[0].recipe.model_copy(update={"method": tuple(methods.values())}), readers))
    return caches


def _make_caches(points: Sequence[Point]) -> dict[str, str]:
    """Make what the points read; name → why, of those whose cache cannot be made.

    Raises:
        FeedfastError: that are all points.
    """
    failed: dict[str, str] = {}
    for recipe, readers in _caches(points):
        try:
            # a method that cannot use the cache is no reason against the others: its own run says so
            run_cache(recipe, check=all(point.recipe.method == recipe.method for point in readers), whole=True)
        except FeedfastError as error:
            failed.update({point.name: str(error) for point in readers})
            log.warning("sweep: the cache of %s cannot be made: %s", ", ".join(point.name for point in readers), error)
            if len(failed) == len(points):
                raise
    return failed


def _refuse_baseline(points: Sequence[Point], baseline: str | None) -> None:
    """Raise before hours of training where no run can be what the others are to be compared with."""
    known = planned_names([point.recipe for point in points])
    cut = any(point.recipe.train.max_steps for point in points)  # then names may say how many steps were taken
    if baseline is not None and baseline not in known and not cut:
        raise RequestError(f"--baseline: expected one of {'; '.join(known)}; found {baseline!r}")


def _has_ended(point: Point) -> bool:
    """Whether its folder holds the result of this very run, as far as it was to go."""
    folder = Path(point.recipe.train.out)
    with suppress(OSError, ValueError, LookupError, TypeError):  # then the run itself says what is wrong
        last = read_sealed(folder / RESULT)["provenance"][-1]["recipe"]["train"]["max_steps"]
        theirs = comparable(parse_recipe(read_sealed(folder / RECIPE)))
        return bool(last == point.recipe.train.max_steps and theirs == comparable(point.recipe))
    return False


def _command(recipe: Path, point: Point) -> list[str]:
    return [sys.executable, "-m", "feedfast", "train", str(recipe), *point.overrides]


def _results(
    points: Sequence[Point], recipe: Path, jobs: int, out: Path
) -> Generator[tuple[Point, str | None], None, None]:
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
    with path.open("wb") as file:
        # In a session of its own: Ctrl-C in a terminal comes to this process alone, which passes one signal on. Two
        # would end the step that is under way.
        return subprocess.Popen(
            _command(recipe, point),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=_environment(slot, jobs, point.recipe.train.device),
            start_new_session=True,
        )


def _said(code: int, path: Path) -> str | None:
    """Why a process failed: the last line it wrote."""
    if code == 0:
        return None
    last = ""
    with suppress(OSError):
        last = path.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"exit code {code}: {last.removeprefix('error: ') or 'no message'} ({path})"


def _environment(slot: int, jobs: int, device: str) -> dict[str, str]:
    """A share of the cores, and one of the GPUs that this process sees, unless the recipe names one."""
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
    count = torch.cuda.device_count()
    if count > 1 and device in ("auto", "cuda"):
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
