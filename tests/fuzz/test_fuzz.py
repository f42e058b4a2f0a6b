"""A minute of fuzzing: FEEDFAST_FUZZ_SECONDS for longer, FEEDFAST_FUZZ_SEED for other inputs; fuzz.py by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz import fuzz
from subjects import TARGETS

SECONDS = float(os.environ.get("FEEDFAST_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FEEDFAST_FUZZ_SEED", "0"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 900)
def test_no_input_gets_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = Path(os.environ.get("FEEDFAST_FUZZ_KEEP", tmp_path / "failures"))
    tally = fuzz(SECONDS, SEED, keep, list(TARGETS))
    assert tally.failures == []
    assert tally.total["inputs"] >= 12
    with capsys.disabled():
        print("\n" + "\n".join(tally.lines()))
