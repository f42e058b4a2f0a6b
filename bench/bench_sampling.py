"""What does it save, and what does it cost, to store a share of a map's positions? OFD, of one teacher.

    python bench/bench_sampling.py DATA [--teacher a.pt]     bytes per sample, and the student's step, by share
    python bench/bench_sampling.py --kernels                 gathering in front of the connector or behind it (CPU)
    python bench/bench_sampling.py --students --cifar DATA --camvid DATA     accuracy by share, three seeds
    python bench/bench_sampling.py --summary                 no run, only the tables of the students there are

DATA is a folder with CIFAR-100's train.bin and test.bin, or with CamVid's train/ and val/. Steps have pixels and
targets in RAM: real maps of a WRN-16-2 (random without --teacher) and shares that alternate, round by round. Students
are those of bench_methods.py and bench_dense.py, with all they have in common and in their tables: of a seed all start
from the same weights and see the same views, so a share is compared with the whole maps seed by seed.

Rows of the first two go to bench/results_sampling.csv. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_dense
import bench_methods
import numpy as np
import paired
import torch
from bench_end_to_end import base_recipe, spread
from inputs import random_codes, random_map
from torch import Tensor

from feedfast.cli import configure_logging
from feedfast.data.positions import positions_per_map, sample_positions
from feedfast.methods.parts import Connector, ConnectorBatchNorm
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.compare import print_table
from feedfast.stages.compare import bytes_per_sample
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun
from feedfast.stages.worker import Worker
from feedfast_kernels import Codes, gather_positions, partial_l2

log = logging.getLogger("feedfast.bench")

RESULTS = Path(__file__).with_name("results_sampling.csv")
COLUMNS = (
    "date", "commit", "device", "torch", "threads", "part", "case", "share", "bytes_per_sample", "ms", "over_whole",
    "over_plain",
)  # fmt: skip
SHARES = (1.0, 0.5, 0.25, 0.125)
# (batch, student's channels, teacher's, side): WRN-16-1 of WRN-16-2 on CIFAR, a ResNet's stages at 224
CONNECTORS = [(128, 16, 32, 32), (128, 32, 64, 16), (128, 64, 128, 8), (16, 64, 256, 56), (16, 128, 512, 28)]
TINY = [(2, 8, 16, 8)]


def tap_of(share: float) -> str:
    """The recipe's entry."""
    return "ofd+margin" if share == 1 else f"ofd+margin@{share}"


def share_recipe(tree: dict[str, Any], share: float | None, folder: Path) -> Recipe:
    """A student of a share's cache; None = a plain one."""
    name = "plain" if share is None else str(share)
    teachers = [] if share is None else [{**tree["teachers"][0], "taps": [tap_of(share)]}]
    sections = {**tree, "teachers": teachers, "cache": {**tree["cache"], "path": str(folder / f"{name}.zarr")}}
    sections["method"] = {"name": "none"} if share is None else {"name": "ofd", "alpha": 1e-3}
    train = {**tree["train"], "source": "none" if share is None else "cache", "out": str(folder / name)}
    return parse_recipe({**sections, "train": train})


def bench_steps(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Bytes and step of every share; what is compared alternates in short rounds of the same two batches."""
    tree = base_recipe(args, folder)
    tree["cache"]["views"] = 1
    if args.threads:
        tree["train"]["threads"] = args.threads
    shares: list[float | None] = [None, *SHARES]
    recipes = {share: share_recipe(tree, share, folder) for share in shares}
    for share, recipe in recipes.items():
        if share is not None:
            run_cache(recipe)
    if args.only_caches:
        return []
    runs = {share: StudentRun(recipe, Worker()) for share, recipe in recipes.items()}
    held = {share: bench_methods.held_batches(run, 2) for share, run in runs.items()}
    times: dict[float | None, list[float]] = {share: [] for share in shares}
    until = time.monotonic() + args.seconds
    for number in range(args.rounds + 1):
        if number > 2 and time.monotonic() > until:
            break
        for share in shares if number % 2 else shares[::-1]:
            begin = time.perf_counter()
            for step, batch in enumerate(held[share]):
                if not math.isfinite(float(runs[share].trainer.step(step, batch)["loss"])):
                    raise SystemExit(f"share {share}: a loss that is not finite; no timing without a sound step")
            if number:  # the first round warms up
                times[share].append((time.perf_counter() - begin) / len(held[share]) * 1e3)
    for run in runs.values():
        run.close()

    def over(share: float | None, other: float | None) -> str:
        return spread([one / two for one, two in zip(times[share], times[other], strict=True)])

    return [
        {
            "part": "step",
            "case": f"{tree['student']['model']} of {tree['teachers'][0]['model']}",
            "share": "plain" if share is None else share,
            "bytes_per_sample": "" if share is None else bytes_per_sample(recipes[share]),
            "ms": statistics.median(times[share]),
            "over_whole": over(share, 1.0),
            "over_plain": over(share, None),
        }
        for share in shares
    ]


def connector_calls(shape: tuple[int, int, int, int], share: float) -> dict[str, Callable[[], Tensor]]:
    """OFD's connector and distance: of whole maps, gathered in front of the convolution, and behind it."""
    batch, ours, theirs, side = shape
    count = positions_per_map(share, side, side)
    cpu = torch.device("cpu")
    student = random_map((batch, ours, side, side), torch.float32, "NHWC", cpu, seed=1).requires_grad_()
    places = torch.from_numpy(sample_positions(0, 0, np.arange(batch), "ofd1", side, side, count))
    codes = random_codes((batch, theirs, side, side), "u8", cpu, seed=2)
    rows = codes.data.flatten(1, 2).gather(1, places.long()[:, :, None].expand(-1, -1, theirs))
    few = Codes(rows[:, None], codes.offset, codes.step, "u8")
    margin, connector = torch.full((theirs,), -0.5), Connector(ours, theirs).train()
    convolution, norm = connector
    assert isinstance(norm, ConnectorBatchNorm)
    same = random_map((batch, theirs, side, side), torch.float32, "NHWC", cpu, seed=3).requires_grad_()
    compact = Codes(rows, codes.offset, codes.step, "u8")
    return {
        "connector, whole": lambda: connector.distance(student, codes, margin, 1.0),
        "connector, gathered in front": lambda: connector.distance(
            gather_positions(student, places).unsqueeze(2), few, margin, 1 / share
        ),
        "connector, gathered behind": lambda: norm.distance(
            gather_positions(convolution(student), places).unsqueeze(2), few, margin, 1 / share
        ),
        "distance, whole": lambda: partial_l2(same, codes, margin_C=margin),
        "distance, at positions": lambda: partial_l2(same, compact, margin_C=margin, positions=places),
    }


def bench_kernels(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of every call, least of rounds that alternate; and drawing the positions."""
    for shape in TINY if args.tiny else CONNECTORS:
        batch, _, _, side = shape
        for share in (0.25,) if args.tiny else (0.25, 0.125):
            calls = connector_calls(shape, share)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(args.rounds + 1):
                for name in calls if number % 2 else reversed(calls):
                    begin = time.perf_counter()
                    calls[name]().backward()  # type: ignore[no-untyped-call]
                    if number:
                        times[name].append((time.perf_counter() - begin) * 1e3)
            begin = time.perf_counter()
            ids, count = np.arange(0, 97 * batch, 97), positions_per_map(share, side, side)
            for view in range(5):
                sample_positions(0, view, ids, "ofd1", side, side, count)
            least = {**{name: min(values) for name, values in times.items()}}
            least["positions drawn"] = (time.perf_counter() - begin) / 5 * 1e3
            words = "x".join(map(str, shape))
            for name, ms in least.items():
                whole = least[f"{name.partition(',')[0]}, whole"] if "," in name else math.nan
                case = {"part": "kernels", "case": f"{name}: {words}", "share": share}
                yield {**case, "ms": ms, "over_whole": f"{ms / whole:.3f}" if "," in name else ""}


def train_students(args: argparse.Namespace) -> None:
    """Plain students and those of every share, by the benches of their tasks; each row goes to that bench's table."""
    shared = ["--seeds", str(args.seeds), "--views", str(args.views), *(["--tiny"] if args.tiny else [])]
    shared += ["--minutes", str(args.minutes), "--threads", str(args.threads)]
    if args.cifar or args.tiny:
        words = [str(args.cifar or "data"), "--out", f"{args.out}/cifar", "--limit", str(args.limit), "--taps", "ofd"]
        words += ["--epochs", str(args.epochs or 12), "--teacher-epochs", str(args.teacher_epochs or 10)]
        own = bench_methods.arguments([*words, *shared, *_results(args, "methods")])
        own.batch, own.until = args.batch or (32 if args.tiny else own.batch), time.monotonic() + args.minutes * 60
        tree = bench_methods.tree_of(own)
        score = statistics.mean(bench_methods.train_teachers(own, tree))
        tree["teachers"] = tree["teachers"][:1]
        run_cache(parse_recipe(tree))
        jobs = [("crop-flip", name, own.views, "u8") for name in ("plain", "ofd-1", *bench_methods.SAMPLED)]
        bench_methods.run_variants(own, tree, jobs, own.limit * (10 if args.tiny else 100) or 50_000, score)
    if args.camvid or args.tiny:
        words = [str(args.camvid or "data"), "--task", "segment", "--out", f"{args.out}/camvid", "--sources", "cache"]
        words += ["--epochs", str(args.epochs or 24), "--teacher-epochs", str(args.teacher_epochs or 48)]
        words += ["--methods", "plain", "ofd", *(f"ofd@{share}" for share in SHARES[1:])]
        own = bench_dense.arguments([*words, *shared, *_results(args, "dense")])
        own.until = time.monotonic() + args.minutes * 60
        if args.tiny:
            own.data, own.pretrain = Path(args.out) / "scenes", 0
            bench_dense.write_scenes(own.data)
        bench_dense.run_students(own, "segment")


def _results(args: argparse.Namespace, kind: str) -> list[str]:
    return ["--results", str(args.results.with_name(f"results_{kind}.csv"))]


def summaries(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every setting with sampled students: each share against the whole maps of its seed."""
    found = []
    for kind, bench, value, whole in (
        ("methods", bench_methods, "accuracy", "ofd-1"),
        ("dense", bench_dense, "score", "ofd"),
    ):
        path = args.results.with_name(f"results_{kind}.csv")
        for setting, rows in paired.settings_of(path, bench.SETTING, bench.STUDENT).items():
            views = {row["views"] for row in rows if "@" in row["variant"]}
            wanted = [
                row
                for row in rows
                if row["views"] in views
                and (row["variant"] in ("plain", whole) or row["variant"].startswith(f"{whole}@"))
                and row.get("source", "cache") in ("none", "cache")
                and row["codec"] == "u8"
                and row.get("augment", "crop-flip") == "crop-flip"
            ]
            if not views:
                continue
            table = paired.summarize(
                wanted, ("variant",), value=value, pair=("views", "seed"), over="over_whole",
                baseline=lambda row, name=whole: row["variant"] == name,  # type: ignore[misc]
            )  # fmt: skip
            deviation = next((line["deviation"] for line in table if line["variant"] == whole), math.nan)
            for line in table:
                line["within_the_seeds"] = bool(abs(line["over_whole"]) < deviation)
            words = ", ".join(f"{key} {said}" for key, said in zip(bench.SETTING, setting, strict=True))
            shown = [
                {
                    "variant": line["variant"],
                    "seeds": line["seeds"],
                    value: f"{line['mean']:.2%} ± {line['deviation']:.2%}",
                    "over whole maps (95 %)": f"{100 * line['over_whole']:+.2f} ± {100 * line['half_interval']:.2f}",
                    "bytes per sample": f"{line['bytes_per_sample']:,.0f}" if line["bytes_per_sample"] else "",
                }
                for line in table
            ]
            print_table(f"students by share: {words}", shown)
            found.append({**dict(zip(bench.SETTING, setting, strict=True)), "students": table})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="?", default="../shared/data/cifar-100-binary", help="digits where it is not")
    parser.add_argument("--teacher", default="", help="state_dict of a WRN-16-2; random weights without it")
    parser.add_argument("--limit", type=int, default=0, help="images per class; 0 = 6 for steps, 100 for students")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of steps: no further round after so long")
    parser.add_argument(
        "--folder", type=Path, help="where the caches of the steps lie, and stay; none = a temporary one"
    )
    parser.add_argument("--only-caches", action="store_true", help="make those of --folder, for a run to come")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--students", action="store_true")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--out", default="runs/sampling", help="of the students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=0, help="0 = those of the task's bench")
    parser.add_argument("--batch", type=int, default=0, help="of CIFAR's students; 0 = that of the task's bench")
    parser.add_argument("--teacher-epochs", type=int, default=0, help="0 = those of the task's bench")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the students' tables lie next to it")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="digits, scenes and tiny networks: does it run?")
    args = parser.parse_args(argv)
    args.limit = args.limit or (100 if args.students else 6)
    configure_logging()
    document: dict[str, Any] = {}
    if args.students:
        train_students(args)
    if args.students or args.summary:
        document["students"] = summaries(args)
    else:
        # what base_recipe asks for
        args.data, args.teachers = str(Path(args.data) / "train.bin"), [args.teacher] if args.teacher else []
        args.precision, args.student_precision = "fp32", "bf16"
        args.rounds = 1 if args.tiny else args.rounds
        if args.threads:
            torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
            folder = args.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            where = {**paired.environment(), "threads": torch.get_num_threads()}
            rows = []
            for row in bench_kernels(args) if args.kernels else bench_steps(args, folder):
                paired.record({**where, **row}, COLUMNS, args.results)
                rows.append(row)
        print_table("sampling", [{key: row.get(key, "") for key in COLUMNS[6:]} for row in rows])
        document["rows"] = rows
    print(json.dumps(document))


if __name__ == "__main__":
    main()
