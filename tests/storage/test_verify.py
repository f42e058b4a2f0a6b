"""The verifier on sound and on unfinished caches; what it must find is in test_damage.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cache_files import small_manifest, write_cache

from feedfast.storage.layout import array_specs
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "c.zarr"
    write_cache(path, small_manifest())
    return path


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())


def test_a_sound_cache_has_no_problems(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_cache(cache) == []
    assert verify_cache(cache, full=True, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (stored_bytes(cache), stored_bytes(cache))
    assert seen == sorted(seen)


def test_a_reader_and_the_verifier_agree_on_what_is_missing(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.zarr"
    shutil.copytree(cache, path)
    log = path / "commits/part-0-of-1.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    # scales stay: without one, all codes that name it are missing, too
    lost = [line for line in lines if "/scale" not in line][::3]
    log.write_text("".join(line for line in lines if line not in lost))
    specs = array_specs(small_manifest())
    missing = {(array, specs[array].key(view, shard)) for array, view, shard in CacheReader(path).missing()}
    problems = verify_cache(path, full=True)
    assert len(missing) == len(lost) > 20
    assert {(entry["array"], entry["shard"]) for entry in problems} == missing
    assert {entry["kind"] for entry in problems} == {"incomplete"}


def test_files_without_a_commit_line_are_no_part_of_the_cache(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.zarr"
    shutil.copytree(cache, path)
    (path / "commits/.tmp-part-0-of-1-123-0").write_bytes(b"half a shard")
    (path / "targets/a/raw/codes/c/0/17").mkdir()
    (path / "targets/a/raw/codes/c/0/17/0").write_bytes(b"stray")
    assert verify_cache(path, full=True) == []


def test_all_problems_are_found_not_the_first(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.zarr"
    shutil.copytree(cache, path)
    raw, dense = path / "targets/a/raw/codes", path / "targets/a/dense/codes"
    (raw / "c/0/1/0/0/0").unlink()
    (raw / "c/1/3/0/0/0").write_bytes(b"")
    for file, places in ((dense / "c/0/0/0/0/0", (40, 2000)), (dense / "c/1/4/0/0/0", (7,))):
        content = bytearray(file.read_bytes())
        for place in places:
            content[place] ^= 16
        file.write_bytes(content)
    quick = {(entry["array"], entry["shard"], entry["kind"]) for entry in verify_cache(path)}
    assert quick == {
        ("targets/a/raw/codes", "c/0/1/0/0/0", "missing"),
        ("targets/a/raw/codes", "c/1/3/0/0/0", "length"),
    }
    full = verify_cache(path, full=True)
    assert {(entry["array"], entry["shard"], entry["kind"]) for entry in full} == quick | {
        ("targets/a/dense/codes", "c/0/0/0/0/0", "checksum"),
        ("targets/a/dense/codes", "c/1/4/0/0/0", "checksum"),
    }
    assert sum(entry["shard"] == "c/0/0/0/0/0" for entry in full) == 2  # two blocks of that shard, each by itself
