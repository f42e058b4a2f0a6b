"""What looks like damage and is none, or is damage nobody looked at: permissions, open files, paths, parts, groups."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import CACHE, copy_world, make_whole, run

import feedfast as package
from feedfast.errors import CacheDamageError, FeedfastError
from feedfast.storage.reader import CacheReader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def world(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoiled; the current folder."""
    folder = copy_world(whole, tmp_path / "world")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "x/" * 3000])
def test_odd_paths_are_refused_in_a_sentence(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FeedfastError):
        package.open_cache(path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE])
def test_what_cannot_be_opened_now_is_not_called_damage(
    code: int, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if "/codes/c/0/" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    before = sorted(path for path in world.rglob("*"))
    outcome = run("train")
    assert os.strerror(code) in outcome.error
    assert "That is no damage" in outcome.error
    assert "delete" not in outcome.error
    with pytest.raises(FeedfastError) as caught:
        list(package.open_cache(CACHE, data="digits-train.npz", replay=0).stream(0, 16))
    assert not isinstance(caught.value, CacheDamageError)
    listed = run("verify").document["problems"]
    assert {entry["kind"] for entry in listed} == {"io"}
    assert sorted(path for path in world.rglob("*") if "student" not in str(path)) == [
        path for path in before if "student" not in str(path)
    ]


def test_open_shards_stay_below_what_a_process_may_open(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    opened = set()
    real = os.open

    def count(path: Any, *arguments: Any, **more: Any) -> int:
        descriptor: int = real(path, *arguments, **more)
        if "/codes/c/" in str(path):
            opened.add(descriptor)  # a descriptor that has been closed is given again
        return descriptor

    with CacheReader(CACHE, threads=1) as reader:
        assert sum(spec.sharded for spec in reader.specs.values()) * reader.manifest.views > 10
        monkeypatch.setattr(os, "open", count)
        for array, spec in reader.specs.items():
            for view in range(spec.num_views if spec.sharded else 0):
                reader.read_rows(array, view, range(60))
    assert 0 < len(opened) <= 40 // 4 + 1


def test_a_cache_that_cannot_be_looked_up_is_not_written_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def refuse(path: Any, *arguments: Any, **more: Any) -> Any:
        if "/codes/c/1/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "stat", refuse)
    assert "That is no damage" in run("cache").error


def test_a_complete_cache_that_is_read_only_needs_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: real(path, mode) and (CACHE not in str(path) or mode == os.R_OK)
    )
    for path in Path(CACHE).rglob("*"):
        path.chmod(0o444 if path.is_file() else 0o555)
    before = {path: path.stat().st_mtime_ns for path in Path(CACHE).rglob("*")}
    outcome = run("cache")
    assert outcome.code == 0, outcome.err
    assert "holds all that the recipe asks for" in outcome.err
    assert outcome.document["rows_written"] == 0
    assert outcome.document["complete"] is True
    assert {path: path.stat().st_mtime_ns for path in Path(CACHE).rglob("*")} == before
    assert "read-only" in run("cache", "cache.views=3").error
    for path in Path(CACHE).rglob("*"):
        path.chmod(0o755)


@pytest.mark.slow
def test_rows_of_other_parts_are_called_that(world: Path) -> None:
    # 60 rows of a view are one unit, and each part gets one of the two views
    first = run("cache", "cache.path=new.zarr", "cache.part=0/2")
    assert "60 rows are other parts'" in first.err
    assert "already there" not in first.err
    assert first.document["rows_resumed"] == 0
    again = run("cache", "cache.path=new.zarr", "cache.part=0/2")
    assert "60 rows already there, 60 rows are other parts'" in again.err
    assert again.document["rows_resumed"] == 60


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_by_the_next(world: Path) -> None:
    left = [world / "student" / name for name in (".checkpoint.pt.4711.tmp", ".student.pt.1.tmp")]
    kept = [world / "student" / name for name in (".hidden", "notes.tmp", ".notes.tmp")]
    for path in (*left, *kept):
        path.write_bytes(b"x")
    assert run("resume").code == 0
    assert not [path for path in left if path.exists()]
    left[0].touch()
    assert run("train").code == 0
    assert not left[0].exists()
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("damage", ["missing", "{", '{"zarr_format": 3}'])
@pytest.mark.parametrize("group", ["targets", "targets/a", "targets/a/final", "views"])
def test_groups_are_looked_at(group: str, damage: str, world: Path) -> None:
    file = Path(CACHE, group, "zarr.json")
    file.unlink() if damage == "missing" else file.write_text(damage)
    problems = run("verify").document["problems"]
    assert [(entry["array"], entry["shard"], entry["kind"]) for entry in problems] == [(group, "zarr.json", "metadata")]


def test_values_beyond_float16_are_named_by_teacher_and_tap(world: Path) -> None:
    state = torch.load("a.pt", weights_only=True)
    for name, value in state.items():
        if name.endswith("bn1.weight"):
            value *= 1e6
    torch.save(state, "a.pt")
    outcome = run("cache", "cache.path=new.zarr", "cache.codec=f16")
    assert outcome.code == 1
    assert outcome.error.startswith("teacher 'a', tap '")
    assert "expected values within float16's 65504" in outcome.error
    assert "use codec f32" in outcome.error
