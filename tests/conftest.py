"""Fixtures shared by the tests: where the real images are, and a quiet, small thread pool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# One thread: the networks here are tiny, and a busy machine makes OpenMP threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, or a skip that says what is missing."""
    folder = Path(os.environ.get("FEEDFAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"real images not found: {folder} (set FEEDFAST_DATA)")
    return folder
