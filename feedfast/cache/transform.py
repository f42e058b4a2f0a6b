"""What happens to a map between network and codec, and to the student's map before the loss.

The offline stage, live teachers and the audit apply the same transform, so they mean the same target. Kinds that come
later (a factor transfer's factors, sampled positions, pooling) change shapes, and some act on the student's side too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feedfast.cache.schema import TapInfo


@dataclass(frozen=True)
class Transform:
    """A tap's transform, elementwise; a factor tap's values are already factors, and nothing more happens to them.

    Attributes:
        kind: ``"none"``, or ``"margin"``: values below OFD's margin become the margin, which its loss does anyway.
        margin: per channel, for ``"margin"``.
    """

    kind: Literal["none", "margin"] = "none"
    margin: tuple[float, ...] | None = None

    def floor(self, device: torch.device) -> Tensor | None:
        """fp32 [C], below which no value stays; None without a margin. Encoders apply it in their own pass."""
        if self.kind == "none" or self.margin is None:
            return None
        return torch.tensor(self.margin, device=device)

    def teacher(self, values: Tensor) -> Tensor:
        """The teacher's map [n, C] or [B, C, H, W] as it is encoded."""
        floor = self.floor(values.device)
        return values if floor is None else torch.maximum(values, floor.view(1, -1, *[1] * (values.dim() - 2)))


def transform_of(info: TapInfo) -> Transform:
    """The transform of a stored tap."""
    return Transform() if info.transform == "factor" else Transform(info.transform, info.margin)
