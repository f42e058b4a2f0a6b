"""Windows of detection and segmentation: their draws against torchvision's, and what they show.

Distributions are compared by two-sample Kolmogorov-Smirnov tests with torchvision's own draws on the same boxes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
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
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from feedfast.data.annotations import IGNORE, Boxes, Masks
from feedfast.data.augment import crop_of, plan_with
from feedfast.data.batch import Batch
from feedfast.data.crops import ExpandCrop, MultiCrop
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.geometry import evaluation_geometry, view_geometry
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.data.work import boxes_of, view_work
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
    np.testing.assert_array_equal(plan.resolved("window", view, ids, sizes, boxes), windows)
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
    assert not geometry.padded or word == "multi-crop-flip"


def torchvisions_windows(size: tuple[int, int], boxes: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """RandomZoomOut, then RandomIoUCrop, in source pixels: [count, 4]."""
    torch.manual_seed(0)
    zoom, crop, out = v2.RandomZoomOut(), v2.RandomIoUCrop(), []
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


@pytest.mark.parametrize(("size", "boxes"), [
    pytest.param((300, 400), [[30, 40, 130, 240], [200, 20, 390, 290], [350, 250, 380, 280]], marks=pytest.mark.slow),
    ((90, 50), [[5, 5, 32, 74]]),
])  # fmt: skip
def test_expand_crop_has_torchvisions_windows(size: tuple[int, int], boxes: list[list[float]]) -> None:
    xyxy, count = np.array(boxes, dtype=np.float32), 400
    theirs = torchvisions_windows(size, xyxy, count)
    plan = plan_with(EXPAND, seed=3, size=300, flip=0)
    ours = plan.crops(1, np.arange(4 * count), np.tile(size, (4 * count, 1)), [xyxy] * (4 * count)).astype(np.float64)
    for what in (
        lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2], lambda b: b[:, 1] + b[:, 3],
    ):  # fmt: skip
        assert same(what(ours), what(theirs)) > 1e-3
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


# ------------------------------------------------------------------------------------------------- what is shown

SIDES = (26, 34)
COUNT = 40


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.uint8]]:
    """Images whose pixels are class numbers, in patches of 6 pixels."""
    patches = np.random.default_rng(0).integers(1, 200, (COUNT, 6, 6), dtype=np.uint8)
    masks = np.repeat(np.repeat(patches, 6, axis=1), 6, axis=2)[:, : SIDES[0], : SIDES[1]]
    path = tmp_path_factory.mktemp("drawn") / "masks.npz"
    np.savez(path, images=masks, labels=np.zeros(COUNT, int))
    return path, masks


def boxed(data: Dataset) -> Dataset:
    own = [some_boxes(number, *SIDES) for number in range(len(data))]
    starts = np.cumsum([0, *map(len, own)])
    xyxy = np.concatenate(own)
    rng = np.random.default_rng(1)
    marks = Boxes(xyxy, rng.integers(0, 9, len(xyxy)), starts, difficult=rng.uniform(size=len(xyxy)) < 0.3)
    return replace(data, marks=marks)


def masked(data: Dataset, masks: NDArray[np.uint8]) -> Dataset:
    return replace(data, marks=Masks(lambda position: masks[position], digest="0" * 64))


@pytest.fixture(scope="module")
def dense(drawn: tuple[Path, NDArray[np.uint8]]) -> dict[str, Dataset]:
    data = open_dataset(drawn[0])
    return {"detect": boxed(data), "segment": masked(data, drawn[1])}


PLANS = {
    "segment": lambda size: plan_with(SCALE, seed=2, size=size, flip=0),
    "detect": lambda size: plan_with(EXPAND, seed=2, size=size, flip=0),
}


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_pixels_masks_and_boxes_are_torchvisions(
    dense: dict[str, Dataset], drawn: tuple[Path, NDArray[np.uint8]], task: str
) -> None:
    """torchvision's functions with the resolved parameters: boxes to 1e-3 pixels, masks but for centers on an edge."""
    size, data, masks = 20, dense[task], drawn[1]
    noise = np.random.default_rng(7).integers(0, 200, (COUNT, *SIDES), dtype=np.uint8)
    data = masked(data, noise) if task == "segment" else data
    plan = PLANS[task](size)
    rows = np.arange(COUNT)
    with Loader(data, plan, batch_size=16, threads=1) as loader:
        work, batches = loader.work(1), list(loader.stream(1, rows))
    images = torch.cat([batch.images for batch in batches]).permute(0, 3, 1, 2)
    geometry = work.geometry
    assert geometry.overhung(size)
    assert not geometry.padded
    pixels = ties = 0
    for row, position in enumerate(work.positions.tolist()):
        top, left, height, width = geometry.box[row].tolist()
        to, window = geometry.resized[row].tolist(), geometry.window[row].tolist()

        def moved(value: Any, fill: Any, mode: Any, **more: Any) -> Any:
            cut = F.resize(F.crop(value, top, left, height, width), to, mode, **more)
            beyond = [max(-window[1], 0), max(-window[0], 0), size, size]
            cut = F.crop(F.pad(cut, beyond, fill), max(window[0], 0), max(window[1], 0), size, size)
            return F.horizontal_flip(cut) if geometry.flip[row] else cut

        image = torch.from_numpy(np.repeat(masks[position][None], 3, 0))
        theirs = moved(image, [float(byte) for byte in plan.fill], InterpolationMode.BILINEAR, antialias=True)
        assert (images[row].int() - theirs.int()).abs().float().mean() < 0.5
        if task == "detect":
            xyxy = tv_tensors.BoundingBoxes(  # type: ignore[call-arg]
                torch.from_numpy(data.annotations.xyxy[data.annotations._own(position)].astype(np.float64)),
                format="XYXY", canvas_size=SIDES, clamping_mode=None,
            )  # fmt: skip
            exact = moved(xyxy, 0, InterpolationMode.BILINEAR)
            center = (exact[:, :2] + exact[:, 2:]) / 2
            kept = ((center > 0) & (center < size)).all(dim=1)
            found = batches[row // 16].annotations[row % 16]
            np.testing.assert_allclose(found["boxes"], exact[kept].clamp(0, size), atol=1e-3)
            assert (
                found["labels"].tolist()
                == data.annotations.labels[data.annotations._own(position)][kept.numpy()].tolist()
            )
        else:
            mask = tv_tensors.Mask(torch.from_numpy(noise[position]))
            expected = moved(mask, IGNORE, InterpolationMode.NEAREST_EXACT)
            found = batches[row // 16].annotations[row % 16]
            assert found.dtype == torch.int64
            ties += int((found != expected).sum())
            pixels += found.numel()
    assert (
        ties <= 0.002 * pixels
    )  # 0 of 16,000 when this was written; float32 may put a center on either side of an edge


def test_the_mask_lies_on_the_image(dense: dict[str, Dataset]) -> None:
    """Away from the patches' edges an image of class numbers, resized and padded, shows the moved mask's."""
    plan = PLANS["segment"](24)
    seen = 0
    with Loader(dense["segment"], plan, batch_size=16, threads=1) as loader:
        for batch in loader.stream(0, np.arange(COUNT)):
            mask, image = batch.annotations, batch.images[..., 0].long()
            around = mask.float()[:, None]
            flat = -torch.nn.functional.max_pool2d(-around, 3, 1, 1) == torch.nn.functional.max_pool2d(around, 3, 1, 1)
            inner = flat[:, 0] & (mask != IGNORE)
            inner[:, [0, -1]] = inner[:, :, [0, -1]] = False  # pooling there looks at fewer neighbors
            assert torch.equal(image[inner], mask[inner])
            assert (image[mask == IGNORE] == 0).all(), "black outside, exactly"
            seen += int(inner.sum())
    assert seen > 1000


@pytest.mark.parametrize("task", ["segment", "detect"])
@pytest.mark.parametrize("extent", [(30, 50), (50, 30), (20, 20), (41, 13)])
def test_evaluation_shows_the_whole_image(task: Any, extent: tuple[int, int], tmp_path: Path) -> None:
    size = 20
    pixels = np.random.default_rng(0).integers(0, 256, (3, *extent), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=[0, 0, 0])
    data = open_dataset(tmp_path / "x.npz")
    boxes = Boxes(
        np.array([[1, 2, 9, 8], [0, 0, 13, 13]], np.float32), np.array([3, 4]), np.array([0, 1, 1, 2]),
        difficult=np.array([False, True]),
    )  # fmt: skip
    data = replace(data, marks=boxes if task == "detect" else Masks(lambda at: pixels[at], digest="0"))
    plan = PLANS[task](size)
    with Loader(data, plan, batch_size=2, threads=1) as loader:
        batches = list(loader.evaluation())
    assert [len(batch.annotations) for batch in batches] == [2, 1]
    truth = [entry for batch in batches for entry in batch.annotations]
    long = max(extent)
    for position, entry in enumerate(truth):
        if task == "segment":
            assert set(entry) == {"mask", "box"}
            assert torch.equal(entry["mask"], torch.from_numpy(pixels[position]))
            assert entry["mask"].dtype == torch.uint8
            assert entry["box"].tolist() == [0, 0, long, long]
            square = np.zeros((long, long), np.uint8)
            square[: extent[0], : extent[1]] = pixels[position]
        else:
            assert set(entry) == {"boxes", "labels", "difficult", "size", "box"}
            assert (entry["size"].tolist(), entry["box"].tolist()) == ([*extent], [0, 0, *extent])
            assert [entry[name].dtype for name in ("boxes", "labels", "difficult", "size", "box")] == [
                torch.float32, torch.int64, torch.bool, torch.int64, torch.int64,
            ]  # fmt: skip
            square = pixels[position]
        expected = F.resize(torch.from_numpy(square)[None], [size, size], antialias=True)[0].numpy()
        found = batches[position // 2].images[position % 2, ..., 0].numpy()
        assert np.abs(found[1:-1, 1:-1].astype(int) - expected[1:-1, 1:-1]).max() <= 1
    if task == "detect":
        assert [entry["boxes"].tolist() for entry in truth] == [[[1, 2, 9, 8]], [], [[0, 0, 13, 13]]]
        assert [entry["difficult"].tolist() for entry in truth] == [[False], [], [True]]
    plain = evaluation_geometry(plan, data.sizes)
    assert plain.box[0].tolist() == [0, 0, *extent], "classification stays a resize and a central crop"


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_bytes_and_annotations_do_not_depend_on_batches_order_or_restart(dense: dict[str, Dataset], task: str) -> None:
    def collected(batch: int, rows: NDArray[np.int64], start: int = 0) -> tuple[NDArray[np.uint8], list[Any]]:
        with Loader(dense[task], PLANS[task](16), batch_size=batch, threads=2) as loader:
            batches = list(loader.stream(3, rows, start_batch=start))
        marks = [
            entry.tolist() if task == "segment" else {name: value.tolist() for name, value in entry.items()}
            for batch_ in batches
            for entry in batch_.annotations
        ]
        return torch.cat([batch_.images for batch_ in batches]).numpy(), marks

    rows = np.arange(COUNT)
    images, marks = collected(64, rows)
    for batch, order, start in ((1, rows[:9], 0), (7, rows[::-1].copy(), 0), (8, rows, 3)):
        found, own = collected(batch, order, start)
        order = order[start * batch :]
        assert np.array_equal(found, images[order])
        assert own == [marks[row] for row in order]


def test_files_are_shown_as_arrays_are(
    dense: dict[str, Dataset], drawn: tuple[Path, NDArray[np.uint8]], tmp_path: Path
) -> None:
    """Decoded by region: the same windows of PNG files."""
    from PIL import Image

    for number, mask in enumerate(drawn[1][:10]):
        Image.fromarray(np.repeat(mask[..., None], 3, 2)).save(tmp_path / f"{number:02}.png")
    files = replace(open_dataset(tmp_path), marks=dense["detect"].marks)
    few = replace(dense["detect"], ids=files.ids, labels=files.labels, sizes=files.sizes)
    plan = PLANS["detect"](20)
    images = [
        torch.cat([batch.images for batch in Loader(data, plan, batch_size=5, threads=1).stream(0, np.arange(10))])
        for data in (few, files)
    ]
    assert torch.equal(*images)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("task", "augment", "said"), [
    ("classify", "expand-crop-flip", "expand-crop places its windows by boxes, this data has class labels"),
    ("segment", "ssd", "expand-crop places its windows by boxes, this data has masks"),
    ("detect", [{"op": "rotate"}], "rotate moves pixels and the boxes of this data would not follow"),
    ("segment", [{"op": "affine", "degrees": 3}], "affine moves pixels and the masks of this data"),
    ("detect", "ml-dr", "mixup and cutmix mix class labels, this data has boxes"),
    ("detect", "timm-ra", "rand-augment moves pixels"),
    ("segment", [{"op": "trivial-augment"}], "trivial-augment moves pixels"),
    ("segment", [{"op": "auto-augment"}], "auto-augment moves pixels"),
    ("segment", [{"op": "cutmix"}], "mixup and cutmix mix class labels, this data has masks"),
])  # fmt: skip
def test_plans_that_annotations_cannot_follow_are_refused(
    dense: dict[str, Dataset], task: str, augment: Any, said: str
) -> None:
    data = replace(dense["segment"], marks=None) if task == "classify" else dense[task]
    plan = plan_with(augment, seed=0, size=16, flip=0.5)
    for attempt in (lambda: Loader(data, plan, batch_size=4), lambda: view_work(plan, data, 0)):
        with pytest.raises(RequestError, match=r"^data\.augment: ") as caught:
            attempt()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("augment", ["deeplab", "ssd", [{"op": "random-erasing"}], "pad-crop-flip", "none"])
def test_other_plans_serve_boxes(dense: dict[str, Dataset], augment: Any) -> None:
    plan = plan_with(augment, seed=0, size=16, flip=0.5)
    with Loader(dense["detect"], plan, batch_size=16, threads=1) as loader:
        (batch, *_) = loader.stream(0, np.arange(20))
    assert batch.images.shape == (16, 16, 16, 3)
    assert all((entry["boxes"] >= 0).all() and (entry["boxes"] <= 16).all() for entry in batch.annotations)
    assert boxes_of(replace(dense["segment"], marks=None), np.arange(3)) is None


def test_a_batch_of_lists_moves() -> None:
    truth = [
        {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)},
    ]
    batch = Batch(
        torch.zeros(2, 4, 4, 3), truth, np.arange(2, dtype=np.uint32), np.arange(2), 0, {"a": {"t": torch.ones(2)}}
    )
    there = batch.to("meta")
    assert {value.device.type for entry in there.annotations for value in entry.values()} == {"meta"}
    assert [set(entry) for entry in there.annotations] == [{"boxes", "labels"}] * 2
    assert there.targets["a"]["t"].device.type == "meta"
    assert isinstance(there.ids, np.ndarray)
