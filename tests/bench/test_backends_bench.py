"""The bench of backends compares every operation, and sees a difference where there is one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from feedfast.data.augment import OPERATIONS, PRESETS

BENCH = Path(__file__).parents[2] / "bench" / "bench_backends.py"


@pytest.mark.slow
def test_two_cpus_agree_on_every_operation(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(BENCH))
    module["main"](["--tiny", "--data", str(shared_data), "--devices", "cpu", "cpu"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    settings = [rows for rows in document.values() if isinstance(rows, dict)]
    assert all(row["largest"] == 0 for rows in settings for row in rows.values())
    cases = {**module["IMAGES"], **module["BOXES"]}
    ops = {table["op"] for augment in cases.values() if not isinstance(augment, str) for table in augment}
    assert ops == set(OPERATIONS)
    assert set(PRESETS) <= set(cases)


def test_a_difference_is_seen() -> None:
    one = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    other = one.clone()
    other[0, 0, 0] = torch.tensor([255, 2, 0], dtype=torch.uint8)
    found = runpy.run_path(str(BENCH))["compared"](one, other)
    assert found == {"differ_percent": 2.083, "mean": 2.6771, "largest": 255, "over_two_percent": 1.0417}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCH))["main"]([])
    assert "expected a GPU, found none" in capsys.readouterr().err
