"""Windows of detection and segmentation: their draws against torchvision's.

Distributions are compared by two-sample Kolmogorov-Smirnov tests with torchvision's own draws on the same boxes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from feedfast.data.augment import crop_of, plan_with
from feedfast.data.crops import ExpandCrop, MultiCrop
from feedfast.data.geometry import view_geometry
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

seeds = st.integers(0, 2**64 - 1)
views = st.integers(0, 2**40)
id_sets = st.lists(st.integers(0, 2_000_000), min_size=1, max_size=20, unique=True)
SCALE = [{"op": "scale-crop"}, {"op": "flip"}]
EXPAND = [{"op": "expand-crop"}, {"op": "flip"}]


def some_boxes(sample: int, height: int, width: int) -> NDArray[np.float32]:
    """None to four boxes that are the sample's own."""
    rng = np.random.default_rng(sample)
    ends = np.sort(rng.uniform(0, 1, (int(rng.integers(0, 5)), 2, 2)), axis=1)
    return (ends * [width, height]).reshape(-1, 4).astype(np.float32)


def same(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(stats.ks_2samp(ours, theirs, method="asymp").pvalue)


# ------------------------------------------------------------------------------------------------- what is drawn


@settings(deadline=None, max_examples=25)
@given(seed=seeds, view=views, ids=id_sets, size=st.integers(4, 600), data=st.data())
def test_a_window_is_the_samples_own(seed: int, view: int, ids: list[int], size: int, data: st.DataObject) -> None:
    """The same whoever else is asked for and in whatever order; it holds a part of the image, and a box's center."""
    sizes = np.array([[20 + i % 300, 20 + (i * 7) % 300] for i in ids])
    boxes = [some_boxes(i, *extent) for i, extent in zip(ids, sizes.tolist(), strict=True)]
    crop = data.draw(st.sampled_from([
        ExpandCrop(), ExpandCrop(expand_p=1, min_iou=(0.5, 1.0)), ExpandCrop(min_iou=(0.9,), attempts=3, expand=1),
        MultiCrop(), None,
    ]))  # fmt: skip
    word = {ExpandCrop: "expand-crop-flip", MultiCrop: "multi-crop-flip"}.get(type(crop), "scale-crop-flip")
    plan = ViewPlan(seed, size, word, scale=(0.5, 1.0), crop=crop)  # type: ignore[arg-type]
    windows = plan.crops(view, ids, sizes, boxes)
    some = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(1, len(ids)))]
    alone = plan.crops(view, [ids[i] for i in some], sizes[some], [boxes[i] for i in some])
    np.testing.assert_array_equal(alone, windows[some])
    np.testing.assert_array_equal(plan.resolved(view, ids, sizes, boxes)["window"], windows)
    assert (windows[:, 2:] > 0).all()
    assert (windows[:, :2] < sizes).all()
    assert (windows[:, :2] + windows[:, 2:] > 0).all()
    if isinstance(crop, ExpandCrop):
        for (top, left, height, width), own in zip(windows.tolist(), boxes, strict=True):
            center = (own[:, :2] + own[:, 2:]) / 2 - [left, top]
            assert not len(own) or ((center > 0) & (center < [width, height])).all(axis=1).any()
    geometry = view_geometry(plan, view, np.array(ids, np.uint32), sizes.astype(np.int32), boxes)
    assert (geometry.resized > 0).all()
    assert ((geometry.window < geometry.resized) & (geometry.window + size > 0)).all(), "some of the image is seen"
    assert not geometry.padded
    # what is shown of the image lies where the window says, to the half pixel, but is never less than a pixel
    low, extent = np.maximum(windows[:, :2], 0), windows[:, 2:]
    ends = np.minimum(windows[:, :2] + extent, sizes)
    np.testing.assert_array_equal(geometry.box, np.concatenate([low, ends - low], axis=1))
    for edge, found in ((low, -geometry.window), (ends, geometry.resized - geometry.window)):
        exact = (edge - windows[:, :2]) * size / extent
        off = np.abs(exact - found)
        assert (off <= np.where(geometry.resized == 1, 1, 0.5) + 1e-9).all()


def torchvisions_windows(
    size: tuple[int, int], boxes: NDArray[np.float32], count: int, p: float = 0.5, options: list[float] | None = None
) -> NDArray[np.float64]:
    """RandomZoomOut, then RandomIoUCrop, in source pixels: [count, 4]."""
    torch.manual_seed(0)
    zoom, crop, out = v2.RandomZoomOut(p=p), v2.RandomIoUCrop(sampler_options=options), []
    for _ in range(count):
        height, width = size
        pad = zoom.make_params([torch.empty(3, height, width)])["padding"] if torch.rand(1) < zoom.p else [0] * 4
        canvas = (height + pad[1] + pad[3], width + pad[0] + pad[2])
        image = torch.empty(3, 1, 1).expand(3, *canvas)
        moved = torch.from_numpy(boxes) + torch.tensor([pad[0], pad[1]] * 2)
        own = tv_tensors.BoundingBoxes(moved, format="XYXY", canvas_size=canvas)  # type: ignore[call-arg]
        found = crop.make_params([image, own]) or {"top": 0, "left": 0, "height": canvas[0], "width": canvas[1]}
        out.append([found["top"] - pad[1], found["left"] - pad[0], found["height"], found["width"]])
    return np.array(out, dtype=np.float64)


def assert_same(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    """Areas, ratios and edges."""
    for what in (
        lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2], lambda b: b[:, 1] + b[:, 3],
    ):  # fmt: skip
        assert same(what(ours), what(theirs)) > 1e-3


def test_parts_are_torchvisions() -> None:
    """Without canvas and with an overlap that is easily found: the parts that are tried."""
    size, xyxy, count = (300, 400), np.array([[150, 100, 250, 200]], dtype=np.float32), 2500
    theirs = torchvisions_windows(size, xyxy, count, p=0.0, options=[0.0])
    plan = ViewPlan(3, 300, "expand-crop-flip", crop=ExpandCrop(expand_p=0, min_iou=(0.0,)))
    ours = plan.crops(1, np.arange(2 * count), np.tile(size, (2 * count, 1)), [xyxy] * (2 * count)).astype(np.float64)
    assert_same(ours, theirs)
    for pick in (np.min, np.max):  # the ranges' ends, which Kolmogorov and Smirnov hardly look at
        np.testing.assert_allclose(pick(ours[:, 2:], axis=0), pick(theirs[:, 2:], axis=0), atol=4)


@pytest.mark.parametrize(("size", "boxes"), [
    pytest.param((300, 400), [[30, 40, 130, 240], [200, 20, 390, 290], [350, 250, 380, 280]], marks=pytest.mark.slow),
    ((90, 50), [[5, 5, 32, 74]]),
])  # fmt: skip
def test_expand_crop_has_torchvisions_windows(size: tuple[int, int], boxes: list[list[float]]) -> None:
    xyxy, count = np.array(boxes, dtype=np.float32), 400
    theirs = torchvisions_windows(size, xyxy, count)
    plan = plan_with(EXPAND, seed=3, size=300, flip=0)
    ours = plan.crops(1, np.arange(4 * count), np.tile(size, (4 * count, 1)), [xyxy] * (4 * count)).astype(np.float64)
    assert_same(ours, theirs)
    whole = [(w == [0, 0, *size]).all(axis=1).mean() for w in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=0.04)


def test_without_boxes_the_canvas_is_torchvisions() -> None:
    size, count = (120, 200), 4000
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    pads = np.array([v2.RandomZoomOut().make_params([image])["padding"] for _ in range(count)])  # left, top, right, ...
    none = [np.zeros((0, 4), np.float32)] * count
    plan = ViewPlan(1, 300, "expand-crop-flip", crop=ExpandCrop(expand_p=1))
    ours = plan.crops(0, np.arange(count), np.tile(size, (count, 1)), none)
    assert same(ours[:, 2], size[0] + pads[:, 1] + pads[:, 3]) > 1e-3
    assert same(-ours[:, 0], pads[:, 1]) > 1e-3
    assert same(-ours[:, 1], pads[:, 0]) > 1e-3
    often = ViewPlan(1, 300, "expand-crop-flip", crop=ExpandCrop(expand_p=0.3)).crops(
        0, np.arange(count), ours[:, 2:], none
    )
    assert stats.binomtest(int((often[:, 2:] > ours[:, 2:]).any(axis=1).sum()), count, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("least", [0.0, 0.3, 0.9])
def test_a_part_overlaps_a_box_as_much_as_was_drawn(least: float) -> None:
    """Every window, by torchvision's IoU: some box whose center it holds overlaps it so; ratios are in range."""
    xyxy = np.array([[30, 40, 190, 240], [100, 10, 350, 290]], dtype=np.float32)
    crop = ExpandCrop(expand_p=0, min_iou=(least,))
    windows = ViewPlan(2, 300, "expand-crop-flip", crop=crop).crops(
        0, np.arange(500), np.tile([300, 400], (500, 1)), [xyxy] * 500
    )
    ends = torch.from_numpy(np.concatenate([windows[:, 1::-1], (windows[:, :2] + windows[:, 2:])[:, ::-1]], axis=1))
    iou = box_iou(torch.from_numpy(xyxy), ends.float())  # [box, window]
    center = torch.from_numpy((xyxy[:, :2] + xyxy[:, 2:]) / 2)[:, None]
    iou[~((ends[:, :2] < center) & (center < ends[:, 2:])).all(dim=2)] = -1
    tried = torch.from_numpy(windows != [0, 0, 300, 400]).any(dim=1)  # after 64 rounds without success: the whole image
    assert tried.float().mean() > 0.95
    assert (iou.max(dim=0).values[tried] >= least - 1e-6).all()
    ratio = windows[:, 3] / windows[:, 2]
    assert ((ratio >= 0.5) & (ratio <= 2)).all()


@pytest.mark.parametrize("size", [(300, 500), (700, 300)])
def test_scale_crop_is_the_authors(size: tuple[int, int]) -> None:
    """Against pytorch-deeplab-xception's RandomScaleCrop in integers: short side U{s/2..2s}, a uniform window."""
    rng, side, count = np.random.default_rng(0), 128, 6000
    plan = plan_with(SCALE, seed=5, size=side, flip=0)
    ours = plan.crops(2, np.arange(count), np.tile(size, (count, 1)))
    assert (ours[:, 2] == ours[:, 3]).all()
    short = rng.integers(side // 2, 2 * side + 1, count)
    scale = short / min(size)
    extent = np.floor(np.outer(scale, size))
    corner = np.floor(rng.uniform(size=(count, 2)) * (np.maximum(extent, side) - side + 1))
    assert same(side / ours[:, 2] + rng.uniform(-1e-3, 1e-3, count), scale + rng.uniform(-1e-3, 1e-3, count)) > 1e-3
    for axis in (0, 1):  # as shares of the image
        smear = rng.uniform(0, 1, (2, count)) / size[axis]
        assert same(ours[:, axis] / size[axis] + smear[0], corner[:, axis] / scale / size[axis] + smear[1]) > 1e-3
    beyond = (ours[:, :2] + ours[:, 2:] > size).mean(axis=0)
    np.testing.assert_allclose(beyond, (extent < side).mean(axis=0), atol=0.03)


def test_words_and_their_options() -> None:
    assert plan_with("scale-crop-flip", seed=1, size=64, flip=0.5) == plan_with(SCALE, seed=1, size=64, flip=0)
    assert plan_with("expand-crop-flip", seed=1, size=64, flip=0.5) == plan_with(EXPAND, seed=1, size=64, flip=0)
    plan = plan_with(
        [{"op": "expand-crop", "expand": 2, "keep": "visible", "fill": [1, 2, 3]}], seed=1, size=64, flip=0
    )
    assert (plan.needs_boxes, plan.keep, plan.fill) == (True, "visible", (1, 2, 3))
    assert not plan_with(SCALE, seed=1, size=64, flip=0).needs_boxes
    assert crop_of(plan.to_dict()["crop"]) == plan.crop
    with pytest.raises(RequestError, match="crop: expected ExpandCrop, its options, found MultiCrop"):
        ViewPlan(1, 64, "expand-crop-flip", crop=MultiCrop())
    with pytest.raises(ValueError, match="boxes: expected those of each of 2 samples, got none"):
        plan.crops(0, [1, 2], [[3, 3]] * 2)


@pytest.mark.parametrize(("table", "said"), [
    ({"op": "expand-crop", "expand": 0.5}, "data.augment.0.expand"),
    ({"op": "expand-crop", "min_iou": [-0.1]}, "min_iou: expected 0 or more each"),
    ({"op": "expand-crop", "min_iou": []}, "data.augment.0.min_iou"),
    ({"op": "expand-crop", "scale": [0.5, 2]}, "scale: expected 0 < from <= to <= 1"),
    ({"op": "expand-crop", "ratio": [2, 1]}, "ratio: expected 0 < from <= to"),
    ({"op": "expand-crop", "keep": "some"}, "data.augment.0.keep"),
    ({"op": "scale-crop", "scale": [0.01, 2]}, "view plan, scale: expected a zoom from 1/16 to 16"),
    ({"op": "multi-crop", "windows": []}, "data.augment.0.windows"),
    ({"op": "multi-crop", "windows": [{"scale": [0, 1]}]}, "scale: expected 0 < from <= to <= 1"),
    ({"op": "multi-crop", "windows": [{"counts": 2}]}, "data.augment.0.windows.0.counts"),
    ({"op": "photometric-distort", "contrast": [2, 1]}, "contrast: expected 0 <= from <= to"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(table: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=r"^(data\.augment|view plan)") as caught:
        plan_with([table], seed=0, size=32, flip=0.5)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
