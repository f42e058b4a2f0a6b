"""Every page feedfast writes, from small made-up values: no training, so that a test of pages takes seconds.

All names that people give come from one function, so that a test can ask for hostile ones everywhere at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from feedfast.provenance import Machine, Provenance
from feedfast.report.chart import Span
from feedfast.report.compare import write_comparison, write_groups
from feedfast.report.inspect import write_inspection
from feedfast.report.page import Section
from feedfast.report.pictures import (
    Detected,
    Mapped,
    Segmented,
    Viewed,
    detected_html,
    mapped_html,
    segmented_html,
    viewed_html,
)
from feedfast.report.reconstruction import write_reconstruction
from feedfast.report.run import write_report
from feedfast.words import toml_text

Name = Callable[[str], str]


def plain(name: str) -> str:
    return name


def make_pages(out: Path, name: Name = plain, *, groups: int = 4, rows: int = 40, classes: int = 12) -> dict[str, Path]:
    """Kind → page, all below ``out``."""
    return {
        "run": make_run(out / "run", name, rows=rows, classes=classes),
        "compare": make_compare(out, name, groups=groups, rows=rows),
        "demo": make_demo(out, name),
        "inspect": make_inspect(out, name, classes=classes),
        "reconstruction": make_reconstruction(out, name),
    }


def made(asked: Name) -> Provenance:
    def name(text: str) -> str:
        return asked(text).encode(errors="replace").decode()  # JSON has no halves of characters

    return Provenance(
        command=name("feedfast train recipe.toml"),
        recipe={"data": {"train": [name("images")]}},
        commit="0123456789abcdef0123",
        dirty=True,
        versions={"feedfast": "0.1.0", "torch": "2.14.1", name("package")[:200]: "1.0", "gone": None},
        machine=Machine(host="abc", system=name("Linux")[:200], cpu=name("cpu")[:200], cores=2, gpus=()),
        started="2026-01-02T03:04:05.678+00:00",
        ended="2026-01-02T04:04:05.678+00:00",
    )


def write_metrics(folder: Path, rows: int, terms: tuple[str, ...], lift: float = 0.0) -> None:
    """A metrics.jsonl as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(1, rows + 1):
        step, falling = number * 20, math.exp(-4 * number / rows)
        values = {"loss": 6 * falling + 0.1, "ce": 2.3 * falling + 0.05}
        values |= {term: (place + 1) * 0.03 * falling + 1e-4 for place, term in enumerate(terms)}
        timing = {"images_per_second": 900.0 + 40 * math.sin(number), "data_wait_fraction": 0.04}
        lines.append({"step": step, **values, "lr": 0.1 * (1 - number / (rows + 1)), **timing})
        if number % 5 == 0:
            lines.append({"step": step, "val_accuracy": 0.95 - 0.6 * falling + lift, "epoch": number // 5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, name: Name, *, rows: int, classes: int) -> Path:
    write_metrics(folder, rows, (name("feature"), name("attention.stage1")))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    words = tuple(name(f"class{number}") for number in range(classes))
    mask = rng.integers(0, classes, (48, 64)).astype(np.uint8)
    boxes = np.array([[4.0, 20.0, 30.0, 44.0], [34.0, 22.0, 60.0, 40.0]])
    labels = np.array([0, classes - 1])
    sampled = np.ma.MaskedArray(rng.normal(size=(4, 6, 6)), np.broadcast_to(rng.random((6, 6)) > 0.25, (4, 6, 6)))
    teachers = {name("teacher a"): rng.normal(size=(4, 6, 6)), name("teacher b"): sampled}
    students = {"student before training": rng.normal(size=(2, 6, 6)), "student after training": np.zeros((2, 6, 6))}
    sections = [
        Section("Validation images", segmented_html([Segmented(name("s.png"), image, mask, mask)], words)),
        Section(
            "Boxes", detected_html([Detected(name("d"), image, boxes, labels, boxes, labels, np.ones(2))], words)
        ),
        Section("Maps", mapped_html([Mapped(name("m"), image, {name("ofd1"): teachers | students})])),
        Section("Views", viewed_html([Viewed(name("v"), [(name("view 0"), image, [name("crop 16x16")])] * 3)])),
    ]  # fmt: skip
    result = {
        "val_accuracy": 0.9231, "final_loss": 0.12, "steps": rows * 20, "images_per_second": 912.3,
        "data_wait_fraction": 0.04, "step_ms": 35.2, "seconds": 4000.0, "source": "cache", "method": name("pfeed"),
        "model": name("zoo/wrn-16-1"), "parameters": 123456, "out": name("runs/student"),
        "predicted": {"step_ms": 33.0}, "prediction_error": {"step_ms": 0.067}, "branch_accuracy": None,
    }  # fmt: skip
    recipe = {
        "seed": 0,
        "data": {"train": [name("images/train")], "size": 32},
        "method": [{"name": name("pfeed"), "beta": 500.0}],
        "teachers": [{"name": name("a"), "taps": [name("final")]}],
    }
    asked = {"Student": name("zoo/wrn-16-1"), "Teachers": [name("a: zoo"), name("b: zoo")], "Nothing": None}
    cost = {"Machine": name("cpu")}
    return write_report(folder, result, toml_text(recipe), [made(name)], asked=asked, cost=cost, pictures=sections)


def make_compare(out: Path, name: Name, *, groups: int, rows: int) -> Path:
    folders: dict[str, list[Path]] = {}
    table, spans = [], []
    for number in range(groups):
        words = name(f"group {number}, train.lr=0.1")
        folders[words] = []
        for seed in range(2):
            folder = out / "runs" / f"{number}-{seed}"
            write_metrics(folder, rows, (), lift=-0.001 * number - 0.002 * seed)
            folders[words].append(folder)
        (folders[words][0] / "report.html").touch()
        table.append({
            "run": words, "seeds": "2", "val_accuracy": f"{95 - number / 10:.2f}% ± 0.31",
            "over baseline": "+0.40 ± 0.20", "steps": "1,200", "step ms": "35.2",
            "bytes per sample": "–" if number else "34,821",
        })  # fmt: skip
        spans.append(Span(words, 1.0 - number / 10, None if number == 1 else 0.4, "+0.40 ± 0.40"))
    caches = [{"cache": name("/data/caches/a.zarr"), "runs": 3, "made in": "8.4 s", "paid back": None}]
    path = out / "compare.html"
    return write_groups(path, table, folders, "val_accuracy", "ce", made(name), differences=spans,
                        baseline=name("the baseline none"), caches=caches)  # fmt: skip


def make_demo(out: Path, name: Name) -> Path:
    folder = out / "student"
    write_metrics(folder, 10, ())
    rows = [{"method": name(method), "accuracy": 0.9, "live step ms": None} for method in ("none", "kd", "ofd")]
    documents = {name("plan"): {"bytes": 123, name("teacher"): name("a")}}
    return write_comparison(out / "demo.html", name("digits"), rows, {name("kd"): folder}, documents, made(name))


def make_inspect(out: Path, name: Name, *, classes: int) -> Path:
    targets = [
        {"array": name(f"targets/a/ofd{number}"), "row": "16x16x32", "codec": name("u8"), "ratio": 1.25, "error": None}
        for number in range(4)
    ]
    teachers = [{"teacher": name("a"), "model": name("zoo/wrn-10-2"), "px": 16, "judged": ""}]
    maps = Mapped(name("row"), None, {name("final"): {name("a"): np.random.default_rng(0).normal(size=(4, 5, 5))}})
    words = [name(f"class{number}") for number in range(classes)]
    return write_inspection(
        out / "inspect.html",
        name("/data/caches/digits.zarr"),
        {"rows": "1,200", "state": name("complete")},
        {"Classes": ", ".join(words), "Left out": [name("3 .txt")]},
        targets,
        teachers,
        {"teachers": {name("a"): {"model": name("zoo")}}},
        [Section("Maps", mapped_html([maps]))],
        [made(name)],
        made(name),
    )


def make_reconstruction(out: Path, name: Name) -> Path:
    runs = [
        {
            "name": name(f"run {number}"), "path": name("runs"), "model": name("zoo/wrn-16-1"), "method": name("kd"),
            "val_accuracy": 0.9, "shape": [64, 4, 4], "train_l1": [0.5, 0.4, 0.3], "test_l1": [0.5, 0.4, 0.35],
            "test_mean_abs": 0.0 if number else 1.5, "final_l1": 0.35, "final_relative_l1": 0.2,
        }
        for number in range(2)
    ]  # fmt: skip
    return write_reconstruction(out / "reconstruction.html", runs, {"rate": 0.5, "epochs": 3}, made(name))
