"""Rows of students: added line by line when they end, and compared seed by seed with students of another kind.

Two students of one seed start from the same weights and see the same views of the same images in the same order, so
their difference says more than that of two means. Intervals are Student's t at 95 % over the seeds.
"""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from feedfast.methods import METHODS
from feedfast.methods.base import matching
from feedfast.recipe import Recipe
from feedfast.report.statistics import half_interval
from feedfast.storage.manifest import read_manifest
from feedfast.storage.schema import TapInfo

Row = dict[str, str]


def device_name() -> str:
    """Of what the students are trained on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, str]:
    """What every row says of where and when it was made: ``date``, ``commit``, ``device``, ``torch``."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "commit": commit, "device": device_name(), "torch": torch.__version__}


def record(row: Mapping[str, Any], columns: Sequence[str], path: Path) -> None:
    """Add a line to the results; one of before there were all these columns gets them, empty."""
    held: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            held = list(reader) if reader.fieldnames != list(columns) else []
    new = not path.exists()
    with path.open("w" if held else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new or held:
            writer.writeheader()
        writer.writerows(held)
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def settings_of(path: Path, setting: Sequence[str], student: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """The lines by setting, of each student the last: only students of one setting are compared."""
    if not path.exists():
        return {}
    found: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found[tuple(row[key] for key in setting)][tuple(row[key] for key in student)] = row
    return {setting: list(rows.values()) for setting, rows in found.items()}


def taps_read(recipe: Recipe) -> list[tuple[str, TapInfo]]:
    """(teacher, tap) of all that this method reads from its cache; [] without one."""
    needs = METHODS[recipe.method[0].name].needs
    path = Path(recipe.cache.path)
    if recipe.train.source != "cache" or not (path / "zarr.json").is_file():
        return []
    teachers = read_manifest(path).teachers
    chosen = [teacher.name for teacher in recipe.teachers] or list(teachers)[-1:]
    return [(name, teachers[name].taps[tap]) for name in chosen for tap in matching(needs, teachers[name].taps)]


def relative_error(recipe: Recipe) -> float | None:
    """Mean over the maps that this method reads of their codec's measured relative RMS error; None of logits alone."""
    errors = [tap.error["relative_rms_error"] for _, tap in taps_read(recipe) if "relative_rms_error" in tap.error]
    return statistics.mean(float(error or 0) for error in errors) if errors else None


def summarize(
    rows: Sequence[Row],
    key: Sequence[str],
    *,
    value: str,
    pair: Sequence[str],
    baseline: Callable[[Row], bool],
    over: str = "over_plain",
) -> list[dict[str, Any]]:
    """Mean, deviation and paired difference of every group of rows, the best first.

    Args:
        rows: of one setting.
        key: columns that name a group.
        value: the column that is compared.
        pair: columns in which a row and its partner agree.
        baseline: which rows are partners.
        over: what the mean difference is called.
    """
    partners = {tuple(row[name] for name in pair): float(row[value]) for row in rows if baseline(row)}
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in key)].append(row)
    table = []
    for name, group in groups.items():
        values = [float(row[value]) for row in group]
        found = [(float(row[value]), partners.get(tuple(row[k] for k in pair))) for row in group]
        differences = [own - other for own, other in found if other is not None]
        table.append(
            {
                **dict(zip(key, name, strict=True)),
                "seeds": len(group),
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else math.nan,
                over: statistics.mean(differences) if differences else math.nan,
                "half_interval": half_interval(differences),
                "bytes_per_sample": float(group[-1]["bytes_per_sample"] or 0),
            }
        )
    return sorted(table, key=lambda line: -line["mean"])
