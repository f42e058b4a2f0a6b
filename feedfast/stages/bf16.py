"""Whether bfloat16 is worth asking for on this machine's processor.

Without bf16 or AVX-512 instructions torch emulates it: correct, and several times slower than float32. That is said
once per process where a recipe asks for it, with the ratio of a trial of a fraction of a second; which processors are
slow changes with every release of oneDNN, so the trial decides and not a table.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from pathlib import Path

import torch

from feedfast.recipe import Recipe

log = logging.getLogger(__name__)

FLAGS = {"avx512f", "avx512_bf16", "amx_bf16", "bf16"}  # oneDNN has fast bf16 with any of them
SLOW = 1.1


def has_bf16() -> bool:
    """Whether the processor has instructions for bf16, or AVX-512; where it does not say, it has not."""
    return bool(FLAGS & _processor_flags())


def _processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


@functools.cache
def bf16_ratio() -> float:
    """Time of a convolution's forward and backward under bf16 autocast per that in fp32; measured once per process."""
    return _trial_seconds(True) / _trial_seconds(False)


def _trial_seconds(enabled: bool) -> float:
    """The least of three; ``enabled`` = in bf16."""
    with torch.random.fork_rng(devices=[]):
        convolution = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            convolution(images).float().sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def say_slow_bf16(recipe: Recipe, device: torch.device, *, student: bool = True, teachers: bool = True) -> float | None:
    """Warn, once per process, where the recipe asks for bf16 and it is slower than fp32; the measured ratio.

    Args:
        recipe: its precisions of student and teachers.
        device: where they run.
        student: whether the student runs.
        teachers: whether they run.

    Returns:
        None where bf16 is not asked for or has instructions of its own: nothing was measured then.
    """
    keys = ["train.precision"] if student and recipe.train.precision == "bf16" else []
    for teacher in recipe.teachers if teachers else ():
        keys += [f"teachers[{teacher.name}].precision"] if teacher.precision == "bf16" else []
    if not keys or device.type != "cpu" or has_bf16():
        return None
    ratio = bf16_ratio()
    if ratio > SLOW:
        _warn(", ".join(keys), ratio)
    return ratio


@functools.cache
def _warn(keys: str, ratio: float) -> None:
    log.warning(
        "%s: bf16 takes %.1f times as long as fp32 here (a trial): this processor has no instructions for it",
        keys,
        ratio,
    )
