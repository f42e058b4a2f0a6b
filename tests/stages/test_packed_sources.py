"""A cache and a student from packed images are those from the folder of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_samples import hf_dataset, write_folder, write_shards
from small import as_toml, write_teacher

from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.offline import run_cache
from feedfast.stages.open_cache import open_cache
from feedfast.stages.student import run_train
from feedfast.stages.verify import run_verify
from feedfast.storage.log import cache_digest


def recipe(folder: Path, name: str, source: Any) -> Recipe:
    return parse_recipe(
        {
            "data": {"train": source, "val": source, "size": 16, "augment": "resized-crop-flip", "threads": 1},
            "cache": {"path": str(folder / f"{name}.zarr"), "views": 2, "batch": 8, "pilot": 16},
            "teachers": [
                {
                    "name": "t", "model": "zoo/wrn-10-1", "weights": str(folder / "t.pt"), "classes": 10,
                    "taps": ["final"],
                }
            ],
            "student": {"model": "zoo/wrn-10-1"},
            "method": {"name": "pfeed"},
            "train": {"epochs": 2, "batch": 6, "lr": 0.02, "device": "cpu", "out": str(folder / name)},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of images, cached and trained on; and the digest."""
    root = tmp_path_factory.mktemp("packed")
    write_teacher(root / "t.pt")
    plain = recipe(root, "plain", str(write_folder(root / "folder")))
    run_cache(plain)
    run_train(plain)
    return root, cache_digest(root / "plain.zarr")


def packed_as(root: Path, kind: str) -> str:
    if kind == "tar":
        write_shards(root / "shards", root / "folder")
        return f"{root}/shards/train-{{000000..000001}}.tar"
    pytest.importorskip("pyarrow")
    pytest.importorskip("datasets").disable_progress_bars()
    table = hf_dataset(root / "folder")
    if kind == "arrow":
        table.save_to_disk(root / "saved")
        return str(root / "saved")
    table.to_parquet(root / "x.parquet")
    return str(root / "x.parquet")


@pytest.mark.parametrize(
    "kind", ["tar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("arrow", "parquet"))]
)
def test_packed_images_give_the_same_cache_and_the_same_student(world: tuple[Path, str], kind: str) -> None:
    root, digest = world
    packed = recipe(root, kind, packed_as(root, kind))
    run_cache(packed)
    assert cache_digest(root / f"{kind}.zarr") == digest
    run_train(packed)
    ours, plain = (torch.load(root / name / "student.pt") for name in (kind, "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    assert run_verify(str(root / f"{kind}.zarr"), full=True, replay=2)["ok"], "by the place that its manifest names"
    # one is the other's: a cache does not know what its images are packed in
    with open_cache(root / "plain.zarr", data=packed.data.train) as cache:
        assert len(cache.data) == 12


def test_the_command_line_reads_shards(world: tuple[Path, str]) -> None:
    from commands import feedfast

    root, _ = world
    source = packed_as(root, "tar")
    path = as_toml(recipe(root, "cli", source), root / "cli.toml")
    (root / "shards" / "train-000001.tar").write_bytes(b"")
    outcome = feedfast("cache", str(path))
    assert outcome.code == 2
    assert "train-000001.tar: no tar file: it is empty" in outcome.error


def test_opening_says_how_far_it_is(
    world: tuple[Path, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete decode of a large data set takes hours; a small one says nothing."""
    from feedfast.stages import data as data_stage
    from feedfast.stages import progress
    from feedfast.stages.data import Selection

    root, _ = world
    caplog.set_level("INFO", logger="feedfast")
    for quiet, lines in ((60.0, 0), (-1.0, 1)):
        monkeypatch.setattr(data_stage, "_QUIET_SECONDS", quiet)
        monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
        caplog.clear()
        Selection((str(root / "folder"),)).open("full")
        said = [record.getMessage() for record in caplog.records if "12/12 images" in record.getMessage()]
        assert len(said) == lines
