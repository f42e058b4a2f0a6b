"""Accelerate needs nothing of its own: the distiller in a prepared loop."""

from __future__ import annotations

import pytest
from own_loop import BATCH, OFD, own_loop, sgd, student

import feedfast
from feedfast.stages.open_cache import OpenedCache


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
