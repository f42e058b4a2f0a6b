"""The report of a run shows what the run wrote, whatever its method calls its terms."""

from __future__ import annotations

from feedfast.report.run import curves


def test_curves_show_every_term() -> None:
    rows = [
        {"step": 1, "loss": 5.0, "ce": 3.0, "attention.stage1": 2.0, "lr": 0.1, "images_per_second": 90.0, "note": "x"},
        {"step": 2, "loss": 4.0, "ce": 2.5, "attention.stage1": 1.5, "lr": 0.2, "images_per_second": 80.0},
        {"step": 2, "val_accuracy": 0.25, "val_top5": None, "epoch": 1},
        {"step": 3, "loss": 3.0, "ce": 2.0, "attention.stage1": 1.0, "data_wait_fraction": 0.5, "done": True},
    ]
    shown = {
        axis.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()}
        for axis in curves(rows).axes
    }
    assert shown == {
        "loss": {
            "loss": [(1, 5.0), (2, 4.0), (3, 3.0)],
            "ce": [(1, 3.0), (2, 2.5), (3, 2.0)],
            "attention.stage1": [(1, 2.0), (2, 1.5), (3, 1.0)],
        },
        "validation": {"val_accuracy": [(2, 0.25)]},
        "learning rate": {"lr": [(1, 0.1), (2, 0.2)]},
        "images per second": {"images_per_second": [(1, 90.0), (2, 80.0)]},
    }


def test_curves_of_an_empty_run() -> None:
    assert [len(axis.get_lines()) for axis in curves([]).axes] == [0, 0, 0, 0]
