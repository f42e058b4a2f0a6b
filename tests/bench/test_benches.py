"""The bench of the whole pipeline still runs; those of the reader and the loader are tested next to it."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

BENCH = Path(__file__).parents[2] / "bench"


def loaded(name: str) -> ModuleType:
    """A bench as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[name] = bench  # its dataclasses look for it there
    spec.loader.exec_module(bench)
    return bench


@pytest.mark.slow
def test_the_bench_still_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Digits and small networks: every ratio is there, positive and finite; nothing is appended to the results."""
    bench = loaded("bench_end_to_end")
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


@pytest.mark.slow
def test_the_bench_of_growth_still_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every axis is measured and drawn from rows; the committed ones are straight lines, and a million rows open."""
    bench = loaded("bench_growth")
    out = tmp_path / "rows.csv"
    assert bench.main(["--tiny", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["axis"] for row in document["rows"]} == {*bench.AXES, "images"}
    assert all(row["cpu_seconds"] > 0 for row in document["rows"])
    assert not out.exists(), "nothing is appended"
    assert bench.main(["--plot", str(tmp_path / "growth.svg")]) == 0
    assert (tmp_path / "growth.svg").stat().st_size > 10_000
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["exponents"]
    assert {name for name, slope in found.items() if slope > 1.3} == set()
    rows = {(row.axis, row.what): row for row in bench.load(bench.RESULTS)}
    assert rows["target", "open, index"].lines > 180_000
    assert rows["target", "open, index"].seconds < 1
    assert {entry["rows_per_view"] for entry in bench.paper()} == {14_197_122, 1_000_000_000}


@pytest.mark.slow
def test_the_stages_of_a_pass_are_timed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    loaded("bench_end_to_end").main(["--tiny", "--stages"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["kd", "pfeed", "ofd"]
    for name in ("decode", "forward", "encode", "check and crc32c", "sha256", "zstd", "write", "fsync"):
        assert 0 < rows[2][name] < 1000, name


@pytest.mark.slow
def test_the_bench_of_plans_reports_what_cache_and_train_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded("bench_plan").main(["--tiny", "--methods", "ofd", "--out", str(tmp_path / "rows.csv")])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["stored_as"] in ("zstd", "none", "none+zstd")
    assert abs(row["bytes_error"]) < 0.2
    assert row["seconds"] > 0 < row["step_ms"]
    assert {row["seconds_error"], row["step_error"]}.isdisjoint({None})
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_bench_of_methods_counts_as_statistics_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of four variants on digits: every line is there once, and mean and interval are SciPy's."""
    bench = loaded("bench_methods")
    results = tmp_path / "rows.csv"
    words = ["--tiny", "--limit", "20", "--views", "2", "--epochs", "2", "--teacher-epochs", "2", "--seeds", "2"]
    variants = ["plain", "kd", "sfeed", "ofd-batch"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(results), "--methods", *variants]
    bench.main(words)
    first = results.read_text()
    bench.main(words)
    assert results.read_text() == first, "a student was trained twice"
    rows = list(csv.DictReader(first.splitlines()))
    assert {row["augment"] for row in rows} == {"crop-flip"}
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for seed in "12" for name in variants]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, kd = ([float(row["accuracy"]) for row in rows if row["variant"] == name] for name in ("plain", "kd"))
    (setting,) = document["settings"]
    assert (setting["device"], setting["images"], setting["epochs"]) == (rows[0]["device"], "200", "2")
    found = next(line for line in setting["methods"] if line["variant"] == "kd")
    differences = np.subtract(kd, plain)
    low, high = stats.t.interval(0.95, 1, differences.mean(), stats.sem(differences)) if differences.std() else (0, 0)
    assert found["mean"] == pytest.approx(np.mean(kd))
    assert found["over_plain"] == pytest.approx(differences.mean())
    assert found["half_interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert found["bytes_per_sample"] > 0


def student_row(codec: str, seed: int, accuracy: float, error: str = "", variant: str = "ofd") -> dict[str, str]:
    """A line of bench_methods' results; of before there was a column for the error where it is "none"."""
    row = {"device": "cpu", "images": "2000", "epochs": "16", "batch": "32", "augment": "crop-flip", "views": "4"}
    row |= {
        "variant": variant,
        "codec": codec,
        "seed": str(seed),
        "accuracy": str(accuracy),
        "bytes_per_sample": "1000",
    }
    return row if error == "none" else row | {"error": error}


@pytest.mark.slow
def test_results_of_before_a_column_was_added_are_kept_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = loaded("bench_methods")
    paired, results = sys.modules["paired"], tmp_path / "rows.csv"
    old = [student_row("u8", 1, 0.5, "none"), student_row("plain", 1, 0.4, "none", "plain") | {"codec": "u8"}]
    before = [name for name in bench.COLUMNS if name != "error"]
    for row in old:
        paired.record(row, before, results)
    bench.main(["--summary", "--results", str(results)])  # the old file alone
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]) == 1
    new = [student_row("u6", 1, 0.49, "0.03"), student_row("u4", 1, 0.45, "0.11"), student_row("u8", 2, 0.52, "0.01")]
    for row in new:
        paired.record(row, bench.COLUMNS, results)
    with results.open(newline="") as file:
        held = list(csv.DictReader(file))
    assert list(held[0]) == list(bench.COLUMNS)
    assert [(row["codec"], row["accuracy"], row["error"]) for row in held] == [
        ("u8", "0.5", ""), ("u8", "0.4", ""), ("u6", "0.49", "0.03"), ("u4", "0.45", "0.11"), ("u8", "0.52", "0.01")
    ]  # fmt: skip
    bench.main(["--summary", "--results", str(results)])
    (setting,) = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    points = {point["codec"]: (point["seeds"], point["error"], round(point["mean"], 3)) for point in setting["codecs"]}
    assert points == {"u8": (2, 0.01, 0.51), "u6": (1, 0.03, 0.49), "u4": (1, 0.11, 0.45)}
    assert [Path(name).stat().st_size > 10_000 for name in setting["plots"]] == [True, True]


@pytest.mark.slow
def test_the_bench_of_codecs_measures_each_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Digits: errors grow and bytes shrink from codec to codec, and every time is one."""
    results = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    loaded("bench_codecs").main(["--tiny"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for tap in ("ofd1", "ofd2", "ofd3", "final"):
        of_tap = [row for row in rows if row["tap"] == tap]
        assert [row["codec"] for row in of_tap] == ["f32", "f16", "u8", "u6", "u5", "u4"]
        assert [row["bytes_per_value"] for row in of_tap] == [4, 2, 1, 0.75, 0.625, 0.5]
        errors = [row["error"] for row in of_tap]
        assert errors == sorted(errors)
        assert errors[0] == 0
        assert 0.03 < errors[-1] < 0.2
        assert all(row[f"{name}_ns"] > 0 for row in of_tap for name in ("encode", "decode", "partial_l2"))
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == results


@pytest.mark.slow
def test_the_bench_of_large_rows_reads_what_it_wrote_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Small maps of the same six taps; an index may be read by two threads at once, a block only once."""
    loaded("bench_large_rows").main(["--side", "33", "--rows", "200"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["read"]["row_bytes"] * 200 <= found["read"]["stored_bytes"] <= found["read"]["read_bytes"]
    assert found["read"]["read_bytes"] < 1.001 * found["read"]["stored_bytes"]
    assert found["write"]["peak_bytes"] > 0


@pytest.mark.slow
def test_the_bench_of_peers_compares_every_row_and_finds_who_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small rows, one process per peer: all read what was written, and only checksums notice a flipped bit."""
    results = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    bench = loaded("bench_peers")
    assert bench.main(["--tiny", "--only", "4KB", "--folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {(row["peer"], row["page_cache"]) for row in found} == {
        (peer, cache) for peer in bench.PEERS for cache in ("cold", "warm")
    }
    for row in found:
        assert row["problem"] == ""
        assert row["samples_per_s"] > 0
        assert row["disk_bytes"] >= row["count"] * row["row_bytes"] * (0.5 if "zstd" in row["peer"] else 1)
        assert row["cached_share"] > 0.99 or row["page_cache"] == "cold"
    said = {row["peer"]: row["flipped_bit"] for row in found if row["peer"] not in bench.CEILINGS}
    assert {peer for peer, answer in said.items() if answer == "error"} == {
        "feedfast",
        "feedfast zstd",
        "hdf5 fletcher32",
    }
    assert set(said.values()) == {"error", "silent"}
    assert list(tmp_path.iterdir()) == []  # nothing is left on the disk
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == results


def test_the_codes_of_the_bench_of_peers_are_half_zeros_and_its_batches_from_many_places() -> None:
    bench = loaded("bench_peers")
    codes = bench.codes(bench.setting_of("4KB", tiny=True))
    assert 0.45 < (codes == 0).mean() < 0.55
    assert codes.max() < 255
    assert len(np.unique(codes, axis=0)) == len(codes)
    share = np.bincount(codes.reshape(-1)) / codes.size
    assert bench.entropy(codes) == pytest.approx(stats.entropy(share, base=2))
    for size in bench.SIZES:
        setting = bench.setting_of(size, tiny=False)
        order = bench.pass_order(setting.rows, 0, 0, 1, setting.granule, setting.window)
        # the last window of a view may be short
        whole = order[: setting.rows // (setting.granule * setting.window) * setting.granule * setting.window]
        for start in range(0, len(whole) - setting.batch + 1, setting.batch):
            assert len(np.unique(whole[start : start + setting.batch] // setting.granule)) >= 16
