"""How far off `feedfast plan` is: plan, cache and train small recipes, and compare what was predicted with what came.

    python bench/bench_plan.py DATA/cifar-100-binary/train.bin --teachers a.pt b.pt c.pt [--out results_plan.csv]
    python bench/bench_plan.py --tiny

Each recipe is planned, cached and trained once, in that order and in one process, as a user would. ``error`` is found
over predicted, minus 1, as `cache` and `train` report it: of the cache's bytes, of the seconds of `feedfast cache`, and
of the median step. The last stdout line is one JSON document; rows go to ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_end_to_end import METHODS, base_recipe, provenance, recipe

from feedfast.cli import configure_logging
from feedfast.report.compare import print_table
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.student import run_train


def measure(tree: dict[str, Any], method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Prediction and outcome of one recipe."""
    of = recipe(tree, method, folder)
    of = of.model_copy(update={"train": of.train.model_copy(update={"max_steps": steps, "eval_every": 0})})
    planned, made = run_plan(of), run_cache(of)
    trained = run_train(of)
    cached, stepped = made["prediction_error"], trained["prediction_error"]
    return {
        "method": method,
        "stored_as": "+".join(sorted(set(planned["compression"].values()))) or "none",
        "bytes": made["bytes"],
        "bytes_error": cached["bytes"],
        "seconds": made["seconds"],
        "seconds_error": cached["seconds"],
        "step_ms": trained["step_ms"],
        "step_error": stepped["step_ms"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="", help="CIFAR-100 binary file; digits without it")
    parser.add_argument("--teachers", nargs="*", default=[], help="state_dicts of WRN-16-2; random ones without")
    parser.add_argument("--limit", type=int, default=20, help="images per class")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of the teachers")
    parser.add_argument("--student-precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=60, help="of the student")
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    parser.add_argument("--tiny", action="store_true", help="digits and small networks: checks the bench")
    args = parser.parse_args(argv)
    configure_logging()
    rows = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            found = measure(base_recipe(args, folder), method, folder, 4 if args.tiny else args.steps)
        rows.append({**provenance(args), **found})
        shown = {key: f"{value:+.1%}" if key.endswith("error") else value for key, value in found.items()}
        print_table("planned and found", [shown])
        if args.out is not None:
            new = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(rows[-1]))
                if new:
                    writer.writeheader()
                writer.writerow(rows[-1])
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
