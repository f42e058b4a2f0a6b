"""What the product claims, as ratios of one run.

Cached step over the same step from RAM, live step over cached step, caching pass over the teachers' forward pass.

The floor of a cached step is the step whose pixels and targets lie in RAM; the reader may add what it must decode.
The ideal of live over cached is (teachers' forward + student step) / student step. The floor of the caching pass is
the teachers' forward on images in RAM; DALI, encoding, compression, checksums and fsync come on top, partly
at the same time.

Every ratio is taken between variants that alternate in short rounds within one process, so a machine that drifts
drifts for both; quoted is the median of the rounds' ratios with the lowest and highest round. Read-ahead queues are
full when a round begins and when it ends, so a round pays for what it consumes. Losses of cached and live f32 steps
are compared elsewhere (tests/stages/test_parity.py); here a round is refused if its loss is not finite.

    python bench/bench_end_to_end.py [--data CIFAR-100.bin] [--teachers a.pt b.pt c.pt] [--residency ram] [--tiny]

``--stages`` times decoding, forward, encoding, checksums, compression, writing and fsync one by one, to say where a
caching pass's time goes; ``--caching`` times whole passes, without students. ``--residency`` adds steps whose targets
are held after a first pass (`train.residency`) to the rounds.

Teachers without weights files are random ones; their maps compress differently from trained ones, so say which you
used. Rows go to bench/results_end_to_end.csv, the last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedfast.cli import configure_logging
from feedfast.data.batch import Batch
from feedfast.data.loader import Loader
from feedfast.files import write_all
from feedfast.models.build import build_model
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.compare import print_table
from feedfast.stages.data import open_train, view_plan
from feedfast.stages.demo import write_digits
from feedfast.stages.ensemble import load_teachers
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.record import encode_rows
from feedfast.stages.student import StudentRun
from feedfast.stages.worker import Worker
from feedfast.storage.blocks import compress_block, crc32c
from feedfast.storage.fit import fit_affine

METHODS: dict[str, dict[str, Any]] = {"kd": {}, "pfeed": {"beta": 500.0}, "ofd": {"alpha": 1e-3}}
RESULTS = Path(__file__).with_name("results_end_to_end.csv")


def base_recipe(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Data and teachers of the bench as a recipe's tree."""
    small = args.tiny or not Path(args.data).exists()
    data: dict[str, Any] = (
        {"train": str(write_digits(folder)[0]), "size": 16, "limit": 26}
        if small
        else {"train": args.data, "size": 32, "limit": args.limit}
    )
    model, classes = ("zoo/wrn-10-1", 10) if small else ("zoo/wrn-16-2", 100)
    teachers = []
    for number in range(3):
        weights = args.teachers[number] if number < len(args.teachers) else str(folder / f"{number}.pt")
        if number >= len(args.teachers):
            torch.save(build_model(model, num_classes=classes, weights=None, seed=number).state_dict(), weights)
        teachers.append({"name": f"t{number}", "model": model, "weights": weights, "precision": args.precision})
    batch = 64 if small else 128
    return {
        "data": data,
        "cache": {"views": 2, "batch": batch, "pilot": 256},
        "teachers": teachers,
        "student": {"model": "zoo/wrn-10-1" if small else "zoo/wrn-16-1"},
        "train": {
            "batch": batch,
            "precision": args.student_precision,
            "epochs": 1000,
            "replay": 0,
            "residency": "disk",
        },
    }


def recipe(tree: dict[str, Any], method: str, folder: Path, source: str = "cache", residency: str = "disk") -> Recipe:
    """The recipe of one method: its taps, its cache, its source."""
    taps = {"kd": [], "pfeed": ["final"], "ofd": ["ofd+margin"]}[method]
    teachers = [{**teacher, "taps": taps} for teacher in tree["teachers"]] if taps else tree["teachers"]
    cache = {**tree["cache"], "path": str(folder / f"{method}.zarr")}
    out = str(folder / f"{method}-{source}-{residency}")
    train = {**tree["train"], "source": source, "residency": residency, "out": out}
    return parse_recipe(
        {**tree, "teachers": teachers, "cache": cache, "method": {"name": method, **METHODS[method]}, "train": train}
    )


def images_in_ram(of: Recipe) -> list[torch.Tensor]:
    """Every batch of view 0 as the teachers get it."""
    data = open_train(of)
    with Loader(data, view_plan(of.data, of.seed), batch_size=of.cache.batch) as loader:
        return [batch.images for batch in loader.stream(0, np.arange(len(data)))]


def bench_caching(
    tree: dict[str, Any], method: str, folder: Path, repeats: int, *, planned: bool = True
) -> dict[str, Any]:
    """The caching pass over the teachers' forward on the same images in RAM, alternating; as planned, if it is."""
    of = recipe(tree, method, folder)
    if planned:
        run_plan(of)
    batches = images_in_ram(of)
    classes = len(open_train(of).classes)
    teachers = load_teachers(of, classes, torch.device("cpu")).values()

    def forward() -> float:
        begin = time.perf_counter()
        for images in batches:
            for teacher in teachers:
                teacher(images)
        return (time.perf_counter() - begin) / sum(len(images) for images in batches)

    forward()
    ratios, pure, spent = [], [], []
    result: dict[str, Any] = {}
    for repeat in range(repeats):
        # The first pass leaves the cache that `bench_steps` reads.
        path = of.cache.path if repeat == 0 else str(folder / f"{method}-{repeat}.zarr")
        fresh = of.model_copy(update={"cache": of.cache.model_copy(update={"path": path})})
        if planned and repeat:
            shutil.copy(f"{of.cache.path}.plan.json", f"{path}.plan.json")
        before = forward()
        result = run_cache(fresh)
        after = forward()
        one = 1 / result["images_per_second"]
        pure.append((before + after) / 2)
        spent.append(one)
        ratios.append(one / pure[-1])
    over_chw = [entry["bytes_per_sample"] / float(np.prod(entry["shape"])) for entry in result["taps"].values()]
    return {
        "ratio": ratios,
        "forward_ms_per_image": statistics.median(pure) * 1e3,
        "caching_ms_per_image": statistics.median(spent) * 1e3,
        "bytes_per_sample": result["bytes_per_sample"],
        "bytes_over_chw": max(over_chw, default=None),
    }


def bench_stages(tree: dict[str, Any], method: str, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds per row of each stage of the caching pass alone, least of the rounds, which alternate.

    Decoding and forward are of all cores, as encoding; the others of one thread, as a writer has it.
    """
    of = recipe(tree, method, folder)
    data = open_train(of)
    batch = min(of.cache.batch, len(data))
    with Loader(data, view_plan(of.data, of.seed), batch_size=batch) as loader:
        batches = [found.images for found in loader.stream(0, np.arange(4 * batch) % len(data))]
        maps: list[tuple[torch.Tensor, Any, np.ndarray]] = []
        teachers = load_teachers(of, len(data.classes), torch.device("cpu")).values()
        for teacher in teachers:
            teacher.fit_margins(batches[:1])
            for tap, values in teacher(batches[0], widen=False).items():
                if tap in teacher.requests:
                    kept = teacher.transform(tap)
                    floats = kept.teacher(values.float()).movedim(1, -1).reshape(-1, values.shape[1])
                    scale = [torch.from_numpy(row) for row in fit_affine(floats[::64].contiguous().numpy(), "u8")]
                    codes, _ = encode_rows(values, "u8", *scale, kept)
                    maps.append((values, (*scale, kept), codes))
        raw = [codes.reshape(-1) for *_, codes in maps]
        sink = os.open(folder / "stages", os.O_RDWR | os.O_CREAT | os.O_TRUNC)

        def write() -> None:
            os.ftruncate(sink, 0)
            os.lseek(sink, 0, os.SEEK_SET)
            write_all(sink, [codes.data for codes in raw])

        work: dict[str, Callable[[], object]] = {
            "decode": lambda: list(loader.stream(0, np.arange(batch))),
            "forward": lambda: [teacher(batches[0]) for teacher in teachers],
            "forward, maps as computed": lambda: [teacher(batches[0], widen=False) for teacher in teachers],
            "encode": lambda: [encode_rows(values, "u8", *scale, codes) for values, scale, codes in maps],
            "check and crc32c": lambda: [(codes.max(), crc32c(codes), crc32c(codes)) for codes in raw],
            "sha256": lambda: [hashlib.sha256(codes) for codes in raw],
            "zstd": lambda: [compress_block(codes, "zstd") for codes in raw],
            "write": write,
            "fsync": lambda: os.fsync(sink),
        }
        least = dict.fromkeys(work, float("inf"))
        for _ in range(rounds):
            for name, stage in work.items():
                begin = time.perf_counter()
                stage()
                least[name] = min(least[name], time.perf_counter() - begin)
        os.close(sink)
    return {name: seconds * 1e3 / batch for name, seconds in least.items()}


def steps(run: StudentRun, start: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) without end."""
    while True:
        for batch in run.loop.batches(start):
            yield start, batch
            start += 1


def held_run(of: Recipe) -> StudentRun:
    """A run that has walked every view once."""
    run = StudentRun(of, Worker())
    for epoch in range(of.cache.views):
        for _ in run.loop.targets(epoch):
            pass
    return run


def bench_steps(
    tree: dict[str, Any], method: str, folder: Path, rounds: int, count: int, residency: str = ""
) -> dict[str, Any]:
    """Step from the cache, from RAM (pixels and targets), with live teachers, and with targets that are held."""
    cached = StudentRun(recipe(tree, method, folder), Worker())
    live = StudentRun(recipe(tree, method, folder, "live"), Worker())
    held = [batch for _, batch in zip(range(count), cached.loop.batches(0), strict=False)]
    runs, streams = {"cached": cached, "live": live}, {"cached": steps(cached, 0), "live": steps(live, 0)}
    if residency:
        runs["resident"] = held_run(recipe(tree, method, folder, residency=residency))
        streams["resident"] = steps(runs["resident"], 0)

    def one(kind: str, number: int) -> float:
        begin = time.perf_counter()
        if kind == "teachers":
            live.source.targets(held[number % len(held)])  # type: ignore[attr-defined]
            return (time.perf_counter() - begin) * 1e3
        if kind == "ram":
            losses = cached.trainer.step(number, held[number % len(held)])
        else:
            step, batch = next(streams[kind])
            losses = runs[kind].trainer.step(step, batch)
        value = float(losses["loss"])
        if not np.isfinite(value):
            raise SystemExit(f"{method}, {kind}: loss {value}; no timing without a sound step")
        return (time.perf_counter() - begin) * 1e3

    kinds = ("ram", *runs, "teachers")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in kinds if number % 2 else reversed(kinds):
            measured = [one(kind, step) for step in range(count)]
            if number:
                times[kind].append(statistics.median(measured))
            time.sleep(0.02)
    for run in runs.values():
        run.close()
    ideal = [(teachers + ram) / ram for teachers, ram in zip(times["teachers"], times["ram"], strict=True)]
    live_over_cached = _ratios(times["live"], times["cached"])
    return {
        "cached_over_ram": _ratios(times["cached"], times["ram"]),
        "live_over_cached": live_over_cached,
        "ideal_live_over_cached": ideal,
        "share_of_ideal": _ratios(live_over_cached, ideal),
        **({"resident_over_cached": _ratios(times["resident"], times["cached"])} if residency else {}),
        **{f"{kind}_ms": statistics.median(values) for kind, values in times.items()},
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [one / two for one, two in zip(above, below, strict=True)]


def spread(values: list[float]) -> str:
    """Median (lowest to highest round)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def _cell(value: Any) -> Any:
    """A figure as the CSV file holds it."""
    if isinstance(value, list):
        return spread(value)
    return round(value, 4) if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="../shared/data/cifar-100-binary/train.bin", help="CIFAR-100 binary file; digits without it"
    )
    parser.add_argument(
        "--teachers", nargs="*", default=[], help="state_dicts of WRN-16-2; random weights without them"
    )
    parser.add_argument("--limit", type=int, default=30, help="images per class")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the teachers")
    parser.add_argument("--student-precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps a round")
    parser.add_argument("--repeats", type=int, default=3, help="caching passes")
    parser.add_argument("--stages", action="store_true", help="the caching pass's stages one by one, and nothing else")
    parser.add_argument("--caching", action="store_true", help="caching passes and nothing else; rows are not appended")
    parser.add_argument(
        "--residency", default="", choices=["ram", "gpu"], help="steps with held targets, too; rows are not appended"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="digits and small networks: checks the bench, measures nothing"
    )
    args = parser.parse_args(argv)
    configure_logging()
    if args.tiny:
        args.rounds, args.steps, args.repeats = 1, 2, 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = base_recipe(args, folder)
        for method in args.methods if args.stages else ():
            found = bench_stages(tree, method, folder, args.rounds)
            print_table("ms per row, least of the rounds", [{"method": method, **found}])
            rows.append({**provenance(args), "method": method, **found})
        for method in () if args.stages else args.methods:
            caching = bench_caching(tree, method, folder, args.repeats)
            if args.caching:
                row = {"method": method, **{key: _cell(value) for key, value in caching.items()}}
                print_table("caching pass over forward (median of passes, lowest to highest)", [row])
                rows.append({**provenance(args), **row})
                continue
            step = bench_steps(tree, method, folder, args.rounds, args.steps, args.residency)
            row = {
                "method": method,
                "cached / RAM": spread(step["cached_over_ram"]),
                "live / cached": spread(step["live_over_cached"]),
                "of ideal": spread(step["share_of_ideal"]),
                "caching / forward": spread(caching["ratio"]),
                "bytes per sample": caching["bytes_per_sample"],
                "bytes / CHW": caching["bytes_over_chw"],
                "cached ms": step["cached_ms"],
                "live ms": step["live_ms"],
            }
            if args.residency:
                row["resident / cached"] = spread(step["resident_over_cached"])
            print_table("end to end (median of rounds, lowest to highest)", [row])
            figures = {**step, **{f"caching_{key}": value for key, value in caching.items()}}
            shown = {key: _cell(value) for key, value in figures.items()}
            rows.append({**provenance(args), "method": method, **shown})
    if not (
        args.tiny or args.residency or args.stages or args.caching
    ):  # the file's columns are those of a run without it
        _append(rows)
    print(json.dumps({"rows": rows}))


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a row was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "cpu": f"{cpu} x{torch.get_num_threads()}",
        "torch": torch.__version__,
        "teachers": "trained" if args.teachers else "random",
        "precision": f"teachers {args.precision}, student {args.student_precision}",
    }


def _append(rows: list[dict[str, Any]]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
