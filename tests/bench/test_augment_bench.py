"""The bench of augmentations runs, and every row says what both sides did."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from feedfast.data.augment import PRESETS


@pytest.mark.slow
def test_it_measures_every_preset_on_both_sides(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "bench_augment.py"))
    module["main"](["--tiny", "--data", str(shared_data)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    settings = {name: rows for name, rows in document.items() if isinstance(rows, dict)}
    assert set().union(*settings.values()) >= set(PRESETS) | set(module["OPERATIONS"])
    for rows in settings.values():
        for name, row in rows.items():
            assert row["bytes_per_row"] >= 25
            assert row["feedfast"]["per_cpu_second"] > 0, name
            assert row["torchvision"]["per_cpu_second"] > 0, name
    assert document["cifar_32"]["rand-augment, erasing, mixup"]["bytes_per_row"] == 25 + 3 * 25 + 20
