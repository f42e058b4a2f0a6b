"""`feedfast demo`: the whole product on real images in a few minutes, with nothing to download and no GPU.

The package carries 1,797 scanned handwritten digits (`feedfast/digits`: 8x8 pixels, gray; the test part of the UCI
set). They are enlarged to 16x16 and stored as .npz. Three teachers of different seeds learn from all 1,437 training
images; then the student is given only the first 30 per class and four views of them, plainly or with what the cached
ensemble says about them. Every step is an ordinary stage with an ordinary recipe, kept with the results, so the demo is
also an example of how to do it.

Not a benchmark: a data set this small separates methods poorly, and the step times are those of a tiny network.
"""

from __future__ import annotations

import logging
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feedfast.data.dali import require_dali
from feedfast.files import write_json
from feedfast.provenance import Provenance
from feedfast.recipe import parse_recipe
from feedfast.report.compare import print_table, write_comparison
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.progress import format_bytes
from feedfast.stages.student import run_train
from feedfast.stages.verify import run_verify

log = logging.getLogger(__name__)

SIDE = 16
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "kd": {"tau": 4.0, "alpha": 0.9},
    "pfeed": {"beta": 500.0},
    "ofd": {"alpha": 1e-3},
}
TEACHERS = ("a", "b", "c")
TEACHER_MODEL, STUDENT_MODEL = "zoo/wrn-10-2", "zoo/wrn-10-1"
TEACHER_TRAINING = {"source": "none", "epochs": 7, "batch": 64, "lr": 0.1, "schedule": "one-cycle", "eval_every": 0}
LIVE_STEPS = 20


def run_demo(out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Train teachers, plan, cache, verify, train four students from the cache, time them live, report.

    Returns:
        The JSON of `feedfast demo`: ``students`` (one row per method), ``cache`` (the stage's JSON), ``verified``,
        ``break_even_epochs`` by method, ``seconds``, ``report``.
    """
    require_dali()
    started, job = time.perf_counter(), Provenance.begin()
    out.mkdir(parents=True, exist_ok=True)
    train, val = write_digits(out)
    data = {
        "train": str(train),
        "val": str(val),
        "size": SIDE,
        "flip": 0.0,
        "mean": [0.3, 0.3, 0.3],
        "std": [0.35, 0.35, 0.35],
    }
    teachers = []
    for seed, name in enumerate(TEACHERS, start=1):
        folder = out / f"teacher-{name}"
        tree = {
            "overwrite": overwrite,
            "seed": seed,
            "data": data,
            "cache": {"views": 0},
            "student": {"model": TEACHER_MODEL},
            "train": {**TEACHER_TRAINING, "out": str(folder)},
        }
        run_train(parse_recipe(tree))
        weights = str(folder / "student.pt")
        teachers.append({"name": name, "model": TEACHER_MODEL, "weights": weights, "taps": ["final", "ofd+margin"]})
    cached = {
        "overwrite": overwrite,
        "data": {**data, "limit": 30},
        "teachers": teachers,
        "cache": {"path": str(out / "digits.zarr"), "views": 4, "batch": 50, "pilot": 256},
        "method": {"name": "pfeed"},
    }
    recipe = parse_recipe(cached)
    planned = run_plan(recipe)
    size, free = format_bytes(planned["bytes"]), format_bytes(planned["free_bytes"])
    log.info("plan: %s, %.1f s, %s free", size, planned["seconds"], free)
    written = run_cache(recipe, whole=True)
    checked = run_verify(recipe.cache.path, full=True, replay=4, teachers_percent=5, recipe=recipe)
    rows = [_student(out, cached, name, parameters, written) for name, parameters in METHODS.items()]
    print_table(f"digits: 30 labeled images per class, student {STUDENT_MODEL}, three {TEACHER_MODEL} teachers", rows)
    report = write_comparison(
        out / "report.html",
        "feedfast demo: handwritten digits",
        rows,
        {row["method"]: out / f"student-{row['method']}" for row in rows},
        {"plan": planned, "cache": written, "verify": checked},
        (job := job.finished()),
    )
    break_even = {row["method"]: row["break-even epochs"] for row in rows if row["break-even epochs"] is not None}
    result = {
        "students": rows,
        "cache": written,
        "verified": checked["ok"],
        "break_even_epochs": break_even,
        "seconds": time.perf_counter() - started,
        "report": str(report),
    }
    write_json(out / "demo.json", {**result, "provenance": [job.model_dump(mode="json")]})
    return result


def _student(
    out: Path, cached: dict[str, Any], name: str, parameters: dict[str, Any], written: dict[str, Any]
) -> dict[str, Any]:
    """Train one student from the cache, then a few steps of the same recipe live; one row of the table."""
    source = "none" if name == "none" else "cache"
    settings = {
        "source": source,
        "epochs": 28,
        "batch": 50,
        "lr": 0.05,
        "warmup_epochs": 2,
        "weight_decay": 5e-4,
        "out": str(out / f"student-{name}"),
        "eval_every": 10,
    }
    tree = {**cached, "method": {"name": name, **parameters}, "student": {"model": STUDENT_MODEL}, "train": settings}
    result = run_train(parse_recipe(tree))
    row: dict[str, Any] = {
        "method": name,
        "accuracy": result["val_accuracy"],
        "cached step ms": result["step_ms"],
        "live step ms": None,
        "live / cached": None,
        "break-even epochs": None,
    }
    if source == "cache":
        timed = {"source": "live", "max_steps": LIVE_STEPS, "eval_every": 0, "out": str(out / f"live-{name}")}
        live = {**tree, "data": {**tree["data"], "val": []}, "train": {**settings, **timed}}
        live_ms = run_train(parse_recipe(live))["step_ms"]
        steps_per_epoch = result["steps"] / settings["epochs"]
        saved_ms = (live_ms - result["step_ms"]) * steps_per_epoch
        row["live step ms"] = live_ms
        row["live / cached"] = live_ms / result["step_ms"]
        row["break-even epochs"] = written["seconds"] * 1e3 / saved_ms if saved_ms > 0 else None
    return row


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The digits that the package carries: images uint8 [1797, 8, 8] of 0 to 16, labels int32 [1797]."""
    with (files("feedfast") / "digits" / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as held:
        return held["images"], held["labels"].astype(np.int32)


def write_digits(out: Path) -> tuple[Path, Path]:
    """The digits as 16x16 uint8 .npz files: every fifth image is validation. Returns (train, val)."""
    scanned, labels = load_digits()
    small = (scanned * (255 / 16)).round().astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in small]
    )
    held_out = np.arange(len(labels)) % 5 == 4
    paths = out / "digits-train.npz", out / "digits-val.npz"
    for path, mask in zip(paths, (~held_out, held_out), strict=True):
        np.savez(path, images=images[mask], labels=labels[mask])
    return paths
