"""How much memory this process may still take, as the kernel and the control groups around it say.

A container's limit is not in /proc/meminfo: whoever believes that alone is killed. Every group from the process's own
up to the root counts, of either version; what it holds of files can be given back and is not counted as taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_UNLIMITED: Final = 1 << 60  # version 1 writes a number near 2^63 where nothing is limited


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken now without swapping and without meeting a limit; None where nobody says.

    Args:
        root: the folder that ``proc`` and ``sys`` lie in.
    """
    said = [line for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    rooms = [*_group_rooms(root), *(int(line.split()[1]) * 1024 for line in said)]
    return max(0, min(rooms)) if rooms else None


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group with a limit leaves."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, place = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if number == "0" and not controllers:
            files, prefix = ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            base, prefix = base / "memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the place may be the host's and not be there; the group itself is then the root that is seen.
        at = base / place.strip("/")
        for folder in (at, *at.parents[: len(at.relative_to(base).parts)]):
            limit, used = (_number(folder / file) for file in files)
            if limit is None or used is None or limit >= _UNLIMITED:
                continue
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            files_held = sum(int(stat.get(f"{prefix}{key}", 0)) for key in ("inactive_file", "active_file"))
            yield limit - max(0, used - files_held)


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
