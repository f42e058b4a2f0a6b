"""The commit log: which objects exist, one line each, written only after the object itself is durable.

``commits/part-I-of-N.jsonl`` is append-only and belongs to one writer at a time. A line names an array, an object
key, the rows it holds, its length and checksums, and the digest of what the array depends on. An object without a
line does not exist; a line without its object is damage.

A crash may leave the last line of a log torn. `read_log` reports it (kind ``log-torn``) and ignores it, and the log's
next writer cuts it off. Anything unreadable before the last line is ``log-damaged``: logs never lose a middle.

An object that has gone missing or short is computed again and logged with a higher ``attempt``, which replaces the
older line. Two different lines of the same attempt are ``log-duplicate``; two equal ones are harmless.

Data followed by their own crc32c always have the same crc32c, so the object's is one constant for all objects of raw
blocks and one shape. It finds every change within an object, but only the sha256 tells two objects apart, and hashing
whole objects is too slow for training. So a line also repeats the checksum that ends each block (``block_sums``): a
reader compares eight digits a block, and a sound object of the same length from another view, another cache or other
weights is found when its first block is read.

The digest of a cache is taken over the lines in canonical order and depends on neither the writers nor the history.
This module only reads; `feedfast.cache.writer` appends.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from feedfast.cache.layout import ArraySpec
from feedfast.errors import CacheDamageError

COMMITS: Final = "commits"
MAX_LINE_BYTES: Final = 1 << 20  # 1 MiB; a line is about 300 bytes
Problem = dict[str, str]


@dataclass(frozen=True, slots=True)
class Commit:
    """One durable object.

    ``rows`` are its real rows [start, stop); ``crc32c`` (8 hex digits) and ``sha256`` cover the whole object.

    ``saturated`` counts values the codec clipped. ``pixel_crc32c`` holds, where the writer was given them, one
    checksum per block of rows over the decoded pixels the teachers saw. ``block_sums`` holds the last four bytes of
    each stored block as they lie in the object (raw: its crc32c; zstd: the frame's checksum), 8 hex digits each.
    """

    array: str
    shard: str
    view: int
    rows: tuple[int, int]
    bytes: int
    crc32c: str
    sha256: str
    manifest: str
    saturated: int = 0
    pixel_crc32c: tuple[str, ...] = ()
    block_sums: tuple[str, ...] = ()
    attempt: int = 0

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
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")  # noqa: TRY004 -- callers catch one type
        unknown, missing = sorted(found.keys() - _TYPES.keys()), sorted(_TYPES.keys() - _OPTIONAL - found.keys())
        if unknown or missing:
            raise ValueError(f"unknown fields {unknown}, missing fields {missing}")
        for key, value in found.items():
            if type(value) is not _TYPES[key] or (type(value) is int and value < 0):
                raise ValueError(f"{key}: expected {_TYPES[key].__name__}, found {value!r}")
        rows, pixels, sums = found["rows"], found.get("pixel_crc32c", []), found.get("block_sums", [])
        if len(rows) != 2 or any(type(row) is not int for row in rows) or not 0 <= rows[0] < rows[1]:
            raise ValueError(f"rows: expected [start, stop], found {rows!r}")
        if any(type(value) is not str for value in pixels):
            raise ValueError("pixel_crc32c: expected strings")
        if any(type(value) is not str or not _SUM.fullmatch(value) for value in sums):
            raise ValueError("block_sums: expected strings of 8 hexadecimal digits")
        own = {"rows": (rows[0], rows[1]), "pixel_crc32c": tuple(pixels), "block_sums": tuple(sums)}
        return cls(**{**found, **own})


_SUM: Final = re.compile("[0-9a-f]{8}")
_OPTIONAL: Final = {"saturated", "pixel_crc32c", "block_sums", "attempt"}
_TYPES: Final[dict[str, type]] = {
    "array": str, "shard": str, "view": int, "rows": list, "bytes": int, "crc32c": str, "sha256": str, "manifest": str,
    "saturated": int, "pixel_crc32c": list, "block_sums": list, "attempt": int,
}  # fmt: skip


@dataclass(slots=True)
class Log:
    """All commit lines of a cache: the valid line per (array, shard key), and what is wrong with the log itself."""

    commits: dict[tuple[str, str], Commit] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of(self, array: str) -> list[Commit]:
        """The commits of one array."""
        return [commit for (name, _), commit in self.commits.items() if name == array]


def problem(array: str, shard: str, kind: str, detail: str) -> Problem:
    """One entry of the list that `CacheDamageError` and ``verify`` report."""
    return {"array": array, "shard": shard, "kind": kind, "detail": detail}


def log_name(part: tuple[int, int]) -> str:
    """File name of a writer's log below ``commits/``."""
    return f"part-{part[0]}-of-{part[1]}.jsonl"


def parse_log(data: bytes, name: str) -> tuple[list[Commit], int, list[Problem]]:
    """The commits in one log file, the length of its sound part in bytes, and problems.

    The last line is torn when it lacks its newline or cannot be parsed; the sound part ends before it. An unreadable
    line further up is reported as ``log-damaged`` and skipped.
    """
    commits: list[Commit] = []
    problems: list[Problem] = []
    sound = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        last = number >= len(lines) - 1  # split leaves an empty piece after the final newline
        if number == len(lines):
            if line:
                problems.append(problem("", name, "log-torn", f"line {number} is incomplete ({len(line)} bytes)"))
            break
        try:
            commits.append(Commit.from_line(line))
        except ValueError as error:
            kind = "log-torn" if last and not lines[-1] else "log-damaged"
            problems.append(problem("", name, kind, f"line {number} is unreadable: {error}"))
            if kind == "log-torn":
                break
        sound += len(line) + 1
    return commits, sound, problems


def collect(commits: Iterable[Commit], problems: Iterable[Problem] = ()) -> Log:
    """Commits of several files as one log: the highest attempt of a shard counts."""
    log = Log(problems=list(problems))
    for commit in commits:
        key = (commit.array, commit.shard)
        known = log.commits.get(key)
        if known is not None and known.attempt == commit.attempt and known != commit:
            detail = (
                f"attempt {commit.attempt} is logged twice with different content ({known.crc32c}, {commit.crc32c})"
            )
            log.problems.append(problem(commit.array, commit.shard, "log-duplicate", detail))
        if known is None or commit.attempt > known.attempt:
            log.commits[key] = commit
    return log


def read_log(path: str | Path) -> Log:
    """All ``commits/*.jsonl`` of a cache; problems are returned, not raised. Without logs: an empty log."""
    commits: list[Commit] = []
    problems: list[Problem] = []
    for file in sorted((Path(path) / COMMITS).glob("*.jsonl")):
        found, _, wrong = parse_log(file.read_bytes(), f"{COMMITS}/{file.name}")
        commits += found
        problems += wrong
    return collect(commits, problems)


def check_commit(commit: Commit, specs: Mapping[str, ArraySpec]) -> Problem | None:
    """What is wrong with a line: it must name an object the manifest has, and the rows that object holds.

    Length and digest are checked elsewhere.
    """
    spec = specs.get(commit.array)
    if spec is None:
        return problem(commit.array, commit.shard, "log-damaged", "the manifest has no such array")
    try:
        view, shard = spec.locate(commit.shard)
    except IndexError as error:
        return problem(commit.array, commit.shard, "log-damaged", str(error))
    if commit.view != view or commit.rows != spec.shard_span(shard):
        expected = f"view {view}, rows {list(spec.shard_span(shard))}"
        found = f"view {commit.view}, rows {list(commit.rows)}"
        return problem(commit.array, commit.shard, "log-damaged", f"expected {expected}, found {found}")
    if commit.block_sums and len(commit.block_sums) != spec.real_blocks(shard):
        detail = f"expected {spec.real_blocks(shard)} block_sums, found {len(commit.block_sums)}"
        return problem(commit.array, commit.shard, "log-damaged", detail)
    return None


def object_path(root: str | Path, array: str, shard: str) -> Path:
    """Where an object lies. ``shard`` must have been checked (`check_commit`) or made by `ArraySpec.key`."""
    return Path(root, array, shard)


def digest_of(commits: Iterable[Commit]) -> str:
    """Sha256 (hex) over the sorted lines ``array shard bytes crc32c sha256``: who wrote them, and when, is left out."""
    lines = sorted(f"{c.array} {c.shard} {c.bytes} {c.crc32c} {c.sha256}\n" for c in commits)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_digest(path: str | Path) -> str:
    """The digest of everything committed in a cache.

    Raises:
        CacheDamageError: the log is damaged other than by a torn last line.
    """
    log = read_log(path)
    damage = [entry for entry in log.problems if entry["kind"] != "log-torn"]
    if damage:
        raise CacheDamageError(f"{path}: {damage[0]['shard']}: {damage[0]['detail']}", damage)
    return digest_of(log.commits.values())
