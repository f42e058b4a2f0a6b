"""The commit log: which objects exist, one line each, written only after the object itself is durable.

``commits/part-I-of-N.jsonl`` is append-only and belongs to one writer at a time. A line names an array, an object
key, the rows it holds, its length and checksums, and the digest of what the array depends on. An object without a
line does not exist; a line without its object is damage.

The digest of a cache is taken over the lines in canonical order and depends on neither the writers nor the history.
This module reads and checks; `feedfast.storage.ledger` appends; `feedfast.storage.index` saves reading very many lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from feedfast.errors import CacheDamageError, FeedfastError
from feedfast.storage import names
from feedfast.storage.commit import Commit as Commit
from feedfast.storage.index import Commits, LogIndex, read_index, write_index
from feedfast.storage.layout import ArraySpec
from feedfast.storage.places import open_store
from feedfast.storage.schema import Manifest
from feedfast.storage.store import COMMITS, MAX_LINE_BYTES, Place, Store, refuse_not_damage

MAX_PROBLEMS: Final = 1000  # of one kind that are listed; the rest is counted
_EVERYTHING: Final = 1 << 63
Problem = dict[str, str]


_SCALE_KEY: Final = "c/0/0"  # the one object of [2, channel]


@dataclass(slots=True)
class Log:
    """All commit lines of a cache: the valid line per (array, shard key), and what is wrong with the log itself.

    Attributes:
        commits: what is committed.
        stale: codes made with another scale than the one that is committed: absent, to be written again.
        problems: what is wrong.
    """

    commits: Commits = field(default_factory=Commits)
    stale: dict[tuple[str, str], Commit] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of(self, array: str) -> list[Commit]:
        """The commits of one array."""
        return [*self.commits.of(array), *(c for (name, _), c in self.commits.lines.items() if name == array)]


def problem(array: str, shard: str, kind: str, detail: str) -> Problem:
    """One entry of the list that `CacheDamageError` and ``verify`` report."""
    return {"array": array, "shard": shard, "kind": kind, "detail": detail}


def log_name(part: tuple[int, int]) -> str:
    """File name of a writer's log below ``commits/``."""
    return f"part-{part[0]}-of-{part[1]}.jsonl"


def parse_log(lines: Iterable[bytes], name: str) -> tuple[list[Commit], int, list[Problem]]:
    """The commits in one log file, the length of its sound part in bytes, and problems.

    The last line is torn (``log-torn``) when it lacks its newline or cannot be parsed; the sound part ends before it.
    An unreadable line further up is reported as ``log-damaged`` and skipped: only the tail of an append-only log can
    be torn. What follows a line that no writer writes so long, or a thousand unreadable ones, is not looked at.

    Args:
        lines: as of `Store.lines`.
        name: of the file, for the problems.
    """
    commits: list[Commit] = []
    problems: list[Problem] = []
    sound = 0
    unreadable: tuple[int, str] | None = None  # the line before this one: torn if it was the last
    for number, line in enumerate(lines, 1):
        if unreadable is not None:
            problems.append(problem("", name, "log-damaged", unreadable[1]))
            sound += unreadable[0]
            unreadable = None
        if len(line) > MAX_LINE_BYTES or len(problems) >= MAX_PROBLEMS:
            why = (
                f"longer than {MAX_LINE_BYTES} bytes" if len(line) > MAX_LINE_BYTES else "as unreadable as many others"
            )
            problems.append(problem("", name, "log-damaged", f"line {number} is {why}; the rest is not read"))
            return commits, _EVERYTHING, problems
        if not line.endswith(b"\n"):
            problems.append(problem("", name, "log-torn", f"line {number} is incomplete ({len(line)} bytes)"))
            return commits, sound, problems
        try:
            commits.append(Commit.from_line(line[:-1]))
            sound += len(line)
        except ValueError as error:
            unreadable = len(line), f"line {number} is unreadable: {error}"
    if unreadable is not None:
        problems.append(problem("", name, "log-torn", unreadable[1]))
    return commits, sound, problems


def collect(commits: Iterable[Commit], problems: Iterable[Problem] = (), index: LogIndex | None = None) -> Log:
    """Commits of several files, after those of an index, as one log: the highest attempt of a shard counts.

    Two different lines of the same attempt are ``log-duplicate``; two equal ones are harmless.
    """
    log = Log(Commits(index.arrays if index else None), problems=list(problems))
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
    _set_stale_aside(log)
    return log


def _set_stale_aside(log: Log) -> None:
    fits: dict[str, str] = {}

    def expected(array: str) -> str:
        if array not in fits:
            fits[array] = fit_of(array, log.commits)
        return fits[array]

    for array, index in list(log.commits.indexed.items()):
        if is_codes(array) and index.fit != expected(array):
            log.stale |= {(commit.array, commit.shard): commit for commit in log.commits.drop(array)}
    codes = {array for array, _ in log.commits.lines if is_codes(array)}
    for key, commit in list(log.commits.lines.items()):
        if commit.array in codes and commit.fit != expected(commit.array):
            log.stale[key] = log.commits.pop(key)


def is_codes(array: str) -> bool:
    """Whether an array holds codes, whose lines name their scale."""
    target = names.parse(array)
    return target is not None and target.part == "codes"


def fit_of(array: str, commits: Mapping[tuple[str, str], Commit]) -> str:
    """What names the scale that codes of ``array`` were to be made with; "" for other arrays, or without a scale."""
    target = names.parse(array)
    if target is None or target.part != "codes":
        return ""
    scale = commits.get((names.scale(target.teacher, target.tap), _SCALE_KEY))
    return "" if scale is None else scale.sha256[:16]


def read_log(place: Place | Store, *, indexed: bool = True) -> Log:
    """All logs of a cache as one; problems are returned, not raised. Without logs: an empty log.

    Args:
        place: the cache.
        indexed: lines that an index covers are not read again.

    Raises:
        FeedfastError: a log cannot be opened or read.
    """
    store = open_store(place)
    index = read_index(store) if indexed else None
    covered = index.covered if index else {}
    commits: list[Commit] = []
    problems: list[Problem] = []
    for name in store.names(COMMITS):
        if name.endswith(".jsonl"):
            key = f"{COMMITS}/{name}"
            try:
                found, _, wrong = parse_log(store.lines(key, covered.get(name, 0)), key)
            except OSError as error:
                raise FeedfastError(f"{store.where(key)}: cannot be read: {error.strerror or error}") from error
            commits += found
            problems += wrong
    return collect(commits, problems, index)


def keep_index(place: Place | Store, specs: Mapping[str, ArraySpec]) -> bool:
    """Put an index of the logs of a complete cache of many lines; whether one is there now.

    Raises:
        FeedfastError: a log cannot be read, or the index cannot be written.
    """
    store = open_store(place)
    logs = [name for name in store.names(COMMITS) if name.endswith(".jsonl")]
    try:
        # before the lines are read: those that come meanwhile are read again, and equal ones are harmless
        sizes = {name: store.size(f"{COMMITS}/{name}") for name in logs}
    except OSError as error:
        raise FeedfastError(f"{store.where(COMMITS)}: cannot be read: {error.strerror or error}") from error
    log = read_log(store, indexed=False)
    if log.problems or log.stale or any(check_commit(commit, specs) for commit in log.commits.all()):
        return False
    return write_index(store, log.commits, specs, sizes)


def check_log(manifest: Manifest, specs: Mapping[str, ArraySpec], log: Log) -> list[Problem]:
    """What is wrong with a log: kinds ``log-torn``, ``log-damaged``, ``log-duplicate``, ``manifest-digest``.

    A torn last line is what a killed writer leaves; its shard was never committed.
    """
    problems = list(log.problems)
    digests = {name: manifest.digest_for(name) for name in specs}
    for name, index in list(log.commits.indexed.items()):
        spec = specs.get(name)
        if spec is None or not index.fits(spec) or index.manifest != digests[name]:
            log.commits.lines |= {(commit.array, commit.shard): commit for commit in log.commits.drop(name)}
    for commit in log.commits.lines.values():
        wrong = check_commit(commit, specs)
        if wrong is None and commit.manifest != digests[commit.array]:
            expected = digests[commit.array]
            detail = f"written for a manifest part {commit.manifest[:12]}…, this cache's is {expected[:12]}…"
            wrong = problem(commit.array, commit.shard, "manifest-digest", detail)
        if wrong is not None:
            problems.append(wrong)
    return problems


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
    if len(commit.block_sums) != spec.real_blocks(shard):
        detail = f"expected {spec.real_blocks(shard)} block_sums, found {len(commit.block_sums)}"
        return problem(commit.array, commit.shard, "log-damaged", detail)
    return None


def object_key(array: str, shard: str) -> str:
    """Key of an object. ``shard`` must have been checked (`check_commit`) or made by `ArraySpec.key`."""
    return f"{array}/{shard}"


def check_length(expected: int, find: Callable[[], int]) -> tuple[str, str] | None:
    """Whether a committed object has its length; if not, the problem's kind and detail.

    Args:
        expected: bytes that were committed.
        find: finds the object's bytes or raises `OSError`.

    Returns:
        None, or kind ``missing``, ``io`` or ``length`` and what was found.

    Raises:
        FeedfastError: it may not be opened, or not now (`feedfast.storage.store.refuse_not_damage`).
    """
    try:
        found = find()
    except FileNotFoundError:
        return "missing", f"committed with {expected} bytes, but there is no file"
    except OSError as error:
        refuse_not_damage(error)
        return "io", f"committed with {expected} bytes, but it cannot be opened: {error.strerror}"
    return None if found == expected else ("length", f"committed with {expected} bytes, the file has {found}")


def digest_of(commits: Iterable[Commit]) -> str:
    """Sha256 (hex) over the sorted lines ``array shard bytes crc32c sha256``: who wrote them, and when, is left out."""
    lines = sorted(f"{c.array} {c.shard} {c.bytes} {c.crc32c} {c.sha256}\n" for c in commits)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_digest(place: Place | Store) -> str:
    """The digest of everything committed in a cache.

    Raises:
        CacheDamageError: the log is damaged other than by a torn last line.
    """
    store = open_store(place)
    log = read_log(store)
    damage = [entry for entry in log.problems if entry["kind"] != "log-torn"]
    if damage:
        raise CacheDamageError(f"{store.where()}: {damage[0]['shard']}: {damage[0]['detail']}", damage)
    return digest_of(log.commits.all())
