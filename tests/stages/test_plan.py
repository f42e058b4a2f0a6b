"""`feedfast plan`: what it measures agrees with what is then done, and one screen says it."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast
from small import KNOWN, as_toml, digits_recipe, write_teacher

from feedfast.errors import CacheDamageError
from feedfast.methods import METHODS, PFEED, StudentOutput, Targets
from feedfast.recipe import load_recipe
from feedfast.stages import plan_rates
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import load_teachers
from feedfast.stages.plan_screen import plan_screen
from feedfast.stages.student import run_train
from feedfast.storage.blocks import compress_block
from feedfast_kernels import Codes


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
    assert record["wait_seconds"] == pytest.approx(document["setup_seconds"] + saved)
    training = document["step_ms"] * 2 * 200 / 32 / 1e3
    assert cache["seconds"] == pytest.approx(record["seconds"]) == pytest.approx(document["seconds"] + training)
    assert "ofd" in document["serves"]
    assert document["serves_not"].keys() == {"fitnet", "at", "vid"}
    assert (document["method"], document["unusable"]) == ("pfeed", "")
    assert document["pixels_per_core_second"] > 100
    assert document["view_bytes_per_row"] == 25


def test_the_first_student_takes_its_whole_steps(planned: tuple[dict[str, Any], str], file: Path) -> None:
    found, recipe = planned[0], load_recipe(file)
    steps = recipe.train.epochs * found["data"]["images"] / min(recipe.cache.batch, found["data"]["images"])
    assert found["first_student"]["cache"]["seconds"] >= 0.99 * found["step_ms"] * steps / 1e3


def test_reading_belongs_together(planned: tuple[dict[str, Any], str]) -> None:
    """All of it per batch of 32 rows, in stored bytes."""
    document, _ = planned
    stored = document["bytes"] / (2 * 200) * 32
    assert document["read_ms"] > stored / document["disk_bytes_per_second"] * 1e3, "decoding comes on top"
    assert document["available_bytes_per_second"] == pytest.approx(stored / document["read_ms"] * 1e3)
    assert document["needed_bytes_per_second"] == pytest.approx(stored / document["step_ms"] * 1e3)
    assert document["pays"] is (document["read_ms"] < document["teachers_ms"])
    assert document["decoder_bytes_per_second"] > 0


def test_the_step_is_the_recipes_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the method's loss, which here takes its time, on codes; a recipe that cannot be trained has none."""
    seen: list[object] = []

    class Slow(PFEED):
        def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, torch.Tensor]:
            seen.extend(taps["final"] for taps in targets.values())
            time.sleep(0.05)
            return super().forward(student, targets, annotations)

    monkeypatch.setitem(METHODS, "pfeed", Slow)
    assert feedfast("plan", file).document["step_ms"] >= 50
    assert seen
    assert {type(target) for target in seen} == {Codes}
    document = feedfast("plan", "--no-check", file, "method.name=at").document
    assert document["unusable"]
    assert document["step_ms"] is None


@pytest.mark.parametrize(("bytes_per_second", "pays"), [(1e3, False), (1e13, True)])
def test_a_cache_that_would_not_pay_is_told(
    file: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_second: float, pays: bool
) -> None:
    monkeypatch.setattr("feedfast.stages.plan.disk_rate", lambda *_: plan_rates.DiskRate(bytes_per_second, True))
    monkeypatch.setattr("feedfast.stages.plan_tap.decode_ms", lambda *_: 1e-3)
    outcome = feedfast("plan", file)
    assert outcome.document["pays"] is pays
    assert ("A CACHE WOULD NOT PAY" in outcome.err) is not pays


def test_the_disk_is_measured_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that sleeps is no faster than that; the file goes; no room or no permission is no rate."""
    plain, waits = plan_rates.os.preadv, 0.02

    def slow(*arguments: Any) -> int:
        time.sleep(waits)
        return plain(*arguments)

    monkeypatch.setattr(plan_rates.os, "preadv", slow)
    monkeypatch.setattr(plan_rates, "FILE_BYTES", 3 * plan_rates.PIECE_BYTES)
    found = plan_rates.disk_rate(tmp_path, 1 << 40)
    assert found is not None
    assert 0 < found.bytes_per_second <= plan_rates.PIECE_BYTES / waits
    assert list(tmp_path.iterdir()) == []
    assert plan_rates.disk_rate(tmp_path, 10 * plan_rates.PIECE_BYTES - 1) is None
    assert plan_rates.disk_rate(tmp_path / "nowhere", 1 << 40) is None


def test_the_decoder_that_is_timed_decodes() -> None:
    block = np.arange(1 << 14, dtype=np.uint16).view(np.uint8)
    for compression in ("zstd", "none"):
        stored = compress_block(block, compression)
        assert plan_rates.decode_ms(stored, compression, block.nbytes) > 0
        with pytest.raises(CacheDamageError):
            plan_rates.decode_ms(stored[:-1], compression, block.nbytes)


def test_a_job_says_how_far_off_its_plan_was(file: Path, tmp_path: Path) -> None:
    """Of the same recipe; of another one, of half a job, or from a file that was edited there is nothing to say."""
    words = [f"cache.path={tmp_path / 'new' / 'c.zarr'}", f"train.out={tmp_path / 'out'}", "train.eval_every=0"]
    kept = tmp_path / "new" / "c.zarr.plan.json"
    assert feedfast("cache", file, *words[:1], "cache.views=1").document["predicted"] is None
    shutil.rmtree(tmp_path / "new")
    planned = feedfast("plan", file, *words).document
    outcome = feedfast("cache", file, *words)
    made = outcome.document
    assert made["predicted"] == {"bytes": planned["bytes"], "seconds": planned["seconds"]}
    for name in ("bytes", "seconds"):
        assert made["prediction_error"][name] == pytest.approx(made[name] / planned[name] - 1)
    assert abs(made["prediction_error"]["bytes"]) < 0.15
    assert f"planned {planned['seconds']:,.1f} s" in outcome.err
    assert feedfast("verify", tmp_path / "new" / "c.zarr", "--full").code == 0
    again = feedfast("cache", file, *words).document
    assert again["rows_written"] == 0
    assert again["prediction_error"] == {"bytes": made["prediction_error"]["bytes"], "seconds": None}
    trained = feedfast("train", file, *words, "train.max_steps=3").document
    step = max(planned["step_ms"], planned["read_ms"])  # train.batch is the batch that was timed
    assert trained["predicted"] == {"step_ms": pytest.approx(step)}
    assert trained["prediction_error"]["step_ms"] == pytest.approx(trained["step_ms"] / step - 1)
    assert (
        feedfast("train", file, *words, "train.max_steps=3", "student.model=zoo/wrn-16-1", "overwrite=true").document[
            "predicted"
        ]
        is None
    )
    content = kept.read_text()
    kept.write_text(content.replace('"bytes": ', '"bytes": 1'))
    assert feedfast("cache", file, *words).document["predicted"] is None


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
