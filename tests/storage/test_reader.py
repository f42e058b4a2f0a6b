"""The reader against what zarr-python wrote: values, order, resuming, memory, threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from cache_files import Values, small_manifest, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from feedfast.errors import RequestError
from feedfast.storage import segments, stream
from feedfast.storage.reader import CacheReader
from feedfast.storage.segments import BufferPool, Segment, cut_segments
from feedfast.storage.shards import OpenShard
from feedfast.storage.writer import CacheWriter, open_for_writing

Cache = tuple[Path, Values]
TAPS = ["targets/a/dense/codes", "targets/a/raw/codes"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    return path, write_cache(path, small_manifest())


def sharded(reader: CacheReader) -> list[str]:
    return [name for name, spec in reader.specs.items() if spec.sharded]


def read_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feedfast-read")]


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 10
    while read_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not read_threads()


def windowed(rows: int, seed: int) -> np.ndarray:
    """Granules of 16 rows permuted, rows mixed inside windows of 4: the shape of a later pass."""
    rng = np.random.default_rng(seed)
    granules = rng.permutation(-(-rows // 16))
    order = np.concatenate([np.arange(16 * g, min(16 * g + 16, rows)) for g in granules])
    return np.concatenate([rng.permutation(order[i : i + 64]) for i in range(0, rows, 64)])


ORDERS = {
    "stored": np.arange(300),
    "unaligned": np.arange(5, 290),
    "windowed": windowed(300, 0),
    "random": np.random.default_rng(1).permutation(300),
    "backwards": np.arange(300)[::-1],
    "repeated": np.array([3, 3, 7, 299, 0, 0, 1, 2, 3, *range(64), *range(64)]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("batch_size", [1, 16, 50, 128, 1000])
def test_every_batch_of_every_array_is_what_was_written(cache: Cache, order: np.ndarray, batch_size: int) -> None:
    path, values = cache
    with CacheReader(path) as reader:
        names = sharded(reader)
        for view in (0, 1):
            count = 0
            for k, batch in enumerate(reader.stream(names, view, order, batch_size)):
                rows = order[k * batch_size : (k + 1) * batch_size]
                for name in names:
                    assert batch[name].dtype == values[name].dtype
                    np.testing.assert_array_equal(batch[name], values[name][view][rows])
                count += 1
            assert count == -(-len(order) // batch_size)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("batch_size", [16, 50, 1000])
def test_large_rows_go_straight_to_where_their_batch_wants_them(
    cache: Cache, order: np.ndarray, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every row were large: each is read into its own place, and a batch has memory of its own."""
    path, values = cache
    monkeypatch.setattr(segments, "SMALL_BYTES", 1)
    monkeypatch.setattr(stream, "SMALL_BYTES", 1)
    stretches: list[int] = []
    original = OpenShard.read

    def counted(self, blocks, targets):
        stretches.extend(len(parts) for parts in targets)
        original(self, blocks, targets)

    monkeypatch.setattr(OpenShard, "read", counted)
    reader = CacheReader(path)
    names = sharded(reader)
    kept = list(reader.stream(names, 1, order, batch_size))
    for k, batch in enumerate(kept):
        rows = order[k * batch_size : (k + 1) * batch_size]
        for name in names:
            np.testing.assert_array_equal(batch[name], values[name][1][rows])
    for name in names:  # kept, a batch keeps no more than itself
        assert len({batch[name].base.ctypes.data for batch in kept}) == len(kept)
    if order is ORDERS["windowed"]:
        assert max(stretches) > 4


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streams_resume_exactly_at_any_batch(cache: Cache, data: st.DataObject) -> None:
    path, values = cache
    order = data.draw(st.one_of(st.sampled_from(list(ORDERS.values())), st.lists(st.integers(0, 299)).map(np.array)))
    batch_size = data.draw(st.integers(1, 120))
    start = data.draw(st.integers(0, len(order) // batch_size + 1))
    options = {
        "drop_last": data.draw(st.booleans()),
        "prefetch": data.draw(st.integers(0, 5)),
        "max_buffer_bytes": data.draw(st.sampled_from([1, 1 << 14, 1 << 30])),
    }
    wanted = values["targets/a/raw/codes"][0][order.astype(np.int64)]
    cut = [wanted[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if options["drop_last"] and cut and len(cut[-1]) < batch_size:
        cut.pop()
    reader = CacheReader(path)
    stream = reader.stream(["targets/a/raw/codes"], 0, order, batch_size, start_batch=start, **options)
    assert len(stream) == len(cut[start:])
    found = [batch["targets/a/raw/codes"] for batch in stream]
    assert len(found) == len(cut[start:])
    for a, b in zip(found, cut[start:], strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.integers(0, 200), max_size=150),
    block_rows=st.sampled_from([1, 8, 16]),
    batch_size=st.integers(1, 40),
    max_rows=st.integers(1, 200),
    least_rows=st.integers(1, 100),
)
def test_segments_cover_the_pass_and_share_no_block_unless_forced(
    rows: list[int], block_rows: int, batch_size: int, max_rows: int, least_rows: int
) -> None:
    wanted = np.array(rows, np.int64)
    cuts = cut_segments(wanted, block_rows, batch_size, max_rows, least_rows)
    assert cuts[0] == 0
    assert cuts[-1] == len(rows)
    lengths = np.diff(cuts)
    assert (lengths > 0).all()
    assert (lengths <= max_rows).all()
    for cut in cuts[1:-1]:
        shared = set(wanted[:cut] // block_rows) & set(wanted[cut:] // block_rows)
        if shared:  # then the unbroken stretch around it was too long
            clean = [
                p for p in range(len(rows) + 1) if not set(wanted[:p] // block_rows) & set(wanted[p:] // block_rows)
            ]
            before, after = max(p for p in clean if p <= cut), min(p for p in clean if p >= cut)
            assert after - before > max_rows


def test_a_mixed_pass_reads_every_block_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = cache
    read: list[int] = []
    original = Segment.read

    def counted(self, source, files, places, first, last):
        read.extend(self.blocks(source.spec.block_rows)[0][first:last])
        original(self, source, files, places, first, last)

    monkeypatch.setattr(Segment, "read", counted)
    list(CacheReader(path).stream(["targets/a/dense/codes"], 0, windowed(300, 3), 32))
    assert sorted(read) == list(range(19))


def test_contiguous_batches_are_views_and_stay_valid(cache: Cache) -> None:
    path, values = cache
    name = "targets/a/raw/codes"
    kept = [batch[name] for batch in CacheReader(path).stream([name], 1, None, 32)]
    assert np.shares_memory(kept[0].base, kept[1])  # one buffer, no copy between
    for k, batch in enumerate(kept):
        np.testing.assert_array_equal(batch, values[name][1][32 * k : 32 * k + 32])


def test_a_buffer_is_free_only_after_the_last_view_of_it() -> None:
    pool = BufferPool()
    first = pool.lease(100_000)
    address = first.ctypes.data
    view = first[10:20].view(np.uint16).reshape(-1, 1)
    del first
    second = pool.lease(100_000)
    assert second.ctypes.data != address
    assert pool.allocated == 2
    view[:] = 7
    del view
    assert pool.lease(100_001).ctypes.data == address  # sizes of one class share buffers
    assert pool.allocated == 2


def test_a_tensor_keeps_its_buffer() -> None:
    torch = pytest.importorskip("torch")
    pool = BufferPool()
    tensor = torch.from_numpy(pool.lease(5000))[3:].clone(memory_format=torch.preserve_format)
    assert pool.lease(5000).nbytes == 5000
    assert pool.allocated == 1  # the clone owns its memory, so the buffer came back
    tensor = torch.from_numpy(pool.lease(5000))[3:]
    tensor.fill_(9)
    other = pool.lease(5000)
    other[:] = 1
    assert bool((tensor == 9).all())


@pytest.mark.parametrize("order", ["stored", "windowed", "random"])
def test_memory_stays_flat(cache: Cache, order: str) -> None:
    path, _ = cache
    reader = CacheReader(path)
    rows = np.tile(ORDERS[order], 4) if order == "stored" else ORDERS[order]
    options = {"prefetch": 2, "max_buffer_bytes": 1 << 15}  # 256 rows of 128 bytes, a quarter of them in a segment
    for _ in reader.stream(TAPS[:1], 0, rows, 16, **options):
        pass
    wait_for_no_threads()
    after_one = reader._pool.allocated
    for _ in range(5):
        for _ in reader.stream(TAPS[:1], 0, rows, 16, **options):
            pass
        wait_for_no_threads()
    # how far threads are ahead varies by a buffer or two, never with the number of passes
    assert reader._pool.allocated <= after_one + 4
    assert after_one <= 16


def test_threads_end_with_the_stream(cache: Cache) -> None:
    path, _ = cache
    reader = CacheReader(path)
    wait_for_no_threads()
    stream = reader.stream(TAPS, 0, None, 16)
    assert not read_threads()  # nothing runs before the first batch
    next(stream)
    assert len(read_threads()) == 2
    for _ in stream:
        pass
    assert not read_threads()  # exhausted

    abandoned = reader.stream(TAPS, 0, None, 16)
    next(abandoned)
    gone = weakref.ref(abandoned)
    del abandoned
    gc.collect()
    assert gone() is None
    wait_for_no_threads()

    with reader.stream(TAPS, 0, None, 16) as entered:
        next(entered)
    assert not read_threads()
    with pytest.raises(StopIteration):
        next(entered)

    for batch in reader.stream(TAPS, 0, None, 16):
        del batch
        break
    gc.collect()
    wait_for_no_threads()


def test_several_streams_at_once_do_not_disturb_each_other(cache: Cache) -> None:
    path, values = cache
    reader = CacheReader(path)
    orders = [ORDERS["windowed"], ORDERS["random"], ORDERS["stored"]]
    streams = [reader.stream(TAPS, 0, order, 30) for order in orders]
    for k, batches in enumerate(zip(*streams, strict=True)):
        for order, batch in zip(orders, batches, strict=True):
            np.testing.assert_array_equal(batch[TAPS[0]], values[TAPS[0]][0][order[30 * k : 30 * k + 30]])


def test_changing_a_batch_changes_no_other(cache: Cache) -> None:
    path, values = cache
    rows = np.array([*range(32), *range(32), *range(16, 48)])
    for k, batch in enumerate(CacheReader(path).stream(TAPS[:1], 0, rows, 32)):
        np.testing.assert_array_equal(batch[TAPS[0]], values[TAPS[0]][0][rows[32 * k : 32 * k + 32]])
        batch[TAPS[0]][:] = 0


def test_read_rows_and_small_arrays(cache: Cache) -> None:
    path, values = cache
    reader = CacheReader(path)
    rows = [299, 0, 5, 5, 64, 63]
    for name, spec in reader.specs.items():
        for view in range(spec.num_views):
            whole = values[name][view] if spec.views else values[name]
            if spec.sharded:
                np.testing.assert_array_equal(reader.read_rows(name, view, rows), whole[rows])
            else:
                np.testing.assert_array_equal(reader.read_array(name, view), whole)
    np.testing.assert_array_equal(reader.read_rows("views/order", 1, rows), values["views/order"][1][rows])
    offset, step = reader.scale("a", "dense")
    np.testing.assert_array_equal(np.stack([offset, step]), values["targets/a/dense/scale"])
    assert reader.read_rows(TAPS[0], 0, []).shape == (0, 4, 4, 8)
    assert list(reader.stream(TAPS, 0, [], 16)) == []


def test_what_is_complete(cache: Cache) -> None:
    path, _ = cache
    reader = CacheReader(path)
    assert reader.missing() == []
    reader.require(reader.specs, [0, 1])
    assert len(reader.committed(TAPS[0], 1)) == 5
    assert reader.committed(TAPS[0], 1)[4].rows == (256, 300)


def test_a_cache_of_our_own_writer_reads_back(tmp_path: Path) -> None:
    """End to end with `CacheWriter`: its files are the ones that matter."""
    manifest = open_for_writing(tmp_path / "own.zarr", small_manifest())
    rng = np.random.default_rng(5)
    written = {}
    with CacheWriter(tmp_path / "own.zarr", manifest) as writer:
        for name, spec in writer.specs.items():
            if spec.sharded and spec.dtype == np.uint8:
                written[name] = rng.integers(0, 200, (2, spec.rows, *spec.row_shape)).astype(np.uint8)
                for view in (0, 1):
                    for start in range(0, spec.rows, 48):
                        writer.append(name, view, start, written[name][view][start : start + 48])
    reader = CacheReader(tmp_path / "own.zarr")
    for batch, start in zip(reader.stream(list(written), 1, None, 100), range(0, 300, 100), strict=True):
        for name, values in written.items():
            np.testing.assert_array_equal(batch[name], values[1][start : start + 100])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.stream(["targets/b/x/codes"], 0), "no array 'targets/b/x/codes'"),
        (lambda r: r.stream(TAPS, 2), "views 0 to 1, asked for 2"),
        (lambda r: r.stream(TAPS, -1), "views 0 to 1, asked for -1"),
        (lambda r: r.stream(TAPS, 0, [300]), "0 to 299, found 300 to 300"),
        (lambda r: r.stream(TAPS, 0, [-1]), "0 to 299, found -1"),
        (lambda r: r.stream(TAPS, 0, np.zeros(3)), "row numbers, found float64"),
        (lambda r: r.stream(TAPS, 0, None, 0), "batch_size: expected at least 1"),
        (lambda r: r.stream([], 0), "at least one"),
        (lambda r: r.stream([TAPS[0], TAPS[0]], 0), "different names"),
        (lambda r: r.stream(["samples/label"], 0), "read_array"),
        (lambda r: r.read_array(TAPS[0]), "too large"),
        (lambda r: r.read_rows(TAPS[0], 0, [[1]]), "shape"),
        (lambda r: r.missing(["nothing"]), "no array"),
    ],
)
def test_wrong_requests_say_what_is_wrong(cache: Cache, call, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        call(CacheReader(cache[0]))


def test_no_cache_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a feedfast cache"):
        CacheReader(tmp_path)


def test_the_bench_still_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate reads the values that were written; seconds, not measurements."""
    import importlib.util
    import json

    pytest.importorskip("tensorstore")
    pytest.importorskip("zarrs")
    file = Path(__file__).parents[2] / "bench" / "bench_reader.py"
    spec = importlib.util.spec_from_file_location("bench_reader", file)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.main(["--tiny", "--only", "cifar"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["skipped"] == []
    assert found["rows"] == 32
