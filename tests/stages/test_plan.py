"""`feedfast plan`: what it measures agrees with what is then done, and one screen says it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast
from small import KNOWN, as_toml, digits_recipe, write_teacher

from feedfast.recipe import load_recipe
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import load_teachers
from feedfast.stages.plan_screen import plan_screen
from feedfast.stages.student import run_train


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one teacher that knows digits, a, and one that guesses, b."""
    folder = tmp_path_factory.mktemp("plan")
    write_teacher(folder / "a.pt", epochs=20)
    return as_toml(digits_recipe(folder, KNOWN), folder / "recipe.toml")


@pytest.fixture(scope="module")
def planned(file: Path) -> tuple[dict[str, Any], str]:
    """The document, and what was said."""
    outcome = feedfast("plan", file)
    assert outcome.code == 0, outcome.err
    return outcome.document, outcome.err


def test_teachers_accuracy(file: Path, planned: tuple[dict[str, Any], str]) -> None:
    """Counted again, one image at a time, over the rows that were timed; only who guesses is warned of."""
    document, said = planned
    recipe = load_recipe(file)
    data = open_train(recipe)
    teachers = load_teachers(recipe, 10, torch.device("cpu"))
    right = dict.fromkeys(teachers, 0)
    with pixel_loader(data, view_plan(recipe.data, 0), 32, torch.device("cpu")) as loader:
        for batch in loader.stream(0, np.arange(192)):
            for name, teacher in teachers.items():
                found = teacher(batch.images)["logits"].numpy().argmax(1)
                right[name] += sum(int(a == b) for a, b in zip(found, batch.annotations.tolist(), strict=True))
    for name, count in right.items():
        assert document["teachers"][name]["top1_rows"] == 192
        assert document["teachers"][name]["top1"] == pytest.approx(count / 192)
    assert document["teachers"]["a"]["top1"] > 0.5
    assert "teachers[b]: top-1" in said
    assert "teachers[a]: top-1" not in said


def test_the_numbers_belong_together(planned: tuple[dict[str, Any], str]) -> None:
    document, _ = planned
    targets, teachers = document["targets"], document["teachers"]
    for name, teacher in teachers.items():
        own = [entry for key, entry in targets.items() if key.startswith(f"{name}/")]
        assert teacher["bytes"] == sum(entry["bytes"] for entry in own)
    assert document["bytes"] == 2 * document["bytes_per_view"] + 12 * 200
    assert document["teachers_ms"] == pytest.approx(sum(teacher["ms"] for teacher in teachers.values()))
    assert document["hours"] == document["seconds"] / 3600
    # two epochs a run; every epoch would run the teachers over 200 images in batches of 32
    saved = document["teachers_ms"] * 200 / 32 / 1e3
    assert document["break_even_epochs"] == pytest.approx(document["seconds"] / saved)
    assert document["break_even_runs"] == pytest.approx(document["break_even_epochs"] / 2)
    # 200 digits in batches of 32; 200 pilot rows: a quarter of the 160 that fit measures the fit
    cache, record = (document["first_student"][way] for way in ("cache", "record"))
    assert cache["wait_seconds"] == pytest.approx(document["seconds"])
    assert record["wait_seconds"] == pytest.approx(saved)
    training = document["student_ms"] * 2 * 200 / 32 / 1e3
    assert cache["seconds"] == pytest.approx(record["seconds"]) == pytest.approx(document["seconds"] + training)
    assert "ofd" in document["serves"]
    assert document["serves_not"].keys() == {"fitnet", "at", "vid"}
    assert (document["method"], document["unusable"]) == ("pfeed", "")
    assert document["pixels_per_core_second"] > 100
    assert document["view_bytes_per_row"] == 25


def test_a_strong_view_is_planned_for(file: Path) -> None:
    """Steps and mixing count per row, and mixed images have no top-1 of their own."""
    listed = '[{op="pad-crop"},{op="rand-augment"},{op="mixup",alpha=1.0}]'
    document = feedfast("plan", file, f"data.augment={listed}").document
    assert document["view_bytes_per_row"] == 25 + 2 * 25 + 20
    assert document["pixels_per_core_second"] > 0
    assert {teacher["top1"] for teacher in document["teachers"].values()} == {None}


def test_a_full_disk_is_a_sentence(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed, what is free and where, and how many views fit; exit code 1, whatever else is silenced."""
    usage = shutil.disk_usage(tmp_path)
    whole = feedfast("plan", file).document
    free = int((1.5 * whole["bytes_per_view"] + 12 * 200) * 1.02)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))
    outcome = feedfast("-qq", "plan", file)
    assert outcome.code == 1
    assert outcome.document["views_that_fit"] == 1
    (line,) = outcome.err.splitlines()
    assert f"expected {whole['bytes'] / 2**20:.1f} MiB free for cache.path" in line
    assert f"in {file.parent}: 1 of 2 views fit" in line
    assert feedfast("plan", file, "cache.views=1").document["fits"] is True


def test_progress_is_shown_while_it_measures(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast.stages.progress.LINE_SECONDS", 0.0)
    said = feedfast("plan", file).err
    steps = re.findall(r"plan: (\d+)/(\d+) measurements.*left (.*)", said)
    assert [int(done) for done, _, _ in steps] == list(range(1, int(steps[0][1]) + 1))
    remarks = [remark for _, _, remark in steps]
    assert remarks[0] == "a/final"
    assert "teacher b" in remarks
    assert remarks[-1] == "student"


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits(file: Path, planned: tuple[dict[str, Any], str], width: int) -> None:
    document, _ = planned
    document = json.loads(json.dumps(document))
    document["teachers"]["a"]["model"] = "torchvision/convnext_tiny"
    lines = plan_screen(document, load_recipe(file), "/a/folder", width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(line.strip() for line in lines)
    for name, entry in document["targets"].items():
        assert re.search(rf"{name} +{'x'.join(map(str, entry['shape']))} +{entry['codec']} ", words)
    assert f"{document['teachers']['a']['top1']:.1%} " in words
    assert f"{document['teachers']['b']['top1']:.1%} !" in words
    for word in (
        "torchvision/convnext_tiny",
        "to cache 2 views",
        "free in /a/folder: fits",
        "student epochs",
        "first step after",
    ):
        assert word in words
    assert "pfeed with zoo/wrn-10-1: can use it" in words
    assert "fitnet, at, vid: needs the 'stage*' taps of teacher 'a'" in words


def test_no_markup_in_names(file: Path, planned: tuple[dict[str, Any], str]) -> None:
    assert "/x/[/red][bold]y" in plan_screen(planned[0], load_recipe(file), "/x/[/red][bold]y", 100)


@pytest.mark.slow
def test_the_estimate_is_what_is_written(file: Path, tmp_path: Path) -> None:
    """Bytes of every tap within the compression's luck, factors included; and the whole cache."""
    stored = (
        "method.name=ft",
        "method.factors=stored",
        "method.paraphraser_lr=0.001",
        f"cache.path={tmp_path / 'c.zarr'}",
    )
    planned = feedfast("plan", file, *stored).document
    assert planned["targets"]["a/factor"]["shape"] == [32, 4, 4]
    made = feedfast("cache", file, *stored)
    assert made.code == 0, made.err
    assert feedfast("factors", file, *stored).code == 0
    held = feedfast("inspect", tmp_path / "c.zarr").document
    found = {name.split("/", 1)[1].removesuffix("/codes"): entry for name, entry in held["targets"].items()}
    for name, entry in planned["targets"].items():
        assert found[name]["bytes"] == pytest.approx(entry["bytes"], rel=0.25), name
    assert held["bytes"] == pytest.approx(planned["bytes"], rel=0.1)
    recipe = load_recipe(file, [*stored, f"train.out={tmp_path / 'out'}", "train.max_steps=1"])
    assert run_train(recipe)["steps"] == 1
