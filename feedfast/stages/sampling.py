"""Sampled taps: which positions a batch's rows have, and teachers' maps gathered there.

Whoever makes targets (the caching pass, live teachers, the audit) and whoever serves them asks here, so that all mean
the same positions. Taps of one name, grid and share have them in common among teachers: one tensor, which tells the
methods that the student's map need be gathered once.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.data.positions import ALGORITHM, sample_positions
from feedfast.errors import CacheMismatchError
from feedfast.methods import TapInfo
from feedfast.storage.schema import Manifest
from feedfast_kernels import Sampled, Target, gather_positions

Places = Mapping[tuple[str, str], Tensor]
"""(teacher, tap) → int32 [B, P], of taps that are sampled."""


@dataclass(frozen=True)
class Sampling:
    """The sampled taps of some teachers.

    Attributes:
        seed: of the view plan.
        grids: (teacher, tap) → height, width and number of positions.
    """

    seed: int
    grids: Mapping[tuple[str, str], tuple[int, int, int]]

    def __bool__(self) -> bool:
        return bool(self.grids)

    def places(
        self, view: int, ids: NDArray[np.integer], device: torch.device, teachers: Container[str] | None = None
    ) -> Places:
        """Where rows of a view are looked at.

        Args:
            view: which view.
            ids: [B], the rows' samples.
            device: where the positions are put.
            teachers: whose taps; None = all.
        """
        made: dict[tuple[str, tuple[int, int, int]], Tensor] = {}
        out = {}
        for (teacher, tap), grid in self.grids.items():
            if teachers is not None and teacher not in teachers:
                continue
            if (tap, grid) not in made:
                found = torch.from_numpy(sample_positions(self.seed, view, ids, tap, *grid))
                made[tap, grid] = found.to(device, non_blocking=True)
            out[teacher, tap] = made[tap, grid]
        return out

    def gathered(self, teacher: str, tap: str, values: Tensor, places: Places) -> Tensor:
        """A teacher's map [B, C, H, W] at its positions, [B, C, P]; of a tap that is not sampled as it is."""
        key = (teacher, tap)
        return gather_positions(values, places[key].to(values.device)) if key in self.grids else values

    def wrapped(self, teacher: str, tap: str, values: Target, places: Places) -> Target | Sampled:
        """Values [B, C, P] with their positions; of a tap that is not sampled as they are."""
        key = (teacher, tap)
        return Sampled(values, places[key], self.grids[key][:2]) if key in self.grids else values


def sampling_of(seed: int, taps: Mapping[str, Mapping[str, TapInfo]]) -> Sampling:
    """The sampled ones among teachers' taps."""
    return Sampling(
        seed,
        {
            (name, tap): (info.shape[1], info.shape[2], info.positions)
            for name, infos in taps.items()
            for tap, info in infos.items()
            if info.positions is not None
        },
    )


def sampling_of_manifest(manifest: Manifest, where: object) -> Sampling:
    """The sampled taps of a cache; ``where`` it is.

    Raises:
        CacheMismatchError: its positions are drawn by a function that is not known here.
    """
    grids = {}
    for name, teacher in manifest.teachers.items():
        for tap in teacher.taps.values():
            if tap.sample is None:
                continue
            if tap.sample.algorithm != ALGORITHM:
                raise CacheMismatchError(
                    f"{where}: targets/{name}/{tap.name}: expected positions drawn by {ALGORITHM!r}, found "
                    f"{tap.sample.algorithm!r}; use the feedfast that made the cache, or a newer one"
                )
            grids[name, tap.name] = (tap.shape[1], tap.shape[2], tap.sample.positions)
    return Sampling(manifest.plan.seed, grids)


def on_grid(values: Tensor, positions: Tensor, grid: tuple[int, int]) -> np.ma.MaskedArray[Any, Any]:
    """Sampled maps as pictures show them: float [B, C, H, W], masked where nothing is stored.

    Args:
        values: [B, C, P].
        positions: [B, P], y * W + x.
        grid: H and W of the whole map.
    """
    height, width = grid
    batch, channels, _ = values.shape
    at = positions.cpu().long()[:, None].expand(-1, channels, -1)
    whole = torch.zeros(batch, channels, height * width).scatter_(2, at, values.float().cpu())
    stored = torch.zeros(batch, height * width, dtype=torch.bool).scatter_(1, positions.cpu().long(), True)
    mask = ~stored[:, None].expand(-1, channels, -1).reshape(whole.shape)
    shape = batch, channels, height, width
    return np.ma.MaskedArray(whole.reshape(shape).numpy(), mask.reshape(shape).numpy())
