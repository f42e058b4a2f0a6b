"""Finished runs side by side: a table, a page with their curves, and one JSON document as the last line of stdout.

python tools/compare_runs.py runs/plain runs/kd-cached runs/kd-live --out runs/compare.html
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from feedfast.provenance import Provenance
from feedfast.report.compare import print_table, write_comparison

SHOWN = ("method", "source", "val_accuracy", "step_ms", "images_per_second", "data_wait_fraction", "seconds")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `feedfast train`")
    parser.add_argument("--out", type=Path, default=None, help="HTML page to write; none = only the table")
    args = parser.parse_args(argv)
    missing = [str(run) for run in args.runs if not (run / "result.json").is_file()]
    if missing:
        print(f"error: expected finished runs with a result.json, found none in {', '.join(missing)}", file=sys.stderr)
        return 2
    results = {run.name: json.loads((run / "result.json").read_text()) for run in args.runs}
    rows = [{"run": name, **{key: result.get(key) for key in SHOWN}} for name, result in results.items()]
    print_table("runs", rows)
    if args.out is not None:
        write_comparison(args.out, "Runs", rows, {run.name: run for run in args.runs}, results, Provenance.begin())
    print(json.dumps({"runs": rows, "report": str(args.out) if args.out else None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
