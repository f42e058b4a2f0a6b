"""Paths as callers give them: text or path-like, one or several, ``~`` for the home; places may be URLs of buckets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]


def path_of(path: PathLike) -> Path:
    """A path."""
    return Path(path).expanduser()


def maybe_path(path: PathLike | None) -> Path | None:
    """A path, if there is one."""
    return None if path is None else path_of(path)


def paths_of(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """One path or several."""
    return [path_of(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def place_text(place: PathLike) -> str:
    """A folder or a URL as text."""
    return os.path.expanduser(os.fspath(place))
