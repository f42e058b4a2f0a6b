"""A process that has imported everything and does nothing: each input gets a fork of it, with limits, and is judged.

A fork is isolated (a crash, a leak or a hang of one input cannot touch the next) and costs milliseconds, where a
fresh interpreter costs seconds. The zygote itself never starts a thread, so its forks are sound; it must therefore not
be the test's own process.

Protocol, one JSON object per line. In: ``{"commands": [[word, ...], ...], "cwd": folder, "limit_s": seconds}``; the
commands run one after another in one fork. Out, the fork's fate: ``outcomes`` (per command ``code``, ``out``, ``err``,
``trace``), ``peak_mib`` (resident memory beyond what the fork started with), ``seconds``, ``died`` (signal, or "").
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

EXTRA_BYTES = 6 << 30  # of address space: keeps a runaway input from the machine; what counts is ``peak_mib``


def warm() -> None:
    """Import what the commands import."""
    for name in (
        "numpy.random", "nvidia.dali.fn", "nvidia.dali.pipeline", "torch.utils.tensorboard", "torch.utils.data",
        "torchvision.models", "feedfast.cli",
    ):  # fmt: skip
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    for stage in ("analyze", "catalog", "inspect", "offline", "plan", "student", "verify"):
        importlib.import_module(f"feedfast.stages.{stage}")


def run_command(words: list[str]) -> dict[str, Any]:
    """One command in this process: exit code, the ends of both streams, and the traceback if one escaped."""
    from feedfast.cli import main

    out, err, trace, code = io.StringIO(), io.StringIO(), "", 0
    sys.argv = ["feedfast", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            trace, code = traceback.format_exc(), 70
    if "Traceback (most recent call last)" in err.getvalue():
        trace = trace or err.getvalue()[-6000:]
    return {"code": code, "out": out.getvalue()[-20000:], "err": err.getvalue()[-20000:], "trace": trace[-6000:]}


def resident_mib(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def serve_one(job: dict[str, Any], answer: int) -> None:
    """In a fork: run a job's commands and write their outcomes to the descriptor ``answer``."""
    sink = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(sink, 2)  # what native code says, and faulthandler
    faulthandler.enable(file=sys.__stderr__)
    faulthandler.dump_traceback_later(job["limit_s"], exit=True, file=sys.__stderr__)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))  # 1 GiB: "begins to write" must end, too
    os.chdir(job["cwd"])
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the high-water mark of the parent
    before = resident_mib("VmRSS")
    outcomes = [run_command(words) for words in job["commands"]]
    data = json.dumps({"outcomes": outcomes, "peak_mib": resident_mib("VmHWM") - before}).encode()
    with os.fdopen(answer, "wb") as file:
        file.write(data)
    os._exit(0)  # no destructors: threads of pipelines may be running


def main() -> None:
    """Read jobs, fork, answer."""
    warm()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.setpgid(0, 0)
            try:
                serve_one(job, write)
            finally:
                os._exit(71)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            # a fork that hangs without holding the GIL's attention is ended by faulthandler's own thread
            data = file.read()
        status = os.waitpid(pid, 0)[1]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        seconds = time.perf_counter() - started
        died = ""
        if os.WIFSIGNALED(status):
            died = signal.Signals(os.WTERMSIG(status)).name
        elif os.WEXITSTATUS(status):
            died = f"exit {os.WEXITSTATUS(status)}" if seconds < job["limit_s"] else "hang"
        found = json.loads(data) if data else {"outcomes": [], "peak_mib": 0.0}
        if died:
            with open(job["stderr"], errors="replace") as file:
                found["native"] = file.read()[-6000:]
        print(json.dumps({**found, "seconds": seconds, "died": died}), flush=True)


if __name__ == "__main__":
    main()
