"""Fixtures shared by the tests: where the real images are, and a quiet, small thread pool."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buckets import cloud, one_cloud  # noqa: F401 - fixtures for every room

# Triton's decorators bind to the compiler or to the interpreter when it is imported: without a GPU, the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread: the networks here are tiny, and a busy machine makes OpenMP threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, or a skip that says what is missing."""
    folder = Path(os.environ.get("FEEDFAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"real images not found: {folder} (set FEEDFAST_DATA)")
    return folder


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as a terminal leaves them: whoever starts the tests in the background has some of them ignored."""
    from feedfast.stages.interrupt import SIGNALS  # not above: what it imports must see TRITON_INTERPRET

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device its tests are not offered: hundreds of skips would hide the one that matters."""
    if torch.cuda.is_available():
        return
    gone = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the Triton kernels run: in Triton's interpreter on CPU tensors, or compiled on a GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here; the interpreter is for machines without a GPU")
    monkeypatch.setattr("feedfast_kernels._ops.INTERPRET", True)
    return torch.device("cpu")
