"""The page of the reconstruction analysis: error curves of every run's paraphraser, and a table.

Each error is drawn twice: as it is, and per mean |map|, because a map of twice the scale has twice the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.chart import Chart, Series, charts
from feedfast.report.compare import COLORED
from feedfast.report.page import Section, facts, joined, made_by, notes, page, provenance, table

NOTE = (
    "A paraphraser (autoencoder of factor transfer) per network, trained on that network's own final maps of the "
    "training images and measured on the validation images after each epoch; all with the same setting. "
    "Whether a smaller error means a better student is not known: this page reports and does not judge."
)


def reconstruction_charts(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Mean L1 per epoch, of the validation images, of those per mean |map|, and of the training images.

    Args:
        runs: each with ``name``, ``train_l1``, ``test_l1`` and ``test_mean_abs``.
    """

    def curves(key: str, scale: bool = False) -> list[Series]:
        found = []
        for number, run in enumerate(runs):
            by = (run["test_mean_abs"] or 1.0) if scale else 1.0
            points = [(float(epoch), value / by) for epoch, value in enumerate(run[key], 1)]
            found.append(Series(run["name"], points, style=number if number < COLORED else None))
        return found

    return [
        Chart("Mean L1 per mean |map|, validation", curves("test_l1", scale=True), x="epoch"),
        Chart("Mean L1, validation", curves("test_l1"), x="epoch", log=True),
        Chart("Mean L1, training", curves("train_l1"), x="epoch", log=True),
    ]


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
    sections = [
        Section("Result", joined([notes(NOTE), table(rows, "Errors after the last epoch")])),
        Section("Curves", charts(reconstruction_charts(runs))),
        Section("Setting", facts(setting)),
        Section("How this page was made", provenance([made])),
    ]
    title = "Reconstruction of final maps"
    write_text(path, page("Analysis of runs", title, "", sections, made_by([made])))
    return path
