"""What goes wrong with a cache, a disk or a file, as the person at the keyboard meets it.

Each damage must end in one error that names the thing, before wrong numbers reach a student: for `feedfast train`, for
a training loop on `open_cache(...).stream`, and in the list of `feedfast verify`. Where `feedfast cache` can repair,
the digest of the repaired cache is that of the whole one. The caches are of real digits, written by the offline stage.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Outcome, feedfast
from small import as_toml, digits_recipe, write_teacher

import feedfast as ff
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.storage.blocks import crc32c
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader

FINAL, OFD3, LOGITS = "targets/a/final/codes", "targets/a/ofd3/codes", "targets/a/logits/codes"
LOG = "commits/part-0-of-1.jsonl"


class World:
    """A small cache, its recipe file, and a folder for what is made from it."""

    def __init__(self, folder: Path, **sections: object) -> None:
        self.folder, self.sections = folder, sections

    def recipe(self, *overrides: str, **sections: object) -> Recipe:
        merged = {"teachers": 1, **self.sections, **sections}
        return digits_recipe(self.folder, overrides, **merged)  # type: ignore[arg-type]

    @property
    def cache(self) -> Path:
        return self.folder / "digits.zarr"

    def file(self, *overrides: str) -> Path:
        return as_toml(self.recipe(*overrides), self.folder / "recipe.toml")

    def train(self, *arguments: str) -> Outcome:
        return feedfast("train", self.file(), "method.name=ofd", "train.replay=1", *arguments)

    @property
    def student(self) -> Path:
        return self.folder / "student"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("faults"))
    assert feedfast("cache", world.file(), "cache.shard_mb=0.0625").code == 0
    specs = CacheReader(world.cache).specs
    # Both compressions are there, and several shards of each: else the tests below would not test what they say.
    assert specs[FINAL].compression == "zstd"
    assert specs[OFD3].compression == "none"
    assert specs[OFD3].num_shards == specs[FINAL].num_shards == 4
    return world


@pytest.fixture
def world(whole: World, tmp_path: Path) -> World:
    """A copy to be damaged."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def verified(world: World, *arguments: str) -> list[dict[str, str]]:
    """The problems that verify lists, which must not be empty; its exit code and ``ok`` say so."""
    outcome = feedfast("verify", world.cache, *arguments)
    assert outcome.code == 1
    assert outcome.document["ok"] is False
    problems: list[dict[str, str]] = outcome.document["problems"]
    assert problems
    for entry in problems:
        assert entry["kind"] in outcome.err
    return problems


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 7),
    "zero-length": lambda path: os.truncate(path, 0),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: flip(path, path.stat().st_size // 3),
}
BY_LENGTH = ("removed", "truncated", "zero-length", "too long")
# Rows 64..127 of the second view: the student's ninth batch of 32 is the first that needs them.
METHOD = {FINAL: "pfeed", OFD3: "ofd", LOGITS: "kd"}  # that reads the array
SECOND = {FINAL: "c/1/1/0/0/0", OFD3: "c/1/1/0/0/0", LOGITS: "c/1/0/0"}


@pytest.mark.parametrize(
    ("array", "damage"), [(array, damage) for array in (FINAL, OFD3) for damage in DAMAGES] + [(LOGITS, "flipped")]
)
def test_a_damaged_shard_reaches_no_student(world: World, array: str, damage: str) -> None:
    DAMAGES[damage](world.cache / array / SECOND[array])
    outcome = world.train(f"method.name={METHOD[array]}")
    assert outcome.code == 1
    assert array in outcome.error
    assert SECOND[array] in outcome.error
    assert not (world.student / "student.pt").exists()
    steps = [row["step"] for row in read_metrics(world.student / "metrics.jsonl") if "loss" in row]
    # What a look at the file shows ends the run before its first step, everything else before the batch it concerns.
    assert steps == ([] if damage in BY_LENGTH else list(range(1, 9)))

    assert array in stopped_stream(world, batches=7 + 2 if damage not in BY_LENGTH else None)
    found = verified(world, *(["--full"] if damage not in BY_LENGTH else []))
    kind = "missing" if damage == "removed" else "length" if damage in BY_LENGTH else None
    assert {(entry["array"], entry["shard"]) for entry in found} == {(array, SECOND[array])}
    assert kind is None or {entry["kind"] for entry in found} == {kind}


@pytest.mark.parametrize("damage", ["removed", "zero-length", "flipped"])
@pytest.mark.parametrize("array", ["views/order", "views/window", "views/flip", "targets/a/ofd3/scale"])
def test_a_damaged_small_array_reaches_no_student(world: World, array: str, damage: str) -> None:
    (path,) = (file for file in (world.cache / array / "c").rglob("*") if file.is_file() and "/c/0" in str(file))
    DAMAGES[damage](path)
    outcome = world.train()
    assert outcome.code == 1
    assert array in outcome.error
    assert read_metrics(world.student / "metrics.jsonl") == []
    assert array in stopped_stream(world)
    assert array in {entry["array"] for entry in verified(world, "--full")}


def test_damaged_labels_are_reported(world: World) -> None:
    flip(world.cache / "samples" / "label" / "c" / "0", 40)
    assert "samples/label" in world.train().error
    assert "samples/label" in stopped_stream(world)
    assert {entry["array"] for entry in verified(world, "--full")} == {"samples/label"}


@pytest.mark.parametrize("array", ["views/order", "views/window", "views/flip", "samples/label"])
def test_changed_plan_arrays_with_a_right_checksum(world: World, array: str) -> None:
    """An array rewritten by somebody, checksum and all, is not what the plan and the data say."""
    file = world.cache / array / "c" / {"views/window": "1/0/0", "samples/label": "0"}.get(array, "1/0")
    content = bytearray(file.read_bytes()[:-4])
    dtype = CacheReader(world.cache).specs[array].dtype
    values = np.frombuffer(content, dtype)
    values[-1 if array != "samples/label" else 0] += 1
    if array == "views/order":
        values[[3, 4]] = values[[4, 3]]
        values[-1] -= 1
    file.write_bytes(bytes(content) + int(crc32c(np.frombuffer(content, np.uint8))).to_bytes(4, "little"))
    outcome = world.train()
    assert outcome.code == 1
    assert array in outcome.error
    assert array in stopped_stream(world)
    assert array in {entry["array"] for entry in verified(world, "--full")}
    assert array in {entry["array"] for entry in verified(world, "--replay", "1", "--recipe", str(world.file()))}


def stopped_stream(world: World, batches: int | None = None) -> str:
    """The error that ends a loop over both views, after ``batches`` batches of 32 (a view has seven)."""
    seen = []

    def loop() -> None:
        cache = ff.open_cache(world.cache, data=str(world.folder / "digits-train.npz"), replay=1)
        for view in range(2):
            seen.extend(batch.rows for batch in cache.stream(view, 32, drop_last=False))

    with pytest.raises(ff.CacheDamageError) as caught:
        loop()
    assert batches is None or len(seen) == batches
    assert caught.value.exit_code == 1
    assert caught.value.problems
    return str(caught.value)


def test_a_torn_log_is_an_incomplete_cache_and_is_repaired(world: World) -> None:
    digest = cache_digest(world.cache)
    log = world.cache / LOG
    last = json.loads(log.read_bytes().splitlines()[-1])
    os.truncate(log, log.stat().st_size - 30)
    reader = {"final": "pfeed", "logits": "kd"}.get(last["array"].split("/")[2], "ofd")
    error = world.train(f"method.name={reader}").error
    assert "incomplete" in error
    assert last["array"] in error
    assert last["shard"] in error
    assert "incomplete" in stopped_stream(world)
    assert {entry["kind"] for entry in verified(world)} == {"log-torn", "incomplete"}
    repaired = feedfast("cache", world.file(), "cache.shard_mb=0.0625")
    assert repaired.code == 0, repaired.err
    assert repaired.document["digest"] == digest
    assert 0 < repaired.document["rows_written"] <= 200
    assert feedfast("verify", world.cache, "--full").code == 0


REPAIRED = [
    *((array, SECOND[array], damage) for array in (FINAL, LOGITS) for damage in BY_LENGTH),
    ("views/window", "c/1/0/0", "removed"),
    ("samples/label", "c/0", "truncated"),
    ("targets/a/ofd3/scale", "c/0/0", "removed"),
    ("targets/a/final/scale", "c/0/0", "zero-length"),
]


def test_the_same_command_repairs_lost_objects(world: World) -> None:
    digest, files = cache_digest(world.cache), contents(world.cache)
    for array, shard, damage in REPAIRED:
        DAMAGES[damage](world.cache / array / shard)
        outcome = feedfast("cache", world.file(), "cache.shard_mb=0.0625")
        assert outcome.code == 0, (array, damage, outcome.err)
        assert outcome.document["digest"] == digest
        assert outcome.document["complete"]
        assert contents(world.cache) == files, (array, damage)
    assert feedfast("verify", world.cache, "--full").code == 0


def test_a_flipped_shard_is_repaired_once_it_is_deleted(world: World) -> None:
    """The cure that the message names."""
    digest, file = cache_digest(world.cache), world.cache / OFD3 / SECOND[OFD3]
    flip(file, 100)
    assert "delete the file" in world.train().error
    file.unlink()
    assert feedfast("cache", world.file(), "cache.shard_mb=0.0625").document["digest"] == digest
    assert world.train("train.max_steps=1", "overwrite=true").code == 0


def contents(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.glob("*/**/c/**/*") if file.is_file()}


@pytest.mark.parametrize("other", ["seed=7", "data.limit=19", "teachers.0.bn=batch"])
def test_the_manifest_of_another_recipes_cache(world: World, tmp_path: Path, other: str) -> None:
    stranger = tmp_path / "stranger.zarr"
    feedfast("cache", world.file(), f"cache.path={stranger}", "cache.shard_mb=0.0625", "cache.pilot=16", other)
    shutil.copy(stranger / "zarr.json", world.cache / "zarr.json")
    outcome = world.train(other)  # even with the recipe that the manifest is of
    assert outcome.code == 1
    assert str(world.cache) in outcome.error
    for error in (outcome.error, stopped_stream(world)):
        assert "manifest-digest" in error or "log-damaged" in error
    assert "manifest-digest" in {entry["kind"] for entry in verified(world)}
    refused = feedfast("cache", world.file(other), "cache.shard_mb=0.0625")
    assert refused.code == 1
    assert "commit log" in refused.error


def test_changed_images_of_the_same_number(world: World) -> None:
    file = world.folder / "digits-train.npz"
    with np.load(file) as found:
        images, labels = found["images"].copy(), found["labels"]
    images[3, 5, 5] ^= 0x40
    np.savez(file, images=images, labels=labels)
    outcome = world.train()
    assert outcome.code == 2
    assert "dataset" in outcome.error
    assert str(world.cache) in outcome.error
    assert read_metrics(world.student / "metrics.jsonl") == []
    with pytest.raises(ff.CacheMismatchError, match="dataset"):
        ff.open_cache(world.cache, data=str(file))
    problems = verified(world, "--replay", "1", "--recipe", str(world.folder / "recipe.toml"))
    assert {entry["kind"] for entry in problems} == {"pixels"}
    assert "dataset" in feedfast("cache", world.file(), "cache.shard_mb=0.0625").error


def test_a_change_outside_the_fingerprint_is_found_by_replay(tmp_path: Path) -> None:
    """The fingerprint samples 256 images, the cache hashes all of them. One image of 1,437 is changed, and named."""
    world = World(tmp_path)
    everything = ("data.limit=0", "cache.views=1", "cache.pilot=32", "teachers.0.taps=[]", "method.name=kd")
    assert feedfast("cache", world.file(), *everything).code == 0
    file = world.folder / "digits-train.npz"
    with np.load(file) as found:
        images, labels = found["images"].copy(), found["labels"]
    changed = next(i for i in range(len(images)) if i not in np.linspace(0, len(images) - 1, 256).astype(int))
    images[changed] = 255 - images[changed]
    np.savez(file, images=images, labels=labels)
    problems = verified(world, "--replay", "999")
    assert [entry["kind"] for entry in problems] == ["pixels"]
    named = f"digits-train.npz[{changed}] (sample {changed}): the image has changed"
    assert named in problems[0]["detail"]
    outcome = feedfast("train", world.file(), *everything, "train.replay=999")
    assert outcome.code == 2
    assert named in outcome.error


def test_other_weights_under_the_same_name(world: World) -> None:
    write_teacher(world.folder / "a.pt", seed=77)
    for command in ("train", "cache"):
        outcome = feedfast(command, world.file(), "cache.shard_mb=0.0625")
        assert outcome.code == 2
        for word in ("teachers.a.weights_sha256", str(world.cache)):
            assert word in outcome.error
    outcome = feedfast("verify", world.cache, "--teachers", "10", "--recipe", world.folder / "recipe.toml")
    assert outcome.code == 2
    assert "a.pt" in outcome.error
    assert not (world.student / "student.pt").exists()


@pytest.fixture(scope="module")
def stranger(whole: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that differs in its teacher's weights alone, and in those little."""
    folder = tmp_path_factory.mktemp("stranger")
    path, weights = folder / "c.zarr", folder / "a.pt"
    state = torch.load(whole.folder / "a.pt", weights_only=True)
    state["block3.0.conv2.weight"] *= 1.02
    torch.save(state, weights)
    other = (f"cache.path={path}", f"teachers.0.weights={weights}", "cache.shard_mb=0.0625")
    assert feedfast("cache", whole.file(), *other).code == 0
    return path


@pytest.mark.parametrize("array", [OFD3, LOGITS, "targets/a/ofd3/scale"])
@pytest.mark.parametrize("origin", ["another cache", "another view"])
def test_a_sound_object_of_somewhere_else(world: World, stranger: Path, array: str, origin: str) -> None:
    """Same name, same length, every checksum in it right: maps of other weights or crops are not taken for these."""
    shard = SECOND.get(array, "c/0/0")
    if origin == "another cache":
        source = stranger / array / shard
    elif array.endswith("scale"):
        source = world.cache / "targets/a/final/scale" / shard
    else:
        source = world.cache / array / shard.replace("c/1", "c/0")
    target = world.cache / array / shard
    assert source.stat().st_size == target.stat().st_size
    shutil.copy(source, target)
    outcome = world.train(f"method.name={METHOD.get(array, 'ofd')}")
    assert outcome.code == 1
    for word in (array, shard, "of another object"):
        assert word in outcome.error
    assert not (world.student / "student.pt").exists()
    assert "of another object" in stopped_stream(world)
    assert {(entry["array"], entry["shard"]) for entry in verified(world, "--full")} == {(array, shard)}


# ---- a disk that is full


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond ``size`` bytes: a quota without a disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_while_caching(whole: World, tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in ("digits-train.npz", "digits-val.npz", "a.pt"):
        shutil.copy(whole.folder / name, tmp_path / name)
    # Enough for the maps of the last stages, not for those of the first; one thread, so that those are the first.
    with files_up_to(60_000):
        outcome = feedfast("cache", world.file(), "cache.shard_mb=0.0625", "cache.threads=1")
    assert outcome.code == 1
    for word in ("no room for", "targets/a/ofd1/codes", "run the same command again"):
        assert word in outcome.error
    assert not list(world.cache.rglob(".tmp-*"))
    outcome = feedfast("cache", world.file(), "cache.shard_mb=0.0625")
    assert outcome.code == 0, outcome.err
    assert outcome.document["digest"] == cache_digest(whole.cache)
    assert contents(world.cache) == contents(whole.cache)


FULL_DISK = """
import subprocess, sys
from commands import feedfast
disk, recipe = sys.argv[1:]
mount = ["mount", "-t", "tmpfs", "-o"]
subprocess.run([*mount, "size=400k", "disk", disk], check=True)
first = feedfast("cache", recipe)
subprocess.run([*mount, "remount,size=64m", "disk", disk], check=True)
second = feedfast("cache", recipe)
import json
print(json.dumps([first.code, first.error, second.code, second.document["digest"], second.document["complete"]]))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(whole: World, tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*namespace, "mount", "-t", "tmpfs", "-o", "size=1m", "disk", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    recipe = as_toml(
        whole.recipe(f"cache.path={disk / 'digits.zarr'}", "cache.shard_mb=0.0625"), tmp_path / "recipe.toml"
    )
    job = subprocess.run(
        [*namespace, sys.executable, "-c", FULL_DISK, disk, recipe],
        capture_output=True, text=True, check=False, timeout=200, cwd=Path(__file__).parents[1] / "helpers",
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    code, error, then, digest, complete = json.loads(job.stdout.splitlines()[-1])
    assert code == 1
    assert "No space left on device" in error
    assert str(disk) in error
    assert "no room for" in error
    assert complete
    assert then == 0
    assert digest == cache_digest(whole.cache)


def test_no_room_for_a_checkpoint(whole: World, tmp_path: Path) -> None:
    """What could not be saved is lost, the checkpoint before it is not; then the run ends as if nothing had been."""
    out = tmp_path / "student"
    command = ("train", whole.file(), "method.name=ofd", f"train.out={out}")
    assert feedfast(*command, "train.max_steps=6").document["steps"] == 6
    before = (out / "checkpoint.pt").read_bytes()
    with files_up_to(len(before) // 2):
        outcome = feedfast(*command)
    assert outcome.code == 1
    assert f"{out / 'checkpoint.pt'}: no room for" in outcome.error
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob(".*"))
    assert feedfast(*command).document["steps"] == 12
    assert feedfast(*command, f"train.out={tmp_path / 'other'}").document["steps"] == 12
    states = [torch.load(folder / "student.pt", weights_only=True) for folder in (out, tmp_path / "other")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_no_room_for_the_metrics(whole: World, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with files_up_to(3000):
        outcome = feedfast("train", whole.file(), "method.name=ofd", f"train.out={out}")
    assert outcome.code == 1
    assert str(out) in outcome.error
    assert not (out / "student.pt").exists()


def test_files_of_a_run_that_are_no_files_of_a_run(whole: World, tmp_path: Path) -> None:
    out = tmp_path / "student"
    command = ("train", whole.file(), "method.name=kd", "train.max_steps=1", f"train.out={out}")
    assert feedfast(*command).code == 0
    for name, content in {"recipe.json": b"{", "checkpoint.pt": b"", "result.json": b"\xff"}.items():
        sound = (out / name).read_bytes()
        (out / name).write_bytes(content)
        outcome = feedfast(*command)
        if name != "result.json":  # which is written again
            assert outcome.code == 1
            assert str(out / name) in outcome.error
            assert "overwrite=true" in outcome.error
        assert outcome.code in (0, 1), outcome.err
        (out / name).write_bytes(sound)
    (out / "metrics.jsonl").write_bytes(b"[]\n")
    assert feedfast(*command, "train.max_steps=2").code == 0
