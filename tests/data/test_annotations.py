"""Annotations follow the pixels of a view: boxes and masks against torchvision, and against pixels that DALI moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from feedfast.data.annotations import IGNORE, Boxes, ClassLabels, Masks, move_boxes, move_mask
from feedfast.data.dataset import open_dataset
from feedfast.data.geometry import Geometry, view_geometry
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan


def geometry_of(image: Any, box: Any, resized: Any, window: Any, flip: int) -> Geometry:
    rows = [np.array([value], dtype=np.int32) for value in (image, box, resized, window)]
    return Geometry(*rows, np.array([flip], dtype=np.int32))


@st.composite
def moves(draw: st.DrawFn) -> tuple[Geometry, int]:
    """One sample's way to a square output: a box that may leave the image, a resize, a window, perhaps mirrored."""
    height, width = draw(st.integers(4, 40)), draw(st.integers(4, 40))
    top, left = draw(st.integers(-5, height - 2)), draw(st.integers(-5, width - 2))
    box = (top, left, draw(st.integers(2, 40)), draw(st.integers(2, 40)))
    size = draw(st.integers(2, 24))
    resized = (draw(st.integers(size, 2 * size)), draw(st.integers(size, 2 * size)))
    window = (draw(st.integers(0, resized[0] - size)), draw(st.integers(0, resized[1] - size)))
    return geometry_of((height, width), box, resized, window, draw(st.integers(0, 1))), size


def as_torchvision(value: Any, geometry: Geometry, size: int, **resize: Any) -> Any:
    """The four steps, by torchvision's functions."""
    moved = F.crop(value, *geometry.box[0].tolist())
    moved = F.resize(moved, geometry.resized[0].tolist(), **resize)
    moved = F.crop(moved, *geometry.window[0].tolist(), size, size)
    return F.horizontal_flip(moved) if geometry.flip[0] else moved


@settings(max_examples=150, deadline=None)
@given(moves(), st.lists(st.tuples(*[st.floats(0, 40, width=32)] * 4), max_size=4))
def test_boxes_move_as_torchvisions(move: tuple[Geometry, int], corners: list[tuple[float, ...]]) -> None:
    geometry, size = move
    ends = np.array(corners, dtype=np.float32).reshape(-1, 2, 2)
    xyxy = np.concatenate([ends.min(1), ends.max(1)], axis=1)
    found, visible = move_boxes(xyxy, geometry, 0, size)
    canvas = (int(geometry.image[0][0]), int(geometry.image[0][1]))
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(xyxy.astype(np.float64)), format="XYXY", canvas_size=canvas)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas, clamping_mode=None)
    exact = as_torchvision(boxes, geometry, size)
    clipped = exact.clamp(0, size)
    np.testing.assert_allclose(found, clipped.numpy(), atol=1e-4)
    for whole, part, share in zip(exact.tolist(), clipped.tolist(), visible.tolist(), strict=True):
        area, seen = ((box[2] - box[0]) * (box[3] - box[1]) for box in (whole, part))
        if area > 1e-6:
            assert share == pytest.approx(seen / area, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(moves(), st.integers(0, 2**32 - 1))
def test_masks_move_as_torchvisions(move: tuple[Geometry, int], seed: int) -> None:
    geometry, size = move
    height, width = geometry.image[0].tolist()
    mask = np.random.default_rng(seed).integers(0, 21, (height, width), dtype=np.uint8)
    pad = 50
    padded = F.pad(tv_tensors.Mask(torch.from_numpy(mask)), [pad] * 4, fill=IGNORE)
    box = geometry.box + np.array([[pad, pad, 0, 0]], dtype=np.int32)
    shifted = Geometry(geometry.image, box, geometry.resized, geometry.window, geometry.flip)
    expected = as_torchvision(padded, shifted, size, interpolation=InterpolationMode.NEAREST_EXACT)
    # torch multiplies in float32: where a center lies exactly on an edge it may take either pixel
    clear = []
    for axis in (0, 1):
        center = (2 * (np.arange(size) + geometry.window[0][axis]) + 1) * geometry.box[0][axis + 2]
        clear.append(center % (2 * geometry.resized[0][axis]) != 0)
    if geometry.flip[0]:
        clear[1] = clear[1][::-1]
    found = move_mask(mask, geometry, 0, size)
    assert np.array_equal(found[np.ix_(*clear)], expected.numpy()[np.ix_(*clear)])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.uint8]]:
    """Images whose pixels are class numbers."""
    masks = np.random.default_rng(0).integers(1, 200, (40, 24, 24), dtype=np.uint8)
    path = tmp_path_factory.mktemp("drawn") / "masks.npz"
    np.savez(path, images=masks, labels=np.arange(40) % 4)
    return path, masks


def test_a_mask_lies_on_the_pixels_that_dali_moved(drawn: tuple[Path, NDArray[np.uint8]]) -> None:
    """Pad, crop and mirror are exact: a mask moved by its geometry is the mask moved as an image."""
    path, masks = drawn
    data = open_dataset(path)
    plan = ViewPlan(seed=1, size=24, augment="pad-crop-flip", flip=0.5, pad=6)
    annotated = Masks(lambda position: masks[position], digest="0" * 64)
    with Loader(data, plan, batch_size=16) as loader:
        for batch in loader.stream(2, np.arange(40)):
            positions = batch.ids.astype(np.int64)
            geometry = view_geometry(plan, 2, batch.ids, data.sizes[positions])
            assert geometry.padded
            assert geometry.mirrored
            moved = annotated.at(positions, geometry, plan.size)
            moved[moved == IGNORE] = 0  # where the loader pads with black
            assert torch.equal(moved, batch.images[..., 0].long())


def test_boxes_of_a_batch() -> None:
    """Ragged, by sample; a box that mostly left the view is gone, one that partly did is clipped."""
    xyxy = np.array([[2, 2, 6, 6], [0, 0, 3, 8], [7, 7, 8, 8], [1, 1, 2, 3]], dtype=np.float32)
    boxes = Boxes(xyxy, np.array([5, 6, 7, 8]), np.array([0, 3, 3, 4]), least_visible=0.5)
    same = geometry_of((8, 8), (0, 2, 8, 8), (8, 8), (0, 0), 0)  # two pixels to the left
    geometry = Geometry(
        *(np.repeat(getattr(same, name), 3, 0) for name in ("image", "box", "resized", "window", "flip"))
    )
    first, second, third = boxes.at(np.array([0, 1, 2]), geometry, 8)
    assert first["boxes"].tolist() == [[0, 2, 4, 6], [5, 7, 6, 8]]
    assert first["labels"].tolist() == [5, 7]
    assert second["boxes"].shape == (0, 4)
    assert third["labels"].tolist() == []
    assert boxes.fingerprint() != Boxes(xyxy, boxes.labels, np.array([0, 2, 3, 4])).fingerprint()


def test_which_boxes_stay() -> None:
    """Of a view of the left half: a large box with its center outside, a small one inside, a line, one on the edge."""
    xyxy = np.array([[0, 0, 7, 8], [3.5, 0, 3.9, 1], [1, 1, 1, 5], [3, 0, 5, 8], [0, 0, 8, 1]], dtype=np.float32)
    boxes = Boxes(xyxy, np.arange(5), np.array([0, 5]))
    half = geometry_of((8, 8), (0, 0, 8, 4), (8, 8), (0, 0), 0)
    (visible,), (center,) = (boxes.at(np.array([0]), half, 8, keep) for keep in ("visible", "center"))
    assert visible["labels"].tolist() == [0, 1, 2, 3, 4]
    assert center["labels"].tolist() == [0, 1]
    assert center["boxes"].tolist() == [[0, 0, 8, 8], pytest.approx([7, 0, 7.8, 1], abs=1e-5)]


def test_class_labels_come_with_the_batch(drawn: tuple[Path, NDArray[np.uint8]]) -> None:
    data = open_dataset(drawn[0])
    assert isinstance(data.annotations, ClassLabels)
    with Loader(data, ViewPlan(0, 24, "none"), batch_size=16) as loader:
        batch = next(iter(loader.stream(0, np.array([3, 1]))))
    assert batch.annotations is batch.labels
    assert batch.labels.tolist() == [int(data.labels[sample]) for sample in batch.ids]
    changed = ClassLabels(np.where(data.labels == 0, -1, data.labels).astype(np.int32))
    assert changed.fingerprint() != data.annotations.fingerprint()
