"""The bench of the whole pipeline still runs; those of the reader and the loader are tested next to it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
def test_the_bench_still_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Digits and small networks: every ratio is there, positive and finite; nothing is appended to the results."""
    spec = importlib.util.spec_from_file_location("bench_end_to_end", BENCH / "bench_end_to_end.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    results = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    bench.main(["--tiny"])
    said = capsys.readouterr()
    rows = json.loads(said.out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["kd", "pfeed", "ofd"]
    for row in rows:
        for name in ("cached_over_ram", "live_over_cached", "share_of_ideal", "caching_ratio", "cached_ms", "live_ms"):
            value = float(str(row[name]).split()[0])
            assert 0 < value < 1000, (name, row[name])
    assert "end to end" in said.err
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == results
