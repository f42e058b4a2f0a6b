"""`feedfast doctor`: what this machine is, the versions that run on it, and what will be slow or fail here.

`feedfast.stages.probes` looks; `findings` says what follows, one sentence each with what helps: "broken" is what some
command needs and will fail without, "slow" what costs time, "note" what is good to know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.report.compare import print_table
from feedfast.stages import probes
from feedfast.stages.bf16 import SLOW
from feedfast.stages.probes import DiskFact, Facts
from feedfast.stages.progress import format_bytes

log = logging.getLogger(__name__)

NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.s3fs",
                  "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs")  # fmt: skip
PARALLEL: Final = ("lustre", "gpfs", "beegfs", "fhgfs", "wekafs", "panfs")
OLDEST_CAPABILITY: Final = (7, 5)  # of a GPU that today's CUDA 13 and Triton still compile for
SLOW_READ, SLOW_WRITE = 200e6, 60e6  # bytes per second: a hard disk reads so much at best
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHM = 20 << 30, 4 << 30, 512 << 20  # bytes
FEW_FILES, FEW_CORES = 1024, 2
_TYPICAL_BYTES = 100_000  # of codes per image: two taps of a ResNet-50 at 224 pixels, sampled


@dataclass(frozen=True)
class Finding:
    """One sentence about this machine.

    Attributes:
        kind: what it costs.
        sentence: what is so, and what helps.
    """

    kind: Literal["broken", "slow", "note"]
    sentence: str


def run_doctor(recipe: Recipe | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Look at this machine.

    Args:
        recipe: whose ``cache.path`` is measured.
        folder: that is measured instead; None = the recipe's, or the current one.

    Returns:
        The JSON of `feedfast doctor`: ``versions``, ``machine``, ``commit``, ``dirty``, ``bf16`` (``instructions``:
        whether the processor has any for it; ``over_fp32``: measured time over that of fp32), ``facts`` (see
        `feedfast.stages.probes.Facts`), ``findings`` (``kind``, ``sentence``) and ``ok``: nothing is broken.
    """
    here = Provenance.begin()
    facts = probes.look(_place(recipe, folder), here.machine.driver, here.machine.memory_bytes)
    found = list(findings(facts))
    rows = [{"what": name, "found": version or "not installed"} for name, version in here.versions.items()]
    machine = here.machine.model_dump(include={"host", "system", "cpu"})
    rows += [{"what": name, "found": str(value)} for name, value in machine.items()]
    print_table("this machine", [*rows, *_rows(facts)])
    for finding in found:
        log.log(logging.INFO if finding.kind == "note" else logging.WARNING, "%s: %s", finding.kind, finding.sentence)
    ok = all(finding.kind != "broken" for finding in found)
    log.info("doctor: %s", "ready" if ok else "something that is needed is broken, see above")
    return {
        "versions": here.versions,
        "machine": here.machine.model_dump(mode="json"),
        "commit": here.commit,
        "dirty": here.dirty,
        "bf16": {"instructions": facts.bf16_instructions, "over_fp32": facts.bf16_over_fp32},
        "facts": asdict(facts),
        "findings": [asdict(finding) for finding in found],
        "ok": ok,
    }


def _place(recipe: Recipe | None, folder: Path | None) -> Path | None:
    """Where the disk is measured; None = the cache is in a bucket and nothing of it is kept here."""
    if folder is not None or recipe is None or not recipe.cache.path:
        return folder or Path()
    path = recipe.cache.path
    if "://" not in path:
        return Path(path)
    return Path(recipe.cache.local) if recipe.cache.local else None


def _rows(facts: Facts) -> Iterator[dict[str, str]]:
    """What the table shows of the probes."""
    yield {"what": "NVIDIA driver", "found": facts.driver or "none"}
    for number, gpu in enumerate(facts.gpus):
        about = f"{gpu.name}, capability {gpu.capability}, {format_bytes(gpu.memory_bytes)}"
        yield {"what": f"GPU {number}", "found": about}
    decodes = {True: "decodes", False: "does not decode", None: "not usable"}[facts.dali_decodes]
    yield {"what": "DALI", "found": decodes}
    quota = "" if facts.quota_cores is None else f", {facts.quota_cores:g} by the control group's quota"
    yield {"what": "cores", "found": f"{facts.cores} of {facts.machine_cores}{quota}"}
    free = "" if facts.available_bytes is None else f", {format_bytes(facts.available_bytes)} available"
    yield {"what": "memory", "found": f"{format_bytes(facts.memory_bytes)}{free}"}
    yield {"what": "bf16 on the processor", "found": f"{facts.bf16_over_fp32:.2f} times the time of fp32 (a trial)"}
    if facts.disk is not None:
        disk = facts.disk
        yield {
            "what": "disk",
            "found": f"{disk.folder} ({disk.kind or 'unknown'}), {format_bytes(disk.free_bytes)} free",
        }
        yield {
            "what": "disk reads, writes",
            "found": f"{_rate(disk.read_per_second)}, {_rate(disk.written_per_second)}",
        }
    yield {"what": "crc32c", "found": "in hardware" if facts.crc32c == "c" else facts.crc32c}
    yield {"what": "open files", "found": "any number" if facts.open_files is None else f"{facts.open_files:,}"}
    yield {"what": "/dev/shm", "found": "none" if facts.shm_bytes is None else f"{format_bytes(facts.shm_bytes)} free"}
    for state, word in ((True, "extras"), (False, "extras not installed")):
        names = " ".join(name for name, there in facts.extras.items() if there is state)
        yield {"what": word, "found": names or "none"}


def _rate(bytes_per_second: float | None) -> str:
    return "not measured" if bytes_per_second is None else f"{bytes_per_second / 1e6:,.0f} MB/s"


def findings(facts: Facts) -> Iterator[Finding]:
    """What follows from the facts, what is broken first."""
    yield from sorted(_findings(facts), key=lambda finding: ("broken", "slow", "note").index(finding.kind))


def _findings(facts: Facts) -> Iterator[Finding]:
    for problem in facts.dali_problems:
        yield Finding("broken", problem)
    if facts.dali_error is not None:
        yield Finding(
            "broken",
            f"NVIDIA DALI: it is installed and does not decode a JPEG ({facts.dali_error}); reinstall it "
            "(pip install --force-reinstall 'feedfast[cuda13]', or cuda12), and look at the driver's version",
        )
    yield from _of_gpus(facts)
    yield from _of_processor(facts)
    if facts.disk is not None:
        yield from _of_disk(facts.disk)
    yield from _of_limits(facts)


def _of_gpus(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        if facts.driver is None:
            yield Finding("note", "GPU: none; everything runs on the processor, plan says how long that takes")
        elif facts.torch_cuda is None:
            yield Finding(
                "broken",
                f"GPU: NVIDIA's driver {facts.driver} is here, and this torch is built without CUDA; "
                "install PyPI's torch (pip install --force-reinstall torch)",
            )
        else:
            yield Finding(
                "broken",
                f"GPU: NVIDIA's driver {facts.driver} is here, and torch (CUDA {facts.torch_cuda}) sees no GPU; look "
                "at CUDA_VISIBLE_DEVICES, at the container's --gpus, and whether nvidia-smi names as new a CUDA",
            )
    for number, gpu in enumerate(facts.gpus):
        if gpu.problem is not None:
            yield Finding(
                "broken",
                f"GPU {number} ({gpu.name}, compute capability {gpu.capability}): torch (CUDA {facts.torch_cuda}) "
                f"cannot compute on it ({gpu.problem}); install a torch for its driver, or hide it with "
                "CUDA_VISIBLE_DEVICES",
            )
        elif tuple(map(int, gpu.capability.split("."))) < OLDEST_CAPABILITY:
            oldest = ".".join(map(str, OLDEST_CAPABILITY))
            yield Finding(
                "slow",
                f"GPU {number} ({gpu.name}): compute capability {gpu.capability} is below {oldest}, the least that "
                "kernels are compiled and tested for; expect missing kernels, and no bf16",
            )
    if facts.triton_error is not None:
        yield Finding(
            "broken",
            f"Triton: a loss kernel does not run on GPU 0 ({facts.triton_error}); it needs a C compiler (gcc) and "
            "Python's headers, and the version that torch asks for (pip check)",
        )


def _of_processor(facts: Facts) -> Iterator[Finding]:
    if facts.bf16_over_fp32 > SLOW:
        why = "" if facts.bf16_instructions else " (it has no instructions for it)"
        yield Finding(
            "slow",
            f"bf16: takes {facts.bf16_over_fp32:.1f} times as long as fp32 on this processor{why}; keep "
            "train.precision and teachers.N.precision at fp32 where they run on it",
        )
    if facts.crc32c != "c":
        yield Finding(
            "slow",
            f"checksums: google-crc32c runs as {facts.crc32c}, not in hardware, so every block that is read waits for "
            "it; reinstall its binary wheel (pip install --force-reinstall --only-binary :all: google-crc32c)",
        )
    quota = facts.quota_cores
    if quota is not None and quota < facts.cores:
        yield Finding(
            "slow",
            f"cores: the control group allows {quota:g} of the {facts.cores} that are seen, so threads stop each "
            f"other; set train.threads, data.threads and OMP_NUM_THREADS to {max(1, int(quota))}, or raise the limit",
        )
    cores = min(facts.cores, quota or facts.cores)
    if cores <= FEW_CORES:
        helps = "more cores, or cache.images=stored, which decodes once" if facts.gpus else "more cores, or a GPU"
        yield Finding("slow", f"cores: {cores:g} decode images and run what the GPU does not; what helps: {helps}")


def _of_disk(disk: DiskFact) -> Iterator[Finding]:
    name = f"disk of {disk.folder}"
    if disk.kind in NETWORK:
        yield Finding(
            "slow",
            f"{name}: a network file system ({disk.kind}), which answers slowly and may lock nothing; put cache.path "
            "on a local disk, or in a bucket with cache.local",
        )
    elif disk.kind in PARALLEL:
        yield Finding("note", f"{name}: a parallel file system ({disk.kind}); larger cache.shard_mb means fewer files")
    elif disk.kind in ("tmpfs", "ramfs", "overlay"):
        lost = "memory, gone at the next start" if disk.kind != "overlay" else "a container's own, gone with it"
        yield Finding("note", f"{name}: it is {lost} ({disk.kind}); keep caches and runs elsewhere")
    if disk.read_per_second is None:
        yield Finding("broken", f"{name}: nothing can be written there; choose another cache.path, or free some room")
        return
    if disk.read_per_second < SLOW_READ and disk.direct:
        images = disk.read_per_second / _TYPICAL_BYTES
        yield Finding(
            "slow",
            f"{name}: reads {_rate(disk.read_per_second)}, like a hard disk: at 100 kB of codes per image no student "
            f"takes more than {images:,.0f} images/s from it; what helps: an SSD, cache.codec=u4, sampled taps, or "
            "train.residency=ram; feedfast plan says what a recipe needs",
        )
    if (disk.written_per_second or SLOW_WRITE) < SLOW_WRITE:
        yield Finding(
            "slow", f"{name}: writes {_rate(disk.written_per_second)} until they are durable; caching waits for it"
        )
    if disk.free_bytes < LITTLE_DISK:
        yield Finding(
            "note",
            f"{name}: {format_bytes(disk.free_bytes)} free; feedfast plan says what a cache takes, before it is made",
        )


def _of_limits(facts: Facts) -> Iterator[Finding]:
    if facts.available_bytes is not None and facts.available_bytes < LITTLE_MEMORY:
        yield Finding(
            "slow",
            f"memory: {format_bytes(facts.available_bytes)} can still be taken, so views are read from disk in every "
            "epoch; smaller cache.batch and data.threads keep a job within it",
        )
    if facts.open_files is not None and facts.open_files < FEW_FILES:
        yield Finding(
            "broken",
            f"open files: a process may have {facts.open_files}, expected {FEW_FILES}; run ulimit -n 4096 first",
        )
    if facts.shm_bytes is not None and facts.shm_bytes < LITTLE_SHM:
        yield Finding(
            "note",
            f"/dev/shm: {format_bytes(facts.shm_bytes)} free; feedfast uses none, but worker processes of a torch "
            "DataLoader do: start the container with --shm-size=2g for loops of your own",
        )
