"""Methods that compare relations among a batch's samples (rkd, sp, pkt) against formulas in float64; invariances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import huber
from torch import Tensor

from feedfast.errors import RequestError
from feedfast.methods import METHODS, Method, StudentOutput, TapInfo, parse_options
from feedfast_kernels import Codes, Target, encode

BATCH = 5
STUDENT = (8, 4, 4)
FINAL = {"a": (5, 4, 4), "b.2": (12, 2, 3)}
NAMES = ["rkd", "sp", "pkt"]
UNLABELED = torch.full((BATCH,), -1)

Array = NDArray[np.float64]
Given = dict[str, dict[str, Target]]


def make(name: str, teachers: tuple[str, ...] = ("a", "b.2"), **options: object) -> Method:
    infos = {owner: {"final": TapInfo(FINAL[owner])} for owner in teachers}
    return METHODS[name](parse_options(METHODS[name], options), {"final": STUDENT}, infos)


def scene(teachers: tuple[str, ...] = ("a", "b.2")) -> tuple[StudentOutput, Given]:
    g = torch.Generator().manual_seed(0)
    targets: Given = {owner: {"final": torch.randn(BATCH, *FINAL[owner], generator=g)} for owner in teachers}
    return output(torch.randn(BATCH, *STUDENT, generator=g).requires_grad_()), targets


def output(x: Tensor) -> StudentOutput:
    return StudentOutput(torch.zeros(BATCH, 3), {"final": x})


def f64(x: object) -> Array:
    assert isinstance(x, Tensor)
    return x.detach().double().numpy()


def terms_of(method: Method, x: Tensor, targets: Given) -> dict[str, float]:
    return {term: value.item() for term, value in method(output(x), targets, UNLABELED).items()}


# --- formulas: embeddings [B, C] or flattened maps [B, D] of student and one teacher


def rkd_by_hand(x: Array, t: Array) -> dict[str, float]:
    distances = [cdist(v, v) / cdist(v, v)[~np.eye(BATCH, dtype=bool)].mean() for v in (x, t)]
    angles = []
    for v in (x, t):
        cosines = np.zeros((BATCH,) * 3)
        for i, j, k in np.ndindex(cosines.shape):
            if j != i != k:
                cosines[i, j, k] = 1 - cdist([v[j] - v[i]], [v[k] - v[i]], "cosine")[0, 0]
        angles.append(cosines)
    return {
        "distance": float(huber(1, distances[0] - distances[1]).mean()),
        "angle": float(huber(1, angles[0] - angles[1]).mean()),
    }


def sp_by_hand(x: Array, t: Array) -> dict[str, float]:
    grams = [v @ v.T / np.linalg.norm(v @ v.T, axis=1, keepdims=True) for v in (x, t)]
    return {"similarity": float(((grams[0] - grams[1]) ** 2).sum() / BATCH**2)}


def pkt_by_hand(x: Array, t: Array) -> dict[str, float]:
    q, p = (1 - cdist(v, v, "cosine") / 2 for v in (x, t))
    q, p = (v / v.sum(1, keepdims=True) for v in (q, p))
    return {"neighbors": float((p * np.log(p / q)).sum() / BATCH**2)}


FORMULAS: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "rkd": rkd_by_hand,
    "sp": sp_by_hand,
    "pkt": pkt_by_hand,
}


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_their_formulas_averaged_over_teachers(name: str) -> None:
    student, targets = scene()

    def vectors(x: object) -> Array:
        return f64(x).reshape(BATCH, -1) if name == "sp" else f64(x).mean((2, 3))

    x = vectors(student.taps["final"])
    each = [FORMULAS[name](x, vectors(taps["final"])) for taps in targets.values()]
    found = terms_of(make(name), student.taps["final"], targets)
    assert list(found) == list(each[0])
    for term, value in found.items():
        assert value > 1e-5
        # pkt's constants of 1e-7 under the logarithm are not in the formula
        np.testing.assert_allclose(value, (each[0][term] + each[1][term]) / 2, rtol=1e-4)


def test_defaults_are_those_of_repdistiller() -> None:
    assert make("rkd").weights(0.0) == {"distance": 25.0, "angle": 50.0}
    assert make("sp").weights(0.5) == {"similarity": 3000.0}
    assert make("pkt").weights(1.0) == {"neighbors": 30000.0}
    assert all(make(name).task_weight(0.5) == 1.0 and METHODS[name].needs == ("final",) for name in NAMES)
    assert not any(list(make(name).parameters()) for name in NAMES)


# --- invariances


def rotation(size: int) -> Tensor:
    """A random orthogonal matrix."""
    g = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


def turned(x: Tensor, *, whole: bool) -> Tensor:
    """The channels rotated, or the whole flattened map."""
    x = x.detach().double()
    if whole:
        return (x.flatten(1) @ rotation(x[0].numel())).reshape(x.shape).float()
    return torch.einsum("bchw,cd->bdhw", x, rotation(x.shape[1])).float()


@pytest.mark.parametrize("name", NAMES)
def test_rotation_and_scale_of_the_student_change_nothing(name: str) -> None:
    student, targets = scene()
    method, x = make(name), student.taps["final"]
    plain = terms_of(method, x, targets)
    assert terms_of(method, turned(x, whole=name == "sp"), targets) == pytest.approx(plain, rel=1e-4)
    assert terms_of(method, 7 * x, targets) == pytest.approx(plain, rel=1e-4)
    # what must change them: other neighbors
    assert terms_of(method, x.flip(0), targets) != pytest.approx(plain, rel=1e-2)


def test_rkd_may_be_moved_and_the_others_may_not() -> None:
    student, targets = scene()
    x = student.taps["final"].detach()
    moved = x + torch.linspace(-2, 2, STUDENT[0])[:, None, None]
    for name in NAMES:
        plain, found = (terms_of(make(name), v, targets) for v in (x, moved))
        assert (found == pytest.approx(plain, rel=1e-4)) == (name == "rkd")


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_own_map_turned_costs_nothing(name: str) -> None:
    _, targets = scene(("a",))
    x = targets["a"]["final"]
    assert isinstance(x, Tensor)
    method = make(name, ("a",))
    found, scale = terms_of(method, 2 * turned(x, whole=name == "sp"), targets), terms_of(method, x.flip(0), targets)
    assert all(abs(found[term]) < 1e-4 * scale[term] for term in found)


# --- what every method keeps


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_to_the_student_alone_and_are_right(name: str) -> None:
    student, targets = scene()
    for taps in targets.values():
        for x in taps.values():
            assert isinstance(x, Tensor)
            x.requires_grad_()
    method, x = make(name), student.taps["final"]
    total = torch.stack(list(method(student, targets, UNLABELED).values())).sum()
    total.backward()
    assert all(isinstance(x, Tensor) and x.grad is None for taps in targets.values() for x in taps.values())
    assert x.grad is not None
    # along the gradient the formula in float64 rises as fast as it says
    gradient, small = x.grad.double(), 1e-5
    ends = []
    for sign in (1, -1):
        value = 0.0
        for taps in targets.values():
            v, t = x.double() + sign * small * gradient / gradient.norm(), f64(taps["final"])
            ours = f64(v).reshape(BATCH, -1) if name == "sp" else f64(v).mean((2, 3))
            theirs = t.reshape(BATCH, -1) if name == "sp" else t.mean((2, 3))
            value += sum(FORMULAS[name](ours, theirs).values()) / len(targets)
        ends.append(value)
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * small), gradient.norm().item(), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["one sample", "equal samples", "zeros"])
def test_batches_without_relations_are_finite(name: str, case: str) -> None:
    student, targets = scene(("a",))
    x = student.taps["final"].detach()
    if case == "one sample":
        x = x[:1]
        targets = {"a": {"final": torch.as_tensor(f64(targets["a"]["final"])[:1])}}
    elif case == "equal samples":
        x = x[:1].expand(BATCH, -1, -1, -1).clone()
    else:
        x = torch.zeros_like(x)
    x.requires_grad_()
    terms = make(name, ("a",))(StudentOutput(torch.zeros(len(x), 3), {"final": x}), targets, UNLABELED[: len(x)])
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.isfinite() for value in terms.values())
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_computes_relations_in_fp32(name: str) -> None:
    student, targets = scene()
    low = student.taps["final"].detach().bfloat16().contiguous(memory_format=torch.channels_last)
    method = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method(output(low), targets, UNLABELED)
    assert all(value.dtype == torch.float32 for value in found.values())
    expected = terms_of(method, low.float(), targets)
    assert {term: value.item() for term, value in found.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_the_floats_they_mean_give_the_same_bits(name: str) -> None:
    student, targets = scene(("a",))
    x = targets["a"]["final"]
    assert isinstance(x, Tensor)
    offset, scale = torch.full((5,), -3.0), torch.full((5,), 0.025)
    data = encode(x, offset, scale, codec="u8")[0]
    decoded = (data.float() * scale + offset).permute(0, 3, 1, 2)  # channels-last: means are summed in stored order
    method = make(name, ("a",))
    left = terms_of(method, student.taps["final"], {"a": {"final": Codes(data, offset, scale, "u8")}})
    assert left == terms_of(method, student.taps["final"], {"a": {"final": decoded}})


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    kind = METHODS[name]
    with pytest.raises(RequestError, match=rf"'{name}' needs at least one teacher, found none"):
        make(name, ())
    with pytest.raises(RequestError, match="teacher 'a': expected a tap named 'final', found none"):
        kind(kind.Options(), {"final": STUDENT}, {"a": {}})
    with pytest.raises(RequestError, match=r"student: expected a tap named 'final', found \['ofd1'\]"):
        kind(kind.Options(), {"ofd1": STUDENT}, {"a": {"final": TapInfo(STUDENT)}})
    option = next(iter(kind.Options.model_fields))
    with pytest.raises(RequestError, match=f"^method.{option}: expected a number of 0 or more, found -1.0$"):
        parse_options(kind, {option: -1.0})
    with pytest.raises(RequestError, match=f"^method.gamma: not an option of '{name}', expected beta"):
        parse_options(kind, {"gamma": 1.0})
