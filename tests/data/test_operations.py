"""Operations of a view: what is drawn, against torchvision, timm and SciPy; a draw is the sample's own; bad lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data import auto_augment as timm_policies
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
    v2,
)
from torchvision.transforms import functional as F

from feedfast.data import operations as ops
from feedfast.data.augment import OPERATIONS, PRESETS, plan_with
from feedfast.data.distort import PhotometricDistort
from feedfast.data.mixing import CutMix, Mixup
from feedfast.data.operations import PixelOperation
from feedfast.data.policies import AUTO_AUGMENT, TABLES
from feedfast.data.steps import CODE_OF, CODES, PARAMETERS, Program, describe
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

COUNT = 20_000
EVERYTHING: tuple[PixelOperation, ...] = (
    ops.ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, p=0.8),
    ops.Grayscale(p=0.3),
    ops.GaussianBlur(kernel=5),
    ops.Solarize(),
    ops.RandomErasing(fill=(1, 2, 3)),
    ops.Affine(degrees=20, translate=(0.1, 0.2), scale=(0.8, 1.2), shear=10, p=0.7),
    ops.Rotate(fill=(9, 8, 7)),
    ops.RandAugment(),
    ops.RandAugment(space="timm", p=0.5, magnitude_std=0.5, interpolation="bilinear"),
    ops.TrivialAugment(),
    ops.AutoAugment(policy="cifar10"),
    PhotometricDistort(),
)


def drawn(operation: PixelOperation, count: int = COUNT, size: int = 32, seed: int = 5) -> Program:
    program = ViewPlan(seed, size, "none", operations=(operation,)).program(0, np.arange(count))
    assert program is not None
    return program


def of(program: Program, code: str) -> np.ndarray:
    """Parameters of all steps with a code."""
    return program.parameters[program.codes == CODE_OF[code]]


def uniform(values: np.ndarray, low: float, high: float) -> bool:
    return bool(stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4)


# ------------------------------------------------------------------------------------------------- what is drawn


def test_color_jitter_has_torchvisions_ranges_and_every_order() -> None:
    program = drawn(ops.ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, p=0.8))
    on = program.codes[:, 0] != 0
    assert on.mean() == pytest.approx(0.8, abs=0.02)
    assert ((program.codes != 0).all(axis=1) == on).all(), "the four go together"
    for code, low, high in (
        ("brightness", 0.6, 1.4), ("contrast", 0.0, 2.5), ("saturation", 0.8, 1.2), ("hue", -36, 36),
    ):  # fmt: skip
        assert uniform(of(program, code)[:, 0], low, high), code
    orders, counts = np.unique(program.codes[on], axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_photometric_distort_has_torchvisions_parts() -> None:
    """Against torchvision's own draws: how often each part is applied, before or after, and with what."""
    program = drawn(PhotometricDistort(p=0.4))
    names = ("brightness", "contrast", "saturation", "hue", "contrast", "permute-channels")
    assert [set(codes) for codes in program.codes.T.tolist()] == [{0, CODE_OF[name]} for name in names]
    torch.manual_seed(0)
    theirs = [v2.RandomPhotometricDistort(p=0.4).make_params([torch.empty(3, 2, 2)]) for _ in range(4000)]
    for slot, name in enumerate(names[:5]):
        own = program.parameters[program.codes[:, slot] != 0, slot, 0]
        key = f"{name}_factor"
        values = [
            given[key] * (360 if name == "hue" else 1)
            for given in theirs
            if given[key] is not None and (name != "contrast" or given["contrast_before"] == (slot == 1))
        ]
        assert stats.ks_2samp(own, values).pvalue > 1e-4, name
        assert len(own) / COUNT == pytest.approx(len(values) / len(theirs), abs=0.03), name
    on = program.codes[:, 5] != 0
    assert on.mean() == pytest.approx(0.4, abs=0.02)
    orders, counts = np.unique(program.parameters[on, 5, :3], axis=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(itertools.permutations(range(3)))
    assert stats.chisquare(counts).pvalue > 1e-4
    together = np.corrcoef((program.codes != 0)[:, [0, 2, 3, 5]].T)[np.triu_indices(4, 1)]
    assert np.abs(together).max() < 0.03


def test_a_jitter_of_one_kind_is_one_step() -> None:
    program = drawn(ops.ColorJitter(hue=0.5))
    assert program.codes.shape == (COUNT, 1)
    assert uniform(of(program, "hue")[:, 0], -180, 180)


@pytest.mark.parametrize(("operation", "code", "share"), [
    (ops.Grayscale(p=0.25), "saturation", 0.25), (ops.Solarize(p=0.4, threshold=77), "solarize", 0.4),
    (ops.GaussianBlur(p=0.1), "gaussian-blur", 0.1), (ops.Affine(degrees=5, p=0.5), "affine", 0.5),
])  # fmt: skip
def test_how_often(operation: PixelOperation, code: str, share: float) -> None:
    program = drawn(operation)
    assert (program.codes == CODE_OF[code]).mean() == pytest.approx(share, abs=0.02)
    assert (program.parameters[program.codes == 0] == 0).all()


def test_blur_is_uniform() -> None:
    assert uniform(of(drawn(ops.GaussianBlur(p=1, sigma=(0.1, 2.0))), "gaussian-blur")[:, 0], 0.1, 2.0)


def test_erasing_has_torchvisions_boxes() -> None:
    program = drawn(ops.RandomErasing(p=1.0), size=40)
    boxes = of(program, "erase")[:, :4]
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 40)
    theirs = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)], dtype=float
    )
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 40).all()
    for column in range(4):
        assert stats.ks_2samp(boxes[:, column], theirs[:, column]).pvalue > 1e-4, column


def matrix_of(parameters: np.ndarray) -> np.ndarray:
    return parameters.reshape(-1, 2, 3).astype(np.float64)


def test_affine_matrices_are_torchvisions() -> None:
    """Decomposed, every part has its range; and composed again by torchvision's own function they are the same."""
    size = 64
    operation = ops.Affine(degrees=30, translate=(0.25, 0.1), scale=(0.5, 2.0), shear=20)
    matrix = matrix_of(of(drawn(operation, 2000, size), "affine"))
    linear = np.linalg.inv(matrix[:, :, :2])
    scale = np.sqrt(np.linalg.det(linear))
    turn = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert uniform(turn, -30, 30)
    assert uniform(scale, 0.5, 2.0)
    for row in range(20):
        a, s = math.radians(turn[row]), scale[row]
        shear = math.atan(-(linear[row, 0, 1] / s + math.sin(a)) / math.cos(a))
        assert abs(math.degrees(shear)) <= 20 + 1e-3
        shift = -np.linalg.inv(matrix[row, :, :2]) @ (matrix[row, :, 2] - size / 2) - size / 2
        assert np.abs(shift - np.rint(shift)).max() < 1e-2
        assert (np.abs(shift) <= (16.01, 6.5)).all()
        theirs = F._get_inverse_affine_matrix(
            [0.0, 0.0], turn[row], np.rint(shift).tolist(), s, [math.degrees(shear), 0.0]
        )
        ours = matrix[row, :, 2] - size / 2 + matrix[row, :, :2] @ [size / 2, size / 2]
        assert np.allclose(matrix[row, :, :2].ravel(), np.array(theirs)[[0, 1, 3, 4]], atol=1e-4)
        assert np.allclose(ours, np.array(theirs)[[2, 5]], atol=2e-2)


NAMES = {
    "Identity": "identity", "ShearX": "shear-x", "ShearY": "shear-y", "TranslateX": "translate-x",
    "TranslateY": "translate-y", "Rotate": "rotate", "Brightness": "brightness", "Color": "saturation",
    "Contrast": "contrast", "Sharpness": "sharpness", "Posterize": "posterize", "Solarize": "solarize",
    "AutoContrast": "auto-contrast", "Equalize": "equalize", "Invert": "invert",
}  # fmt: skip


@pytest.mark.parametrize(("table", "space"), [
    ("torchvision", lambda: RandAugment()._augmentation_space(31, (40, 40))),
    ("trivial", lambda: TrivialAugmentWide()._augmentation_space(31)),
    ("auto", lambda: AutoAugment()._augmentation_space(10, (40, 40))),
])  # fmt: skip
def test_magnitudes_are_torchvisions(table: str, space: Callable[[], dict[str, tuple[torch.Tensor, bool]]]) -> None:
    theirs = space()
    ours = dict(TABLES[table])
    assert {NAMES[name] for name in theirs} == set(ours)
    for name, (magnitudes, signed) in theirs.items():
        bins = len(magnitudes) if magnitudes.ndim else 10
        level, expected = np.arange(bins) / (bins - 1), np.broadcast_to(magnitudes.double().numpy(), bins)
        for sign in (-1.0, 1.0):
            found = ours[NAMES[name]](level, np.full(bins, sign), 40)
            want = expected * sign if signed else expected
            if name in ("Brightness", "Color", "Contrast", "Sharpness"):
                want = 1 + want
            if name == "Posterize":
                want = 256 - 2.0 ** (8 - want)
            assert np.allclose(found, want, atol=1e-5), name


def test_magnitudes_are_timms() -> None:
    params = {"translate_pct": 0.45, "magnitude_max": None}
    theirs = {
        "rotate": timm_policies._rotate_level_to_arg, "posterize": timm_policies._posterize_increasing_level_to_arg,
        "solarize": timm_policies._solarize_increasing_level_to_arg,
        "solarize-add": timm_policies._solarize_add_level_to_arg,
        "brightness": timm_policies._enhance_increasing_level_to_arg, "shear-x": timm_policies._shear_level_to_arg,
        "translate-x": timm_policies._translate_rel_level_to_arg,
    }  # fmt: skip
    ours = dict(TABLES["timm"])
    for name, function in theirs.items():
        for level in (0.0, 2.5, 5.0, 9.0, 10.0):
            (want, *_) = function(level, params)
            want = 256 - 2.0 ** (8 - want) if name == "posterize" else want
            want = want * 40 if name == "translate-x" else want
            found = {float(ours[name](np.array([level / 10]), np.array([sign]), 40)[0]) for sign in (-1.0, 1.0)}
            assert any(abs(value - want) < 1e-9 for value in found), (name, level)
    listed = {name: name for name in ours}
    assert len(listed) == len(timm_policies._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_policies_are_the_published_ones(policy: Any) -> None:
    theirs = AutoAugment(AutoAugmentPolicy(policy)).policies
    assert [[(name, p, m) for name, p, m in pair] for pair in AUTO_AUGMENT[policy]] == [
        [(NAMES[name], p, m or 0) for name, p, m in pair] for pair in theirs
    ]
    program = drawn(ops.AutoAugment(policy=policy))
    expected = sum(pair[0][1] * (1 - sum(n == "identity" for n, _, _ in pair)) for pair in theirs) / 25
    assert (program.codes[:, 0] != 0).mean() == pytest.approx(expected, abs=0.02)


def test_rand_augment_draws_each_operation_equally_often() -> None:
    program = drawn(ops.RandAugment(count=2))
    moved = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
    for slot in range(2):
        counts = np.bincount(program.codes[:, slot], minlength=len(CODES))
        for code, number in enumerate(counts):
            names = [name for name, _ in TABLES["torchvision"]]
            share = sum(name == CODES[code] or (CODES[code] == "affine" and name in moved) for name in names) / 14
            assert number / COUNT == pytest.approx(share, abs=0.01), CODES[code]
    assert abs(np.corrcoef(program.codes.T)[0, 1]) < 0.03
    brightness = of(program, "brightness")[:, 0]
    assert np.allclose(np.unique(brightness), [1 - 0.27, 1 + 0.27], atol=1e-6)


def test_timms_magnitude_is_normal_and_clipped() -> None:
    program = drawn(ops.RandAugment(space="timm", count=1, magnitude=9, magnitude_std=0.5, p=1.0))
    level = np.abs(of(program, "brightness")[:, 0] - 1) / 0.09
    low = level[level < 10 - 1e-6]
    assert level.max() <= 10 + 1e-5
    assert (level >= 10 - 1e-5).mean() == pytest.approx(stats.norm.sf(2), abs=0.02)
    assert stats.kstest(low, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_weights_are_betas(alpha: float) -> None:
    mixing = ViewPlan(3, 32, "none", operations=(Mixup(alpha=alpha),)).mixing(1, np.arange(COUNT))
    assert mixing is not None
    assert stats.kstest(mixing.weight.astype(np.float64), stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    assert not mixing.box.any()


def test_a_cutmix_box_has_its_weights_area() -> None:
    mixing = ViewPlan(3, 32, "none", operations=(Mixup(alpha=0.5, p=0.3), CutMix(p=0.5))).mixing(1, np.arange(COUNT))
    assert mixing is not None
    box = mixing.box.astype(np.int64)
    boxed = box[:, 2:].all(axis=1)
    assert np.allclose(mixing.weight[boxed], 1 - box[boxed, 2] * box[boxed, 3] / 1024, atol=1e-6)
    assert (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= 32).all()
    assert (~boxed & (mixing.weight < 1)).mean() == pytest.approx(0.3, abs=0.02)
    assert boxed.mean() == pytest.approx(0.5, abs=0.03)  # a box without area mixes nothing
    centers = box[boxed, :2] + box[boxed, 2:] / 2
    assert np.abs(centers.mean(axis=0) - 15.5).max() < 0.4  # whole pixels, as the authors draw them


def test_partners_are_a_second_order() -> None:
    plan = ViewPlan(3, 32, "none", operations=(Mixup(),))
    ids = np.arange(0, 5000, 2)
    first, second = plan.order(2, ids), plan.partners(2, ids)
    assert sorted(second.tolist()) == ids.tolist()
    assert (first == second).sum() < 8
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08
    assert (plan.partners(3, ids) != second).mean() > 0.99


@settings(max_examples=40, deadline=None)
@given(
    place=st.integers(0, len(EVERYTHING) - 1), seed=st.integers(0, 2**64 - 1), view=st.integers(0, 2**40),
    size=st.integers(4, 512), chosen=st.lists(st.integers(0, 5000), min_size=1, max_size=30, unique=True),
)  # fmt: skip
def test_a_draw_is_the_samples_own(place: int, seed: int, view: int, size: int, chosen: list[int]) -> None:
    """The same whoever else is drawn and whatever follows in the list; codes are those announced; all is finite."""
    operation = EVERYTHING[place]
    plan = ViewPlan(seed, size, "none", operations=(operation,))
    program = plan.program(view, chosen)
    longer = ViewPlan(seed, size, "none", operations=(operation, ops.Grayscale(), Mixup())).program(
        view, [7, *chosen[::-1]][1:]
    )
    assert program is not None
    assert longer is not None
    slots = operation.slots
    assert program.codes.shape == (len(chosen), slots)
    assert program.parameters.shape == (len(chosen), slots, PARAMETERS)
    assert program.parameters.dtype == np.float32
    assert np.array_equal(longer.codes[::-1, :slots], program.codes)
    assert np.array_equal(longer.parameters[::-1, :slots], program.parameters)
    assert set(program.codes.ravel().tolist()) <= set(operation.emits)
    assert np.isfinite(program.parameters).all()
    assert all(
        describe(int(c), p) for c, p in zip(program.codes.ravel(), program.parameters.reshape(-1, 6), strict=True)
    )


def test_scale_jitter_is_torchvisions() -> None:
    """Zoom and window of a wide image, in source pixels, against what torchvision's two transforms do to it."""
    plan = plan_with([{"op": "scale-jitter", "scale": [0.5, 2.0]}, {"op": "flip"}], seed=4, size=64, flip=0)
    height, width = 120, 200
    box = plan.crops(0, np.arange(COUNT), np.tile([[height, width]], (COUNT, 1)))
    assert (box[:, 2] == box[:, 3]).all()
    assert uniform(width / box[:, 2] + np.random.default_rng(0).uniform(-2e-3, 2e-3, COUNT), 0.5, 2.0)
    tall = box[:, 2] > height
    assert (box[tall, 0] == 0).all(), "the image at the top of a larger window"
    jittered = np.random.default_rng(1).uniform(size=(COUNT, 2))  # a place of n + 1, spread over its own share
    assert uniform((box[~tall, 0] + jittered[~tall, 0]) / (height - box[~tall, 2] + 1), 0, 1)
    inside = box[:, 3] <= width
    assert uniform((box[inside, 1] + jittered[inside, 1]) / (width - box[inside, 3] + 1), 0, 1)
    image = torch.arange(height * width, dtype=torch.float32).reshape(1, height, width)
    jitter = v2.ScaleJitter((64, 64), (1.25, 1.25), antialias=False)
    shown = jitter(image)
    side = round(width / 1.25)
    assert max(shown.shape[1:]) == pytest.approx(64 * 1.25, abs=1), "torchvision: the longer side times the zoom"
    assert 64 / side == pytest.approx(max(shown.shape[1:]) / width, rel=0.02), "the same pixels per pixel"
    mirrored = plan.flips(0, np.arange(COUNT))
    assert mirrored.mean() == pytest.approx(0.5, abs=0.02)


def test_moves_are_described_by_their_names() -> None:
    for name, value, said in (
        ("translate-x", 7.0, "shifted 0,7"), ("translate-y", -3.0, "shifted -3,0"),
        ("shear-x", 0.25, "sheared +0.25 along x"), ("shear-y", -0.1, "sheared -0.10 along y"),
        ("rotate", 20.0, "turned -20 deg"),
    ):  # fmt: skip
        assert describe(CODE_OF["affine"], ops._moved(name, np.array([value]), 32)[0].astype(np.float32)) == said


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("augment", "said"), [
    ("rand-aug", "data.augment: expected one of none, pad-crop-flip"),
    ([{"op": "jitter"}], "data.augment.0.op: expected one of pad-crop"),
    ([{}], "found nothing"),
    ([{"op": "color-jitter", "brightnes": 0.1}], "data.augment.0.brightnes: unknown option of color-jitter"),
    ([{"op": "color-jitter"}], "at least one of brightness"),
    ([{"op": "flip"}, {"op": "mixup", "alpha": 3}], "data.augment.1.alpha: input should be less than"),
    ([{"op": "gaussian-blur", "kernel": 4}], "expected an odd number of pixels, found 4"),
    ([{"op": "random-erasing", "scale": [0.5, 0.1]}], "scale: expected 0 < from <= to"),
    ([{"op": "affine", "translate": [2, 0]}], "translate: expected two shares"),
    ([{"op": "rand-augment", "magnitude": 31}], "magnitude: expected 0 to 30"),
    ([{"op": "grayscale"}, {"op": "flip"}], "at most one crop, then at most one flip, first; found 'flip'"),
    ([{"op": "mixup"}, {"op": "grayscale"}], "mixup and cutmix last"),
    ([{"op": "mixup"}, {"op": "cutmix"}], "at most 1 together"),
    ([{"op": "scale-jitter", "scale": [0.01, 2]}], "view plan, scale: expected a zoom from 1/16 to 16"),
    ([{"op": "rand-augment", "count": 8}] * 3, "at most 16 steps"),
    ([{"op": "color-jitter", "hue": float("nan")}], "data.augment.0.hue"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(augment: Any, said: str) -> None:
    with pytest.raises(RequestError, match=r"^(data\.augment|view plan)") as caught:
        plan_with(augment, seed=0, size=32, flip=0.5)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_presets_and_lists_agree() -> None:
    for name, preset in PRESETS.items():
        tables = [table.model_dump() for table in preset.tables]
        assert plan_with(name, seed=1, size=32, flip=0.1) == plan_with(tables, seed=1, size=32, flip=0.9), name
        assert preset.note
    assert plan_with("cifar-standard", seed=1, size=32, flip=0) == ViewPlan(1, 32, "pad-crop-flip", flip=0.5, pad=4)
    assert set(OPERATIONS) >= {"pad-crop", "flip", "mixup", "auto-augment"}
