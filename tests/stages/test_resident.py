"""Targets held in memory: the batches of a run that reads its cache in every pass, and not a byte read twice."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_files import Values, small_manifest, write_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import digits_recipe

import feedfast
from feedfast.data.passes import pass_order
from feedfast.errors import CacheDamageError, RequestError
from feedfast.recipe import Recipe
from feedfast.stages.loop import rank_rows
from feedfast.stages.memory import available_bytes
from feedfast.stages.offline import run_cache
from feedfast.stages.resident import Resident, chosen, resident
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker, ranks_here
from feedfast.storage import shards
from feedfast.storage.reader import CacheReader

ROWS, GIB = 300, 1 << 30
Cache = tuple[Path, Values]
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("resident") / "c.zarr"
    return path, write_cache(path, small_manifest())


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the blocks read from shards, one entry per read."""
    read: list[int] = []
    whole = shards.OpenShard.read

    def counted(self: shards.OpenShard, blocks: Any, targets: Any) -> None:
        read.append(sum(part.nbytes for parts in targets for part in parts))
        whole(self, blocks, targets)

    monkeypatch.setattr(shards.OpenShard, "read", counted)
    return read


def sharded(reader: CacheReader) -> list[str]:
    return [name for name, spec in reader.specs.items() if spec.sharded]


def walk(
    held: Resident, values: Values, arrays: list[str], view: int, rows: np.ndarray, batch: int, start: int = 0
) -> None:
    """Every batch against what was written."""
    number = start
    for item in held.stream(arrays, view, rows, batch, start_batch=start):
        here = rows[number * batch : (number + 1) * batch]
        assert item.keys() == set(arrays)
        for array in arrays:
            found = torch.as_tensor(item[array]).cpu().numpy()
            assert found.dtype == values[array].dtype
            assert np.array_equal(found, values[array][view, here]), (array, number)
            found[...] = 0  # a batch is the consumer's: nothing that is held may change with it
        number += 1
    assert number == -(-len(rows) // batch)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 80),
    world=st.sampled_from([1, 2, 3]),
    passes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=5),
    few=st.booleans(),
)
def test_every_batch_is_that_of_the_cache(
    device: torch.device, cache: Cache, batch: int, world: int, passes: list[tuple[int, int, int]], few: bool
) -> None:
    """Any batch size and rank, passes that start anywhere (as of a resumed run), and some arrays before the others."""
    path, values = cache
    with CacheReader(path) as reader:
        arrays = sharded(reader)
        held = Resident(reader, arrays, 2, device)
        if few:
            walk(held, values, arrays[:2], 0, np.arange(ROWS), batch)
        for number, (view, pass_index, start) in enumerate(passes):
            order = pass_order(ROWS, 0, view, pass_index, 16, 4)
            rows = rank_rows(order, batch * world, number % world, world)
            walk(held, values, arrays, view, rows, batch, min(start, len(rows) // batch))


def test_the_second_pass_reads_nothing(cache: Cache, blocks_read: list[int]) -> None:
    path, values = cache
    with CacheReader(path) as reader:
        arrays = sharded(reader)
        held = Resident(reader, arrays, 2, CPU)
        walk(held, values, arrays, 1, np.arange(ROWS), 32)
        specs = [reader.specs[array] for array in arrays]
        assert sum(blocks_read) == sum(-(-ROWS // spec.block_rows) * spec.block_bytes for spec in specs)
        blocks_read.clear()
        for pass_index in (1, 2):
            walk(held, values, arrays, 1, pass_order(ROWS, 0, 1, pass_index, 16, 4), 50)
        assert blocks_read == []
        walk(held, values, arrays, 0, np.arange(ROWS), 32)
        assert blocks_read != [], "another view is another thing"


def test_a_row_that_was_left_out_is_read_when_it_is_needed_and_then_held(cache: Cache, blocks_read: list[int]) -> None:
    """A run resumed in mid-view: of its second pass only the rows before that place are read."""
    path, values = cache
    with CacheReader(path) as reader:
        array = "targets/a/raw/codes"
        spec = reader.specs[array]
        held = Resident(reader, [array], 1, CPU)
        walk(held, values, [array], 0, np.arange(ROWS), 30, start=4)
        blocks_read.clear()
        walk(held, values, [array], 0, pass_order(ROWS, 0, 0, 1, 16, 4), 30)
        assert sum(blocks_read) == -(-120 // spec.block_rows) * spec.block_bytes
        blocks_read.clear()
        walk(held, values, [array], 0, pass_order(ROWS, 0, 0, 2, 16, 4), 30)
        assert blocks_read == []


def test_damage_is_refused_in_the_first_pass_and_never_held(tmp_path: Path) -> None:
    values = write_cache(tmp_path / "c.zarr", small_manifest())
    with CacheReader(tmp_path / "c.zarr") as reader:
        array = "targets/a/raw/codes"
        spec = reader.specs[array]
        shard = 200 // spec.shard_rows
        file = tmp_path / "c.zarr" / array / spec.key(0, shard)
        sound = file.read_bytes()
        at = 200 % spec.shard_rows // spec.block_rows * (spec.block_bytes + 4) + 5
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        held = Resident(reader, [array], 1, CPU)
        items, got = held.stream([array], 0, np.arange(ROWS), 10), []
        with pytest.raises(CacheDamageError, match="does not match its crc32c"):
            got.extend(items)
        assert len(got) == 200 // spec.block_rows * spec.block_rows // 10
        with pytest.raises(CacheDamageError, match="does not match its crc32c"):
            walk(held, values, [array], 0, pass_order(ROWS, 0, 0, 1, 16, 4), 10)
        file.write_bytes(sound)
        walk(held, values, [array], 0, pass_order(ROWS, 0, 0, 1, 16, 4), 10)


def test_a_missing_shard_is_said_at_once(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", small_manifest())
    with CacheReader(tmp_path / "c.zarr") as reader:
        array = "targets/a/raw/codes"
        (tmp_path / "c.zarr" / array / reader.specs[array].key(0, 1)).unlink()
        with pytest.raises(CacheDamageError, match="missing"):
            Resident(reader, [array], 1, CPU).stream([array], 0, np.arange(ROWS), 10)


def test_threads_end_with_the_iterator(cache: Cache) -> None:
    path, values = cache
    with CacheReader(path) as reader:
        held = Resident(reader, ["targets/a/raw/codes"], 1, CPU)
        for pass_index in range(2):
            items: Iterator[Any] = held.stream(held.arrays, 0, pass_order(ROWS, 0, 0, pass_index, 16, 4), 10)
            next(items)
            del items  # dropped in mid-pass
        until = time.monotonic() + 30
        while (left := [t.name for t in threading.enumerate() if t.name.startswith("feedfast-")]) and (
            time.monotonic() < until
        ):
            time.sleep(0.01)
        assert left == []
        walk(held, values, list(held.arrays), 0, np.arange(ROWS), 10)


def test_a_copy_in_another_process_begins_empty(cache: Cache, blocks_read: list[int]) -> None:
    path, values = cache
    with CacheReader(path) as reader:
        held = Resident(reader, ["targets/a/raw/codes"], 2, CPU)
        walk(held, values, list(held.arrays), 0, np.arange(ROWS), 30)
        data = pickle.dumps(held)
        assert len(data) < 10_000, "what is held does not travel"
        blocks_read.clear()
        walk(pickle.loads(data), values, list(held.arrays), 0, np.arange(ROWS), 30)
        assert blocks_read != []


def groups(root: Path, version: int, place: str, levels: dict[str, tuple[object, int, int]]) -> Path:
    """A fake /proc and /sys: group → limit, used, of it held of files that can be given back."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {40 << 20} kB\n")
    line = f"0::{place}" if version == 2 else f"7:cpu,cpuacct:/other\n4:memory:{place}"
    (root / "proc/self/cgroup").write_text(line + "\n")
    base = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    names, prefix = (("memory.max", "memory.current"), "") if version == 2 else (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")  # fmt: skip
    for group, (limit, used, files) in levels.items():
        folder = base / group.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 77\n{prefix}inactive_file {files}\n{prefix}active_file 0\n")
    return root


@pytest.mark.parametrize(
    ("version", "place", "levels", "expected"),
    [
        (2, "/", {}, 40 * GIB),
        (2, "/", {"/": ("max", 3 * GIB, 0)}, 40 * GIB),
        (2, "/job", {"/job": (8 * GIB, 5 * GIB, 2 * GIB)}, 5 * GIB),
        (2, "/job/step", {"/job": (8 * GIB, 6 * GIB, 0), "/job/step": ("max", GIB, 0)}, 2 * GIB),
        (2, "/the/hosts/name", {"/": (16 * GIB, GIB, 0)}, 15 * GIB),
        (1, "/", {"/": (9223372036854771712, GIB, 0)}, 40 * GIB),
        (1, "/docker/x", {"/docker/x": (4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
        (1, "/docker/x", {"/": (4 * GIB, 5 * GIB, 0)}, 0),
    ],
)
def test_what_is_available(
    tmp_path: Path, version: int, place: str, levels: dict[str, tuple[object, int, int]], expected: int
) -> None:
    assert available_bytes(groups(tmp_path, version, place, levels)) == expected


def test_nobody_says_what_is_available(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    here = available_bytes()
    assert here is None or 0 < here < 1 << 50


@pytest.mark.parametrize(
    ("asked", "needed", "available", "again", "kind"),
    [
        ("auto", 5 * GIB, 10 * GIB, True, "ram"),
        ("auto", 5 * GIB + 1, 10 * GIB, True, "disk"),
        ("auto", GIB, 10 * GIB, False, "disk"),
        ("auto", 1, None, True, "disk"),
        ("ram", 9 * GIB, 10 * GIB, False, "ram"),
        ("ram", 9 * GIB, None, True, "ram"),
        ("gpu", 9 * GIB, 10 * GIB, True, "gpu"),
        ("disk", 1, 10 * GIB, True, "disk"),
    ],
)
def test_what_is_chosen(asked: Any, needed: int, available: int | None, again: bool, kind: str) -> None:
    assert chosen(asked, needed, available, again=again)[0] == kind


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"train.residency: 'ram' holds 11.0 GiB in memory, .* found 10.0 GiB; lower"
    ):
        chosen("ram", 11 * GIB, 10 * GIB, again=True)


def test_auto_counts_what_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The rows of these arrays, of the views that are walked, once per rank of this machine; said in one line."""
    caplog.set_level(logging.INFO, "feedfast")
    with CacheReader(cache[0]) as reader:
        arrays = ["targets/a/dense/codes", "targets/a/logits/codes"]
        row = 8 * 4 * 4 + 2 * 10
        for views, walked, ranks, counted in ((2, 9, 1, 2), (1, 9, 1, 1), (2, None, 1, 2), (2, 9, 3, 6)):
            for spare, found in ((0, True), (-1, False)):
                caplog.clear()
                room = 2 * (ROWS * row * counted + spare)
                monkeypatch.setattr("feedfast.stages.resident.available_bytes", lambda room=room: room)
                held = resident("auto", reader, arrays, CPU, views=views, walked=walked, ranks=ranks)
                assert (held is not None) is found
                (line,) = caplog.messages
                assert line.startswith("residency: ")
        assert resident("auto", reader, arrays, CPU, views=2, walked=2) is None, "no view is walked twice"
        assert resident("auto", reader, [], CPU, views=2, walked=9) is None


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}, 3),
    ],
)
def test_ranks_of_this_machine(env: dict[str, str], ranks: int) -> None:
    assert ranks_here(env) == ranks


# Runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one teacher with its pixels, two views."""
    folder = tmp_path_factory.mktemp("runs")
    run_cache(recipe_for(folder, "disk"))
    return folder


def recipe_for(folder: Path, residency: str, **train: Any) -> Recipe:
    section = {"epochs": 6, "eval_every": 0, "residency": residency, "out": str(folder / residency), **train}
    return digits_recipe(folder, teachers=1, cache={"images": "stored"}, method={"name": "pfeed"}, train=section)


def told(run: StudentRun, steps: range) -> list[Any]:
    """What the loop gets, epoch by epoch, from the first step on; of each batch rows, pixels, labels and codes."""
    out: list[Any] = []
    step = steps.start
    while step < steps.stop:
        for batch in run.loop.batches(step):
            codes: Any = batch.targets["a"]["final"]
            out.append((batch.rows, batch.images, batch.annotations, codes.data))
            step += 1
    return out


@pytest.mark.parametrize("start", [0, 3, 14])
def test_a_run_gets_the_same_batches(world: Path, start: int, blocks_read: list[int]) -> None:
    """Eight epochs over two views, from the start and resumed in mid-view; of a view that was walked nothing is read.

    Batches of 40 leave no row out. From step 30 on, both views have been walked.
    """
    found, read = {}, {}
    for residency in ("disk", "ram"):
        run = StudentRun(recipe_for(world, residency, epochs=8, batch=40), Worker())
        blocks_read.clear()
        found[residency] = told(run, range(start, 30))
        early = sum(blocks_read)
        blocks_read.clear()
        found[residency] += told(run, range(30, 40))
        read[residency] = early, sum(blocks_read)
        run.close()
    assert len(found["disk"]) == 40 - start
    for one, two in zip(found["disk"], found["ram"], strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert read["ram"][1] == 0 < read["disk"][1]
    assert read["ram"][0] < read["disk"][0]


def test_a_run_may_go_on_with_another_residency(world: Path, tmp_path: Path) -> None:
    """It decides nothing: half a run each way ends with the losses of a whole one."""
    whole = run_train(recipe_for(world, "disk", epochs=3, out=str(tmp_path / "whole")))
    run_train(recipe_for(world, "auto", epochs=3, out=str(tmp_path / "halves"), max_steps=7))
    halves = run_train(recipe_for(world, "ram", epochs=3, out=str(tmp_path / "halves")))
    assert halves["steps"] == 18
    assert halves["final_loss"] == whole["final_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_no_gpu_to_hold_them(world: Path) -> None:
    with pytest.raises(RequestError, match=r"train.residency: 'gpu' .* expected a CUDA device, found cpu"):
        StudentRun(recipe_for(world, "gpu"), Worker())
    with pytest.raises(RequestError, match=r"residency: 'gpu' .* expected a CUDA device, found cpu"):
        feedfast.open_cache(world / "digits.zarr").epochs(32, residency="gpu")


def test_epochs_of_a_loop_of_ones_own(world: Path, blocks_read: list[int]) -> None:
    cache = feedfast.open_cache(world / "digits.zarr")
    loaders = [cache.epochs(40, residency=kind) for kind in ("disk", "ram")]
    for epoch in range(4):
        pairs = []
        for loader in loaders:
            blocks_read.clear()
            pairs.append(list(loader))
        assert (sum(blocks_read) == 0) is (epoch >= 2)
        for one, two in zip(*pairs, strict=True):
            assert np.array_equal(one.rows, two.rows)
            assert torch.equal(one.images, two.images)
            for tap, codes in one.targets["a"].items():
                other: Any = two.targets["a"][tap]
                assert torch.equal(getattr(codes, "data", codes), getattr(other, "data", other))
