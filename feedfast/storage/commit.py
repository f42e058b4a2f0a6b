"""A commit line: one durable object, its rows, length and checksums, and the digest of what its array depends on."""

from __future__ import annotations

import builtins
import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, ClassVar, Final

from pydantic import AfterValidator, ConfigDict, NonNegativeInt, StringConstraints, TypeAdapter, ValidationError

from feedfast.storage.store import MAX_LINE_BYTES


def _ordered(rows: tuple[int, int]) -> tuple[int, int]:
    if rows[0] >= rows[1]:
        raise ValueError("expected start < stop")
    return rows


Rows = Annotated[tuple[NonNegativeInt, NonNegativeInt], AfterValidator(_ordered)]
BlockSum = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One durable object.

    ``rows`` are its real rows [start, stop); ``crc32c`` (8 hex digits) and ``sha256`` cover the whole object.

    ``saturated`` counts values the codec clipped. ``fit`` is of codes: the first 16 digits of the sha256 of the scale
    they were made with. ``block_sums`` holds the last four bytes of each stored block as they lie in the object (raw:
    its crc32c; zstd: the frame's checksum), 8 hex digits each.

    An object that has gone missing or short is computed again and logged with a higher ``attempt``, which replaces the
    older line.
    """

    # Types are checked where a line is read, by pydantic and without conversions; the constructor is plain.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    array: str
    shard: str
    view: NonNegativeInt
    rows: Rows
    bytes: NonNegativeInt
    crc32c: str
    sha256: str
    manifest: str
    saturated: NonNegativeInt = 0
    fit: str = ""
    # Data followed by their own crc32c always have the same crc32c, so the object's is one constant for all objects of
    # raw blocks and one shape. It finds every change within an object, but only the sha256 tells two objects apart, and
    # hashing whole objects is too slow for training. With these a reader compares eight digits per block, and a sound
    # object of the same length from another view, another cache or other weights is found when its first block is read.
    block_sums: tuple[BlockSum, ...] = ()
    attempt: NonNegativeInt = 0

    def to_line(self) -> str:
        """The JSON line, newline included; empty optional fields are left out."""
        content = {key: value for key, value in asdict(self).items() if key not in _OPTIONAL or value}
        return json.dumps(content, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str | builtins.bytes) -> Commit:
        """Parse one line.

        Raises:
            ValueError: not a complete, well-typed commit line.
        """
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{len(line)} bytes long")
        try:
            return _LINE.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "line"
            raise ValueError(f"{where}: {first['msg']}, found {str(first['input'])[:80]!r}") from None


_LINE: Final = TypeAdapter(Commit)
_OPTIONAL: Final = {entry.name for entry in fields(Commit) if entry.default is not MISSING}
