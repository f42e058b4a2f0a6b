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

from feedfast.data.batch import Batch
from feedfast.data.dataset import Dataset
from feedfast.errors import FeedfastError
from feedfast.methods import TapInfo
from feedfast.methods.base import matching
from feedfast.models.normalize import Normalize
from feedfast.recipe import Recipe
from feedfast.stages.trainee import (
    Entry,
    Trainee,
    build_methods,
    build_student,
    names_of,
    needs_of,
    student_needs_of,
    tap_student,
)
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
) -> float | None:
    """Median milliseconds of a step; None where the recipe cannot be trained, or reads what nobody computes here.

    Args:
        recipe: whose student, task and optimizer.
        data: the training images.
        entries: the recipe's methods.
        taps: teacher → tap → shape and margin, of the teachers' own taps.
        batch: on the device, with the targets of these taps.
        device: where it is trained.
    """
    needs = needs_of(entries)
    if not data.classes or any(not matching((need,), infos) for infos in taps.values() for need in needs):
        return None
    read = {name: matching(needs, infos) for name, infos in taps.items()} if needs else {}
    infos = {name: {tap: taps[name][tap] for tap in taps[name] if tap in some} for name, some in read.items()}
    targets = {name: {tap: batch.targets[name][tap] for tap in some} for name, some in infos.items()}
    try:
        trainee = _built(recipe, data, entries, infos, batch, device)
    except FeedfastError as error:
        log.debug("plan: no step of %s: %s", names_of(entries), error)
        return None
    weights = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    train = recipe.train
    optimizer = torch.optim.SGD(weights, 1e-9, 0.9) if train.optimizer == "sgd" else torch.optim.AdamW(weights, 1e-9)
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


def _built(
    recipe: Recipe,
    data: Dataset,
    entries: Sequence[Entry],
    taps: Mapping[str, Mapping[str, TapInfo]],
    batch: Batch,
    device: torch.device,
) -> Trainee:
    memory = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    student = build_student(recipe.student.model_copy(update={"weights": None}), len(data.classes), recipe.train_seed)
    student = student.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    normalize = Normalize(*recipe.data.normalization).to(device)
    task = task_named(recipe.task.name, len(data.classes), recipe.data.val_size or recipe.data.size)
    example = normalize(batch.images[:2])
    tapped = tap_student(student, student_needs_of(entries), example, task, f"student {recipe.student.model}")
    samples = torch.from_numpy(data.ids.astype(np.int64)), torch.from_numpy(data.labels.astype(np.int64))
    methods = build_methods(entries, tapped.shapes, taps, tapped.outputs, recipe.train_seed, samples)
    methods = methods.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    return Trainee(normalize, tapped, task, methods, entries, recipe.task.weight).train()
