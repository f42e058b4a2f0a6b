"""Accelerate and DDP need nothing of their own: the distiller in a prepared loop, and in one process per rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distilled_ddp import train
from own_loop import BATCH, OFD, own_loop, sgd, student
from ranks import run_ranks

import feedfast
from feedfast.recipe import Recipe
from feedfast.stages.open_cache import OpenedCache

HELPERS = Path(__file__).parents[1] / "helpers"


def test_a_prepared_loop_has_the_losses_of_a_plain_one(cache: OpenedCache) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    network, other = student(), student()
    expected = own_loop(cache, other, OFD, epochs=1)
    distiller = feedfast.distiller(cache, network, OFD, seed=42)
    model, optimizer = accelerator.prepare(network, sgd([*network.parameters(), *distiller.parameters()]))
    found = []
    for batch in cache.epochs(BATCH, device=accelerator.device, taps=distiller.taps):
        loss = distiller(model(batch.images), batch)["loss"]
        accelerator.backward(loss)
        distiller.average_gradients()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == expected


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does(cache: OpenedCache, recipe: Recipe, tmp_path: Path) -> None:
    """Student and adapters alike; batch norms are frozen, whose statistics are each rank's own otherwise."""
    done = run_ranks([HELPERS / "distilled_ddp.py", recipe.cache.path, tmp_path])
    assert [job.returncode for job in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = train(cache, lambda network: network, rows=32)
    assert set(alone) == {"student", "adapters"}
    for part, weights in alone.items():
        assert torch.allclose(torch.tensor(first[part]), torch.tensor(weights), rtol=1e-4, atol=1e-5), part
    start = torch.cat([weight.detach().flatten() for weight in student().parameters()])
    assert not torch.allclose(torch.tensor(alone["student"]), start, atol=1e-3), "it has learned"
