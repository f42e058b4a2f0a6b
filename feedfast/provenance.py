"""Where a result is from: command, recipe, commit, versions, machine and times; of runs, caches and pages alike.

For people who ask a year later how this was made. Nothing compares it and no digest covers it: two runs of one recipe
differ in it by nature. Any room may import this module, as with `feedfast.errors`: caches, runs and pages hold the
same words. Machines are told apart by a hash of their name: caches are handed on, and names of machines are nobody
else's business. Of the environment only variables that change what is computed are kept (`ENVIRONMENT`), and logins
that stand in URLs, arguments or values are replaced by ``***`` (`redacted`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

PACKAGES: Final = (
    *(
        "feedfast",
        "torch",
        "torchvision",
        "triton",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "zarr",
        "numpy",
        "numcodecs",
        "pillow",
    ),
    *("pydantic", "safetensors", "timm", "obstore", "pyarrow", "ray"),
)
ENVIRONMENT: Final = re.compile(
    "(?:CUDA|CUBLAS|CUDNN|DALI|GOMP|KMP|MKL|NCCL|NVIDIA|OMP|OPENBLAS|PYTORCH|TORCH|TORCHINDUCTOR|TRITON|SLURM_JOB"
    "|SLURM_ARRAY)_[A-Z0-9_]+|PYTHONHASHSEED|LD_PRELOAD|MALLOC_[A-Z0-9_]+|RANK|LOCAL_RANK|WORLD_SIZE"
    "|JOB_COMPLETION_INDEX|JOB_COMPLETIONS"
)
_SECRET: Final = re.compile(
    "key|token|secret|passw|passphrase|credential|auth(?!or)|cookie|signature|(?<![a-z])(?:pw|pwd|sas|sig)(?![a-z])",
    re.IGNORECASE,
)
_SHORTEST_SECRET: Final = 12  # characters; shorter values are settings, and words of other texts
_NAMES = "(?:api[_-]?key|access[_-]?key(?:[_-]id)?|secret|token|password|passwd|credentials?|signature|sig)"
_LOGINS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(://)[^\s/@:'\"]*:[^\s/@'\"]*(?=@)",  # scheme://user:password@
        r"(https?://)[^\s/@'\"]+(?=@)",
        # as an option, in a query or in a variable: --api-key x, ?sig=x, AWS_SECRET_ACCESS_KEY=x
        rf"(--(?:[\w-]*-)?{_NAMES}(?:=|\s+)['\"]?)[^\s&'\"]+",
        rf"((?<![a-z0-9])(?:[\w-]*[_-])?{_NAMES}=['\"]?)[^\s&'\"]+",
    )
)
MAX_COMMAND: Final = 8192
_GIT_PATIENCE_S: Final = 5.0

Short = Annotated[str, Field(max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Part):
    """What ran it.

    Attributes:
        host: the first 12 hex digits of the sha256 of its name.
        system: operating system and architecture.
        cpu: the processor's name.
        cores: as many as this process may use.
        gpus: names of its CUDA devices.
        driver: version of their driver; None without one.
        memory_bytes: main memory; 0 = not known.
    """

    host: Short
    system: Short
    cpu: Short
    cores: int = Field(ge=0, le=1 << 20)
    gpus: tuple[Short, ...] = Field((), max_length=64)
    driver: Short | None = None
    memory_bytes: int = Field(0, ge=0, le=1 << 60)


class Provenance(_Part):
    """One process at work.

    Attributes:
        command: its arguments, as a shell would read them.
        recipe: as it was run, overrides included; None where there is none.
        commit: of the git repository that the working folder lies in; None outside of one.
        dirty: whether tracked files differ from the commit; None where that is not known.
        diff_sha256: 16 hex digits over `git diff HEAD`, where they differ: the same digits, the same changes.
        versions: package → version; None = not there.
        environment: variables of `ENVIRONMENT` that are set, without secrets.
        machine: what ran it.
        started: UTC, ISO 8601.
        ended: likewise; None while it is at work, or where it was killed.
    """

    command: str = Field(max_length=MAX_COMMAND)
    recipe: dict[str, Any] | None = None
    commit: Short | None = None
    dirty: bool | None = None
    diff_sha256: Short | None = None
    versions: dict[Short, Short | None] = Field({}, max_length=64)
    environment: dict[Short, Short] = Field({}, max_length=64)
    machine: Machine
    started: Short
    ended: Short | None = None

    @classmethod
    def begin(cls, recipe: Mapping[str, Any] | None = None) -> Provenance:
        """This process, from now on.

        Args:
            recipe: as JSON values.
        """
        commit, dirty, diff = _commit(os.getcwd())
        return cls(
            command=_command(),
            recipe=None if recipe is None else _redacted_tree(dict(recipe)),
            commit=commit,
            dirty=dirty,
            diff_sha256=diff,
            versions=library_versions(),
            environment=_environment(os.environ),
            machine=_machine(),
            started=_now(),
        )

    def finished(self) -> Provenance:
        """The same, ended now."""
        return self.model_copy(update={"ended": _now()})

    def row(self) -> dict[str, Any]:
        """What tables show of it: a line per process."""
        commit = "" if self.commit is None else self.commit[:12] + ("+" if self.dirty else "")
        about = [self.machine.cpu, f"{self.machine.cores} cores", *self.machine.gpus]
        return {
            "command": self.command,
            "started": self.started,
            "ended": self.ended or "–",
            "commit": commit or "–",
            "feedfast": self.versions.get("feedfast") or "–",
            "torch": self.versions.get("torch") or "–",
            "machine": ", ".join(about),
        }


def began_with(known: Sequence[Provenance], this: Provenance, limit: int) -> tuple[Provenance, ...]:
    """``known`` with ``this`` added, or in the place of the entry of the same start, command and machine.

    Of more than ``limit`` the first and the newest are kept.
    """

    def name(entry: Provenance) -> tuple[str, str, str]:
        return entry.started, entry.command, entry.machine.host

    kept = [this if name(entry) == name(this) else entry for entry in known]
    if this not in kept:
        kept.append(this)
    return tuple(kept if len(kept) <= limit else [kept[0], *kept[len(kept) - limit + 1 :]])


@functools.cache
def library_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of packages; None = not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _command() -> str:
    program, *arguments = sys.argv or [""]
    path = Path(program)
    name = "feedfast" if path.name == "__main__.py" and path.parent.name == "feedfast" else path.name
    return redacted(shlex.join([name, *arguments]))[:MAX_COMMAND]


def redacted(text: str) -> str:
    """Text without logins: of URLs, of ``token=...`` and the like, and whatever a secret variable holds."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith(("/", "~", ".")):  # a path
            text = text.replace(value, "***")
    for pattern in _LOGINS:
        text = pattern.sub(r"\1***", text)
    return text


def _redacted_tree(node: Any) -> Any:
    if isinstance(node, str):
        return redacted(node)
    if isinstance(node, dict):
        return {name: _redacted_tree(value) for name, value in node.items()}
    return [_redacted_tree(value) for value in node] if isinstance(node, (list, tuple)) else node


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that change what is computed, by name."""
    kept = [name for name in sorted(variables) if ENVIRONMENT.fullmatch(name) and not _SECRET.search(name)]
    return {name[:256]: redacted(variables[name])[:256] for name in kept[:64]}


@functools.cache
def _commit(folder: str) -> tuple[str | None, bool | None, str | None]:
    """Commit, dirt and hash of the repository around a folder, when this process first asked: its code is of then."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None, None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if changed is None or not changed.strip():
        return commit.strip(), None if changed is None else False, None
    # no program that the repository's settings name is run
    diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    return commit.strip(), True, None if diff is None else hashlib.sha256(diff.encode()).hexdigest()[:16]


def _git(folder: str, *arguments: str) -> str | None:
    # Nothing of a repository's own is run (fsmonitor), and nothing of it written (the index's times).
    command = ["git", "-c", "core.fsmonitor=false", "-C", folder, *arguments]
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_GIT_PATIENCE_S, check=False)
        return done.stdout if done.returncode == 0 else None
    return None


@functools.cache
def _machine() -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return Machine(
        host=hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        system=f"{platform.system()} {platform.release()} {platform.machine()}"[:256],
        cpu=_processor()[:256],
        cores=cores,
        gpus=_gpus(),
        driver=_driver(),
        memory_bytes=_memory_bytes(),
    )


def _driver() -> str | None:
    """Of NVIDIA's kernel module, as it says itself."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text(errors="replace"))
        return found[0] if found else None
    return None


def _memory_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    torch = sys.modules.get("torch")  # where it is not loaded, nothing ran on a GPU
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(str(torch.cuda.get_device_name(number))[:256] for number in range(min(torch.cuda.device_count(), 64)))
