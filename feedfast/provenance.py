"""Where a result is from: command, recipe, commit, versions, machine and times; of runs, caches and pages alike.

For people who ask a year later how this was made. Nothing compares it and no digest covers it: two runs of one recipe
differ in it by nature. Any room may import this module, as with `feedfast.errors`: caches, runs and pages hold the
same words. Machines are told apart by a hash of their name: caches are handed on, and names of machines are nobody
else's business.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
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
    "feedfast",
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numcodecs",
    "numpy",
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
    """

    host: Short
    system: Short
    cpu: Short
    cores: int = Field(ge=0, le=1 << 20)
    gpus: tuple[Short, ...] = Field((), max_length=64)


class Provenance(_Part):
    """One process at work.

    Attributes:
        command: its arguments, as a shell would read them.
        recipe: as it was run, overrides included; None where there is none.
        commit: of the git repository that the working folder lies in; None outside of one.
        dirty: whether tracked files differ from the commit; None where that is not known.
        versions: package → version; None = not there.
        machine: what ran it.
        started: UTC, ISO 8601.
        ended: likewise; None while it is at work, or where it was killed.
    """

    command: str = Field(max_length=MAX_COMMAND)
    recipe: dict[str, Any] | None = None
    commit: Short | None = None
    dirty: bool | None = None
    versions: dict[Short, Short | None] = Field({}, max_length=64)
    machine: Machine
    started: Short
    ended: Short | None = None

    @classmethod
    def begin(cls, recipe: Mapping[str, Any] | None = None) -> Provenance:
        """This process, from now on.

        Args:
            recipe: as JSON values.
        """
        commit, dirty = _commit(os.getcwd())
        return cls(
            command=_command(),
            recipe=None if recipe is None else dict(recipe),
            commit=commit,
            dirty=dirty,
            versions=library_versions(),
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
    return shlex.join([name, *arguments])[:MAX_COMMAND]


@functools.cache
def _commit(folder: str) -> tuple[str | None, bool | None]:
    """Commit and dirt of the repository around a folder, when this process first asked: its code is of that time."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changed is None else bool(changed.strip())


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
    )


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
