"""Benches import what they share as scripts do: from their own folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def bench_on_path() -> Iterator[None]:
    """While a file's tests run, bench/ is where modules are looked for first."""
    bench = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, bench)
    yield
    sys.path.remove(bench)
