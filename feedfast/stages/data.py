"""Opening the images a recipe names: training and validation data, the view plan, and the loader of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from feedfast import recipe as recipes
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError


@dataclass(frozen=True)
class Selection:
    """Which images are trained on: where they lie, and how many of each class are taken (see `open_dataset`)."""

    train: tuple[str, ...]
    limit: int = 0
    fraction: float = 1.0

    @classmethod
    def of(cls, data: recipes.Data) -> Selection:
        """The recipe's."""
        return cls(data.train, data.limit, data.fraction)

    def open(self, check: Literal["fast", "full"] = "fast") -> Dataset:
        """The images, looked at.

        Raises:
            RequestError: as of `open_dataset`.
        """
        return open_dataset(self.train, limit=self.limit, fraction=self.fraction, check=check)


def open_train(data: recipes.Data) -> Dataset:
    """The training images, limited and thinned as the recipe says.

    Raises:
        RequestError: as of `open_dataset`.
    """
    return Selection.of(data).open(data.check)


def open_val(data: recipes.Data, train: Dataset) -> Dataset | None:
    """The validation images, None without ``data.val``.

    Raises:
        RequestError: they have no labels, or a label number means another class than in ``train``.
    """
    if not data.val:
        return None
    val = open_dataset(data.val, split="val", check=data.check)
    if not val.classes or not (val.labels >= 0).any():
        raise RequestError(f"data.val: expected labeled images (class sub-folders), found none in {val.source}")
    if not train.classes:
        return val
    if len(val.classes) > len(train.classes):
        only = [name for name in val.classes if name not in train.classes]
        raise RequestError(
            f"data.val: expected the {len(train.classes)} classes of data.train, found {len(val.classes)} in "
            f"{val.source}: not in training: {only[:5]}"
        )
    if not (_numbered(val) or _numbered(train)):
        for number, (found, expected) in enumerate(zip(val.classes, train.classes, strict=False)):
            if found != expected:
                raise RequestError(
                    f"data.val: expected class {number} to be {expected!r} as in data.train, "
                    f"found {found!r} in {val.source}; "
                    "labels are numbered by sorted name, so both need the same class folders"
                )
    return val


def _numbered(data: Dataset) -> bool:
    """Whether the classes have no names of their own (CIFAR files without a name list, most .npz files)."""
    return data.classes == tuple(str(number) for number in range(len(data.classes)))


def view_plan(data: recipes.Data, seed: int) -> ViewPlan:
    """The recipe's view plan."""
    return ViewPlan(seed=seed, size=data.size, augment=data.augment, flip=data.flip)


def pixel_loader(data: Dataset, plan: ViewPlan, batch_size: int, device: torch.device, threads: int = 0) -> Loader:
    """The loader of a stage's pixels; ``threads`` 0 = one per core."""
    return Loader(data, plan, batch_size=batch_size, device=str(device), threads=threads or None)
