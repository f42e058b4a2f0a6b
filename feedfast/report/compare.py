"""Several runs side by side: a table for the terminal and one HTML page with their curves."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feedfast.errors import printable
from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.run import figure_html, page, provenance_html, read_metrics, show, table_html

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
                axis.plot(*zip(*points, strict=True), label=name, marker=".", linewidth=1.2)
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
