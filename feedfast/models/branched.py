"""A student of parallel branches: one stem, several bodies, their logits averaged.

Every branch is a network of the zoo whose first modules (its ``STEM``) are those of the first branch. So a branch can
be taken out as the plain network it is, and the whole costs one stem and ``branches`` bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError


class Branched(nn.Module):
    """Networks that share their stem.

    Args:
        networks: at least two of one kind and size; the stem of the first is kept, the others lose theirs.
        name: of the network, for messages.

    Modules: ``branches``, of which only the first has the modules of the stem.

    Raises:
        RequestError: a network that is not made of a stem and a body.
    """

    def __init__(self, networks: Sequence[nn.Module], name: str = "model") -> None:
        super().__init__()
        first = networks[0]
        if not hasattr(first, "STEM"):
            raise RequestError(
                f"student.branches: {name} has no known stem to share; expected a zoo network such as zoo/wrn-16-1 or "
                f"zoo/resnet-20, found {type(first).__name__}"
            )
        self.stem_names = cast("tuple[str, ...]", first.STEM)
        for network in networks[1:]:
            for part in self.stem_names:
                delattr(network, part)
        self.branches = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images ``[B, 3, H, W]`` → the mean of the branches' logits ``[B, num_classes]``."""
        return torch.stack(self.branch_logits(x)).mean(0)

    def branch_state(self, number: int) -> dict[str, Tensor]:
        """The state_dict of one branch as the plain network it is, stem first."""
        prefix = "branches.0."
        state = {
            key.removeprefix(prefix): value
            for key, value in self.state_dict().items()
            if key.startswith(tuple(f"{prefix}{part}." for part in self.stem_names))
        }
        return {**state, **self.branches[number].state_dict()}

    def branch_logits(self, x: Tensor) -> list[Tensor]:
        """The logits of each branch ``[B, num_classes]``."""
        shared = self.branches[0].forward_stem(x)  # type: ignore[operator]
        return [branch.forward_body(shared) for branch in self.branches]  # type: ignore[operator]
