"""Images from a Python object: the cache of an .npz with the same pixels, byte for byte; and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast
from PIL import Image
from small import as_toml, digits_recipe

from feedfast import open_cache, run_cache, run_train
from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError, RequestError
from feedfast.recipe import Recipe


class Pairs:
    """(image, label) of an .npz, each image in one of the forms that data sets give."""

    def __init__(self, path: str) -> None:
        with np.load(path) as held:
            self.images, self.labels = held["images"], held["labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        gray = self.images[index]
        color = np.repeat(gray[:, :, None], 3, axis=2)
        forms = (Image.fromarray(gray), color, torch.from_numpy(color.transpose(2, 0, 1).copy()), gray)
        label = self.labels[index]
        return forms[index % 4], (int(label), label, torch.tensor(label))[index % 3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose cache was made from a file."""
    small = ("data.limit=5", "cache.pilot=40", 'teachers.0.taps=["final"]')
    recipe = digits_recipe(tmp_path_factory.mktemp("python"), small, teachers=1)
    run_cache(recipe)
    return recipe


def python_recipe(world: Recipe, **cache: Any) -> Recipe:
    data = world.data.model_copy(update={"train": ("python",), "val": ("python",)})
    out = str(Path(world.train.out).with_name("python"))
    return world.model_copy(
        update={
            "data": data,
            "cache": world.cache.model_copy(update=cache),
            "train": world.train.model_copy(update={"out": out, "max_steps": 1}),
        }
    )


def test_the_same_cache_as_from_a_file(world: Recipe, tmp_path: Path) -> None:
    train, val = (Pairs(source) for (source,) in (world.data.train, world.data.val))
    recipe = python_recipe(world, path=str(tmp_path / "python.zarr"))
    written = run_cache(recipe, train=train)
    assert written["digest"] == run_cache(world)["digest"]
    assert written["data"] == {
        "images": 50, "classes": 10, "first_classes": ["0", "1", "2"], "skipped": {}, "remarks": {}
    }  # fmt: skip
    trained = run_train(recipe, train=train, val=val)
    assert trained["steps"] == 1
    with open_cache(recipe.cache.path, data=train) as own, open_cache(world.cache.path, data=train) as other:
        for mine, theirs in zip(own.stream(1, 16), other.stream(1, 16), strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
        assert len(next(iter(own.evaluation(val, 16))).labels) == 16

    train.images[::3] = 255 - train.images[::3]
    with pytest.raises(FeedfastError):
        run_train(recipe.model_copy(update={"overwrite": True}), train=train, val=val)


def test_an_object_that_is_not_given(world: Recipe) -> None:
    recipe = python_recipe(world)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"out": world.train.out})})
    with pytest.raises(RequestError, match=r'data\.train = "python": expected the Python object'):
        run_train(recipe)
    with pytest.raises(RequestError, match=r'data\.val = "python": expected the object passed to run_train'):
        run_train(recipe, train=Pairs(world.data.train[0]))


def test_an_object_that_is_not_asked_for(world: Recipe, tmp_path: Path) -> None:
    pairs = Pairs(world.data.train[0])
    with pytest.raises(RequestError, match=r'data\.train: expected "python" where an object is passed as train='):
        run_cache(world, train=pairs)
    with pytest.raises(RequestError, match=r"data\.val: expected"):
        run_train(world, val=pairs)
    error = feedfast("cache", as_toml(python_recipe(world), tmp_path / "r.toml")).error
    assert "expected the Python object" in error


class Items:
    """Images of several sizes, or whatever else is given."""

    classes = ("cat", "dog", "emu")

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item() if callable(item) else item


def test_images_of_several_sizes() -> None:
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    sizes = [(40, 30), (32, 32), (32, 50), (64, 64), (33, 32), (32, 32)]
    images = [scene.resize(size, Image.Resampling.BICUBIC) for size in sizes]
    data = open_dataset(Items([(image, number % 2) for number, image in enumerate(images)]))
    assert (data.classes, data.labels.tolist()) == (("cat", "dog", "emu"), [0, 1, 0, 1, 0, 1])
    assert data.sizes.tolist() == [[height, width] for width, height in sizes]
    assert len(set(data.content().tolist())) == 5  # two are equal
    with Loader(data, ViewPlan(0, 32, "none"), batch_size=4, threads=1) as loader:
        found = torch.cat([batch.images for batch in loader.evaluation()]).numpy()
    for at in (1, 5):  # sizes that are left alone
        np.testing.assert_array_equal(found[at], np.asarray(images[at]))
    assert found.std() > 20


GRAY = np.zeros((4, 4), np.uint8)
BAD = {
    "none": ([], "Items: expected at least one sample"),
    "no-pair": ([GRAY], r"Items\[0\]: expected \(image, label\), found ndarray uint8 \[4, 4\]"),
    "float": (
        [(GRAY, 0), (torch.zeros(3, 4, 4), 0)],
        r"Items\[1\]: .*found Tensor torch.float32 \[3, 4, 4\]; leave ToT",
    ),
    "planes-array": ([(np.zeros((3, 4, 5), np.uint8), 0)], r"array \[H, W, 3\] or a tensor.*found ndarray uint8"),
    "label": ([(GRAY, "cat")], "expected a class number or None as its label, found str 'cat'"),
    "one-hot": ([(GRAY, np.eye(3)[0])], "label, found ndarray float64"),
    "negative": ([(GRAY, -2)], "label, found int '-2'"),
    "raises": ([lambda: 1 / 0], r"Items\[0\]: cannot be had: ZeroDivisionError: division by zero"),
    "random": (
        [lambda: (np.full((4, 4), random.randrange(256), np.uint8), 0)] * 3,
        r"Items\[\d\]: expected the same pixels each time.*without random transforms",
    ),
}


@pytest.mark.parametrize("which", BAD)
def test_items_that_are_refused(which: str) -> None:
    items, said = BAD[which]
    random.seed(0)
    with pytest.raises(RequestError, match=said):
        open_dataset(Items(items))


def test_an_item_that_changes_later() -> None:
    """Also one of those that were not asked for twice."""
    held = [np.full((4, 4), number, np.uint8) for number in range(100)]
    data = open_dataset(Items([(image, None) for image in held]))
    assert data.labels.tolist() == [-1] * 100
    data.pixels(range(100))
    held[50][0, 0] += 1
    with pytest.raises(RequestError, match=r"Items\[50\]: expected the same pixels"):
        data.pixels(range(100))
    with pytest.raises(RequestError, match=r"expected CIFAR's files.* found int"):
        open_dataset(3)  # type: ignore[arg-type]
