"""Small files that must survive a crash: written whole under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedfast.cache.store import fsync_dir, write_error


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
