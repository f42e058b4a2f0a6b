"""A DDP loop of somebody else's, one process per rank: ``ddp_loop.py CACHE OUT``.

No rank or world size is passed to feedfast. Each rank writes ``OUT/RANK.json``: the sample ids it was given by epoch,
and its weights after training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import feedfast
from feedfast_kernels import as_float, ensemble_kl


def main(path: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # DDP makes the starts equal
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = feedfast.open_cache(path).epochs(batch_size=16, taps={"a": "logits"})
    epochs = []
    for _ in range(2):
        ids: list[int] = []
        for batch in loader:
            ids += batch.ids.tolist()
            loss = ensemble_kl(model(batch.images.contiguous()), [as_float(batch.targets["a"]["logits"])], tau=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epochs.append(ids)
    weights = [value.flatten().tolist() for value in model.module.state_dict().values()]
    out.joinpath(f"{rank}.json").write_text(json.dumps({"ids": epochs, "weights": weights, "steps": len(loader)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
