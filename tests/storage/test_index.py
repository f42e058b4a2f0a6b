"""The index of a cache's logs says what the lines say, whatever has happened to either since."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import FINAL, append_missing, expected, fill_cache, small_values, standard, tiny

from feedfast.errors import CacheDamageError
from feedfast.sealed import pack, unpack
from feedfast.storage import index as index_module
from feedfast.storage import log as log_module
from feedfast.storage.disk import Disk
from feedfast.storage.index import INDEX, Commits, read_index
from feedfast.storage.layout import array_specs
from feedfast.storage.log import Commit, cache_digest, keep_index, read_log
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache
from feedfast.storage.writer import CacheWriter, open_for_writing


@pytest.fixture(autouse=True)
def _every_cache_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MIN_LINES", 1)


def filled(path: Path, manifest: Any, parts: int = 1) -> Path:
    """A complete cache with an index."""
    for part in range(parts):
        fill_cache(path, manifest, part=(part, parts))
    if parts > 1:
        fill_cache(path, manifest)
    assert keep_index(path, array_specs(manifest))
    return path


def both(path: Path) -> tuple[dict[Any, Commit], dict[Any, Commit]]:
    """All commits, with the help of an index and without."""
    return dict(read_log(path).commits.items()), dict(read_log(path, indexed=False).commits.items())


def refuse_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a line was read")

    monkeypatch.setattr(Commit, "from_line", refuse)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_indexed_cache_is_the_same_cache(tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = standard()
    path = filled(tmp_path / "c", manifest, parts)
    plain, digest = read_log(path, indexed=False), cache_digest(path)
    monkeypatch.setattr(log_module, "read_index", lambda _: None)
    assert cache_digest(path) == digest, "of the lines"
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "MIN_LINES", 1)
    assert verify_cache(path, full=True) == []
    refuse_lines(monkeypatch)
    assert dict(read_log(path).commits.items()) == dict(plain.commits.items())
    assert cache_digest(path) == digest
    for reader in (CacheReader(path), pickle.loads(pickle.dumps(CacheReader(path)))):
        assert reader.complete
        assert reader.missing() == []
        assert reader.log.commits.total_bytes == sum(commit.bytes for commit in plain.commits.values())
        assert len(reader.log.commits) == len(plain.commits) == len(list(reader.log.commits))
        for spec, values in expected(manifest):
            found = reader.committed(spec.name, spec.num_views - 1)
            assert sorted(found) == list(range(spec.num_shards)) == sorted(dict(found.items()))
            of_array = sorted(reader.log.of(spec.name), key=lambda commit: (commit.view, commit.rows))
            assert of_array == sorted(plain.of(spec.name), key=lambda commit: (commit.view, commit.rows))
            if spec.sharded:
                read = reader.read_rows(spec.name, 1, np.arange(spec.rows))
                np.testing.assert_array_equal(read, values[1, : spec.rows])
    with pytest.raises(KeyError):
        reader.log.commits[FINAL, "c/0/0"]
    for wrong in ("c/0/00/0/0/0", "c/9/0/0/0/0", "c/0/999/0/0/0", "c/-1/0/0/0/0", "c/0/0/0/0/1", "x/0/0/0/0/0", ""):
        assert (FINAL, wrong) not in reader.log.commits


def test_views_that_came_later_are_read_from_their_lines(tmp_path: Path) -> None:
    path = filled(tmp_path / "c", tiny(views=2))
    fill_cache(path, tiny(views=3))
    ours, lines = both(path)
    assert ours == lines
    log = read_log(path)
    assert {commit.view for commit in log.commits.lines.values()} == {2}, "and nothing else is"
    reader = CacheReader(path)
    assert reader.complete
    assert {commit.view for commit in reader.log.commits.lines.values()} == {2}
    assert verify_cache(path) == []
    assert keep_index(path, array_specs(tiny(views=3)))
    assert read_log(path).commits.lines == {}
    assert both(path)[0] == lines


def test_objects_written_again_count(tmp_path: Path) -> None:
    manifest = tiny(views=2)
    path = filled(tmp_path / "c", manifest)
    key = array_specs(manifest)[FINAL].key(1, 2)
    (path / FINAL / key).unlink()
    fill_cache(path, manifest)
    ours, lines = both(path)
    assert ours == lines
    assert ours[FINAL, key].attempt == 1
    reader = CacheReader(path)
    assert reader.committed(FINAL, 1)[2].attempt == 1
    assert len(reader.committed(FINAL, 1)) == array_specs(manifest)[FINAL].num_shards
    assert reader.complete
    assert reader.log.commits.total_bytes == sum(commit.bytes for commit in lines.values())
    assert verify_cache(path, full=True) == []


def test_codes_of_another_scale_are_absent(tmp_path: Path) -> None:
    manifest = tiny()
    path = filled(tmp_path / "c", manifest)
    name = "targets/a/final/scale"
    for file in (path / name).rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.unlink()
    with CacheWriter(path, open_for_writing(path, manifest)) as writer:
        writer.put(name, small_values(writer.specs[name]) + 1)
        assert len(writer.missing(FINAL)) == writer.specs[FINAL].num_shards
    ours, lines = both(path)
    assert ours == lines
    assert read_log(path).stale == read_log(path, indexed=False).stale != {}
    assert not any(array == FINAL for array, _ in ours)
    with CacheWriter(path, manifest) as writer:
        append_missing(writer)
    ours, lines = both(path)
    assert ours == lines
    assert verify_cache(path, full=True) == []


def damages(path: Path) -> dict[str, Any]:
    index = path / INDEX
    (log,) = (path / "commits").glob("*.jsonl")

    def cut_first_line() -> None:
        log.write_bytes(log.read_bytes().partition(b"\n")[2])

    def move_first_line() -> None:  # as long as before, or longer
        first, _, rest = log.read_bytes().partition(b"\n")
        log.write_bytes(rest + first + b"\n" + first + b"\n")

    def flip(at: int) -> None:
        content = bytearray(index.read_bytes())
        content[at] ^= 1
        index.write_bytes(bytes(content))

    return {
        "empty": lambda: index.write_bytes(b""),
        "cut": lambda: index.write_bytes(index.read_bytes()[:-10]),
        "another file": lambda: index.write_bytes(b"<html>" * 100),
        "a flipped bit in its head": lambda: flip(100),
        "a flipped bit in a column": lambda: flip(-40),
        "gone": index.unlink,
        "a line removed from the log": cut_first_line,
        "a line moved": move_first_line,
        "another log's name": lambda: log.rename(log.with_name("part-0-of-7.jsonl")),
        "an empty log": lambda: log.write_bytes(b""),
    }


@pytest.mark.parametrize(
    "which",
    ["empty", "cut", "another file", "a flipped bit in its head", "a flipped bit in a column", "gone",
     "a line removed from the log", "a line moved", "another log's name", "an empty log"],
)  # fmt: skip
def test_an_index_in_doubt_is_passed_over(tmp_path: Path, which: str) -> None:
    path = filled(tmp_path / "c", tiny())
    damages(path)[which]()
    assert read_index(Disk(path)) is None
    ours, lines = both(path)
    assert ours == lines


@pytest.mark.parametrize(
    "forged",
    [{"array": 5}, {"manifest": None}, {"fit": ["a"]}, {"dimensions": 10**9}],
    ids=["a number as name", "no manifest", "a list as fit", "keys of a gigabyte"],
)
def test_an_index_of_other_things_is_passed_over(tmp_path: Path, forged: dict[str, Any]) -> None:
    """With sound checksums: somebody has made it."""
    path = filled(tmp_path / "c", tiny())
    head, arrays = unpack("feedfast-log-index", 1, np.frombuffer((path / INDEX).read_bytes(), np.uint8))
    said = head["arrays"][0]
    if "dimensions" in forged:
        said["layout"][1] = forged["dimensions"]
    else:
        said |= forged
    (path / INDEX).write_bytes(b"".join(pack("feedfast-log-index", 1, head, arrays)))
    assert read_index(Disk(path)) is None
    ours, lines = both(path)
    assert ours == lines
    assert verify_cache(path) == []


def test_an_index_that_lies_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sound checksums: somebody has made it."""
    manifest = tiny()
    path = filled(tmp_path / "c", manifest)
    found = read_index(Disk(path))
    assert found is not None
    sums = found.arrays[FINAL].sums.copy()
    sums[1] ^= 1
    forged = {**found.arrays, FINAL: index_module.ArrayIndex(**{**vars(found.arrays[FINAL]), "sums": sums})}
    monkeypatch.setattr(index_module, "_indexed", lambda spec, _: forged[spec.name])
    assert index_module.write_index(Disk(path), read_log(path).commits, array_specs(manifest), dict(found.covered))
    (entry,) = verify_cache(path)
    assert (entry["array"], entry["kind"]) == (FINAL, "log-damaged")
    assert "remove commits/index" in entry["detail"]
    rows = array_specs(manifest)[FINAL].shard_rows
    with pytest.raises(CacheDamageError):
        CacheReader(path).read_rows(FINAL, 0, [rows])


def test_an_index_of_another_manifest_is_compared_with_this_one(tmp_path: Path) -> None:
    path = filled(tmp_path / "c", tiny())
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(CacheDamageError, match="manifest-digest"):
        CacheReader(path)
    assert {entry["kind"] for entry in verify_cache(path)} >= {"manifest-digest"}


def test_only_a_complete_cache_of_many_lines_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny()
    fill_cache(tmp_path / "half", manifest, part=(0, 2))
    assert not keep_index(tmp_path / "half", array_specs(manifest))
    fill_cache(tmp_path / "whole", manifest)
    monkeypatch.setattr(index_module, "MIN_LINES", 4096)
    assert not keep_index(tmp_path / "whole", array_specs(manifest))
    assert not (tmp_path / "half" / INDEX).exists()
    assert not (tmp_path / "whole" / INDEX).exists()


def test_commits_are_a_mapping(tmp_path: Path) -> None:
    path = filled(tmp_path / "c", tiny())
    commits = read_log(path).commits
    lines = dict(read_log(path, indexed=False).commits.items())
    assert isinstance(commits, Commits)
    assert commits == lines
    key = next(iter(commits))
    removed = commits.pop(key)
    assert removed == lines.pop(key)
    assert key not in commits
    assert commits == lines
    assert len(commits) == len(lines)
    commits[key] = removed
    assert len(commits) == len(lines) + 1
    with pytest.raises(KeyError):
        del commits["targets/x/y/codes", "c/0/0/0"]
