"""What every stage needs and no room below offers: devices, ranks, durable small files, and progress a person can read.

Progress goes to stderr (a live bar on a terminal, a line every ten seconds otherwise) and always shows rate, time
left and, where something is written, bytes. The last line of stdout belongs to the stage's JSON alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from feedfast.cache.store import fsync_dir, write_error
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError
from feedfast.recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as torchrun's environment says."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process reports and writes the shared files."""
        return self.rank == 0


def ranks() -> Ranks:
    """Ranks from torchrun's environment variables; a single process without them."""
    env = os.environ
    return Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def pick_device(text: str, local_rank: int = 0) -> torch.device:
    """``auto`` = this rank's CUDA device when there is one, else the CPU.

    Raises:
        RequestError: neither ``cpu`` nor a CUDA device that is there.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"train.device: expected an available device, found {text!r} but torch sees no CUDA GPU")
    try:
        device = torch.device(f"cuda:{local_rank}" if text == "cuda" else text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise RequestError(f"train.device: expected auto, cpu or one of {count} CUDA devices, found {text!r}")
    return device


def open_train(recipe: Recipe) -> Dataset:
    """The training images of the recipe, limited as it says."""
    return open_dataset(recipe.data.train, limit=recipe.data.limit, check=recipe.data.check)


def open_val(recipe: Recipe, train: Dataset) -> Dataset | None:
    """The validation images of the recipe, None without ``data.val``.

    Raises:
        RequestError: they have no labels, or a label number means another class than in ``train``.
    """
    if not recipe.data.val:
        return None
    val = open_dataset(recipe.data.val, check=recipe.data.check)
    if not val.classes or not (val.labels >= 0).any():
        raise RequestError(f"data.val: expected labelled images (class sub-folders), found none in {val.source}")
    if not train.classes:
        return val
    if len(val.classes) > len(train.classes):
        only = [name for name in val.classes if name not in train.classes]
        raise RequestError(
            f"data.val: expected the {len(train.classes)} classes of data.train, found {len(val.classes)} in "
            f"{val.source}: not in training: {only[:5]}"
        )
    if not (_numbered(val) or _numbered(train)):
        for number, (found, expected) in enumerate(zip(val.classes, train.classes, strict=False)):
            if found != expected:
                raise RequestError(
                    f"data.val: expected class {number} to be {expected!r} as in data.train, "
                    f"found {found!r} in {val.source}; "
                    "labels are numbered by sorted name, so both need the same class folders"
                )
    return val


def _numbered(data: Dataset) -> bool:
    """Whether the classes have no names of their own (CIFAR files without a name list, most .npz files)."""
    return data.classes == tuple(str(number) for number in range(len(data.classes)))


def view_plan(recipe: Recipe) -> ViewPlan:
    """The recipe's view plan."""
    data = recipe.data
    return ViewPlan(seed=recipe.seed, size=data.size, augment=data.augment, flip=data.flip)


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` with ``data``: a crash or a full disk leaves the old file or the new one, never a mixture.

    Raises:
        FeedfastError: the disk is full, or the file cannot be written; the old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(error, path, len(data)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_durably` of indented JSON."""
    write_durably(path, (json.dumps(value, indent=2) + "\n").encode())


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Meter:
    """Progress of a long job: rate, time left and a free remark such as bytes written.

    Use as a context manager; `advance` may be called thousands of times a second.
    """

    LINE_SECONDS = 10.0

    def __init__(self, label: str, total: int, unit: str = "images", *, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = 0
        self.started = self._last = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self.started = self._last = time.perf_counter()
        console = Console(stderr=True)
        if not self.quiet and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[remark]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, remark="")
        return self

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, count: int, remark: str = "") -> None:
        """``count`` more units are done."""
        self.done += count
        if self.quiet:
            return
        now = time.perf_counter()
        if self._bar is not None:
            if now - self._last > 0.1:
                self._last = now
                self._bar.update(self._task, completed=self.done, remark=f"{self.rate:,.0f} {self.unit}/s {remark}")
        elif now - self._last >= self.LINE_SECONDS:
            self._last = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            done = f"{self.done:,}/{self.total:,} {self.unit}"
            say(f"{self.label}: {done}, {self.rate:,.0f}/s, {left:,.0f} s left {remark}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            self._bar.stop()


def format_bytes(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
