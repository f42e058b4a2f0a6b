"""How ranks learn that one of them has failed: one job, one message, and nobody waits for the dead.

    rank 1: an error ─► its word in the store ─► message, end
    rank 0: in a collective ─► it breaks, or the watch hears the word and ends the process ─► no message

The word lies in the store through which the ranks have met; whoever writes it first speaks. Connections alone are not
enough: those of a rank that has failed stay open until its process is gone (a wrapped network keeps the group beyond
its end), and a collective waits for it for half an hour, which Python cannot interrupt. So each rank has a thread that
looks for the word.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from feedfast.errors import FeedfastError

FAILED = "feedfast/failed"
LOOK_S = 0.5
HEARD_WITHIN_S = 2.0  # the word may be a moment later in the store than the collective breaks
PATIENCE_S = 15.0  # to get out of a collective, and to close what is open, after the word was heard
STAY_S = 3.0  # who keeps the store waits that long for those who have not heard yet

_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


class Peers:
    """The other ranks of a job, as one sees them that may fail; from the moment they have met until `leave`."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        """Begin to listen. ``store``: torch's, of these ranks."""
        self._rank, self._world, self._store = rank, world, store
        self._heard, self._left = threading.Event(), threading.Event()
        # a connection of its own: a store's client serves one call at a time, and some calls wait
        self._watch = threading.Thread(target=self._look, args=(store.clone(),), name="feedfast-peers", daemon=True)
        self._watch.start()

    def fails_first(self, error: BaseException) -> bool:
        """Whether this rank's error is the job's; then it has been told to the others."""
        if not isinstance(error, FeedfastError):
            self._heard.wait(HEARD_WITHIN_S)
        try:
            if self._heard.is_set() or self._store.add(FAILED, 1) != 1:
                return False
            self._store.set(_heard_by(self._rank), "")
        except RuntimeError:  # rank 0, which keeps the store, is gone, and has said nothing: it would have stayed
            return isinstance(error, FeedfastError) or self._rank == 1
        return True

    def leave(self, *, failed: bool) -> None:
        """Listen no longer. Where the job has ``failed``, rank 0 stays until the others have heard of it."""
        if failed and self._rank == 0:
            others = [_heard_by(rank) for rank in range(1, self._world)]
            with contextlib.suppress(RuntimeError):
                self._store.wait(others, timedelta(seconds=STAY_S))
        self._left.set()
        self._watch.join(LOOK_S)

    def _look(self, store: Any) -> None:
        try:
            while not store.check([FAILED]):
                if self._left.wait(LOOK_S):
                    return
            self._heard.set()
            store.set(_heard_by(self._rank), "")
        except RuntimeError:  # the store is gone with rank 0
            pass
        if not self._left.wait(PATIENCE_S):
            os._exit(1)  # nothing is lost: what is durable is so already, and only a signal's end is saved


def is_broken(error: BaseException) -> bool:
    """Whether an error is that of a collective or a store whose other side is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _BROKEN.search(str(error)) is not None
    )


def _heard_by(rank: int) -> str:
    return f"feedfast/heard/{rank}"
