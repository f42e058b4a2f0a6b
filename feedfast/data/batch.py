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


@dataclass(eq=False)
class Batch:
    """One batch; its memory is the consumer's and stays valid when the next batch is made.

    Attributes:
        images: uint8 [B, H, W, 3] RGB as decoded; or float32 [B, 3, H, W], normalized, with channels-last strides.
        annotations: what the task learns from; for classification int64 [B] class numbers, -1 where there is none.
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

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value

        targets = {
            teacher: {tap: moved(value) for tap, value in taps.items()} for teacher, taps in self.targets.items()
        }
        return replace(self, images=moved(self.images), annotations=moved(self.annotations), targets=targets)

    def __repr__(self) -> str:
        taps = {teacher: list(taps) for teacher, taps in self.targets.items()}
        shape, kind = list(self.images.shape), str(self.images.dtype).removeprefix("torch.")
        return f"Batch({len(self)} rows of view {self.view}, images {kind} {shape}, targets {taps})"
