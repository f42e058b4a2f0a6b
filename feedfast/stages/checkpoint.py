"""One file that lets a run continue as if it had never stopped: ``checkpoint.pt``.

It holds tensors and numbers only and is read with ``weights_only=True``: a checkpoint from somebody else cannot run
code. It is written beside its name, synced and renamed, so a kill leaves the old one or the new one. The student,
the adapters, the optimizer and the random state of torch are in it; the data pipeline is not, because it is a pure
function of the step.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedfast.errors import FeedfastError
from feedfast.stages.common import write_durably

NAME = "checkpoint.pt"


def save_checkpoint(
    out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write ``out/checkpoint.pt`` durably."""
    state: dict[str, Any] = {
        "step": step,
        "student": student.state_dict(),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_durably(out / NAME, buffer.getvalue())


def load_checkpoint(out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore everything `save_checkpoint` wrote; returns the step to continue at.

    Raises:
        FeedfastError: the file is damaged or belongs to other networks.
    """
    path = out / NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        student.load_state_dict(state["student"])
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return int(state["step"])
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FeedfastError(
            f"{path}: expected a checkpoint of this run, found a damaged or foreign file ({first}); "
            "overwrite=true starts afresh"
        ) from error
