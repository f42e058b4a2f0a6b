"""What bench_methods.py draws: accuracy against stored views and codecs, and against what a codec loses and takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from paired import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def curves(rows: Sequence[Row], variants: Sequence[str], codecs: Sequence[str], path: Path) -> list[str]:
    """Accuracy against views and against codecs, one line per method with its deviation; the files drawn."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    of_views = [row for row in rows if row["codec"] == "u8"]
    stored = sorted({int(row["views"]) for row in of_views})
    counts = [*(n for n in stored if n), *(n for n in stored if not n)]
    for number, variant in enumerate(variants):
        for axis, key, values, chosen in (
            (left, "views", [str(n) for n in counts], of_views),
            (right, "codec", list(codecs), [row for row in rows if row["views"] == "4"]),
        ):
            by = {
                value: [float(r["accuracy"]) * 100 for r in chosen if r["variant"] == variant and r[key] == value]
                for value in values
            }
            places = [place for place, value in enumerate(values) if by[value]]
            if not places or (key == "codec" and len(places) == 1):  # reads no maps: one codec is as good as another
                continue
            means = [statistics.mean(by[values[p]]) for p in places]
            spreads = [statistics.stdev(by[values[p]]) if len(by[values[p]]) > 1 else 0.0 for p in places]
            axis.errorbar(places, means, spreads, label=variant, color=f"C{number}", marker="o", capsize=3)
            axis.set_xticks(range(len(values)), ["live" if v == "0" else v for v in values])
    left.set_xlabel(f"stored views, of {rows[0]['epochs']} epochs")
    right.set_xlabel("codec of the maps, 4 views")
    return _drawn(figure, left, path)


def _drawn(figure: Figure, left: Axes, path: Path) -> list[str]:
    """Write a pair of plots of accuracy."""
    left.set_ylabel("accuracy of the student, %")
    left.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return [str(path)]


def codec_points(
    rows: Sequence[Row], variants: Sequence[str], codecs: Sequence[str], views: str
) -> list[dict[str, Any]]:
    """Per variant and codec: the students' accuracy, the measured error of what they read, and its stored bytes.

    Error and bytes are of the caches, which all students of a codec share: lines that lack the error, because they are
    of before it was written down, take that of the others. Without any, and for what reads no maps, there is no point.
    """
    points = []
    for variant in variants:
        for codec in codecs:
            of_codec = [row for row in rows if (row["variant"], row["codec"]) == (variant, codec)]
            accuracies = [float(row["accuracy"]) for row in of_codec if row["views"] == views]
            errors = [float(row["error"]) for row in of_codec if row.get("error")]
            if not accuracies or not errors:
                continue
            points.append(
                {
                    "variant": variant,
                    "codec": codec,
                    "seeds": len(accuracies),
                    "mean": statistics.mean(accuracies),
                    "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "error": statistics.mean(errors),
                    "bytes_per_sample": float(of_codec[-1]["bytes_per_sample"] or 0),
                }
            )
    return points


def codecs(points: Sequence[dict[str, Any]], plain: Sequence[float], path: Path) -> list[str]:
    """Accuracy against the error of the maps and against their bytes, a line per method; plain students below."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for variant in dict.fromkeys(point["variant"] for point in points):
        own = [point for point in points if point["variant"] == variant]
        means, spreads = [100 * point["mean"] for point in own], [100 * point["deviation"] for point in own]
        for axis, places in (
            (left, [100 * point["error"] for point in own]),
            (right, [point["bytes_per_sample"] / 1e3 for point in own]),
        ):
            axis.errorbar(places, means, spreads, label=variant, marker="o", capsize=3)
            for point, place, mean in zip(own, places, means, strict=True):
                axis.annotate(point["codec"], (place, mean), textcoords="offset points", xytext=(4, 4), fontsize=8)
    for axis in (left, right):
        if plain:
            axis.axhline(100 * statistics.mean(plain), color="gray", linestyle="--", label="plain")
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlabel("relative RMS error of the maps, %")
    right.set_xscale("log")
    right.set_xlabel("stored kB per sample and view, all teachers")
    return _drawn(figure, left, path)
