"""Two ranks, the second of which fails while the first waits for it: ``failing_rank.py KIND``, RANK in the environment.

Ends like the command line: one ``error:`` line from the rank that failed first, exit code 1 from both.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from feedfast.errors import FeedfastError, PeerFailedError, RequestError
from feedfast.stages.worker import Worker


def main(kind: str) -> int:
    worker = Worker.from_env()
    try:
        with worker.process_group(torch.device("cpu")):
            dist.all_reduce(torch.ones(1))
            if kind == "both" or (kind == "second" and worker.rank == 1) or (kind == "first" and worker.rank == 0):
                raise RequestError(f"rank {worker.rank} is broken")
            dist.all_reduce(torch.ones(1))
    except PeerFailedError:
        return 1
    except FeedfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert not dist.is_initialized()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
