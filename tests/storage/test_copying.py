"""Copying caches: to a bucket, back, and between folders; checked on the way, and continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from buckets import SLOW_DOWN, Cloud, Fault
from cache_samples import FINAL, fill_cache, make_manifest, make_tap, make_teacher, memory_path, objects, tiny

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, PartTakenError, RequestError
from feedfast.storage.bucket import Bucket
from feedfast.storage.copying import copy_cache
from feedfast.storage.disk import Disk
from feedfast.storage.objects import Objects, Patience
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache

tmp_path = memory_path
BRISK = Patience(tries=4, first_s=0.01, longest_s=0.05, connect_s=2.0, answer_s=2.0)


def bucket(place: str) -> Bucket:
    return Bucket(place, objects=Objects(place, patience=BRISK), lease_s=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    fill_cache(path, tiny(), part=(0, 2))
    return path, fill_cache(path, tiny(), part=(1, 2))


def test_from_folder_to_folder(made: tuple[Path, str], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = copy_cache(Disk(made[0]), Disk(tmp_path / "d"), lambda *step: steps.append(step))
    assert found.digest == made[1]
    assert found.copied == found.objects == len(objects(made[0]))
    assert found.copied_bytes == found.total_bytes == sum(map(len, objects(made[0]).values()))
    assert steps[-1] == (found.total_bytes,) * 2
    assert steps == sorted(steps)
    assert objects(tmp_path / "d") == objects(made[0])
    assert verify_cache(tmp_path / "d", full=True) == []
    again = copy_cache(Disk(made[0]), Disk(tmp_path / "d"))
    assert (again.copied, again.copied_bytes, again.digest) == (0, 0, made[1])


def test_to_a_bucket_and_back(made: tuple[Path, str], cloud: Cloud, tmp_path: Path) -> None:
    place = cloud.url()
    assert copy_cache(Disk(made[0]), bucket(place)).digest == made[1]
    assert verify_cache(place, full=True) == []
    assert copy_cache(bucket(place), Disk(tmp_path / "back")).digest == made[1]
    assert objects(tmp_path / "back") == objects(made[0])
    assert verify_cache(tmp_path / "back", full=True) == []
    assert copy_cache(bucket(place), bucket(cloud.url())).digest == made[1]


def test_half_a_copy_is_no_cache_and_is_finished(made: tuple[Path, str], cloud: Cloud, tmp_path: Path) -> None:
    for target in (Disk(tmp_path / "d"), bucket(cloud.url())):
        source = Half(made[0], fails_at=9)
        with pytest.raises(FeedfastError, match="pulled the plug"):
            copy_cache(source, target)
        with pytest.raises(RequestError, match=r"expected a feedfast cache, found no zarr.json"):
            CacheReader(target)
        found = copy_cache(Disk(made[0]), target)
        assert 0 < found.copied < found.objects
        assert found.digest == made[1]
        assert verify_cache(target, full=True) == []


class Half(Disk):
    """A folder that is pulled out after some objects."""

    def __init__(self, place: Path, fails_at: int) -> None:
        super().__init__(place)
        self._left = fails_at

    def open(self, key: str, **options: int | None):  # type: ignore[no-untyped-def, override]
        self._left -= "/c/" in key
        if self._left < 0:
            raise FeedfastError("somebody pulled the plug")
        return super().open(key, **options)  # type: ignore[arg-type]


def test_what_is_damaged_in_the_copy_is_copied_again(made: tuple[Path, str], tmp_path: Path) -> None:
    copy_cache(Disk(made[0]), Disk(tmp_path / "d"))
    (tmp_path / "d" / FINAL / "c/0/1/0/0/0").unlink()
    (tmp_path / "d" / FINAL / "c/0/2/0/0/0").write_bytes(b"short")
    assert copy_cache(Disk(made[0]), Disk(tmp_path / "d")).copied == 2
    assert verify_cache(tmp_path / "d", full=True) == []


@pytest.mark.parametrize("kind", ["changed", "missing", "short"])
def test_a_damaged_source_is_named_and_not_copied(made: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    shutil.copytree(made[0], tmp_path / "s")
    file = tmp_path / "s" / FINAL / "c/0/3/0/0/0"
    data = bytearray(file.read_bytes())
    data[7] ^= 4
    file.unlink()
    if kind != "missing":
        file.write_bytes(data if kind == "changed" else data[:-1])
    with pytest.raises(CacheDamageError, match="c/0/3/0/0/0"):
        copy_cache(Disk(tmp_path / "s"), Disk(tmp_path / "d"))
    assert not (tmp_path / "d/zarr.json").exists()
    assert not (tmp_path / "d" / FINAL / "c/0/3/0/0/0").exists()


def test_faults_on_the_way_are_tried_again(made: tuple[Path, str], cloud: Cloud, tmp_path: Path) -> None:
    place, failed = cloud.url(), set()

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault | None:
        if "/c/" in path and (method, path) not in failed:
            failed.add((method, path))
            kinds = (Fault(503, SLOW_DOWN), Fault(reset=True), Fault(keep=3), Fault(flip=2))
            return kinds[len(failed) % 4]
        return None

    cloud.proxy.rule = rule
    assert copy_cache(Disk(made[0]), bucket(place)).digest == made[1]
    failed.clear()
    assert copy_cache(bucket(place), Disk(tmp_path / "d")).digest == made[1]
    assert objects(tmp_path / "d") == objects(made[0])


def test_an_extended_cache_is_copied_over_what_it_was(tmp_path: Path) -> None:
    fill_cache(tmp_path / "s", tiny())
    copy_cache(Disk(tmp_path / "s"), Disk(tmp_path / "d"))
    digest = fill_cache(tmp_path / "s", tiny(views=2))
    found = copy_cache(Disk(tmp_path / "s"), Disk(tmp_path / "d"))
    assert found.digest == digest
    assert 0 < found.copied < found.objects
    assert verify_cache(tmp_path / "d", full=True) == []


def test_places_that_are_no_target(made: tuple[Path, str], tmp_path: Path) -> None:
    other = make_manifest(make_teacher("z", make_tap("final")), rows=70, views=1, shard_bytes=500)
    fill_cache(tmp_path / "other", other)
    with pytest.raises(CacheMismatchError, match="found another"):
        copy_cache(Disk(made[0]), Disk(tmp_path / "other"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(RequestError, match=r"thesis\.tex"):
        copy_cache(Disk(made[0]), Disk(tmp_path / "mine"))
    with pytest.raises(RequestError, match="twice"):
        copy_cache(Disk(made[0]), Disk(made[0]))
    with pytest.raises(RequestError, match="expected a feedfast cache"):
        copy_cache(Disk(tmp_path / "nothing"), Disk(tmp_path / "d"))
    target = Disk(tmp_path / "busy")
    target.make()
    log = target.open_log("commits/part-0-of-1.jsonl", lambda lines: sum(map(len, lines)))
    assert log is not None
    with log, pytest.raises(PartTakenError, match="another process at work"):
        copy_cache(Disk(made[0]), target)
