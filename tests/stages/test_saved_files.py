"""Checkpoints, weights and documents: no flipped bit is believed, and nothing that is not finite is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, write_sealed
from feedfast.models.build import load_weights
from feedfast.stages.checkpoint import load_checkpoint, save_checkpoint, write_state


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.line = nn.Linear(3, 2)


def small(seed: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    student, method = Small(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.1, momentum=0.9)
    (student.line(student.norm(torch.randn(4, 3))).sum() + method(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    return student, method, optimizer


def state_of(student: nn.Module, method: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    tensors = [*student.state_dict().values(), *method.state_dict().values()]
    tensors += [entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values()]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


def flipped_bits(content: bytes, count: int) -> list[bytes]:
    """Copies with one bit flipped each, spread over the whole."""
    made = []
    for at in np.random.default_rng(1).permutation(len(content) * 8)[:count].tolist():
        other = bytearray(content)
        other[at // 8] ^= 1 << at % 8
        made.append(bytes(other))
    return made


def test_no_flipped_bit_of_a_checkpoint_is_continued_from(tmp_path: Path) -> None:
    sound = small(1)
    save_checkpoint(tmp_path, *sound, 7, "this run")
    path, accounted = tmp_path / "checkpoint.pt", 0
    for content in flipped_bits(path.read_bytes(), 80):
        path.write_bytes(content)
        found = small(2)
        try:
            assert load_checkpoint(tmp_path, *found, 9, "this run") == 7
        except FeedfastError as why:
            accounted += str(path) in str(why)
        else:  # a date, a reserved field, padding
            assert state_of(*found) == state_of(*sound)
            accounted += 1
    assert accounted == 80


def test_no_flipped_bit_of_a_weights_file_is_loaded(tmp_path: Path) -> None:
    sound, path, accounted = small(1)[0], tmp_path / "w.pth", 0
    torch.save(sound.state_dict(), path)
    content = path.read_bytes()
    # Of a member's entry in the directory, the bit that makes it a folder: torch then returns memory as it found it.
    folder = bytearray(content)
    folder[content.rindex(b"w/data/3PK") - 8] ^= 0x10
    for other in [bytes(folder), *flipped_bits(content, 80)]:
        path.write_bytes(other)
        found = small(2)[0]
        try:
            load_weights(found, path)
        except RequestError as why:
            accounted += str(path) in str(why)
        else:
            assert all(torch.equal(value, sound.state_dict()[name]) for name, value in found.state_dict().items())
            accounted += 1
    assert accounted == 81


@pytest.mark.parametrize("value", [{"a": [1.5, None], "b": {"c": "é"}, "least": 5e-324}, {}])
def test_no_flipped_bit_of_a_sealed_document_is_believed(tmp_path: Path, value: dict[str, Any]) -> None:
    path = tmp_path / "d.json"
    write_sealed(path, value)
    content = path.read_bytes()
    assert json.dumps(read_sealed(path)) == json.dumps(value)
    for other in flipped_bits(content, 200):
        path.write_bytes(other)
        try:
            found = read_sealed(path)
        except ValueError:
            continue
        assert json.dumps(found) == json.dumps(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="checksum"):
        read_sealed(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["student", "method", "momentum", "statistics", "number"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, place: str, bad: float) -> None:
    student, method, optimizer = small(1)
    save_checkpoint(tmp_path, student, method, optimizer, 1, "run")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        if place == "student":
            student.line.weight[1, 2] = bad  # type: ignore[union-attr,index]
        elif place == "method":
            method.bias[0] = bad  # type: ignore[index,operator]
        elif place == "statistics":
            student.norm.running_var[1] = bad  # type: ignore[union-attr,index]
        elif place == "number":
            optimizer.param_groups[0]["lr"] = bad
        else:
            next(iter(optimizer.state.values()))["momentum_buffer"].view(-1)[0] = bad
    with pytest.raises(FeedfastError, match=r"checkpoint\.pt: expected finite values"):
        save_checkpoint(tmp_path, student, method, optimizer, 2, "run")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_write_state_takes_what_is_finite(tmp_path: Path) -> None:
    state = {"a": torch.ones(2, dtype=torch.int64), "b": [torch.zeros(1)], "c": {"d": 1e300}, "e": True, "f": None}
    write_state(tmp_path / "s.pt", state)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["c"] == {"d": 1e300}
