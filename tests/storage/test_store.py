"""A folder keeps the store's contract; and what only a folder can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import memory_path
from hypothesis import settings
from store_contract import Contract, many_agree_and_then_others, total

from feedfast.errors import FeedfastError, RequestError
from feedfast.storage.disk import Disk
from feedfast.storage.places import open_store
from feedfast.storage.store import COMMITS, Lock

tmp_path = memory_path

TestContract = Contract.TestCase
TestContract.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


# ---- who dies, lets go


HOLD = """
import sys, time; from feedfast.storage.disk import Disk
store = Disk(sys.argv[1])
held = [store.lock("commits/.lock-a"), store.join("commits/.lock-split", "3"),
        store.open_log("commits/x.jsonl", lambda lines: sum(map(len, lines)))]
print(all(held), flush=True)
time.sleep(600)
"""


def test_a_killed_owner_owns_nothing(tmp_path: Path) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    owner = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "c"], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        assert store.lock("commits/.lock-a") is None
        assert store.open_log("commits/x.jsonl", total) is None
        assert store.join("commits/.lock-split", "2") == "3"
        with_them = store.join("commits/.lock-split", "3")
        assert isinstance(with_them, Lock)
        with_them.close()
    finally:
        owner.kill()
        owner.communicate()
    held: list[Any] = [store.lock("commits/.lock-a"), store.open_log("commits/x.jsonl", total)]
    held.append(store.join("commits/.lock-split", "2"))
    assert all(isinstance(one, Lock) for one in held)
    for one in held:
        one.close()


def test_many_who_agree_and_then_others(tmp_path: Path) -> None:
    many_agree_and_then_others(Disk(tmp_path / "c"), 8)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    held = store.lock("commits/.lock-a")
    assert held is not None
    threading.Timer(0.1, held.close).start()
    with store.lock("commits/.lock-a", patience_s=60) or pytest.fail("not given back"):
        assert store.lock("commits/.lock-a") is None


# ---- what is no object


def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    os.mkfifo(tmp_path / "c/pipe")
    (tmp_path / "c/folder").mkdir()
    for key in ("pipe", "folder"):
        with pytest.raises(OSError, match="not an ordinary file"):
            store.open(key)
    (tmp_path / "c/dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        store.open("dangling")


def test_an_object_that_shrinks_under_a_reader_is_short(tmp_path: Path) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    store.put("x", [bytes(range(100))], "manifest")
    found = store.open("x")
    os.truncate(tmp_path / "c/x", 30)
    targets = [np.zeros(20, np.uint8), np.zeros(20, np.uint8)]
    assert found.read(targets, 5) == 25
    assert targets[0].tolist() == list(range(5, 25))


def test_short_reads_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    data = np.arange(200, dtype=np.uint8)
    store.put("x", [data.data], "manifest")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, targets, offset: real(fd, [targets[0][:7]], offset))
    targets = [np.zeros(20, np.uint8), np.zeros(0, np.uint8), np.zeros(33, np.uint8)]
    assert store.open("x").read(targets, 100) == 53
    np.testing.assert_array_equal(np.concatenate(targets), data[100:153])


def test_places_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below", "file/below/deep"):
        with pytest.raises(RequestError, match=f"found a file at {tmp_path / 'file'}"):
            Disk(tmp_path / place).names()
        with pytest.raises(RequestError, match="cannot be made"):
            Disk(tmp_path / place).make()
    store = Disk(tmp_path / "c")
    store.make()
    store.put("a", [b"x"], "manifest")
    with pytest.raises(FeedfastError, match="a/b: cannot be written: Not a directory"):
        store.put("a/b", [b"x"], "manifest")
    assert store.names(COMMITS) == []


def test_only_the_dead_are_swept(tmp_path: Path) -> None:
    store = Disk(tmp_path / "c")
    store.make()
    for name in ("part-0-of-2", "part-11-of-12", "manifest"):
        (tmp_path / f"c/{COMMITS}/.tmp-{name}-17-0").write_bytes(b"x")
    asked: list[str] = []
    store.sweep(lambda owner: (asked.append(owner), owner == "part-11-of-12")[1])
    assert sorted(asked) == ["manifest", "part-0-of-2", "part-11-of-12"]
    assert store.names(COMMITS) == [".tmp-manifest-17-0", ".tmp-part-0-of-2-17-0"]


def test_a_store_is_taken_as_it_is() -> None:
    store = Disk("somewhere")
    assert open_store(store) is store
    assert open_store("somewhere").where("a/b") == str(Path("somewhere/a/b"))
    assert store.where() == "somewhere"
