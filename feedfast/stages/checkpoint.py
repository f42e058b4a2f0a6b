"""One file that lets a run continue as if it had never stopped: ``checkpoint.pt``.

It holds tensors and numbers only and is read with ``weights_only=True``: a checkpoint from somebody else cannot run
code. A kill leaves the old one or the new one. The student, the adapters and the optimizer are in it; data pipeline
and random numbers are not, because both are pure functions of the step.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedfast.errors import FeedfastError
from feedfast.files import replace_file

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(
    out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write ``out/checkpoint.pt`` durably."""
    state: dict[str, Any] = {
        "step": step,
        "student": student.state_dict(),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_state(out / CHECKPOINT, state)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """A mapping of tensors and numbers as ``torch.save`` writes it, durably: a kill leaves the old file or the new."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, [buffer.getbuffer()])


def load_checkpoint(out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore everything `save_checkpoint` wrote; returns the step to continue at.

    Raises:
        FeedfastError: the file is damaged or belongs to other networks.
    """
    path = out / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        student.load_state_dict(state["student"])
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FeedfastError(
            f"{path}: expected a checkpoint of this run, found a damaged or foreign file ({first}); "
            "overwrite=true starts afresh"
        ) from error
