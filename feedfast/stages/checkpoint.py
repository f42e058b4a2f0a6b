"""One file that lets a run continue as if it had never stopped: ``checkpoint.pt``.

It holds tensors, numbers and one word, and is read with ``weights_only=True``: a checkpoint from somebody else cannot
run code. A kill leaves the old one or the new one. The student, the adapters and the optimizer are in it; data pipeline
and random numbers are not, because both are pure functions of the step. It names the run it is of, its members have
checksums that are compared before anything is loaded, and nothing that is not finite gets into it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feedfast.errors import FeedfastError
from feedfast.files import check_zip, replace_file

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(
    out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer, step: int, run: str
) -> None:
    """Write ``out/checkpoint.pt`` durably; ``run`` names the run it is of.

    Raises:
        FeedfastError: as `write_state`.
    """
    state: dict[str, Any] = {
        "step": step,
        "run": run,
        "student": student.state_dict(),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_state(out / CHECKPOINT, state)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """A mapping of tensors and numbers as ``torch.save`` writes it, durably: a kill leaves the old file or the new.

    Raises:
        FeedfastError: a value is NaN or infinite, or the disk is full; the old file is as it was.
    """
    require_finite(path, state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, [buffer.getbuffer()])


def require_finite(where: Path | str, state: Mapping[str, Any]) -> None:
    """Raise unless every number of a nested state is finite.

    Raises:
        FeedfastError: ``where`` begins the message, which names the first value that is not.
    """
    for name, value in _leaves("", state):
        sound = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else value - value == 0
        if not sound:
            raise FeedfastError(
                f"{where}: expected finite values to save, found NaN or infinity in {name}; what was saved before "
                "stays as it is; lower train.lr, train.weight_decay or the method's weight"
            )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | float]]:
    """Every tensor and float of a nested state with its dotted name."""
    if isinstance(value, Tensor | float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(f"{name}.{number}", item)


def _require_run(found: object, run: str) -> None:
    if found != run:
        raise ValueError(f"of run {str(found)[:16]!r}, expected {run!r}")


def load_checkpoint(
    out: Path, student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer, total: int, run: str
) -> int:
    """Restore everything `save_checkpoint` wrote; returns the step to continue at.

    Hyperparameters stay those of ``optimizer``: they follow from the recipe.

    Args:
        out: the run's folder.
        student: receives its weights.
        method: receives its weights.
        optimizer: receives its state.
        total: steps of the run.
        run: its name.

    Raises:
        FeedfastError: the file is damaged, or of another run or other networks.
    """
    path = out / CHECKPOINT
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _require_run(state["run"], run)
        step = state["step"]
        if type(step) is not int or not 0 <= step <= total:
            raise ValueError(f"step: expected 0 to {total}, found {step!r}")  # noqa: TRY301
        _refuse_not_finite(state)
        student.load_state_dict(state["student"])
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        _refuse_odd_state(optimizer)
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FeedfastError(
            f"{path}: expected a checkpoint of this run, found a damaged or foreign file ({first}); "
            "overwrite=true starts afresh"
        ) from error
    return step


def _refuse_odd_state(optimizer: torch.optim.Optimizer) -> None:
    """What an optimizer keeps per parameter: torch believes whatever a file says of it, until its next step."""
    adam = isinstance(optimizer, torch.optim.AdamW)
    names = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    for parameter, kept in optimizer.state.items():
        found = set(kept) if isinstance(kept, dict) else {type(kept).__name__}
        if not isinstance(parameter, Tensor) or found - names or (adam and names - found):
            raise ValueError(f"optimizer: expected {sorted(names)} of every parameter, found {sorted(map(str, found))}")
        for name, value in kept.items():
            shape = torch.Size([]) if name == "step" else parameter.shape
            fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
            if not fits and (adam or value is not None):  # momentum begins with None
                raise ValueError(f"optimizer: {name}: expected a tensor of {list(shape)}, found another")


def _refuse_not_finite(tree: Any, key: str = "") -> None:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            _refuse_not_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, Tensor):
        if tree.layout != torch.strided or tree.is_meta or tree.is_quantized:
            raise ValueError(f"{key}: expected a plain tensor, found {tree.layout} on {tree.device}, {tree.dtype}")
        if tree.is_floating_point() and not bool(tree.isfinite().all()):
            raise ValueError(f"{key}: expected finite values")
