"""What is read and resumed is what it was: data, teachers, recipes and run folders that have changed are refused.

A run that goes on with other images, weights, labels or somebody else's checkpoint ends with exit code 0 and a student
of nothing in particular. Each test changes one thing in a world of real digits, and asks for a sentence that names it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast
from small import as_toml, write_teacher
from torch import Tensor
from worlds import World

import feedfast as ff
from feedfast.errors import BusyError, CacheMismatchError, RequestError
from feedfast.report.run import read_metrics
from feedfast.stages.agree import refuse_other_recipe
from feedfast.stages.data import Selection
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.folder import RunLock
from feedfast.stages.proof import plan_of, replay_pixels
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader

LOG = "commits/part-0-of-1.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("identity"))
    assert feedfast("cache", world.file()).code == 0
    return world


@pytest.fixture
def world(whole: World, tmp_path: Path) -> World:
    """A copy to be changed."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


def changed_images(file: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> None:
    with np.load(file) as found:
        images, labels = found["images"].copy(), found["labels"].copy()
    change(images, labels)
    np.savez(file, images=images, labels=labels)


# ---- every sample, as it is read (S1, S7)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, tuple[str, ...], str]:
    """A cache of 300 digits, of which one outside the 256 of the fingerprint has been replaced since."""
    world = World(tmp_path_factory.mktemp("replaced"))
    everything = ("data.limit=30", "cache.views=1", "cache.pilot=32", "teachers.0.taps=[]", "method.name=kd")
    assert feedfast("cache", world.file(), *everything).code == 0
    file = world.folder / "digits-train.npz"
    ids = Selection.of(world.recipe(*everything)).open().ids
    changed = int(ids[min(set(range(len(ids))) - set(np.linspace(0, len(ids) - 1, 256).astype(int)))])

    def invert(images: np.ndarray, _: np.ndarray) -> None:
        images[changed] = 255 - images[changed]

    changed_images(file, invert)
    write_teacher(world.folder / "b.pt", seed=1)
    return world, everything, f"digits-train.npz[{changed}] (sample {changed}): the image has changed"


@pytest.mark.parametrize(
    "more",
    [
        ("train", "train.replay=0"),
        ("cache", "cache.views=2"),
        ("cache", 'teachers.0.taps=["final"]'),
        ("cache", "second teacher"),
    ],
)
def test_a_replaced_image_is_named_before_it_is_used(
    replaced: tuple[World, tuple[str, ...], str], tmp_path: Path, more: tuple[str, str]
) -> None:
    world, everything, named = replaced
    command, change = more
    sample = int(named.partition("[")[2].partition("]")[0])
    recipe = world.recipe(*everything, f"train.out={tmp_path / 'out'}")
    if change == "second teacher":
        b = recipe.teachers[0].model_copy(update={"name": "b", "weights": str(world.folder / "b.pt")})
        recipe, change = recipe.model_copy(update={"teachers": (*recipe.teachers, b)}), "cache.views=1"
    path = tmp_path / "copy.zarr"
    if command == "cache":
        shutil.copytree(world.cache, path)
    before = cache_digest(world.cache)
    place = () if command == "train" else (f"cache.path={path}",)
    outcome = feedfast(command, as_toml(recipe, tmp_path / "r.toml"), change, *place)
    assert outcome.code == 2
    assert named in outcome.error
    assert cache_digest(world.cache) == before
    assert not (tmp_path / "out" / "student.pt").exists()
    if command == "cache":  # what was recorded before it is of other samples
        held = CacheReader(path)
        for commit in held.log.commits.values():
            if commit.array.endswith("codes") and (commit.view == 1 or not commit.array.startswith("targets/a/logits")):
                assert sample not in held.read_array("views/order", commit.view)[slice(*commit.rows)]


def test_a_replaced_image_ends_a_stream_and_a_replay(replaced: tuple[World, tuple[str, ...], str]) -> None:
    world, everything, named = replaced
    with pytest.raises(CacheMismatchError) as caught:
        list(ff.open_cache(world.cache, replay=0).stream(batch_size=256, drop_last=False))
    assert named in str(caught.value)
    for check in ("--replay", "--teachers"):
        file = as_toml(world.recipe(*everything), world.folder / "all.toml")
        outcome = feedfast("verify", world.cache, check, "100", "--recipe", file)
        assert outcome.code != 0
        assert named in outcome.err


def test_replayed_blocks_differ_from_run_to_run(whole: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from feedfast.data.loader import Loader

    seen: list[tuple[int, int]] = []
    stream = Loader.stream

    def spy(self: Loader, view: int, rows: Any, **options: Any) -> Any:
        seen.append((view, int(rows[0])))
        return stream(self, view, rows, **options)

    monkeypatch.setattr(Loader, "stream", spy)
    reader = CacheReader(whole.cache)
    data = Selection.of(whole.recipe()).open()
    for _ in range(6):
        assert replay_pixels(reader, data, plan_of(reader), blocks=1, views=2) == 1
    assert len(set(seen)) > 1


# ---- codes and their scale (S2)


def test_codes_of_a_lost_scale_are_made_again(world: World) -> None:
    """The scale's line is removed, and another pilot gives another scale: old codes would decode to other values."""
    log = world.cache / LOG
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"targets/a/final/scale"' not in line))
    assert "incomplete" in world.train("train.replay=0").error
    old = {file: file.read_bytes() for file in (world.cache / "targets/a/final/scale/c").rglob("*") if file.is_file()}
    outcome = feedfast("cache", world.file(), "cache.pilot=16")
    assert outcome.code == 0, outcome.err
    assert outcome.document["rows_written"] == 400
    assert any(file.read_bytes() != content for file, content in old.items()), "the other pilot fits another scale"
    assert feedfast("verify", world.cache, "--full", "--teachers", "100", "--recipe", world.file()).code == 0


# ---- recipe and cache (S3, S9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('teachers.0.taps=["final=block3:post"]', ["targets/a/final", "path", "block3"]),
        ('teachers.0.taps=["final=bn:post"]', ["targets/a/final", "path", "'bn'", "'relu'"]),
        ('teachers.0.taps=["final=relu:pre"]', ["targets/a/final", "position", "pre"]),
        ('teachers.0.taps=["final+margin"]', ["final", "margin"]),
        ('teachers.0.taps=["final", "ofd"]', ["targets/a/ofd1", "transform", "none", "margin"]),
        ("cache.codec=f32", ["targets/a/final", "codec", "f32", "u8"]),
        ("cache.codec=f16", ["targets/a/final", "codec", "f16", "u8"]),
        ('teachers.0.taps=["final:u4", "ofd+margin"]', ["targets/a/final", "codec", "u4", "u8"]),
        ('teachers.0.taps=["final", { tap = "ofd", margin = true, codec = "f16" }]', ["a/ofd1", "codec", "f16", "u8"]),
        ("cache.batch=16", ["batch_rows", "16", "32"]),
        ("teachers.0.mean=[0.1, 0.2, 0.3]", ["teachers.a.mean"]),
        ("teachers.0.model=zoo/wrn-10-2", ["zoo/wrn-10-2"]),
        ("teachers.0.bn=batch", ["teachers.a.bn"]),
        ("teachers.0.weights=/no/such/file.pt", ["/no/such/file.pt", "nothing", "check_teachers"]),
        ("teachers.0.weights=", ["zoo", "weights", "check_teachers"]),
    ],
)
def test_a_recipe_that_says_something_else_than_its_cache_trains_nothing(
    whole: World, tmp_path: Path, change: str, words: list[str]
) -> None:
    outcome = whole.train(change, f"train.out={tmp_path / 'out'}", "train.max_steps=1")
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error
    assert read_metrics(tmp_path / "out" / "metrics.jsonl") == []


@pytest.mark.slow
def test_taps_by_hand_are_not_the_preset(whole: World, tmp_path: Path) -> None:
    """The other way round: the cache's map was chosen by hand, and a recipe that says nothing means the preset."""
    made = (f"cache.path={tmp_path / 'hand.zarr'}", "cache.views=1")
    assert feedfast("cache", whole.file(), 'teachers.0.taps=["final=block3:post"]', *made).code == 0
    out = (f"train.out={tmp_path / 'out'}", "train.max_steps=1")
    for taps in ("[]", '["final"]'):
        error = whole.train(f"teachers.0.taps={taps}", *made, *out).error
        assert "targets/a/final: path: expected 'relu' as the recipe says, found 'block3'" in error
    assert whole.train('teachers.0.taps=["final=block3:post"]', *made, *out).code == 0


def test_the_cache_alone_counts_where_the_recipe_says_so(world: World, tmp_path: Path) -> None:
    (world.folder / "a.pt").unlink()
    weights = f"teachers.0.weights={tmp_path / 'gone.pt'}"
    alone = (weights, "train.check_teachers=false", "train.max_steps=1")
    assert world.train(*alone).code == 0
    assert "codec" in world.train(*alone, "cache.codec=f32", f"train.out={tmp_path / 'other'}").error
    assert "teachers.a.bn" in world.train(*alone, "teachers.0.bn=batch", f"train.out={tmp_path / 'other'}").error


def test_published_weights_are_not_those_of_a_file(whole: World) -> None:
    """A recipe whose ``weights`` line was lost asks for another teacher, which need not be fetched to say so."""
    reader = CacheReader(whole.cache)
    teacher = reader.manifest.teachers["a"]
    assert teacher.published is False
    other = teacher.model_copy(update={"model": "torchvision/resnet18"})
    reader.manifest = reader.manifest.model_copy(update={"teachers": {"a": other}})
    recipe = whole.recipe("teachers.0.model=torchvision/resnet18", "teachers.0.weights=")
    with pytest.raises(CacheMismatchError, match=r"teachers\.a\.weights: expected weights of its library .*of a file"):
        refuse_other_recipe(reader, reader.manifest.dataset, plan_of(reader), recipe, ["final"])


# ---- runs (S4, S6)


def relabel(images: np.ndarray, labels: np.ndarray) -> None:
    labels[:] = (labels + 1) % 10


def other_weights(world: World) -> None:
    write_teacher(world.folder / "a.pt", seed=5)


def other_cache(world: World) -> None:
    shutil.rmtree(world.cache)
    other_weights(world)
    assert feedfast("cache", world.file()).code == 0


@pytest.mark.parametrize(
    ("source", "change", "key"),
    [
        ("none", lambda world: changed_images(world.folder / "digits-train.npz", relabel), "data.labels_sha256"),
        pytest.param(
            "none",
            lambda world: changed_images(world.folder / "digits-val.npz", relabel),
            "val.labels_sha256",
            marks=pytest.mark.slow,
        ),
        pytest.param("live", other_weights, "teachers.a.weights_sha256", marks=pytest.mark.slow),
        pytest.param("cache", other_cache, "cache", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(
    world: World, source: str, change: Callable[[World], None], key: str
) -> None:
    """The recipe is the same to the last letter; the files that it names are not."""
    words = (
        "method.name=none" if source == "none" else "method.name=kd",
        f"train.source={source}",
        "cache.path=x.zarr",
    )
    words = words if source != "cache" else words[:2]
    assert world.train(*words, "train.max_steps=1").code == 0
    held = (world.student / "checkpoint.pt").read_bytes()
    change(world)
    outcome = world.train(*words)
    assert outcome.code == 2
    for word in (str(world.student), "trained on something else", f"{key}: there"):
        assert word in outcome.error
    assert (world.student / "checkpoint.pt").read_bytes() == held


@pytest.mark.slow
def test_a_cache_may_grow_under_a_run(world: World) -> None:
    assert world.train("train.max_steps=2", "cache.views=2").code == 0
    assert feedfast("cache", world.file(), "cache.views=3", 'teachers.0.taps=["final","ofd+margin","stage"]').code == 0
    assert world.train("train.max_steps=3", "cache.views=2").document["steps"] == 3


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_continued(world: World, tmp_path: Path) -> None:
    other = (f"train.out={tmp_path / 'other'}", "train.lr=0.5")
    assert world.train("train.max_steps=1").code == 0
    assert world.train("train.max_steps=1", *other).code == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", world.student / "checkpoint.pt")
    assert "a checkpoint of this run, found a damaged or foreign file (of run" in world.train().error


def test_a_run_folder_belongs_to_one_process_at_a_time(world: World) -> None:
    world.student.mkdir()
    with open(world.student / "run.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        outcome = world.train("train.max_steps=1")
        assert outcome.code == 1  # another time it may be free
        assert f"another process is at work in {world.student}" in outcome.error
        assert os.listdir(world.student) == ["run.lock"]
    assert world.train("train.max_steps=1").code == 0
    with RunLock(world.student), pytest.raises(BusyError, match="another process"):
        RunLock(world.student)
    assert not (world.student / "run.lock").exists(), "a run gives its folder back"


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RequestError, match="cannot be locked"):
        RunLock(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"


# ---- what is written carries a checksum (S5); single files: test_saved_files.py


@pytest.mark.parametrize("name", ["recipe.json", "identity.json"])
@pytest.mark.parametrize("damage", ["edited", "removed"])
def test_documents_of_a_run_are_checked_when_it_goes_on(begun: World, tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "student"
    shutil.copytree(begun.student, out)
    if damage == "removed":
        (out / name).unlink()
    else:
        tree = json.loads((out / name).read_text())
        tree[next(iter(tree))] = 3
        (out / name).write_text(json.dumps(tree))
    outcome = begun.train(f"train.out={out}")
    assert outcome.code in (1, 2)
    for word in (name, str(out), "overwrite=true"):
        assert word in outcome.error


@pytest.fixture(scope="module")
def begun(whole: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a run that stopped after its first step."""
    world = World(tmp_path_factory.mktemp("begun"))
    shutil.copytree(whole.folder, world.folder, dirs_exist_ok=True)
    assert world.train("train.max_steps=1").code == 0
    return world


# ---- what teachers compute (S8)


@pytest.fixture
def changed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in other code: a cosine does not see the factor."""
    call = FrozenTeacher.__call__

    def changed(self: FrozenTeacher, images: Tensor) -> dict[str, Tensor]:
        maps = call(self, images)
        return {**maps, "logits": maps["logits"] * 1.01}

    monkeypatch.setattr(FrozenTeacher, "__call__", changed)


@pytest.mark.usefixtures("changed_code")
def test_verify_and_a_live_run_notice_other_code(whole: World, tmp_path: Path) -> None:
    said = "teachers[a], tap 'logits': with the same weights it computes something else"
    outcome = feedfast("verify", whole.cache, "--teachers", "1", "--recipe", whole.file())
    assert outcome.code == 1
    assert [entry["kind"] for entry in outcome.document["problems"]] == ["teacher"]
    assert said in outcome.document["problems"][0]["detail"]
    out = (f"train.out={tmp_path / 'out'}", "train.source=live", "train.max_steps=1", "method.name=kd")
    assert said in whole.train(*out).error
    # A cache of something else has nothing to say of this run.
    assert whole.train(*out, "seed=5").code == 0


@pytest.mark.slow
def test_a_live_run_is_not_continued_with_other_code(
    whole: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    live = (f"train.out={tmp_path / 'out'}", "train.source=live", "method.name=kd", "cache.path=")
    assert whole.train(*live, "train.max_steps=1").code == 0
    assert whole.train(*live, "train.max_steps=2").document["steps"] == 2
    request.getfixturevalue("changed_code")
    outcome = whole.train(*live)
    assert outcome.code == 2
    assert "teachers.a.outputs.logits" in outcome.error


def test_a_tap_that_is_added_later_is_probed_too(world: World) -> None:
    assert feedfast("cache", world.file(), 'teachers.0.taps=["final","ofd+margin","stage"]').code == 0
    teacher = CacheReader(world.cache).manifest.teachers["a"]
    assert set(teacher.probe) == set(teacher.taps)
    assert "stage1" in teacher.taps


# ---- nothing that is not finite is saved (S10); single files: test_saved_files.py


def test_a_run_that_explodes_between_two_rows_keeps_its_last_good_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is looked at before the end of the epoch; what is saved is."""
    from feedfast.stages.loop import Trainer

    assert world.train("train.max_steps=3", "train.log_every=1000").code == 0
    held = (world.student / "checkpoint.pt").read_bytes()
    (world.student / "student.pt").unlink()
    step = Trainer.step

    def exploding(self: Trainer, index: int, batch: Any) -> dict[str, Tensor]:
        losses = step(self, index, batch)
        if index == 5:  # the last of the first epoch: its loss was still finite
            next(self.student.parameters()).data.mul_(float("inf"))
        return losses

    monkeypatch.setattr(Trainer, "step", exploding)
    outcome = world.train("train.log_every=1000")
    assert outcome.code == 1
    assert "expected finite values to save" in outcome.error
    assert (world.student / "checkpoint.pt").read_bytes() == held
    assert not (world.student / "student.pt").exists()


def test_a_student_that_begins_with_nan_is_told_so(world: World, tmp_path: Path) -> None:
    state = torch.load(world.folder / "a.pt", weights_only=True)
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    outcome = world.train(f"student.weights={tmp_path / 'nan.pt'}")
    assert outcome.code == 1
    assert "before the first step" in outcome.error
    assert not (world.student / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["fc.weight", "bn.weight"])
def test_a_teacher_of_nan_is_not_cached(world: World, tmp_path: Path, name: str) -> None:
    state = torch.load(world.folder / "a.pt", weights_only=True)
    assert name in state
    state[name].view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    fresh = (f"teachers.0.weights={tmp_path / 'nan.pt'}", f"cache.path={tmp_path / 'c.zarr'}")
    error = feedfast("cache", world.file(), *fresh).error
    assert "teacher 'a', tap" in error
    assert "expected finite maps" in error
    assert not (tmp_path / "c.zarr" / "zarr.json").exists()


# ---- a check that compared nothing (S12)


def test_lines_without_their_sums_are_damaged(world: World) -> None:
    log = world.cache / LOG
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "block_sums"}) + "\n" for line in lines))
    assert "block_sums" in world.train().error
    assert {entry["kind"] for entry in feedfast("verify", world.cache).document["problems"]} == {"log-damaged"}


def test_a_replay_that_can_compare_nothing_has_failed(whole: World) -> None:
    reader = CacheReader(whole.cache)
    data = Selection.of(whole.recipe()).open()
    assert replay_pixels(reader, data, plan_of(reader), blocks=0, views=2) == 0, "nothing was asked for"
    sums = [key for key in reader._commits if key[0] == "pixels/sums"]
    for key in sums:
        del reader._commits[key]
    with pytest.raises(CacheMismatchError, match="pixels/sums"):
        replay_pixels(reader, data, plan_of(reader), blocks=2, views=2)
    if not torch.cuda.is_available():
        decoder = reader.manifest.decoder.model_copy(update={"backend": "dali-mixed"})
        reader.manifest = reader.manifest.model_copy(update={"decoder": decoder})
        with pytest.raises(CacheMismatchError, match="decoded on a GPU, and none is here"):
            replay_pixels(reader, data, plan_of(reader), blocks=2, views=2)


def edit_manifest(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    root = json.loads((cache / "zarr.json").read_text())
    change(root["attributes"]["feedfast"])
    (cache / "zarr.json").write_text(json.dumps(root))


def test_a_teacher_without_a_probe_is_not_extended(world: World) -> None:
    edit_manifest(world.cache, lambda manifest: manifest["teachers"]["a"].update(probe={}))
    assert "expected a probe" in feedfast("cache", world.file(), "cache.views=3").error
    verified = feedfast("verify", world.cache, "--teachers", "1", "--recipe", world.file())
    assert verified.code == 1
    assert "expected a probe" in verified.document["problems"][0]["detail"]


def test_teachers_that_are_not_there_are_not_fine(world: World) -> None:
    edit_manifest(world.cache, lambda manifest: manifest.update(teachers={}))
    log = world.cache / LOG
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"targets/' not in line))
    assert feedfast("verify", world.cache).code == 0
    document = feedfast("verify", world.cache, "--teachers", "50", "--recipe", world.file()).document
    assert document["ok"] is False
    assert [entry["kind"] for entry in document["problems"]] == ["teacher"]
