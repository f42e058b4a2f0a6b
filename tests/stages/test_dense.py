"""Segmentation and detection through both stages: parity, resume, refusals, on scenes of squares and discs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast
from scenes import dense_recipe, small_detector, small_segmenter, write_scenes
from small import as_toml

import feedfast as package
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.models.normalize import Normalize
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.offline import run_cache
from feedfast.stages.predictions import predictions_html
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.verify import run_verify
from feedfast.stages.worker import Worker
from feedfast.storage.reader import CacheReader
from feedfast.tasks import task_named

TASKS = ("segment", "detect")
KD = {"name": "kd"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, a teacher per task, and f32 caches; that of masks holds logits too."""
    folder = tmp_path_factory.mktemp("dense")
    for task in TASKS:
        more = {"method": [{"name": "ofd"}, KD]} if task == "segment" else {}
        taps = ["ofd+margin", "logits"] if task == "segment" else ["ofd+margin"]
        run_cache(recipe(folder, task, teachers=[teacher(folder, task, taps=taps)], **more))
    return folder


def teacher(folder: Path, task: str, **words: Any) -> dict[str, Any]:
    return dense_recipe(folder, task).teachers[0].model_dump(exclude_none=True) | words


def recipe(folder: Path, task: str, **sections: Any) -> Recipe:
    cache = {"codec": "f32", "path": str(folder / f"{task}-f32.zarr"), **sections.pop("cache", {})}
    return dense_recipe(folder, task, cache=cache, **sections)


def losses(asked: Recipe) -> list[dict[str, float]]:
    run_train(asked)
    return [row for row in read_metrics(Path(asked.train.out) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    ("task", "method"),
    [("segment", {"name": "ofd"}), ("segment", KD), ("segment", {"name": "at"}), ("detect", {"name": "ofd"})],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_f32_losses_are_those_of_live_teachers(world: Path, task: str, method: dict[str, Any], tmp_path: Path) -> None:
    needs_stages = method["name"] == "at"
    words: dict[str, Any] = {"method": method}
    if needs_stages:
        words["teachers"] = [teacher(world, task, taps=["stage"])]
        words["cache"] = {"path": str(tmp_path / "stage.zarr")}
        run_cache(recipe(world, task, **words))
    elif method == KD:
        words["teachers"] = [teacher(world, task, taps=["ofd+margin", "logits"])]
    train = {"epochs": 3, "eval_every": 0}
    cached = losses(recipe(world, task, train={"source": "cache", "out": str(tmp_path / "c"), **train}, **words))
    live = losses(recipe(world, task, train={"source": "live", "out": str(tmp_path / "l"), **train}, **words))
    assert len(live) == 9
    assert [row["loss"] for row in cached[:6]] == [row["loss"] for row in live[:6]]  # the batches of the caching pass
    np.testing.assert_allclose([r["loss"] for r in cached], [r["loss"] for r in live], rtol=1e-5)
    terms = [name for name in live[0] if name not in ("step", "loss", "lr", "images_per_second", "data_wait_fraction")]
    assert len(terms) >= 2, terms  # the task's own and the method's


@pytest.mark.parametrize("task", TASKS)
def test_u8_loss_and_gradient(world: Path, task: str, tmp_path: Path) -> None:
    coded = dense_recipe(world, task, cache={"path": str(tmp_path / "u8.zarr")}, train={"out": str(tmp_path / "c")})
    run_cache(coded)
    (loss_u8, ours), (loss_live, theirs) = (
        first_step(coded),
        first_step(dense_recipe(world, task, train={"source": "live", "out": str(tmp_path / "l")})),
    )
    assert abs(loss_u8 - loss_live) <= 0.005 * abs(loss_live)
    assert float(ours @ theirs / (ours.norm() * theirs.norm())) >= 0.999
    assert not torch.equal(ours, theirs)


def first_step(asked: Recipe) -> tuple[float, torch.Tensor]:
    run = StudentRun(asked, Worker.from_env())
    batch = next(iter(run.loop.batches(0)))
    loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, 0.0)["loss"]
    loss.backward()
    run.close()
    gradients = [p.grad for p in run.trainer.trainee.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat([grad.double().flatten() for grad in gradients])


BEFORE_AND_AFTER = ("student before training, ofd1", "student after training, ofd1")


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_goes_on_to_the_same_weights(world: Path, task: str, tmp_path: Path) -> None:
    whole, parts = (recipe(world, task, train={"epochs": 3, "out": str(tmp_path / name)}) for name in ("w", "p"))
    score = "val_miou" if task == "segment" else "val_ap50"
    result = run_train(whole)
    run_train(recipe(world, task, train={"epochs": 3, "out": str(tmp_path / "p"), "max_steps": 4}))
    assert run_train(parts)[score] == result[score]
    ours, theirs = (torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("w", "p"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(result["val_metrics"]) >= ({"miou", "pixel_accuracy"} if task == "segment" else {"ap", "ap50"})
    page = (tmp_path / "w" / "report.html").read_text()
    for words in (
        "Validation images",
        "ground truth",
        "Maps of teachers and student",
        "teacher wide, ofd1",
        *BEFORE_AND_AFTER,
    ):
        assert words in page


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_plain_student_learns_the_scenes(task: str, tmp_path: Path) -> None:
    """No teacher, no pretrained weights: what it is judged by must rise far above a network that knows nothing."""
    write_scenes(tmp_path, train=96, val=16)
    train = {"source": "none", "epochs": 40, "batch": 8, "lr": 0.05, "schedule": "one-cycle", "eval_every": 0}
    augment = [{"op": "flip"}]
    asked = dense_recipe(tmp_path, task, teachers=[], method={"name": "none"}, data={"augment": augment}, train=train)
    asked = asked.model_copy(
        update={"student": asked.student.model_copy(update={"model": f"scenes:wide_{_kind(task)}"})}
    )
    found = run_train(asked)
    assert found["val_miou" if task == "segment" else "val_ap50"] > 0.5, found


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_caching_job_goes_on_to_the_same_digest(task: str, tmp_path: Path) -> None:
    def asked(name: str) -> Recipe:
        cache = {"path": str(tmp_path / f"{name}.zarr"), "views": 40}
        return dense_recipe(tmp_path, task, cache=cache, train={"threads": 1})

    whole = run_cache(asked("whole"))["digest"]
    recipe_file = as_toml(asked("torn"), tmp_path / "torn.toml")
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "feedfast", "cache", str(recipe_file)]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = tmp_path / "torn.zarr" / "commits"
    while job.poll() is None and sum(path.read_bytes().count(b"ofd1/codes") for path in logs.glob("part-*")) < 5:
        time.sleep(0.005)
    assert job.poll() is None, "the job ended before it could be killed"
    job.kill()
    job.wait()
    found = run_cache(asked("torn"))
    assert found["rows_resumed"] > 0
    assert found["rows_written"] > 0
    assert found["digest"] == whole


def _kind(task: str) -> str:
    return "segmenter" if task == "segment" else "detector"


@pytest.mark.parametrize("task", TASKS)
def test_verify_replays_pixels_and_teachers(world: Path, task: str, tmp_path: Path) -> None:
    asked = recipe(
        world, task, teachers=[teacher(world, task, taps=["ofd+margin", "logits"][: 1 + (task == "segment")])]
    )
    file = as_toml(asked, tmp_path / "recipe.toml")
    assert asked.task.name == task
    found = run_verify(asked.cache.path, full=True, replay=2, teachers_percent=50, recipe=asked)
    assert found["ok"], found["problems"]
    assert found["replayed"] == 2
    assert file.exists()


def test_a_loop_of_one_s_own_gets_masks_and_boxes(world: Path) -> None:
    for task in TASKS:
        batches = list(package.open_cache(world / f"{task}-f32.zarr").stream(1, 8))
        assert len(batches) == 3
        for batch in batches:
            assert batch.images.shape == (8, 3, 48, 48)
            assert batch.targets["wide"]["ofd1"].shape[0] == 8
            if task == "segment":
                assert batch.annotations.shape == (8, 48, 48)
                assert set(batch.annotations.unique().tolist()) <= {0, 1, 2, 255}
            else:
                assert all(own["boxes"].shape == (len(own["labels"]), 4) for own in batch.annotations)
                assert sum(len(own["labels"]) for own in batch.annotations)


@pytest.mark.parametrize("task", TASKS)
def test_pictures_know_the_training_s_classes(task: str, world: Path) -> None:
    """Validation images may have fewer classes than a student tells apart: its pictures show what it says."""
    asked = recipe(world, task)
    data = open_train(asked)
    few = replace(data, classes=data.classes[:1])
    learned = task_named(task, len(data.classes), 48)
    kind = small_segmenter if task == "segment" else small_detector
    torch.manual_seed(0)
    network = kind(len(data.classes))
    head = network.head if task == "segment" else network.kinds
    torch.nn.init.constant_(head.bias, 0.0)
    with torch.no_grad():
        head.bias[len(data.classes) - 1 if task == "segment" else -1] = 50.0  # says the last class everywhere
    loader = pixel_loader(few, view_plan(asked.data, 0), 8, torch.device("cpu"))
    page = predictions_html(network, Normalize((0, 0, 0), (1, 1, 1)), loader, learned, data.classes)
    loader.close()
    assert data.classes[-1] in page


def test_boxes_moved_since_the_cache_was_made_are_refused(world: Path, tmp_path: Path) -> None:
    """The windows of SSD's crops depend on the boxes: other boxes are other views."""
    write_scenes(tmp_path)
    path = tmp_path / "train" / "boxes.json"
    changed = json.loads(path.read_text())
    changed["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(changed))
    moved = recipe(world, "detect", data={"train": str(path)}, train={"out": str(tmp_path / "s")})
    with pytest.raises(CacheMismatchError, match="labels_sha256"):
        run_train(moved)


def test_plan_inspect_and_methods_know_dense_teachers(world: Path, tmp_path: Path) -> None:
    for task in TASKS:
        file = as_toml(recipe(world, task, train={"out": str(tmp_path / task)}), tmp_path / f"{task}.toml")
        planned = feedfast("plan", file)
        assert planned.code == 0, planned.err
        assert {"wide/ofd1", "wide/ofd2", "wide/ofd3"} <= set(planned.document["targets"])
        assert feedfast("inspect", world / f"{task}-f32.zarr", "--out", tmp_path / "inspect").code == 0
        assert feedfast("methods", "ofd", "--recipe", file).code == 0


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("detect", {"method": {"name": "kd"}}, "kd"),
        ("segment", {"method": {"name": "dkd"}}, "dkd"),
        ("segment", {"method": {"name": "rkd"}}, "rkd"),
        ("segment", {"student": {"model": "zoo/wrn-10-1"}}, "logits"),
        ("detect", {"student": {"model": "scenes:small_segmenter"}}, "cls_logits"),
        ("segment", {"student": {"branches": 2}}, "branches"),
        ("segment", {"data": {"augment": "ssd"}}, "boxes"),
        ("detect", {"data": {"augment": [{"op": "flip"}, {"op": "mixup"}]}}, "mix"),
        ("detect", {"data": {"augment": [{"op": "rotate", "degrees": 10}]}}, "rotate"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_learned_is_said_before_the_first_step(
    world: Path, task: str, words: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((RequestError, CacheMismatchError), match=said):
        run_train(recipe(world, task, train={"source": "live", "out": str(tmp_path / "s")}, **words))
    assert not (tmp_path / "s" / "metrics.jsonl").exists()


def test_another_network_s_task_is_refused_for_a_teacher(world: Path, tmp_path: Path) -> None:
    wrong = teacher(world, "detect", name="x")
    with pytest.raises(RequestError, match="teachers"):
        run_cache(recipe(world, "segment", teachers=[wrong], cache={"path": str(tmp_path / "x.zarr")}))


def test_logits_of_pixels_are_stored_only_where_they_are_asked_for(world: Path, tmp_path: Path) -> None:
    held = CacheReader(world / "segment-f32.zarr").manifest.teachers["wide"]
    assert held.taps["logits"].shape == (3, 6, 6)
    without = recipe(world, "segment", cache={"path": str(tmp_path / "bare.zarr")})
    run_cache(without)
    bare = CacheReader(tmp_path / "bare.zarr").manifest.teachers["wide"]
    assert "logits" not in bare.taps
    assert bare.num_classes == 3
    asked = recipe(
        world, "segment", teachers=[teacher(world, "segment", taps=["ofd+margin", "logits"])],
        cache={"path": str(tmp_path / "bare.zarr")}, method=[{"name": "ofd"}, KD],
    )  # fmt: skip
    assert run_cache(asked)["complete"]  # a later recipe adds them
    one, two = (CacheReader(path) for path in (tmp_path / "bare.zarr", world / "segment-f32.zarr"))
    rows = np.arange(24)
    array = "targets/wide/logits/codes"
    np.testing.assert_array_equal(one.read_rows(array, 1, rows), two.read_rows(array, 1, rows))


@pytest.mark.parametrize(
    ("model", "task"), [("zoo/deeplabv3plus-resnet18", "segment"), ("zoo/ssd300-resnet18", "detect")]
)
def test_a_single_image_per_rank_is_refused_where_a_norm_would_see_one_value(
    model: str, task: str, world: Path, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"teachers": [], "method": {"name": "none"}, "student": {"model": model}}
    train = {"source": "none", "batch": 1, "out": str(tmp_path / "s")}
    with pytest.raises(RequestError, match=r"train\.batch: expected 2 or more"):
        run_train(dense_recipe(world, task, train=train, **words))


@pytest.mark.parametrize("residency", ["ram", "gpu"])
def test_residency_is_refused_where_nothing_is_read(residency: str, world: Path, tmp_path: Path) -> None:
    train = {"source": "live", "residency": residency, "out": str(tmp_path / "s")}
    with pytest.raises(RequestError, match=r"train\.residency: .* expected 'auto' or 'disk'"):
        run_train(dense_recipe(world, "segment", train=train))
