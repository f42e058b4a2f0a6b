"""A training loop as anybody writes it, which other people's trainers are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import feedfast
from feedfast.models.build import build_model
from feedfast.stages.open_cache import OpenedCache

BATCH, LR = 32, 0.02
OFD = {"name": "ofd", "alpha": 1e-3}


def student() -> nn.Module:
    """The same start each time."""
    return build_model("zoo/wrn-10-1", num_classes=10, weights=None, seed=3)


def sgd(parameters: Any) -> torch.optim.SGD:
    """Everybody's optimizer here."""
    return torch.optim.SGD(parameters, LR, momentum=0.9)


def own_loop(cache: OpenedCache, network: nn.Module, method: Any, epochs: int) -> list[float]:
    """Train ``network`` and return the loss of every step."""
    distiller = feedfast.distiller(cache, network, method, seed=42)
    optimizer = sgd([*network.parameters(), *distiller.parameters()])
    loader = cache.epochs(BATCH, taps=distiller.taps)
    losses: list[float] = []
    network.train()
    for _ in range(epochs):
        for batch in loader:
            loss = distiller(network(batch.images), batch, progress=len(losses) / (epochs * len(loader)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    distiller.remove()
    return losses


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Equal but for the roundings of a few steps."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5) for a, b in pairs)
