"""What a teacher is shown: its normalization and input size, from the recipe or else from whoever knows its weights.

In this order: the recipe's entry; the run of feedfast that saved the weights, whose recipe lies in the same folder; the
library that published them (`feedfast.models.own`); the data's. The size is the model's own where the weights are
published or saved by a run, or where the network runs at one size only; else that of the data. Pixels of another size
are resized on the device.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from feedfast import recipe as recipes
from feedfast.models.own import OwnInput, built_size, own_input
from feedfast.stages.folder import BRANCH, RECIPE

log = logging.getLogger(__name__)

Triple = tuple[float, float, float]
MAX_RECIPE_BYTES = 1 << 20  # 1 MiB


@dataclass(frozen=True)
class TeacherInput:
    """Mean and std per channel in 0..1 units, and the side in pixels."""

    mean: Triple
    std: Triple
    size: int


def teacher_input(
    spec: recipes.Teacher, data: recipes.Data, model: nn.Module | None = None, *, given: bool = False
) -> TeacherInput:
    """What a recipe's teacher is shown.

    Args:
        spec: the recipe's entry.
        data: its data section.
        model: the network, if there is one; without it only names and files are asked.
        given: whether it was passed as an object, of which no file says anything.
    """
    mean, std = data.normalization
    own = (None if given else _saved_by_run(spec)) or own_input(spec.model, spec.weights, model, given=given)
    size = data.size
    if own is not None and own.size and own.binding:
        size = own.size
    elif own is None and built_size(model):
        size = built_size(model)
    found = TeacherInput(
        spec.mean or (own.mean if own else mean), spec.std or (own.std if own else std), spec.size or size
    )
    if model is not None and own is not None and (found.mean, found.std) != (mean, std) and spec.mean is None:
        log.info("teachers[%s]: normalized by mean %s, std %s, as %s says", spec.name, own.mean, own.std, own.source)
    elif given and spec.mean is None and own is None:
        log.info("teachers[%s]: normalized by the data's mean %s, std %s: it names none", spec.name, mean, std)
    if model is not None and found.size != data.size:
        log.info("teachers[%s]: images are resized from %d to its %d px", spec.name, data.size, found.size)
    return found


def _saved_by_run(spec: recipes.Teacher) -> OwnInput | None:
    """The input of the run that saved a weights file, if its folder says that it was this network."""
    file = Path(spec.weights)
    held = file.parent / RECIPE
    if not spec.weights or file.name not in ("student.pt", BRANCH) or not held.is_file():
        return None
    try:
        if held.stat().st_size > MAX_RECIPE_BYTES:
            return None
        tree = json.loads(held.read_bytes())
        data = recipes.Data.model_validate(tree["data"])
        model = tree["student"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not a run's: the weights are just a file
        return None
    if model != spec.model:
        return None
    return OwnInput(*data.normalization, data.size, True, f"run {file.parent}")
