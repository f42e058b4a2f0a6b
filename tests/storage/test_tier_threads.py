"""Several threads find at once what is wrong with a folder of copies: each gets sound bytes, and it is said once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feedfast.storage.disk import FileObject
from feedfast.storage.store import Object
from feedfast.storage.tier import NearObject, Tier

THREADS = 8
CONTENT = bytes(range(256)) * 16


class Far:
    """An object of a bucket, in memory."""

    size = len(CONTENT)

    def read(self, targets: Sequence[Any], offset: int) -> int:
        (target,) = targets
        taken = CONTENT[offset : offset + len(target)]
        memoryview(target)[: len(taken)] = taken
        return len(taken)

    def refetch(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def slow_log() -> Iterator[None]:
    """Whoever says something is overtaken by all others."""
    logger = logging.getLogger("feedfast.storage.tier")

    def slowly(_: logging.LogRecord) -> bool:
        time.sleep(0.1)
        return True

    logger.addFilter(slowly)
    yield
    logger.removeFilter(slowly)


def together(work: Callable[[int], Any]) -> list[Any]:
    """What every thread got; they begin at the same moment."""
    gate = threading.Barrier(THREADS)

    def one(number: int) -> Any:
        gate.wait(30)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


@pytest.mark.parametrize("found_by", ["reading", "checking"])
def test_one_copy_that_several_threads_find_broken_is_dropped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found_by: str
) -> None:
    all_failed = threading.Barrier(THREADS)

    def broken(*_: object) -> int:
        all_failed.wait(30)  # nobody has asked the bucket yet when the last of them learns it
        raise OSError(5, "Input/output error")

    path = tmp_path / "copy"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(FileObject, "read", broken)
    opened: list[Object] = []

    def far() -> Object:
        opened.append(Far())
        return opened[-1]

    near = NearObject(FileObject(str(path)), path, far)

    def read(number: int) -> bytes:
        target = np.zeros(64, np.uint8)
        if found_by == "checking":
            assert near.refetch()
        assert near.read([target], 64 * number) == 64
        return target.tobytes()

    assert together(read) == [CONTENT[64 * number :][:64] for number in range(THREADS)]
    assert len(opened) == 1
    assert caplog.text.count("a damaged copy is dropped") == 1
    assert not path.exists()


def test_that_a_folder_takes_no_copies_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    all_failed = threading.Barrier(THREADS)

    def full(*_: object) -> int:
        all_failed.wait(30)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    tier = Tier(tmp_path / "near", 10**7)
    # names whose copies do not wait for each other
    monkeypatch.setattr(tier, "_gates", [threading.Lock() for _ in range(4096)])
    monkeypatch.setattr("feedfast.storage.tier._GATES", 4096)
    found = together(lambda number: tier.open(f"s3://b/{number}", len(CONTENT), Far))
    assert {type(one) for one in found} == {Far}
    assert caplog.text.count("nothing is kept: No space left on device") == 1
