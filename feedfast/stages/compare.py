"""Finished runs side by side: what each kind reached over its seeds, what it cost, and what its cache has paid back.

    folders of runs ──► groups that differ in nothing but seeds ──► mean, deviation, difference to a baseline

Runs are read from their folders alone (`feedfast.stages.groups`); neither data nor teachers are opened, and a cache
only for its sizes. Differences are taken seed by seed (`feedfast.report.statistics`), so only seeds that both have
count.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import write_text
from feedfast.methods.base import matching
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.report.chart import Span
from feedfast.report.compare import print_table, write_groups
from feedfast.report.run import as_time
from feedfast.report.statistics import half_interval
from feedfast.stages.folder import comparable, ensure_dir
from feedfast.stages.groups import Run, find_runs, grouped, kind_of, method_of, telling_keys
from feedfast.stages.trainee import method_entries, needs_of
from feedfast.storage import names
from feedfast.storage.log import read_log
from feedfast.storage.manifest import held_manifest
from feedfast.storage.places import place_of
from feedfast.tasks import task_named

log = logging.getLogger(__name__)

# What a plain student must have in common with those it is the baseline of.
_ALIKE = ("student.model", "task.name", "data.train", "data.val")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: method, and what tells it from other groups of that method.
        runs: the folders.
        seeds: of the students, as many as runs. Runs of one seed are one student: their mean counts once.
        steps: that each took.
        mean: of the score over the seeds; None without validation images.
        deviation: its sample standard deviation; None of a single run.
        baseline: name of the group it is compared with; None of one that others are compared with.
        over_baseline: mean difference to it, seed by seed; None without a common seed.
        half_interval: half of that difference's 95 % interval; None of fewer than two common seeds.
        step_ms: median over the runs of the median step.
        seconds: median time of a run.
        bytes_per_sample: what the targets it reads take in its cache, per sample and view; None without a cache.
        parameters: of the student.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    mean: float | None
    deviation: float | None
    baseline: str | None
    over_baseline: float | None
    half_interval: float | None
    step_ms: float | None
    seconds: float | None
    bytes_per_sample: float | None
    parameters: int


@dataclass(frozen=True)
class Payback:
    """What a cache cost, and what it has saved.

    Attributes:
        cache: its folder.
        runs: that read it.
        paid_seconds: of the jobs that wrote it, as its manifest says; None where one of them did not end.
        saved_seconds: what the same steps with live teachers would have taken longer, of runs whose method and student
            were also run live; None where none was.
    """

    cache: str
    runs: int
    paid_seconds: float | None
    saved_seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """See `compare_runs`.

    Attributes:
        metric: the name of the score.
        groups: the best first.
        caches: that the runs read.
    """

    metric: str
    groups: tuple[Group, ...]
    caches: tuple[Payback, ...]

    def csv(self) -> str:
        """The groups as comma-separated values, numbers in full."""
        text = io.StringIO()
        rows = [
            {**asdict(group), "runs": " ".join(group.runs), "seeds": " ".join(map(str, group.seeds))}
            for group in self.groups
        ]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def compare_runs(runs: Sequence[str | Path], baseline: str | None = None) -> Comparison:
    """Group runs and compare the groups.

    Args:
        runs: folders of `feedfast train`, or folders with such below them.
        baseline: name of the group that the others are compared with; default: the plain students of the same views
            and data, without any the group of the first run.

    Raises:
        RequestError: there is no finished run in a folder, the runs are of several tasks, or no group has that name.
        FeedfastError: a file of a run is damaged.
    """
    return _compared(grouped(find_runs(runs)), baseline)


def run_compare(runs: Sequence[str | Path], out: Path | None = None, baseline: str | None = None) -> dict[str, Any]:
    """Compare runs, show the table, and write ``compare.html`` and ``compare.csv`` to ``out`` if it is given.

    Returns:
        The JSON of `feedfast compare`: a `Comparison`, and ``report`` (the page, or None).

    Raises:
        As `compare_runs`; RequestError where ``out`` cannot be made.
    """
    made = Provenance.begin()
    groups = grouped(find_runs(runs))
    found = _compared(groups, baseline)
    rows = [shown(group, found.metric) for group in found.groups]
    print_table("runs, mean ± standard deviation over seeds", rows)
    for cache in found.caches:
        log.info("compare: %s", _payback_sentence(cache))
    page = None
    if out is not None:
        folder = ensure_dir(out, "--out")
        write_text(folder / "compare.csv", found.csv())
        page = write_groups(
            folder / "compare.html",
            rows,
            {name: [run.path for run in members] for name, members in groups.items()},
            found.metric,
            task_named(next(iter(groups.values()))[0].recipe.task.name, 1).term,
            made.finished(),
            differences=_spans(found.groups),
            baseline=_baseline_words(found.groups),
            caches=[_payback_row(cache) for cache in found.caches],
        )
    return {**asdict(found), "report": None if page is None else str(page)}


def shown(group: Group, metric: str) -> dict[str, str]:
    """A group as the tables print it; scores in percent."""
    score = "–" if group.mean is None else f"{group.mean:.2%}"
    over = "–" if group.over_baseline is None else f"{100 * group.over_baseline:+.2f}"
    return {
        "run": group.name,
        "seeds": str(len(group.runs)),
        metric: score + ("" if group.deviation is None else f" ± {100 * group.deviation:.2f}"),
        "over baseline (95 %)": over + ("" if group.half_interval is None else f" ± {100 * group.half_interval:.2f}"),
        "steps": f"{group.steps:,}",
        "step ms": "–" if group.step_ms is None else f"{group.step_ms:,.1f}",
        "bytes per sample": "–" if group.bytes_per_sample is None else f"{group.bytes_per_sample:,.0f}",
    }


def _baselines(groups: Mapping[str, list[Run]], asked: str | None) -> dict[str, str | None]:
    """Name → the group it is compared with: the one that was asked for, else the plain one most like it.

    A plain group must be of the same network, task and images; of several (other views, more epochs) each student is
    compared with that of its own settings. Without any plain group, all are compared with the first.

    Raises:
        RequestError: no group has that name.
    """
    if asked is not None and asked not in groups:
        raise RequestError(f"--baseline: expected one of {'; '.join(groups)}; found {asked!r}")
    plain = [name for name, runs in groups.items() if method_of(runs[0]) == "none"]
    kinds = {name: kind_of(runs[0]) for name, runs in groups.items()}
    telling = telling_keys([kinds[name] for name in plain]) if len(plain) > 1 else []
    found: dict[str, str | None] = {}
    for name in groups:
        keys = (*_ALIKE, *telling)
        fitting = [other for other in plain if all(kinds[other].get(key) == kinds[name].get(key) for key in keys)]
        other = asked or (fitting[0] if fitting else None if plain else next(iter(groups)))
        found[name] = None if other == name else other
    return found


def _compared(groups: Mapping[str, list[Run]], asked: str | None) -> Comparison:
    found = []
    for name, other in _baselines(groups, asked).items():
        against = _by_seed(groups[other]) if other is not None else {}
        found.append(_group(name, groups[name], other, against))
        if len({run.seeds for run in groups[name]}) < len(groups[name]):
            log.warning("compare: %s: several runs of one seed count as one student, by their mean", name)
    steps = {group.steps for group in found}
    if len(steps) > 1:
        log.warning("compare: groups took %s steps: a longer run is no better method", _listed(steps))
    ordered = sorted(found, key=lambda group: -math.inf if group.mean is None else group.mean, reverse=True)
    runs = [run for members in groups.values() for run in members]
    return Comparison(runs[0].metric, tuple(ordered), tuple(_paybacks(runs)))


def _listed(values: set[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def _by_seed(runs: Sequence[Run]) -> dict[tuple[int, int], float]:
    """Seeds → score. A run that lies there twice is no second student: it would make the interval a lie."""
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in runs:
        if run.score is not None:
            scores[run.seeds].append(run.score)
    return {seeds: statistics.mean(found) for seeds, found in scores.items()}


def _group(name: str, runs: Sequence[Run], baseline: str | None, against: Mapping[tuple[int, int], float]) -> Group:
    own = _by_seed(runs)
    scores = list(own.values())
    differences = [score - against[seeds] for seeds, score in own.items() if seeds in against]
    half = half_interval(differences)
    return Group(
        name=name,
        runs=tuple(str(run.path) for run in runs),
        seeds=tuple(run.recipe.train_seed for run in runs),
        steps=int(runs[0].result.get("steps") or 0),
        mean=statistics.mean(scores) if scores else None,
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        baseline=baseline,
        over_baseline=statistics.mean(differences) if differences else None,
        half_interval=half if math.isfinite(half) else None,
        step_ms=_median(runs, "step_ms"),
        seconds=_median(runs, "seconds"),
        bytes_per_sample=bytes_per_sample(runs[0].recipe),
        parameters=int(runs[0].result.get("parameters") or 0),
    )


def _median(runs: Sequence[Run], key: str) -> float | None:
    values = [run.result[key] for run in runs if isinstance(run.result.get(key), int | float)]
    return statistics.median(values) if values else None


def bytes_per_sample(recipe: Recipe) -> float | None:
    """What a sample of one view takes of the cache for this recipe: codes of the taps it reads, compressed.

    None without a cache, or where it is no longer there or damaged: what the runs reached is known all the same.
    """
    # who compares may be elsewhere, without the right to look into a bucket
    with contextlib.suppress(FeedfastError, OSError):
        return _bytes_per_sample(recipe)
    return None


def _bytes_per_sample(recipe: Recipe) -> float | None:
    path = place_of(recipe.cache.path)
    manifest = held_manifest(path) if recipe.cache.path and recipe.train.source in ("cache", "record") else None
    if manifest is None:
        return None
    chosen = [entry.name for entry in recipe.teachers] or list(manifest.teachers)[-1:]
    needs = needs_of(method_entries(recipe.method))
    wanted = {
        names.codes(name, tap)
        for name in chosen
        if name in manifest.teachers
        for tap in matching(needs, manifest.teachers[name].taps)
    }
    committed = read_log(path)
    total = 0.0
    for array in wanted:
        commits = committed.of(array)
        total += sum(commit.bytes for commit in commits) / max(sum(c.rows[1] - c.rows[0] for c in commits), 1)
    return total or None


def _paybacks(runs: Sequence[Run]) -> list[Payback]:
    live: dict[str, list[float]] = defaultdict(list)
    readers: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        step = run.result.get("step_ms")
        if run.recipe.train.source == "live" and isinstance(step, int | float):
            live[_trained(run)].append(step)
        if run.recipe.train.source == "cache":
            readers[run.recipe.cache.path].append(run)
    found = []
    for path, users in readers.items():
        saved = [
            (statistics.median(live[_trained(run)]) - run.result["step_ms"]) * (run.result.get("steps") or 0) / 1e3
            for run in users
            if live.get(_trained(run)) and isinstance(run.result.get("step_ms"), int | float)
        ]
        found.append(Payback(path, len(users), _paid_seconds(path), sum(saved) if saved else None))
    return found


def _trained(run: Run) -> str:
    """What a step's time depends on, the source aside."""
    tree = comparable(run.recipe)
    return json.dumps([tree["method"], tree["student"], tree["teachers"], tree["train"]["batch"]], sort_keys=True)


def _paid_seconds(path: str) -> float | None:
    manifest = None
    with contextlib.suppress(FeedfastError, OSError):
        manifest = held_manifest(place_of(path))
    if manifest is None or not manifest.passes or any(job.ended is None for job in manifest.passes):
        return None
    with contextlib.suppress(ValueError, TypeError):  # nothing covers these: what is no date costs a number only
        return sum(
            (datetime.fromisoformat(job.ended or job.started) - datetime.fromisoformat(job.started)).total_seconds()
            for job in manifest.passes
        )
    return None


def _spans(groups: Sequence[Group]) -> list[Span]:
    """The differences in percentage points; the baseline is named where there are several."""
    compared = [group for group in groups if group.over_baseline is not None]
    several = len({group.baseline for group in compared}) > 1
    found = []
    for group in compared:
        over, half = 100 * (group.over_baseline or 0.0), group.half_interval
        said = f"{over:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}")
        name = f"{group.name}, against {group.baseline}" if several else group.name
        found.append(Span(name, over, None if half is None else 100 * half, said))
    return found


def _baseline_words(groups: Sequence[Group]) -> str:
    found = {group.baseline for group in groups if group.over_baseline is not None}
    return f"the baseline {next(iter(found))}" if len(found) == 1 else "the plain students of the same settings"


def _payback_row(cache: Payback) -> dict[str, Any]:
    share = cache.saved_seconds / cache.paid_seconds if cache.saved_seconds is not None and cache.paid_seconds else None
    return {
        "cache": cache.cache,
        "runs": cache.runs,
        "made in": "not known" if cache.paid_seconds is None else as_time(cache.paid_seconds),
        "saved so far": "no live runs to compare with" if cache.saved_seconds is None else as_time(cache.saved_seconds),
        "paid back": None if share is None else f"{share:.1f} times",
    }


def _payback_sentence(cache: Payback) -> str:
    paid = "its cost is not known" if cache.paid_seconds is None else f"made in {cache.paid_seconds:,.0f} s"
    many = "1 run" if cache.runs == 1 else f"{cache.runs} runs"
    if cache.saved_seconds is None:
        return (
            f"{cache.cache}: {paid}, read by {many}; live runs of the same method and student would say what it saved"
        )
    share = "" if not cache.paid_seconds else f", {cache.saved_seconds / cache.paid_seconds:.1f} times its cost"
    return f"{cache.cache}: {paid}, read by {many}, which saved {cache.saved_seconds:,.0f} s over live teachers{share}"
