"""The bench of augmentations runs, and every row says what both sides did."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_measures_every_list_on_both_sides(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "bench_augment.py"))
    module["main"](["--tiny", "--data", str(shared_data)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for setting in ("cifar_32", "jpeg_224"):
        assert set(document[setting]) == set(module["LISTS"])
        for name, row in document[setting].items():
            assert row["bytes_per_row"] >= 25
            assert row["feedfast"]["per_cpu_second"] > 0, name
            assert row["torchvision"]["per_cpu_second"] > 0, name
    assert document["cifar_32"]["rand-augment, erasing, mixup"]["bytes_per_row"] == 25 + 3 * 25 + 20
