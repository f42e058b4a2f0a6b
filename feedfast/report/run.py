"""What a run leaves for people: one self-contained report.html, drawn from its metrics.jsonl.

The report is drawn from that file alone (`feedfast.report.events` writes it) and can be drawn again at any time.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedfast.files import open_regular, parse_json, write_text
from feedfast.provenance import Provenance

STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}
img{max-width:100%}
pre{background:#f6f6f6;padding:1em;overflow:auto}
h3{margin:1em 0 .2em;font-size:1em}
.pictures{display:flex;flex-wrap:wrap;gap:.6em}
figure{margin:0}
figcaption{font-size:.85em;color:#555}
.legend span{margin-right:1em;white-space:nowrap}
.legend i{display:inline-block;width:1em;height:1em;margin-right:.3em;vertical-align:-.15em}
"""

_MAX_ROW_BYTES = 1 << 20
NO_LOSS = ("step", "epoch", "lr", "images_per_second", "data_wait_fraction")  # of the numbers in a row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, numbers by name; what follows a torn line (a kill while writing) is left out."""
    if not path.is_file():
        return []
    rows = []
    with open(open_regular(path), "rb") as file:
        while line := file.readline(_MAX_ROW_BYTES):
            try:
                row = parse_json(line)
            except ValueError:
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_number, row.values())):
                break
            rows.append(row)
    return rows


def as_label(text: str) -> str:
    """Anybody's text as matplotlib is to show it: no formulas, and never hidden."""
    return " " * text.startswith("_") + text.replace("$", r"\$")


def figure_html(figure: Any) -> str:
    """A matplotlib figure as an inline PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as an HTML table."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(show(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def show(value: Any) -> str:
    """A value as the tables print it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def page(title: str, body: str) -> str:
    """A complete HTML page without anything to fetch."""
    name = html.escape(title)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{body}</body></html>'


def curves(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Loss and its terms, validation, learning rate and throughput over steps: a 2 x 2 matplotlib figure.

    Terms are called as methods and tasks call them, so every number in ``rows`` that is nothing else is one.
    """
    from matplotlib.figure import Figure

    numbers = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value)))
    figure = Figure(figsize=(10, 6.5))
    axes = figure.subplots(2, 2)
    plots = [
        (axes[0][0], "loss", [name for name in numbers if name not in NO_LOSS and not name.startswith("val_")]),
        (axes[0][1], "validation", [name for name in numbers if name.startswith("val_")]),
        (axes[1][0], "learning rate", ["lr"]),
        (axes[1][1], "images per second", ["images_per_second"]),
    ]
    for axis, title, names in plots:
        for name in names:
            points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
            marker = "o" if len(points) < 30 else None
            if points:
                axis.plot(*zip(*points, strict=True), label=as_label(name), marker=marker, markersize=3, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1 or (title == "validation" and names):
            axis.legend()
    figure.tight_layout()
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def provenance_html(processes: Sequence[Provenance], title: str = "How this was made") -> str:
    """Who made something, where and when: a table, a line per process, and everything that is known of them."""
    if not processes:
        return ""
    known = json.dumps([process.model_dump(mode="json") for process in processes], indent=2)
    details = f"<details><summary>versions, machines, recipes</summary><pre>{html.escape(known)}</pre></details>"
    return f"<h2>{html.escape(title)}</h2>" + table_html([process.row() for process in processes]) + details


def write_report(
    out: Path,
    result: Mapping[str, Any],
    recipe: Mapping[str, Any],
    processes: Sequence[Provenance] = (),
    more: str = "",
) -> Path:
    """Draw ``out/report.html``.

    Args:
        out: the run's folder, with its ``metrics.jsonl``.
        result: of the run.
        recipe: of the run.
        processes: who trained it.
        more: HTML to be shown below the curves.
    """
    rows = read_metrics(out / "metrics.jsonl")
    figures: dict[str, Any] = {}
    for key, value in result.items():
        figures |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    body = table_html([{"figure": key, "value": value} for key, value in figures.items()])
    listing = html.escape(json.dumps(recipe, indent=2))
    body += f"{figure_html(curves(rows))}{more}{provenance_html(processes)}<h2>Recipe</h2><pre>{listing}</pre>"
    path = out / "report.html"
    write_text(path, page(f"{result.get('model')}, {result.get('method')} from {result.get('source')}", body))
    return path
