"""The bench of segmentation and detection: differences are those of statistics, and a tiny run says everything once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCH = Path(__file__).parents[2] / "bench"


def row(variant: str, source: str, seed: int, score: float, **more: str) -> dict[str, str]:
    words = {"variant": variant, "source": source, "views": "4", "codec": "u8", "bytes_per_sample": "", **more}
    return {**words, "seed": str(seed), "score": str(score)}


def test_differences_are_paired_by_seed() -> None:
    import bench_dense

    rng = np.random.default_rng(0)
    plain, cached, live = rng.random((3, 4))
    rows = [
        row(variant, source, seed, value)
        for variant, source, values in (("plain", "none", plain), ("ofd", "cache", cached), ("ofd", "live", live))
        for seed, value in enumerate(values)
    ]
    rows = [rows[index] for index in rng.permutation(len(rows))]
    rows += [row("kd", "cache", 9, 0.5), row("ofd", "cache", 3, 0.75, codec="f32")]  # a seed without a plain student
    rows += [row("plain", "fresh", 1, 0.5, views="0"), row("ofd", "fresh", 1, 0.625, views="0")]
    found = {(line["variant"], line["source"], line["codec"]): line for line in bench_dense.over_plain(rows)}
    assert len(found) == 7
    assert found["ofd", "fresh", "u8"]["over_plain"] == 0.125  # over the plain one that saw new views, too
    for source, values in (("cache", cached), ("live", live)):
        line, differences = found["ofd", source, "u8"], values - plain
        low, high = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
        assert line["seeds"] == 4
        assert line["mean"] == pytest.approx(values.mean())
        assert line["deviation"] == pytest.approx(values.std(ddof=1))
        assert line["over_plain"] == pytest.approx(differences.mean())
        assert line["half_interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert np.isnan(found["kd", "cache", "u8"]["over_plain"])
    assert found["ofd", "cache", "f32"]["over_plain"] == pytest.approx(0.75 - plain[3])
    assert found["ofd", "cache", "f32"]["half_interval"] == np.inf
    (line,) = bench_dense.cached_over_live(rows)
    assert line["over_live"] == pytest.approx((cached - live).mean())


def test_words_and_taps_of_variants() -> None:
    import bench_dense

    assert bench_dense.words_of("plain", "detect") == {"name": "none"}
    assert bench_dense.words_of("ofd-1e-3", "segment") == {"name": "ofd", "alpha": 1e-3}
    assert bench_dense.words_of("ofd", "detect") == {"name": "ofd", "alpha": bench_dense.ALPHA["detect"]}
    assert bench_dense.words_of("kd", "segment") == {"name": "kd"}
    assert bench_dense.taps_of(["plain", "ofd-1e-3"]) == ["ofd+margin"]
    assert bench_dense.taps_of(["ofd", "kd", "at"]) == ["ofd+margin", "stage", "logits"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "methods"), [("segment", ["plain", "kd"]), ("detect", ["plain", "ofd"])])
def test_a_tiny_run_says_everything_once(
    task: str, methods: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_dense

    committed = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    results = tmp_path / "rows.csv"
    words = ["--tiny", "--task", task, "--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--views", "2"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(results), "--methods", *methods]
    bench_dense.main(words)
    first = results.read_text()
    bench_dense.main(words)
    assert results.read_text() == first, "a student was trained twice"
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == committed
    rows = list(csv.DictReader(first.splitlines()))
    taught = [(name, source) for name in methods[1:] for source in ("cache", "live")]
    assert [(line["variant"], line["source"], line["seed"]) for line in rows] == [
        (name, source, "1") for name, source in [("plain", "none"), *taught]
    ]
    score = {"segment": "miou", "detect": "ap50"}[task]
    for line in rows:
        assert (line["task"], line["images"], line["size"]) == (task, "12", "64")
        metrics = json.loads(line["metrics"])
        assert float(line["score"]) == pytest.approx(metrics[score], rel=1e-5)
        assert (float(line["bytes_per_sample"] or 0) > 0) == (line["source"] == "cache")
        assert 0 <= float(line["teacher_score"]) <= 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (setting,) = document["settings"]
    assert {line["variant"] for line in setting["cached_over_live"]} == set(methods[1:])
    assert len(setting["students"]) == 1 + len(taught)
