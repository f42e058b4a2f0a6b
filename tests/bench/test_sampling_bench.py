"""The bench of sampled maps: shares are compared with whole maps seed by seed, and a tiny run says everything once."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_shares_are_compared_with_the_whole_maps_of_their_seed(tmp_path: Path) -> None:
    """Among rows of other methods, codecs, sources and augmentations, which are left out."""
    import bench_methods
    import bench_sampling

    usual = {**dict.fromkeys(bench_methods.COLUMNS, "x"), "augment": "crop-flip", "codec": "u8", "views": "4"}
    own = {"ofd-1": (0.50, 0.54), "ofd-1@0.25": (0.51, 0.53), "plain": (0.40, 0.40)}
    rows = [
        {**usual, "variant": name, "seed": str(seed), "accuracy": str(value), "bytes_per_sample": "8"}
        for name, values in own.items()
        for seed, value in enumerate(values)
    ]
    rows += [{**rows[0], "variant": "kd"}, {**rows[2], "codec": "u4"}, {**rows[2], "augment": "mixup"}]
    with (tmp_path / "results_methods.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, bench_methods.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (found,) = bench_sampling.summaries(Namespace(results=tmp_path / "results_sampling.csv"))
    lines = {line["variant"]: line for line in found["students"]}
    assert lines.keys() == own.keys()
    assert lines["ofd-1@0.25"]["over_whole"] == pytest.approx(0.0)
    assert lines["ofd-1@0.25"]["within_the_seeds"]
    assert lines["plain"]["over_whole"] == pytest.approx(-0.12)
    assert not lines["plain"]["within_the_seeds"]


def test_words_of_shares() -> None:
    import bench_dense
    import bench_sampling

    assert [bench_sampling.tap_of(share) for share in bench_sampling.SHARES[:2]] == ["ofd+margin", "ofd+margin@0.5"]
    assert bench_dense.words_of("ofd@0.25", "segment") == bench_dense.words_of("ofd", "segment")


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--kernels"]])
def test_a_tiny_run_measures_every_share(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_sampling

    committed = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    bench_sampling.main(["--tiny", *words, "--results", str(tmp_path / "rows.csv")])
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == committed
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == len(list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())))
    assert all(row["ms"] > 0 for row in rows)
    if not words:
        size = {row["share"]: row["bytes_per_sample"] for row in rows}
        assert size.keys() == {"plain", *bench_sampling.SHARES}
        for share in bench_sampling.SHARES:
            assert size[share] == pytest.approx(share * size[1.0], rel=0.15)


@pytest.mark.slow
def test_tiny_students_of_every_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_sampling

    words = ["--students", "--tiny", "--seeds", "1", "--views", "2", "--epochs", "1", "--teacher-epochs", "1"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "rows.csv")]
    bench_sampling.main(words)
    first = {file.name: file.read_text() for file in tmp_path.glob("*.csv")}
    bench_sampling.main(words)
    assert {file.name: file.read_text() for file in tmp_path.glob("*.csv")} == first, "a student was trained twice"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["students"]
    assert [{line["variant"] for line in setting["students"]} for setting in found] == [
        {"plain", "ofd-1", "ofd-1@0.5", "ofd-1@0.25", "ofd-1@0.125"},
        {"plain", "ofd", "ofd@0.5", "ofd@0.25", "ofd@0.125"},
    ]
    for setting in found:
        size = {line["variant"].partition("@")[2]: line["bytes_per_sample"] for line in setting["students"]}
        assert 0 < size["0.125"] < size["0.25"] < size["0.5"]
