"""Plans: pure functions of (seed, view, sample), with the distributions they promise."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from feedfast.data.passes import PASS_GRANULE, PASS_WINDOW, pass_order
from feedfast.data.views import ALGORITHM, ViewPlan
from feedfast.errors import RequestError

MASK = 2**64 - 1
ORDER, CROP, FLIP = 0, 1, 2
CROP_WORDS = 24

PINNED = {
    "order": [2, 5, 7, 3, 0, 6, 4, 1],
    "crops": [[10, 5, 359, 470], [110, 75, 263, 208], [25, 145, 288, 263]],
    "flips": [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0],
    "pass": [33, 70, 140, 178, 194, 25],
}

seeds = st.integers(0, MASK)
views = st.integers(0, 2**40)
id_sets = st.lists(st.integers(0, 2_000_000), min_size=1, max_size=60, unique=True)
augments = st.sampled_from(["pad-crop-flip", "resized-crop-flip", "none"])


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 from its paper, in Python integers: the second implementation."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 64) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def word(seed: int, view: int, purpose: int, index: int, pass_index: int = 0) -> int:
    # NumPy counts before it encrypts, so its first four words are those of counter 1
    return philox([index // 4 + 1, 0, purpose, pass_index], [seed, view])[index % 4]


def unit(value: int) -> float:
    return (value >> 11) * 2.0**-53


def sizes_of(ids: list[int]) -> np.ndarray:
    return np.array([[20 + i % 500, 20 + (i * 7) % 300] for i in ids], dtype=np.int32)


@settings(deadline=None)
@given(seed=seeds, view=views, sample=st.integers(0, 2**32 - 1))
def test_words_are_philox(seed: int, view: int, sample: int) -> None:
    plan = ViewPlan(seed, 32, "pad-crop-flip", pad=4)
    dy, dx = (math.floor(unit(word(seed, view, CROP, 2 * sample + k)) * 9) - 4 for k in (0, 1))
    assert plan.crops(view, [sample], [[32, 32]]).tolist() == [[dy, dx, 32, 32]]
    assert plan.flips(view, [sample])[0] == (unit(word(seed, view, FLIP, sample)) < 0.5)
    other = (sample + 1) % 2**32
    first = sample if word(seed, view, ORDER, sample) < word(seed, view, ORDER, other) else other
    assert plan.order(view, [other, sample])[0] == first


@settings(deadline=None)
@given(seed=seeds, view=views, sample=st.integers(0, 2**32 - 1), h=st.integers(1, 900), w=st.integers(1, 900))
def test_resized_crop_is_torchvisions_algorithm(seed: int, view: int, sample: int, h: int, w: int) -> None:
    """torchvision's loop, one sample at a time, on the same uniform numbers."""
    u = [unit(word(seed, view, CROP, CROP_WORDS * sample + k)) for k in range(CROP_WORDS)]
    for attempt in range(10):
        area = h * w * (0.08 + 0.92 * u[2 * attempt])
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * u[2 * attempt + 1])
        cw, ch = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            expected = [math.floor(u[20] * (h - ch + 1)), math.floor(u[21] * (w - cw + 1)), ch, cw]
            break
    else:
        ch, cw = h, w
        if w / h < 3 / 4:
            ch = round(w / (3 / 4))
        elif w / h > 4 / 3:
            cw = round(h * (4 / 3))
        expected = [(h - ch) // 2, (w - cw) // 2, ch, cw]
    plan = ViewPlan(seed, 224, "resized-crop-flip")
    assert plan.crops(view, [sample], [[h, w]]).tolist() == [expected]


@settings(deadline=None)
@given(seed=seeds, view=views, ids=id_sets, augment=augments, data=st.data())
def test_unchanged_by_company(seed: int, view: int, ids: list[int], augment: str, data: st.DataObject) -> None:
    """Subset, order of asking and batch size change nothing."""
    plan = ViewPlan(seed, 48, augment)
    sizes = sizes_of(ids)
    crops, flips, order = plan.crops(view, ids, sizes), plan.flips(view, ids), plan.order(view, ids).tolist()
    assert sorted(order) == sorted(ids)

    some = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(1, len(ids)))]
    asked = [ids[i] for i in some]
    np.testing.assert_array_equal(plan.crops(view, asked, sizes[some]), crops[some])
    np.testing.assert_array_equal(plan.flips(view, asked), flips[some])
    assert plan.order(view, asked).tolist() == [i for i in order if i in set(asked)]

    batch = data.draw(st.integers(1, len(ids)))
    cut = [slice(a, a + batch) for a in range(0, len(ids), batch)]
    np.testing.assert_array_equal(np.concatenate([plan.crops(view, ids[c], sizes[c]) for c in cut]), crops)
    np.testing.assert_array_equal(np.concatenate([plan.flips(view, ids[c]) for c in cut]), flips)


def test_unchanged_across_drawing_limits() -> None:
    """More samples than are drawn at once, dense and sparse: the same as one at a time."""
    plan = ViewPlan(5, 32, "pad-crop-flip")
    ids = np.concatenate([np.arange(70_000), np.arange(10**6, 10**9, 3_333_333)])
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(ids)
    sizes = np.full((len(ids), 2), 32)
    crops, flips = plan.crops(1, shuffled, sizes), plan.flips(1, shuffled)
    for at in [*rng.integers(0, len(ids), 50), int(np.argmax(shuffled))]:
        np.testing.assert_array_equal(plan.crops(1, [shuffled[at]], [[32, 32]])[0], crops[at])
        assert plan.flips(1, [shuffled[at]])[0] == flips[at]


def test_views_and_seeds_differ() -> None:
    ids = np.arange(2000)
    sizes = np.full((2000, 2), 32)
    base = ViewPlan(0, 32, "pad-crop-flip")
    for plan, view in ((base, 1), (ViewPlan(1, 32, "pad-crop-flip"), 0), (ViewPlan(2**63, 32, "pad-crop-flip"), 0)):
        assert np.mean(plan.order(view, ids) == base.order(0, ids)) < 0.01
        assert np.mean(plan.flips(view, ids) == base.flips(0, ids)) == pytest.approx(0.5, abs=0.06)
        assert np.mean(np.all(plan.crops(view, ids, sizes) == base.crops(0, ids, sizes), axis=1)) < 0.04


def test_pinned_numbers() -> None:
    """Caches on disk hold these numbers: a change here needs a new ALGORITHM."""
    assert ALGORITHM == "philox4x64-10/1"
    plan = ViewPlan(7, 224, "resized-crop-flip")
    assert plan.order(3, range(8)).tolist() == PINNED["order"]
    assert plan.crops(3, range(3), [[375, 500]] * 3).tolist() == PINNED["crops"]
    assert plan.flips(3, range(12)).tolist() == PINNED["flips"]
    assert pass_order(200, 7, 3, 1)[:6].tolist() == PINNED["pass"]


def test_pad_crop_is_uniform() -> None:
    n = 40_000
    ids = np.arange(n)
    plan = ViewPlan(11, 32, "pad-crop-flip")
    assert plan.pad == 4
    crops = plan.crops(0, ids, np.full((n, 2), 32))
    assert (crops[:, 2:] == 32).all()
    cell = (crops[:, 0] + 4) * 9 + crops[:, 1] + 4
    counts = np.bincount(cell, minlength=81)
    assert len(counts) == 81
    assert stats.chisquare(counts).pvalue > 1e-3
    flips = plan.flips(0, ids)
    assert stats.binomtest(int(flips.sum()), n).pvalue > 1e-3
    table = np.stack([np.bincount(cell[flips == f], minlength=81) for f in (0, 1)])
    assert stats.chi2_contingency(table).pvalue > 1e-3  # crop and flip are independent


def test_order_is_a_fair_shuffle() -> None:
    plan = ViewPlan(4, 32, "none")
    orders = np.array([plan.order(view, range(5)) for view in range(3000)])
    which = np.unique(orders @ 10 ** np.arange(5), return_counts=True)[1]
    assert len(which) == 120
    assert stats.chisquare(which).pvalue > 1e-3
    big = plan.order(0, range(50_000)).astype(np.int64)
    assert abs(stats.spearmanr(big, np.arange(50_000)).statistic) < 0.015
    assert abs(stats.spearmanr(big[:-1], big[1:]).statistic) < 0.015


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (224, 224), (32, 32), (64, 1000), (1000, 50), (90, 60)])
def test_resized_crop_distribution(size: tuple[int, int]) -> None:
    n = 3000
    h, w = size
    ours = ViewPlan(2, 224, "resized-crop-flip").crops(0, np.arange(n), np.tile([[h, w]], (n, 1)))
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(3, h, w)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [h, w]).all()
    for what in (
        lambda b: b[:, 2] * b[:, 3] / (h * w),
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: b[:, 0] / np.maximum(h - b[:, 2], 1),
    ):
        assert stats.ks_2samp(what(ours), what(theirs), method="asymp").pvalue > 1e-3


def test_flip_probability() -> None:
    ids = np.arange(20_000)
    for p in (0.0, 0.1, 1.0):
        flips = ViewPlan(3, 32, "pad-crop-flip", flip=p).flips(0, ids)
        assert stats.binomtest(int(flips.sum()), len(ids), p).pvalue > 1e-3
    assert not ViewPlan(3, 32, "none").flips(0, ids).any()


def test_pad_crop_of_other_sizes() -> None:
    """The window is the central square on the shorter side, its shift scaled with it."""
    plan = ViewPlan(0, 32, "pad-crop-flip")
    ids = np.arange(500)
    same = plan.crops(0, ids, np.full((500, 2), 32))
    double = plan.crops(0, ids, np.full((500, 2), 64))
    np.testing.assert_array_equal(double[:, :2], 2 * same[:, :2])
    assert (double[:, 2:] == 64).all()
    wide = plan.crops(0, ids, np.tile([[64, 100]], (500, 1)))
    np.testing.assert_array_equal(wide - double, np.tile([[0, 18, 0, 0]], (500, 1)))


SAME_AS_EVER = {  # (rows, seed, view, pass): sha256 of the order, taken before granule and window could be chosen
    (8192, 0, 0, 1): "699faf9446d62174",
    (8192, 7, 3, 2): "ca64ca3094e88269",
    (65536, 1, 0, 3): "3c4d9598b6288afc",
    (1000, 5, 1, 1): "65c96d22a37005bd",  # a short granule, but one window
    (200, 7, 3, 1): "4d8fddb5748d7bca",
    (5000, 0, 0, 0): "a3d44437f284b46e",
}


@pytest.mark.parametrize(("given_order", "digest"), SAME_AS_EVER.items())
def test_pass_orders_of_the_default_sizes_stay(given_order: tuple[int, int, int, int], digest: str) -> None:
    order = pass_order(*given_order)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == digest


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(0, 5000),
    seed=seeds,
    view=views,
    pass_index=st.integers(0, 9),
    granule=st.one_of(st.just(PASS_GRANULE), st.sampled_from([1, 2, 4, 8, 16, 32])),
    window=st.one_of(st.just(PASS_WINDOW), st.integers(1, 70)),
)
def test_pass_order_is_a_permutation_in_windows(
    n: int, seed: int, view: int, pass_index: int, granule: int, window: int
) -> None:
    rows = pass_order(n, seed, view, pass_index, granule, window)
    np.testing.assert_array_equal(np.sort(rows), np.arange(n))
    if pass_index == 0:
        np.testing.assert_array_equal(rows, np.arange(n))
    # Every `window` granules that come up are all complete before the next one comes up, short ones included.
    place = np.empty(n, dtype=np.int64)
    place[rows] = np.arange(n)
    edges = np.arange(0, n, granule)
    first, last = (np.sort(how.reduceat(place, edges) if n else place) for how in (np.minimum, np.maximum))
    assert (last[window - 1 : -1 : window] < first[window::window]).all()


def test_small_granules_mix_beyond_their_window() -> None:
    """Rows of one granule stay within a window of each other, others meet anyone: what the docstring promises."""
    granule, window, batch = 4, 29, 256
    rows = pass_order(8192, 3, 0, 1, granule, window)
    place = np.empty(len(rows), dtype=np.int64)
    place[rows] = np.arange(len(rows))
    spread = np.ptp(place.reshape(-1, granule), axis=1)
    assert spread.max() < granule * window
    batches = rows.reshape(-1, batch) // granule
    assert min(len(np.unique(b)) for b in batches) >= batch // granule  # as many places of the view as granules fit
    far = [np.ptp(b) * granule for b in batches]
    assert min(far) > len(rows) // 2  # from all over the view, although only 116 rows are mixed at a time
    together = np.mean(place.reshape(-1, granule)[:, 0] // batch == place.reshape(-1, granule)[:, 1] // batch)
    assert together > 0.5  # and neighbors do often share a batch: that is the price


def test_passes_differ_and_mix() -> None:
    first, second = pass_order(8192, 0, 0, 1), pass_order(8192, 0, 0, 2)
    assert np.mean(first == second) < 0.01
    assert np.mean(np.abs(np.diff(first)) == 1) < 0.01  # neighbours on disk are not neighbours in a batch
    np.testing.assert_array_equal(first, pass_order(8192, 0, 0, 1))
    batches = first.reshape(-1, 128) // PASS_GRANULE
    assert min(len(np.unique(batch)) for batch in batches) >= 12  # each batch draws on most of its window


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("size", 0),
        ("augment", "crop"),
        ("flip", 1.5),
        ("pad", 33),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("granule", 48),
        ("granule", 128),
        ("window", 0),
    ],
)
def test_refuses(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{field}: expected"):
        ViewPlan(**{"seed": 0, "size": 32, "augment": "none", field: value})  # type: ignore[arg-type]


def test_plan_as_data() -> None:
    plan = ViewPlan(1, 32, "pad-crop-flip", scale=[0.2, 1], ratio=[1, 1])  # type: ignore[arg-type]
    assert plan == ViewPlan(1, 32, "pad-crop-flip", scale=(0.2, 1.0), ratio=(1.0, 1.0), pad=4)
    assert (plan.granule, plan.window) == (PASS_GRANULE, PASS_WINDOW) == (64, 16)
    for given_plan in (plan, ViewPlan(1, 32, "none", granule=8, window=44)):
        as_data = given_plan.to_dict()
        assert as_data.pop("algorithm") == ALGORITHM
        assert ViewPlan(**as_data) == given_plan


@pytest.mark.parametrize("sizes", [(0, 16), (64, 0)])
def test_pass_order_refuses_empty_granules_and_windows(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="granule >= 1 and window >= 1"):
        pass_order(10, 0, 0, 1, *sizes)


def test_bad_ids() -> None:
    plan = ViewPlan(1, 32, "pad-crop-flip")
    with pytest.raises(ValueError, match="integers"):
        plan.flips(0, [0.5])
    with pytest.raises(ValueError, match="non-negative"):
        plan.flips(0, [-1])
    with pytest.raises(ValueError, match="per id, 2; got 1"):
        plan.crops(0, [1, 2], [[3, 3]])
    assert plan.order(0, np.array([], dtype=np.uint32)).shape == (0,)
    assert plan.crops(0, [], np.zeros((0, 2))).shape == (0, 4)
