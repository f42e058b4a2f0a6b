"""Evaluation of the bare student on validation images: every rank takes its share, the counts are added up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from feedfast.data.loader import Loader
from feedfast.models.taps import logits_of
from feedfast.stages.worker import Worker
from feedfast.tasks import Task

BATCH = 256


@torch.no_grad()
def evaluate(
    student: nn.Module, normalize: nn.Module, loader: Loader, task: Task, worker: Worker, *, autocast: bool = False
) -> dict[str, float | None]:
    """The task's metric on all images of ``loader``, the same on every rank.

    Args:
        student: the bare network; left in evaluation mode.
        normalize: uint8 pixels [B, H, W, 3] → what the network takes.
        loader: validation images.
        task: what the student has learned.
        worker: this rank; ranks take images in turn.
        autocast: compute in bfloat16 where torch does so safely.

    Returns:
        What the metric computes, by name.
    """
    student.eval()
    if worker.world > 1:
        # DDP copies the first rank's batch statistics to the others before a step, not after the last one.
        for buffer in student.buffers():
            dist.broadcast(buffer, 0)
    metric = task.metric()
    mine = np.arange(worker.rank, len(loader.dataset), worker.world)
    for batch in loader.evaluation(mine):
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=autocast):
            output = logits_of(student(normalize(batch.images)))
        metric.update(output, batch.annotations)
    if worker.world > 1:
        states: list[Any] = [None] * worker.world
        dist.all_gather_object(states, metric.state())
        metric.merge(states)
    return metric.compute()
