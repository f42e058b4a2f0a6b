"""Every way a shard can be wrong must end in an error that names it, whichever way it is read."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_files import Values, small_manifest, write_cache, write_log

from feedfast.errors import CacheDamageError
from feedfast.storage.layout import array_specs
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache

Cache = tuple[Path, Values]
Read = Callable[[CacheReader, str, int, np.ndarray], np.ndarray]

RAW, ZSTD = "targets/a/raw/codes", "targets/a/dense/codes"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("damage") / "whole.zarr"
    return path, write_cache(path, small_manifest())


@pytest.fixture
def cache(whole: Cache, tmp_path: Path) -> Cache:
    """A copy to be damaged."""
    shutil.copytree(whole[0], tmp_path / "c.zarr")
    return tmp_path / "c.zarr", whole[1]


def by_stream(reader: CacheReader, array: str, view: int, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([batch[array] for batch in reader.stream([array], view, rows, 32)])


def by_mixed_stream(reader: CacheReader, array: str, view: int, rows: np.ndarray) -> np.ndarray:
    order = np.random.default_rng(0).permutation(len(rows))
    found = np.concatenate([batch[array] for batch in reader.stream([array], view, rows[order], 32)])
    return found[np.argsort(order)]


def by_partial_stream(reader: CacheReader, array: str, view: int, rows: np.ndarray) -> np.ndarray:
    """Never whole blocks: each is decoded aside, and only the wanted rows of it are kept."""
    halves = [by_mixed_stream(reader, array, view, rows[start::2]) for start in (0, 1)]
    found = np.empty((len(rows), *halves[0].shape[1:]), halves[0].dtype)
    found[::2], found[1::2] = halves
    return found


def by_rows(reader: CacheReader, array: str, view: int, rows: np.ndarray) -> np.ndarray:
    return reader.read_rows(array, view, rows)


PATHS: list[Read] = [by_stream, by_mixed_stream, by_partial_stream, by_rows]


def attempt(
    read: Read, path: Path, array: str, view: int, rows: np.ndarray
) -> tuple[np.ndarray, None] | tuple[None, CacheDamageError]:
    try:
        return read(CacheReader(path), array, view, rows), None
    except CacheDamageError as error:
        return None, error


def flips(size: int, index_bytes: int) -> Iterator[tuple[int, int]]:
    """(byte, bit): 40 anywhere, 20 in the index and its checksum, every bit of the first block's first seven bytes."""
    rng = np.random.default_rng(size)
    yield from (
        (int(byte), int(bit)) for byte, bit in zip(rng.integers(0, size, 40), rng.integers(0, 8, 40), strict=True)
    )
    yield from ((size - 1 - int(byte), int(byte) % 8) for byte in rng.integers(0, index_bytes, 16))
    yield from ((size - back, 3) for back in (1, 2, 3, 4))
    yield from ((byte, bit) for byte in range(7) for bit in range(8))


@pytest.mark.parametrize(
    "array",
    [
        RAW,
        ZSTD,
        "targets/a/packed/codes",
        "targets/a/parts/codes",
        "targets/a/half/codes",
        "targets/a/exact/codes",
        "pixels/codes",
    ],
)
def test_no_flipped_bit_reads_silently_wrong(cache: Cache, array: str) -> None:
    path, values = cache
    spec = array_specs(small_manifest())[array]
    view, shard = 1, 1
    rows = np.arange(*spec.shard_span(shard))
    file = path / array / spec.key(view, shard)
    sound = bytearray(file.read_bytes())
    index_bytes = 16 * spec.blocks_per_shard + 4
    positions = list(flips(len(sound), index_bytes))
    assert len(positions) >= 60
    if array not in (RAW, ZSTD):  # the same code with other types: a sample will do
        positions = positions[::4]
    harmless = 0
    for byte, bit in positions:
        damaged = bytearray(sound)
        damaged[byte] ^= 1 << bit
        file.write_bytes(damaged)
        raised = []
        for read in PATHS:
            found, error = attempt(read, path, array, view, rows)
            raised.append(error is not None)
            if error is None:
                np.testing.assert_array_equal(found, values[array][view][rows], err_msg=f"byte {byte} bit {bit}")
                continue
            assert error.problems[0]["array"] == array
            assert error.problems[0]["shard"] == spec.key(view, shard)
            assert error.problems[0]["kind"] in ("index", "checksum")
            assert str(file) in str(error)
        assert len(set(raised)) == 1, f"byte {byte} bit {bit}: the paths disagree: {raised}"
        harmless += not raised[0]
    file.write_bytes(sound)
    # zstd's header has one bit that decoders ignore; the values are right, and full verification sees it
    assert harmless == 0 if spec.compression == "none" else harmless <= 1


@pytest.mark.parametrize(
    "array", [RAW, ZSTD, "targets/a/half/codes", "samples/label", "views/order", "targets/a/dense/scale"]
)
def test_full_verification_finds_every_flipped_bit(cache: Cache, array: str) -> None:
    path, _ = cache
    spec = array_specs(small_manifest())[array]
    file = path / array / spec.key(0, 0)
    sound = bytearray(file.read_bytes())
    index_bytes = 16 * spec.blocks_per_shard + 4 if spec.sharded else 4
    for byte, bit in list(flips(len(sound), index_bytes))[:: 1 if array in (RAW, ZSTD) else 6]:
        damaged = bytearray(sound)
        damaged[byte] ^= 1 << bit
        file.write_bytes(damaged)
        found = verify_cache(path, full=True)
        assert found, f"byte {byte} bit {bit}"
        assert {(entry["array"], entry["shard"]) for entry in found} == {(array, spec.key(0, 0))}
        assert {entry["kind"] for entry in found} <= {"index", "checksum", "fill"}
        if not spec.sharded:
            with pytest.raises(CacheDamageError, match="crc32c"):
                CacheReader(path).read_array(array)
    file.write_bytes(sound)
    assert verify_cache(path, full=True) == []


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_one_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def extend(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {remove: "missing", truncate: "length", cut_one_byte: "length", empty: "length", extend: "length"}


@pytest.mark.parametrize(("damage", "kind"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("array", [RAW, ZSTD])
def test_a_shard_that_is_not_what_was_committed(
    cache: Cache, array: str, damage: Callable[[Path], None], kind: str
) -> None:
    path, values = cache
    file = path / array / "c/0/2/0/0/0"
    damage(file)
    for read in PATHS:
        with pytest.raises(CacheDamageError) as caught:
            read(CacheReader(path), array, 0, np.arange(300))
        assert caught.value.problems[0]["kind"] == kind
        assert caught.value.problems[0]["array"] == array
        assert caught.value.problems[0]["shard"] == "c/0/2/0/0/0"
        assert "c/0/2/0/0/0" in str(caught.value)
    reader = CacheReader(path)
    with pytest.raises(CacheDamageError, match="c/0/2"):
        reader.stream([array], 0)  # before the first batch, not in the middle of the pass
    with pytest.raises(CacheDamageError, match="c/0/2"):
        reader.require([array], [0])
    # what does not need the shard is still readable
    np.testing.assert_array_equal(by_stream(reader, array, 1, np.arange(300)), values[array][1])
    np.testing.assert_array_equal(by_stream(reader, array, 0, np.arange(128)), values[array][0][:128])
    for full in (False, True):
        found = verify_cache(path, full=full)
        assert [(entry["array"], entry["shard"], entry["kind"]) for entry in found] == [(array, "c/0/2/0/0/0", kind)]


def test_a_shard_that_vanishes_or_shrinks_during_a_pass(cache: Cache) -> None:
    path, _ = cache
    stream = CacheReader(path).stream([RAW], 0, None, 16, prefetch=0)
    next(stream)
    remove(path / RAW / "c/0/4/0/0/0")
    with pytest.raises(CacheDamageError, match="no file"):
        list(stream)
    stream = CacheReader(path).stream([ZSTD], 0, None, 16, prefetch=0)
    next(stream)
    truncate(path / ZSTD / "c/0/4/0/0/0")
    with pytest.raises(CacheDamageError, match=r"length|index"):
        list(stream)


def test_a_pipe_or_folder_in_place_of_a_shard_does_not_hang(cache: Cache) -> None:
    path, _ = cache
    file = path / RAW / "c/0/2/0/0/0"
    size = file.stat().st_size
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CacheDamageError):
        CacheReader(path).read_rows(RAW, 0, np.arange(300))
    assert [entry["kind"] for entry in verify_cache(path, full=True)] == ["io"]
    assert size > 0
    file.unlink()
    file.mkdir()
    with pytest.raises(CacheDamageError):
        CacheReader(path).read_rows(RAW, 0, np.arange(300))


def test_two_shards_swapped(cache: Cache) -> None:
    """Both are sound in themselves: only the log knows that they are not each other."""
    path, _ = cache
    first, second = path / RAW / "c/0/0/0/0/0", path / RAW / "c/0/1/0/0/0"
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    found = verify_cache(path, full=True)
    assert {(entry["shard"], entry["kind"]) for entry in found} == {
        ("c/0/0/0/0/0", "checksum"),
        ("c/0/1/0/0/0", "checksum"),
    }


def test_fill_values_inside_committed_rows(cache: Cache) -> None:
    """Checksums are right, content is missing: what a writer that died between rows would have left."""
    import zarr

    path, values = cache
    parts = "targets/a/parts/codes"  # a byte of them may be the fill value, a row may not
    assert (values[parts] == 255).any()
    rows = ((RAW, 70), (ZSTD, 299), (parts, 30), ("targets/a/half/codes", 131), ("targets/a/exact/codes", 5))
    for array, row in rows:
        stored = zarr.open_array(store=str(path / array), mode="r+", zarr_format=3)
        patch = values[array][0][row].copy()
        patch.reshape(-1)[slice(None) if array == parts else 3] = stored.fill_value
        stored[0, row] = patch
    write_log(path, small_manifest())
    assert verify_cache(path) == []
    found = verify_cache(path, full=True)
    assert [entry["kind"] for entry in found] == ["fill"] * 5
    assert found[0]["block"] == str(299 // 16)
    for array, _ in rows:
        for read in PATHS:
            with pytest.raises(CacheDamageError, match="fill"):
                read(CacheReader(path), array, 0, np.arange(300))


def test_an_absent_block_inside_a_committed_shard(cache: Cache) -> None:
    import zarr

    path, _ = cache
    zarr.open_array(store=str(path / RAW), mode="r+", zarr_format=3)[0, 64:80] = (
        255  # zarr drops blocks that are all fill
    )
    write_log(path, small_manifest())
    assert [(entry["kind"], entry["block"]) for entry in verify_cache(path, full=True)] == [("index", "4")]
    for read in PATHS:
        with pytest.raises(CacheDamageError, match="have no block"):
            read(CacheReader(path), RAW, 0, np.arange(300))


def test_the_error_comes_with_its_batch_and_stops_the_threads(cache: Cache) -> None:
    path, values = cache
    file = path / RAW / "c/0/2/0/0/0"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    stream = CacheReader(path).stream([ZSTD, RAW], 0, None, 32)
    for k in range(4):
        np.testing.assert_array_equal(next(stream)[RAW], values[RAW][0][32 * k : 32 * k + 32])
    with pytest.raises(CacheDamageError) as caught:
        next(stream)
    assert caught.value.problems == [
        {
            "array": RAW, "shard": "c/0/2/0/0/0", "kind": "checksum", "block": "8", "path": str(file),
            "detail": "the block does not match its crc32c",
        }
    ]  # fmt: skip
    assert "rows 128 to 143" in str(caught.value)
    with pytest.raises(StopIteration):
        next(stream)
    gc.collect()
    deadline = time.monotonic() + 10
    while any(t.name.startswith("feedfast-read") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("feedfast-read") for t in threading.enumerate())


def test_an_error_that_is_not_damage_reaches_the_consumer_too(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from feedfast.storage.shards import OpenShard

    def broken(*_: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(OpenShard, "read", broken)
    with pytest.raises(MemoryError, match="none left"):
        list(CacheReader(cache[0]).stream([RAW], 0))
