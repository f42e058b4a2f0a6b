"""Methods on the maps of detectors and segmentation networks: formulas in float64, gradients, and who is refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from map_scene import array, batch_norm, convolved, pooled, smaller
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.methods import METHODS, Method, StudentOutput, TapInfo, refuse_dense, refuse_other_logits
from feedfast.methods.base import LOGITS, matching
from feedfast.methods.cwd import CWD
from feedfast.methods.ofd import OFD
from feedfast.methods.parts import Connector, logit_rows
from feedfast.recipe import MethodEntry
from feedfast.stages.trainee import method_entries
from feedfast.storage.schema import TapInfo as StoredTap
from feedfast_kernels import Codes, Target, encode

Shapes = dict[str, tuple[int, ...]]
CLASSES = 5
DENSE = ("none", "kd", "ban", "dist", "fitnet", "at", "ofd", "cwd", "mgd", "pfeed", "sfeed")


def numbered(prefix: str, channels: tuple[int, ...], sides: tuple[int, ...]) -> Shapes:
    return {f"{prefix}{n}": (c, s, s) for n, (c, s) in enumerate(zip(channels, sides, strict=True), start=1)}


# Grids of the real networks at small inputs: DeepLabV3+ at 65 pixels, output stride 16; SSD300's last map is one place.
DEEPLAB = (17, 9, 5, 5, 5, 17)
SSD = (10, 5, 3, 2, 2, 1)
STUDENT: Shapes = {
    **numbered("ofd", (4, 5, 6, 7, 3, 3), DEEPLAB),
    **numbered("stage", (4, 5, 6, 7), DEEPLAB[:4]),
    "final": (7, 5, 5),
}
LARGER: Shapes = {
    **numbered("ofd", (6, 8, 9, 11, 3, 3), DEEPLAB),
    **numbered("stage", (6, 8, 9, 11), (17, 9, 9, 9)),  # another output stride: what may differ, does
    "final": (11, 9, 9),
    LOGITS: (CLASSES, 17, 17),
}


def infos_of(shapes: Shapes) -> dict[str, TapInfo]:
    return {tap: TapInfo(s, torch.full((s[0],), -0.3) if tap.startswith("ofd") else None) for tap, s in shapes.items()}


Scene = tuple[StudentOutput, dict[str, dict[str, Tensor]], dict[str, dict[str, TapInfo]]]


def scene(
    student: Shapes = STUDENT,
    teachers: Mapping[str, Shapes] | None = None,
    grid: int = 9,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """A batch: a student with logits on ``grid`` x ``grid`` places, and every teacher's targets (channels-last)."""
    g = torch.Generator().manual_seed(0)
    teachers = {"a": LARGER} if teachers is None else teachers

    def made(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(batch, *shape, generator=g)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    targets = {name: {tap: made(shape) for tap, shape in shapes.items()} for name, shapes in teachers.items()}
    taps = {tap: made(shape).to(dtype).requires_grad_() for tap, shape in student.items()}
    output = made((CLASSES, grid, grid)).to(dtype).requires_grad_()
    return StudentOutput(output, taps), targets, {name: infos_of(shapes) for name, shapes in teachers.items()}


def build(
    name: str, infos: Mapping[str, Mapping[str, TapInfo]], student: Shapes = STUDENT, **options: object
) -> Method:
    (entry,) = method_entries([MethodEntry(name=name, **options)])  # type: ignore[arg-type]
    torch.manual_seed(0)
    return entry.kind(entry.options, student, infos)


# --- logits per place


def on_grid(x: Tensor, side: int) -> np.ndarray:
    """[B, K, h, w] → [B, side, side, K]."""
    return pooled(array(x), side, side).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize(
    ("student_grid", "teacher_grids", "common"),
    [(9, (9,), 9), (9, (17,), 9), (17, (9,), 9), (9, (17, 5), 5), (5, (5, 17), 5)],
)
def test_kd_is_its_formula_at_every_place(
    average: str, student_grid: int, teacher_grids: tuple[int, ...], common: int
) -> None:
    teachers: dict[str, Shapes] = {f"t{n}": {LOGITS: (CLASSES, side, side)} for n, side in enumerate(teacher_grids)}
    student, targets, infos = scene({}, teachers, student_grid)
    z = [on_grid(taps[LOGITS], common) / 3 for taps in targets.values()]
    q = softmax(on_grid(student.output, common) / 3, axis=-1)
    p = np.mean([softmax(x, axis=-1) for x in z], 0) if average == "probabilities" else softmax(np.mean(z, 0), axis=-1)
    found = build("kd", infos, {}, tau=3.0, average=average)(student, targets, None)["kd"]
    np.testing.assert_allclose(found.item(), 9 * rel_entr(p, q).sum(-1).mean(), rtol=1e-5)
    found.backward()
    # d KL / d z = tau (q - p) per place, spread over the places that were averaged
    sent = 3 * (q - p) / (2 * common**2)
    grad = on_grid(student.output.grad, common) if student_grid == common else None
    np.testing.assert_allclose(array(student.output.grad).sum((2, 3)), sent.sum((1, 2)), rtol=1e-3, atol=1e-7)
    if grad is not None:
        np.testing.assert_allclose(grad, sent, rtol=1e-3, atol=1e-8)


def test_dist_takes_places_for_rows() -> None:
    student, targets, infos = scene({}, {"a": {LOGITS: (CLASSES, 17, 17)}}, grid=9)
    p_T, p_S = (softmax(on_grid(x, 9).reshape(-1, CLASSES), axis=1) for x in (targets["a"][LOGITS], student.output))
    found = build("dist", infos, {})(student, targets, None)
    expected = [np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(*rows, strict=True)]) for rows in
                ((p_S, p_T), (p_S.T, p_T.T))]  # fmt: skip
    np.testing.assert_allclose([found["inter"].item(), found["intra"].item()], expected, rtol=1e-4)


def test_fitnets_second_stage_compares_logits_place_by_place() -> None:
    student, targets, infos = scene()
    z, p = (on_grid(x, 9) for x in (student.output, targets["a"][LOGITS]))
    expected = rel_entr(softmax(p / 3, axis=-1), softmax(z / 3, axis=-1)).sum(-1).mean()
    found = build("fitnet", infos)(student, targets, None)
    np.testing.assert_allclose(found["kd"].item(), expected, rtol=1e-5)


def test_rows_of_channels_last_logits_are_views() -> None:
    """As a cache hands them out: at 513 pixels a copy would be 1.4 MB per image and teacher."""
    output, target = (
        torch.randn(2, CLASSES, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for dtype in (torch.float32, torch.float16)
    )
    ours, (theirs,) = logit_rows(output, [target])
    for rows, whole in ((ours, output), (theirs, target)):
        assert rows.data_ptr() == whole.data_ptr()
        assert rows.dtype == whole.dtype
        torch.testing.assert_close(rows[9 * 9 + 9 + 2], whole[1, :, 1, 2], rtol=0, atol=0)
    same, (also,) = logit_rows(output.contiguous(), [target.contiguous()])
    assert torch.equal(same, ours)
    assert torch.equal(also, theirs)


@pytest.mark.parametrize("grid", [5, 9])
@pytest.mark.parametrize("tau", [4.0, 1.0])
def test_cwd_compares_maps_of_classes(tau: float, grid: int) -> None:
    student, targets, infos = scene({}, {"a": {LOGITS: (CLASSES, 9, 9)}}, grid)
    x, t = smaller(array(student.output), array(targets["a"][LOGITS]))
    rows = [softmax(v.reshape(2 * CLASSES, -1) / tau, axis=1) for v in (t, x)]
    method = build("cwd", infos, {}, map="logits", tau=tau)
    assert not list(method.parameters())
    found = method(student, targets, None)["channels"]
    np.testing.assert_allclose(found.item(), tau**2 * rel_entr(*rows).sum(1).mean(), rtol=1e-5)
    assert CWD.needed(CWD.Options(map="logits")) == (LOGITS,)
    with pytest.raises(RequestError, match=r"^method\.map: 'logits' compares maps of classes, .*found \(5,\) of 'a'"):
        build("cwd", {"a": {LOGITS: TapInfo((CLASSES,))}}, {}, map="logits")


# --- maps


def partial(t: np.ndarray, s: np.ndarray) -> float:
    t = np.maximum(t, -0.3)
    return float(np.where((s <= t) & (t <= 0), 0, (t - s) ** 2).sum())


@pytest.mark.parametrize(
    ("sides", "options", "weights", "alpha"),
    [
        (DEEPLAB, {}, (1 / 8, 1 / 4, 1 / 2, 1, 1, 1 / 16), 1e-5),
        (DEEPLAB, {"taps": [2, 3, 6]}, (0, 1 / 4, 1 / 2, 0, 0, 1 / 16), 1e-5),
        (DEEPLAB, {"taps": [2, 4], "tap_weights": [3, 1], "alpha": 0.5}, (0, 3, 0, 1, 0, 0), 0.5),
        (SSD, {}, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), 1e-5),
        ((38, *SSD[1:]), {"alpha": 1e-3}, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), 1e-3),
    ],
)
def test_ofd_weighs_six_taps_as_its_authors_do(
    sides: tuple[int, ...], options: dict[str, object], weights: tuple[float, ...], alpha: float
) -> None:
    ours = numbered("ofd", (2, 3, 2, 3, 2, 3), sides)
    student, targets, infos = scene(ours, {"a": numbered("ofd", (3, 2, 3, 4, 2, 2), sides)}, batch=3)
    method = build("ofd", infos, ours, **options)
    assert isinstance(method, OFD)
    assert method.weights(0.3) == {"feature": alpha}
    read = [tap for tap, weight in zip(ours, weights, strict=True) if weight]
    assert list(matching(method.needed(method_entries([MethodEntry(name="ofd", **options)])[0].options), ours)) == read  # type: ignore[arg-type]
    (connectors,) = method.connectors
    assert isinstance(connectors, nn.ModuleList)
    expected = 0.0
    for tap, connector, weight in zip(read, connectors, filter(None, weights), strict=True):
        assert isinstance(connector, Connector)
        s = batch_norm(convolved(array(student.taps[tap]), connector[0]))
        expected += weight * partial(array(targets["a"][tap]), s) / 3
    found = method(student, {"a": {tap: targets["a"][tap] for tap in read}}, None)["feature"]
    np.testing.assert_allclose(found.item(), expected, rtol=1e-4)
    found.backward()
    assert [tap for tap in ours if student.taps[tap].grad is not None] == read


def test_ofd_refuses_taps_that_are_not_there_and_grids_that_differ() -> None:
    _, _, infos = scene()
    for taps in ([7], [2, 1], [2, 2], []):
        with pytest.raises(
            RequestError, match=r"^method\.taps: expected some of the student's \[1, 2, 3, 4, 5, 6\], asc"
        ):
            build("ofd", infos, taps=taps)
    other = {**infos["a"], "ofd3": TapInfo((9, 9, 9), torch.full((9,), -0.3))}
    with pytest.raises(RequestError, match=r"'ofd3': expected maps of equal height and width.*of equal output strides"):
        build("ofd", {"a": other})
    lacking = {tap: info for tap, info in infos["a"].items() if tap != "ofd3"}
    with pytest.raises(RequestError, match=r"^teacher 'a': expected a tap named 'ofd3'"):
        build("ofd", {"a": lacking}, taps=[2, 3])
    assert len(build("ofd", {"a": lacking}, taps=[1, 2]).connectors[0]) == 2  # type: ignore[arg-type,index]


OPTIONS: dict[str, list[dict[str, object]]] = {
    "kd": [{}, {"standardize": True}],
    "fitnet": [{"tap": f"stage{n}"} for n in (1, 4)],
    "cwd": [{}, {"map": "logits"}],
    "mgd": [{"over": "places", "masked": 0.65}],
}
RUNS = [(name, options) for name in DENSE[1:] for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_gradients_are_those_of_differences(name: str, options: dict[str, object]) -> None:
    """In float64, along random directions of everything that is trained, on grids and channels that differ."""
    small = {tap: (min(c, 3), min(s, 7), min(s, 7)) for tap, (c, s, _) in STUDENT.items()}
    larger = {tap: (min(c, 4), min(s, 7 if tap.startswith("ofd") else 9), min(s, 7 if tap.startswith("ofd") else 9))
              for tap, (c, s, _) in LARGER.items()}  # fmt: skip
    larger[LOGITS] = (CLASSES, 9, 9)
    student, targets, infos = scene(small, {"a": larger}, grid=5, dtype=torch.float64)
    method = build(name, infos, small, **options).double()
    g = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # biases of 0 put ReLUs on their kink
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(3)  # MGD's masks
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        return torch.stack(list(method(student, targets, None).values())).sum()

    trained = [student.output, *student.taps.values(), *method.parameters()]
    grads = torch.autograd.grad(loss(), trained, allow_unused=True)
    moved = [(x, grad) for x, grad in zip(trained, grads, strict=True) if grad is not None]
    assert len(moved) >= 1
    for _ in range(2):
        steps = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x, _ in moved]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for (x, _), step in zip(moved, steps, strict=True):
                    x += sign * 1e-6 * step
                values.append(loss().item())
                for (x, _), step in zip(moved, steps, strict=True):
                    x -= sign * 1e-6 * step
        slope = sum((grad * step).sum().item() for (_, grad), step in zip(moved, steps, strict=True))
        np.testing.assert_allclose((values[0] - values[1]) / 2e-6, slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in DENSE[1:] if name not in ("kd", "ban", "dist")])
def test_codes_mean_their_floats(name: str) -> None:
    student, targets, infos = scene()
    coded: dict[str, Target] = dict(targets["a"])
    decoded: dict[str, Target] = dict(targets["a"])
    for tap, value in targets["a"].items():
        if tap != LOGITS:
            offset, step = torch.full((value.shape[1],), -3.0), torch.full((value.shape[1],), 0.025)
            codes = encode(value, offset, step, codec="u8")[0]
            coded[tap] = Codes(codes, offset, step, "u8")
            decoded[tap] = (codes.float() * step + offset).permute(0, 3, 1, 2)
    method = build(name, infos)
    found = []
    for given in (coded, decoded):
        torch.manual_seed(1)
        found.append(method(student, {"a": given}, None))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


# --- who is refused


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_whether_it_serves_dense_tasks(name: str) -> None:
    kind = METHODS[name]
    assert kind.dense == (name in DENSE)
    assert not (kind.dense and kind.one_label)
    refuse_dense(kind, "classify")
    for task in ("segment", "detect"):
        fits = [n for n in DENSE if task == "segment" or n not in ("kd", "ban", "dist", "fitnet")]
        if name in fits:
            refuse_dense(kind, task)
            continue
        with pytest.raises(
            RequestError, match=rf"^method\.1\.name: '{name}' .* task\.name = '{task}' one of "
        ) as refused:
            refuse_dense(kind, task, where="method.1")
        assert set(str(refused.value).rpartition(" one of ")[2].split(" | ")) == set(fits)


def test_what_reads_no_logits_serves_detectors() -> None:
    fitnet, cwd = METHODS["fitnet"], METHODS["cwd"]
    refuse_dense(fitnet, "detect", fitnet.Options(stages=1))
    with pytest.raises(RequestError, match=r"^method\.name: 'cwd' compares logits"):
        refuse_dense(cwd, "detect", cwd.Options(map="logits"))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DENSE and LOGITS in METHODS[name].needs])
def test_dense_logits_are_refused_by_what_compares_images(name: str) -> None:
    _, _, infos = scene()
    with pytest.raises(
        RequestError, match=rf"^method\.name: '{name}' compares one row of logits per image.*\(5, 17, 17\)"
    ):
        build(name, {"a": infos["a"], "b": infos["a"]})


def test_logits_of_student_and_teachers_must_be_of_one_form() -> None:
    kd, ofd = METHODS["kd"], METHODS["ofd"]
    maps, rows = {"a": {LOGITS: TapInfo((5, 9, 9))}}, {"a": {LOGITS: TapInfo((5,))}}
    for outputs, teachers in (((5, 17, 17), maps), ((5,), rows)):
        refuse_other_logits(kd, kd.Options(), outputs, teachers)
    refuse_other_logits(ofd, ofd.Options(), {"cls_logits": (10, 5)}, {"a": {}})
    for outputs, teachers, message in (
        ((5,), maps, r"'kd' compares logits, expected .*\[batch, class, height, width\], .*found \[5\] per sample"),
        ((5, 9, 9), rows, r"'kd' compares logits, expected .*\[batch, class\], .*found \[5, 9, 9\] per sample"),
        ({"cls_logits": (10, 5)}, maps, "'kd' compares logits, expected .*found no tensor"),
        (
            {"cls_logits": (10, 5)},
            {"a": {"ofd1": TapInfo((4, 9, 9))}},
            "'kd' compares logits, found none of teacher 'a'",
        ),
        ((6, 9, 9), maps, "'kd' compares classes one by one, expected 6 in every teacher, found 5 in 'a'"),
    ):
        with pytest.raises(RequestError, match=message):
            refuse_other_logits(kd, kd.Options(), outputs, teachers)


def test_a_cache_may_hold_maps_of_logits() -> None:
    stored = StoredTap(name=LOGITS, path="", position="post", shape=(21, 129, 129), codec="f16")
    assert stored.row_bytes == 21 * 129 * 129 * 2
    with pytest.raises(ValueError, match=r"logits must be \(K,\) or \(K, H, W\) in f16 or f32, found \[21, 129\]"):
        StoredTap(**{**stored.model_dump(), "shape": (21, 129)})
