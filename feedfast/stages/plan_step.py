"""A whole step of a recipe's student on one batch, timed: network, task, methods with their adapters, optimizer.

The network alone is not what a run takes: `ofd`'s connectors or `kd`'s softmaxes come on top. Targets are a batch's
real codes, as a cache would serve them, so what the losses decode is timed, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import nn

from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset
from feedfast.errors import FeedfastError
from feedfast.methods import TapInfo
from feedfast.methods.base import matching
from feedfast.models.given import copied
from feedfast.models.normalize import Normalize
from feedfast.recipe import Recipe
from feedfast.stages.trainee import Entry, build_student, build_trainee, names_of, needs_of, optimizer_of
from feedfast.tasks import task_named

log = logging.getLogger(__name__)

STEPS: Final = 3  # after one that warms up


def step_ms(
    recipe: Recipe,
    data: Dataset,
    entries: Sequence[Entry],
    taps: Mapping[str, Mapping[str, TapInfo]],
    batch: Batch,
    device: torch.device,
    given: nn.Module | None = None,
) -> float | None:
    """Median milliseconds of a step; None where the recipe cannot be trained, or reads what nobody computes here.

    Args:
        recipe: whose student, task and optimizer.
        data: the training images.
        entries: the recipe's methods.
        taps: teacher → tap → shape and margin, of the teachers' own taps.
        batch: on the device, with the targets of these taps.
        device: where it is trained.
        given: the student, if it was passed as an object; it is copied.
    """
    needs = needs_of(entries)
    if not data.classes or any(not matching((need,), infos) for infos in taps.values() for need in needs):
        return None
    read = {name: matching(needs, infos) for name, infos in taps.items()} if needs else {}
    infos = {name: {tap: taps[name][tap] for tap in taps[name] if tap in some} for name, some in read.items()}
    targets = {name: {tap: batch.targets[name][tap] for tap in some} for name, some in infos.items()}
    classes, train = len(data.classes), recipe.train
    try:
        asked, own = (
            recipe.student.model_copy(update={"weights": None}),
            None if given is None else copied(given, "student"),
        )
        student = build_student(asked, classes, recipe.train_seed, own)
        task = task_named(recipe.task.name, classes, recipe.data.val_size or recipe.data.size)
        normalize = Normalize(*recipe.data.normalization).to(device)
        trainee = build_trainee(recipe, student, entries, infos, data, normalize, task, device).train()
    except FeedfastError as error:
        log.debug("plan: no step of %s: %s", names_of(entries), error)
        return None
    optimizer = optimizer_of(train, trainee)
    times = []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = trainee(batch.images, targets, batch.annotations, 0.0, batch.ids)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times[1:]))
