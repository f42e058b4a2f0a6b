"""The report of a run shows what the run wrote, whatever its method calls its terms."""

from __future__ import annotations

from feedfast.report.chart import charts
from feedfast.report.run import run_charts


def test_curves_show_every_term() -> None:
    rows = [
        {"step": 1, "loss": 5.0, "ce": 3.0, "attention.stage1": 2.0, "lr": 0.1, "images_per_second": 90.0, "note": "x"},
        {"step": 2, "loss": 4.0, "ce": 2.5, "attention.stage1": 1.5, "lr": 0.2, "images_per_second": 80.0},
        {"step": 2, "val_accuracy": 0.25, "val_top5": None, "epoch": 1},
        {"step": 3, "loss": 3.0, "ce": 2.0, "attention.stage1": 1.0, "data_wait_fraction": 0.5, "done": True},
    ]
    happened, cost = run_charts(rows)
    shown = {chart.title: {one.name: list(one.points) for one in chart.series} for chart in [*happened, *cost]}
    assert shown == {
        "Loss and its terms, unweighted": {
            "loss": [(1, 5.0), (2, 4.0), (3, 3.0)],
            "ce": [(1, 3.0), (2, 2.5), (3, 2.0)],
            "attention.stage1": [(1, 2.0), (2, 1.5), (3, 1.0)],
        },
        "Validation: val_accuracy": {"val_accuracy": [(2, 0.25)]},
        "Learning rate": {"lr": [(1, 0.1), (2, 0.2)]},
        "Images per second": {"images_per_second": [(1, 90.0), (2, 80.0)]},
        "Share of the time spent waiting for data": {"data_wait_fraction": [(3, 0.5)]},
    }


def test_many_terms_are_drawn_in_several_figures() -> None:
    rows = [{"step": step, **{f"term{number}": 1.0 * number for number in range(20)}} for step in (1, 2)]
    happened, _ = run_charts(rows)
    terms = [one.name for chart in happened for one in chart.series if one.name.startswith("term")]
    assert terms == [f"term{number}" for number in range(20)]
    assert max(len(chart.series) for chart in happened) <= 6


def test_an_empty_run_has_no_figures() -> None:
    happened, cost = run_charts([])
    assert charts([*happened, *cost]) == ""
