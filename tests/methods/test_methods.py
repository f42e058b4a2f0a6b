"""Methods: margins against statistics, losses against their written formulas, what they need and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods import (
    KD,
    METHODS,
    OFD,
    PFEED,
    Connector,
    Method,
    Plain,
    StudentOutput,
    TapInfo,
)
from feedfast.methods.base import matching, numbered_taps, tap_groups
from feedfast.recipe import MethodEntry
from feedfast.stages.trainee import Entry, build_methods, losses_of, method_entries
from feedfast.tasks import Classify
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


def build(name: str, teachers: Mapping[str, Mapping[str, TapInfo]], **options: object) -> Method:
    """A method from a recipe's words."""
    (entry,) = method_entries([MethodEntry(name=name, **options)])  # type: ignore[arg-type]
    return entry.kind(entry.options, STUDENT, teachers)


def losses(
    method: Method, student: StudentOutput, targets: Mapping[str, Mapping[str, Target]], labels: Tensor
) -> dict[str, Tensor]:
    """What a training step of this method alone computes."""
    entry = Entry(type(method), None, 1.0, method.name)
    return losses_of(Classify(), [entry], [method], student, targets, labels, 0.0)


def as_f64(x: object) -> np.ndarray:
    assert isinstance(x, Tensor)
    return x.detach().double().numpy()


def numpy_ce(logits: Tensor, labels: Tensor) -> float:
    return float(-log_softmax(as_f64(logits), axis=1)[np.arange(len(labels)), labels.numpy()].mean())


# --- losses


def test_labels_alone_and_unlabeled_samples() -> None:
    student, targets, labels, _ = scene()
    method = build("none", {})
    torch.testing.assert_close(
        losses(method, student, targets, labels)["loss"].item(), numpy_ce(student.output, labels)
    )
    some = torch.tensor([3, -1, 9, -1])
    expected = numpy_ce(student.output[[0, 2]], some[[0, 2]])
    torch.testing.assert_close(losses(method, student, {}, some)["loss"].item(), expected)
    loss = losses(method, student, {}, torch.full((BATCH,), -1))["loss"]
    loss.backward()
    assert loss == 0
    assert student.output.grad is not None
    assert not student.output.grad.any()


def test_kd_is_its_formula() -> None:
    student, targets, labels, infos = scene()
    p = np.mean([softmax(as_f64(taps["logits"]) / 4, axis=1) for taps in targets.values()], 0)
    kd = 16 * rel_entr(p, softmax(as_f64(student.output) / 4, axis=1)).sum(1).mean()
    ce = numpy_ce(student.output, labels)
    out = losses(build("kd", infos), student, targets, labels)
    np.testing.assert_allclose([out["ce"].item(), out["kd"].item()], [ce, kd], rtol=1e-5)
    np.testing.assert_allclose(out["loss"].item(), 0.1 * ce + 0.9 * kd, rtol=1e-5)
    out["loss"].backward()
    assert student.output.grad is not None
    unlabeled = losses(build("kd", infos, alpha=1.0), student, targets, torch.full((BATCH,), -1))
    np.testing.assert_allclose(unlabeled["loss"].item(), kd, rtol=1e-5)
    reverse = losses(build("kd", infos, direction="reverse", average="logits", tau=1.0), student, targets, labels)["kd"]
    q = softmax(np.mean([as_f64(taps["logits"]) for taps in targets.values()], 0), axis=1)
    np.testing.assert_allclose(
        reverse.item(), rel_entr(softmax(as_f64(student.output), axis=1), q).sum(1).mean(), rtol=1e-5
    )


def test_kd_reads_logits_as_they_are_stored() -> None:
    student, targets, labels, infos = scene()
    halves = {name: {"logits": as_float(taps["logits"]).half()} for name, taps in targets.items()}
    floats = {name: {"logits": taps["logits"].float()} for name, taps in halves.items()}
    kd = build("kd", infos)
    found, expected = losses(kd, student, halves, labels), losses(kd, student, floats, labels)
    assert all(torch.equal(found[part], expected[part]) for part in ("loss", "ce", "kd"))
    assert not found["ce"].requires_grad
    assert not found["kd"].requires_grad


def test_ofd_is_its_formula() -> None:
    student, targets, labels, infos = scene()
    method = build("ofd", infos, alpha=0.01)
    assert isinstance(method, OFD)
    assert method.taps == ("ofd1", "ofd2", "ofd10")  # by number, not by letters
    out = losses(method, student, targets, labels)
    total = 0.0
    for name, connectors in zip(infos, method.connectors, strict=True):
        assert isinstance(connectors, nn.ModuleList)
        for tap, weight, connector in zip(method.taps, (0.25, 0.5, 1.0), connectors, strict=True):
            assert isinstance(connector, Connector)
            kernel = as_f64(connector[0].weight)[:, :, 0, 0]
            r = np.einsum("oc,bchw->bohw", kernel, as_f64(student.taps[tap]))
            r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
            t = np.maximum(as_f64(targets[name][tap]), as_f64(infos[name][tap].margin)[:, None, None])
            keep = (r > t) | (t > 0)
            total += weight * ((r - t) ** 2 * keep).sum() / BATCH / len(infos)
    np.testing.assert_allclose(out["feature"].item(), total, rtol=1e-4)
    np.testing.assert_allclose(out["loss"].item(), numpy_ce(student.output, labels) + 0.01 * total, rtol=1e-4)
    out["loss"].backward()
    assert all(student.taps[tap].grad is not None for tap in method.taps)
    assert all(p.grad is not None for p in method.parameters())
    assert build("ofd", infos).weights(0.5) == {"feature": 1e-3}


@pytest.mark.parametrize(("side", "alpha"), [(8, 1e-3), (32, 1e-3), (56, 1e-4)])
def test_ofd_weighs_as_its_authors_do(side: int, alpha: float) -> None:
    """By the size of the first map; taps by halves, or as asked."""
    shapes = {"ofd1": (2, side, side), "ofd2": (3, side // 2, side // 2)}
    infos = {"a": {tap: TapInfo(shape, -torch.ones(shape[0])) for tap, shape in shapes.items()}}
    torch.manual_seed(0)
    plain, asked = OFD(OFD.Options(), shapes, infos), OFD(OFD.Options(tap_weights=(3.0, 0.0)), shapes, infos)
    assert plain.weights(0.0) == {"feature": alpha}
    assert plain.tap_weights == (0.5, 1.0)
    asked.load_state_dict(plain.state_dict())
    first = OFD(OFD.Options(tap_weights=(1.0, 0.0)), shapes, infos)
    first.load_state_dict(plain.state_dict())
    student = StudentOutput(None, {tap: torch.randn(2, *shape) for tap, shape in shapes.items()})
    targets: dict[str, dict[str, Target]] = {"a": {tap: torch.randn(2, *shape) for tap, shape in shapes.items()}}
    torch.testing.assert_close(asked(student, targets, None)["feature"], 3 * first(student, targets, None)["feature"])
    for wrong in [(1.0,), (1.0, -1.0)]:
        with pytest.raises(RequestError, match=r"method.tap_weights: expected 2 numbers of 0 or more, one per tap"):
            OFD(OFD.Options(tap_weights=wrong), shapes, infos)


def test_ofd_clips_a_clipped_target_to_the_same_bits() -> None:
    student, targets, labels, infos = scene()
    method = build("ofd", infos)
    assert isinstance(method, OFD)
    clipped: dict[str, dict[str, Target]] = {}
    for name, taps in targets.items():
        clipped[name] = {}
        for tap in method.taps:
            margin, values = infos[name][tap].margin, taps[tap]
            assert isinstance(values, Tensor)
            assert margin is not None
            clipped[name][tap] = torch.maximum(values, margin[:, None, None])
    assert torch.equal(
        losses(method, student, targets, labels)["loss"], losses(method, student, clipped, labels)["loss"]
    )


def test_connector_initialization() -> None:
    torch.manual_seed(0)
    connector = Connector(64, 256)
    assert isinstance(connector[0], nn.Conv2d)
    assert connector[0].bias is None
    np.testing.assert_allclose(connector[0].weight.std().item(), np.sqrt(2 / 256), rtol=0.03)


def test_pfeed_is_its_formula() -> None:
    student, targets, labels, infos = scene()
    torch.manual_seed(0)
    method = build("pfeed", infos)
    assert isinstance(method, PFEED)
    out = losses(method, student, targets, labels)
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
    np.testing.assert_allclose(out["loss"].item(), numpy_ce(student.output, labels) + 500 * total, rtol=1e-5)
    out["loss"].backward()
    assert student.taps["final"].grad is not None
    assert all(p.grad is not None for p in method.parameters())


def test_pfeed_reductions_teachers_and_initializations() -> None:
    student, targets, labels, infos = scene(("a",))
    twins = {"a": infos["a"], "a2": infos["a"]}
    twin_targets = {"a": targets["a"], "a2": targets["a"]}
    torch.manual_seed(0)
    method = build("pfeed", twins)
    assert isinstance(method, PFEED)
    assert not torch.equal(method.ntls[0].get_parameter("0.weight"), method.ntls[1].get_parameter("0.weight"))
    method.ntls[1].load_state_dict(method.ntls[0].state_dict())
    one = build("pfeed", infos, beta=500 / 32, reduction="sum")
    assert isinstance(one, PFEED)
    one.ntls[0].load_state_dict(method.ntls[0].state_dict())
    averaged = build("pfeed", twins, divide_by_n=True)
    averaged.load_state_dict(method.state_dict())
    double, single, mean = (
        losses(m, student, t, labels) for m, t in ((method, twin_targets), (one, targets), (averaged, twin_targets))
    )
    torch.testing.assert_close(double["feature"], 2 * single["feature"] / 32)  # 8 * 2 * 2 values per sample
    torch.testing.assert_close(mean["loss"], single["loss"])
    with_bn = build("pfeed", infos, bn=True)
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
    method = build(name, infos)
    leaves = [student.output, *student.taps.values(), *method.parameters()]
    results = []
    for given in (coded, decoded):
        loss = losses(method, student, given, labels)["loss"]
        results.append((loss, torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert torch.equal(results[0][0], results[1][0])
    for left, right in zip(results[0][1], results[1][1], strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize("name", ["none", "kd", "ofd", "pfeed"])
def test_bf16_autocast_and_channels_last(name: str) -> None:
    student, targets, labels, infos = scene()
    torch.manual_seed(0)
    method = build(name, infos)
    plain = losses(method, student, targets, labels)
    rounded = StudentOutput(
        student.output.detach().bfloat16().requires_grad_(),
        {
            tap: x.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
            for tap, x in student.taps.items()
        },
    )
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = losses(method, rounded, targets, labels)
    low["loss"].backward()
    assert low["loss"].dtype == torch.float32
    torch.testing.assert_close(low["loss"], plain["loss"], rtol=0.03, atol=0)
    read = [tap for tap in matching(method.needs, STUDENT) if tap in rounded.taps]
    for x in (rounded.output, *(rounded.taps[tap] for tap in read)):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_targets_get_no_gradient_and_may_be_empty() -> None:
    student, targets, labels, infos = scene()
    for taps in targets.values():
        for value in taps.values():
            assert isinstance(value, Tensor)
            value.requires_grad_()
    for name in ("kd", "ofd", "pfeed"):
        method = build(name, infos)
        losses(method, student, targets, labels)["loss"].backward()
    assert all(isinstance(v, Tensor) and v.grad is None for taps in targets.values() for v in taps.values())


# --- from words to methods


NEEDS = {"none": (), "kd": ("logits",), "ofd": ("ofd*",), "pfeed": ("final",)}


def test_the_taps_a_method_needs() -> None:
    assert {name: METHODS[name].needs for name in NEEDS} == NEEDS
    assert numbered_taps(["ofd10", "final", "ofd2", "ofd", "ofdx"], "ofd") == ("ofd2", "ofd10")
    assert matching(("logits", "ofd*", "final"), ["ofd10", "final", "ofd2", "ofdx"]) == ("ofd2", "ofd10", "final")
    assert matching(("stage*",), ["stage2", "stage10", "stage", "stage1", "ofd1"]) == ("stage1", "stage2", "stage10")
    assert tap_groups(("logits", "ofd*", "final", "stage*")) == ("ofd", "final", "stage")
    _, _, _, infos = scene()
    built = {name: build(name, infos) for name in NEEDS}
    # adapters are the methods' own: 1x1 kernels + batch norms, and three 3x3 convolutions with bias
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in built.items()}
    connectors = sum(
        s * c + 2 * c
        for taps in TEACHER_CHANNELS.values()
        for s, c in zip((4, 6, 8), list(taps.values())[:3], strict=True)
    )
    ntls = sum(9 * (8 * 8 + 8 * c + c * c) + 8 + 2 * c for c in (8, 6))
    assert count == {"none": 0, "kd": 0, "ofd": connectors, "pfeed": ntls}


def test_options_reach_the_method() -> None:
    _, _, _, infos = scene()
    kd = build("kd", infos, alpha=1, tau=2, average="logits", direction="reverse")
    assert isinstance(kd, KD)
    words = {"alpha": 1.0, "tau": 2.0, "average": "logits", "direction": "reverse", "standardize": False}
    assert kd.options.model_dump() == words
    assert (kd.weights(0.3), kd.task_weight(0.3)) == ({"kd": 1.0}, 0.0)
    assert build("ofd", infos, alpha=1e-4).weights(0.0) == {"feature": 1e-4}
    pfeed = build("pfeed", infos, beta=2, reduction="sum", bn=True, divide_by_n=True)
    assert isinstance(pfeed, PFEED)
    assert (pfeed.beta, pfeed.reduction, pfeed.share) == (2.0, "sum", 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_itself(name: str) -> None:
    """Help and docs are made from the class: a paper, and one line per option."""
    method = METHODS[name]
    assert method.name == name
    assert len(method.paper) > 10
    assert all(len(field.description or "") > 10 for field in method.Options.model_fields.values())


def test_several_methods_add_up() -> None:
    """kd + ofd: the task's loss once, weighted by kd's 1 - alpha; every term under its method's name."""
    student, targets, labels, infos = scene()
    torch.manual_seed(0)
    words = [MethodEntry(name="kd", alpha=0.6), MethodEntry(name="ofd", alpha=0.01, weight=3.0)]
    entries = method_entries(words)
    methods = [entry.kind(entry.options, STUDENT, infos) for entry in entries]
    out = losses_of(Classify(), entries, methods, student, targets, labels, 0.0)
    assert list(out) == ["loss", "ce", "kd.kd", "ofd.feature"]
    kd, ofd = losses(methods[0], student, targets, labels), losses(methods[1], student, targets, labels)
    assert torch.equal(out["ce"], kd["ce"])
    assert torch.equal(out["kd.kd"], kd["kd"])
    torch.testing.assert_close(out["ofd.feature"], ofd["feature"])
    expected = 0.4 * out["ce"] + 0.6 * out["kd.kd"] + 3.0 * 0.01 * out["ofd.feature"]
    torch.testing.assert_close(out["loss"].detach(), expected)
    twice = method_entries([MethodEntry(name="ofd"), MethodEntry(name="ofd", weight=0.5)])
    both = losses_of(Classify(), twice, [methods[1], methods[1]], student, targets, labels, 0.0)
    assert list(both) == ["loss", "ce", "ofd0.feature", "ofd1.feature"]


def test_a_task_that_is_not_fused_is_added() -> None:
    """A method that fuses cross-entropy gives its term alone where another task is learned."""

    class Other:
        name, term = "other", "other"

        def loss(self, output: Tensor, annotations: Tensor) -> Tensor:
            return (output**2).mean()

    student, targets, labels, infos = scene()
    kd = build("kd", infos, alpha=0.7)
    entry = Entry(KD, None, 2.0, "kd")
    out = losses_of(Other(), [entry], [kd], student, targets, labels, 0.0)  # type: ignore[arg-type]
    fused = losses(kd, student, targets, labels)
    torch.testing.assert_close(out["kd"], fused["kd"])
    torch.testing.assert_close(out["loss"].detach(), 0.3 * (student.output**2).mean().detach() + 1.4 * fused["kd"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pfed", {}, r"method.name: expected none \| kd \| .*pfeed.*, found 'pfed' .did you mean 'pfeed'"),
        ("kd", {"beta": 1.0}, r"method.beta: not an option of 'kd', expected alpha \| tau \| average \| direction"),
        ("pfeed", {"divide_by": True}, r"method.divide_by: .*did you mean 'divide_by_n'\?\)$"),
        ("none", {"tau": 1.0}, "method.tau: not an option of 'none', expected none at all"),
        ("kd", {"tau": "warm"}, "method.tau: expected a number more than 0, found 'warm'"),
        ("kd", {"tau": True}, "method.tau: expected a number more than 0, found True"),
        ("kd", {"tau": 0.0}, "method.tau: expected a number more than 0, found 0.0"),
        ("kd", {"tau": float("nan")}, "method.tau: expected a number more than 0, found nan"),
        ("kd", {"alpha": 1.5}, "method.alpha: expected a number from 0 to 1, found 1.5"),
        ("kd", {"average": "max"}, "method.average: expected 'probabilities' or 'logits', found 'max'"),
        ("kd", {"direction": "up"}, "method.direction: expected 'forward' or 'reverse', found 'up'"),
        ("ofd", {"alpha": -1.0}, "method.alpha: expected a number of 0 or more, found -1.0"),
        ("pfeed", {"bn": 1}, "method.bn: expected true or false, found 1"),
        ("pfeed", {"beta": -1.0}, "method.beta: expected a number of 0 or more, found -1.0"),
        ("pfeed", {"reduction": "max"}, "method.reduction: expected 'sum' or 'mean', found 'max'"),
        ("pfeed", {"reduction": "sum"}, "method.beta: expected a number with reduction = 'sum'"),
    ],
)
def test_wrong_requests_are_refused(name: str, options: dict[str, float | bool | str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        method_entries([MethodEntry(name=name, **options)])  # type: ignore[arg-type]


def test_of_several_methods_the_wrong_one_is_named() -> None:
    with pytest.raises(RequestError, match=r"^method\.1\.alpha: expected"):
        method_entries([MethodEntry(name="kd"), MethodEntry(name="ofd", alpha=-1.0)])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((12,), "'kd' compares classes one by one, expected 12 in every teacher, found 10 in 'a'"),
        ((21, 9, 9), r"'kd' compares logits, expected a student .*found \[21, 9, 9\] per sample"),
        (None, "'kd' compares logits, expected a student .*found no tensor"),
    ],
)
def test_logits_need_a_student_that_has_them(outputs: tuple[int, ...] | None, message: str) -> None:
    """Other methods do not look at the output: a network of another task may return what it likes."""
    _, _, _, infos = scene()
    kd, ofd = method_entries([MethodEntry(name="kd"), MethodEntry(name="ofd")])
    with pytest.raises(RequestError, match=message):
        build_methods([ofd, kd], STUDENT, infos, outputs, 0)
    assert len(build_methods([ofd], STUDENT, infos, outputs, 0)) == 1


def test_taps_that_do_not_fit_are_refused() -> None:
    _, _, _, infos = scene(("a",))
    for name in ("kd", "ofd", "pfeed"):
        with pytest.raises(RequestError, match="at least one teacher, found none"):
            build(name, {})
    assert isinstance(build("none", {}), Plain)

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
        ("ofd", changed("ofd2", TapInfo((7, 3, 1), margin)), r"'ofd2'.*equal height and width"),
        ("pfeed", changed("final", TapInfo((8,))), r"'final': expected maps, found .*\(8,\) of teacher 'a'"),
    ]:
        with pytest.raises(RequestError, match=message):
            build(name, teachers)
    with pytest.raises(RequestError, match="student: expected taps ofd1"):
        OFD(OFD.Options(), {"final": (8, 2, 2)}, infos)
    with pytest.raises(RequestError, match=r"student: expected a tap named 'final', found \['ofd1'\]"):
        PFEED(PFEED.Options(), {"ofd1": (8, 2, 2)}, infos)
