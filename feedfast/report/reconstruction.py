"""The page of the reconstruction analysis: error curves of every run's paraphraser, and a table.

Each curve is drawn twice: as it is, and per mean |map|, because a map of twice the scale has twice the error.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.run import as_label, figure_html, page, provenance_html, table_html

NOTE = (
    "A paraphraser (autoencoder of factor transfer) per network, trained on that network's own final maps of the "
    "training images and measured on the validation images after each epoch; all with the same setting. "
    "Whether a smaller error means a better student is not known: this page reports and does not judge."
)


def reconstruction_curves(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Mean L1 per epoch (training dashed), and that of the validation images per mean |map|: a matplotlib figure.

    Args:
        runs: each with ``name``, ``train_l1``, ``test_l1`` and ``test_mean_abs``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    error, relative = figure.subplots(1, 2)
    for run in runs:
        epochs = range(1, len(run["test_l1"]) + 1)
        (line,) = error.plot(
            epochs, run["test_l1"], label=as_label(run["name"]), marker="o", markersize=3, linewidth=1.2
        )
        color = line.get_color()
        error.plot(epochs, run["train_l1"], linestyle="--", linewidth=1, color=color, label="_training")
        shares = [value / run["test_mean_abs"] if run["test_mean_abs"] else 0.0 for value in run["test_l1"]]
        relative.plot(epochs, shares, label=as_label(run["name"]), marker="o", markersize=3, linewidth=1.2, color=color)
    for axis, title in ((error, "mean L1 (dashed: training)"), (relative, "mean L1 / mean |map|, validation")):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    return figure


def write_reconstruction(
    path: Path, runs: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], made: Provenance
) -> Path:
    """Write the page; see `feedfast.stages.analyze.run_reconstruction` for what ``runs`` hold."""
    rows = [
        {
            "run": run["name"],
            "model": run["model"],
            "method": run["method"],
            "accuracy": run["val_accuracy"],
            "map": " x ".join(map(str, run["shape"])),
            "mean |map|": run["test_mean_abs"],
            "L1 training": run["train_l1"][-1],
            "L1 validation": run["final_l1"],
            "L1 / mean |map|": run["final_relative_l1"],
        }
        for run in runs
    ]
    body = f"<p>{html.escape(NOTE)}</p>" + table_html(rows) + figure_html(reconstruction_curves(runs))
    body += "<h2>Setting</h2><pre>" + html.escape(json.dumps(setting, indent=2)) + "</pre>"
    body += provenance_html([made])
    write_text(path, page("Reconstruction of final maps", body))
    return path
