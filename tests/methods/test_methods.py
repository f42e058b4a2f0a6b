"""Methods: margins against statistics, losses against their written formulas, what they need and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import truncnorm
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods import (
    KD,
    OFD,
    PFEED,
    Connector,
    CrossEntropy,
    RunningMargin,
    StudentOutput,
    TapInfo,
    build_method,
    margin_from_bn,
    taps_needed,
)
from feedfast.methods.base import numbered_taps
from feedfast_kernels import Codes, Target, as_float, encode

STUDENT = {"ofd1": (4, 6, 6), "ofd2": (6, 3, 3), "ofd10": (8, 2, 2), "final": (8, 2, 2)}
TEACHER_CHANNELS = {
    "a": {"ofd1": 5, "ofd2": 7, "ofd10": 9, "final": 8},
    "b.2": {"ofd1": 3, "ofd2": 4, "ofd10": 5, "final": 6},
}
BATCH, CLASSES = 4, 10

Scene = tuple[StudentOutput, dict[str, dict[str, Target]], Tensor, dict[str, dict[str, TapInfo]]]


def scene(teachers: tuple[str, ...] = ("a", "b.2"), seed: int = 0) -> Scene:
    """One batch: student output with gradients, targets of every teacher, labels, and the teachers' taps."""
    g = torch.Generator().manual_seed(seed)
    infos: dict[str, dict[str, TapInfo]] = {}
    targets: dict[str, dict[str, Target]] = {}
    for name in teachers:
        infos[name], targets[name] = (
            {"logits": TapInfo((CLASSES,))},
            {"logits": torch.randn(BATCH, CLASSES, generator=g)},
        )
        for tap, channels in TEACHER_CHANNELS[name].items():
            margin = -0.1 - torch.rand(channels, generator=g) if tap != "final" else None
            infos[name][tap] = TapInfo((channels, *STUDENT[tap][1:]), margin)
            targets[name][tap] = torch.randn(BATCH, channels, *STUDENT[tap][1:], generator=g)
    taps = {tap: torch.randn(BATCH, *shape, generator=g).requires_grad_() for tap, shape in STUDENT.items()}
    logits = torch.randn(BATCH, CLASSES, generator=g).requires_grad_()
    return StudentOutput(logits, taps), targets, torch.tensor([3, 0, 9, 3]), infos


def as_f64(x: object) -> np.ndarray:
    assert isinstance(x, Tensor)
    return x.detach().double().numpy()


def numpy_ce(logits: Tensor, labels: Tensor) -> float:
    return float(-log_softmax(as_f64(logits), axis=1)[np.arange(len(labels)), labels.numpy()].mean())


# --- margins


@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.5, 0.3), (2.0, -1.0), (0.3, 0.6), (-0.7, 0.2), (1.0, 3.0)])
def test_margin_is_the_mean_of_the_truncated_normal(gamma: float, beta: float) -> None:
    expected = truncnorm.mean(-np.inf, -beta / abs(gamma), loc=beta, scale=abs(gamma))
    margin = margin_from_bn(torch.tensor([gamma]), torch.tensor([beta]))
    assert margin.dtype == torch.float32
    np.testing.assert_allclose(margin.item(), expected, rtol=1e-5)


def test_margin_agrees_with_samples() -> None:
    gamma, beta = torch.tensor([1.0, 0.5, 2.0, 0.3]), torch.tensor([0.0, 0.3, -1.0, 0.6])
    x = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0)) * gamma + beta
    running = RunningMargin(4)
    running.update(x)
    torch.testing.assert_close(margin_from_bn(gamma, beta), running.value(), atol=0.015, rtol=0)


def test_margin_of_degenerate_channels() -> None:
    # beta / |gamma| = 4 is negative once in 30,000; gamma = 0 is a constant channel
    gamma = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 1e-30])
    beta = torch.tensor([2.0, 2.0, -1.5, 0.0, 1.0, -1e-3])
    margin = margin_from_bn(gamma, beta)
    torch.testing.assert_close(margin[:2], torch.tensor([-1.5, -1.5]))
    torch.testing.assert_close(margin[2:], torch.tensor([-1.5, 0.0, 0.0, -1e-3]), atol=1e-11, rtol=1e-6)
    assert (margin < 0).all()
    grid = torch.linspace(-6, 6, 241)
    assert (margin_from_bn(torch.ones(241), grid) < 0).all()


def test_running_margin_averages_batches() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(3, 4, 5, 5, generator=g),
        torch.randn(2, 4, 5, 5, generator=g),
        torch.randn(2, 4, 5, 5, generator=g),
    ]
    batches[1][:, 2] = 1.0  # never negative in this batch
    running = RunningMargin(4)
    with pytest.raises(RequestError, match="at least one batch"):
        running.value()
    expected = np.zeros(4)
    for batch in batches:
        running.update(batch.contiguous(memory_format=torch.channels_last))
        for channel in range(4):
            values = as_f64(batch[:, channel])
            expected[channel] += values[values < 0].sum() / ((values < 0).sum() + 1e-10) / 3
    np.testing.assert_allclose(running.value().numpy(), expected, rtol=1e-6)


# --- losses


def test_labels_alone_and_unlabelled_samples() -> None:
    student, targets, labels, _ = scene()
    method = CrossEntropy()
    torch.testing.assert_close(method(student, targets, labels)["loss"].item(), numpy_ce(student.logits, labels))
    some = torch.tensor([3, -1, 9, -1])
    expected = numpy_ce(student.logits[[0, 2]], some[[0, 2]])
    torch.testing.assert_close(method(student, {}, some)["loss"].item(), expected)
    loss = method(student, {}, torch.full((BATCH,), -1))["loss"]
    loss.backward()
    assert loss == 0
    assert student.logits.grad is not None
    assert not student.logits.grad.any()


def test_kd_is_its_formula() -> None:
    student, targets, labels, _ = scene()
    p = np.mean([softmax(as_f64(taps["logits"]) / 4, axis=1) for taps in targets.values()], 0)
    kd = 16 * rel_entr(p, softmax(as_f64(student.logits) / 4, axis=1)).sum(1).mean()
    ce = numpy_ce(student.logits, labels)
    out = KD()(student, targets, labels)
    np.testing.assert_allclose([out["ce"].item(), out["kd"].item()], [ce, kd], rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), 0.1 * ce + 0.9 * kd, rtol=1e-5)
    out["loss"].backward()
    assert student.logits.grad is not None
    unlabelled = KD(alpha=1.0)(student, targets, torch.full((BATCH,), -1))
    np.testing.assert_allclose(unlabelled["loss"].item(), kd, rtol=1e-5)
    reverse = KD(direction="reverse", average="logits", tau=1.0)(student, targets, labels)["kd"]
    q = softmax(np.mean([as_f64(taps["logits"]) for taps in targets.values()], 0), axis=1)
    np.testing.assert_allclose(
        reverse.item(), rel_entr(softmax(as_f64(student.logits), axis=1), q).sum(1).mean(), rtol=1e-5
    )


def test_kd_reads_logits_as_they_are_stored() -> None:
    student, targets, labels, _ = scene()
    halves = {name: {"logits": as_float(taps["logits"]).half()} for name, taps in targets.items()}
    floats = {name: {"logits": taps["logits"].float()} for name, taps in halves.items()}
    found, expected = KD()(student, halves, labels), KD()(student, floats, labels)
    assert all(torch.equal(found[part], expected[part]) for part in ("loss", "ce", "kd"))
    assert not found["ce"].requires_grad
    assert not found["kd"].requires_grad


def test_ofd_is_its_formula() -> None:
    student, targets, labels, infos = scene()
    method = OFD(STUDENT, infos, alpha=0.01)
    assert method.student_taps == method.teacher_taps == ("ofd1", "ofd2", "ofd10")  # by number, not by letters
    out = method(student, targets, labels)
    total = 0.0
    for name, connectors in zip(infos, method.connectors, strict=True):
        assert isinstance(connectors, nn.ModuleList)
        for tap, weight, connector in zip(method.student_taps, (0.25, 0.5, 1.0), connectors, strict=True):
            assert isinstance(connector, Connector)
            kernel = as_f64(connector[0].weight)[:, :, 0, 0]
            r = np.einsum("oc,bchw->bohw", kernel, as_f64(student.taps[tap]))
            r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
            t = np.maximum(as_f64(targets[name][tap]), as_f64(infos[name][tap].margin)[:, None, None])
            keep = (r > t) | (t > 0)
            total += weight * ((r - t) ** 2 * keep).sum() / BATCH / len(infos)
    np.testing.assert_allclose(out["feature"].item(), total, rtol=1e-4)
    np.testing.assert_allclose(out["loss"].item(), numpy_ce(student.logits, labels) + 0.01 * total, rtol=1e-4)
    out["loss"].backward()
    assert all(student.taps[tap].grad is not None for tap in method.student_taps)
    assert all(p.grad is not None for p in method.parameters())
    assert OFD(STUDENT, infos).alpha == 1e-3


def test_ofd_clips_a_clipped_target_to_the_same_bits() -> None:
    student, targets, labels, infos = scene()
    method = OFD(STUDENT, infos)
    clipped: dict[str, dict[str, Target]] = {}
    for name, taps in targets.items():
        clipped[name] = {}
        for tap in method.teacher_taps:
            margin, values = infos[name][tap].margin, taps[tap]
            assert isinstance(values, Tensor)
            assert margin is not None
            clipped[name][tap] = torch.maximum(values, margin[:, None, None])
    assert torch.equal(method(student, targets, labels)["loss"], method(student, clipped, labels)["loss"])


def test_connector_initialization() -> None:
    torch.manual_seed(0)
    connector = Connector(64, 256)
    assert isinstance(connector[0], nn.Conv2d)
    assert connector[0].bias is None
    np.testing.assert_allclose(connector[0].weight.std().item(), np.sqrt(2 / 256), rtol=0.03)


def test_pfeed_is_its_formula() -> None:
    student, targets, labels, infos = scene()
    torch.manual_seed(0)
    method = PFEED(STUDENT, infos)
    out = method(student, targets, labels)
    total = 0.0
    for name, ntl in zip(infos, method.ntls, strict=True):
        # the layers by hand: conv, LeakyReLU(0.1), three times, with bias
        x = student.taps["final"].double()
        convolutions = [m for m in ntl.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 3
        for convolution in convolutions:
            assert convolution.bias is not None
            x = nn.functional.conv2d(x, convolution.weight.double(), convolution.bias.double(), padding=1)
            x = torch.where(x > 0, x, 0.1 * x)
        s, t = as_f64(x).reshape(BATCH, -1), as_f64(targets[name]["final"]).reshape(BATCH, -1)
        unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (s, t)]
        total += np.abs(unit[0] - unit[1]).mean()
    np.testing.assert_allclose(out["feature"].item(), total, rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), numpy_ce(student.logits, labels) + 500 * total, rtol=1e-5)
    out["loss"].backward()
    assert student.taps["final"].grad is not None
    assert all(p.grad is not None for p in method.parameters())


def test_pfeed_reductions_teachers_and_initializations() -> None:
    student, targets, labels, infos = scene(("a",))
    twins = {"a": infos["a"], "a2": infos["a"]}
    twin_targets = {"a": targets["a"], "a2": targets["a"]}
    torch.manual_seed(0)
    method = PFEED(STUDENT, twins)
    assert not torch.equal(method.ntls[0].get_parameter("0.weight"), method.ntls[1].get_parameter("0.weight"))
    method.ntls[1].load_state_dict(method.ntls[0].state_dict())
    one = PFEED(STUDENT, infos, beta=500 / 32, reduction="sum")
    one.ntls[0].load_state_dict(method.ntls[0].state_dict())
    averaged = PFEED(STUDENT, twins, divide_by_n=True)
    averaged.load_state_dict(method.state_dict())
    double, single, mean = (
        m(student, t, labels) for m, t in ((method, twin_targets), (one, targets), (averaged, twin_targets))
    )
    torch.testing.assert_close(double["feature"], 2 * single["feature"] / 32)  # 8 * 2 * 2 values a sample
    torch.testing.assert_close(mean["loss"], single["loss"])
    with_bn = PFEED(STUDENT, infos, bn=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in with_bn.modules()) == 3


@pytest.mark.parametrize("name", ["kd", "ofd", "pfeed"])
def test_codes_and_the_floats_they_mean_give_the_same_bits(name: str) -> None:
    student, targets, labels, infos = scene()
    coded: dict[str, dict[str, Target]] = {}
    decoded: dict[str, dict[str, Target]] = {}
    for teacher, taps in targets.items():
        coded[teacher], decoded[teacher] = dict(taps), dict(taps)
        for tap, value in taps.items():
            assert isinstance(value, Tensor)
            if tap != "logits":
                offset, step = torch.full((value.shape[1],), -3.0), torch.full((value.shape[1],), 0.025)
                codes = encode(value, offset, step, codec="u8")[0]
                coded[teacher][tap] = Codes(codes, offset, step, "u8")
                floats = codes.float() * step + offset
                decoded[teacher][tap] = floats.permute(0, 3, 1, 2).contiguous()
    method = build_method(name, {}, student_taps=STUDENT, teachers=infos)
    leaves = [student.logits, *student.taps.values(), *method.parameters()]
    results = []
    for given in (coded, decoded):
        loss = method(student, given, labels)["loss"]
        results.append((loss, torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert torch.equal(results[0][0], results[1][0])
    for left, right in zip(results[0][1], results[1][1], strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize("name", ["none", "kd", "ofd", "pfeed"])
def test_bf16_autocast_and_channels_last(name: str) -> None:
    student, targets, labels, infos = scene()
    torch.manual_seed(0)
    method = build_method(name, {}, student_taps=STUDENT, teachers=infos)
    plain = method(student, targets, labels)
    rounded = StudentOutput(
        student.logits.detach().bfloat16().requires_grad_(),
        {
            tap: x.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
            for tap, x in student.taps.items()
        },
    )
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = method(rounded, targets, labels)
    low["loss"].backward()
    assert low["loss"].dtype == torch.float32
    torch.testing.assert_close(low["loss"], plain["loss"], rtol=0.03, atol=0)
    read: tuple[str, ...] = method.student_taps
    for x in (rounded.logits, *(rounded.taps[tap] for tap in read)):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_targets_get_no_gradient_and_may_be_empty() -> None:
    student, targets, labels, infos = scene()
    for taps in targets.values():
        for value in taps.values():
            assert isinstance(value, Tensor)
            value.requires_grad_()
    for name in ("kd", "ofd", "pfeed"):
        method = build_method(name, {}, student_taps=STUDENT, teachers=infos)
        method(student, targets, labels)["loss"].backward()
    assert all(isinstance(v, Tensor) and v.grad is None for taps in targets.values() for v in taps.values())


# --- from words to methods


def test_the_taps_a_method_needs() -> None:
    assert [taps_needed(n) for n in ("none", "kd", "ofd", "pfeed")] == [(), (), ("ofd",), ("final",)]
    assert numbered_taps(["ofd10", "final", "ofd2", "ofd", "ofdx"], "ofd") == ("ofd2", "ofd10")
    _, _, _, infos = scene()
    built = {n: build_method(n, {}, student_taps=STUDENT, teachers=infos) for n in ("none", "kd", "ofd", "pfeed")}
    ofd = ("ofd1", "ofd2", "ofd10")
    assert {n: (m.student_taps, m.teacher_taps) for n, m in built.items()} == {
        "none": ((), ()),
        "kd": ((), ("logits",)),
        "ofd": (ofd, ofd),
        "pfeed": (("final",), ("final",)),
    }
    # adapters are the methods' own: 1x1 kernels + batch norms, and three 3x3 convolutions with bias
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in built.items()}
    connectors = sum(
        s * c + 2 * c
        for taps in TEACHER_CHANNELS.values()
        for s, c in zip((4, 6, 8), list(taps.values())[:3], strict=True)
    )
    ntls = sum(9 * (8 * 8 + 8 * c + c * c) + 8 + 2 * c for c in (8, 6))
    assert count == {"none": 0, "kd": 0, "ofd": connectors, "pfeed": ntls}


def test_parameters_reach_the_method() -> None:
    _, _, _, infos = scene()

    def build(name: str, params: Mapping[str, float | bool | str]) -> nn.Module:
        return build_method(name, params, student_taps=STUDENT, teachers=infos)

    kd = build("kd", {"alpha": 1, "tau": 2, "average": "logits", "direction": "reverse"})
    assert isinstance(kd, KD)
    assert (kd.alpha, kd.tau, kd.average, kd.direction) == (1.0, 2.0, "logits", "reverse")
    ofd = build("ofd", {"alpha": 1e-4})
    assert isinstance(ofd, OFD)
    assert ofd.alpha == 1e-4
    pfeed = build("pfeed", {"beta": 2, "reduction": "sum", "bn": True, "divide_by_n": True})
    assert isinstance(pfeed, PFEED)
    assert (pfeed.beta, pfeed.reduction, pfeed.weight) == (2.0, "sum", 0.5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pfed", {}, r"none \| kd \| ofd \| pfeed, found 'pfed' .did you mean 'pfeed'"),
        ("kd", {"beta": 1.0}, r"method.beta: not a parameter of 'kd', expected alpha \| tau \| average \| direction"),
        ("none", {"tau": 1.0}, "method.tau: not a parameter of 'none', expected none at all"),
        ("kd", {"tau": "warm"}, "method.tau: expected a number, found 'warm'"),
        ("kd", {"tau": True}, "method.tau: expected a number, found True"),
        ("kd", {"tau": 0.0}, "method.tau: expected more than 0"),
        ("kd", {"tau": float("nan")}, "method.tau"),
        ("kd", {"alpha": 1.5}, "method.alpha: expected 0 to 1, found 1.5"),
        ("kd", {"average": "max"}, "method.average"),
        ("kd", {"direction": "up"}, "method.direction"),
        ("ofd", {"alpha": -1.0}, "method.alpha: expected 0 or more"),
        ("pfeed", {"bn": 1}, "method.bn: expected true or false, found 1"),
        ("pfeed", {"beta": -1.0}, "method.beta: expected 0 or more"),
        ("pfeed", {"reduction": "max"}, "method.reduction"),
        ("pfeed", {"reduction": "sum"}, "method.beta: expected a number with reduction = 'sum'"),
    ],
)
def test_wrong_requests_are_refused(name: str, params: dict[str, float | bool | str], message: str) -> None:
    _, _, _, infos = scene()
    with pytest.raises(RequestError, match=message):
        build_method(name, params, student_taps=STUDENT, teachers=infos)


def test_taps_that_do_not_fit_are_refused() -> None:
    _, _, _, infos = scene(("a",))
    for name in ("kd", "ofd", "pfeed"):
        with pytest.raises(RequestError, match="at least one teacher, found none"):
            build_method(name, {}, student_taps=STUDENT, teachers={})
    assert isinstance(build_method("none", {}, student_taps={}, teachers={}), CrossEntropy)

    def changed(tap: str, info: TapInfo | None) -> dict[str, dict[str, TapInfo]]:
        rest = {name: old for name, old in infos["a"].items() if name != tap}
        return {"a": rest if info is None else {**rest, tap: info}}

    margin = -torch.ones(7)
    for name, teachers, message in [
        (
            "ofd",
            changed("ofd2", None),
            r"teacher 'a': expected the student's taps .*'ofd2'.* found \['ofd1', 'ofd10'\]",
        ),
        (
            "ofd",
            changed("ofd2", TapInfo((7, 6, 6), margin)),
            r"'ofd2'.*equal height and width.*\(6, 3, 3\).*\(7, 6, 6\)",
        ),
        (
            "ofd",
            changed("ofd2", TapInfo((7, 3, 3))),
            "'ofd2' of teacher 'a': expected a margin of 7 channels, found none",
        ),
        ("ofd", changed("ofd2", TapInfo((7, 3, 3), margin[:3])), r"margin of 7 channels, found \[3\]"),
        ("pfeed", changed("final", None), "teacher 'a': expected a tap named 'final'"),
        ("pfeed", changed("final", TapInfo((8, 1, 2))), r"'final'.*equal height and width"),
        ("pfeed", changed("final", TapInfo((8,))), r"'final'.*equal height and width"),
    ]:
        with pytest.raises(RequestError, match=message):
            build_method(name, {}, student_taps=STUDENT, teachers=teachers)
    with pytest.raises(RequestError, match="student: expected taps ofd1"):
        build_method("ofd", {}, student_taps={"final": (8, 2, 2)}, teachers=infos)
    with pytest.raises(RequestError, match=r"student: expected a tap named 'final', found \['ofd1'\]"):
        build_method("pfeed", {}, student_taps={"ofd1": (8, 2, 2)}, teachers=infos)
