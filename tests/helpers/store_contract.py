"""The store's contract, as any must keep it: objects whole or not at all, lines kept, one owner per lock."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from cache_samples import in_memory
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from feedfast.storage.disk import Disk
from feedfast.storage.store import COMMITS, Lock, Log, Store

KEYS = ("zarr.json", "a/zarr.json", "a/c/0/0", "a/c/0/1", "b/c/1")
LOGS = (f"{COMMITS}/part-0-of-2.jsonl", f"{COMMITS}/part-1-of-2.jsonl")
LOCKS = (f"{COMMITS}/.lock-a", f"{COMMITS}/.lock-b")
DATA = st.lists(st.binary(max_size=9), max_size=4)


def total(lines: Iterable[bytes]) -> int:
    return sum(map(len, lines))


def many_agree_and_then_others(store: Store, count: int) -> None:
    """So many join at once with one value; while any of them is left, another value is told theirs."""
    store.make()
    joined: list[Lock | str] = []
    threads = [
        threading.Thread(target=lambda: joined.append(store.join("commits/.lock-split", "8"))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    locks = [lock for lock in joined if isinstance(lock, Lock)]
    assert len(locks) == count
    for lock in locks[:-1]:
        lock.close()
    assert store.join("commits/.lock-split", "5") == "8"
    locks[-1].close()
    after = store.join("commits/.lock-split", "5")
    assert isinstance(after, Lock)
    after.close()


class Contract(RuleBasedStateMachine):
    """Two stores at one place against dictionaries. Override `make_stores` and `tear` to test another kind."""

    keeps_open = True  # whether an object that is open stays what it was when another takes its place
    logs_are_objects = True  # whether a log can be read as one

    def make_stores(self) -> list[Store]:
        self.folder = tempfile.TemporaryDirectory(dir=in_memory())
        return [Disk(Path(self.folder.name, "cache")), Disk(os.path.join(self.folder.name, "cache"))]

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
            try:
                assert before.read([target], 0) == before.size
                assert target.tobytes() == self.objects[key]
            except OSError:
                assert not self.keeps_open
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
                for look in (store.size, store.read, store.sizes(key.rpartition("/")[0])):
                    with pytest.raises(FileNotFoundError):
                        look(key)
            else:
                assert self.content(store, key) == wanted
                assert (key in LOGS and not self.logs_are_objects) or store.size(key) == len(wanted)
        for folder in ("", "a", "a/c", "a/c/0", "b/c"):
            inside = [
                key.removeprefix(f"{folder}/" if folder else "") for key in self.objects if key.startswith(folder)
            ]
            wanted_names = {name.split("/")[0] for name in inside} | ({COMMITS} if not folder else set())
            assert store.names(folder) == sorted(wanted_names)
        assert [name for name in store.names(COMMITS) if name.endswith(".jsonl")] == sorted(
            key.removeprefix(f"{COMMITS}/") for key in self.lines
        )

    def content(self, store: Store, key: str) -> bytes:
        lines = b"".join(store.lines(key)) if key in LOGS else None
        data = store.read(key) if lines is None or self.logs_are_objects else lines
        assert lines in (None, data)
        return data

    def teardown(self) -> None:
        for held in (*self.logs.values(), *self.locks.values()):
            held.close()
        self.folder.cleanup()
