"""Global and local windows: each kind its number of times per round of views, mixed in every batch, replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from feedfast.data.augment import crop_of, plan_with
from feedfast.data.crops import MultiCrop, Windows
from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.data.work import view_work

COUNT, SIDES = 40, (26, 34)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    ids=st.lists(st.integers(0, 2_000_000), min_size=1, max_size=20, unique=True),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_every_sample_has_each_kind_its_number_of_times(
    seed: int, first: int, ids: list[int], counts: list[int]
) -> None:
    """Kinds told apart by their areas, over any round of consecutive views."""
    kinds = tuple(
        Windows(scale=(0.1 + 0.2 * place, 0.15 + 0.2 * place), ratio=(1, 1), count=count)
        for place, count in enumerate(counts)
    )
    plan = ViewPlan(seed, 32, "multi-crop-flip", crop=MultiCrop(windows=kinds))
    sizes = np.full((len(ids), 2), 1000)
    areas = np.stack([plan.crops(first + view, ids, sizes)[:, 2:].prod(axis=1) / 1e6 for view in range(sum(counts))])
    for place, count in enumerate(counts):
        own = (areas > 0.08 + 0.2 * place) & (areas < 0.17 + 0.2 * place)
        assert (own.sum(axis=0) == count).all()


def test_every_batch_holds_all_kinds() -> None:
    """Samples begin anywhere in the round, so a view shows each kind in its share; windows are as torchvision's."""
    plan = plan_with([{"op": "multi-crop"}, {"op": "flip"}], seed=3, size=96, flip=0)
    count, size = 8000, (375, 500)
    sizes = np.tile(size, (count, 1))
    alone = ViewPlan(3, 96, "resized-crop-flip", scale=(0.05, 0.4)).crops(5, np.arange(count), sizes)
    ours = plan.crops(5, np.arange(count), sizes)
    local = (ours == alone).all(axis=1)  # the same words: a local window is what resized-crop of its range would show
    assert stats.binomtest(int(local.sum()), count, 6 / 8).pvalue > 1e-3
    wide = ViewPlan(3, 96, "resized-crop-flip", scale=(0.4, 1.0)).crops(5, np.arange(count), sizes)
    np.testing.assert_array_equal(ours[~local], wide[~local])
    assert plan.to_dict()["crop"]["windows"][1] == {"scale": [0.05, 0.4], "ratio": [0.75, 4 / 3], "count": 6}
    assert crop_of(plan.to_dict()["crop"]) == plan.crop


def test_a_batch_mixes_windows_and_replays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, *SIDES, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.zeros(COUNT, int))
    data = open_dataset(tmp_path / "x.npz")
    plan = plan_with([{"op": "multi-crop"}], seed=3, size=24, flip=0)
    whole = [torch.cat([b.images for b in Loader(data, plan, batch_size=batch, threads=1).stream(2, np.arange(COUNT))])
             for batch in (40, 7)]  # fmt: skip
    assert torch.equal(*whole)
    again = Loader(data, plan, batch_size=9, threads=1).stream(2, np.array([7, 3]))
    assert torch.equal(next(iter(again)).images, whole[0][[7, 3]])
    areas = view_work(plan, data, 2).geometry.box[:, 2:].prod(axis=1) / (SIDES[0] * SIDES[1])
    assert (areas > 0.45).any()
    assert (areas < 0.35).any()
