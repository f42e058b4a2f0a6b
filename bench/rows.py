"""The rows of the kernels' benches: columns, where a row comes from, the file they are kept in.

One row is one variant of an operation at one shape in one direction, or the reason why it got no number. Rows are only
ever added: a key that is measured again is there twice, and the last one counts.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.csv")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, or the reason why there is none; the columns of the results in their order."""

    date: str
    commit: str
    gpu: str  # "cpu" where the device is the processor
    torch: str
    triton: str
    cuda: str
    operation: str
    shape: str
    dtype: str
    codec: str
    layout: str
    variant: str
    direction: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    bytes: int | None = None
    gbps: float | None = None
    percent_of_copy: float | None = None
    peak_bytes: int | None = None
    note: str = ""


COLUMNS = tuple(column.name for column in fields(Row))


_LINE = "{:<22} {:<30} {:<9} {:<3} {:<5} {:<21} {:<8} {:>9} {:>17} {:>8} {:>7} {:>9} {}"
HEAD = _LINE.format(
    "operation", "shape", "dtype", "", "order", "variant", "", "ms", "p20..p80", "GB/s", "% copy", "peak MB", "note"
)


def line(row: Row) -> str:
    """The row for people, below `HEAD`."""
    names = (row.operation, row.shape, row.dtype, row.codec, row.layout, row.variant, row.direction)
    if row.median_ms is None:
        return _LINE.format(*names, *["-"] * 5, row.note)
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
    numbers = (f"{row.median_ms:.4f}", f"{row.p20_ms:.4f}..{row.p80_ms:.4f}", f"{row.gbps:.1f}")
    return _LINE.format(*names, *numbers, f"{row.percent_of_copy:.1f}", peak, row.note)


def environment(device: torch.device) -> dict[str, str]:
    """What every row says about where it was measured."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = os.environ.get("FEEDFAST_COMMIT") or git("rev-parse", "--short", "HEAD") or "unknown"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit + ("+" if git("status", "--porcelain", "kernels", "bench") else ""),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or "") if device.type == "cuda" else "",
    }


def append(rows: Sequence[Row], path: Path) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()})


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, between the two nearest."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def gbps(size: int, milliseconds: float) -> float:
    """Bytes in a time as 10^9 bytes per second."""
    return size / milliseconds / 1e6
