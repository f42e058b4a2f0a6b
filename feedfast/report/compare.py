"""Several runs side by side: a table for the terminal, and pages with their table, differences and curves."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feedfast.errors import printable
from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.chart import Chart, Series, Span, as_number, charts, keys, spans
from feedfast.report.page import (
    Html,
    Section,
    details,
    escaped,
    joined,
    listing,
    made_by,
    notes,
    page,
    provenance,
    shown,
    table,
)
from feedfast.report.page import tiles as tiles_html
from feedfast.report.run import read_metrics

log = logging.getLogger(__name__)

MOST_RUNS = 40
"""Runs that are listed at once; more are folded."""
COLORED = 8
"""Groups whose curves have a color of their own; those of further ones are thin gray lines."""


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log a table (INFO); nothing without rows."""
    if not rows or not log.isEnabledFor(logging.INFO):
        return
    # as text, not markup: names of files and of other people's taps stand here
    table = Table(title=Text(printable(title)))
    for key in rows[0]:
        # What names a row is never cut short; the other columns wrap.
        first = key == next(iter(rows[0]))
        table.add_column(Text(printable(key)), justify="left" if first else "right", no_wrap=first, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(shown(value))) for value in row.values()))
    console = Console(stderr=True)
    width = max(100, console.width) if console.is_terminal else 160  # a log file has no edge to wrap at
    text = Console(width=width, no_color=True)
    with text.capture() as captured:
        text.print(table)
    log.info("%s", captured.get().rstrip())


def write_comparison(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Path],
    documents: Mapping[str, Any],
    made: Provenance,
) -> Path:
    """One page: the table, the curves of every run in ``runs`` (name → its output folder), and ``documents`` as JSON.

    The curves are validation accuracy and training cross-entropy, from each folder's metrics.jsonl.
    """
    groups = {name: [folder] for name, folder in runs.items()}
    told = [
        details(name, listing(json.dumps(value, indent=2), f"{name}, as JSON")) for name, value in documents.items()
    ]
    sections = [
        Section("Result", table(rows, "Students, one row each")),
        Section("Curves", curves_html(groups, "val_accuracy", "ce")),
        Section("Runs", _runs(groups, path.parent)),
        Section("What was done before", joined(told)),
        Section("How this page was made", provenance([made])),
    ]
    write_text(path, page("Runs compared", title, "", sections, made_by([made])))
    return path


def write_groups(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[Path]],
    metric: str,
    loss: str,
    made: Provenance,
    *,
    differences: Sequence[Span] = (),
    baseline: str = "the baseline",
    caches: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """One page: the table, the differences, the curves of every group of runs, and what the caches cost.

    Args:
        path: the page.
        rows: of the table, the best group first; ``run`` is its name.
        groups: name → folders of its runs, whose curves are in their metrics.jsonl.
        metric: the score, as ``val_accuracy``.
        loss: the task's own loss of training, as ``ce``.
        made: who compares.
        differences: to the baseline, in percentage points.
        baseline: what that is.
        caches: rows of a table: what each cost and what it has saved.
    """
    ordered = {row["run"]: groups[row["run"]] for row in rows if row["run"] in groups}
    ordered |= {name: folders for name, folders in groups.items() if name not in ordered}
    count = sum(map(len, groups.values()))
    best = rows[0] if rows else {}
    head = {"best": best.get("run"), metric.replace("_", " "): best.get(metric), "groups": len(groups), "runs": count}
    means = "Mean ± standard deviation over seeds; differences to the baseline seed by seed, with 95 % intervals"
    sections = [
        Section("Result", joined([tiles_html(head), table(rows, means)])),
        Section(
            "Difference to the baseline",
            spans(f"Mean paired difference to {baseline}, over common seeds", differences, "percentage points"),
        ),
        Section("Curves", curves_html(ordered, metric, loss)),
        Section("What the caches cost", table(caches, "Caches, and the time that runs saved over live teachers")),
        Section("Runs", _runs(ordered, path.parent)),
        Section("How this page was made", provenance([made])),
    ]
    lead = f"{count} runs in {len(groups)} groups; the runs of a group differ in nothing but their seeds."
    write_text(path, page("Runs compared", f"{len(groups)} groups of runs", lead, sections, made_by([made])))
    return path


def curves_html(groups: Mapping[str, Sequence[Path]], metric: str, loss: str) -> Html:
    """Score and loss of every group by step: the mean of its runs, and from their lowest to their highest.

    The first `COLORED` groups have colors, one key for both figures says which.
    """
    styles = {name: number if number < COLORED else None for number, name in enumerate(groups)}
    found: dict[str, list[Series]] = {metric: [], loss: []}
    for name, folders in groups.items():
        metrics = [read_metrics(folder / "metrics.jsonl") for folder in folders]
        for key, series in found.items():
            values: dict[int, list[float]] = defaultdict(list)
            for run in metrics:
                for row in run:
                    if key in row:
                        values[row["step"]].append(as_number(row[key]))
            most = max(map(len, values.values()), default=0)
            steps = sorted(step for step, here in values.items() if len(here) == most)
            # of gray curves, which are many, bands would lie over all others
            banded = most > 1 and styles[name] is not None
            band = [(as_number(step), min(values[step]), max(values[step])) for step in steps] if banded else []
            points = [(as_number(step), sum(values[step]) / most) for step in steps]
            series.append(Series(name, points, band, styles[name]))
    drawn = charts(
        [
            Chart(metric.replace("_", " "), found[metric]),
            Chart(f"{loss}, the task's own loss (training)", found[loss], log=True),
        ],
        key=False,
    )
    if not drawn:
        return drawn
    colored = [(name, style) for name, style in styles.items() if style is not None]
    rest = len(styles) - len(colored)
    also = [(f"{rest} more, named in the data of the figures", None)] if rest else []
    several = any(len(folders) > 1 for folders in groups.values())
    said = (
        notes("Lines are means of the runs of a group; bands reach from the lowest to the highest.") if several else ""
    )
    return joined([said, drawn, keys([*colored, *also])])


def _runs(groups: Mapping[str, Sequence[Path]], here: Path) -> Html:
    folders = [folder.absolute() for some in groups.values() for folder in some]
    parents = {folder.parent for folder in folders}
    above = Path(os.path.commonpath(parents)) if parents else here
    rows = [{"run": _link(folder, above, here), "group": name} for name, some in groups.items() for folder in some]
    shown_ = table(rows, f"Folders below {above}, with their reports")
    return shown_ if len(rows) <= MOST_RUNS else details(f"All {len(rows):,} runs", shown_)


def _link(folder: Path, above: Path, here: Path) -> Html:
    """The folder, with a link to its report where there is one: relative, so that both can be moved together."""
    name, report = escaped(folder.absolute().relative_to(above)), folder / "report.html"
    if not report.is_file():
        return name
    target = quote(os.fsencode(os.path.relpath(report, here).replace(os.sep, "/")))
    return Html(f'<a href="./{escaped(target)}">{name}</a>')
