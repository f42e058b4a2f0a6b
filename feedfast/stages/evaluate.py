"""Evaluation of the bare student on validation images: every rank takes its share, the counts are added up."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from feedfast.data.loader import Loader
from feedfast.stages.worker import Worker

BATCH = 256


@torch.no_grad()
def evaluate(
    student: nn.Module, normalize: nn.Module, loader: Loader, worker: Worker, *, autocast: bool = False
) -> float | None:
    """Top-1 accuracy on all images of ``loader``, the same on every rank.

    Args:
        student: the bare network; left in evaluation mode.
        normalize: uint8 pixels [B, H, W, 3] → what the network takes.
        loader: validation images.
        worker: this rank; ranks take images in turn.
        autocast: compute in bfloat16 where torch does so safely.

    Returns:
        Share of the labeled images, 0..1; None if there are none.
    """
    student.eval()
    if worker.world > 1:
        # DDP copies the first rank's batch statistics to the others before a step, not after the last one.
        for buffer in student.buffers():
            dist.broadcast(buffer, 0)
    counts = torch.zeros(2, dtype=torch.int64, device=loader.device)  # right, labeled
    mine = np.arange(worker.rank, len(loader.dataset), worker.world)
    for batch in loader.evaluation(mine):
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=autocast):
            logits = student(normalize(batch.images))
        labeled = batch.labels >= 0
        counts[0] += ((logits.argmax(1) == batch.labels) & labeled).sum()
        counts[1] += labeled.sum()
    if worker.world > 1:
        dist.all_reduce(counts)
    right, total = counts.tolist()
    return right / total if total else None
