"""The store's contract, kept by a bucket: in memory, and on an S3 server that the tests start."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from buckets import DENIED, SECRET, SLOW_DOWN, Cloud, Fault
from hypothesis import HealthCheck, settings
from store_contract import LOGS, Contract, many_agree_and_then_others, total

from feedfast.errors import FeedfastError, PartTakenError, RequestError
from feedfast.storage.bucket import Bucket, line_key
from feedfast.storage.objects import Objects, Patience
from feedfast.storage.places import open_store, place_of
from feedfast.storage.store import COMMITS, Lock, Store

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")

BRISK = Patience(tries=6, first_s=0.01, longest_s=0.05, connect_s=1.0, answer_s=1.0)


class BucketContract(Contract):
    """Two stores of one place, with the contract that a folder keeps."""

    keeps_open = False
    logs_are_objects = False

    def make_stores(self) -> list[Store]:
        client = obstore.store.MemoryStore()
        place = f"memory://tests/{uuid.uuid4().hex}"
        return [Bucket(place, objects=Objects(place, client=client), lease_s=0.2) for _ in range(2)]

    def tear(self, key: str, torn: bytes) -> None:
        objects = self.stores[0]._objects  # type: ignore[attr-defined]
        objects.put(line_key(key, len(self.lines[key])), torn, create=True)

    def teardown(self) -> None:
        for held in (*self.logs.values(), *self.locks.values()):
            held.close()


TestInMemory = BucketContract.TestCase
TestInMemory.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)


def brisk(place: str, **options: Any) -> Bucket:
    """A store without much patience."""
    return Bucket(place, objects=Objects(place, patience=BRISK), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("cloud")
def test_a_server_keeps_the_contract_too(cloud: Cloud) -> None:
    class OnServer(BucketContract):
        def make_stores(self) -> list[Store]:
            place = cloud.url()
            return [brisk(place, lease_s=0.4) for _ in range(2)]

    case = OnServer.TestCase
    case.settings = settings(
        deadline=None, max_examples=3, stateful_step_count=12, suppress_health_check=list(HealthCheck), database=None
    )
    case("runTest").debug()


# ---- logs


def test_a_log_is_packed_when_it_is_closed(cloud: Cloud) -> None:
    """What is left then is what a folder would hold."""
    place = cloud.url()
    store = brisk(place, lease_s=5.0)
    store.make()
    lines = [f"line {number}\n".encode() for number in range(5)]
    with store.open_log(LOGS[0], total) or pytest.fail("taken") as log:
        for line in lines:
            log.append(line)
        assert list(brisk(place).lines(LOGS[0])) == lines
        assert len([key for key in store._objects.below(COMMITS) if f"{LOGS[0]}.d/" in key]) == 5
    assert sorted(store._objects.below(COMMITS)) == [f"{COMMITS}/.made", LOGS[0]]
    assert store.read(LOGS[0]) == b"".join(lines)
    with store.open_log(LOGS[0], total) or pytest.fail("taken") as log:
        log.append(b"more\n")
    assert list(store.lines(LOGS[0])) == [*lines, b"more\n"]


def test_lines_that_are_packed_while_they_are_read_are_read_once(cloud: Cloud) -> None:
    place = cloud.url()
    store = brisk(place, lease_s=5.0)
    store.make()
    log = store.open_log(LOGS[0], total)
    assert log is not None
    for number in range(3):
        log.append(f"{number}\n".encode())

    def pack_then(method: str, path: str, headers: dict[str, str]) -> None:
        if method == "GET" and ".jsonl.d/" in path and not packed:
            packed.append(path)
            log.close()

    packed: list[str] = []
    cloud.proxy.rule = pack_then
    assert list(brisk(place).lines(LOGS[0])) == [b"0\n", b"1\n", b"2\n"]
    assert packed


def in_memory() -> Bucket:
    place = f"memory://tests/{uuid.uuid4().hex}"
    return Bucket(place, objects=Objects(place, client=obstore.store.MemoryStore()), lease_s=60.0)


def test_a_long_log_is_packed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast.storage.bucket._PACK", 3)
    store, lines = in_memory(), [f"{number}\n".encode() for number in range(11)]
    with store.open_log(LOGS[0], total) or pytest.fail("taken") as log:
        for number, line in enumerate(lines, 1):
            log.append(line)
            single = [key for key in store._objects.below(COMMITS) if f"{LOGS[0]}.d/" in key]
            assert len(single) == number % 3
            assert list(store.lines(LOGS[0])) == lines[:number]


def test_a_writer_that_is_killed_between_packing_and_removing_left_nothing_twice() -> None:
    store = in_memory()
    for number in range(3):
        store._objects.put(line_key(LOGS[0], 2 * number), f"{number}\n".encode())
    store._objects.put(LOGS[0], b"0\n1\n")  # of which 0 and 1 would have been removed next
    assert list(store.lines(LOGS[0])) == [b"0\n", b"1\n", b"2\n"]
    with store.open_log(LOGS[0], total) or pytest.fail("taken") as log:
        log.append(b"3\n")
    assert store.read(LOGS[0]) == b"0\n1\n2\n3\n"
    assert not [key for key in store._objects.below(COMMITS) if ".d/" in key]


def test_whoever_appends_where_another_has_is_refused(cloud: Cloud) -> None:
    """Two that both believe they own a log: nothing is written over, and one of them ends."""
    place = cloud.url()
    first = brisk(place, lease_s=60.0)
    first.make()
    log = first.open_log(LOGS[0], total)
    assert log is not None
    log.append(b"a\n")
    first._objects.put(line_key(LOGS[0], 2), b"of another\n", create=True)
    with pytest.raises(PartTakenError, match="byte 2, found that another process has done so"):
        log.append(b"b\n")
    assert list(first.lines(LOGS[0])) == [b"a\n", b"of another\n"]


@pytest.mark.parametrize("served", [True, False], ids=["answer lost", "request lost"])
def test_a_line_whose_answer_is_lost_is_there_once(cloud: Cloud, served: bool) -> None:
    store = brisk(cloud.url(), lease_s=60.0)
    store.make()
    with store.open_log(LOGS[0], total) or pytest.fail("taken") as log:
        failures = iter([Fault(reset=True, served=served)] * 3)
        cloud.proxy.rule = lambda method, path, headers: (
            next(failures, None) if method == "PUT" and ".d/" in path else None
        )
        log.append(b"x\n")
        log.append(b"y\n")
    assert list(store.lines(LOGS[0])) == [b"x\n", b"y\n"]


# ---- owners

HOLD = """
import sys, time; from feedfast.storage.bucket import Bucket
store = Bucket(sys.argv[1], lease_s=2.0)
held = [store.lock("commits/.lock-a"), store.join("commits/.lock-split", "3"),
        store.open_log("commits/x.jsonl", lambda lines: sum(map(len, lines)))]
print(all(held), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_owner_owns_nothing_after_a_while(cloud: Cloud) -> None:
    place = cloud.url()
    store = brisk(place, lease_s=2.0)
    store.make()
    owner = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        assert store.lock("commits/.lock-a") is None
        assert store.lock("commits/.lock-a", patience_s=3.0) is None, "it is alive, and renews"
        assert store.open_log("commits/x.jsonl", total) is None
        assert store.join("commits/.lock-split", "2") == "3"
        with_them = store.join("commits/.lock-split", "3")
        assert isinstance(with_them, Lock)
        with_them.close()
    finally:
        owner.kill()
        owner.communicate()
    held: list[Any] = [store.lock("commits/.lock-a", patience_s=60.0), store.open_log("commits/x.jsonl", total)]
    held.append(store.join("commits/.lock-split", "2"))
    assert all(isinstance(one, Lock) for one in held)
    for one in held:
        one.close()


def test_an_owner_that_was_cut_off_learns_that_it_is_one_no_more(cloud: Cloud) -> None:
    place = cloud.url()
    store = brisk(place, lease_s=0.4)
    store.make()
    log = store.open_log(LOGS[0], total)
    assert log is not None
    log.append(b"a\n")
    key = f"{COMMITS}/.lease-part-0-of-2"
    store._objects.put(key, b'{"owner": "somebody else", "renewed": 0}')
    deadline = time.monotonic() + 30
    while not log._lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(FeedfastError, match="another process has taken this over"):
        log.append(b"b\n")
    with pytest.raises(FeedfastError, match="another process has taken this over"):
        log.close()
    assert list(store.lines(LOGS[0])) == [b"a\n"]


def test_many_who_agree_and_then_others(cloud: Cloud) -> None:
    many_agree_and_then_others(brisk(cloud.url(), lease_s=2.0), 4)


# ---- places


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{SECRET}:{SECRET}@bucket/x",
        f"s3://bucket/x?secret={SECRET}",
        f"ftp://{SECRET}/x",
        f"s3:///{SECRET}",
        f"s3://bucket/{SECRET}#x",
        f"s3://bucket//{SECRET}",
        f"s3://bucket/../{SECRET}",
        f"file:///{SECRET}",
    ],
)
def test_what_is_no_place_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RequestError, match="expected a folder, or s3://BUCKET/PREFIX") as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_a_place_is_a_folder_or_a_url() -> None:
    assert place_of("runs/c.zarr") == Path("runs/c.zarr")
    assert place_of("s3://b/runs/c.zarr") == "s3://b/runs/c.zarr"
    store = open_store("s3://b/runs/c.zarr/")
    assert (store.place, store.where("zarr.json")) == ("s3://b/runs/c.zarr", "s3://b/runs/c.zarr/zarr.json")
    assert open_store(store) is store
    assert open_store("gs://b").where("a") == "gs://b/a"


# ---- what goes wrong

LATER = {
    "slow down": Fault(503, SLOW_DOWN),
    "too many": Fault(429),
    "error": Fault(500),
    "reset": Fault(reset=True, served=False),
    "half a body": Fault(keep=100),
    "short, and says so": Fault(short=100),
    "no answer": Fault(hang_s=1.5),
}


@pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in LATER.items()])
def test_what_passes_is_tried_again(cloud: Cloud, fault: Fault) -> None:
    """Each request fails twice; what is read and written is right all the same."""
    store, data = brisk(cloud.url()), bytes(range(256)) * 4
    failing: dict[tuple[str, str], int] = {}

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        what = (method, path)
        failing[what] = failing.get(what, 0) + 1
        if fault.hang_s:  # which takes its time
            return fault if path.endswith("/a/b") and method != "HEAD" and failing[what] == 1 else None
        return fault if failing[what] <= 2 else None

    cloud.proxy.rule = rule
    store.put("a/b", [data[:500], data[500:]], "x")
    assert store.read("a/b") == data
    found = store.open("a/b", tail_bytes=10)
    target = bytearray(700)
    assert found.read([memoryview(target)[:300], memoryview(target)[300:]], 100) == 700
    assert bytes(target) == data[100:800]
    assert store.names("a") == ["b"]
    assert store.sizes("a")("a/b") == store.size("a/b") == len(data)


@pytest.mark.parametrize(
    "fault", [pytest.param(LATER[name], id=name) for name in ("slow down", "reset", "half a body")]
)
def test_what_does_not_pass_is_told_in_one_sentence(
    cloud: Cloud, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    store = brisk(cloud.url())
    store.put("a/b", [bytes(1000)], "x")
    cloud.proxy.rule = lambda method, path, headers: fault if method == "GET" else None
    cloud.proxy.seen.clear()
    with caplog.at_level("DEBUG", logger="feedfast"), pytest.raises(FeedfastError) as caught:
        store.read("a/b")
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"{store.where('a/b')}: cannot be read: ")
    assert "after 6 tries" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(cloud.proxy.seen) == 6
    told = [record.getMessage() for record in caplog.records if "a/b" in record.getMessage()]
    assert [record.levelname for record in caplog.records if "a/b" in record.getMessage()] == ["DEBUG"] * 5
    assert "try 2 of 6" in told[0]
    assert SECRET not in caplog.text + str(caught.value)


@pytest.mark.parametrize("status", [403, 401, 400, 501])
def test_what_cannot_succeed_is_not_tried_again(cloud: Cloud, status: int) -> None:
    store = brisk(cloud.url())
    cloud.proxy.rule = lambda method, path, headers: Fault(status, DENIED)
    verbs: list[Any] = [
        lambda: store.read("a"),
        lambda: store.size("a"),
        lambda: store.names(),
        lambda: store.put("a", [b"x"], "x"),
        store.make,
        lambda: store.lock("commits/.lock-a"),
        lambda: store.open_log(LOGS[0], total),
    ]
    for verb in verbs:
        cloud.proxy.seen.clear()
        with pytest.raises(RequestError, match=f"HTTP {status}") as caught:
            verb()
        assert caught.value.exit_code == 2
        assert len(cloud.proxy.seen) == 1
        assert SECRET not in str(caught.value)
        assert KEY not in str(caught.value)


KEY = "AKIATESTSKEYID"


def test_without_credentials_it_says_so_at_once(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # where nobody answers
    with pytest.raises(RequestError, match=r"expected credentials in AWS_ACCESS_KEY_ID, .*, found none"):
        brisk(cloud.url()).names()


@pytest.mark.usefixtures("cloud")
def test_no_such_bucket() -> None:
    store = brisk("s3://nobody-has-this-one/c.zarr")
    for verb in (store.names, store.make, lambda: store.put("a", [b""], "x"), lambda: store.open("a", tail_bytes=9)):
        with pytest.raises(RequestError, match=r"expected a bucket \(container\) named 'nobody-has-this-one'"):
            verb()


def test_a_store_that_knows_no_conditions_is_refused(cloud: Cloud) -> None:
    """A proxy that drops the condition stands for a server that never knew it."""
    store = brisk(cloud.url())

    def drop(method: str, path: str, headers: dict[str, str]) -> None:
        headers.pop("if-none-match", None)

    cloud.proxy.rule = drop
    with pytest.raises(RequestError, match="If-None-Match"):
        store.make()


# ---- two writers of one object


class Taken(Exception):
    pass


def refuse() -> None:
    raise Taken


def test_an_object_that_is_there_with_other_bytes_is_not_written_over(cloud: Cloud) -> None:
    store = brisk(cloud.url())
    store.put("a", [b"one"], "x", taken=refuse)
    store.put("a", [b"one"], "y", taken=refuse)  # the same rows give the same bytes
    for other in (b"two", b"longer"):
        with pytest.raises(Taken):
            store.put("a", [other], "y", taken=refuse)
    assert store.read("a") == b"one"
    store.put("a", [b"two"], "y", taken=lambda: None)
    assert store.read("a") == b"two"
    with pytest.raises(PartTakenError, match="another process is writing the same object"):
        store.put("a", [b"mine"], "y", taken=lambda: store.put("a", [b"theirs"], "z"))
    assert store.read("a") == b"theirs"
    store.put("a", [b"three"], "y")
    assert store.read("a") == b"three"


def test_buffers_that_are_used_again_once_they_are_written_change_nothing(cloud: Cloud) -> None:
    """A writer gives a shard's memory to the next one as soon as it may: also where the object must be sent twice."""
    store, buffer = brisk(cloud.url()), bytearray(b"mine")
    store.put("a", [b"what a dead one left"], "x")
    store.put("a", [buffer], "y", taken=lambda: None, written=lambda: buffer.__setitem__(slice(0, 4), b"next"))
    assert store.read("a") == b"mine"


def test_one_of_many_creates_an_object(cloud: Cloud) -> None:
    store, outcomes = brisk(cloud.url()), []
    start = threading.Barrier(6)

    def race(number: int) -> None:
        start.wait()
        try:
            store.put("a", [bytes([number]) * 100], "x", taken=refuse)
            outcomes.append(number)
        except Taken:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert store.read("a") == bytes(outcomes) * 100
