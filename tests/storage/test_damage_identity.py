"""A commit log or manifest that is torn, edited, of another cache or hostile: refused by name, before any reading."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from cache_files import small_manifest, write_cache

from feedfast.errors import CacheDamageError, RequestError
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache

RAW, ZSTD = "targets/a/raw/codes", "targets/a/dense/codes"
LOG = "commits/part-0-of-1.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "whole.zarr"
    write_cache(path, small_manifest())
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(whole, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


# ---- the log


def test_a_torn_last_line_leaves_its_shard_uncommitted(cache: Path) -> None:
    path = cache
    log = path / LOG
    content = log.read_bytes()
    last = json.loads(content.splitlines()[-1])
    log.write_bytes(content[:-20])
    reader = CacheReader(path)
    assert reader.missing() == [(last["array"], last["view"], 9)]
    with pytest.raises(CacheDamageError, match=r"incomplete.*run feedfast cache"):
        reader.stream([last["array"]], last["view"])
    kinds = {(entry["array"], entry["kind"]) for entry in verify_cache(path)}
    assert kinds == {("", "log-torn"), (last["array"], "incomplete")}


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("bytes", 17, "length"),
        ("rows", [0, 64], "log-damaged"),
        ("shard", "c/0/9/0/0/0", "log-damaged"),
        ("shard", "../../../etc/passwd", "log-damaged"),
        ("shard", "c/0/-1/0/0/0", "log-damaged"),
        ("array", "../elsewhere", "log-damaged"),
        ("view", 7, "log-damaged"),
        ("manifest", "0" * 64, "manifest-digest"),
        ("bytes", "many", "log-damaged"),
    ],
)
def test_an_edited_log_line(cache: Path, field: str, value: object, kind: str) -> None:
    path = cache
    lines = (path / LOG).read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if f'"{RAW}","shard":"c/0/1/' in line)
    lines[number] = json.dumps({**json.loads(lines[number]), field: value})
    (path / LOG).write_text("\n".join(lines) + "\n")
    with pytest.raises(CacheDamageError) as caught:
        list(CacheReader(path).stream([RAW], 0))
    assert caught.value.problems[0]["kind"] == kind
    assert kind in {entry["kind"] for entry in verify_cache(path)}


@pytest.mark.parametrize("field", ["crc32c", "sha256"])
def test_an_edited_checksum_in_the_log(cache: Path, field: str) -> None:
    path = cache
    lines = (path / LOG).read_text().splitlines()
    entry = json.loads(lines[3])
    entry[field] = "0" * len(entry[field])
    lines[3] = json.dumps(entry)
    (path / LOG).write_text("\n".join(lines) + "\n")
    found = verify_cache(path, full=True)
    assert [(problem["array"], problem["shard"], problem["kind"]) for problem in found] == [
        (entry["array"], entry["shard"], "checksum")
    ]
    assert field in found[0]["detail"]


def test_two_logs_that_disagree(cache: Path) -> None:
    path = cache
    first = json.loads((path / LOG).read_text().splitlines()[0])
    (path / "commits/part-1-of-2.jsonl").write_text(json.dumps({**first, "crc32c": "12345678"}) + "\n")
    assert {entry["kind"] for entry in verify_cache(path)} == {"log-duplicate"}
    with pytest.raises(CacheDamageError, match="log-duplicate"):
        CacheReader(path)


def test_no_log_at_all(cache: Path) -> None:
    path = cache
    (path / LOG).unlink()
    reader = CacheReader(path)
    assert len(reader.missing()) == len({(entry["array"], entry["shard"]) for entry in verify_cache(path)})
    with pytest.raises(CacheDamageError, match="incomplete"):
        reader.stream([RAW], 0)


# ---- the manifest


def put_manifest(path: Path, attributes: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] = attributes
    (path / "zarr.json").write_text(json.dumps(root))


@pytest.mark.parametrize("other", [{"seed": 1}, {"weights": "1" * 64}])
def test_a_manifest_from_another_recipe_or_other_weights(cache: Path, other: dict[str, object]) -> None:
    path = cache
    put_manifest(path, small_manifest(**other).to_attrs())  # type: ignore[arg-type]
    with pytest.raises(CacheDamageError, match="manifest-digest"):
        CacheReader(path)
    found = {entry["array"] for entry in verify_cache(path) if entry["kind"] == "manifest-digest"}
    assert RAW in found
    assert ("samples/label" in found) is False  # labels depend on the data alone


def test_array_metadata_that_contradicts_the_manifest(cache: Path) -> None:
    path = cache
    file = path / RAW / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"][1] += 64
    file.write_text(json.dumps(metadata))
    (path / ZSTD / "zarr.json").write_text("{")
    found = verify_cache(path)
    assert {(entry["array"], entry["kind"]) for entry in found} == {(RAW, "metadata"), (ZSTD, "metadata")}


HUGE = 1 << 60


def change(manifest: dict, where: str, value: object) -> None:
    *parents, last = where.split(".")
    for key in parents:
        manifest = manifest[key]
    manifest[last] = value


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("num_rows", HUGE),
        ("num_rows", -1),
        ("views", HUGE),
        ("dataset.count", HUGE),
        ("plan.granule", HUGE),
        ("shard_bytes", HUGE),
        ("plan.size", HUGE),
        ("teachers.a.taps.logits.shape", [HUGE]),
        ("teachers.a.taps.raw.shape", [HUGE, 1, 1]),
        ("teachers.a.taps.raw.shape", [1 << 16, 1 << 15, 1 << 15]),
        ("teachers.a.taps.raw.shape", [2, 1 << 14, 1 << 14]),  # 512 MiB per row
        ("teachers.a.taps.raw.shape", [-8, 4, 4]),
        ("teachers.a.taps.raw.shape", [1] * 1000),
        ("teachers.a.taps.raw.name", "../../outside"),
        ("teachers.a.taps.raw.name", ".."),
        ("teachers.a.name", "/etc"),
        ("teachers.a.taps.raw.codec", "pickle"),
        ("teachers.a.taps.raw.compression", "blosc"),
        ("format", "2"),
        ("surprise", 1),
    ],
)
def test_a_hostile_manifest_is_refused_before_anything_is_allocated(cache: Path, where: str, value: object) -> None:
    path = cache
    attributes = small_manifest().to_attrs()
    change(attributes["feedfast"], where, value)
    put_manifest(path, attributes)
    tracemalloc.start()
    with pytest.raises(CacheDamageError) as caught:
        CacheReader(path)
    assert [entry["kind"] for entry in verify_cache(path, full=True)] == ["manifest"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.problems[0]["kind"] == "manifest"
    assert peak < 20 << 20  # 20 MiB


@pytest.mark.parametrize("name", ["../outside", "..", "a/b", "a\\b", "", ".hidden", "a\n", "x" * 100])
def test_names_that_are_no_plain_names(cache: Path, name: str) -> None:
    path = cache
    attributes = small_manifest().to_attrs()
    taps = attributes["feedfast"]["teachers"]["a"]["taps"]
    taps[name] = {**taps.pop("raw"), "name": name}
    put_manifest(path, attributes)
    with pytest.raises(CacheDamageError, match="manifest"):
        CacheReader(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"attributes": 3}', b"[" * 100_000, b"\xff\xfe"])
def test_a_root_that_is_no_manifest(cache: Path, content: bytes) -> None:
    path = cache
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(CacheDamageError):
        CacheReader(path)
    assert [entry["kind"] for entry in verify_cache(path)] == ["manifest"]


def test_a_huge_manifest_file_is_not_read(cache: Path) -> None:
    path = cache
    os.truncate(path / "zarr.json", 1 << 40)
    with pytest.raises(CacheDamageError):
        CacheReader(path)


def test_verify_without_a_cache(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        verify_cache(tmp_path)
