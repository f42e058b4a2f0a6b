"""Kill a writer at chosen system calls, run it again, and compare with a run nobody touched.

Run as a program: ``kill_writer.py FOLDER EVERY``. Each run is a forked child, killed by SIGKILL inside its k-th call
of write, fsync, rename or truncate, after half of the bytes in the case of a write; k takes every EVERY-th value
until a run ends unharmed. A resumed run is killed once more now and then. The last line of stdout is a JSON list of
[k, digest equal and nothing amiss meanwhile, bytes equal].
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_samples import fill_cache, make_manifest, make_tap, make_teacher, object_path, objects

from feedfast.storage.log import cache_digest, read_log

MANIFEST = make_manifest(make_teacher("a", make_tap("final"), make_tap("zip", compression="zstd")), rows=70)


def die_at(call: int) -> None:
    """Let the ``call``-th system call of this process be its last."""
    counter, lock = itertools.count(1), threading.Lock()

    def last(half: Callable[..., Any] | None, *args: Any) -> None:
        with lock:
            if next(counter) == call:
                if half:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)

    writev, rename = os.writev, os.rename

    def half_writev(fd: int, buffers: list[Any]) -> None:
        writev(fd, [buffers[0][: len(buffers[0]) // 2]])

    def wrap(name: str, half: Callable[..., Any] | None = None) -> None:
        real = getattr(os, name)

        def patched(*args: Any) -> Any:
            last(half, *args)
            return real(*args)

        setattr(os, name, patched)

    wrap("writev", half_writev)
    wrap("fsync")
    wrap("rename", rename if call % 2 else None)  # killed before it, or between it and what follows
    wrap("ftruncate")


def child(path: Path, call: int | None) -> bool:
    """One run in a process of its own; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            if call is not None:
                die_at(call)
            fill_cache(path, MANIFEST)
        except BaseException as error:
            print(f"{path} at {call}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def believable(path: Path) -> bool:
    """Whether every logged object is there, whole, before anything is repaired."""
    found = read_log(path).commits.items()
    return all(hashlib.sha256(object_path(path, *key).read_bytes()).hexdigest() == line.sha256 for key, line in found)


def main(folder: Path, every: int) -> None:
    whole = folder / "whole"
    assert not child(whole, None)
    wanted, digest = objects(whole), cache_digest(whole)
    rows = []
    for call in itertools.count(1, every):
        path = folder / str(call)
        if not child(path, call):
            break
        sound = believable(path)
        if call % 5 == 0:
            child(path, 1 + call // 2)
            sound = sound and believable(path)
        child(path, None)
        left = [file.name for file in (path / "commits").glob(".tmp-*")]
        rows.append([call, cache_digest(path) == digest and sound and not left, objects(path) == wanted])
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
