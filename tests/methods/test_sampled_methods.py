"""Targets at some positions of a map: which methods take them, and that their loss then means what it meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feedfast.data.positions import sample_positions
from feedfast.errors import RequestError
from feedfast.methods import METHODS, Method, StudentOutput, TapInfo
from feedfast.methods.base import LOGITS, apart
from feedfast.recipe import MethodEntry
from feedfast.stages.trainee import method_entries
from feedfast_kernels import Sampled, Target, gather_positions

BATCH, CLASSES, SIDES = 3, 5, (8, 4, 4)
CHANNELS = {"student": (3, 4, 6), "a": (5, 4, 7), "b": (6, 5, 6)}
OPTIONS = {"ofd": {}, "fitnet": {"stages": 1, "tap": "stage1"}, "ab": {"second": "task"}, "vid": {}, "camkd": {}}
NEARLY = {"at": {}, "cwd": {"map": "final"}}
SAMPLING = {**OPTIONS, **NEARLY}
COUNTS = (16, 4, 4)  # positions: a quarter


def shapes(owner: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {LOGITS: (CLASSES,)}
    for number, (channels, side) in enumerate(zip(CHANNELS[owner], SIDES, strict=True), start=1):
        found[f"ofd{number}"] = found[f"stage{number}"] = (channels, side, side)
    found["final"] = (CHANNELS[owner][-1], SIDES[-1], SIDES[-1])
    return found


def count_of(tap: str) -> int:
    return COUNTS[-1] if tap == "final" else COUNTS[int(tap[-1]) - 1]


def scene() -> tuple[StudentOutput, dict[str, dict[str, Tensor]], Tensor]:
    """float64 maps of a student and of two teachers."""
    g = torch.Generator().manual_seed(0)

    def maps(owner: str) -> dict[str, Tensor]:
        return {tap: torch.randn(BATCH, *shape, generator=g).double() for tap, shape in shapes(owner).items()}

    ours = maps("student")
    logits = ours.pop(LOGITS)
    return StudentOutput(logits, ours), {name: maps(name) for name in "ab"}, torch.tensor([3, 0, 4])


def infos(*, sampled: bool) -> dict[str, dict[str, TapInfo]]:
    return {
        name: {
            tap: TapInfo(
                shape,
                -torch.ones(shape[0]) if tap.startswith("ofd") else None,
                count_of(tap) if sampled and tap != LOGITS else None,
            )
            for tap, shape in shapes(name).items()
        }
        for name in "ab"
    }


def build(name: str, *, sampled: bool, teachers: str = "ab") -> Method:
    """Always the same adapters, in float64; batch norms as they start."""
    (entry,) = method_entries([MethodEntry(name=name, **SAMPLING.get(name, {}))])  # type: ignore[arg-type]
    torch.manual_seed(0)
    return entry.kind(
        entry.options,
        {k: v for k, v in shapes("student").items() if k != LOGITS},
        {k: infos(sampled=sampled)[k] for k in teachers},
    ).double()


def sampled_at(
    student: StudentOutput, targets: Mapping[str, Mapping[str, Tensor]], places: Callable[[str, int], Tensor]
) -> tuple[StudentOutput, Mapping[str, Mapping[str, Target]]]:
    """The same batch as a sampled cache gives it; ``places``: tap, side → positions."""
    made: dict[str, Tensor] = {}
    given: dict[str, dict[str, Target | Sampled]] = {}
    for name, taps in targets.items():
        given[name] = {}
        for tap, target in taps.items():
            if tap == LOGITS:
                given[name][tap] = target
                continue
            side = target.shape[-1]
            at = made.setdefault(tap, places(tap, side))
            given[name][tap] = Sampled(gather_positions(target, at), at, (side, side))
    plain, sampled = apart(given)
    return StudentOutput(student.output, student.taps, sampled=sampled), plain


def feature(
    method: Method, student: StudentOutput, targets: Mapping[str, Mapping[str, Target]], labels: Tensor
) -> Tensor:
    """The term that compares maps."""
    (found,) = [term for name, term in method(student, targets, labels).items() if name != "kd"]
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_over_positions_sets_is_the_full_loss(name: str) -> None:
    """Four sets that have each position once: their mean is the loss of whole maps, to float64's last digits.

    Batch norms are in evaluation: what statistics of fewer positions change is below.
    """
    student, targets, labels = scene()
    whole = feature(build(name, sampled=False).eval(), student, targets, labels).detach()
    method = build(name, sampled=True).eval()
    found = []
    for part in range(4):
        order = {side: torch.randperm(side * side, generator=torch.Generator().manual_seed(side)) for side in SIDES}
        own = sampled_at(student, targets, lambda tap, side, p=part, o=order: o[side].view(4, -1)[p].expand(BATCH, -1))
        found.append(feature(method, *own, labels).detach())
    assert len({float(loss) for loss in found}) == 4
    torch.testing.assert_close(torch.stack(found).mean(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ofd", *NEARLY])
def test_the_mean_over_keys_is_near_the_full_loss(name: str) -> None:
    """The product's own positions in 120 views: within four standard errors.

    What is normalized by its own positions has one degree of freedom less: 1 of P, here 4, is missing.
    """
    student, targets, labels = scene()
    whole = float(feature(build(name, sampled=False).eval(), student, targets, labels).detach())
    method = build(name, sampled=True).eval()
    ids, found = np.arange(BATCH), []
    for view in range(120):
        own = sampled_at(
            student,
            targets,
            lambda tap, side, v=view: torch.from_numpy(sample_positions(0, v, ids, tap, side, side, count_of(tap))),
        )
        found.append(float(feature(method, *own, labels).detach()))
    error = np.std(found) / np.sqrt(len(found))
    if name in NEARLY:
        assert 0 < 1 - np.mean(found) / whole < 1.2 / COUNTS[-1]
    else:
        assert abs(np.mean(found) - whole) < 4 * error


@pytest.mark.parametrize("name", SAMPLING)
def test_all_positions_in_any_order_are_the_whole_map(name: str) -> None:
    """In training, too: the same statistics; and the same gradient in the student's map."""
    student, targets, labels = scene()
    losses, gradients = [], []
    for sampled in (False, True):
        torch.manual_seed(1)
        leaves = {tap: x.clone().requires_grad_() for tap, x in student.taps.items()}
        own: tuple[StudentOutput, Mapping[str, Mapping[str, Target]]] = (StudentOutput(student.output, leaves), targets)
        if sampled:
            own = sampled_at(own[0], targets, lambda tap, side: torch.randperm(side * side).expand(BATCH, -1))
        loss = feature(build(name, sampled=sampled).train(), *own, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({tap: leaf.grad for tap, leaf in leaves.items() if leaf.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    assert gradients[0].keys() == gradients[1].keys() != set()
    for tap, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][tap], gradient, rtol=1e-8, atol=1e-12)


def test_ofds_batch_norm_has_the_statistics_of_the_positions() -> None:
    """The formula, value by value: connector and norm see nothing but what is looked at, and the sum is rescaled."""
    student, targets, labels = scene()
    ids = np.arange(BATCH)
    places = {
        n: sample_positions(0, 0, ids, f"ofd{n}", s, s, c) for n, s, c in zip((1, 2, 3), SIDES, COUNTS, strict=True)
    }
    own = sampled_at(
        student, targets, lambda tap, side: torch.from_numpy(places[int(tap[-1])] if tap != "final" else places[3])
    )
    method = build("ofd", sampled=True).train()
    connectors = method.get_submodule("connectors")
    assert isinstance(connectors, nn.ModuleList)
    expected = 0.0
    for teacher, name in enumerate("ab"):
        for number in (1, 2, 3):

            def at(x: Tensor, n: int = number) -> np.ndarray:
                flat = x.numpy().reshape(BATCH, x.shape[1], -1)
                return np.stack([flat[b][:, places[n][b]] for b in range(BATCH)])

            connector = connectors[teacher][number - 1]  # type: ignore[index]
            y = np.einsum(
                "oc,bcp->bop", connector[0].weight.detach().numpy()[:, :, 0, 0], at(student.taps[f"ofd{number}"])
            )
            r = (y - y.mean((0, 2), keepdims=True)) / np.sqrt(y.var((0, 2), keepdims=True) + 1e-5)
            t = np.maximum(at(targets[name][f"ofd{number}"]), -1)
            d = np.where((r <= t) & (t <= 0), 0, r - t)
            side = SIDES[number - 1]
            expected += 0.5 ** (3 - number) / 2 * (d**2).sum() / BATCH * side * side / COUNTS[number - 1]
    np.testing.assert_allclose(float(feature(method, *own, labels).detach()), expected, rtol=1e-10)


def test_teachers_who_share_positions_share_what_is_gathered() -> None:
    student, targets, _ = scene()
    own, _ = sampled_at(student, targets, lambda tap, side: torch.arange(4).expand(BATCH, -1))
    first, second = (own.at("ofd1", name)[0] for name in "ab")
    assert first is second
    assert first.shape == (BATCH, 3, 1, 4)
    assert own.at("ofd1", "a")[1] == 16
    assert StudentOutput(None, student.taps).at("ofd1", "a") == (student.taps["ofd1"], 1.0)


READING = [name for name, kind in METHODS.items() if set(kind.needs) - {LOGITS}]


def test_which_methods_take_them() -> None:
    assert {name for name in READING if METHODS[name].samples} == SAMPLING.keys()


@pytest.mark.parametrize("name", [name for name in READING if not METHODS[name].samples])
def test_the_others_say_why_not(name: str) -> None:
    assert METHODS[name].whole != Method.whole
    with pytest.raises(RequestError, match=re.escape(f"method {name!r} {METHODS[name].whole}; expected all positions")):
        build(name, sampled=True, teachers="a" if name == "sfeed" else "ab")


def test_positions_of_another_grid_are_refused() -> None:
    student = {tap: (shape[0], 3, 3) for tap, shape in shapes("student").items() if tap != LOGITS}
    (entry,) = method_entries([MethodEntry(name="at")])
    with pytest.raises(RequestError, match=r"'stage1' of teacher 'a': found 16 of 64 positions of a map of \[8, 8\]"):
        entry.kind(entry.options, student, infos(sampled=True))
