"""Opening the images a recipe names: training and validation data, the view plan, and the loader of their pixels."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast import recipe as recipes
from feedfast.data.augment import plan_with
from feedfast.data.dataset import Dataset, ImageSource, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError
from feedfast.stages.progress import Meter

log = logging.getLogger(__name__)

PYTHON = ("python",)
"""``data.train`` or ``data.val`` of a recipe whose images are a Python object that is passed with it."""

_NAMED = 3  # classes in the first line of a job
_QUIET_SECONDS = 2.0  # what takes less needs no progress


@dataclass(frozen=True)
class Selection:
    """Which images are trained on: where they lie, how many of each class are taken, and what is learned of them
    (see `open_dataset`)."""

    train: tuple[str, ...]
    limit: int = 0
    fraction: float = 1.0
    arrays: tuple[str, ...] = ()
    task: recipes.TaskName = "classify"

    @classmethod
    def of(cls, recipe: recipes.Recipe) -> Selection:
        """The recipe's."""
        data = recipe.data
        return cls(data.train, data.limit, data.fraction, data.arrays, recipe.task.name)

    def open(self, check: Literal["fast", "full"] = "fast", given: ImageSource | None = None) -> Dataset:
        """The images, looked at.

        Args:
            check: as of `open_dataset`.
            given: the object that the images come from, or another place where they lie.

        Raises:
            RequestError: as of `open_dataset`, or the images were a Python object and none is given.
        """
        source = self.train if given is None else given
        if source == PYTHON:
            raise RequestError(
                'data.train = "python": expected the Python object that the images come from, found none; '
                "feedfast.cache, fit and open_cache take it as data=..."
            )
        with _looking() as progress:
            return open_dataset(
                source,
                limit=self.limit,
                fraction=self.fraction,
                arrays=self.arrays,
                check=check,
                progress=progress,
                task=self.task,
            )


@contextlib.contextmanager
def _looking() -> Iterator[Callable[[int, int], None]]:
    """Progress of `open_dataset`, which may count its images more than once (walk, unpack, look)."""
    started = time.perf_counter()
    meter: Meter | None = None
    with contextlib.ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            nonlocal meter, started
            if meter is not None and done < meter.done:
                shown.close()
                started, meter = time.perf_counter(), None
            if meter is None and time.perf_counter() - started > _QUIET_SECONDS:
                meter = shown.enter_context(Meter("data", total))
                meter.started = started
            if meter is not None:
                meter.advance(done - meter.done)

        yield progress


def open_train(recipe: recipes.Recipe, given: ImageSource | None = None) -> Dataset:
    """The training images, limited and thinned as the recipe says; the first line a job says is what they are.

    Args:
        recipe: its sections on data and task.
        given: the object they come from, with ``data.train = "python"``.

    Raises:
        RequestError: as of `open_dataset`, or an object is given and not asked for, or the other way round.
    """
    _refuse_both(recipe.data.train, given, "train")
    found = Selection.of(recipe).open(recipe.data.check, given)
    log.info("data: %s", said_of(found))
    warn_of(found)
    return found


def said_of(data: Dataset) -> str:
    """Number of images, number and first names of classes, and place, in words."""
    named = ", ".join(data.classes[:_NAMED]) + (", ..." if len(data.classes) > _NAMED else "")
    classes = f"{len(data.classes):,} class{'' if len(data.classes) == 1 else 'es'} ({named})"
    classes = classes if data.classes else "no labels"
    return f"{len(data):,} images, {classes}, from {data.source}"


def warn_of(data: Dataset) -> None:
    """Say what looks like an image and is not used, which forms are read otherwise, and that a class is alone."""
    if len(data.classes) == 1 and data.marks is None:
        log.warning("data: %s: one class alone, %s: are its folders the classes?", data.source, data.classes[0])
    if data.skipped:
        counts = ", ".join(f"{count:,} {extension}" for extension, count in data.skipped.items())
        log.warning("data: %s: look like images and are not read: %s", data.source, counts)
    for remark, count in data.remarks.items():
        log.warning("data: %s: %s of %s files: %s", data.source, f"{count:,}", f"{len(data):,}", remark)


def facts_of(data: Dataset) -> dict[str, Any]:
    """What JSON documents say of the images: ``images``, ``classes``, ``first_classes``, ``skipped``, ``remarks``."""
    return {
        "images": len(data),
        "classes": len(data.classes),
        "first_classes": list(data.classes[:_NAMED]),
        "skipped": dict(data.skipped),
        "remarks": dict(data.remarks),
    }


def _refuse_both(named: tuple[str, ...], given: object, key: str) -> None:
    if given is not None and named != PYTHON:
        raise RequestError(f'data.{key}: expected "python" where an object is passed as {key}=..., found {named}')


def open_val(recipe: recipes.Recipe, train: Dataset, given: ImageSource | None = None) -> Dataset | None:
    """The validation images, None without ``data.val``; ``given`` is their object, with ``data.val = "python"``.

    Raises:
        RequestError: they have no labels, or a label number means another class than in ``train``.
    """
    data, dense = recipe.data, recipe.task.name != "classify"
    _refuse_both(data.val, given, "val")
    if not data.val:
        return None
    if data.val == PYTHON and given is None:
        raise RequestError('data.val = "python": expected the object passed to run_train as val=..., found none')
    source: ImageSource = data.val if given is None else given
    arrays = data.val_arrays or data.arrays
    with _looking() as progress:
        val = open_dataset(
            source, arrays=arrays, split="val", check=data.check, progress=progress, task=recipe.task.name
        )
    warn_of(val)
    if not dense and (not val.classes or not (val.labels >= 0).any()):
        raise RequestError(f"data.val: expected labeled images (class sub-folders), found none in {val.source}")
    refuse_other_classes(val, train.classes, "data.train")
    return val


def refuse_other_classes(val: Dataset, classes: tuple[str, ...], where: str, *, key: str = "data.val") -> None:
    """Raise unless a label number of validation images means what it means in training.

    Args:
        val: the validation images.
        classes: names of the classes that are trained on, by number; none = images without labels: nothing to compare.
        where: whose classes they are, for the message.
        key: begins the message.

    Raises:
        RequestError: more classes, or other names; classes without names of their own have any.
    """
    if not classes:
        return
    if len(val.classes) > len(classes):
        only = [name for name in val.classes if name not in classes]
        raise RequestError(
            f"{key}: expected the {len(classes)} classes of {where}, found {len(val.classes)} in "
            f"{val.source}: not in training: {only[:5]}"
        )
    if _numbered(val.classes) or _numbered(classes):
        return
    for number, (found, expected) in enumerate(zip(val.classes, classes, strict=False)):
        if found != expected:
            dense = val.marks is not None
            cure = "" if dense else "; labels are numbered by sorted name, so both need the same class folders"
            raise RequestError(
                f"{key}: expected class {number} to be {expected!r} as in {where}, "
                f"found {found!r} in {val.source}{cure}"
            )


def _numbered(classes: tuple[str, ...]) -> bool:
    """Whether they have no names of their own (CIFAR files without a name list, most .npz files)."""
    return classes == tuple(str(number) for number in range(len(classes)))


def view_plan(data: recipes.Data, seed: int) -> ViewPlan:
    """The recipe's view plan.

    Raises:
        RequestError: as of `plan_with`.
    """
    return plan_with(data.augment, seed=seed, size=data.size, flip=data.flip)


def pixel_loader(
    data: Dataset,
    plan: ViewPlan,
    batch_size: int,
    device: torch.device,
    threads: int = 0,
    content: NDArray[np.uint64] | None = None,
) -> Loader:
    """The loader of a stage's pixels; ``threads`` 0 = one per core, ``content`` as of `Loader`."""
    return Loader(data, plan, batch_size=batch_size, device=str(device), threads=threads or None, content=content)
