"""What this machine has, as `feedfast doctor` asks it: each probe is short, changes nothing and never raises.

A probe that cannot know says None. `Facts` holds all of them as values, so that what follows from them (`doctor`) can
be told for any machine.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import google_crc32c
import torch

from feedfast.data.dali import dali_warnings
from feedfast.files import standing_folder
from feedfast.provenance import redacted
from feedfast.report.loggers import MODULES, installed
from feedfast.stages.bf16 import bf16_ratio, has_bf16
from feedfast.stages.memory import available_bytes
from feedfast.stages.plan_rates import disk_rate
from feedfast.stages.record import usable_cores

EXTRAS: Final = {
    "timm": ("timm",), "detect": ("pycocotools",), "cloud": ("obstore",), "hf": ("pyarrow",), "ray": ("ray",),
    **MODULES,
    "export": ("onnx", "onnxscript", "onnxruntime"),
}  # fmt: skip
"""Extra → its modules."""


@dataclass(frozen=True)
class GpuFact:
    """A CUDA device as torch sees it.

    Attributes:
        name: of the device.
        capability: of compute, as "9.0".
        memory_bytes: in all.
        problem: why torch cannot compute on it; None = it can.
    """

    name: str
    capability: str
    memory_bytes: int
    problem: str | None = None


@dataclass(frozen=True)
class DiskFact:
    """A folder's file system, measured with a file of at most 64 MiB that is removed again.

    Attributes:
        folder: where it was measured: the one that was asked for, or the nearest above that exists.
        kind: of file system, as "ext4"; None where nobody says.
        free_bytes: that a user may still write.
        read_per_second: bytes, of one reader; past the page cache if ``direct``. None = nothing could be written there.
        written_per_second: bytes, of one writer, until they are durable.
        direct: whether the page cache was passed by.
    """

    folder: str
    kind: str | None
    free_bytes: int
    read_per_second: float | None
    written_per_second: float | None
    direct: bool


@dataclass(frozen=True)
class Facts:
    """A machine.

    Attributes:
        torch_cuda: the CUDA that torch is built with; None = without.
        driver: version of NVIDIA's driver; None = there is none.
        gpus: that torch sees.
        dali_problems: what is wrong with DALI as it is installed, one sentence each.
        dali_decodes: whether it decoded a small JPEG; None = not tried.
        dali_error: why it did not.
        triton_error: why a small kernel did not run on the first GPU; None = it did, or there is no GPU.
        disk: of the folder that was asked for; None of a bucket.
        cores: that this process may run on.
        machine_cores: that the machine has.
        quota_cores: what the control groups allow, in cores; None = all.
        memory_bytes: in all.
        available_bytes: that can still be taken.
        bf16_instructions: whether the processor has any.
        bf16_over_fp32: measured time over that of fp32.
        crc32c: "c" = in hardware, "python" = slowly.
        open_files: that a process may have open; None = any number.
        shm_bytes: free in /dev/shm; None = there is none.
        extras: optional extra → whether it is installed.
    """

    torch_cuda: str | None
    driver: str | None
    dali_decodes: bool | None
    disk: DiskFact | None
    cores: int
    machine_cores: int
    memory_bytes: int
    bf16_instructions: bool
    bf16_over_fp32: float
    crc32c: str
    gpus: tuple[GpuFact, ...] = ()
    dali_problems: tuple[str, ...] = ()
    dali_error: str | None = None
    triton_error: str | None = None
    quota_cores: float | None = None
    available_bytes: int | None = None
    open_files: int | None = None
    shm_bytes: int | None = None
    extras: dict[str, bool] = field(default_factory=dict)


def look(folder: Path | None, driver: str | None, memory_bytes: int) -> Facts:
    """All probes; some seconds.

    Args:
        folder: whose disk is measured; None = no disk.
        driver: of NVIDIA's kernel module, as `feedfast.provenance` found it.
        memory_bytes: likewise.
    """
    problems = tuple(dali_warnings())
    decodes, error = (None, None) if problems else decode_one()
    gpus = tuple(_gpus())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Facts(
        torch_cuda=torch.version.cuda,
        driver=driver,
        gpus=gpus,
        dali_problems=problems,
        dali_decodes=decodes,
        dali_error=error,
        triton_error=triton_problem() if gpus and gpus[0].problem is None else None,
        disk=None if folder is None else disk_of(folder),
        cores=usable_cores(),
        machine_cores=os.cpu_count() or 1,
        quota_cores=quota_cores(),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes(),
        bf16_instructions=has_bf16(),
        bf16_over_fp32=bf16_ratio(),
        crc32c=google_crc32c.implementation,
        open_files=None if limit == resource.RLIM_INFINITY else limit,
        shm_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        extras={name: installed(modules) for name, modules in EXTRAS.items()},
    )


def decode_one() -> tuple[bool, str | None]:
    """Whether the loader decodes a JPEG, and why not."""
    from PIL import Image

    from feedfast.data.loader import Loader
    from feedfast.data.views import ViewPlan
    from feedfast.stages.data import Selection

    try:
        with tempfile.TemporaryDirectory(prefix="feedfast-doctor-") as name:
            folder = Path(name) / "class"
            folder.mkdir()
            Image.new("RGB", (32, 32), (200, 30, 90)).save(folder / "one.jpg", quality=95)
            data = Selection((name,)).open()
            with Loader(
                data, ViewPlan(seed=0, size=32, augment="none"), batch_size=1, device="cpu", threads=1
            ) as loader:
                pixel = next(iter(loader.evaluation())).images[0, 16, 16].tolist()
    except Exception as error:  # of a library that may be broken in any way
        return False, _short(error)
    off = max(abs(found - given) for found, given in zip(pixel, (200, 30, 90), strict=True))
    return off <= 8, None if off <= 8 else f"a pixel of (200, 30, 90) came back as {tuple(pixel)}"


def triton_problem(device: str = "cuda") -> str | None:
    """Why one of our kernels does not run on a device; None = it does, with the value of the formula."""
    try:
        from feedfast_kernels import partial_l2

        student = torch.linspace(-1, 1, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4)
        target = student.flip(0)
        found = float(partial_l2(student.to(device), target.to(device)))
        counted = (student > target) | (target > 0)  # a student below a target that is not positive costs nothing
        expected = float((student - target).square()[counted].sum() / len(student))
        if abs(found - expected) > 1e-3 * max(1.0, abs(expected)):
            return f"a loss of {expected:g} came back as {found:g}"
    except Exception as error:
        return _short(error)
    return None


def _gpus() -> Iterator[GpuFact]:
    if not torch.cuda.is_available():
        return
    for number in range(torch.cuda.device_count()):
        found: Any = torch.cuda.get_device_properties(number)
        problem = None
        try:
            assert float(torch.ones(8, device=f"cuda:{number}").sum()) == 8
        except Exception as error:  # a driver too old, an architecture that this torch has no code for
            problem = _short(error)
        yield GpuFact(found.name, f"{found.major}.{found.minor}", found.total_memory, problem)


def disk_of(folder: Path) -> DiskFact:
    """The disk below a folder, or below the nearest one above it that exists."""
    at = standing_folder(folder)
    free = shutil.disk_usage(at).free
    rate = disk_rate(at, free)
    if rate is None:
        return DiskFact(str(at), filesystem_of(at), free, None, None, False)
    return DiskFact(str(at), filesystem_of(at), free, rate.bytes_per_second, rate.written_per_second, rate.direct)


def filesystem_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The kind of the file system that a folder lies on, as the kernel calls it."""
    place, best, kind = str(folder.resolve()), -1, None
    with contextlib.suppress(OSError):
        for line in mounts.read_text(errors="replace").splitlines():
            _, at, found, *_ = line.split(" ")
            at = at.encode().decode("unicode_escape")  # \\040 is a space
            if len(at) >= best and (place == at or place.startswith(at.rstrip("/") + "/")):
                best, kind = len(at), found
    return kind


def quota_cores(root: Path = Path("/")) -> float | None:
    """Cores that the control groups allow this process, of either version; None = no limit."""
    found = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, place = line.split(":", 2)
            unified = number == "0" and not controllers
            if not unified and "cpu" not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / ("" if unified else "cpu")
            at = base / place.strip("/")
            for folder in (at, *at.parents[: len(at.relative_to(base).parts)]):
                found += _quota(folder, unified=unified)
    return min(found, default=None)


def _quota(folder: Path, *, unified: bool) -> list[float]:
    with contextlib.suppress(OSError, ValueError):
        if unified:
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{word}_us").read_text() for word in ("quota", "period"))
        if limit.strip() != "max" and int(limit) > 0:
            return [int(limit) / int(period)]
    return []


def _short(error: BaseException) -> str:
    text = io.StringIO(redacted(f"{type(error).__name__}: {error}")).readline().strip()
    return text[:300]
