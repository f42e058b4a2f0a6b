"""Later passes, at the sizes of ImageNet: each block is read once, and what is held stays within the bound."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cache_files import small_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedfast.data.passes import PASS_GRANULE, PASS_WINDOW, pass_order, pass_sizes, readable_sizes
from feedfast.errors import CacheDamageError
from feedfast.storage import segments
from feedfast.storage import stream as stream_module
from feedfast.storage.blocks import index_length
from feedfast.storage.disk import Disk
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.schema import Manifest, differences, merge
from feedfast.storage.segments import SMALL_BYTES, Array, BufferPool, Bytes, Piece, Segment
from feedfast.storage.shards import ArrayView
from feedfast.storage.stream import MAX_BUFFER_BYTES, Stream

MIB = 1 << 20
RESNET50 = (56 * 56 * 256, 28 * 28 * 512, 14 * 14 * 1024, 7 * 7 * 2048, 2 * 1000)  # OFD's taps as u8, logits as f16
DEEPLAB = (129 * 129 * 256, 2 * 1000)
# DeepLabV3+ at 513 pixels: OFD's six taps as u8 and maps of 21 classes as f16, 15 MB per row
DEEPLAB6 = (
    129 * 129 * 256,
    65 * 65 * 512,
    33 * 33 * 1024,
    33 * 33 * 2048,
    33 * 33 * 256,
    129 * 129 * 256,
    129 * 129 * 42,
)


def block_rows_for(row_bytes: int, most_rows: int, most_bytes: int = 8 * MIB) -> int:
    """Rows per block: the largest power of two within both limits."""
    rows = most_rows
    while rows > 1 and rows * row_bytes > most_bytes:
        rows //= 2
    return rows


def spec_of(name: str, row_bytes: int, block_rows: int, rows: int, shard_rows: int = 64) -> ArraySpec:
    padded = -(-rows // shard_rows) * shard_rows
    return ArraySpec(
        name=name, shape=(1, padded, row_bytes), dtype=np.dtype("u1"), fill=0xFF, chunk=(1, shard_rows, row_bytes),
        block=(1, block_rows, row_bytes), compression="none", dims=("view", "row", "channel"), views=1, rows=rows,
    )  # fmt: skip


def store(folder: Path, spec: ArraySpec, values: Array) -> ArrayView:
    """Write one view through zarr-python."""
    array: Any = zarr.create_array(
        store=str(folder), shape=spec.shape, dtype="u1", chunks=spec.block, shards=spec.chunk, fill_value=spec.fill,
        compressors=[zarr.codecs.Crc32cCodec()],
    )  # fmt: skip
    array[0, : spec.rows] = values
    keys = [spec.key(0, shard) for shard in range(spec.num_shards)]
    return ArrayView(
        spec, Disk(folder.parent), 0, {shard: (folder / key).stat().st_size for shard, key in enumerate(keys)}
    )


class CountedPool(BufferPool):
    """Counts the bytes that are lent."""

    def __init__(self) -> None:
        super().__init__()
        self.lent: dict[int, int] = {}
        self.most = 0

    def lease(self, nbytes: int) -> Bytes:
        buffer = super().lease(nbytes)
        self.lent[buffer.ctypes.data] = nbytes
        self.most = max(self.most, sum(list(self.lent.values())))
        return buffer

    def _give_back(self, buffer: Bytes) -> None:
        del self.lent[buffer.ctypes.data]
        super()._give_back(buffer)


def times_read(sources: list[ArrayView], reads: dict[int, list[tuple[int, int]]]) -> Array:
    """How often each byte of each block was read, of all shards one after another."""
    counts = []
    for source in sources:
        for shard, size in source.sizes.items():
            edges = np.zeros(size + 1, np.int64)
            for offset, length in reads[os.stat(source.store.where(source.object_key(shard))).st_ino]:
                edges[offset] += 1
                edges[offset + length] -= 1
            counts.append(np.cumsum(edges)[: size - index_length(source.spec.blocks_per_shard)])
    return np.concatenate(counts)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """What is read of each file (by inode), as (offset, bytes): seen at the system call, whatever was planned."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    real = os.preadv

    def counted(fd: int, targets: Any, offset: int, *flags: int) -> int:
        done = real(fd, targets, offset, *flags)
        found[os.fstat(fd).st_ino].append((offset, done))
        return done

    monkeypatch.setattr(os, "preadv", counted)
    return found


SCALE = 784  # sizes of the real thing divided by this: rows, blocks and bound


@pytest.mark.parametrize("batch_size", [32, 256])
@pytest.mark.parametrize("teachers", [1, 3])
def test_a_later_pass_reads_each_byte_of_each_block_once(
    teachers: int, batch_size: int, tmp_path: Path, reads: dict[int, list[tuple[int, int]]]
) -> None:
    rows = 1400  # not a multiple of 64: the short granule lies somewhere in the middle
    bound = MAX_BUFFER_BYTES // SCALE
    row_bytes = [size // SCALE for size in RESNET50] * teachers
    granule, window = pass_sizes(sum(row_bytes), 1, bound)
    rng = np.random.default_rng(0)
    sources, values = [], {}
    for number, size in enumerate(row_bytes):
        name = f"a{number}"
        spec = spec_of(name, size, block_rows_for(size, granule, 8 * MIB // SCALE), rows)
        values[name] = rng.integers(0, 255, (rows, size)).astype(np.uint8)
        sources.append(store(tmp_path / name, spec, values[name]))
    assert len({source.spec.block_rows for source in sources}) >= (2 if teachers == 1 else 1)

    order = pass_order(rows, 0, 0, 1, granule, window)
    pool = CountedPool()
    for k, batch in enumerate(Stream(sources, order, batch_size, pool=pool, max_buffer_bytes=bound)):
        for name, written in values.items():
            np.testing.assert_array_equal(batch[name], written[order[k * batch_size : (k + 1) * batch_size]])
    assert (times_read(sources, reads) == 1).all()

    row = sum(row_bytes)
    needed = 2 * batch_size + 2 * granule * window
    held_by_us = 2 * batch_size * row  # `batch`, and the one handed out in its place
    assert pool.most <= max(bound, needed * row) + held_by_us

    # What the count says of 16 granules of 64 rows, whatever the size of a row: it can be other than 1.
    reads.clear()
    for _ in Stream(sources, pass_order(rows, 0, 0, 1), batch_size, max_buffer_bytes=bound):
        pass
    assert times_read(sources, reads).mean() > 2


@pytest.mark.parametrize(
    ("arrays", "scale", "rows", "batch_size", "least_places"),
    [
        ((100,), 1, 5000, 256, 16),
        ((4096, 200), 8, 5000, 256, 16),
        ((345_000,), 512, 2500, 256, 16),
        (RESNET50, 4096, 1400, 128, 16),
        (DEEPLAB6, 8192, 290, 32, 16),  # two rows of a granule at most: 32 rows are 16 places
        (DEEPLAB6, 8192, 290, 12, 7),
        ((16 * MIB,), 8192, 290, 32, 16),
    ],
)
def test_a_second_pass_of_any_row_size_reads_once_and_from_many_places(
    arrays: tuple[int, ...],
    scale: int,
    rows: int,
    batch_size: int,
    least_places: int,
    tmp_path: Path,
    reads: dict[int, list[tuple[int, int]]],
) -> None:
    """Rows of 100 B to 16 MB; rows, blocks and memory divided by ``scale``. Bytes are counted as they are read."""
    bound, sizes = MAX_BUFFER_BYTES // scale, [max(1, size // scale) for size in arrays]
    granule, window = pass_sizes(sum(sizes), 1, bound)
    assert window >= 16
    rng = np.random.default_rng(0)
    sources = []
    for number, size in enumerate(sizes):
        block_rows = block_rows_for(size, granule, 8 * MIB // scale)
        values = rng.integers(0, 255, (rows, size)).astype(np.uint8)
        sources.append(store(tmp_path / f"a{number}", spec_of(f"a{number}", size, block_rows, rows), values))
    order = pass_order(rows, 0, 0, 1, granule, window)
    for _ in Stream(sources, order, batch_size, max_buffer_bytes=bound):
        pass
    assert (times_read(sources, reads) == 1).all()
    filled = order[: rows // (granule * window) * granule * window]  # the view's last window may be short
    assert all(len(np.unique(mixed // granule)) >= 16 for mixed in filled.reshape(-1, granule * window))
    batches = filled[: len(filled) // batch_size * batch_size].reshape(-1, batch_size)
    assert min(len(np.unique(batch // granule)) for batch in batches) >= least_places


def test_large_maps_added_to_a_cache_of_small_rows_are_read_once() -> None:
    """Granule and window stay those of the logits; a pass that reads the maps takes some that fit."""
    granule, window = pass_sizes(42, 1, MAX_BUFFER_BYTES)
    assert (granule, window) == (PASS_GRANULE, PASS_WINDOW)
    for maps in (RESNET50, DEEPLAB6):
        arrays = [(size, block_rows_for(size, granule)) for size in maps]
        row, largest = sum(maps), max(block for _, block in arrays)
        kept, _ = dry_pass(arrays, pass_order(8200, 0, 0, 1, granule, window), 64, MAX_BUFFER_BYTES)
        assert max(kept) > 2
        sizes = readable_sizes(granule, window, row, largest, MAX_BUFFER_BYTES)
        factors, _ = dry_pass(arrays, pass_order(8200, 0, 0, 1, *sizes), 64, MAX_BUFFER_BYTES)
        assert set(factors) == {1.0}
        # what was planned for its rows stays, and so do the small rows of any cache
        planned = pass_sizes(row, 1, MAX_BUFFER_BYTES)
        assert readable_sizes(*planned, row, planned[0], MAX_BUFFER_BYTES) == planned
        assert readable_sizes(*planned, 42, planned[0], MAX_BUFFER_BYTES) == planned
    assert readable_sizes(64, 16, 42, 64, MAX_BUFFER_BYTES) == (64, 16)
    assert readable_sizes(64, 16, 1 << 40, 8, MAX_BUFFER_BYTES) == (8, 1)
    assert readable_sizes(8, 1, 1 << 40, 8, MAX_BUFFER_BYTES) == (8, 1)


@pytest.mark.parametrize("least_bytes", [SMALL_BYTES, 1])
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_damage_meets_only_the_batches_of_its_block(
    damaged: int, least_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array's blocks of 4 rows, another's of 16, of 64: what is damaged is named, whatever the others' sizes.

    Rows are small, and copied into place, or taken for large ones, and read into place.
    """
    monkeypatch.setattr(segments, "SMALL_BYTES", least_bytes)
    monkeypatch.setattr(stream_module, "SMALL_BYTES", least_bytes)
    rng = np.random.default_rng(1)
    sizes, rows = [(300, 4), (100, 16), (20, 64)], 256
    values = {f"a{k}": rng.integers(0, 255, (rows, size)).astype(np.uint8) for k, (size, _) in enumerate(sizes)}
    sources = [
        store(tmp_path / name, spec_of(name, *size, rows, shard_rows=rows), values[name])
        for name, size in zip(values, sizes, strict=True)
    ]
    spec = sources[damaged].spec
    block = 130 // spec.block_rows
    file = Path(sources[damaged].store.where(sources[damaged].object_key(0)))
    content = bytearray(file.read_bytes())
    content[content.find(values[spec.name][130].tobytes())] ^= 1
    file.write_bytes(content)
    order = pass_order(rows, 0, 0, 1, 64, 1)
    unsound = np.flatnonzero(order // spec.block_rows == block)
    stream = Stream(sources, order, 8)
    for k in range(unsound[0] // 8):
        batch = next(stream)
        for name, written in values.items():
            np.testing.assert_array_equal(batch[name], written[order[8 * k : 8 * k + 8]])
    with pytest.raises(CacheDamageError, match=f"checksum: array {spec.name}.*block {block} "):
        next(stream)


class Dry:
    """In the place of a stream's threads: nothing is allocated or read, what would be is added up.

    Memory is counted as it can be freed at the earliest: pieces by the last batch they hold.
    """

    def __init__(self, sources: list[ArrayView], batch_size: int, num_rows: int) -> None:
        self.sources, self.batch_size, self.num_rows = sources, batch_size, num_rows
        self.threads = [None]  # the stream takes it for started
        self.blocks: dict[str, list[int]] = {source.spec.name: [] for source in sources}
        self.pieces: dict[int, Piece] = {}  # by their first position
        self.requested = 0
        self.handed_out = 0
        self.most_rows = 0

    def schedule(self, segment: Segment) -> None:
        for piece in segment.pieces:
            assert self.pieces.setdefault(piece.start, piece) is piece
        edges = [piece.start for piece in segment.pieces] + [segment.pieces[-1].stop]
        assert edges == sorted(set(edges))
        assert edges[0] <= segment.start < segment.stop <= edges[-1]
        assert all(piece.stop == after for piece, after in zip(segment.pieces, edges[1:], strict=True))
        for source in self.sources:
            self.blocks[source.spec.name] += np.unique(segment.rows // source.spec.block_rows).tolist()
        self.count()

    def request(self, batch: Any) -> None:
        first = self.requested * self.batch_size
        stretches = [(start, stop) for _, start, stop in batch.parts]
        stop = min(first + self.batch_size, self.num_rows)
        assert [first, *(b for _, b in stretches[:-1])] == [a for a, _ in stretches]  # all of the batch, in order
        assert stretches[-1][1] == stop
        assert batch.piece is self.pieces[batch.piece.start]
        assert batch.piece.start <= first
        assert batch.piece.stop >= stop
        self.requested += 1
        self.count()

    def wait(self, batch: Any) -> dict[str, Array]:
        self.handed_out += 1
        return {}

    def count(self) -> None:
        position = self.handed_out * self.batch_size
        rows = sum(piece.stop - piece.start for piece in self.pieces.values() if piece.stop > position)
        self.most_rows = max(self.most_rows, rows)

    def join(self) -> None:
        pass


def dry_pass(
    arrays: Sequence[tuple[int, int]], order: Array, batch_size: int, bound: int, **options: int
) -> tuple[list[float], int]:
    """Times each block is read, on average per array, and the most bytes held. Arrays: (bytes per row, rows per block).

    Fails unless every block that is wanted is read at all.
    """
    specs = [spec_of(f"a{k}", size, block, len(order)) for k, (size, block) in enumerate(arrays)]
    sources = [ArrayView(spec, Disk("."), 0, {}) for spec in specs]
    stream = Stream(sources, order, batch_size, max_buffer_bytes=bound, **options)
    wanted = order[options.get("start_batch", 0) * batch_size :]
    dry = Dry(sources, batch_size, len(wanted))
    stream._engine = dry  # type: ignore[assignment]
    assert sum(1 for _ in stream) == -(-len(wanted) // batch_size)
    factors = []
    for source in sources:
        read = dry.blocks[source.spec.name]
        blocks = set((wanted // source.spec.block_rows).tolist())
        assert set(read) == blocks
        factors.append(len(read) / max(len(blocks), 1))
    return factors, dry.most_rows * sum(size for size, _ in arrays)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_mix_of_arrays_is_read_once_within_the_bound(data: st.DataObject) -> None:
    blocks = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
    arrays = data.draw(st.lists(st.tuples(st.integers(1, 16 * MIB), blocks), min_size=1, max_size=5))
    bound = data.draw(st.sampled_from([1, 64 * MIB, 1024 * MIB, MAX_BUFFER_BYTES]))
    batch_size = data.draw(st.integers(1, 300))
    count = data.draw(st.integers(1, 3000))
    row, largest = sum(size for size, _ in arrays), max(block for _, block in arrays)
    granule, window = pass_sizes(row, largest, bound)
    assert granule % largest == 0
    assert window * granule <= max(largest, min(PASS_GRANULE * PASS_WINDOW, bound // 4 // row))
    pass_index = data.draw(st.integers(0, 2))
    order = pass_order(count, data.draw(st.integers(0, 99)), 0, pass_index, granule, window)
    options = {"prefetch": data.draw(st.integers(0, 5)), "start_batch": data.draw(st.integers(0, 3))}
    factors, most = dry_pass(arrays, order, batch_size, bound, **options)
    assert set(factors) <= ({1.0} if count > options["start_batch"] * batch_size else {0.0})
    # The next batch is always allowed: its copy, the rows it consists of, and what its first and last segments have
    # besides those; a segment is one window, or one block where that is more than a window may be.
    assert most <= max(bound, (2 * batch_size + 2 * max(largest, bound // 4 // row)) * row)


TRUE_SIZES = {  # bytes per row of each array, batch
    "ResNet-50, 1 teacher": (RESNET50, 256),
    "ResNet-50, 1 teacher, small batches": (RESNET50, 32),
    "ResNet-50, 3 teachers": (3 * RESNET50, 256),
    "ResNet-50, 3 teachers, small batches": (3 * RESNET50, 32),
    "129 x 129 map": (DEEPLAB, 16),
    "129 x 129 map, 3 teachers": (3 * DEEPLAB, 16),
    "DeepLabV3+": (DEEPLAB6, 12),
}


@pytest.mark.parametrize(("row_bytes", "batch_size"), TRUE_SIZES.values(), ids=TRUE_SIZES.keys())
def test_at_true_sizes_a_block_is_read_once(row_bytes: tuple[int, ...], batch_size: int) -> None:
    row, rows = sum(row_bytes), 8200
    # before: one size of block for the whole cache, at least 8 rows, and windows of 1,024 rows
    before = [(size, max(8, block_rows_for(max(row_bytes), 64))) for size in row_bytes]
    factors, _ = dry_pass(before, pass_order(rows, 0, 0, 1), batch_size, MAX_BUFFER_BYTES)
    assert min(factors) > 2.5
    # after
    granule, window = pass_sizes(row, 1, MAX_BUFFER_BYTES)
    after = [(size, block_rows_for(size, granule)) for size in row_bytes]
    order = pass_order(rows, 0, 0, 1, granule, window)
    factors, most = dry_pass(after, order, batch_size, MAX_BUFFER_BYTES)
    assert set(factors) == {1.0}
    assert most <= max(MAX_BUFFER_BYTES, 2 * batch_size * row + MAX_BUFFER_BYTES // 2)
    assert window >= 16
    # also where a cache has blocks of 64 rows
    blocks = [(size, block_rows_for(size, 64)) for size in row_bytes]
    granule, window = pass_sizes(row, max(most_rows for _, most_rows in blocks), MAX_BUFFER_BYTES)
    factors, _ = dry_pass(blocks, pass_order(rows, 0, 0, 1, granule, window), batch_size, MAX_BUFFER_BYTES)
    assert set(factors) == {1.0}


@given(
    row_bytes=st.integers(1, 1 << 36),
    bound=st.integers(0, 1 << 36),
    block_rows=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
)
def test_a_cache_made_with_the_derived_granule_derives_it_again(row_bytes: int, bound: int, block_rows: int) -> None:
    """From its recipe (no blocks known) and from its blocks: a live run and a cached run read in one order."""
    granule, window = pass_sizes(row_bytes, 1, bound)
    if block_rows <= granule:
        assert pass_sizes(row_bytes, block_rows, bound) == (granule, window)
    else:
        assert pass_sizes(row_bytes, block_rows, bound)[0] == block_rows


def test_small_rows_keep_the_full_window() -> None:
    assert pass_sizes(115_000, 64, MAX_BUFFER_BYTES) == (PASS_GRANULE, PASS_WINDOW)  # CIFAR, three taps
    assert pass_sizes(MAX_BUFFER_BYTES // 4 // 1024, 1, MAX_BUFFER_BYTES) == (64, 16)
    assert pass_sizes(MAX_BUFFER_BYTES // 4 // 1024 + 1, 1, MAX_BUFFER_BYTES) == (32, 31)
    assert pass_sizes(1 << 40, 1, MAX_BUFFER_BYTES) == (1, 1)
    assert pass_sizes(1 << 40, 8, MAX_BUFFER_BYTES) == (8, 1)
    for wrong in ((0, 1), (1, 3), (1, 128)):
        with pytest.raises(ValueError, match="row_bytes"):
            pass_sizes(*wrong, MAX_BUFFER_BYTES)


def test_how_rows_are_mixed_is_no_part_of_a_caches_identity() -> None:
    """A recipe with other teachers derives other sizes; it still extends the cache, which keeps its own."""
    held = small_manifest()
    asked = held.model_copy(update={"plan": held.plan.model_copy(update={"granule": 8, "window": 44}), "views": 5})
    assert differences(asked, held) == []
    merged = merge(held, asked)
    assert (merged.views, merged.plan.granule, merged.plan.window) == (5, 16, 16)
    assert [merged.digest_for(name) for name in array_specs(held)] == [
        held.digest_for(name) for name in array_specs(held)
    ]
    # no object depends on the window, and the blocks of an object do on the granule: codes of one are not of another
    moved = {name for name in array_specs(held) if asked.digest_for(name) != held.digest_for(name)}
    assert moved == {name for name, spec in array_specs(held).items() if spec.sharded}
    assert Manifest.from_attrs(asked.to_attrs()) == asked
    seed = held.model_copy(update={"plan": held.plan.model_copy(update={"seed": 1})})
    assert [key for key, _, _ in differences(seed, held)] == ["plan.seed"]
