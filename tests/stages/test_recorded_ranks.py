"""Recording on several ranks: the student of the finished cache at as many ranks, and the cache of `feedfast cache`."""

from __future__ import annotations

import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import fill_cache, in_memory, memory_path, rows_of, small_values, standard
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import end_ranks, run_ranks, start_ranks
from small import as_toml, digits_recipe

from feedfast.recipe import Recipe, load_recipe
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.recorded import _rows_of
from feedfast.stages.student import run_train
from feedfast.stages.together import SharedWriter, Together
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker
from feedfast.storage import names
from feedfast.storage.layout import array_specs
from feedfast.storage.log import cache_digest, read_log
from feedfast.storage.reader import CacheReader
from feedfast.storage.writer import CacheWriter, open_for_writing

HELPERS = Path(__file__).parents[1] / "helpers"
memory = memory_path
EXCHANGED, PARTED = 8, 24
"""Rows of a cut, with 16 rows per rank: whole cuts, or not."""


# ---- rows to their writers, with ranks that are threads


class Threads(Together):
    """Ranks of one process that meet at a barrier."""

    def __init__(self, me: Worker, barrier: threading.Barrier, mail: dict[tuple[int, int], np.ndarray]) -> None:
        self.me, self._barrier, self._mail = me, barrier, mail

    def swap(self, out: dict[int, np.ndarray], sizes: dict[int, int]) -> dict[int, np.ndarray]:
        self._mail.update({(self.me.rank, rank): data for rank, data in out.items()})
        self._barrier.wait()
        found = {rank: self._mail.pop((rank, self.me.rank)) for rank in sizes}
        assert {rank: data.nbytes for rank, data in found.items()} == sizes
        self._barrier.wait()
        assert not self._mail, "sent, and nobody expects it"
        self._barrier.wait()
        return found


def in_threads(work: Callable[[int], None], world: int, barrier: threading.Barrier) -> None:
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])


@pytest.fixture(scope="module")
def expected() -> str:
    """Digest of one writer's cache of arrays of every kind; 150 rows, two views."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        return fill_cache(Path(folder, "c"), standard())


@settings(deadline=None, max_examples=8)
@given(
    world=st.integers(1, 4),
    cuts=st.integers(1, 3),
    size=st.sampled_from([3, 8, 16]),
    lost=st.integers(0, 2**32 - 1),
)
def test_every_shard_is_written_once_and_as_one_writer_does(
    expected: str, world: int, cuts: int, size: int, lost: int
) -> None:
    """Any slices of whole cuts, and any shards that are there already."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path, share = Path(folder, "c"), cuts * size
        manifest = open_for_writing(path, standard())
        rng = np.random.default_rng(lost)
        with CacheWriter(path, manifest) as writer:
            for spec in writer.specs.values():
                if not spec.sharded:
                    writer.put(spec.name, small_values(spec))
            for spec in (spec for spec in writer.specs.values() if spec.sharded):
                for shard in np.flatnonzero(rng.random(spec.num_shards) < 0.3).tolist():
                    first, last = spec.shard_span(shard)
                    writer.append(spec.name, 0, first, rows_of(spec, 0, first, last))
        before, barrier, mail = len(read_log(path).commits), threading.Barrier(world), {}

        def record(rank: int) -> None:
            count = manifest.num_rows
            with CacheWriter(path, manifest, part=(rank, world), divided=False) as writer:
                shared = SharedWriter(writer, Threads(Worker(rank, world), barrier, mail), share)
                pending = shared.pending(spec.name for spec in writer.specs.values() if spec.sharded)
                barrier.wait()  # nobody writes before all have looked
                for view in range(manifest.views):
                    for start in range(0, count, share * world):
                        own = start + rank * share
                        for at in range(min(own, count), min(own + share, count), size):
                            stop = min(at + size, count)
                            for name in pending.specs:
                                if pending.lacks(name, view, at, stop):  # as a recorder does
                                    shared.append(name, view, at, rows_of(writer.specs[name], view, at, stop))
                        shared.exchange(view, start, min(start + share * world, count))

        in_threads(record, world, barrier)
        assert cache_digest(path) == expected
        lines = sum(len(file.read_bytes().splitlines()) for file in (path / "commits").glob("*.jsonl"))
        assert lines == len(read_log(path).commits) > before, "a shard has one writer"


def test_what_saturated_is_counted_as_one_writer_does(memory: Path) -> None:
    """Per cut, on its first shard that is not there yet."""
    manifest, name = standard(), names.codes("a", "final")
    alone, ranks = memory / "alone", memory / "ranks"
    manifests = {path: open_for_writing(path, manifest) for path in (alone, ranks)}
    spec = array_specs(manifest)[name]
    for path in (alone, ranks):
        with CacheWriter(path, manifests[path]) as writer:  # the second shard is there
            writer.append(name, 0, spec.shard_rows, rows_of(spec, 0, spec.shard_rows, 2 * spec.shard_rows))
    with CacheWriter(alone, manifests[alone]) as writer:
        for start in range(0, 150, 10):
            writer.append(name, 0, start, rows_of(spec, 0, start, start + 10), saturated=start + 1)
    barrier, mail = threading.Barrier(2), {}

    def record(rank: int) -> None:
        with CacheWriter(ranks, manifests[ranks], part=(rank, 2), divided=False) as writer:
            shared = SharedWriter(writer, Threads(Worker(rank, 2), barrier, mail), 20)
            pending = shared.pending([name])
            barrier.wait()
            for start in range(0, 150, 40):
                for at in range(start + 20 * rank, min(start + 20 * rank + 20, 150), 10):
                    if pending.lacks(name, 0, at, at + 10):
                        shared.append(name, 0, at, rows_of(spec, 0, at, at + 10), saturated=at + 1)
                shared.exchange(0, start, min(start + 40, 150))

    in_threads(record, 2, barrier)
    counts = [{commit.shard: commit.saturated for commit in read_log(path).of(name)} for path in (alone, ranks)]
    assert counts[1] == counts[0]
    assert len(counts[0]) == spec.num_shards > 3


def test_rows_that_are_said_to_be_recorded_are_rows_of_the_view() -> None:
    """Of 80 rows in cuts of 24 the last has 8."""
    for cuts, rows in (([True] * 4, 80), ([False, False, False, True], 8), ([True, False, False, False], 24)):
        assert _rows_of(np.array(cuts), 24, 80) == rows


# ---- whole jobs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits: 200 rows, of which 8 fill no batch of 32; two caches, and the student that two ranks train from each."""
    folder = tmp_path_factory.mktemp("ranks")
    files = []
    for size in (EXCHANGED, PARTED):
        run_cache(recipe_for(folder, folder / f"{size}.zarr", size))
        files.append(
            as_toml(recipe_for(folder, folder / f"{size}.zarr", size, out=f"cached-{size}"), folder / f"c{size}.toml")
        )
    done = run_ranks([HELPERS / "train_all.py", *files])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder


def recipe_for(folder: Path, path: Path, size: int, *, out: str = "", **train: Any) -> Recipe:
    options = {"epochs": 3, "eval_every": 0, "threads": 1, "out": str(folder / out), **train}
    # of 128 rows per stretch, where stretches are recorded first
    cache = {"codec": "u8", "path": str(path), "batch": size, "shard_mb": 3e-4 if size == PARTED else 0.05}
    return digits_recipe(folder, teachers=1, cache=cache, method={"name": "ofd", "alpha": 1e-3}, train=options)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def same_weights(one: Path, two: Path) -> bool:
    ours, theirs = (torch.load(path / "student.pt", weights_only=True) for path in (one, two))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_losses_weights_and_digest_are_those_of_a_finished_cache(world: Path, tmp_path: Path) -> None:
    """Two views recorded, the third epoch reads the first again and mixes its rows; then a student that only reads."""
    files = []
    for size in (EXCHANGED, PARTED):
        for out in ("first", "second"):
            asked = recipe_for(
                world, tmp_path / f"{size}.zarr", size, source="record", out=str(tmp_path / f"{out}-{size}")
            )
            files.append(as_toml(asked, tmp_path / f"{out}-{size}.toml"))
    done = run_ranks([HELPERS / "train_all.py", *files])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr
    for size in (EXCHANGED, PARTED):
        for out in ("first", "second"):
            assert losses(tmp_path / f"{out}-{size}") == losses(world / f"cached-{size}"), (out, size)
            assert same_weights(tmp_path / f"{out}-{size}", world / f"cached-{size}"), (out, size)
        assert len(losses(world / f"cached-{size}")) == 18
        assert cache_digest(tmp_path / f"{size}.zarr") == cache_digest(world / f"{size}.zarr")
        written = [
            len(file.read_bytes().splitlines()) for file in (tmp_path / f"{size}.zarr" / "commits").glob("*.jsonl")
        ]
        assert len(written) == 2
        assert min(written) > 8, "both ranks write"


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 2, 2), (2, 3, 1)])
def test_killed_at_random_moments_student_and_cache_go_on(world: Path, worlds: tuple[int, ...], tmp_path: Path) -> None:
    """SIGKILL of any rank; the others end by themselves, and the next job, perhaps of other ranks, goes on."""
    same, path, out = set(worlds) == {2}, tmp_path / "r.zarr", tmp_path / "out"
    # 24 rows per cut: with batches of 48 two ranks exchange rows, three do not, and one has no need to
    size, batch = (EXCHANGED, 32) if same else (PARTED, 48)
    options = {"source": "record", "out": str(out), "checkpoint_minutes": 1e-9, "batch": batch}
    file, rng, killed = as_toml(recipe_for(world, path, size, **options), tmp_path / "r.toml"), random.Random(7), 0
    said = []
    for count in worlds:
        jobs = start_ranks(["-m", "feedfast", "train", file], count)
        watched = [
            *(path / "commits" / f"part-{rank}-of-{count}.jsonl" for rank in range(count)),
            out / "metrics.jsonl",
        ]
        sizes = [size_of(file) for file in watched]
        while all(job.poll() is None for job in jobs) and sizes == [size_of(file) for file in watched]:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.4)
        victim = rng.choice(jobs)
        if victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            killed += 1
        done = end_ranks(jobs, timeout=150)
        said.append([job.returncode for job in done])
        assert len({code == 0 for code in said[-1]}) == 1, done[0].stderr + done[-1].stderr
    assert killed >= 2, f"the jobs ended before they could be killed: {said}"
    done = run_ranks(["-m", "feedfast", "train", file], worlds[-1])
    assert [job.returncode for job in done] == [0] * worlds[-1], done[0].stderr
    assert cache_digest(path) == cache_digest(world / f"{size}.zarr")
    assert run_verify(str(path), full=True)["ok"]
    assert not same or same_weights(out, world / f"cached-{size}")


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.slow
def test_stopped_continued_alone_and_lost(world: Path, tmp_path: Path) -> None:
    """Two ranks stop in the second view, one process goes on, and shards are lost that the third epoch needs, which
    asks for mixed rows: two ranks record them again."""

    def asked(size: int, **train: Any) -> Path:
        options = {"source": "record", "out": str(tmp_path / str(size)), **train}
        return as_toml(recipe_for(world, tmp_path / f"{size}.zarr", size, **options), tmp_path / f"{size}.toml")

    def by_two(**train: Any) -> None:
        done = run_ranks([HELPERS / "train_all.py", *(asked(size, **train) for size in (EXCHANGED, PARTED))])
        assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr

    by_two(max_steps=8)
    for size in (EXCHANGED, PARTED):
        reader = CacheReader(tmp_path / f"{size}.zarr")
        assert not reader.missing(views=[0])
        assert (
            0 < len(reader.missing(views=[1])) < sum(spec.num_shards for spec in reader.specs.values() if spec.sharded)
        )
    for size in (EXCHANGED, PARTED):
        run_train(load_recipe(asked(size, max_steps=12)))
        assert cache_digest(tmp_path / f"{size}.zarr") == cache_digest(world / f"{size}.zarr")
        for shard in (1, 2):
            (tmp_path / f"{size}.zarr" / "targets/a/final/codes/c/0" / f"{shard}/0/0/0").unlink()
    by_two()
    for size in (EXCHANGED, PARTED):
        assert cache_digest(tmp_path / f"{size}.zarr") == cache_digest(world / f"{size}.zarr")
        assert run_verify(str(tmp_path / f"{size}.zarr"), full=True)["ok"]
        assert len(losses(tmp_path / str(size))) == 18


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["targets/a/final/codes/c/0/1/0/0/0", "pixels/sums/c/1/0"], ids=["amid", "closing"])
def test_a_rank_that_cannot_write_ends_all_with_one_message(world: Path, tmp_path: Path, shard: str) -> None:
    """The second rank: while rows are appended, or when its writer closes and the first waits for it at a barrier."""
    path, out = tmp_path / "r.zarr", str(tmp_path / "out")
    run_train(recipe_for(world, path, EXCHANGED, source="record", out=str(tmp_path / "one"), max_steps=1))
    blocked = path / shard
    blocked.mkdir(parents=True)
    file = as_toml(recipe_for(world, path, EXCHANGED, source="record", out=out), tmp_path / "r.toml")
    done = run_ranks(["-m", "feedfast", "train", file])
    lines = [line for job in done for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert [job.returncode for job in done] == [1, 1], lines
    assert len(lines) == 1
    assert str(blocked) in lines[0]
    assert not any("Traceback" in job.stderr for job in done)
