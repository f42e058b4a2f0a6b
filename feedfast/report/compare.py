"""Several runs side by side: a table for the terminal and one HTML page with their curves."""

from __future__ import annotations

import html
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feedfast.errors import printable
from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.run import as_label, figure_html, page, provenance_html, read_metrics, show, table_html

log = logging.getLogger(__name__)


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
        table.add_row(*(Text(printable(show(value))) for value in row.values()))
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
    details: Mapping[str, Any],
    made: Provenance,
) -> Path:
    """One page: the table, the curves of every run in ``runs`` (name → its output folder), and ``details`` as JSON.

    The curves are validation accuracy and training cross-entropy, from each folder's metrics.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for name, out in runs.items():
        metrics = read_metrics(out / "metrics.jsonl")
        for axis, key in zip(axes, ("val_accuracy", "ce"), strict=True):
            points = [(row["step"], row[key]) for row in metrics if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=as_label(name), marker=".", linewidth=1.2)
    for axis, label in zip(axes, ("validation accuracy", "cross-entropy with the label (training)"), strict=True):
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    body = table_html(rows) + figure_html(figure)
    for name, value in details.items():
        body += f"<h2>{html.escape(name)}</h2><pre>{html.escape(json.dumps(value, indent=2))}</pre>"
    body += provenance_html([made])
    write_text(path, page(title, body))
    return path


def write_groups(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[Path]],
    metric: str,
    loss: str,
    sentences: Sequence[str],
    made: Provenance,
) -> Path:
    """One page: the table, the curves of every group of runs (mean, and lowest to highest), and what the caches cost.

    Args:
        path: the page.
        rows: of the table.
        groups: name → folders of its runs, whose curves are in their metrics.jsonl.
        metric: the score, as ``val_accuracy``.
        loss: the task's own loss of training, as ``ce``.
        sentences: shown below the curves.
        made: who compares.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for number, (name, folders) in enumerate(groups.items()):
        metrics = [read_metrics(folder / "metrics.jsonl") for folder in folders]
        for axis, key in zip(axes, (metric, loss), strict=True):
            values: dict[int, list[float]] = defaultdict(list)
            for run in metrics:
                for row in run:
                    if key in row:
                        values[row["step"]].append(row[key])
            steps = sorted(step for step, found in values.items() if len(found) == max(map(len, values.values())))
            if steps:
                color = f"C{number % 10}"
                axis.plot(
                    steps,
                    [sum(values[s]) / len(values[s]) for s in steps],
                    color=color,
                    label=as_label(name),
                    marker=".",
                )
                axis.fill_between(
                    steps, [min(values[s]) for s in steps], [max(values[s]) for s in steps], color=color, alpha=0.2
                )
    titles = (as_label(metric).replace("_", " "), f"{loss}, the task's own loss (training)")
    for axis, label in zip(axes, titles, strict=True):
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    if handles:  # below, where many and long names do not cover the curves
        figure.legend(
            handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8
        )
    body = table_html(rows) + figure_html(figure)
    body += "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    runs = [{"run": name, "folder": str(folder)} for name, folders in groups.items() for folder in folders]
    body += f"<h2>Runs</h2>{table_html(runs)}" + provenance_html([made])
    write_text(path, page("Runs compared", body))
    return path
