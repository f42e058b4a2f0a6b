"""Two ranks with half a batch each learn what one process does, whoever drives them: student and adapters alike.

Batch norms are frozen, whose statistics are each rank's own otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilled_ddp import train
from own_loop import student
from ranks import run_ranks

from feedfast.recipe import Recipe
from feedfast.stages.open_cache import OpenedCache

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(cache: OpenedCache) -> dict[str, torch.Tensor]:
    """Weights of student and adapters after an epoch of one process."""
    found = {part: torch.tensor(values) for part, values in train(cache, lambda network: network, rows=32).items()}
    start = torch.cat([weight.detach().flatten() for weight in student().parameters()])
    assert not torch.allclose(found["student"], start, atol=1e-3), "it has learned"
    assert len(found["adapters"]) > 0
    return found


def ranks(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """What each of two wrote."""
    done = run_ranks([*arguments, folder])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def equal_weights(found: list[dict[str, Any]], alone: dict[str, torch.Tensor]) -> None:
    """All ranks have those of the one process."""
    for part, weights in alone.items():
        assert found[0][part] == found[1][part]
        assert torch.allclose(torch.tensor(found[0][part]), weights, rtol=1e-4, atol=1e-5), part


def test_a_ddp_loop(recipe: Recipe, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    equal_weights(ranks(tmp_path, HELPERS / "distilled_ddp.py", recipe.cache.path), alone)


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_a_trainer(recipe: Recipe, tmp_path: Path, alone: dict[str, torch.Tensor], trainer: str) -> None:
    pytest.importorskip(trainer)
    val = recipe.data.val[0]
    found = ranks(tmp_path, HELPERS / "trained_by.py", trainer, recipe.cache.path, val)
    equal_weights(found, alone)
    ids = [set(one["ids"]) for one in found]
    assert [len(own) for own in ids] == [96, 96], "six steps of 16 rows each"
    assert not ids[0] & ids[1]
    labels = np.load(val)["labels"].tolist()
    assert found[0]["seen"] == found[1]["seen"] == len(labels), "each once, over both"
    assert found[0].get("labels", labels) == labels, "what is gathered is in order"
    assert found[0]["accuracy"] == found[1]["accuracy"]
