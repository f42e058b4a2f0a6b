"""The store's contract, as any other must keep it: objects whole or not at all, lines kept, one owner per lock."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import in_memory, memory_path
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from feedfast.cache.store import COMMITS, Lock, Log, Store, open_store
from feedfast.errors import FeedfastError, RequestError

tmp_path = memory_path

KEYS = ("zarr.json", "a/zarr.json", "a/c/0/0", "a/c/0/1", "b/c/1")
LOGS = (f"{COMMITS}/part-0-of-2.jsonl", f"{COMMITS}/part-1-of-2.jsonl")
LOCKS = (f"{COMMITS}/.lock-a", f"{COMMITS}/.lock-b")
DATA = st.lists(st.binary(max_size=9), max_size=4)


def total(lines: Iterable[bytes]) -> int:
    return sum(map(len, lines))


class Contract(RuleBasedStateMachine):
    """Two stores at one place against dictionaries. Override `make_stores` and `tear` to test another kind."""

    def make_stores(self) -> list[Store]:
        self.folder = tempfile.TemporaryDirectory(dir=in_memory())
        return [Store(Path(self.folder.name, "cache")), Store(os.path.join(self.folder.name, "cache"))]

    @initialize()
    def begin(self) -> None:
        self.stores = self.make_stores()
        assert self.stores[0].names() == self.stores[0].names(COMMITS) == []
        self.stores[0].make()
        self.stores[1].make()  # again does nothing
        self.objects: dict[str, bytes] = {}
        self.lines: dict[str, bytes] = {}
        self.logs: dict[str, Log] = {}
        self.locks: dict[str, Lock] = {}

    @rule(key=st.sampled_from(KEYS), parts=DATA, who=st.integers(0, 1))
    def put(self, key: str, parts: list[bytes], who: int) -> None:
        self.stores[who].put(key, [memoryview(part) for part in parts], "part-0-of-2")
        self.objects[key] = b"".join(parts)

    @rule(key=st.sampled_from(KEYS), cuts=st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 40)))
    def read_into(self, key: str, cuts: tuple[int, int, int]) -> None:
        if key not in self.objects:
            with pytest.raises(FileNotFoundError):
                self.stores[1].open(key)
            return
        data, (offset, first, second) = self.objects[key], cuts
        found = self.stores[1].open(key)
        targets = [np.full(size, 255, np.uint8) for size in (first, second)]
        wanted = data[offset : offset + first + second]
        assert found.size == len(data)
        assert found.read(targets, offset) == len(wanted)
        assert b"".join(target.tobytes() for target in targets)[: len(wanted)] == wanted

    @rule(key=st.sampled_from(KEYS), parts=DATA)
    def an_open_object_stays_what_it_was(self, key: str, parts: list[bytes]) -> None:
        if key in self.objects:
            before = self.stores[0].open(key)
            self.stores[1].put(key, parts, "manifest")
            target = np.zeros(before.size, np.uint8)
            assert before.read([target], 0) == before.size
            assert target.tobytes() == self.objects[key]
            self.objects[key] = b"".join(parts)

    @rule(key=st.sampled_from(LOGS), who=st.integers(0, 1))
    def open_log(self, key: str, who: int) -> None:
        log = self.stores[who].open_log(key, total)
        assert (log is None) == (key in self.logs), "one owner at a time"
        if log is not None:
            self.logs[key] = log
            self.lines.setdefault(key, b"")

    @precondition(lambda self: self.logs)
    @rule(data=st.data(), line=st.binary(max_size=20))
    def append(self, data: st.DataObject, line: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self.logs)))
        self.logs[key].append(line + b"\n")
        self.lines[key] += line + b"\n"

    @precondition(lambda self: self.logs)
    @rule(data=st.data())
    def close_log(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.logs)))
        log = self.logs.pop(key)
        log.close()
        log.close()

    @precondition(lambda self: self.lines.keys() - self.logs.keys())
    @rule(data=st.data(), torn=st.binary(min_size=1, max_size=9))
    def cut_a_torn_end(self, data: st.DataObject, torn: bytes) -> None:
        """What a crash left after the last whole line, wherever that ends, is gone when the log is opened."""
        key = data.draw(st.sampled_from(sorted(self.lines.keys() - self.logs.keys())))
        self.tear(key, torn)
        asked: list[bytes] = []
        log = self.stores[0].open_log(key, lambda found: (asked.extend(found), total(asked) - len(torn))[1])
        assert log is not None
        assert b"".join(asked) == self.lines[key] + torn
        self.logs[key] = log

    def tear(self, key: str, torn: bytes) -> None:
        with Path(self.folder.name, "cache", key).open("ab") as file:
            file.write(torn)

    @rule(key=st.sampled_from(LOCKS), who=st.integers(0, 1))
    def lock(self, key: str, who: int) -> None:
        lock = self.stores[who].lock(key)
        assert (lock is None) == (key in self.locks), "one owner at a time"
        if lock is not None:
            self.locks[key] = lock

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.locks.pop(data.draw(st.sampled_from(sorted(self.locks)))).close()

    @rule(key=st.sampled_from(KEYS), owner=st.sampled_from(["part-0-of-2", "manifest"]))
    def sweep_touches_nothing_that_is_whole(self, key: str, owner: str) -> None:
        self.stores[0].sweep(lambda found: found == owner)

    @invariant()
    def everyone_sees_everything(self) -> None:
        store = self.stores[1]
        for key in (*KEYS, *LOGS):
            wanted = self.objects.get(key, self.lines.get(key))
            if wanted is None:
                for look in (store.size, store.read):
                    with pytest.raises(FileNotFoundError):
                        look(key)
            else:
                assert store.read(key) == wanted
                assert store.size(key) == len(wanted)
        for folder in ("", "a", "a/c", "a/c/0", "b/c"):
            inside = [
                key.removeprefix(f"{folder}/" if folder else "") for key in self.objects if key.startswith(folder)
            ]
            wanted_names = {name.split("/")[0] for name in inside} | ({COMMITS} if not folder else set())
            assert store.names(folder) == sorted(wanted_names)
        assert [name for name in store.names(COMMITS) if name.endswith(".jsonl")] == sorted(
            key.removeprefix(f"{COMMITS}/") for key in self.lines
        )

    def teardown(self) -> None:
        for held in (*self.logs.values(), *self.locks.values()):
            held.close()
        self.folder.cleanup()


TestContract = Contract.TestCase
TestContract.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


# ---- who dies, lets go


HOLD = """
import sys, time; from feedfast.cache.store import Store
store = Store(sys.argv[1])
held = [store.lock("commits/.lock-a"), store.join("commits/.lock-split", "3"),
        store.open_log("commits/x.jsonl", lambda lines: sum(map(len, lines)))]
print(all(held), flush=True)
time.sleep(600)
"""


def test_a_killed_owner_owns_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "c")
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
    store = Store(tmp_path / "c")
    store.make()
    joined: list[Lock | str] = []
    threads = [threading.Thread(target=lambda: joined.append(store.join("commits/.lock-split", "8"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    locks = [lock for lock in joined if isinstance(lock, Lock)]
    assert len(locks) == 8
    for lock in locks[:-1]:
        lock.close()
    assert store.join("commits/.lock-split", "5") == "8"
    locks[-1].close()
    after = store.join("commits/.lock-split", "5")
    assert isinstance(after, Lock)
    after.close()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "c")
    store.make()
    held = store.lock("commits/.lock-a")
    assert held is not None
    threading.Timer(0.1, held.close).start()
    with store.lock("commits/.lock-a", patience_s=60) or pytest.fail("not given back"):
        assert store.lock("commits/.lock-a") is None


# ---- what is no object


def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "c")
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
    store = Store(tmp_path / "c")
    store.make()
    store.put("x", [bytes(range(100))], "manifest")
    found = store.open("x")
    os.truncate(tmp_path / "c/x", 30)
    targets = [np.zeros(20, np.uint8), np.zeros(20, np.uint8)]
    assert found.read(targets, 5) == 25
    assert targets[0].tolist() == list(range(5, 25))


def test_short_reads_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "c")
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
            Store(tmp_path / place).names()
        with pytest.raises(RequestError, match="cannot be made"):
            Store(tmp_path / place).make()
    store = Store(tmp_path / "c")
    store.make()
    store.put("a", [b"x"], "manifest")
    with pytest.raises(FeedfastError, match="a/b: cannot be written: Not a directory"):
        store.put("a/b", [b"x"], "manifest")
    assert store.names(COMMITS) == []


def test_only_the_dead_are_swept(tmp_path: Path) -> None:
    store = Store(tmp_path / "c")
    store.make()
    for name in ("part-0-of-2", "part-11-of-12", "manifest"):
        (tmp_path / f"c/{COMMITS}/.tmp-{name}-17-0").write_bytes(b"x")
    asked: list[str] = []
    store.sweep(lambda owner: (asked.append(owner), owner == "part-11-of-12")[1])
    assert sorted(asked) == ["manifest", "part-0-of-2", "part-11-of-12"]
    assert store.names(COMMITS) == [".tmp-manifest-17-0", ".tmp-part-0-of-2-17-0"]


def test_a_store_is_taken_as_it_is() -> None:
    store = Store("somewhere")
    assert open_store(store) is store
    assert open_store("somewhere").where("a/b") == str(Path("somewhere/a/b"))
    assert store.where() == "somewhere"
