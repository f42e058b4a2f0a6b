"""Two ranks or more, of which one fails while others wait for it: ``failing_rank.py KIND``, RANK in the environment.

Ends like the command line: one ``error:`` line from the rank that failed first, exit code 1 from all.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from feedfast.errors import FeedfastError, PeerFailedError, RequestError
from feedfast.stages import peers
from feedfast.stages.worker import Worker

FAILS = {"both": (0, 1), "second": (1,), "first": (0,), "stuck": (1,)}
DIES = {"first killed": 0, "second killed": 1}


def main(kind: str) -> int:
    worker = Worker.from_env()

    def device() -> torch.device:
        if kind == "device" and worker.rank == 1:
            raise RequestError("rank 1 is broken")
        return torch.device("cpu")

    if kind == "stuck":
        peers.PATIENCE_S = 1.0
    try:
        with worker.process_group(device):
            dist.all_reduce(torch.ones(1))
            if kind == "stuck":  # this keeps the group, and so its connections, beyond its end
                torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
            if DIES.get(kind) == worker.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            if worker.rank in FAILS.get(kind, ()):
                raise RequestError(f"rank {worker.rank} is broken")
            dist.all_reduce(torch.ones(1))
    except PeerFailedError:
        return 1
    except FeedfastError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if kind == "stuck":
            time.sleep(600)  # until the test ends it
        return 1
    assert not dist.is_initialized()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
