"""FEED with unequal teachers, factor transfer, EKD, born-again networks and locality, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from feedfast.errors import FeedfastError, RequestError
from feedfast.methods import EKD, FT, METHODS, PFEED, Locality, Method, StudentOutput, TapInfo, parse_options
from feedfast.methods.ft import Paraphraser, train_paraphraser
from feedfast.methods.parts import same_grid
from feedfast_kernels import as_float, encode
from feedfast_kernels.codes import Codes

BATCH, CLASSES = 6, 5
Shapes = dict[str, tuple[int, ...]]


Shapes = dict[str, tuple[int, ...]]


def f64(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def make(
    name: str, student: dict[str, tuple[int, ...]], teachers: dict[str, dict[str, tuple[int, ...]]], **options: object
) -> Method:
    kind = METHODS[name]
    infos = {owner: {tap: TapInfo(shape) for tap, shape in taps.items()} for owner, taps in teachers.items()}
    torch.manual_seed(1)
    return kind(parse_options(kind, options), student, infos)


def maps(shapes: Shapes, seed: int, *, grad: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {tap: torch.randn(BATCH, *shape, generator=g).requires_grad_(grad) for tap, shape in shapes.items()}


def unit(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def layers(network: nn.Module, x: Tensor) -> Tensor:
    """Convolutions by hand, each with LeakyReLU(0.1) after it."""
    x = x.double()
    for m in network.modules():
        if isinstance(m, nn.ConvTranspose2d):
            # a transposed convolution of stride 1 is a convolution with the kernel flipped and its axes swapped
            assert m.bias is not None
            x = F.conv2d(x, m.weight.double().flip(2, 3).transpose(0, 1), m.bias.double(), padding=1)
        elif isinstance(m, nn.Conv2d):
            assert m.bias is not None
            x = F.conv2d(x, m.weight.double(), m.bias.double(), padding=1)
        else:
            continue
        x = torch.where(x > 0, x, 0.1 * x)
    return x


def pooled(x: np.ndarray, side: int) -> np.ndarray:
    k = x.shape[2] // side
    return x.reshape(*x.shape[:2], side, k, side, k).mean((3, 5))


# --- FEED


@pytest.mark.parametrize(("ours", "theirs"), [(4, 2), (2, 4), (4, 4)])
def test_pfeed_meets_teachers_of_other_widths_and_grids(ours: int, theirs: int) -> None:
    student = maps({"final": (3, ours, ours)}, 0, grad=True)
    teachers = {"a": {"final": (5, theirs, theirs)}, "b": {"final": (3, ours, ours)}}
    method = make("pfeed", {"final": (3, ours, ours)}, teachers)
    assert isinstance(method, PFEED)
    targets = {name: maps(taps, number) for number, (name, taps) in enumerate(teachers.items(), start=7)}
    found = method(StudentOutput(None, student), targets, None)["feature"]
    expected = 0.0
    for name, ntl in zip(teachers, method.ntls, strict=True):
        s, t = f64(layers(ntl, student["final"])), f64(targets[name]["final"])
        side = min(s.shape[2], t.shape[2])
        expected += np.abs(unit(pooled(s, side)) - unit(pooled(t, side))).mean()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)
    found.backward()
    assert student["final"].grad is not None


def test_codes_stay_codes_on_equal_grids_and_are_pooled_as_floats() -> None:
    values = torch.randn(2, 4, 4, 4)
    offset, step = torch.full((4,), -4.0), torch.full((4,), 1 / 32)
    codes = Codes(encode(values, offset, step, codec="u8")[0], offset, step, "u8")
    same, target = same_grid(torch.randn(2, 3, 4, 4), codes)
    assert target is codes
    assert same.shape[2:] == (4, 4)
    _, smaller = same_grid(torch.randn(2, 3, 2, 2), codes)
    assert isinstance(smaller, Tensor)
    np.testing.assert_allclose(f64(smaller), pooled(f64(as_float(codes)), 2), rtol=1e-6, atol=1e-6)


def test_sfeed_is_pfeed_with_one_teacher_and_refuses_more() -> None:
    shapes = {"final": (3, 2, 2)}
    one = make("sfeed", shapes, {"a": shapes})
    other = make("pfeed", shapes, {"a": shapes})
    student, targets = StudentOutput(None, maps(shapes, 0)), {"a": maps(shapes, 1)}
    assert torch.equal(one(student, targets, None)["feature"], other(student, targets, None)["feature"])
    with pytest.raises(RequestError, match=r"'sfeed' learns from one teacher, .*found 2; with several, use 'pfeed'"):
        make("sfeed", shapes, {"a": shapes, "b": shapes})


def test_ban_adds_an_unsoftened_divergence_to_cross_entropy() -> None:
    method = make("ban", {}, {"a": {"logits": (CLASSES,)}})
    z, t = maps({"logits": (CLASSES,)}, 0), maps({"logits": (CLASSES,)}, 1)
    found = method(StudentOutput(z["logits"], {}), {"a": t}, None)["kd"]
    p, q = softmax(f64(t["logits"]), axis=1), softmax(f64(z["logits"]), axis=1)
    np.testing.assert_allclose(found.item(), rel_entr(p, q).sum(1).mean(), rtol=1e-5)
    assert (method.weights(0.5), method.task_weight(0.5)) == ({"kd": 1.0}, 1.0)


# --- factor transfer


def test_ft_is_its_formula() -> None:
    shapes, teachers = {"final": (6, 4, 4)}, {"a": {"final": (8, 4, 4)}, "b": {"final": (6, 2, 2)}}
    method = make("ft", shapes, teachers, rate=0.5)
    assert isinstance(method, FT)
    student = maps(shapes, 0, grad=True)
    targets = {name: maps(taps, number) for number, (name, taps) in enumerate(teachers.items(), start=3)}
    found = method(StudentOutput(None, student), targets, None)["factor"]
    expected = 0.0
    for name, paraphraser, translator in zip(teachers, method.paraphrasers, method.translators, strict=True):
        assert isinstance(paraphraser, Paraphraser)
        s, t = f64(layers(translator, student["final"])), f64(layers(paraphraser.encoder, targets[name]["final"]))
        assert s.shape[1] == t.shape[1] == teachers[name]["final"][0] // 2
        side = min(s.shape[2], t.shape[2])
        expected += np.abs(unit(pooled(s, side)) - unit(pooled(t, side))).mean()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)
    found.backward()
    assert all(p.grad is not None for p in method.translators.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.paraphrasers.parameters())
    assert method.weights(0.0) == {"factor": 500.0}


def test_a_paraphraser_rebuilds_maps_and_learns() -> None:
    torch.manual_seed(0)
    paraphraser = Paraphraser(8, 0.5)
    x = torch.randn(4, 8, 5, 3)
    assert paraphraser.encoder(x).shape == (4, 4, 5, 3)
    np.testing.assert_allclose(f64(paraphraser(x)), f64(layers(paraphraser, x)), rtol=1e-4, atol=1e-6)
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 8, generator=g)  # maps of rank 3: four factors suffice
    batches = [torch.einsum("bkhw,kc->bchw", torch.rand(16, 3, 4, 4, generator=g), basis) for _ in range(8)]
    before = F.l1_loss(paraphraser(batches[0]), batches[0]).item()
    means = list(train_paraphraser(paraphraser, (iter(batches) for _ in range(40))))
    after = F.l1_loss(paraphraser(batches[0]), batches[0]).item()
    assert len(means) == 40
    assert means[-1] < 0.6 * means[0]
    assert after < 0.6 * before
    assert not any(p.requires_grad for p in paraphraser.parameters())
    with pytest.raises(FeedfastError, match="paraphraser_lr: expected a finite"):
        list(train_paraphraser(paraphraser, [iter([x * float("inf")])]))


def test_prepare_trains_every_paraphraser_on_its_own_teacher() -> None:
    shapes = {"final": (4, 2, 2)}
    teachers = {"a": shapes, "b": shapes}
    method = make("ft", shapes, teachers, paraphraser_epochs=3)
    assert isinstance(method, FT)
    start = {key: value.clone() for key, value in method.state_dict().items()}
    asked: list[int] = []

    def passes(epoch: int):  # type: ignore[no-untyped-def]
        asked.append(epoch)
        return iter([{"a": maps(shapes, 1), "b": maps(shapes, 2)}] * 2)

    method.prepare(passes)
    assert asked == [0, 1, 2] * 2
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, start[key])}
    assert changed == {key for key in start if key.startswith("paraphrasers.")}
    first, second = (f"paraphrasers.{number}.encoder.0.weight" for number in (0, 1))
    assert not torch.equal(method.state_dict()[first], method.state_dict()[second])
    method.train()
    assert not method.paraphrasers.training


# --- EKD


def branch_shapes(branches: int) -> Shapes:
    shapes: Shapes = {}
    for number in range(1, branches + 1):
        shapes |= {f"branch{number}.final": (3, 2, 2), f"branch{number}.logits": (CLASSES,)}
    return shapes


def ekd_teachers(count: int) -> dict[str, Shapes]:
    return {f"t{number}": {"final": (4 + number, 2, 2), "logits": (CLASSES,)} for number in range(count)}


@pytest.mark.parametrize(
    ("branches", "teachers", "pairing"), [(2, 2, None), (4, 2, None), (3, 2, [1, 1, 0]), (1, 1, None)]
)
def test_ekd_is_its_formula(branches: int, teachers: int, pairing: list[int] | None) -> None:
    shapes, owners = branch_shapes(branches), ekd_teachers(teachers)
    method = make("ekd", shapes, owners, **({"pairing": pairing} if pairing else {}))
    assert isinstance(method, EKD)
    taps = maps(shapes, 0, grad=True)
    targets = {name: maps(of, number) for number, (name, of) in enumerate(owners.items(), start=5)}
    labels = torch.tensor([0, 4, -1, 2, 1, -1])
    out = method(StudentOutput(None, taps), targets, labels)
    known = (labels >= 0).numpy()
    ce, kd, feature = [], [], []
    for number in range(branches):
        teacher = f"t{pairing[number] if pairing else number % teachers}"
        z, t = f64(taps[f"branch{number + 1}.logits"]), f64(targets[teacher]["logits"])
        ce.append(-log_softmax(z, axis=1)[known, labels.numpy()[known]].mean())
        kd.append(100 * rel_entr(softmax(t / 10, axis=1), softmax(z / 10, axis=1)).sum(1).mean())
        kernel = f64(method.adapters[number].get_parameter("0.weight"))[:, :, 0, 0]
        r = np.einsum("oc,bchw->bohw", kernel, f64(taps[f"branch{number + 1}.final"]))
        r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
        feature.append(((r - f64(targets[teacher]["final"])) ** 2).mean())
    for name, values in (("branches", ce), ("kd", kd), ("feature", feature)):
        np.testing.assert_allclose(out[name].item(), np.mean(values), rtol=1e-4, err_msg=name)
    torch.stack(list(out.values())).sum().backward()
    assert all(tap.grad is not None and tap.grad.any() for tap in taps.values())
    assert (method.weights(0.1), method.task_weight(0.1)) == ({"branches": 0.5, "kd": 0.6, "feature": 0.6}, 0.5)


def test_a_branch_that_is_its_teacher_has_no_divergence() -> None:
    shapes, owners = branch_shapes(1), ekd_teachers(1)
    method = make("ekd", shapes, owners)
    taps, targets = maps(shapes, 0), {"t0": maps(owners["t0"], 1)}
    targets["t0"]["logits"] = taps["branch1.logits"].clone()
    assert method(StudentOutput(None, taps), targets, torch.zeros(BATCH, dtype=torch.int64))["kd"].abs() < 1e-5


def test_branches_and_teachers_that_do_not_pair_are_refused() -> None:
    with pytest.raises(RequestError, match=r"student.branches: expected 2 or a multiple.*found 3; .*method.pairing"):
        make("ekd", branch_shapes(3), ekd_teachers(2))
    with pytest.raises(RequestError, match=r"method.pairing: expected 2 numbers from 0 to 1.*found \[0, 2\]"):
        make("ekd", branch_shapes(2), ekd_teachers(2), pairing=[0, 2])
    with pytest.raises(RequestError, match=r"method.pairing: expected 2 numbers from 0 to 1.*found \[0\]"):
        make("ekd", branch_shapes(2), ekd_teachers(2), pairing=[0])
    with pytest.raises(RequestError, match=r"method.pairing: expected a list of whole numbers, found 'all'"):
        make("ekd", branch_shapes(2), ekd_teachers(2), pairing="all")


# --- locality


@pytest.mark.parametrize("sigma", [None, 1.7])
@pytest.mark.parametrize("features", ["embedding", "map"])
def test_locality_is_its_formula(sigma: float | None, features: str) -> None:
    shapes, owners = {"final": (3, 2, 2)}, {"a": {"final": (5, 2, 2)}, "b": {"final": (4, 4, 4)}}
    options = {"k": 2, "features": features, **({"sigma": sigma} if sigma else {})}
    method = make("locality", shapes, owners, **options)
    student = maps(shapes, 0, grad=True)
    targets = {name: maps(taps, number) for number, (name, taps) in enumerate(owners.items(), start=2)}
    found = method(StudentOutput(None, student), targets, None)["locality"]

    def feature(x: Tensor) -> np.ndarray:
        return f64(x).mean((2, 3)) if features == "embedding" else f64(x).reshape(BATCH, -1)

    s = cdist(feature(student["final"]), feature(student["final"])) ** 2
    expected = 0.0
    for name in owners:
        t = feature(targets[name]["final"])
        d = cdist(t, t) ** 2
        near = np.argsort(d + np.diag(np.full(BATCH, np.inf)), axis=1)[:, :2]
        chosen = np.take_along_axis(d, near, 1)
        alpha = np.exp(-chosen / (sigma**2 if sigma else chosen.mean()))
        expected += (alpha * np.take_along_axis(s, near, 1)).sum() / (2 * BATCH * len(owners))
    np.testing.assert_allclose(found.item(), expected, rtol=1e-4)
    found.backward()
    assert student["final"].grad is not None
    assert student["final"].grad.any()
    assert not list(method.parameters())


def test_locality_says_when_it_has_become_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("feedfast.methods.locality.log.warning", said.append)
    shapes = {"final": (3, 2, 2)}
    tiny = make("locality", shapes, {"a": shapes}, sigma=1e-3)
    assert isinstance(tiny, Locality)
    for _ in range(3):
        tiny(StudentOutput(None, maps(shapes, 0)), {"a": maps(shapes, 1)}, None)
    assert [message[:12] for message in said] == ["method.sigma"]
    said.clear()
    point = {"final": torch.ones(BATCH, 3, 2, 2)}
    make("locality", shapes, {"a": shapes})(StudentOutput(None, point), {"a": maps(shapes, 1)}, None)
    assert [message[:12] for message in said] == ["method.gamma"]
    said.clear()
    make("locality", shapes, {"a": shapes})(StudentOutput(None, maps(shapes, 0)), {"a": maps(shapes, 1)}, None)
    assert said == []


def test_tokens_are_refused_with_the_word_that_makes_a_map_of_them() -> None:
    with pytest.raises(RequestError, match=r"\(24, 17\) of teacher 't'; tokens become the map of their grid with :map"):
        PFEED(PFEED.Options(), {"final": (4, 2, 2)}, {"t": {"final": TapInfo((24, 17))}})
