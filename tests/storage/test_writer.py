"""Writing a cache: read back by other Zarr implementations, extended, row by row, and with a slow disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from cache_samples import (
    FINAL,
    expected,
    fill_cache,
    in_memory,
    make_manifest,
    make_tap,
    make_teacher,
    memory_path,
    object_path,
    rows_of,
    small_values,
    stamps,
    standard,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, RequestError
from feedfast.storage.create import PLAN_PROBE, refuse_foreign
from feedfast.storage.disk import Disk
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import cache_digest, read_log
from feedfast.storage.manifest import read_manifest
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast.storage.verify import verify_cache
from feedfast.storage.writer import CacheWriter, open_for_writing

HELPERS = Path(__file__).parents[1] / "helpers"

tmp_path = memory_path  # every test of this file writes into memory


# ---- other implementations


@pytest.fixture(scope="module")
def standard_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standard") / "c.zarr"
    fill_cache(path, standard())
    return path


def test_zarr_python_reads_equal_values(standard_cache: Path) -> None:
    group = zarr.open_group(standard_cache, mode="r")
    assert Manifest.from_attrs(dict(group.attrs)) == standard() == read_manifest(standard_cache)
    for spec, values in expected(standard()):
        array = group[spec.name]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.dtype, array.shards or array.chunks) == (spec.shape, spec.dtype, spec.chunk)
        assert array.chunks == (spec.block or spec.chunk)
        assert array.metadata.dimension_names == spec.dims  # type: ignore[union-attr]
        np.testing.assert_array_equal(array[...], values)


def test_tensorstore_reads_equal_values(standard_cache: Path) -> None:
    for spec, values in expected(standard()):
        kvstore = {"driver": "file", "path": str(standard_cache / spec.name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
        np.testing.assert_array_equal(np.asarray(array.read().result()), values)


def test_zarrs_reads_equal_values(standard_cache: Path) -> None:
    """In a process of its own: its pipeline is a setting of the whole process."""
    script = f"""
import numpy as np, zarr, zarrs
from cache_samples import expected, standard
zarr.config.set({{"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}})
group = zarr.open_group({str(standard_cache)!r}, mode="r")
for spec, values in expected(standard()):
    np.testing.assert_array_equal(group[spec.name][...], values)
    assert type(group[spec.name]._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=HELPERS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_hierarchy_is_explicit(standard_cache: Path) -> None:
    for folder in ["", "views", "targets", "targets/a", "targets/a/final", "targets/b/logits", "pixels"]:
        assert json.loads((standard_cache / folder / "zarr.json").read_text())["node_type"] == "group"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # commits/ is not part of the hierarchy, and zarr-python says so
        names = {name for name, _ in zarr.open_group(standard_cache, mode="r").members(max_depth=None)}
    assert {spec.name for spec in array_specs(standard()).values()} <= names


# ---- extended


def test_teachers_taps_views_and_pixels_are_added_without_touching_what_is_there(tmp_path: Path) -> None:
    first = make_manifest(make_teacher("a", make_tap("final")), views=1)
    fill_cache(tmp_path / "c", first)
    steps = [
        make_manifest(make_teacher("a", make_tap("final"), make_tap("more", codec="u4")), views=1),
        make_manifest(make_teacher("b", make_tap("final", (9,), "f16")), views=1, shard_bytes=77, granule=64),
        make_manifest(make_teacher("b"), views=3),
        make_manifest(views=2, images="stored"),
    ]
    for asked in steps:
        before = stamps(tmp_path / "c")
        digests = {
            name: read_manifest(tmp_path / "c").digest_for(name) for name in array_specs(read_manifest(tmp_path / "c"))
        }
        fill_cache(tmp_path / "c", asked)
        after = stamps(tmp_path / "c")
        assert after.keys() > before.keys()
        assert {name: after[name] for name in before} == before
        merged = read_manifest(tmp_path / "c")
        assert {name: merged.digest_for(name) for name in digests} == digests
    assert (merged.views, set(merged.teachers), merged.images, merged.plan.granule) == (3, {"a", "b"}, "stored", 8)
    fill_cache(tmp_path / "again", merged)
    assert cache_digest(tmp_path / "again") == cache_digest(tmp_path / "c")
    group = zarr.open_group(tmp_path / "c", mode="r")
    for spec, values in expected(merged):
        np.testing.assert_array_equal(group[spec.name][...], values)  # type: ignore[index]


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", standard())
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in tmp_path.rglob("zarr.json")}
    assert open_for_writing(tmp_path / "c", make_manifest(views=1, created="later", versions={"x": "y"})) == manifest
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in tmp_path.rglob("zarr.json")} == before


def test_an_interrupted_creation_is_finished(tmp_path: Path) -> None:
    open_for_writing(tmp_path / "c", standard())
    for name in ("views/zarr.json", "targets/a/final/codes/zarr.json"):
        (tmp_path / "c" / name).unlink()
    open_for_writing(tmp_path / "c", standard())
    assert (tmp_path / "c/targets/a/final/codes/zarr.json").is_file()
    (tmp_path / "c/zarr.json").unlink()
    assert open_for_writing(tmp_path / "c", standard()) == standard()


def test_another_manifest_is_refused_with_the_differences(tmp_path: Path) -> None:
    fill_cache(tmp_path / "c", tiny())
    before = stamps(tmp_path / "c")
    other = make_manifest(
        make_teacher("a", make_tap("final"), weights_sha256="e" * 64), rows=70, views=1, batch_rows=21
    )
    for attempt in (lambda: open_for_writing(tmp_path / "c", other), lambda: CacheWriter(tmp_path / "c", other)):
        with pytest.raises(CacheMismatchError) as caught:
            attempt()
        lines = str(caught.value).splitlines()
        assert lines[1].split() == ["key", "expected", "found"]
        assert lines[2].split() == ["batch_rows", "21", "20"]
        assert lines[3].split()[:1] == ["teachers.a.weights_sha256"]
        assert "eeee" in lines[3].split()[1]
    assert stamps(tmp_path / "c") == before


def test_a_writer_needs_the_manifest_that_was_stored(tmp_path: Path) -> None:
    open_for_writing(tmp_path / "c", tiny())
    for other in (tiny(shard_bytes=99), tiny(views=2), make_manifest(make_teacher("z"), rows=70, views=1)):
        with pytest.raises(CacheMismatchError, match="open_for_writing"):
            CacheWriter(tmp_path / "c", other)


def test_a_killed_plan_s_file_is_no_foreign_one(tmp_path: Path) -> None:
    (tmp_path / f"{PLAN_PROBE}x1").write_bytes(b"noise")
    refuse_foreign(tmp_path)


def test_places_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("x")
    zarr.create_group(tmp_path / "zarr")
    for name, reason in (
        ("file", "found a file"),
        ("photos", "cat.jpg"),
        ("file/below", "found a file"),
        ("/proc/below", "cannot be made"),
        ("zarr", "no feedfast manifest"),
    ):
        with pytest.raises(FeedfastError, match=reason):
            open_for_writing(tmp_path / name, tiny())
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(RequestError, match="expected a feedfast cache"):
        CacheWriter(tmp_path / "nothing", tiny())
    (tmp_path / "empty").mkdir()
    open_for_writing(tmp_path / "empty", tiny())


# ---- rows


def test_saturation_and_the_fit_reach_the_log(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec = array_specs(manifest)[FINAL]
    scale = "targets/a/final/scale"
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.put(scale, small_values(writer.specs[scale]))
        for start in range(0, 70, 20):
            writer.append(FINAL, 0, start, rows_of(spec, 0, start, min(start + 20, 70)), saturated=1)
    log = read_log(tmp_path / "c")
    commits = sorted(log.of(FINAL), key=lambda commit: commit.rows)
    assert [commit.rows for commit in commits] == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70)]
    assert sum(commit.saturated for commit in commits) == 4
    assert {commit.fit for commit in commits} == {log.of(scale)[0].sha256[:16]}


def test_codes_of_another_scale_are_absent_and_written_again(tmp_path: Path) -> None:
    """A scale that is lost may come back with other values; codes made with the old one are then never read."""
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec, scale = array_specs(manifest)[FINAL], "targets/a/final/scale"
    values = small_values(array_specs(manifest)[scale])

    def write(scale_values: np.ndarray) -> set[tuple[int, int]]:
        with CacheWriter(tmp_path / "c", manifest) as writer:
            writer.put(scale, scale_values)
        with CacheWriter(tmp_path / "c", manifest) as writer:
            missing = writer.missing(FINAL)
            writer.append(FINAL, 0, 0, rows_of(spec, 0, 0, 70))
        return missing

    every = {(0, shard) for shard in range(5)}
    assert write(values) == every
    file = tmp_path / "c" / scale / "c" / "0" / "0"
    file.unlink()
    assert write(values) == set(), "the same values again: the codes still mean what they meant"
    file.unlink()
    assert write(values + 1) == every
    reader = CacheReader(tmp_path / "c")
    assert {commit.attempt for commit in reader.committed(FINAL).values()} == {1}
    assert not reader.missing([FINAL])
    file.unlink()
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.put(scale, values + 2)
    stale = CacheReader(tmp_path / "c")
    assert len(stale.missing([FINAL])) == 5
    with pytest.raises(CacheDamageError, match="not committed"):
        stale.stream([FINAL], 0)
    assert {entry["kind"] for entry in verify_cache(tmp_path / "c") if entry["array"] == FINAL} == {"incomplete"}


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 70), max_size=8), skip=st.sets(st.integers(0, 4)))
def test_any_batching_gives_the_same_objects(cuts: list[int], skip: set[int]) -> None:
    """Whatever the batches, and with some shards already there, which are then dropped."""
    edges = sorted({0, 70, *cuts})
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        manifest = open_for_writing(Path(folder), tiny())
        spec = array_specs(manifest)[FINAL]
        with CacheWriter(folder, manifest) as writer:
            for shard in skip:
                start, stop = spec.shard_span(shard)
                writer.append(FINAL, 0, start, rows_of(spec, 0, start, stop))
        with CacheWriter(folder, manifest) as writer:
            for start, stop in itertools.pairwise(edges):
                writer.append(FINAL, 0, start, rows_of(spec, 0, start, stop))
            assert writer.missing(FINAL) == set()
            assert not writer.damaged
        assert writer.shards_written == 5 - len(skip)
        values = zarr.open_array(Path(folder) / FINAL, mode="r")[0, :70]
        np.testing.assert_array_equal(values, rows_of(spec, 0, 0, 70))


@pytest.mark.parametrize(
    ("codec", "fill"),
    [
        ("u8", 255),
        ("u4", 255),
        ("u6", 255),
        *((codec, fill) for codec in ("f16", "f32") for fill in (np.nan, np.inf, -np.inf)),
    ],
)
def test_values_that_would_read_as_missing_are_refused(tmp_path: Path, codec: str, fill: float) -> None:
    manifest = open_for_writing(
        tmp_path / "c", make_manifest(make_teacher("a", make_tap("final", codec=codec)), rows=70, views=1)
    )
    spec = array_specs(manifest)[FINAL]
    rows = rows_of(spec, 0, 0, 70)
    rows[21, 1, 1, 1] = fill
    if codec == "u6":  # bytes of several codes' parts may have that value, all of a row may not
        rows[3, 1, 1] = rows[21] = fill
    writer = CacheWriter(tmp_path / "c", manifest)
    with pytest.raises(FeedfastError, match=r"targets/a/final/codes: view 0, rows 16\.\.24: found") as caught, writer:
        writer.append(FINAL, 0, 0, rows)
    assert "not finite" in str(caught.value) or "fill value 255" in str(caught.value)
    assert all(commit.rows[0] != 16 for commit in read_log(tmp_path / "c").of(FINAL))


def test_white_pixels_are_no_fill_values(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny(images="stored"))
    white = np.full((70, 4, 4, 3), 255, np.uint8)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.append("pixels/codes", 0, 0, white)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "c/pixels/codes", mode="r")[0, :70], white)


def test_rows_must_fit_and_follow(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec = array_specs(manifest)[FINAL]

    def give(
        start: int, stop: int, rows: np.ndarray | None = None, view: int = 0, array: str = FINAL, **more: Any
    ) -> None:
        writer.append(array, view, start, rows_of(spec, 0, start, stop) if rows is None else rows, **more)

    with CacheWriter(tmp_path / "c", manifest) as writer:
        for wrong in (
            lambda: give(4, 8),
            lambda: give(64, 71),
            lambda: give(-1, 5),
            lambda: give(0, 8, view=1),
            lambda: give(0, 8, np.zeros((8, 3, 2, 4), np.uint8)),
            lambda: give(0, 8, np.zeros((8, 3, 2, 5), np.int8)),
            lambda: give(0, 8, array="targets/a/other/codes"),
            lambda: give(0, 8, array="samples/label"),
            lambda: writer.put(FINAL, np.zeros(3)),
            lambda: writer.put("samples/label", np.zeros(70, np.int64)),
            lambda: writer.put("samples/label", np.zeros(69, np.int32)),
            lambda: writer.put("samples/label", np.zeros(70, np.int32), view=0),
        ):
            with pytest.raises(FeedfastError):
                wrong()
        give(0, 8)
        for start in (9, 0, 16):
            with pytest.raises(FeedfastError, match=f"expected row 8, found row {start}"):
                give(start, start + 8)
        give(8, 16, np.asfortranarray(rows_of(spec, 0, 8, 16)))
    with pytest.raises(FeedfastError, match="closed"):
        give(16, 32)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "c" / FINAL, mode="r")[0, :16], rows_of(spec, 0, 0, 16))


# ---- small arrays


def test_small_arrays_are_written_once_and_compared(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny(views=2))
    with (
        CacheWriter(tmp_path / "c", manifest, part=(0, 2)) as one,
        CacheWriter(tmp_path / "c", manifest, part=(1, 2)) as two,
    ):
        flips = small_values(one.specs["views/flip"])
        one.put("views/flip", flips[1], view=1)
        assert one.stored("views/flip") is None
        two.put("views/flip", flips)  # learns of the first's, and adds the other
        assert two.shards_written == 1
        with pytest.raises(CacheMismatchError, match="views/flip of view 1"):
            one.put("views/flip", 1 - flips[1], view=1)
        scale = np.float32([[0.5] * 5, [0.1] * 5])
        one.put("targets/a/final/scale", scale)
        with pytest.raises(CacheMismatchError, match="scale"):
            two.put("targets/a/final/scale", scale * 2)
        for bad in (np.nan, np.inf):
            with pytest.raises(FeedfastError, match="missing"):
                two.put("targets/a/final/scale", np.full((2, 5), bad, np.float32))
        with pytest.raises(FeedfastError, match="missing"):
            two.put("samples/label", np.full(70, -(2**31), np.int32))
    with CacheWriter(tmp_path / "c", manifest) as writer:
        np.testing.assert_array_equal(writer.stored("views/flip"), flips)
        np.testing.assert_array_equal(writer.stored("targets/a/final/scale"), scale)
        assert writer.stored("samples/label") is None
        path = object_path(tmp_path / "c", "targets/a/final/scale", "c/0/0")
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        with pytest.raises(CacheDamageError, match="scale"):
            writer.stored("targets/a/final/scale")
    assert read_log(tmp_path / "c").problems == []


# ---- flow


def test_memory_stays_flat_when_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = 1 << 20
    manifest = open_for_writing(
        tmp_path / "c",
        make_manifest(
            make_teacher("a", make_tap("final", (64, 8, 8))), rows=6_016, views=1, granule=64, shard_bytes=shard
        ),
    )
    real = Disk.put

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.004)
        real(*args, **kwargs)

    monkeypatch.setattr(Disk, "put", slow)
    batch = np.ones((64, 8, 8, 64), np.uint8)
    tracemalloc.start()
    try:
        with CacheWriter(tmp_path / "c", manifest, workers=2, max_in_flight=3) as writer:
            for start in range(0, 6_016, 64):
                writer.append(FINAL, 0, start, batch)
            peak = tracemalloc.get_traced_memory()[1]
            assert writer.bytes_written > 15 * shard
    finally:
        tracemalloc.stop()
    assert peak < (1 + 3) * shard + (2 << 20)


def test_an_error_in_the_callers_loop_drops_what_waits_and_frees_the_part(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec = array_specs(manifest)[FINAL]
    writer = CacheWriter(tmp_path / "c", manifest)

    def loop() -> None:
        with writer:
            writer.append(FINAL, 0, 0, rows_of(spec, 0, 0, 40))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert fill_cache(tmp_path / "c", manifest) == fill_cache(tmp_path / "d", tiny())
    with contextlib.suppress(FeedfastError):
        writer.close()
    shutil.rmtree(tmp_path / "d")


def test_unused_shard_rows_are_absent_or_fill(tmp_path: Path) -> None:
    """A buffer is used again for a shard that is not full: nothing of the earlier shard may show."""
    manifest = open_for_writing(tmp_path / "c", tiny(rows=37, shard_bytes=30 * 32))
    spec: ArraySpec = array_specs(manifest)[FINAL]
    with CacheWriter(tmp_path / "c", manifest, workers=1, max_in_flight=1) as writer:
        for start, stop in ((0, 32), (32, 37)):
            writer.append(FINAL, 0, start, rows_of(spec, 0, start, stop))
    values = zarr.open_array(tmp_path / "c" / FINAL, mode="r")[0]
    assert spec.shape[1] == 64
    assert (values[37:] == 255).all()
    assert object_path(tmp_path / "c", FINAL, spec.key(0, 1)).stat().st_size == 8 * spec.row_bytes + 4 + 4 * 16 + 4
