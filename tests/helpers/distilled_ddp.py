"""A DDP loop with a distiller, one process per rank: ``distilled_ddp.py CACHE OUT`` writes ``OUT/RANK.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from own_loop import OFD, sgd, student
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import feedfast


def train(cache: Any, wrap: Callable[[nn.Module], nn.Module], rows: int) -> dict[str, list[float]]:
    """Weights of student and adapters after an epoch; ``rows`` per rank and step."""
    network = student().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    distiller = feedfast.distiller(cache, network, OFD).eval()
    model = wrap(network)
    optimizer = sgd([*network.parameters(), *distiller.parameters()])
    for batch in cache.epochs(rows, taps=distiller.taps):
        loss = distiller(model(batch.images), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        distiller.average_gradients()
        optimizer.step()
    distiller.remove()
    return weights(network, distiller)


def weights(student: nn.Module, adapters: nn.Module) -> dict[str, list[float]]:
    """All of them, by part."""
    parts = {"student": student, "adapters": adapters}
    return {name: [x for p in part.parameters() for x in p.flatten().tolist()] for name, part in parts.items()}


def main(path: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def wrap(network: nn.Module) -> nn.Module:
        made = DistributedDataParallel(network)
        return made.eval()  # as its network

    found = train(feedfast.open_cache(path, replay=0), wrap, rows=32 // dist.get_world_size())
    out.joinpath(f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
