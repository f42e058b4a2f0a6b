"""What a run leaves for people: one self-contained report.html, drawn from its metrics.jsonl.

The report is drawn from that file alone (`feedfast.report.events` writes it) and can be drawn again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedfast.files import open_regular, parse_json, write_text
from feedfast.provenance import Provenance
from feedfast.report.chart import Chart, Series, as_number, charts
from feedfast.report.page import Section, details, facts, joined, made_by, page, shown, table, tiles
from feedfast.report.reproduce import reproduce_html

_MAX_ROW_BYTES = 1 << 20
_TERMS_PER_CHART = 6  # curves on common axes that can still be told apart
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


def run_charts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """What happened (loss and its terms, validation, learning rate), and what it cost (throughput, waiting).

    Terms are called as methods and tasks call them, so every number in ``rows`` that is nothing else is one.
    """
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value)))
    terms = [name for name in names if name not in NO_LOSS and not name.startswith("val_")]
    parts = [terms[start : start + _TERMS_PER_CHART] for start in range(0, len(terms), _TERMS_PER_CHART)]
    happened = [
        _chart(
            "Loss and its terms, unweighted" + (f" ({number} of {len(parts)})" if len(parts) > 1 else ""), part, rows
        )
        for number, part in enumerate(parts, 1)
    ]
    happened.append(_chart("Validation", [name for name in names if name.startswith("val_")], rows, log=False))
    happened.append(_chart("Learning rate", ["lr"], rows, log=False))
    cost = [
        _chart("Images per second", ["images_per_second"], rows, log=False),
        _chart("Share of the time spent waiting for data", ["data_wait_fraction"], rows, log=False),
    ]
    return happened, cost


def _chart(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], *, log: bool = True) -> Chart:
    series = [
        Series(
            name,
            [(as_number(row["step"]), as_number(row[name])) for row in rows if _is_number(row.get(name))],
            style=number,
        )
        for number, name in enumerate(names)
    ]
    return Chart(title if len(series) != 1 or series[0].name in NO_LOSS else f"{title}: {names[0]}", series, log=log)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_report(
    out: Path,
    result: Mapping[str, Any],
    recipe: str,
    processes: Sequence[Provenance] = (),
    *,
    asked: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    pictures: Sequence[Section] = (),
) -> Path:
    """Draw ``out/report.html``.

    Args:
        out: the run's folder, with its ``metrics.jsonl``.
        result: of the run.
        recipe: of the run, in full, as TOML.
        processes: who trained it.
        asked: what was asked, in a few words: name → words, or several.
        cost: what it cost besides the result's own times: name → words.
        pictures: sections that are shown below the curves.
    """
    rows = read_metrics(out / "metrics.jsonl")
    happened, spent = run_charts(rows)
    figures: dict[str, Any] = {}
    for key, value in result.items():
        figures |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    numbers = table(
        [{"figure": key, "value": shown(value)} for key, value in figures.items()], "All figures of result.json"
    )
    sections = [
        Section("Result", joined([tiles(_headline(result)), details("All figures", numbers)])),
        Section("What was asked", facts(asked or {})),
        Section("What happened", charts(happened)),
        Section("What it cost", joined([facts({**_times(result), **(cost or {})}), charts(spent)])),
        *pictures,
        Section("How this was made", reproduce_html(processes, recipe, "train")),
    ]
    title = f"{result.get('model')}, {result.get('method')} from {result.get('source')}"
    path = out / "report.html"
    write_text(path, page("Training run", title, str(result.get("out", "")), sections, made_by(processes)))
    return path


def as_share(value: Any) -> str | None:
    """A share in percent; None of what is no number."""
    return f"{value:.1%}" if _is_number(value) else None


def _headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that matter: scores in percent, and what was spent."""
    scores = {
        key.removeprefix("val_").replace("_", " ") + ", validation": None if value is None else f"{value:.2%}"
        for key, value in result.items()
        if key.startswith("val_") and (value is None or _is_number(value))
    }
    step, seconds, rate = (result.get(key) for key in ("step_ms", "seconds", "images_per_second"))
    return {
        **scores,
        "final loss": result.get("final_loss"),
        "steps": f"{result['steps']:,}" if "steps" in result else None,
        "time in steps": as_time(seconds),
        "step": None if step is None else f"{step:,.1f} ms",
        "images per second": None if rate is None else f"{rate:,.0f}",
        "parameters": f"{result['parameters']:,}" if "parameters" in result else None,
    }


def _times(result: Mapping[str, Any]) -> dict[str, Any]:
    predicted, error = result.get("predicted"), result.get("prediction_error")
    said = None
    if isinstance(predicted, Mapping) and _is_number(predicted.get("step_ms")):
        off = error.get("step_ms") if isinstance(error, Mapping) else None
        said = f"{predicted['step_ms']:,.1f} ms" + (f"; it took {off:+.0%}" if _is_number(off) else "")
    return {
        "Time in steps": as_time(result.get("seconds")),
        "Waiting for data": as_share(result.get("data_wait_fraction")),
        "Step, as planned": said,
    }


def as_time(seconds: Any) -> str | None:
    """Seconds as people say them; None of what is no finite number."""
    if not _is_number(seconds) or not math.isfinite(as_number(seconds)):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
