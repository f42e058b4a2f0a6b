"""One batch: what the loader makes, a source completes with targets, and every training loop receives.

The product's own trainer and `feedfast.open_cache(...)` hand out the same class. It moves as PyTorch, Lightning and
Accelerate expect (``batch.to(device)``), and pickles, so that DataLoader workers can send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def moved(value: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """``value`` on ``device``: what has ``to``, and lists, tuples and mappings of it; all else as it is."""
    if hasattr(value, "to"):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        return {key: moved(entry, device, non_blocking) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(entry, device, non_blocking) for entry in value)
    return value


@dataclass(eq=False)
class Batch:
    """One batch; its memory is the consumer's and stays valid when the next batch is made.

    Attributes:
        images: uint8 [B, H, W, 3] RGB as decoded; or float32 [B, 3, H, W], normalized, with channels-last strides.
        annotations: what the task learns from: for classification int64 [B] class numbers, -1 where there is none, or
            `MixedLabels`; for segmentation int64 [B, S, S]; for detection a list of a dict per image. In evaluation, of
            segmentation and detection, a list of each image's truth.
        targets: teacher → tap → `feedfast_kernels.Codes` or a float map; empty without teachers.
        ids: uint32 [B], sample ids.
        rows: int64 [B], positions in the view's order (for evaluation: in id order).
        view: which view, -1 for evaluation.
    """

    images: Tensor
    annotations: Any
    ids: NDArray[np.uint32]
    rows: NDArray[np.int64]
    view: int
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """The annotations of a classification batch, int64 [B]."""
        if not isinstance(self.annotations, Tensor):
            raise TypeError(f"labels: this batch is annotated with {type(self.annotations).__name__}")
        return self.annotations

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``; ``ids`` and ``rows`` stay NumPy arrays."""

        images, annotations, targets = moved((self.images, self.annotations, self.targets), device, non_blocking)
        return replace(self, images=images, annotations=annotations, targets=targets)

    def __repr__(self) -> str:
        taps = {teacher: list(taps) for teacher, taps in self.targets.items()}
        shape, kind = list(self.images.shape), str(self.images.dtype).removeprefix("torch.")
        return f"Batch({len(self)} rows of view {self.view}, images {kind} {shape}, targets {taps})"
