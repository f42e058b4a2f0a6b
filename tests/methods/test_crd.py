"""CRD: its loss and its memory against NumPy, which negatives it draws, and runs from a cache, live and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import digits_recipe
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods import CRD, StudentOutput, TapInfo, Targets
from feedfast.methods.crd import Contrast, Negatives
from feedfast.models.build import build_model
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.checkpoint import CHECKPOINT
from feedfast.stages.loop import seed_step
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker

IDS = torch.tensor([2, 3, 5, 8, 13, 21, 34, 55, 89])
LABELS = torch.tensor([1, 0, 1, -1, 2, 0, 1, -1, 1])
BATCH = torch.tensor([34, 2, 55, 21])
CHANNELS = {"a": 5, "b.2": 6}

Array = NDArray[np.float64]


def make(**options: Any) -> CRD:
    torch.manual_seed(1)
    infos = {name: {"final": TapInfo((channels, 2, 2))} for name, channels in CHANNELS.items()}
    method = CRD(CRD.Options(**{"width": 4, "negatives": 3, **options}), {"final": (8, 4, 4)}, infos)
    method.meet(IDS, LABELS)
    return method


def scene(seed: int = 0) -> tuple[StudentOutput, Targets]:
    g = torch.Generator().manual_seed(seed)
    targets = {name: {"final": torch.randn(4, channels, 2, 2, generator=g)} for name, channels in CHANNELS.items()}
    x = torch.randn(4, 8, 4, 4, generator=g).requires_grad_()
    return StudentOutput(torch.zeros(4, 3), {"final": x}, BATCH), targets


def f64(x: object) -> Array:
    assert isinstance(x, Tensor)
    return x.detach().double().numpy().copy()


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embedded(layer: nn.Linear, x: object) -> Array:
    return unit(f64(x).mean((2, 3)) @ f64(layer.weight).T + f64(layer.bias))


def side(v: Array, memory: Array, shown: NDArray[np.int64], z: float | None) -> tuple[float, float]:
    """One of the loss's halves, pair by pair, and its Z."""
    n, k = len(memory), shown.shape[1] - 1
    e = np.array([[np.exp(v[b] @ memory[j] / 0.07) for j in shown[b]] for b in range(len(v))])
    z = e.mean() * n if z is None else z
    h = e / z / (e / z + k / n)
    return float(-(np.log(h[:, 0]).sum() + np.log(1 - h[:, 1:]).sum()) / len(v)), z


def test_three_steps_are_their_formula() -> None:
    """Loss, Z kept from the first step, and what is remembered, one teacher after the other."""
    method = make()
    contrasts = [c for c in method.contrasts if isinstance(c, Contrast)]
    memories = [(f64(c.student_memory), f64(c.teacher_memory)) for c in contrasts]
    constants: list[list[float | None]] = [[None, None], [None, None]]
    at = [list(IDS).index(i) for i in BATCH]
    for step in range(3):
        student, targets = scene(step)
        torch.manual_seed(step)
        (found,) = method(student, targets, None).values()
        assert method.negatives is not None
        torch.manual_seed(step)
        shown = np.concatenate([np.array(at)[:, None], method.negatives.draw(torch.tensor(at), 3).numpy()], 1)
        total = 0.0
        for number, (name, contrast) in enumerate(zip(CHANNELS, contrasts, strict=True)):
            s = embedded(contrast.student, student.taps["final"])
            t = embedded(contrast.teacher, targets[name]["final"])
            of_student, of_teacher = memories[number]
            z = constants[number]
            one, z[0] = side(s, of_teacher, shown, z[0])
            two, z[1] = side(t, of_student, shown, z[1])
            total += (one + two) / 2
            for memory, v in ((of_student, s), (of_teacher, t)):
                for row, position in enumerate(at):
                    memory[position] = unit(0.5 * memory[position] + 0.5 * v[row])
            np.testing.assert_allclose(f64(contrast.student_memory), of_student, atol=1e-6)
            np.testing.assert_allclose(f64(contrast.teacher_memory), of_teacher, atol=1e-6)
        np.testing.assert_allclose(found.item(), total, rtol=1e-4)
        found.backward()
        assert student.taps["final"].grad is not None
        assert all(p.grad is not None for p in method.parameters())


def test_the_gradient_is_that_of_the_memory_before_the_step() -> None:
    torch.manual_seed(0)
    contrast = Contrast(8, 5, 4)
    contrast.remember(9)
    contrast.double()
    shown = torch.tensor([[0, 3, 4], [2, 1, 1]])
    contrast.z = torch.tensor([40.0, 50.0], dtype=torch.float64)
    before = contrast.student_memory, contrast.teacher_memory

    def loss(x: Tensor) -> Tensor:
        contrast.student_memory, contrast.teacher_memory = before
        found: Tensor = contrast(x, torch.ones(2, 5, dtype=torch.float64), shown, 0.5, 0.5)
        return found

    assert torch.autograd.gradcheck(loss, (torch.randn(2, 8, dtype=torch.float64, requires_grad=True),))
    assert not torch.equal(contrast.student_memory, before[0])


def test_negatives_are_of_other_classes_and_equally_likely() -> None:
    negatives = Negatives(IDS, LABELS)
    at = negatives.positions(IDS)
    assert at.tolist() == list(range(9))
    assert negatives.positions(BATCH).tolist() == [6, 0, 7, 5]
    drawn = negatives.draw(at, 20_000)
    for position, row in enumerate(drawn):
        label = LABELS[position]
        allowed = [j for j in range(9) if j != position and (label < 0 or LABELS[j] != label)]
        counts = np.bincount(row.numpy(), minlength=9)
        assert np.flatnonzero(counts).tolist() == allowed
        # five standard deviations of a count
        assert np.abs(counts[allowed] - 20_000 / len(allowed)).max() < 5 * np.sqrt(20_000 / len(allowed))


def test_a_step_that_is_seeded_draws_the_same() -> None:
    student, targets = scene()
    found = []
    for seed in (7, 7, 8):
        method = make()
        torch.manual_seed(seed)
        found.append(method(student, targets, None)["contrast"].item())
    assert found[0] == found[1] != found[2]


def test_bf16_autocast_contrasts_in_fp32() -> None:
    student, targets = scene()
    low = StudentOutput(student.output, {"final": student.taps["final"].detach().bfloat16()}, BATCH)
    found = []
    for x in (low, StudentOutput(student.output, {"final": low.taps["final"].float()}, BATCH)):
        method = make()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x is low):
            found.append(method(x, targets, None)["contrast"])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1])


def test_what_cannot_be_contrasted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RequestError, match=r"^data.train: 'crd' needs samples of at least two classes, found 9 of one$"
    ):
        Negatives(IDS, torch.full((9,), 4))
    Negatives(IDS, torch.full((9,), -1))  # without labels every sample is its own class
    method = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(RequestError, match="'crd' remembers every sample and needs one rank, found 4"):
        method.meet(IDS, LABELS)


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crd")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, folder / "unused", codec))
    return folder


def recipe_for(world: Path, out: Path, codec: str, **options: Any) -> Recipe:
    return digits_recipe(
        world,
        cache={"codec": codec, "path": str(world / f"{codec}.zarr")},
        method={"name": "crd", "width": 16, "negatives": 64},
        train={"out": str(out), "eval_every": 0, **options},
    )


def train(world: Path, out: Path, **options: Any) -> list[float]:
    run_train(recipe_for(world, out, "f32", **options))
    return [row["contrast"] for row in read_metrics(out / "metrics.jsonl") if "contrast" in row]


def test_cached_live_and_resumed_runs_are_one(world: Path, tmp_path: Path) -> None:
    """Memories, Z and draws are those of an uninterrupted run; the student carries none of them."""
    cached = train(world, tmp_path / "cache")
    assert len(cached) == 12
    assert cached == train(world, tmp_path / "live", source="live")
    train(world, tmp_path / "twice", max_steps=7)
    assert train(world, tmp_path / "twice", max_steps=0) == cached
    whole, resumed = (torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("cache", "twice"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert set(whole) == set(build_model("zoo/wrn-10-1", num_classes=10, weights=None).state_dict())
    kept = torch.load(tmp_path / "cache" / CHECKPOINT, weights_only=True)["method"]
    assert kept["0.contrasts.1.student_memory"].shape == (200, 16)
    assert not any("negatives" in name for name in kept)


def test_u8_loss_and_gradient(world: Path, tmp_path: Path) -> None:
    """A u8 cache changes the loss by less than 0.5 % and turns the gradient by less than acos(0.999)."""
    losses, gradients = [], []
    for source in ("cache", "live"):
        run = StudentRun(recipe_for(world, tmp_path / source, "u8", source=source), Worker.from_env())
        batch = next(iter(run.loop.batches(0)))
        seed_step(run.device, 0, 0, 0)
        loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, 0.5, batch.ids)["loss"]
        loss.backward()
        run.close()
        losses.append(loss.item())
        found = [p.grad.double().flatten() for p in run.trainer.trainee.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    ours, theirs = gradients
    assert ours @ theirs / (ours.norm() * theirs.norm()) >= 0.999
    assert not torch.equal(ours, theirs), "codes were compared with themselves"


@pytest.mark.slow
def test_it_learns_to_tell_samples_apart(world: Path, tmp_path: Path) -> None:
    found = train(world, tmp_path / "long", epochs=20, lr=0.05)
    assert np.mean(found[-6:]) < 0.8 * np.mean(found[:6])
