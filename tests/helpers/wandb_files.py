"""The records of W&B's offline files, read as LevelDB's log format has them: blocks of 32 KiB, records in fragments."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 << 10
HEADER = 7  # of the file (":W&B", magic, version), and of each fragment (crc32, length, type)


def records(path: Path) -> Iterator[Any]:
    """The protobuf messages of one ``.wandb`` file; what follows a torn one is left out."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, held = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little for another fragment: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if at > len(data):
            return
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged, without W&B's own columns."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows


def config(path: Path) -> dict[str, Any]:
    """The run's configuration as it was given, and its name, id, project and tags."""
    (run,) = (record.run for record in records(path) if record.WhichOneof("record_type") == "run")
    found = {item.key: json.loads(item.value_json) for item in run.config.update}
    return {**found, "name": run.display_name, "id": run.run_id, "project": run.project, "tags": set(run.tags)}
