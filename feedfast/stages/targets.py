"""Where a student's targets come from: the cache, live teachers, or nowhere.

The three sources have one face, so the training loop cannot tell them apart: `stream` reads ahead whatever can be read
without pixels, `targets` turns one read item and its pixels into what the method compares with. The live source is the
oracle the cached one is tested against; ``none`` is the plain baseline both are timed against.

Codes stay codes: a u8 map travels to the device as uint8 and is dequantized inside the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from feedfast.cache.reader import CacheReader
from feedfast.cache.schema import Manifest
from feedfast.errors import CacheMismatchError
from feedfast.methods import TapInfo
from feedfast.stages.ensemble import LOGITS, FrozenTeacher
from feedfast_kernels import Codes, Target

Targets = dict[str, dict[str, Target]]


class TargetSource(Protocol):
    """What the training loop needs of a source."""

    def stream(self, view: int, rows: np.ndarray, batch_size: int, start_batch: int) -> Iterator[Any]:
        """Read ahead what belongs to ``rows``, batch by batch."""

    def targets(self, item: Any, images: Tensor) -> Targets:
        """The targets of one batch."""


class NoTargets:
    """Plain training."""

    def stream(self, view: int, rows: np.ndarray, batch_size: int, start_batch: int) -> Iterator[None]:
        """Nothing to read."""
        return repeat(None)

    def targets(self, item: None, images: Tensor) -> Targets:
        """No targets."""
        return {}


class LiveTargets:
    """Runs the teachers beside the student, as every method's authors do."""

    def __init__(self, teachers: Mapping[str, FrozenTeacher]) -> None:
        self.teachers = teachers

    def stream(self, view: int, rows: np.ndarray, batch_size: int, start_batch: int) -> Iterator[None]:
        """Nothing to read: the pixels are enough."""
        return repeat(None)

    def targets(self, item: None, images: Tensor) -> Targets:
        """One forward pass of every teacher."""
        return {name: dict(teacher(images)) for name, teacher in self.teachers.items()}


class CachedTargets:
    """Streams the ensemble's maps from a cache; no teacher is in memory."""

    def __init__(self, reader: CacheReader, wanted: Mapping[str, tuple[str, ...]], device: torch.device) -> None:
        """``wanted``: teacher → tap names (``logits`` included when needed)."""
        self.reader, self.device = reader, device
        have = manifest_taps(reader.manifest)
        self.arrays: list[str] = []
        self._entries: list[tuple[str, str, str, str, Tensor, Tensor]] = []
        for teacher, taps in wanted.items():
            for tap in taps:
                if tap not in have.get(teacher, {}):
                    found = {name: sorted(infos) for name, infos in have.items()}
                    raise CacheMismatchError(
                        f"{reader.path}: expected tap {tap!r} of teacher {teacher!r}, found {found}; "
                        "run `feedfast cache` with this recipe to add it"
                    )
                array = f"targets/{teacher}/{tap}/codes"
                codec = "float" if tap == LOGITS else reader.manifest.teachers[teacher].taps[tap].codec
                offset = step = torch.empty(0)
                if codec in ("u8", "u4"):
                    scale = reader.scale(teacher, tap)
                    offset, step = (torch.from_numpy(np.array(row, dtype=np.float32)).to(device) for row in scale)
                self.arrays.append(array)
                self._entries.append((array, teacher, tap, codec, offset, step))

    def stream(self, view: int, rows: np.ndarray, batch_size: int, start_batch: int) -> Iterator[dict[str, np.ndarray]]:
        """Blocks read ahead by threads and verified on the way."""
        return self.reader.stream(self.arrays, view, rows, batch_size, start_batch=start_batch)

    def targets(self, item: dict[str, np.ndarray], images: Tensor) -> Targets:
        """Wrap the arrays of one batch; copies them to the device when that is not the CPU."""
        out: Targets = {}
        for array, teacher, tap, codec, offset, step in self._entries:
            data = torch.from_numpy(item[array])
            if self.device.type != "cpu":
                # the reader fills its buffers again as soon as nobody holds them, which may be before an asynchronous
                # copy has ended; torch keeps its pinned memory until then
                data = data.pin_memory().to(self.device, non_blocking=True)
            value: Target
            if codec in ("u8", "u4"):
                value = Codes(data=data, offset=offset, step=step, codec=codec)  # type: ignore[arg-type]
            else:
                value = data.float() if tap == LOGITS else data
                value = value.permute(0, 3, 1, 2) if value.dim() == 4 else value
            out.setdefault(teacher, {})[tap] = value
        return out


def manifest_taps(manifest: Manifest) -> dict[str, dict[str, TapInfo]]:
    """What the cache of ``manifest`` can serve, in the methods' words."""
    out: dict[str, dict[str, TapInfo]] = {}
    for name, teacher in manifest.teachers.items():
        taps = {
            tap: TapInfo(tuple(entry.shape), None if entry.margin is None else torch.tensor(entry.margin))
            for tap, entry in teacher.taps.items()
        }
        taps[LOGITS] = TapInfo((teacher.num_classes,), None)
        out[name] = taps
    return out
