"""Ways to keep cached rows and to read them back in batches: feedfast's own, and what people do today.

A `Peer` writes the same rows in its own way and hands out batches of them, uint8 [b, row_bytes] in host memory, each
with its row numbers. All have two workers and read four batches ahead. Each is used as its documentation recommends,
and of several ways the fastest measured here: threads where reading leaves the GIL (np.memmap, LMDB read-only without
locks and with values as buffers, zarr), else processes of PyTorch's DataLoader that open the files themselves and make
whole batches (one file per sample, HDF5, WebDataset). Threads fill buffers that are used again.

What is heavy is imported by its own peer alone: the bench gives each peer a process of its own.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Batch = tuple[Rows, Bytes]

WORKERS: Final = 2
AHEAD: Final = 4
PIECE_BYTES: Final = 4 << 20  # 4 MiB, what the sequential read asks for at once
TAR_SHARDS: Final = 8
PLAIN: Final = "plain"  # one file of nothing but rows: np.memmap's, and the ceiling's


@dataclass(frozen=True)
class Setting:
    """What is stored and how it is asked for: codes of maps [height, width, channel], one byte per value."""

    shape: tuple[int, int, int]
    rows: int
    batch: int
    granule: int
    window: int
    bound_bytes: int  # of feedfast's stream; granule and window follow from it

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape))


class Peer:
    """One way of keeping rows in a folder; ``folder`` is the peer's own."""

    workers = f"{WORKERS} threads"
    stored = ""  # the folder of another peer whose files it reads; its own where empty

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        self.setting = setting

    def write(self, rows: Bytes) -> None:
        """Store all rows, uint8 [row, row_bytes]."""
        raise NotImplementedError

    def batches(self, order: Rows) -> Iterator[Batch]:
        """One pass over the rows in this order, `Setting.batch` at a time. A peer may keep what it likes open."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of files and mappings, so that the page cache can forget them."""


# ---- shared ways of reading ahead


def by_threads(order: Rows, setting: Setting, fill: Callable[[Rows, Bytes], None]) -> Iterator[Batch]:
    """Batches that ``fill(rows, out)`` fills, in two threads; a batch is valid until the next but one is asked for."""
    spare = [np.empty((setting.batch, setting.row_bytes), np.uint8) for _ in range(AHEAD + 3)]

    def read(rows: Rows, out: Bytes) -> Batch:
        fill(rows, out[: len(rows)])
        return rows, out

    waiting: collections.deque[Future[Batch]] = collections.deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for start in range(0, len(order), setting.batch):
                waiting.append(pool.submit(read, order[start : start + setting.batch], spare.pop()))
                if len(waiting) > AHEAD:
                    rows, out = waiting.popleft().result()
                    yield rows, out[: len(rows)]
                    spare.append(out)
            while waiting:
                rows, out = waiting.popleft().result()
                yield rows, out[: len(rows)]
        finally:
            for future in waiting:
                future.cancel()


class _Batches:
    """A data set whose samples are batches, so that a DataLoader's worker collates them and sends them once."""

    def __init__(self, fill: Callable[[Rows, Bytes], None], row_bytes: int) -> None:
        self.fill, self.row_bytes = fill, row_bytes
        self.list: list[Rows] = []

    def __len__(self) -> int:
        return len(self.list)

    def __getitem__(self, rows: Rows) -> Any:
        import torch

        out = torch.empty(len(rows), self.row_bytes, dtype=torch.uint8)
        self.fill(rows, out.numpy())
        return torch.from_numpy(rows), out


class ByProcesses(Peer):
    """Read by worker processes of PyTorch's DataLoader, which live on from pass to pass."""

    workers = f"{WORKERS} processes"

    def fill(self, rows: Rows, out: Bytes) -> None:
        raise NotImplementedError

    @cached_property
    def _order(self) -> list[Rows]:
        return []

    @cached_property
    def _loader(self) -> Any:
        from torch.utils.data import DataLoader

        data: Any = _Batches(self.fill, self.setting.row_bytes)
        kept = {"num_workers": WORKERS, "prefetch_factor": AHEAD // WORKERS, "persistent_workers": True}
        return DataLoader(data, batch_size=None, sampler=self._order, **kept)

    def batches(self, order: Rows) -> Iterator[Batch]:
        size = self.setting.batch
        self._order[:] = [order[start : start + size] for start in range(0, len(order), size)]
        for rows, out in self._loader:
            yield rows.numpy(), out.numpy()


# ---- feedfast


class Feedfast(Peer):
    """The cache as training reads it: checksums, commit log and fill value are checked."""

    compression: Any = "none"

    @cached_property
    def _reader(self) -> Any:
        from feedfast.storage.reader import CacheReader

        return CacheReader(self.folder, threads=WORKERS)

    def write(self, rows: Bytes) -> None:
        from feedfast.storage.schema import DatasetInfo, DecoderInfo, Manifest, PlanInfo, TapInfo, TeacherInfo
        from feedfast.storage.writer import CacheWriter, open_for_writing

        setting = self.setting
        height, width, channels = setting.shape
        tap = TapInfo(
            name="map", path="x", position="pre", shape=(channels, height, width), compression=self.compression
        )
        half = (0.5, 0.5, 0.5)
        teacher = TeacherInfo(
            name="a", model="made up", weights_sha256="0" * 64, mean=half, std=half, taps={"map": tap}
        )
        plan: Any = {"algorithm": "x", "seed": 0, "size": height, "augment": "none"}
        manifest = Manifest(
            dataset=DatasetInfo(kind="pixels", count=setting.rows, fingerprint={"ids": "x"}),
            plan=PlanInfo(granule=setting.granule, window=setting.window, **plan),
            decoder=DecoderInfo(backend="pixels"),
            num_rows=setting.rows,
            views=1,
            batch_rows=setting.batch,
            teachers={"a": teacher},
        )
        stored = open_for_writing(self.folder, manifest)
        with CacheWriter(self.folder, stored) as writer:
            writer.put("targets/a/map/scale", np.stack([np.zeros(channels, "<f4"), np.ones(channels, "<f4")]))
            for start in range(0, setting.rows, 64):
                writer.append("targets/a/map/codes", 0, start, rows[start : start + 64].reshape(-1, *setting.shape))

    def batches(self, order: Rows) -> Iterator[Batch]:
        name, size = "targets/a/map/codes", self.setting.batch
        stream = self._reader.stream([name], 0, order, size, max_buffer_bytes=self.setting.bound_bytes)
        for number, arrays in enumerate(stream):
            yield order[number * size : (number + 1) * size], arrays[name].reshape(-1, self.setting.row_bytes)

    def release(self) -> None:
        self._reader.close()


class FeedfastZstd(Feedfast):
    """The same with zstd frames."""

    compression = "zstd"


# ---- ceilings


class Sequential(Peer):
    """The ceiling: the same bytes in file order, by two threads, straight into batch buffers; nothing is checked."""

    stored = PLAIN

    def write(self, rows: Bytes) -> None:
        self.folder.mkdir(parents=True)
        rows.tofile(self.folder / "rows.bin")

    def batches(self, order: Rows) -> Iterator[Batch]:
        fd = os.open(self.folder / "rows.bin", os.O_RDONLY)
        size = self.setting.row_bytes

        def fill(rows: Rows, out: Bytes) -> None:
            flat = out.reshape(-1)
            for start in range(0, flat.nbytes, PIECE_BYTES):
                os.preadv(fd, [flat[start : start + PIECE_BYTES]], int(rows[0]) * size + start)

        try:
            yield from by_threads(np.sort(order), self.setting, fill)
        finally:
            os.close(fd)


class Decoder(Feedfast):
    """The decoder's own rate: feedfast's frames, held in memory, into one buffer per thread, over and over."""

    stored = "feedfast zstd"

    @cached_property
    def _frames(self) -> tuple[list[list[Bytes]], int]:
        from feedfast.storage.blocks import index_length, parse_index
        from feedfast.storage.layout import NO_CHUNK

        spec, frames = self._reader.specs["targets/a/map/codes"], []
        for shard in range(spec.num_shards):
            data = np.fromfile(self.folder / spec.name / spec.key(0, shard), np.uint8)
            tail = data[-index_length(spec.blocks_per_shard) :]
            index = parse_index(tail, spec.blocks_per_shard, data.nbytes).tolist()
            frames += [data[offset : offset + length] for offset, length in index if offset != NO_CHUNK]
        return [frames[number::WORKERS] for number in range(WORKERS)], spec.block_rows

    def batches(self, order: Rows) -> Iterator[Batch]:
        from numcodecs import zstd

        shares, block_rows = self._frames
        outs = [np.empty((block_rows, self.setting.row_bytes), np.uint8) for _ in shares]

        def decode(share: list[Bytes], out: Bytes) -> None:
            for frame in share:
                zstd.decompress(frame, out)

        threads = [threading.Thread(target=decode, args=pair) for pair in zip(shares, outs, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield order, np.broadcast_to(outs[0][0], (len(order), self.setting.row_bytes))


# ---- what people do today


class Memmap(Peer):
    """np.memmap over one file; rows are gathered by np.take."""

    stored = PLAIN

    def batches(self, order: Rows) -> Iterator[Batch]:
        setting = self.setting
        mapped = np.memmap(self.folder / "rows.bin", np.uint8, "r", shape=(setting.rows, setting.row_bytes))
        plain = mapped.view(np.ndarray)

        def fill(rows: Rows, out: Bytes) -> None:
            np.take(plain, rows, axis=0, out=out, mode="clip")

        yield from by_threads(order, setting, fill)


class TorchFiles(ByProcesses):
    """One file per sample, torch.save and torch.load."""

    def write(self, rows: Bytes) -> None:
        import torch

        for number, row in enumerate(rows):
            place = self._path(number)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(row.copy()), place)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number // 1000:04d}" / f"{number:08d}.pt"

    def fill(self, rows: Rows, out: Bytes) -> None:
        import torch

        for row, number in zip(out, rows.tolist(), strict=True):
            row[:] = torch.load(self._path(number), weights_only=True).numpy()


class Hdf5(ByProcesses):
    """One chunked data set, a row per chunk, read by h5py's direct chunk reads, eight times faster at 4 KB."""

    checksum = False

    def write(self, rows: Bytes) -> None:
        import h5py

        self.folder.mkdir(parents=True)
        with h5py.File(self.folder / "rows.h5", "w", libver="latest") as file:
            made = file.create_dataset(
                "rows", rows.shape, "u1", chunks=(1, rows.shape[1]), fletcher32=self.checksum or None
            )
            for start in range(0, len(rows), 64):
                made[start : start + 64] = rows[start : start + 64]

    @cached_property
    def _data(self) -> Any:
        import h5py

        # in the worker: HDF5 lets one thread in at a time; a row is read once, so a chunk cache only costs a copy
        return h5py.File(self.folder / "rows.h5", "r", rdcc_nbytes=0)["rows"]

    def fill(self, rows: Rows, out: Bytes) -> None:
        read = self._data.id.read_direct_chunk
        for place, number in enumerate(rows.tolist()):
            read((number, 0), out=out[place])


class Hdf5Checked(Hdf5):
    """The same with HDF5's own checksum filter, which direct chunk reads would skip."""

    checksum = True

    def fill(self, rows: Rows, out: Bytes) -> None:
        for place, number in enumerate(rows.tolist()):
            self._data.read_direct(out, np.s_[number], np.s_[place])


class Zarr(Peer):
    """zarr-python, not compressed: small rows 64 to a chunk, batches by orthogonal selection; large ones singly.

    Of 1, 4, 16, 64 rows per chunk, with and without shards, by rows or by selection, the fastest at each size of row.
    """

    @property
    def _small(self) -> bool:
        return self.setting.row_bytes < 16 << 10

    def write(self, rows: Bytes) -> None:
        import zarr

        chunk = 64 if self._small else 1
        made: Any = zarr.create_array(
            store=str(self.folder), shape=rows.shape, dtype="u1", chunks=(chunk, rows.shape[1]), compressors=None
        )
        for start in range(0, len(rows), 64):
            made[start : start + 64] = rows[start : start + 64]

    @cached_property
    def _array(self) -> Any:
        import zarr

        return zarr.open_array(store=str(self.folder), mode="r")

    def batches(self, order: Rows) -> Iterator[Batch]:
        array = self._array

        def fill(rows: Rows, out: Bytes) -> None:
            if self._small:
                places = np.argsort(rows)
                out[places] = array.oindex[rows[places]]
                return
            for place, number in enumerate(rows.tolist()):
                out[place] = array[number]

        yield from by_threads(order, self.setting, fill)


class Lmdb(Peer):
    """LMDB, a value per row; opened read-only, without lock or read-ahead, values taken as buffers."""

    def _open(self, **options: Any) -> Any:
        import lmdb

        return lmdb.open(str(self.folder), **options)

    def write(self, rows: Bytes) -> None:
        self.folder.mkdir(parents=True)
        size = 2 * rows.nbytes + (64 << 20) + 8192 * len(rows)
        with self._open(map_size=size) as env:
            for start in range(0, len(rows), 64):
                with env.begin(write=True) as txn:
                    for number in range(start, min(start + 64, len(rows))):
                        txn.put(number.to_bytes(8, "big"), rows[number].tobytes(), append=True)

    def batches(self, order: Rows) -> Iterator[Batch]:
        env = self._open(readonly=True, lock=False, readahead=False, meminit=False)

        def fill(rows: Rows, out: Bytes) -> None:
            with env.begin(buffers=True) as txn:
                for row, number in zip(out, rows.tolist(), strict=True):
                    row[:] = np.frombuffer(txn.get(number.to_bytes(8, "big")), np.uint8)

        try:
            yield from by_threads(order, self.setting, fill)
        finally:
            env.close()


class WebDataset(Peer):
    """safetensors in tar shards, in an order of its own: shards permuted, samples mixed in buffers of one window."""

    workers = f"{WORKERS} processes"

    def write(self, rows: Bytes) -> None:
        import webdataset as wds
        from safetensors.numpy import save

        self.folder.mkdir(parents=True)
        most = -(-len(rows) // TAR_SHARDS)
        with wds.ShardWriter(str(self.folder / "%03d.tar"), maxcount=most, maxsize=1 << 40, verbose=0) as sink:
            for number, row in enumerate(rows):
                sink.write({"__key__": f"{number:08d}", "safetensors": save({"map": row})})

    @cached_property
    def _loader(self) -> Any:
        import torch
        import webdataset as wds
        from safetensors.numpy import load

        def sample(item: dict[str, Any]) -> tuple[int, Bytes]:
            return int(item["__key__"]), load(item["safetensors"])["map"]

        def collate(items: list[tuple[int, Bytes]]) -> tuple[Any, Any]:
            out = torch.empty(len(items), self.setting.row_bytes, dtype=torch.uint8)
            np.stack([item[1] for item in items], out=out.numpy())
            return torch.tensor([item[0] for item in items]), out

        shards = [str(file) for file in sorted(self.folder.glob("*.tar"))]
        mixed = self.setting.granule * self.setting.window // WORKERS
        data = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(mixed, initial=mixed)
        data = data.map(sample).batched(self.setting.batch, collation_fn=collate)
        kept = {"num_workers": WORKERS, "prefetch_factor": AHEAD // WORKERS, "persistent_workers": True}
        return wds.WebLoader(data, batch_size=None, **kept)

    def batches(self, order: Rows) -> Iterator[Batch]:
        for rows, out in self._loader:
            yield rows.numpy(), out.numpy()


PEERS: Final[dict[str, type[Peer]]] = {
    "sequential": Sequential,
    "zstd decoder": Decoder,
    "feedfast": Feedfast,
    "feedfast zstd": FeedfastZstd,
    "memmap": Memmap,
    "lmdb": Lmdb,
    "hdf5": Hdf5,
    "hdf5 fletcher32": Hdf5Checked,
    "webdataset": WebDataset,
    "zarr": Zarr,
    "pt": TorchFiles,
}
CEILINGS: Final = ("sequential", "zstd decoder")
