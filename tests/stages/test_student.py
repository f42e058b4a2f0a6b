"""The student stage as a job: exact resume, refusal of foreign folders, schedules against torch's, ranks, compile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import as_toml, digits_recipe, write_teacher

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, RequestError
from feedfast.models.build import build_model
from feedfast.recipe import Recipe, Train
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast.stages.schedule import Schedule
from feedfast.stages.student import run_train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    run_cache(digits_recipe(folder))
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / "student.pt", weights_only=True)
    return state


def assert_equal_weights(one: Path, two: Path) -> None:
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("stop", [1, 6, 7, 17])
def test_resume_is_exact_at_any_batch(world: Path, tmp_path: Path, stop: int) -> None:
    """Stopped in mid-epoch, at an epoch's end, in a later pass: weights and metrics equal those of one run."""
    whole = digits_recipe(world, train={"epochs": 4, "out": str(tmp_path / "whole")}, method={"name": "ofd"})
    run_train(whole)
    parts = digits_recipe(
        world, train={"epochs": 4, "out": str(tmp_path / "parts"), "max_steps": stop}, method={"name": "ofd"}
    )
    assert run_train(parts)["steps"] == stop
    rest = digits_recipe(world, train={"epochs": 4, "out": str(tmp_path / "parts")}, method={"name": "ofd"})
    assert run_train(rest)["steps"] == 24
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    rows = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(world: Path, tmp_path: Path) -> None:
    whole = digits_recipe(world, train={"epochs": 10, "out": str(tmp_path / "whole"), "threads": 1})
    run_train(whole)
    torn = digits_recipe(world, train={"epochs": 10, "out": str(tmp_path / "torn"), "threads": 1})
    command = [sys.executable, "-m", "feedfast", "train", str(as_toml(torn, tmp_path / "torn.toml"))]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and not (tmp_path / "torn" / "checkpoint.pt").exists():
        time.sleep(0.01)
    assert job.poll() is None, "the job ended before it could be killed"
    job.send_signal(signal.SIGKILL)
    job.wait()
    result = run_train(torn)
    assert result["steps"] == 60
    assert_equal_weights(tmp_path / "whole", tmp_path / "torn")


def test_a_finished_run_is_not_run_again(world: Path, tmp_path: Path) -> None:
    recipe = digits_recipe(world, train={"out": str(tmp_path / "s")})
    first = run_train(recipe)
    again = run_train(recipe)
    assert {key: again[key] for key in ("val_accuracy", "final_loss", "steps", "step_ms")} == {
        key: first[key] for key in ("val_accuracy", "final_loss", "steps", "step_ms")
    }
    for name in (
        "metrics.jsonl",
        "student.pt",
        "checkpoint.pt",
        "report.html",
        "recipe.json",
        "result.json",
        "tensorboard",
    ):
        assert (tmp_path / "s" / name).exists(), name
    page = (tmp_path / "s" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", ""), "the report must not fetch anything"


def test_another_recipe_is_refused_and_overwrite_starts_afresh(world: Path, tmp_path: Path) -> None:
    run_train(digits_recipe(world, train={"out": str(tmp_path / "s"), "max_steps": 2}))
    other = digits_recipe(world, train={"out": str(tmp_path / "s"), "max_steps": 2, "lr": 0.5})
    with pytest.raises(RequestError, match=r"train\.lr: there 0\.02, here 0\.5"):
        run_train(other)
    assert (
        run_train(
            digits_recipe(
                world, train={"out": str(tmp_path / "s"), "max_steps": 2, "lr": 0.5}, overrides=("overwrite=true",)
            ),
        )["steps"]
        == 2
    )


def test_a_damaged_checkpoint_is_one_sentence(world: Path, tmp_path: Path) -> None:
    recipe = digits_recipe(world, train={"out": str(tmp_path / "s"), "max_steps": 2})
    run_train(recipe)
    path = tmp_path / "s" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FeedfastError, match=r"checkpoint\.pt: expected a checkpoint"):
        run_train(recipe)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch pwned",))


def test_nothing_is_unpickled(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file or checkpoint from somebody else cannot run code."""
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), tmp_path / "evil.pt")
    with pytest.raises(RequestError, match=r"evil\.pt"):
        run_train(
            digits_recipe(
                world,
                train={"source": "live", "out": str(tmp_path / "s")},
                overrides=(f"teachers.0.weights={tmp_path / 'evil.pt'}",),
            ),
        )
    recipe = digits_recipe(world, train={"out": str(tmp_path / "t"), "max_steps": 1})
    run_train(recipe)
    torch.save(Malicious(), tmp_path / "t" / "checkpoint.pt")
    with pytest.raises(FeedfastError):
        run_train(recipe)
    assert not (tmp_path / "pwned").exists()


def test_a_cache_of_something_else_is_refused(world: Path, tmp_path: Path) -> None:
    """Other weights under the same name, other data, another seed, too many views, a tap that is not there."""
    out = {"out": str(tmp_path / "s")}
    write_teacher(tmp_path / "other.pt", seed=50)
    with pytest.raises(CacheMismatchError, match="weights_sha256"):
        run_train(digits_recipe(world, train=out, overrides=(f"teachers.1.weights={tmp_path / 'other.pt'}",)))
    with pytest.raises(CacheMismatchError, match="dataset"):
        run_train(digits_recipe(world, train=out, data={"limit": 19}, overrides=("overwrite=true",)))
    with pytest.raises(CacheMismatchError, match=r"plan\.seed"):
        run_train(digits_recipe(world, train=out, overrides=("seed=4", "overwrite=true")))
    with pytest.raises(CacheMismatchError, match=r"cache\.views"):
        run_train(digits_recipe(world, train=out, cache={"views": 3}, overrides=("overwrite=true",)))
    assert not (tmp_path / "s" / "student.pt").exists()


def test_an_incomplete_cache_says_so(world: Path, tmp_path: Path) -> None:
    half = digits_recipe(world, cache={"path": str(tmp_path / "half.zarr"), "part": "0/2"})
    run_cache(half)
    with pytest.raises(CacheDamageError, match="incomplete") as caught:
        run_train(
            digits_recipe(world, cache={"path": str(tmp_path / "half.zarr")}, train={"out": str(tmp_path / "s")}),
        )
    assert caught.value.exit_code == 1


def test_nan_before_the_first_checkpoint_says_that_there_is_none(world: Path, tmp_path: Path) -> None:
    with pytest.raises(FeedfastError, match=r"finite loss, found \w+ at step [2-5];.*there is no .*checkpoint\.pt yet"):
        run_train(digits_recipe(world, train={"out": str(tmp_path / "s"), "lr": 1e18, "epochs": 4}))
    assert not (tmp_path / "s" / "checkpoint.pt").exists()


def test_nan_keeps_the_checkpoint_and_says_of_which_step(world: Path, tmp_path: Path) -> None:
    """Also in a run that was resumed from it and has written none of its own."""
    train = {"out": str(tmp_path / "s"), "lr": 1e18, "epochs": 4, "checkpoint_minutes": 1e-9}  # after every step
    checkpoint = tmp_path / "s" / "checkpoint.pt"
    for _ in range(2):
        with pytest.raises(FeedfastError, match="finite loss") as caught:
            run_train(digits_recipe(world, train=train))
        step = torch.load(checkpoint, weights_only=True)["step"]
        assert step >= 1
        assert f"at step {step + 1};" in str(caught.value)
        assert f"{checkpoint} holds step {step})" in str(caught.value)


@pytest.mark.parametrize("schedule", ["cosine", "step", "one-cycle", "poly"])
def test_schedules_are_torchs(schedule: str) -> None:
    """Against torch.optim.lr_scheduler, step by step."""
    total = 200
    train = Train(epochs=10, lr=0.4, schedule=schedule)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    reference: torch.optim.lr_scheduler.LRScheduler
    if schedule == "cosine":
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    elif schedule == "step":
        reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 150], 0.1)
    elif schedule == "poly":
        reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, power=0.9)
    else:
        reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=total + 1)
    ours = Schedule(train, total, total // 10)
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert ours.lr(step) == pytest.approx(
            expected, rel=2e-2 if schedule == "one-cycle" else 1e-9, abs=1e-3 if schedule == "one-cycle" else 0
        ), step
        optimizer.step()
        reference.step()


def test_warm_up_is_linear() -> None:
    ours = Schedule(Train(epochs=10, lr=1.0, warmup_epochs=1.0), 100, 10)
    assert [ours.lr(step) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert ours.lr(10) == pytest.approx(1.0)


def test_a_run_may_be_as_long_as_another_on_less_data(world: Path, tmp_path: Path) -> None:
    """``train.steps`` is the length of the run, on all samples and on a tenth of them; the schedule ends with it."""
    ends = []
    for fraction in (1.0, 0.5):
        out = tmp_path / str(fraction)
        train = {"source": "none", "steps": 10, "epochs": 1, "out": str(out), "eval_every": 0}
        recipe = digits_recipe(world, (f"data.fraction={fraction}",), method={"name": "none"}, train=train)
        assert run_train(recipe)["steps"] == 10
        ends.append([row["lr"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row])
    assert ends[0] == ends[1]
    assert ends[0][-1] < 0.03 * ends[0][0]


def test_compiled_student_trains_the_same(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.compile` changes how the student runs, not what it learns (traced here without a C compiler)."""
    eager = digits_recipe(world, train={"max_steps": 3, "out": str(tmp_path / "e"), "eval_every": 0})
    run_train(eager)
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: original(module, backend="aot_eager"))
    compiled = digits_recipe(
        world, train={"max_steps": 3, "out": str(tmp_path / "c"), "compile": True, "eval_every": 0}
    )
    run_train(compiled)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("e", "c")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_walk_the_same_global_batches(world: Path, tmp_path: Path) -> None:
    """As torchrun starts them, on the CPU: one set of files, loss near that of one process, one accuracy for both."""
    recipe = digits_recipe(world, train={"out": str(tmp_path / "ranks"), "max_steps": 4, "threads": 1})
    done = run_ranks(["-m", "feedfast", "train", as_toml(recipe, tmp_path / "r.toml")])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    single = run_train(digits_recipe(world, train={"out": str(tmp_path / "one"), "max_steps": 4}))
    first, second = (json.loads(job.stdout.splitlines()[-1]) for job in done)
    assert first["steps"] == second["steps"] == single["steps"] == 4
    assert first["final_loss"] == pytest.approx(single["final_loss"], rel=0.25)
    assert weights(tmp_path / "ranks").keys() == weights(tmp_path / "one").keys()
    # The accuracy that both ranks report, each having seen half of the images, is that of the student that was saved.
    assert first["val_accuracy"] == second["val_accuracy"] == top1(tmp_path / "ranks" / "student.pt", recipe)
    assert "train: zoo/wrn-10-1" in done[0].stderr
    assert done[1].stderr == "", "only the first rank reports"


def top1(file: Path, recipe: Recipe) -> float:
    """Accuracy of a saved student in plain PyTorch."""
    model = build_model(recipe.student.model, num_classes=10, weights=str(file)).eval()
    val = np.load(recipe.data.val[0])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in recipe.data.normalization)
    pixels = torch.from_numpy(val["images"]).float()[:, None].expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        found = model((pixels - mean) / std).argmax(1).numpy()
    return float((found == val["labels"]).mean())


@pytest.mark.slow
def test_one_cache_serves_any_number_of_seeds(world: Path, tmp_path: Path) -> None:
    """``train.seed`` moves the student's start and its adapters; data and views stay those of the cache."""
    losses = {}
    for name, train in {"default": {}, "zero": {"seed": 0}, "one": {"seed": 1}, "again": {"seed": 1}}.items():
        run_train(digits_recipe(world, train={"out": str(tmp_path / name), "max_steps": 3, "eval_every": 0, **train}))
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [row["loss"] for row in metrics if "loss" in row]
    assert losses["default"] == losses["zero"], "without it the recipe's seed counts"
    assert losses["one"] == losses["again"]
    assert losses["one"][0] != losses["zero"][0]
    with pytest.raises(RequestError, match=r"train\.seed: there 1, here 2"):
        run_train(digits_recipe(world, train={"out": str(tmp_path / "one"), "seed": 2}))


@pytest.mark.parametrize("method", ["kd", "ofd"])
def test_stored_images_train_without_decoding(
    world: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cache.images = "stored"` is for machines that cannot decode fast enough: the trainer then decodes nothing."""
    path = {"path": str(tmp_path / "stored.zarr"), "images": "stored"}
    run_cache(digits_recipe(world, cache=path))
    train = {"epochs": 3, "max_steps": 15, "eval_every": 0}  # the last epoch reads mixed rows
    losses = []
    for name, cache in (("replayed", {}), ("stored", path)):
        if name == "stored":
            monkeypatch.setattr("feedfast.data.loader.Loader.stream", lambda *_, **__: pytest.fail("decoded"))
        out = str(tmp_path / f"{name}-out")
        run_train(digits_recipe(world, cache=cache, method={"name": method}, train={**train, "out": out}))
        losses.append([row["loss"] for row in read_metrics(Path(out) / "metrics.jsonl") if "loss" in row])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 15
