"""Start the ranks of a job as torchrun would: one process each, with its variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def start_ranks(arguments: Sequence[object], world: int = 2) -> list[subprocess.Popen[str]]:
    """``python ARGUMENTS`` once per rank, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = []
    for rank in range(world):
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **{key: str(value) for key, value in own.items()}}
        command = [sys.executable, *map(str, arguments)]
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return jobs


def end_ranks(jobs: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """What each left behind, by rank; one that does not end within ``timeout`` seconds fails the test, and all end."""
    try:
        said = [job.communicate(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [
        subprocess.CompletedProcess(job.args, job.returncode, *texts) for job, texts in zip(jobs, said, strict=True)
    ]


def run_ranks(
    arguments: Sequence[object], world: int = 2, timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """``python ARGUMENTS`` once per rank; what each left behind, by rank."""
    return end_ranks(start_ranks(arguments, world), timeout)
