"""Methods that compare logits (kd standardized, dkd, dist, camkd): formulas in float64, and their invariances."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods import CAMKD, DIST, DKD, KD, METHODS, Method, StudentOutput, TapInfo, parse_options
from feedfast.methods.logit import uncorrelated
from feedfast.stages.trainee import Entry, losses_of
from feedfast.tasks import Classify, label_loss
from feedfast_kernels import Codes, Target, encode

BATCH, CLASSES = 6, 7
LABELS = torch.tensor([3, -1, 0, 6, -1, 3])
LABELED = LABELS >= 0
STUDENT = {"final": (8, 4, 4)}
FINAL = {"a": (5, 4, 4), "b.2": (6, 2, 2), "c": (3, 8, 8)}

Array = NDArray[np.float64]
Given = dict[str, dict[str, Target]]


def make(name: str, teachers: tuple[str, ...] = ("a", "b.2"), **options: object) -> Method:
    infos = {owner: {"logits": TapInfo((CLASSES,)), "final": TapInfo(FINAL[owner])} for owner in teachers}
    torch.manual_seed(1)
    return METHODS[name](parse_options(METHODS[name], options), STUDENT, infos)


def scene(teachers: tuple[str, ...] = ("a", "b.2"), seed: int = 0) -> tuple[StudentOutput, Given]:
    g = torch.Generator().manual_seed(seed)
    targets: Given = {
        owner: {
            "logits": 3 * torch.randn(BATCH, CLASSES, generator=g),
            "final": torch.randn(BATCH, *FINAL[owner], generator=g),
        }
        for owner in teachers
    }
    z = (2 * torch.randn(BATCH, CLASSES, generator=g)).requires_grad_()
    return StudentOutput(z, {"final": torch.randn(BATCH, *STUDENT["final"], generator=g).requires_grad_()}), targets


def f64(x: object) -> Array:
    assert isinstance(x, Tensor)
    return x.detach().double().numpy()


def logits_of(targets: Given) -> list[Array]:
    return [f64(taps["logits"]) for taps in targets.values()]


def unit_rows(z: Array) -> Array:
    return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)


def step(method: Method, student: StudentOutput, targets: Given, labels: Tensor = LABELS) -> dict[str, Tensor]:
    """What a training step of this method alone computes, in the middle of the run."""
    return losses_of(Classify(), [Entry(type(method), None, 1.0, method.name)], [method], student, targets, labels, 0.5)


def ce_of(z: Array) -> float:
    rows = LABELED.numpy()
    return float(-log_softmax(z, axis=1)[np.arange(BATCH), LABELS.numpy()][rows].mean())


# --- formulas


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_standardized_kd_is_its_formula_and_cross_entropy_reads_raw_logits(average: str) -> None:
    student, targets = scene()
    z, theirs = f64(student.output), [unit_rows(z) / 2 for z in logits_of(targets)]
    p = np.mean([softmax(t, axis=1) for t in theirs], 0) if average == "probabilities" else softmax(sum(theirs) / 2, 1)
    kd = 4 * rel_entr(p, softmax(unit_rows(z) / 2, axis=1)).sum(1).mean()
    out = step(make("kd", standardize=True, tau=2.0, average=average), student, targets)
    np.testing.assert_allclose([out["ce"].item(), out["kd"].item()], [ce_of(z), kd], rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), 0.1 * ce_of(z) + 0.9 * kd, rtol=1e-5)
    assert not out["ce"].requires_grad
    assert not out["kd"].requires_grad


def test_standardized_kd_has_the_gradient_of_both_its_parts() -> None:
    student, targets = scene()
    method = make("kd", standardize=True, alpha=0.3)

    def loss(z: Tensor) -> Tensor:
        return step(method, StudentOutput(z, student.taps), targets)["loss"]

    assert torch.autograd.gradcheck(loss, (student.output.detach().double().requires_grad_(),))


def dkd_by_hand(z: Array, t: Array, label: int, tau: float) -> tuple[float, float]:
    """One sample, class by class."""
    p, q = log_softmax(t / tau), log_softmax(z / tau)
    rest = [k for k in range(CLASSES) if k != label]
    p_rest, q_rest = logsumexp(p[rest]), logsumexp(q[rest])
    target = np.exp(p[label]) * (p[label] - q[label]) + np.exp(p_rest) * (p_rest - q_rest)
    p_among, q_among = log_softmax(t[rest] / tau), log_softmax(z[rest] / tau)
    nontarget = (np.exp(p_among) * (p_among - q_among)).sum()
    return tau**2 * target, tau**2 * nontarget


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dkd_is_its_formula(tau: float, standardize: bool) -> None:
    student, targets = scene()
    change = unit_rows if standardize else np.asarray
    z, rows = change(f64(student.output)), np.flatnonzero(LABELED.numpy())
    found = [
        np.mean([dkd_by_hand(z[b], change(t)[b], int(LABELS[b]), tau) for b in rows], axis=0)
        for t in logits_of(targets)
    ]
    target, nontarget = np.mean(found, axis=0)
    out = step(make("dkd", tau=tau, standardize=standardize), student, targets)
    np.testing.assert_allclose([out["target"].item(), out["nontarget"].item()], [target, nontarget], rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), ce_of(f64(student.output)) + target + 8 * nontarget, rtol=1e-5)


def test_dkd_is_kd_decoupled() -> None:
    """The paper's identity: KD = TCKD + (1 - p of the labeled class) * NCKD, for every sample."""
    student, targets = scene(("a",))
    kd, dkd = make("kd", ("a",)), make("dkd", ("a",))
    for b in np.flatnonzero(LABELED.numpy()):
        one = StudentOutput(student.output[b : b + 1], {})
        given: Given = {"a": {"logits": torch.from_numpy(f64(targets["a"]["logits"]))[b : b + 1]}}
        p = softmax(f64(given["a"]["logits"]) / 4, axis=1)[0, LABELS[b]]
        parts = dkd(one, given, LABELS[b : b + 1])
        whole = kd(one, given, LABELS[b : b + 1])["kd"]
        torch.testing.assert_close(whole, parts["target"] + (1 - p) * parts["nontarget"])


def test_dkd_of_a_teacher_that_is_sure() -> None:
    """fp32 holds neither 1 - p of the labeled class nor p / (1 - p): values and gradients stay what they are."""
    z = torch.tensor([[-40.0, 900.0, 0.0, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    t = torch.tensor([[600.0, 1.0, 2.0, 3.0, 1.0, 0.0, -1.0]])
    label = torch.tensor([0])
    out = make("dkd", ("a",), tau=1.0)(StudentOutput(z, {}), {"a": {"logits": t}}, label)
    np.testing.assert_allclose(
        [out["target"].item(), out["nontarget"].item()], dkd_by_hand(f64(z)[0], f64(t)[0], 0, 1.0), rtol=1e-5
    )
    (gradient,) = torch.autograd.grad(out["target"] + out["nontarget"], z)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_dkd_warms_up() -> None:
    dkd = make("dkd")
    assert dkd.weights(0.0) == {"target": 0.0, "nontarget": 0.0}
    assert dkd.weights(10 / 240) == {"target": 0.5, "nontarget": 4.0}
    assert dkd.weights(20 / 240) == dkd.weights(1.0) == {"target": 1.0, "nontarget": 8.0}
    assert make("dkd", warmup=0.0, beta=2.0).weights(0.0) == {"target": 1.0, "nontarget": 2.0}
    assert dkd.task_weight(0.0) == 1.0


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_dist_is_its_formula(tau: float, standardize: bool) -> None:
    student, targets = scene()
    change = unit_rows if standardize else np.asarray
    q = softmax(change(f64(student.output)) / tau, axis=1)
    inter, intra = [], []
    for z in logits_of(targets):
        p = softmax(change(z) / tau, axis=1)
        inter.append(np.mean([1 - np.corrcoef(q[b], p[b])[0, 1] for b in range(BATCH)]))
        intra.append(np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(CLASSES)]))
    expected = [tau**2 * np.mean(inter), tau**2 * np.mean(intra)]
    out = step(make("dist", tau=tau, gamma=0.5, standardize=standardize), student, targets)
    np.testing.assert_allclose([out["inter"].item(), out["intra"].item()], expected, rtol=1e-5)
    np.testing.assert_allclose(
        out["loss"].item(), ce_of(f64(student.output)) + 2 * expected[0] + 0.5 * expected[1], rtol=1e-5
    )


def shares_by_hand(targets: Given) -> Array:
    """CA-MKD's weights [teacher, B] of the labeled rows, 0 elsewhere."""
    losses = np.stack([-log_softmax(z, axis=1)[np.arange(BATCH), LABELS.numpy()] for z in logits_of(targets)])
    return (1 - softmax(losses, axis=0)) / (len(targets) - 1) * LABELED.numpy()


def pooled(x: Array, height: int) -> Array:
    factor = x.shape[2] // height
    return x.reshape(*x.shape[:2], height, factor, height, factor).mean((3, 5))


def test_camkd_is_its_formula() -> None:
    """Three teachers on grids equal to, smaller and larger than the student's; the regressors by hand."""
    student, targets = scene(("a", "b.2", "c"))
    method = make("camkd", ("a", "b.2", "c"))
    assert isinstance(method, CAMKD)
    shares = shares_by_hand(targets) / LABELED.sum().item() / 3
    q = softmax(f64(student.output) / 4, axis=1)
    divergences = [16 * rel_entr(softmax(z / 4, axis=1), q).sum(1) for z in logits_of(targets)]
    kd = (shares * np.stack(divergences)).sum()
    feature = 0.0
    for share, owner, regressor in zip(shares, targets, method.regressors, strict=True):
        assert isinstance(regressor, nn.Sequential)
        convolution = regressor[0]
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        height = min(FINAL[owner][1], 4)
        x, target = pooled(f64(student.taps["final"]), height), pooled(f64(targets[owner]["final"]), height)
        r = np.einsum("oc,bchw->bohw", f64(convolution.weight)[:, :, 0, 0], x)
        r += f64(convolution.bias)[:, None, None]
        r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
        feature += (share * ((np.maximum(r, 0) - target) ** 2).mean((1, 2, 3))).sum()
    out = step(method, student, targets)
    np.testing.assert_allclose([out["kd"].item(), out["feature"].item()], [kd, feature], rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), ce_of(f64(student.output)) + kd + 50 * feature, rtol=1e-5)
    out["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    assert sum(p.numel() for p in method.parameters()) == sum(8 * c + 3 * c for c in (5, 6, 3))


def test_camkd_listens_to_the_teacher_that_is_right() -> None:
    student, targets = scene()
    method = make("camkd")
    right = 20 * torch.nn.functional.one_hot(LABELS.clamp(min=0), CLASSES).float()
    sure = {"a": {**targets["a"], "logits": right}, "b.2": {**targets["b.2"], "logits": -right}}
    alone = make("kd", ("a",))(student_of(student, LABELED), {"a": {"logits": right[LABELED]}}, LABELS[LABELED])
    torch.testing.assert_close(method(student, sure, LABELS)["kd"], alone["kd"] / 2)
    assert method.weights(0.0) == {"kd": 1.0, "feature": 0.0}
    assert method.weights(1 / 240) == {"kd": 1.0, "feature": 50.0}


def student_of(student: StudentOutput, rows: Tensor) -> StudentOutput:
    return StudentOutput(student.output[rows], {tap: x[rows] for tap, x in student.taps.items()})


# --- invariances

LOGIT_METHODS = ["kd", "dkd", "dist", "camkd"]


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_equal_logits_cost_nothing_and_a_shift_changes_nothing(name: str) -> None:
    student, targets = scene(("a",))
    method = make(name, ("a",))
    plain = method(student, targets, LABELS)
    same = method(StudentOutput(f32(targets["a"]["logits"]), {}), targets, LABELS)
    shift = torch.linspace(-3, 3, BATCH)[:, None]
    moved = method(
        StudentOutput(student.output + shift, {}), {"a": {"logits": f32(targets["a"]["logits"]) - shift}}, LABELS
    )
    for term, value in plain.items():
        assert value > 0.01
        assert abs(same[term].item()) < 1e-5
        torch.testing.assert_close(moved[term], value, rtol=1e-4, atol=1e-5)


def f32(x: Target) -> Tensor:
    assert isinstance(x, Tensor)
    return x


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_standardized_logits_may_be_scaled_and_shifted_per_sample(name: str) -> None:
    student, targets = scene(("a",))
    scale, shift = torch.linspace(0.5, 4, BATCH)[:, None], torch.linspace(-3, 3, BATCH)[:, None]
    moved = StudentOutput(student.output * scale + shift, {})
    stretched: Given = {"a": {"logits": f32(targets["a"]["logits"]) * scale.flip(0) - shift}}
    standard, raw = make(name, ("a",), standardize=True), make(name, ("a",))
    expected, plain = standard(student, targets, LABELS), raw(student, targets, LABELS)
    for term, value in expected.items():
        torch.testing.assert_close(standard(moved, stretched, LABELS)[term], value, rtol=1e-4, atol=1e-6)
        assert abs(raw(moved, stretched, LABELS)[term] / plain[term] - 1) > 0.01


def test_correlation_may_be_scaled_and_shifted_per_row() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, BATCH, CLASSES, generator=g)
    scale, shift = torch.linspace(0.5, 4, BATCH)[:, None], torch.linspace(-3, 3, BATCH)[:, None]
    torch.testing.assert_close(uncorrelated(scale * x + shift, y), uncorrelated(x, y))
    torch.testing.assert_close(uncorrelated(-scale * y + shift, y), torch.tensor(2.0))
    assert uncorrelated(torch.ones_like(x), y) == 1


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_terms_are_averaged_over_teachers(name: str) -> None:
    student, targets = scene()
    both = make(name)(student, targets, LABELS)
    each = [make(name, (owner,))(student, {owner: targets[owner]}, LABELS) for owner in targets]
    for term, value in both.items():
        torch.testing.assert_close(value, (each[0][term] + each[1][term]) / 2)


@pytest.mark.parametrize("name", ["dkd", "camkd"])
def test_rows_without_a_label_are_left_out(name: str) -> None:
    """Whatever stands in them; and a batch without any label costs nothing. The logits are theirs alone."""
    student, targets = scene()
    method = make(name).eval()  # a batch norm in training sees all rows
    terms = method(student, targets, LABELS)
    some = {owner: {tap: f32(x)[LABELED] for tap, x in taps.items()} for owner, taps in targets.items()}
    kept = method(student_of(student, LABELED), some, LABELS[LABELED])
    for term, value in terms.items():
        torch.testing.assert_close(kept[term], value)
    none = method(student, targets, torch.full((BATCH,), -1))
    total = torch.stack(list(none.values())).sum()
    assert total == 0
    (gradient,) = torch.autograd.grad(total, student.output)
    assert not gradient.any()


# --- what every method keeps


@pytest.mark.parametrize("name", LOGIT_METHODS)
@pytest.mark.parametrize("standardize", [False, True])
def test_gradients_go_to_the_student_alone(name: str, standardize: bool) -> None:
    student, targets = scene()
    for taps in targets.values():
        for x in taps.values():
            f32(x).requires_grad_()
    method = make(name) if name == "camkd" else make(name, standardize=standardize)
    step(method, student, targets)["loss"].backward()
    assert student.output.grad is not None
    assert student.output.grad.isfinite().all()
    assert all(f32(x).grad is None for taps in targets.values() for x in taps.values())
    assert (student.taps["final"].grad is not None) == (name == "camkd")


@pytest.mark.parametrize("name", LOGIT_METHODS)
@pytest.mark.parametrize("standardize", [False, True])
def test_bf16_autocast_and_halves(name: str, standardize: bool) -> None:
    """Losses are computed in fp32, whatever the network and the cache hold."""
    student, targets = scene()
    rounded = StudentOutput(student.output.detach().bfloat16(), {"final": student.taps["final"].detach().bfloat16()})
    exact = StudentOutput(rounded.output.float(), {"final": rounded.taps["final"].float()})
    halves: Given = {o: {tap: f32(x).half() for tap, x in taps.items()} for o, taps in targets.items()}
    floats: Given = {o: {tap: f32(x).float() for tap, x in taps.items()} for o, taps in halves.items()}
    method = make(name) if name == "camkd" else make(name, standardize=standardize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = step(method, rounded, halves)
    full = step(method, exact, floats)
    assert low["loss"].dtype == torch.float32
    for term, value in full.items():
        # only camkd's regressor is the network's business and runs in bf16
        rtol = 0.02 if name == "camkd" and term in ("feature", "loss") else 1e-5
        torch.testing.assert_close(low[term], value, rtol=rtol, atol=1e-6)


def test_camkd_reads_codes_as_the_floats_they_mean() -> None:
    student, targets = scene(("a", "c"))
    coded, decoded = dict(targets), dict(targets)
    for owner, taps in targets.items():
        channels = FINAL[owner][0]
        offset, scale = torch.full((channels,), -3.0), torch.full((channels,), 0.025)
        data = encode(f32(taps["final"]), offset, scale, codec="u8")[0]
        coded[owner] = {**taps, "final": Codes(data, offset, scale, "u8")}
        decoded[owner] = {**taps, "final": (data.float() * scale + offset).permute(0, 3, 1, 2).contiguous()}
    method = make("camkd", ("a", "c"))
    left, right = method(student, coded, LABELS), method(student, decoded, LABELS)
    assert torch.equal(left["feature"], right["feature"])


def test_camkd_needs_two_teachers() -> None:
    with pytest.raises(RequestError, match=r"^method.name: 'camkd' .* needs at least two, found 'a' alone$"):
        make("camkd", ("a",))
    with pytest.raises(RequestError, match="'camkd' needs at least one teacher, found none"):
        make("camkd", ())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {"standardize": 1}, "^method.standardize: expected true or false, found 1$"),
        ("dkd", {"warmup": 20}, "^method.warmup: expected a number from 0 to 1, found 20$"),
        ("dkd", {"alpha": -1.0}, "^method.alpha: expected a number of 0 or more, found -1.0$"),
        ("dkd", {"tau": 0}, "^method.tau: expected a number more than 0, found 0$"),
        ("dist", {"gama": 1.0}, r"^method.gama: not an option of 'dist', .*did you mean 'gamma'\?\)$"),
        ("dist", {"beta": "1"}, "^method.beta: expected a number of 0 or more, found '1'$"),
        ("camkd", {"wait": -0.1}, "^method.wait: expected a number from 0 to 1, found -0.1$"),
        ("camkd", {"beta": float("nan")}, "^method.beta: expected a number of 0 or more, found nan$"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_options(METHODS[name], options)


def test_what_they_need() -> None:
    assert KD.Options().standardize is False
    assert [kind.needs for kind in (DKD, DIST, CAMKD)] == [("logits",), ("logits",), ("logits", "final")]
    assert [sum(p.numel() for p in make(name).parameters()) for name in ("dkd", "dist")] == [0, 0]


def test_mixed_labels_count_for_their_shares() -> None:
    """Against cross-entropy with class probabilities, PyTorch's own; a half without a label counts for nothing."""
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    first, second = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 0, 4, 3, 2])
    weight = torch.tensor([0.25, 1.0, 0.5, 0.0, 0.9, 0.3])
    mixed = SimpleNamespace(first=first, second=second, weight=weight)
    share = weight.double()[:, None]
    soft = share * torch.eye(5, dtype=torch.float64)[first] + (1 - share) * torch.eye(5, dtype=torch.float64)[second]
    expected = torch.nn.functional.cross_entropy(logits, soft)
    assert torch.allclose(label_loss(logits, mixed), expected, atol=1e-9)
    unlabeled = SimpleNamespace(first=first, second=torch.full_like(second, -1), weight=weight)
    alone = torch.nn.functional.cross_entropy(logits, first, reduction="none") * share[:, 0]
    assert torch.allclose(label_loss(logits, unlabeled), alone.sum() / share.sum(), atol=1e-9)
    nobody = SimpleNamespace(first=torch.full_like(first, -1), second=torch.full_like(second, -1), weight=weight)
    loss = label_loss(logits, nobody)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_kd_with_mixed_labels_is_its_two_terms() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(6, 5, generator=generator) for _ in range(2))
    mixed = SimpleNamespace(
        first=torch.arange(6) % 5, second=torch.arange(6).flip(0) % 5, weight=torch.rand(6, generator=generator)
    )
    method = make("kd", ("a",), alpha=0.7)
    student, targets = StudentOutput(ours, {}), {"a": {"logits": theirs}}
    total, own, terms = method.fused(student, targets, mixed, 2.0, 0.3, 0.0)
    assert torch.allclose(own, label_loss(ours, mixed))
    assert torch.allclose(total, 0.3 * own + 2.0 * 0.7 * method(student, targets, mixed)["kd"])
    assert torch.allclose(terms["kd"], method(student, targets, mixed)["kd"])
