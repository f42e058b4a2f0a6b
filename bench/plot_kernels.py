"""Plots of the kernels' benches, from the rows in results.csv and nothing else: one PNG an operation and GPU.

    python bench/plot_kernels.py [--csv bench/results.csv] [--out bench/plots] [--direction both] [--unit gbps]

A group of bars is a shape (with dtype, codec and memory order), a bar is a variant, a whisker runs from the 20th to the
80th percentile, and the dashed line over a group is the device copy of as many bytes, measured in the same process. A
cross on the axis is a variant that was measured and got no number; its row says why. Of rows measured more than once
the last counts. Operations without a backward pass are drawn forward, whatever the direction asked for.

The last line of stdout is one JSON document: the files written.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

BENCH = Path(__file__).parent
UNITS = {"gbps": "GB/s of the bytes the operation must move (more is better)", "ms": "milliseconds (less is better)"}
Row = dict[str, str]
CASE = ("shape", "dtype", "codec", "layout")


def read(path: Path) -> dict[tuple[str, str], list[Row]]:
    """The rows of every (operation, GPU); of rows with the same key the last."""
    latest: dict[tuple[str, ...], Row] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("operation", "gpu", *CASE, "variant", "direction"))
            latest.pop(key, None)
            latest[key] = row
    found: dict[tuple[str, str], list[Row]] = {}
    for row in latest.values():
        found.setdefault((row["operation"], row["gpu"]), []).append(row)
    return found


def heights(row: Row, unit: str) -> tuple[float, float, float]:
    """The bar of a row and the ends of its whisker, low and high."""
    times = [float(row[name]) for name in ("median_ms", "p20_ms", "p80_ms")]
    if unit == "ms":
        return times[0], times[1], times[2]
    middle, fast, slow = (float(row["bytes"]) / time / 1e6 for time in times)
    return middle, slow, fast


def draw(rows: Sequence[Row], direction: str, unit: str, path: Path) -> None:
    """One operation on one GPU."""
    directions = {row["direction"] for row in rows}
    direction = direction if direction in directions else "forward"
    rows = [row for row in rows if row["direction"] == direction]
    cases = list(dict.fromkeys(tuple(row[name] for name in CASE) for row in rows))
    variants = [v for v in dict.fromkeys(row["variant"] for row in rows) if v != "copy"]
    by_key = {(*(row[name] for name in CASE), row["variant"]): row for row in rows}
    figure, axes = plt.subplots(figsize=(max(6.0, 1.2 + 1.5 * len(cases)), 5.0), layout="constrained")
    width = 0.8 / max(len(variants), 1)
    colors = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, variant in enumerate(variants):
        for group, case in enumerate(cases):
            row = by_key.get((*case, variant))
            if row is None:
                continue
            x = group + (number - (len(variants) - 1) / 2) * width
            if not row["median_ms"]:
                axes.plot(x, 0, "x", color=colors[number % 10], clip_on=False, transform=axes.get_xaxis_transform())
                continue
            middle, low, high = heights(row, unit)
            error = [[middle - low], [high - middle]]
            axes.bar(x, middle, 0.92 * width, yerr=error, color=colors[number % 10], error_kw={"lw": 0.8})
    for group, case in enumerate(cases):
        copy = by_key.get((*case, "copy"))
        if copy is not None and copy["median_ms"]:
            axes.hlines(heights(copy, unit)[0], group - 0.45, group + 0.45, "black", "dashed", lw=1)
    names = [f"{shape}\n{dtype}/{codec or 'float'} {layout}" for shape, dtype, codec, layout in cases]
    axes.set_xticks(range(len(cases)), names, rotation=30, ha="right", fontsize=7)
    axes.set_ylabel(UNITS[unit], fontsize=8)
    last = rows[-1]
    about = f"torch {last['torch']}, triton {last['triton']}, {last['date']}, commit {last['commit']}"
    axes.set_title(f"{last['operation']}, {direction}, {last['gpu']}\n{about}", fontsize=9)
    if unit == "ms":
        axes.set_yscale("log")
    handles: list[Artist] = [Patch(color=colors[n % 10], label=variant) for n, variant in enumerate(variants)]
    handles.append(Line2D([], [], color="black", ls="dashed", lw=1, label="copy"))
    figure.legend(handles=handles, loc="outside lower center", fontsize=7, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=BENCH / "results.csv", help="rows (default bench/results.csv)")
    parser.add_argument("--out", type=Path, default=BENCH / "plots", help="folder of the PNGs (default bench/plots)")
    parser.add_argument("--direction", default="both", choices=("forward", "backward", "both"))
    parser.add_argument("--unit", default="gbps", choices=tuple(UNITS))
    args = parser.parse_args(argv)
    if not args.csv.is_file():
        print(f"error: expected rows in {args.csv}, found no such file", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    files = []
    for (operation, gpu), rows in read(args.csv).items():
        path = args.out / f"{operation}-{'-'.join(gpu.lower().split())}.png"
        draw(rows, args.direction, args.unit, path)
        files.append(str(path))
        print(path, file=sys.stderr)
    print(json.dumps({"files": files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
