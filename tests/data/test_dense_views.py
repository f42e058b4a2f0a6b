"""What views of detection and segmentation show: pixels, boxes and masks against torchvision's, whatever the batching.

Also what evaluation gives, and the plans that boxes or masks cannot follow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from feedfast.data.annotations import IGNORE, Boxes, Masks
from feedfast.data.augment import plan_with
from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.geometry import evaluation_geometry
from feedfast.data.loader import Loader
from feedfast.data.work import boxes_of, view_work
from feedfast.errors import RequestError

SCALE = [{"op": "scale-crop"}, {"op": "flip"}]
EXPAND = [{"op": "expand-crop"}, {"op": "flip"}]
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
    rng = np.random.default_rng(1)
    starts = np.cumsum([0, *rng.integers(0, 5, len(data))])
    ends = np.sort(rng.uniform(0, 1, (starts[-1], 2, 2)), axis=1)
    xyxy = (ends * SIDES[::-1]).reshape(-1, 4).astype(np.float32)
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


def test_a_mask_that_cannot_be_read_ends_the_stream(dense: dict[str, Dataset], drawn: tuple[Path, Any]) -> None:
    def read(position: int) -> NDArray[np.uint8]:
        if position == 17:
            raise RequestError("masks/17.png: has changed")
        return drawn[1][position]

    data = replace(dense["segment"], marks=Masks(read, digest="0"))
    with Loader(data, PLANS["segment"](16), batch_size=8, threads=1) as loader:
        for stream in (loader.stream(0, np.arange(COUNT)), loader.evaluation()):
            with pytest.raises(RequestError, match=r"masks/17\.png: has changed"):
                list(stream)


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


def test_crowds_place_no_windows(dense: dict[str, Dataset]) -> None:
    """Boxes that nothing is learned from (COCO's crowds) are as if they were not there."""
    marks = dense["detect"].marks
    assert isinstance(marks, Boxes)
    sure = np.flatnonzero(~marks.difficult)
    starts = np.searchsorted(sure, marks.starts)
    assert len(sure) < len(marks.labels)
    without = Boxes(marks.xyxy[sure], marks.labels[sure], starts)
    found = [
        view_work(PLANS["detect"](20), replace(dense["detect"], marks=own), 1).geometry.box
        for own in (replace(marks, taught=False), without, marks)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


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
