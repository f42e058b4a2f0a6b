"""What happens to a map between network and codec, and to the student's map before the loss.

The offline stage, live teachers and the audit apply the same transform, so they mean the same target. Kinds that come
later (pooling) change shapes, and some act on the student's side too.
Which positions of a map are stored is no transform of its values: `feedfast.stages.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feedfast.storage.schema import TapInfo


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
        return floored(values, self.floor(values.device))


def floored(values: Tensor, floor_C: Tensor | None) -> Tensor:
    """A map [n, C] or [B, C, H, W] with no value below its channel's floor; None leaves it as it is."""
    return values if floor_C is None else torch.maximum(values, floor_C.view(1, -1, *[1] * (values.dim() - 2)))


def transform_of(info: TapInfo) -> Transform:
    """The transform of a stored tap."""
    return Transform() if info.transform == "factor" else Transform(info.transform, info.margin)
