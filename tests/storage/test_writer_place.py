"""Rows that are written into their shard's own memory, and waiting until full shards need no more of the processor."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from cache_samples import FINAL, fill_cache, memory_path, objects, rows_of, tiny

from feedfast.storage import writer as writer_module
from feedfast.storage.layout import array_specs
from feedfast.storage.log import cache_digest
from feedfast.storage.writer import CacheWriter, open_for_writing

tmp_path = memory_path


def test_settling_waits_for_the_processor_and_not_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec = array_specs(manifest)[FINAL]
    encoding, synced = threading.Event(), threading.Event()
    real, real_sync = writer_module.encode_shard, os.fsync

    def encode(shard: Any) -> list[Any]:
        encoding.wait(60)
        return real(shard)

    def sync(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):  # folders are made durable before their objects are written
            assert synced.wait(60)
        real_sync(fd)

    monkeypatch.setattr(writer_module, "encode_shard", encode)
    with CacheWriter(tmp_path / "c", manifest, workers=1) as writer:
        monkeypatch.setattr("feedfast.files.os.fsync", sync)
        writer.append(FINAL, 0, 0, rows_of(spec, 0, 0, spec.shard_rows))
        settled = threading.Thread(target=writer.settle)
        settled.start()
        settled.join(0.1)
        assert settled.is_alive()  # its codes are still being checked
        encoding.set()
        settled.join(60)
        assert not settled.is_alive()
        assert writer.shards_written == 0  # the disk has not said that it has them
        synced.set()
    assert writer.shards_written == 1


def test_memory_is_used_again_while_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards whose bytes the kernel has hold no buffer: four go through the memory of one, and none is damaged."""
    fill_cache(tmp_path / "whole", tiny(rows=70, shard_bytes=16 * 32))
    manifest = open_for_writing(tmp_path / "c", tiny(rows=70, shard_bytes=16 * 32))
    spec = array_specs(manifest)[FINAL]
    assert spec.num_shards >= 4
    held, real_sync = threading.Event(), os.fsync

    def sync(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            assert held.wait(60)
        real_sync(fd)

    with CacheWriter(tmp_path / "c", manifest, workers=1, max_in_flight=1) as writer:
        monkeypatch.setattr("feedfast.files.os.fsync", sync)
        for start in range(0, 70, spec.shard_rows):
            writer.append(FINAL, 0, start, rows_of(spec, 0, start, min(start + spec.shard_rows, 70)))
        assert writer.shards_written == 0
        held.set()
    monkeypatch.undo()
    fill_cache(tmp_path / "c", manifest)
    assert objects(tmp_path / "c") == objects(tmp_path / "whole")


@pytest.mark.parametrize("step", [8, 16, 24, 37])
def test_rows_written_into_their_place_are_those_that_are_appended(step: int, tmp_path: Path) -> None:
    """Batches within a shard lie in its memory; those that cross an edge, or that nobody wants, have no place."""
    digests = []
    for name in ("appended", "placed", "again"):
        folder = tmp_path / ("appended" if name == "appended" else "placed")
        manifest = open_for_writing(folder, tiny(rows=70, shard_bytes=30 * 32))
        spec, placed = array_specs(manifest)[FINAL], 0
        with CacheWriter(folder, manifest) as writer:
            for start in range(0, 70, step):
                rows = rows_of(spec, 0, start, min(start + step, 70))
                place = None if name == "appended" else writer.place(FINAL, 0, start, len(rows))
                if place is not None:
                    place[...] = rows
                    placed += 1
                    assert start // spec.shard_rows == (start + len(rows) - 1) // spec.shard_rows
                writer.append(FINAL, 0, start, rows if place is None else place)
        assert (placed > 0) == (name == "placed" and step <= spec.shard_rows)
        digests.append(cache_digest(folder))
    assert digests[0] == digests[1] == digests[2]
