"""What a writer's part still has to write, against counting it row by row; and rows that are nobody's to write."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cache_samples import FINAL, in_memory, make_manifest, make_tap, make_teacher, memory_path, rows_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from feedfast.errors import FeedfastError
from feedfast.storage.layout import ArraySpec, unit_rows
from feedfast.storage.log import cache_digest
from feedfast.storage.pending import Division, Pending, Unit
from feedfast.storage.writer import CacheWriter, open_for_writing

tmp_path = memory_path


def sharded(name: str, rows: int, views: int, shard_rows: int) -> ArraySpec:
    padded = -(-rows // shard_rows) * shard_rows
    return ArraySpec(
        name=name, shape=(views, padded, 3), dtype=np.dtype("u1"), fill=255, chunk=(1, shard_rows, 3),
        block=(1, min(4, shard_rows), 3), compression="none", dims=("view", "row", "channel"), views=views, rows=rows,
    )  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 70),
    views=st.integers(1, 3),
    shard_rows=st.lists(st.sampled_from([4, 8, 16, 32]), min_size=1, max_size=3),
    parts=st.integers(1, 5),
    size=st.integers(1, 40),
    lost=st.integers(0, 2**32 - 1),
)
def test_pending_is_what_counting_rows_gives(
    rows: int, views: int, shard_rows: list[int], parts: int, size: int, lost: int
) -> None:
    specs = {f"a{k}": sharded(f"a{k}", rows, views, n) for k, n in enumerate(shard_rows)}
    rng = np.random.default_rng(lost)
    missing = {
        name: {(v, s) for v in range(views) for s in range(spec.num_shards) if rng.random() < 0.4}
        for name, spec in specs.items()
    }
    unit = max(shard_rows)
    # The oracle: each row of each view belongs to one part, and lacks some arrays.
    owner = {(v, row): (v * -(-rows // unit) + row // unit) % parts for v in range(views) for row in range(rows)}
    lacking = {
        (name, v, row): (v, row // spec.shard_rows) in missing[name]
        for name, spec in specs.items()
        for v in range(views)
        for row in range(rows)
    }
    seen: list[tuple[str, int, int]] = []
    for index in range(parts):
        division = Division(specs, rows, (index, parts))
        mine = {
            name: frozenset(place for place in missing[name] if division.holds(spec, *place))
            for name, spec in specs.items()
        }
        seen += [(name, *place) for name, places in mine.items() for place in places]
        pending = Pending(specs, mine, rows, views)
        wanted = {
            (v, batch)
            for (name, v, row), lacks in lacking.items()
            if lacks and owner[v, row] == index
            for batch in [row // size]
        }
        found = {(v, row // size) for v, some in pending.batches(size) for row in some.tolist()}
        assert found == wanted
        for v, some in pending.batches(size):
            assert some.dtype == np.int64
            assert some.tolist() == [row for row in range(rows) if (v, row // size) in wanted]
        for name in specs:
            for start in range(0, rows, size):
                stop = min(start + size, rows)
                expected = any(lacking[name, 0, row] and owner[0, row] == index for row in range(start, stop))
                assert pending.lacks(name, 0, start, stop) == expected
    assert sorted(seen) == sorted((name, *place) for name, places in missing.items() for place in places)


def test_parts_are_even_where_a_view_has_fewer_units_than_parts() -> None:
    """Counted through all views: else the first part would write every view of one unit."""
    specs = {"a": sharded("a", 8, 6, 8)}
    shares = [sum(Division(specs, 8, (i, 3)).holds(specs["a"], v, 0) for v in range(6)) for i in range(3)]
    assert shares == [2, 2, 2]


@settings(deadline=None, max_examples=25)
@given(parts=st.integers(1, 4), size=st.integers(1, 50), done=st.sets(st.integers(0, 4)))
def test_parts_given_everything_write_everything_once(parts: int, size: int, done: set[int]) -> None:
    """Every writer is handed all rows of the batches pending names; the cache is that of one writer."""
    manifest = make_manifest(
        make_teacher("a", make_tap("final"), make_tap("wide", (9, 3, 2))), views=2, shard_bytes=500
    )
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        digests = set()
        for name, n in (("one", 1), ("many", parts)):
            path = Path(folder, name)
            stored = open_for_writing(path, manifest)
            with CacheWriter(path, stored) as writer:
                for shard in done:
                    start, stop = writer.specs[FINAL].shard_span(shard)
                    writer.append(FINAL, 1, start, rows_of(writer.specs[FINAL], 1, start, stop))
            written = len(done)
            arrays = [name for name, spec in writer.specs.items() if spec.sharded]
            for index in range(n):
                with CacheWriter(path, stored, part=(index, n)) as writer:
                    pending = writer.pending(arrays)
                    for view, rows in pending.batches(size):
                        for batch in np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1):
                            for array in arrays:
                                spec, start, stop = writer.specs[array], int(batch[0]), int(batch[-1]) + 1
                                writer.append(array, view, start, rows_of(spec, view, start, stop))
                written += writer.shards_written
            specs = [writer.specs[array] for array in arrays]
            assert not any(writer.missing(array) for array in arrays)
            assert written == sum(spec.num_shards * spec.num_views for spec in specs)
            digests.add(cache_digest(path))
        assert len(digests) == 1


def append_batches(writer: CacheWriter, arrays: list[str], size: int, most: int = 1000) -> None:
    """The first ``most`` batches of what the writer has pending."""
    for view, rows in writer.pending(arrays).batches(size):
        for batch in np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1)[:most]:
            for array in arrays:
                start, stop = int(batch[0]), int(batch[-1]) + 1
                writer.append(array, view, start, rows_of(writer.specs[array], view, start, stop))


@settings(deadline=None, max_examples=12)
@given(writers=st.integers(1, 3), size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_units_handed_out_in_any_order_make_the_cache_of_one_writer(writers: int, size: int, seed: int) -> None:
    """Units go to any writer, also to one that follows another that died halfway through; no line is logged twice."""
    manifest = make_manifest(
        make_teacher("a", make_tap("final"), make_tap("wide", (9, 3, 2))), views=2, shard_bytes=500
    )
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder, contextlib.ExitStack() as stack:
        one, many = Path(folder, "one"), Path(folder, "many")
        stored = open_for_writing(one, manifest)
        with CacheWriter(one, stored) as writer:
            arrays = [name for name, spec in writer.specs.items() if spec.sharded]
            append_batches(writer, arrays, size)

        stored = open_for_writing(many, manifest)

        def opened(part: int) -> CacheWriter:
            return stack.enter_context(CacheWriter(many, stored, part=(part, writers), divided=False))

        crew = [opened(part) for part in range(writers)]
        unit = unit_rows(crew[0].specs)
        units = crew[0].pending(arrays).units(unit, size)
        assert list(units.items()) == [
            (Unit(view, start, min(start + unit, 150)), min(unit, 150 - start))
            for view in range(2)
            for start in range(0, 150, unit)
        ]
        queue = list(units)
        rng.shuffle(queue)
        for number, handed in enumerate(queue):
            part = rng.randrange(writers)
            crew[part].hand([handed])
            if number % 2:  # it dies of an error: what waits is dropped, what is under way may be committed
                append_batches(crew[part], arrays, size, most=rng.randrange(4))
                crew[part].__exit__(RuntimeError, RuntimeError("died"), None)
                crew[part] = opened(part)
                part = rng.randrange(writers)
                crew[part].refresh()
                crew[part].hand([handed])
            append_batches(crew[part], arrays, size)
            crew[part].flush()
            assert crew[part].holds(handed)
        for writer in crew:
            writer.close()
        assert cache_digest(many) == cache_digest(one)
        lines = [line for log in many.glob("commits/*.jsonl") for line in log.read_text().splitlines()]
        assert len(lines) == len({(entry["array"], entry["shard"]) for entry in map(json.loads, lines)})


def test_a_unit_counts_the_rows_that_are_missing_and_no_others(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    with CacheWriter(tmp_path / "c", manifest) as writer:
        spec = writer.specs[FINAL]
        writer.append(FINAL, 0, 0, rows_of(spec, 0, 0, spec.shard_rows))
        lacking = writer.pending([FINAL]).units(2 * spec.shard_rows, 5)
        first = (spec.shard_rows // 5) * 5  # the batch that reaches into the missing shard begins here
        assert lacking[Unit(0, 0, 2 * spec.shard_rows)] == 2 * spec.shard_rows - first
        assert sum(lacking.values()) == 70 - first
        writer.hand([Unit(0, 2 * spec.shard_rows, 3 * spec.shard_rows)])
        assert writer.pending([FINAL]).missing == {FINAL: frozenset({(0, 2)})}
        assert str(Unit(0, 32, 48)) == "view 0, rows 32..48"


def test_pending_is_of_the_moment_and_of_arrays_that_exist(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    with CacheWriter(tmp_path / "c", manifest) as writer:
        before = writer.pending([FINAL])
        writer.append(FINAL, 0, 0, rows_of(writer.specs[FINAL], 0, 0, 16))
        assert before.lacks(FINAL, 0, 0, 16)
        assert not writer.pending([FINAL]).lacks(FINAL, 0, 0, 16)
        assert writer.pending([FINAL]).lacks(FINAL, 0, 0, 17)
        with pytest.raises(FeedfastError, match="no such array"):
            writer.pending(["targets/a/other/codes"])
