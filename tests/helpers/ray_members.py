"""A member of a crew that writes down what it does: importable by name in an actor, and quickly (no torch)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from feedfast.errors import FeedfastError, RequestError


class Scribe:
    """Its items are numbers. Some kill it, some it refuses; while there is a file ``unborn``, it dies as it starts."""

    def __init__(self, folder: str, deadly: frozenset[int], refused: frozenset[int], slot: int, lives: int) -> None:
        self.folder, self.deadly, self.refused, self.slot = Path(folder), deadly, refused, slot
        if (self.folder / "unborn").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self.note(f"ready {os.getpid()} {slot} {lives}")
        self.stopped = False

    def note(self, line: str) -> None:
        with (self.folder / "notes").open("a") as file:
            file.write(line + "\n")

    def work(self, items: Sequence[int], again: bool) -> Iterator[tuple[int, int]]:
        for item in items:
            if self.stopped:
                return
            self.note(f"begun {item} {int(again)} {len(items)}")
            if item in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if item in self.refused:
                raise RequestError(f"item {item}: expected another one")
            time.sleep(0.02)
            self.note(f"done {item}")
            yield item, self.slot

    def stop(self) -> None:
        self.stopped = True

    def told(self, text: str) -> str:
        if text == "bad":
            raise FeedfastError("the job failed")
        return f"{text}, {self.slot}"

    def close(self) -> None:
        self.note(f"closed {self.slot}")
