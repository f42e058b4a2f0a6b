"""Caches in a bucket: the same bytes and digest as in a folder, whatever the network and other writers do meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import SLOW_DOWN, Cloud, Fault
from cache_samples import (
    FINAL,
    expected,
    fill_cache,
    make_manifest,
    make_tap,
    make_teacher,
    memory_path,
    rows_of,
    tiny,
)

from feedfast.errors import CacheDamageError, FeedfastError, PartTakenError, RequestError
from feedfast.storage.bucket import Bucket, line_key
from feedfast.storage.layout import array_specs
from feedfast.storage.log import Commit, cache_digest, digest_of, keep_index, read_log
from feedfast.storage.objects import Objects, Patience
from feedfast.storage.reader import CacheReader
from feedfast.storage.tier import Tier
from feedfast.storage.verify import verify_cache

pytest.importorskip("obstore")
pytest.importorskip("moto")

tmp_path = memory_path
BRISK = Patience(tries=7, first_s=0.01, longest_s=0.05, connect_s=2.0, answer_s=2.0)


def brisk(place: str, **options: Any) -> Bucket:
    return Bucket(place, objects=Objects(place, patience=BRISK), **{"lease_s": 60.0, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache of `tiny` in a folder, and its digest."""
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    return path, fill_cache(path, tiny())


# ---- writing


def test_a_bucket_holds_what_a_folder_holds(cloud: Cloud, tmp_path: Path) -> None:
    """Byte for byte, asked of the server itself; only the files that lock a folder are not there."""
    taps = make_tap("final"), make_tap("zip", compression="zstd"), make_tap("half", codec="f16")
    manifest = make_manifest(make_teacher("a", *taps), rows=40, views=1, images="stored")
    place = cloud.url()
    digest = fill_cache(tmp_path / "c", manifest)
    assert fill_cache(place, manifest) == digest  # type: ignore[arg-type]
    files = {str(file.relative_to(tmp_path / "c")): file for file in (tmp_path / "c").rglob("*") if file.is_file()}
    prefix = place.removeprefix(f"s3://{cloud.bucket}")
    for name, file in files.items():
        if "/.lock" not in name and not name.endswith(".jsonl"):
            assert cloud.request("GET", f"/{cloud.bucket}{prefix}/{name}") == (200, file.read_bytes()), name
    assert set(brisk(place)._objects.below("")) - {"commits/.made"} == {name for name in files if "/.lock" not in name}
    assert verify_cache(place) == verify_cache(place, full=True) == []
    with CacheReader(place) as reader:
        assert reader.complete
        for spec, values in expected(manifest):
            rows = np.arange(spec.rows)
            got = reader.read_rows(spec.name, spec.num_views - 1, rows)
            np.testing.assert_array_equal(got, (values[-1] if spec.views else values)[: spec.rows])


def test_two_parts_at_a_time_and_a_part_of_another_division(cloud: Cloud, folder: tuple[Path, str]) -> None:
    place = cloud.url()
    fill_cache(place, tiny(), part=(1, 2))  # type: ignore[arg-type]
    assert {entry["kind"] for entry in verify_cache(place)} == {"incomplete"}
    assert fill_cache(place, tiny(), part=(0, 2)) == folder[1]  # type: ignore[arg-type]
    assert verify_cache(place, full=True) == []


@pytest.mark.slow
def test_a_cache_is_extended_and_a_lost_object_written_again(cloud: Cloud, tmp_path: Path) -> None:
    place = cloud.url()
    fill_cache(place, tiny())  # type: ignore[arg-type]
    fill_cache(tmp_path / "c", tiny(views=2))
    assert fill_cache(place, tiny(views=2)) == cache_digest(tmp_path / "c")  # type: ignore[arg-type]
    key = f"{FINAL}/c/1/2/0/0/0"
    store = brisk(place)
    store.put(key, [b"short"], "x")
    assert {entry["kind"] for entry in verify_cache(place)} == {"length"}
    store._objects.delete([key])
    assert {entry["kind"] for entry in verify_cache(place)} == {"missing"}
    assert fill_cache(place, tiny(views=2)) == cache_digest(tmp_path / "c")  # type: ignore[arg-type]
    assert verify_cache(place, full=True) == []
    assert read_log(place).commits[FINAL, "c/1/2/0/0/0"].attempt == 1


def test_an_index_covers_what_is_packed_and_later_lines_are_read(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast.storage.index.MIN_LINES", 1)
    place = cloud.url()
    fill_cache(place, tiny())  # type: ignore[arg-type]
    assert keep_index(place, array_specs(tiny()))
    assert read_log(place).commits.indexed
    fill_cache(place, tiny(views=2))  # type: ignore[arg-type]
    store, lines = brisk(place), list(brisk(place).lines("commits/part-0-of-1.jsonl"))
    ends = np.cumsum([len(line) for line in lines]).tolist()
    for place_of_line in (0, ends[0], ends[5], ends[-1]):
        tail = b"".join(store.lines("commits/part-0-of-1.jsonl", place_of_line))
        assert tail == b"".join(lines)[place_of_line:]
    store._objects.put("commits/part-0-of-1.jsonl", b"".join(lines[:-3]))  # as if the last three were not packed yet
    for line, end in zip(lines[-3:], ends[-4:-1], strict=True):
        store._objects.put(line_key("commits/part-0-of-1.jsonl", end), line)
    found = read_log(place)
    assert found.commits.indexed
    assert dict(found.commits.items()) == dict(read_log(place, indexed=False).commits.items())
    assert cache_digest(place) == digest_of(Commit.from_line(line[:-1]) for line in lines)


FAULTS = [
    Fault(503, SLOW_DOWN),
    Fault(500),
    Fault(reset=True, served=False),
    Fault(reset=True, served=True),
    Fault(keep=5),
    Fault(short=5),
]


def storm(seed: int, share: float = 0.25) -> Any:
    """Any request may fail in any way, but none of them more than thrice."""
    rng, guard, failed = random.Random(seed), threading.Lock(), {}

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with guard:
            what = (method, path, headers.get("range"))
            if rng.random() < share and failed.get(what, 0) < 3:
                failed[what] = failed.get(what, 0) + 1
                return rng.choice(FAULTS)
        return None

    return rule


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_whatever_the_network_does_the_digest_is_the_same(cloud: Cloud, folder: tuple[Path, str], seed: int) -> None:
    place = cloud.url()
    cloud.proxy.rule = storm(seed)
    store = brisk(place)
    assert fill_cache(store, tiny()) == folder[1]  # type: ignore[arg-type]
    assert verify_cache(store, full=True) == []
    with CacheReader(store) as reader:
        for number, batch in enumerate(reader.stream([FINAL], 0, batch_size=16)):
            wanted = rows_of(reader.specs[FINAL], 0, number * 16, min(number * 16 + 16, 70))
            np.testing.assert_array_equal(batch[FINAL], wanted)
    cloud.proxy.rule = lambda method, path, headers: None
    assert verify_cache(place, full=True) == []


def test_a_store_that_stops_answering_ends_the_job_and_harms_nothing(cloud: Cloud, folder: tuple[Path, str]) -> None:
    place = cloud.url()
    puts = iter(range(10**6))
    cloud.proxy.rule = lambda method, path, headers: (
        Fault(503, SLOW_DOWN) if method == "PUT" and "/c/" in path and next(puts) > 7 else None
    )
    with pytest.raises(FeedfastError, match="cannot be written: HTTP 503 SlowDown, after 7 tries") as caught:
        fill_cache(brisk(place), tiny())  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    cloud.proxy.rule = lambda method, path, headers: None
    assert {entry["kind"] for entry in verify_cache(place, full=True)} == {"incomplete"}
    assert fill_cache(place, tiny()) == folder[1]  # type: ignore[arg-type]


WRITER = """
import sys; sys.path[:0] = sys.argv[2:]
from cache_samples import fill_cache, tiny
from feedfast.storage.bucket import Bucket
print(fill_cache(Bucket(sys.argv[1], lease_s=1.0), tiny()))
"""


def writer(place: str) -> subprocess.Popen[str]:
    helpers = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", WRITER, place, helpers]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("at", [17, 45])
def test_a_killed_writer_is_continued(cloud: Cloud, folder: tuple[Path, str], at: int) -> None:
    """By SIGKILL while its k-th request that writes is on its way, carried out or not."""
    place, puts, killed = cloud.url(), [0], threading.Event()
    process = writer(place)

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        if method == "PUT" and not killed.is_set():
            puts[0] += 1
            if puts[0] >= at:
                process.kill()
                killed.set()
                return Fault(reset=True, served=at % 2 == 0)
        return None

    cloud.proxy.rule = rule
    assert process.wait(timeout=120) == -9
    process.communicate()
    for key, commit in read_log(place).commits.items():
        assert brisk(place).size("/".join(key)) == commit.bytes, "a line is never there before its object"
    again = writer(place)
    out, err = again.communicate(timeout=120)
    assert (out.strip(), again.returncode) == (folder[1], 0), err
    assert verify_cache(place, full=True) == []


@pytest.mark.slow
def test_two_processes_with_the_same_part(cloud: Cloud, folder: tuple[Path, str]) -> None:
    """One writes, the other is refused before its first row; nothing is written twice."""
    place = cloud.url()
    cloud.proxy.rule = lambda method, path, headers: Fault(delay_s=0.02)
    racing = [writer(place) for _ in range(2)]
    outcomes = [process.communicate(timeout=200) for process in racing]
    done = [out.strip() for (out, _), process in zip(outcomes, racing, strict=True) if process.returncode == 0]
    assert set(done) == {folder[1]}
    for (_, err), process in zip(outcomes, racing, strict=True):
        assert process.returncode == 0 or "is already being written by another process" in err, err
    assert verify_cache(place, full=True) == []


class NoLease:
    """A lease that keeps nobody away."""

    lost = False

    def require(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> NoLease:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_without_any_lease_one_of_two_writers_is_refused(
    cloud: Cloud, folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What must never happen does not rest on leases: both believe that the part is theirs."""
    place = cloud.url()
    monkeypatch.setattr("feedfast.storage.bucket.take", lambda *_, **__: NoLease())
    results: list[Any] = []

    def write() -> None:
        try:
            results.append(fill_cache(brisk(place), tiny()))  # type: ignore[arg-type]
        except FeedfastError as error:
            results.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    for result in results:
        assert result == folder[1] or isinstance(result, PartTakenError | FeedfastError), result
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    assert fill_cache(place, tiny()) == folder[1]  # type: ignore[arg-type]
    assert verify_cache(place, full=True) == []


def test_a_shard_that_another_has_committed_with_other_bytes_is_refused(cloud: Cloud) -> None:
    place = cloud.url()
    fill_cache(place, tiny(), part=(0, 2))  # type: ignore[arg-type]
    from feedfast.storage.ledger import Ledger

    store = brisk(place)
    ledger = Ledger(store, tiny(), (1, 2))
    spec = ledger.specs[FINAL]
    mine = sorted(ledger.missing(FINAL))[0]
    theirs = next(iter(set(range(spec.num_shards)) - {shard for _, shard in ledger.missing(FINAL)}))
    ledger.commits.pop((FINAL, spec.key(0, theirs)))  # as one who opened before it was there
    blocks = [np.zeros(spec.block_bytes, np.uint8), b"crcs"] * spec.real_blocks(theirs)
    with pytest.raises(FeedfastError, match="another process has committed this shard meanwhile"):
        ledger.commit(spec, 0, theirs, [*blocks, b"index"])
    store.put(f"{FINAL}/{spec.key(*mine)}", [b"left by one who died"], "x")
    blocks = [np.zeros(spec.block_bytes, np.uint8), b"crcs"] * spec.real_blocks(mine[1])
    ledger.commit(spec, *mine, [*blocks, b"index"])
    assert store.read(f"{FINAL}/{spec.key(*mine)}").endswith(b"crcsindex")
    ledger.close()


# ---- reading


@pytest.fixture(scope="module")
def stored(one_cloud: Cloud, folder: tuple[Path, str]) -> str:
    """The same cache in the bucket."""
    place = one_cloud.url()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in one_cloud.environment.items():
            patch.setenv(name, value)
        assert fill_cache(place, tiny()) == folder[1]  # type: ignore[arg-type]
    return place


def stream(reader: CacheReader, rows: np.ndarray | None = None) -> None:
    """All rows, right ones, in the wanted order."""
    rows = np.arange(70) if rows is None else rows
    wanted = rows_of(reader.specs[FINAL], 0, 0, 70)
    for number, batch in enumerate(reader.stream([FINAL], 0, rows, batch_size=16)):
        np.testing.assert_array_equal(batch[FINAL], wanted[rows[number * 16 : number * 16 + 16]])


def shard_requests(cloud: Cloud) -> int:
    return sum(f"/{FINAL}/c/" in path for _, path in cloud.proxy.seen)


def test_a_byte_that_was_changed_on_the_way_is_asked_for_again(cloud: Cloud, stored: str) -> None:
    flipped: set[tuple[str, str | None]] = set()

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        what = (path, headers.get("range"))
        if method == "GET" and "/c/" in path and what not in flipped and len(flipped) % 2 == 0:
            flipped.add(what)
            return Fault(flip=3)
        flipped.add(what)
        return None

    cloud.proxy.rule = rule
    stream(CacheReader(stored))


def test_a_byte_that_is_wrong_in_the_bucket_is_damage(cloud: Cloud, stored: str) -> None:
    cloud.proxy.rule = lambda method, path, headers: (
        Fault(flip=3) if method == "GET" and f"{FINAL}/c/0/1/" in path else None
    )
    with pytest.raises(CacheDamageError, match=rf"{stored}/{FINAL}/c/0/1/0/0/0: .*\[(checksum|index)"):
        stream(CacheReader(stored))


def test_opening_asks_little(cloud: Cloud, stored: str) -> None:
    """A stream of five shards: the manifest, the log, a listing, then per shard its index and its rows."""
    cloud.proxy.seen.clear()
    with CacheReader(stored) as reader:
        opened = len(cloud.proxy.seen)
        stream(reader)
    assert opened <= 6, cloud.proxy.seen
    assert len(cloud.proxy.seen) - opened <= 1 + 2 * reader.specs[FINAL].num_shards, cloud.proxy.seen


def test_more_requests_are_in_flight_when_they_take_longer(cloud: Cloud, stored: str) -> None:
    under_way, most, guard = [0], [0], threading.Lock()

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        if method == "GET" and f"{FINAL}/c/" in path:
            with guard:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            threading.Event().wait(0.05)
            with guard:
                under_way[0] -= 1
        return None

    cloud.proxy.rule = rule
    stream(CacheReader(stored, threads=1))
    assert most[0] > 1


def test_a_refusal_while_streaming_is_told_once(cloud: Cloud, stored: str) -> None:
    reader = CacheReader(stored)
    cloud.proxy.rule = lambda method, path, headers: Fault(403) if f"{FINAL}/c/0/2/" in path else None
    with pytest.raises(RequestError, match=rf"{stored}/{FINAL}/c/0/2/0/0/0: may not be read \(HTTP 403\)"):
        stream(reader)
    assert sum(f"{FINAL}/c/0/2/" in path for _, path in cloud.proxy.seen) <= 2


# ---- the local tier


def copies(tier: Tier) -> list[Path]:
    return sorted(path for path in tier.folder.iterdir() if not path.name.startswith("."))


def test_a_second_pass_asks_the_bucket_for_nothing(cloud: Cloud, stored: str, tmp_path: Path) -> None:
    tier = Tier(tmp_path / "near", 10**7)
    stream(CacheReader(stored, tier=tier))
    asked = shard_requests(cloud)
    assert asked > 0
    rows = np.random.default_rng(0).permutation(70)
    stream(CacheReader(stored, tier=Tier(tier.folder, tier.most_bytes)), rows)
    assert shard_requests(cloud) == asked
    assert len(copies(tier)) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "empty"])
def test_a_damaged_copy_is_fetched_again_and_never_believed(
    cloud: Cloud, stored: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier = Tier(tmp_path / "near", 10**7)
    stream(CacheReader(stored, tier=tier))
    first, second = copies(tier)[:2]
    sound, data = first.read_bytes(), bytearray(first.read_bytes())
    data[5] ^= 1
    first.write_bytes({"flip": bytes(data), "cut": sound[:-1], "other": second.read_bytes(), "empty": b""}[damage])
    stream(CacheReader(stored, tier=tier))
    stream(CacheReader(stored, tier=tier))
    assert first.read_bytes() == sound
    if damage == "flip":
        assert "a damaged copy is dropped" in caplog.text


def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(cloud: Cloud, stored: str, tmp_path: Path) -> None:
    with CacheReader(stored) as reader:
        sizes = [commit.bytes for _, commit in sorted(reader.committed(FINAL).items())]
    tier = Tier(tmp_path / "near", sum(sizes[:2]) + 10)
    reader = CacheReader(stored, tier=tier)
    rows = {number: np.arange(*reader.specs[FINAL].shard_span(number)) for number in range(5)}
    for number in (0, 1):
        reader.read_rows(FINAL, 0, rows[number])
    assert len(copies(tier)) == 2
    CacheReader(stored, tier=tier).read_rows(FINAL, 0, rows[0])  # used again: 1 is now the oldest
    reader.read_rows(FINAL, 0, rows[2])
    assert len(copies(tier)) == 2
    cloud.proxy.seen.clear()
    CacheReader(stored, tier=tier).read_rows(FINAL, 0, rows[0])
    assert shard_requests(cloud) == 0
    stream(CacheReader(stored, tier=tier))
    assert sum(path.stat().st_size for path in copies(tier)) <= tier.most_bytes
    small = Tier(tmp_path / "small", 10)
    stream(CacheReader(stored, tier=small))
    assert copies(small) == []


READER = """
import json, sys; sys.path[:0] = sys.argv[3:]
import numpy as np
from cache_samples import FINAL, rows_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.tier import Tier
reader = CacheReader(sys.argv[1], tier=Tier(sys.argv[2], 9000))
same = []
for round in range(4):
    rows = np.random.default_rng().permutation(70)
    got = CacheReader(sys.argv[1], tier=Tier(sys.argv[2], 9000)).read_rows(FINAL, 0, rows)
    same.append(bool((got == rows_of(reader.specs[FINAL], 0, 0, 70)[rows]).all()))
print(json.dumps(same))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cloud")
def test_processes_share_a_tier_that_is_too_small_for_them(stored: str, tmp_path: Path) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", READER, stored, str(tmp_path / "near"), helpers]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        out, err = reader.communicate(timeout=200)
        assert (reader.returncode, json.loads(out or "[]")) == (0, [True] * 4), err
    left = [path for path in (tmp_path / "near").iterdir() if path.name != ".lock"]
    assert sum(path.stat().st_size for path in left) <= 9000
    assert not [path for path in left if path.name.endswith(".part")]


def test_a_copy_that_was_never_finished_is_begun_again(stored: str, cloud: Cloud, tmp_path: Path) -> None:
    tier = Tier(tmp_path / "near", 10**7)
    stream(CacheReader(stored, tier=tier))
    name = copies(tier)[0]
    name.rename(name.with_name(f"{name.name}.part"))  # as a killed process leaves it
    stream(CacheReader(stored, tier=tier))
    assert name.exists()
    assert not name.with_name(f"{name.name}.part").exists()


def test_a_tier_that_cannot_be_written_costs_the_copies_only(
    stored: str, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    tier = Tier(tmp_path / "near", 10**7)
    stream(CacheReader(stored, tier=tier))
    assert copies(tier) == []
    assert caplog.text.count("nothing is kept: No space left on device") == 1


def test_arrays_of_a_bucket_are_those_of_its_manifest(stored: str, cloud: Cloud) -> None:
    """Another Zarr reader finds them where the layout says."""
    store = brisk(stored)
    for name, spec in array_specs(CacheReader(stored).manifest).items():
        found = json.loads(store.read(f"{name}/zarr.json"))
        assert found["shape"] == list(spec.shape)
