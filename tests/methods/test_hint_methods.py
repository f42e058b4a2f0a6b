"""Methods that compare maps stage by stage: each loss against its formula, invariances, phases, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_scene import (
    BATCH,
    CLASSES,
    GRIDS,
    STUDENT,
    array,
    batch_norm,
    build,
    convolved,
    f64,
    losses,
    nearest,
    numpy_kl,
    pooled,
    scene,
    smaller,
    terms_of,
)
from scipy.special import rel_entr, softmax
from scipy.stats import norm
from torch import nn

from feedfast.errors import RequestError
from feedfast.methods import METHODS, StudentOutput, TapInfo
from feedfast.methods.ab import ActivationBoundaries
from feedfast.methods.base import matching
from feedfast.methods.cwd import CWD
from feedfast.methods.fitnet import FitNet
from feedfast.methods.mgd import MGD
from feedfast.methods.parts import Connector
from feedfast.methods.reviewkd import Fusion, ReviewKD, hierarchical_context
from feedfast.methods.vid import VID, Gaussian
from feedfast.recipe import MethodEntry
from feedfast.stages.trainee import method_entries
from feedfast_kernels import Codes, Target, encode

NEEDS = {
    "fitnet": ("stage*", "logits"),
    "at": ("stage*",),
    "ab": ("ofd*", "logits"),
    "vid": ("stage*",),
    "cwd": ("final",),
    "mgd": ("final",),
    "reviewkd": ("ofd*", "final"),
}
HINTS = tuple(NEEDS)


# --- losses


def test_fitnet_is_its_formula_on_every_grid() -> None:
    student, targets, _, infos = scene(tuple(GRIDS))
    method = build("fitnet", infos)
    assert isinstance(method, FitNet)
    how: dict[str, tuple[tuple[int, ...], dict[str, int | bool]]] = {
        "a": ((7, 6, 1, 1), {}),
        "b.2": ((6, 5, 4, 4), {"transposed": True, "stride": 2, "padding": 1}),
        "c": ((5, 6, 3, 3), {"stride": 2, "padding": 1}),
        "d": ((6, 6, 2, 2), {}),  # the paper's valid convolution
        "e": ((6, 6, 1, 1), {}),
    }
    hints = []
    for (name, (weight, call)), regressor in zip(how.items(), method.regressors, strict=True):
        assert isinstance(regressor, nn.Sequential)
        assert tuple(regressor[0].get_parameter("weight").shape) == weight
        x = convolved(array(student.taps["stage2"]), regressor[0], **call)  # type: ignore[arg-type]
        ours, theirs = smaller(np.maximum(batch_norm(x), 0), array(targets[name]["stage2"]))
        assert ours.shape == theirs.shape == (BATCH, *GRIDS[name][1][:1], *ours.shape[2:])
        hints.append(((ours - theirs) ** 2).mean())
    assert ours.shape[2:] == (4, 4)  # of "e" the hint was pooled
    found = terms_of(method, student, targets)
    np.testing.assert_allclose(found["hint"], np.mean(hints), rtol=1e-5)
    np.testing.assert_allclose(found["kd"], numpy_kl(student, targets, 3.0), rtol=1e-5)  # without tau^2
    assert set(terms_of(build("fitnet", infos, stages=1), student, targets)) == {"hint"}


@pytest.mark.parametrize("p", [2, 1.5, 4])
def test_at_is_its_formula(p: float) -> None:
    student, targets, _, infos = scene(tuple(GRIDS))
    method = build("at", infos, p=p)
    total = 0.0
    for name in infos:
        for tap in ("stage1", "stage2", "stage3"):
            maps = []
            for x in smaller(array(student.taps[tap]), array(targets[name][tap])):
                a = (np.abs(x) ** p).mean(1).reshape(BATCH, -1)
                maps.append(a / np.linalg.norm(a, axis=1, keepdims=True))
            total += ((maps[0] - maps[1]) ** 2).mean() / len(infos)
    np.testing.assert_allclose(terms_of(method, student, targets)["attention"], total, rtol=1e-5)


def test_at_sees_neither_scale_nor_sign() -> None:
    student, targets, _, infos = scene(("a",))
    method = build("at", infos)
    expected = terms_of(method, student, targets)["attention"]
    changed = StudentOutput(student.output, {tap: -3 * x for tap, x in student.taps.items()})
    scaled = {"a": {tap: -0.2 * x for tap, x in targets["a"].items()}}
    np.testing.assert_allclose(terms_of(method, changed, scaled)["attention"], expected, rtol=1e-5)
    # nor channels: teacher and student of one attention have no distance
    same = {"a": {tap: torch.cat((x, -x), 1) for tap, x in student.taps.items()}}
    assert terms_of(method, student, same)["attention"] < 1e-12 < expected


def test_ab_is_its_formula() -> None:
    student, targets, _, infos = scene(tuple(GRIDS))
    method = build("ab", infos, margin=0.7)
    assert isinstance(method, ActivationBoundaries)
    total, connectors = 0.0, iter(method.connectors)
    for name in infos:
        for tap, weight in (("ofd1", 0.25), ("ofd2", 0.5), ("ofd3", 1.0)):
            connector, s = next(connectors), array(student.taps[tap])
            if isinstance(connector, Connector):
                s = batch_norm(convolved(s, connector[0]))
            else:
                assert STUDENT[tap][0] == infos[name][tap].shape[0]
            s, t = smaller(s, array(targets[name][tap]))
            # the four cases of the authors' code
            silent = (s + 0.7) ** 2 * ((s > -0.7) & (t <= 0))
            active = (s - 0.7) ** 2 * ((s <= 0.7) & (t > 0))
            total += weight * (silent + active).sum() / BATCH / len(infos)
    assert sum(isinstance(c, nn.Identity) for c in method.connectors) == 7  # 1 of "a", 2 each of "c", "d" and "e"
    found = terms_of(method, student, targets)
    np.testing.assert_allclose(found["boundary"], total, rtol=1e-5)
    np.testing.assert_allclose(found["kd"], numpy_kl(student, targets, 3.0), rtol=1e-5)
    assert set(terms_of(build("ab", infos, second="task"), student, targets)) == {"boundary"}


def test_ab_leaves_responses_beyond_the_margin_alone() -> None:
    """On the teacher's side by the margin or more there is neither loss nor gradient, whatever the teacher's size."""
    student, targets, _, infos = scene(("a",))
    infos = {"a": {tap: TapInfo(STUDENT[tap]) if tap in STUDENT else info for tap, info in infos["a"].items()}}
    targets = {"a": {tap: x.detach().sign() * 1e-3 for tap, x in student.taps.items()}}
    targets["a"]["logits"] = torch.zeros(BATCH, CLASSES)
    beyond = {tap: (x.detach().sign() * (1 + x.detach().abs())).requires_grad_() for tap, x in student.taps.items()}
    method = build("ab", infos)
    boundary = method(StudentOutput(student.output, beyond), targets, None)["boundary"]
    boundary.backward()
    assert boundary == 0
    assert all(beyond[tap].grad is not None and not beyond[tap].grad.any() for tap in ("ofd1", "ofd2", "ofd3"))  # type: ignore[union-attr]
    beyond["ofd3"].data[0, 0, 0, 0] *= 0.5 / beyond["ofd3"].data[0, 0, 0, 0].abs()  # half the margin on its side
    np.testing.assert_allclose(
        terms_of(method, StudentOutput(student.output, beyond), targets)["boundary"], 0.25 / BATCH, rtol=1e-5
    )


def test_vid_is_a_gaussian_likelihood() -> None:
    student, targets, _, infos = scene(tuple(GRIDS))
    method = build("vid", infos)
    assert isinstance(method, VID)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape)  # variances of their own
    total, gaussians = 0.0, iter(method.gaussians)
    for name in infos:
        for tap in ("stage1", "stage2", "stage3"):
            gaussian = next(gaussians)
            assert isinstance(gaussian, Gaussian)
            x, t = smaller(array(student.taps[tap]), array(targets[name][tap]))
            x = np.maximum(convolved(x, gaussian.mean[0]), 0)
            x = convolved(np.maximum(convolved(x, gaussian.mean[2]), 0), gaussian.mean[4])
            variance = np.log1p(np.exp(array(gaussian.log_scale_C))) + 1e-5
            density = norm(x, np.sqrt(variance)[:, None, None]).logpdf(t)
            total += -(density + 0.5 * np.log(2 * np.pi)).mean() / len(infos)
    np.testing.assert_allclose(terms_of(method, student, targets)["information"], total, rtol=1e-5)
    start = build("vid", infos, variance=2.5).get_parameter("gaussians.0.log_scale_C")
    np.testing.assert_allclose(F.softplus(f64(start)).numpy() + 1e-5, 2.5, rtol=1e-6)


@pytest.mark.parametrize("tau", [4, 1, 0.5])
def test_cwd_is_its_formula(tau: float) -> None:
    student, targets, _, infos = scene(("a", "b.2", "c", "d"))
    method = build("cwd", infos, tau=tau)
    assert isinstance(method, CWD)
    terms = []
    for name, alignment in zip(infos, method.alignments, strict=True):
        x = array(student.taps["final"])
        if infos[name]["final"].shape[0] != 8:
            x = convolved(x, alignment)
        x, t = smaller(x, array(targets[name]["final"]))
        rows = [softmax(v.reshape(-1, 4) / tau, axis=1) for v in (t, x)]
        terms.append(tau**2 * rel_entr(*rows).sum() / len(rows[0]))
    np.testing.assert_allclose(terms_of(method, student, targets)["channels"], np.mean(terms), rtol=1e-5)


def test_cwd_does_not_see_a_constant_of_a_channel() -> None:
    student, targets, _, infos = scene(("a",))
    method = build("cwd", infos)
    expected = terms_of(method, student, targets)["channels"]
    constants = torch.randn(2, BATCH, 8, 1, 1) * 3
    changed = StudentOutput(student.output, {"final": student.taps["final"] + constants[0]})
    moved = {"a": {"final": targets["a"]["final"] + constants[1]}}
    np.testing.assert_allclose(terms_of(method, changed, moved)["channels"], expected, rtol=1e-4)
    same = {"a": {"final": student.taps["final"] + constants[1]}}
    assert abs(terms_of(method, changed, same)["channels"]) < 1e-6 < expected


@pytest.mark.parametrize(("over", "masked"), [("channels", 0.15), ("places", 0.65)])
def test_mgd_is_its_formula(over: str, masked: float) -> None:
    student, targets, _, infos = scene(("a", "b.2", "c", "e"))
    method = build("mgd", infos, over=over, masked=masked)
    assert isinstance(method, MGD)
    torch.manual_seed(5)
    found = terms_of(method, student, targets)["generation"]
    torch.manual_seed(5)
    terms = []
    for name, generator in zip(infos, method.generators, strict=True):
        x = array(student.taps["final"])
        if infos[name]["final"].shape[0] != 8:
            x = convolved(x, generator.get_submodule("alignment"))
        x, t = smaller(x, array(targets[name]["final"]))
        drawn = torch.rand((BATCH, x.shape[1], 1, 1) if over == "channels" else (BATCH, 1, *x.shape[2:]))
        x = convolved(x * (drawn.numpy() >= np.float32(masked)), generator.get_submodule("generation.0"), padding=1)
        x = convolved(np.maximum(x, 0), generator.get_submodule("generation.2"), padding=1)
        terms.append(((x - t) ** 2).sum() / BATCH)
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)
    torch.manual_seed(5)
    assert terms_of(method, student, targets)["generation"] == found  # a resumed step draws the same
    assert terms_of(method, student, targets)["generation"] != found


@pytest.mark.parametrize(("over", "axes"), [("channels", (2, 3)), ("places", (1,))])
def test_mgd_masks_whole_channels_or_places_as_often_as_asked(over: str, axes: tuple[int, ...]) -> None:
    _, _, _, infos = scene(("a",))
    method = build("mgd", infos, over=over, masked=0.3)
    x = torch.randn(500, 8, 2, 2, requires_grad=True)  # without an alignment: what is masked has no gradient
    method(StudentOutput(None, {"final": x}), {"a": {"final": torch.randn(500, 8, 2, 2)}}, None)[
        "generation"
    ].backward()
    assert x.grad is not None
    dropped = array(x.grad) == 0
    assert (dropped.all(axes) == dropped.any(axes)).all()
    whole = dropped.all(axes)
    assert abs(whole.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / whole.size)


def test_reviewkd_is_its_formula() -> None:
    student, targets, _, infos = scene(tuple(GRIDS))
    method = build("reviewkd", infos, width=7)
    assert isinstance(method, ReviewKD)
    total = 0.0
    levels = ("ofd1", "ofd2", "ofd3", "final")
    for number, name in enumerate(infos):
        fused = None
        for level in (3, 2, 1, 0):
            fusion, tap = method.fusions[4 * number + level], levels[level]
            assert isinstance(fusion, Fusion)
            x, t = array(student.taps[tap]), array(targets[name][tap])
            if tap == "final":
                x, t = x.mean((2, 3), keepdims=True), t.mean((2, 3), keepdims=True)
            u = batch_norm(convolved(x, fusion.get_submodule("entry.0")))
            assert u.shape[1] == 7
            if fused is not None:
                deeper = nearest(fused, *u.shape[2:])
                both = convolved(np.concatenate((u, deeper), 1), fusion.get_submodule("shares"))
                a, b = np.split(1 / (1 + np.exp(-both)), 2, axis=1)
                u = a * u + b * deeper
            fused = nearest(u, *t.shape[2:])
            found = batch_norm(convolved(fused, fusion.get_submodule("exit.0"), padding=1))
            grids = [t.shape[2:], *((n, n) for n in (4, 2, 1) if n < min(t.shape[2:]))]
            squares = [((pooled(found, *grid) - pooled(t, *grid)) ** 2).mean() for grid in grids]
            total += np.average(squares, weights=0.5 ** np.arange(len(grids))) / len(infos)
    np.testing.assert_allclose(terms_of(method, student, targets)["review"], total, rtol=1e-4)
    assert sum(fusion.shares is None for fusion in method.fusions) == len(infos)


def test_context_weighs_a_constant_fully_and_a_pattern_by_its_size() -> None:
    """A constant difference is in every average; a checkerboard is gone from all of them."""
    x = torch.randn(2, 3, 8, 8)
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    np.testing.assert_allclose(hierarchical_context(x + 2, x).item(), 4.0, rtol=1e-5)
    np.testing.assert_allclose(hierarchical_context(x + checkers, x).item(), 1 / (1 + 0.5 + 0.25 + 0.125), rtol=1e-5)


# --- phases


@pytest.mark.parametrize(
    ("name", "options", "progress", "task", "weights"),
    [
        ("fitnet", {}, 0.0, 0.0, {"hint": 100.0, "kd": 0.0}),
        ("fitnet", {}, 0.1999, 0.0, {"hint": 100.0, "kd": 0.0}),
        ("fitnet", {}, 0.2, 1.0, {"hint": 0.0, "kd": 4.0}),
        ("fitnet", {}, 0.6, 1.0, {"hint": 0.0, "kd": 2.5}),
        ("fitnet", {}, 1.0, 1.0, {"hint": 0.0, "kd": 1.0}),
        ("fitnet", {"hint_share": 0, "lambda_end": 6}, 0.5, 1.0, {"hint": 0.0, "kd": 5.0}),
        ("fitnet", {"stages": 1}, 0.0, 1.0, {"hint": 100.0}),
        ("fitnet", {"stages": 1, "beta": 7}, 1.0, 1.0, {"hint": 7.0}),
        ("at", {}, 0.0, 1.0, {"attention": 1000.0}),
        ("ab", {}, 0.0, 0.0, {"boundary": 0.003, "kd": 0.0}),
        ("ab", {}, 0.3749, 0.0, {"boundary": 0.003, "kd": 0.0}),
        ("ab", {}, 0.375, 0.0, {"boundary": 0.0, "kd": 1.0}),
        ("ab", {}, 1.0, 0.0, {"boundary": 0.0, "kd": 1.0}),
        ("ab", {"second": "task"}, 0.0, 0.0, {"boundary": 0.003}),
        ("ab", {"second": "task"}, 0.375, 1.0, {"boundary": 0.0}),
        ("vid", {}, 0.3, 1.0, {"information": 1.0}),
        ("cwd", {}, 0.3, 1.0, {"channels": 3.0}),
        ("mgd", {}, 0.3, 1.0, {"generation": 7e-5}),
        ("reviewkd", {"beta": 5}, 0.0, 1.0, {"review": 0.0}),
        ("reviewkd", {"beta": 5}, 1 / 24, 1.0, {"review": 2.5}),
        ("reviewkd", {"beta": 5}, 1 / 12, 1.0, {"review": 5.0}),
        ("reviewkd", {"beta": 5}, 1.0, 1.0, {"review": 5.0}),
        ("reviewkd", {"warmup_share": 0}, 0.0, 1.0, {"review": 1.0}),
    ],
)
def test_weights_are_functions_of_the_progress(
    name: str, options: dict[str, object], progress: float, task: float, weights: dict[str, float]
) -> None:
    student, targets, _, infos = scene(("a",))
    method = build(name, infos, **options)
    assert method.weights(progress) == pytest.approx(weights)
    assert method.task_weight(progress) == task
    assert set(terms_of(method, student, targets)) == set(weights)


def test_the_hint_trains_what_lies_below_it_and_nothing_else() -> None:
    student, targets, labels, infos = scene()
    losses(build("fitnet", infos), student, targets, labels, 0.0)["loss"].backward()
    grads = [student.output.grad, student.taps["stage2"].grad]
    assert all(grad is not None for grad in grads)
    assert [bool(grad.any()) for grad in grads] == [False, True]  # type: ignore[union-attr]
    student, targets, labels, infos = scene()
    losses(build("fitnet", infos), student, targets, labels, 0.5)["loss"].backward()
    grads = [student.output.grad, student.taps["stage2"].grad]
    assert [bool(grad.any()) for grad in grads] == [True, False]  # type: ignore[union-attr]


# --- what all have in common


@pytest.mark.parametrize("name", HINTS)
def test_gradients_reach_student_and_adapters_and_no_target(name: str) -> None:
    student, targets, labels, infos = scene()
    for taps in targets.values():
        for value in taps.values():
            value.requires_grad_()
    method = build(name, infos)
    for progress in (0.05, 0.9):  # both phases
        losses(method, student, targets, labels, progress)["loss"].backward()
    read = {"fitnet": ["stage2"]}.get(name, [tap for tap in matching(method.needs, STUDENT) if tap != "logits"])
    assert read
    for x in (student.output, *(student.taps[tap] for tap in read), *method.parameters()):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()
    assert all(x.grad is None for tap, x in student.taps.items() if tap not in read)
    assert all(value.grad is None for taps in targets.values() for value in taps.values())


@pytest.mark.parametrize("name", HINTS)
def test_codes_mean_their_floats(name: str) -> None:
    student, targets, labels, infos = scene()
    coded: dict[str, dict[str, Target]] = {}
    decoded: dict[str, dict[str, Target]] = {}
    for teacher, taps in targets.items():
        coded[teacher], decoded[teacher] = dict(taps), dict(taps)
        for tap, value in taps.items():
            if tap != "logits":
                offset, step = torch.full((value.shape[1],), -3.0), torch.full((value.shape[1],), 0.025)
                codes = encode(value, offset, step, codec="u8")[0]
                coded[teacher][tap] = Codes(codes, offset, step, "u8")
                decoded[teacher][tap] = (codes.float() * step + offset).permute(0, 3, 1, 2).contiguous()
    method = build(name, infos)
    found = []
    for given in (coded, decoded):
        torch.manual_seed(1)
        found.append(losses(method, student, given, labels, 0.1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", HINTS)
def test_bf16_autocast(name: str) -> None:
    student, targets, labels, infos = scene()
    method = build(name, infos)
    rounded = StudentOutput(
        student.output.detach().bfloat16().requires_grad_(),
        {tap: x.detach().bfloat16().requires_grad_() for tap, x in student.taps.items()},
    )
    torch.manual_seed(1)
    plain = losses(method, student, targets, labels, 0.1)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = losses(method, rounded, targets, labels, 0.1)
    low["loss"].backward()
    torch.testing.assert_close(low, plain, rtol=0.03, atol=0)
    assert all(x.grad.isfinite().all() for x in rounded.taps.values() if x.grad is not None)


def test_what_is_read_of_teachers_and_of_the_student() -> None:
    assert {name: METHODS[name].needs for name in HINTS} == NEEDS
    assert all(METHODS[name].student_needs is None for name in HINTS)


def test_adapters_are_as_large_as_written() -> None:
    """Weights of convolutions without bias k*k*C*C', with bias C' more, of batch norms 2*C'."""
    _, _, _, infos = scene(("a",))
    found = {name: sum(p.numel() for p in build(name, infos).parameters()) for name in HINTS}
    assert found == {
        "fitnet": 6 * 7 + 7 + 14,
        "at": 0,
        "ab": 4 * 5 + 10 + 6 * 7 + 14,
        "vid": sum(s * t + 2 * t * t + t for s, t in ((4, 5), (6, 7), (8, 8))),
        "cwd": 0,
        "mgd": 2 * (9 * 8 * 8 + 8),
        "reviewkd": sum(s * 8 + 16 + 9 * 8 * t + 2 * t for s, t in ((4, 5), (6, 7), (8, 8), (8, 8))) + 3 * 34,
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fitnet", {"stages": 3}, r"^method\.stages: expected 1 or 2, found 3$"),
        ("fitnet", {"hint_share": 1.0}, r"^method\.hint_share: expected .*less than 1, found 1\.0$"),
        ("fitnet", {"layer": 2}, r"^method\.layer: not an option of 'fitnet', expected stages \| tap"),
        ("at", {"p": 0.5}, r"^method\.p: expected a number of 1 or more, found 0\.5$"),
        ("ab", {"second": "ce"}, r"^method\.second: expected 'kd' or 'task', found 'ce'$"),
        ("ab", {"margin": -1.0}, r"^method\.margin: expected a number of 0 or more, found -1\.0$"),
        ("vid", {"variance": 0.0}, r"^method\.variance: expected a number more than 1e-05, found 0\.0$"),
        ("cwd", {"tau": 0.0}, r"^method\.tau: expected a number more than 0, found 0\.0$"),
        ("mgd", {"masked": 1.0}, r"^method\.masked: expected .*less than 1, found 1\.0$"),
        ("mgd", {"over": "pixels"}, r"^method\.over: expected 'channels' or 'places', found 'pixels'$"),
        ("reviewkd", {"width": 0}, r"^method\.width: expected a whole number of 1 or more, found 0$"),
        ("reviewkd", {"warmup_share": 2.0}, r"^method\.warmup_share: expected a number from 0 to 1, found 2\.0$"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        method_entries([MethodEntry(name=name, **options)])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HINTS)
def test_taps_that_do_not_fit_are_refused(name: str) -> None:
    _, _, _, infos = scene(("a",))
    with pytest.raises(RequestError, match="at least one teacher, found none"):
        build(name, {})
    group = METHODS[name].needs[0].removesuffix("*")
    last = "final" if group == "final" else f"{group}3"
    fewer = {"a": {tap: info for tap, info in infos["a"].items() if tap != last}}
    lists = rf"teacher 'a': expected the student's taps \['{group}1', .*'{group}3'\], found \['{group}1', '{group}2'\]$"
    with pytest.raises(RequestError, match=lists if group != "final" else "teacher 'a': expected a tap named 'final'"):
        build(name, fewer)
    flat = {"a": {**infos["a"], f"{group}2": TapInfo((6,)), "final": TapInfo((8,))}}
    with pytest.raises(RequestError, match=r"tap '(\w+)2?': expected maps, found .* and \(\d,\) of teacher 'a'$"):
        build(name, flat)
    if group != "final":
        with pytest.raises(RequestError, match=rf"^student: expected taps {group}1, {group}2, ..., found \['final'\]$"):
            METHODS[name](METHODS[name].Options(), {"final": (8, 2, 2)}, infos)


def test_a_hint_that_is_no_stage_is_refused() -> None:
    _, _, _, infos = scene(("a",))
    with pytest.raises(RequestError, match=r"^method\.tap: expected stage1 \| stage2 \| stage3, found 'stage4'$"):
        build("fitnet", infos, tap="stage4")
