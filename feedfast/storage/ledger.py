"""What is committed in a cache, and the one way to commit more: the object first, whole and durable, then its line.

A `Ledger` belongs to one writer of one *part*. Opening it locks the part, cuts what a crash left, and checks every line
of all logs; a committed object that has since gone missing or short counts as missing and is listed in ``damaged``.
Several writers may work at once, each on its own part with its own log. The same part twice, or parts of two divisions
at once, are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, PartTakenError
from feedfast.storage import names
from feedfast.storage.assemble import block_sums
from feedfast.storage.blocks import crc32c
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import (
    Commit,
    Problem,
    check_length,
    check_log,
    fit_of,
    log_name,
    object_key,
    parse_log,
    problem,
    read_log,
)
from feedfast.storage.manifest import read_manifest
from feedfast.storage.schema import Manifest, describe_differences, differences
from feedfast.storage.store import COMMITS, Lock, Log, Store


class Ledger:
    """The committed objects of a cache, held open by the writer of one part.

    Attributes:
        specs: every array of the manifest.
        commits: the valid line per (array, shard key).
        done: per array, (view, shard) of every object that is committed, or that its writer has claimed.
        damaged: committed objects found missing or of another length at opening.
        bytes_written: bytes of the objects committed through this ledger.
        shards_written: how many objects those are.
    """

    def __init__(self, store: Store, manifest: Manifest, part: tuple[int, int]) -> None:
        """Lock part i of n, repair the end of its log, and learn what is committed.

        Raises:
            PartTakenError: the part is already being written, or writers of another division are at work.
            CacheMismatchError: the stored manifest is another.
            CacheDamageError: a log is damaged other than by a torn last line, or disagrees with the manifest.
        """
        self.store, self.manifest, self.part = store, manifest, part
        self.specs = array_specs(manifest)
        self.commits: MutableMapping[tuple[str, str], Commit] = {}
        self._stale: dict[tuple[str, str], Commit] = {}  # codes of another scale: their attempts count on
        self.done: dict[str, set[tuple[int, int]]] = {name: set() for name in self.specs}
        self.damaged: list[Problem] = []
        self.bytes_written = self.shards_written = 0
        self._owner = f"part-{part[0]}-of-{part[1]}"
        self._digests = {name: manifest.digest_for(name) for name in self.specs}
        self._appending = threading.Lock()  # guards the log, the counters and what is committed
        stored = read_manifest(store)
        self._refuse_other(stored)
        with contextlib.ExitStack() as undo:
            self._split = undo.enter_context(self._join_split())
            self._log = undo.enter_context(self._open_log())
            store.sweep(self._is_dead)
            self._learn(stored)
            undo.pop_all()

    # ---- opening

    def _refuse_other(self, stored: Manifest) -> None:
        found = differences(self.manifest, stored, missing=True)
        if not found:
            here = array_specs(stored)
            found = [
                (name, digest[:12], stored.digest_for(name)[:12] if name in here else None)
                for name, digest in self._digests.items()
                if name not in here or stored.digest_for(name) != digest
            ]
        if found:
            table = describe_differences(found)
            where = self.store.where()
            raise CacheMismatchError(f"{where}: expected the manifest that open_for_writing returned\n{table}")

    def _join_split(self) -> Lock:
        # Parts are told apart by number, so all writers at work must mean the same division.
        parts = str(self.part[1])
        lock = self.store.join(f"{COMMITS}/.lock-split", parts)
        if isinstance(lock, str):
            raise PartTakenError(
                f"{self.store.where()}: expected a division into {parts} part(s), "
                f"found writers at work on one of {lock}"
            )
        return lock

    def _open_log(self) -> Log:
        key = f"{COMMITS}/{log_name(self.part)}"
        log = self.store.open_log(key, lambda lines: parse_log(lines, key)[1])
        if log is None:
            i, n = self.part
            raise PartTakenError(f"{self.store.where()}: part {i}/{n} is already being written by another process")
        return log

    def _is_dead(self, owner: str) -> bool:
        """Whether unfinished objects of ``owner`` are left from a dead writer, now that this one holds the part."""
        words = owner.split("-")  # part-I-of-N, or manifest
        # Writers of any other division cannot be at work, so theirs are dead, too.
        return words[0] == "part" and (words[3] != str(self.part[1]) or words[1] == str(self.part[0]))

    def _learn(self, stored: Manifest) -> None:
        log = read_log(self.store)
        specs = array_specs(stored)
        problems = [entry for entry in check_log(stored, specs, log) if entry["kind"] != "log-torn"]
        if problems:
            first = problems[0]
            where = " ".join(word for word in (first["array"], first["shard"]) if word)
            raise CacheDamageError(
                f"{self.store.where()}: commit log: {len(problems)} problem(s), {where}: {first['kind']}: "
                f"{first['detail']}. A line that is removed from the log makes its shard be computed again",
                problems,
            )
        self.commits, self._stale = log.commits, log.stale
        look: dict[str, Callable[[str], int]] = {}
        for key, commit in log.commits.items():
            if commit.array not in look:
                look[commit.array] = self.store.sizes(commit.array)
            wrong = check_length(commit.bytes, partial(look[commit.array], object_key(*key)))
            if wrong is not None:
                self.damaged.append(problem(*key, *wrong))
            elif commit.array in self.done:
                self.done[commit.array].add(specs[commit.array].locate(commit.shard))

    # ---- what there is

    def spec(self, array: str) -> ArraySpec:
        """How an array is stored.

        Raises:
            FeedfastError: the manifest has no such array.
        """
        if array not in self.specs:
            raise FeedfastError(f"{array}: the manifest has no such array")
        return self.specs[array]

    def missing(self, array: str) -> set[tuple[int, int]]:
        """(view, shard) of every object of an array that is not ``done``, whichever part it belongs to."""
        spec = self.spec(array)
        return {(v, s) for v in range(spec.num_views) for s in range(spec.num_shards)} - self.done[array]

    def refresh(self, *arrays: str) -> None:
        """Learn what other writers have committed of some arrays since."""
        log = read_log(self.store)
        for array in arrays:
            for commit in log.of(array):
                place = self.specs[array].locate(commit.shard)
                if place not in self.done[array] and (array, commit.shard) not in self.commits:
                    self.commits[array, commit.shard] = commit
                    self.done[array].add(place)

    # ---- committing

    def commit(
        self,
        spec: ArraySpec,
        view: int,
        shard: int,
        parts: list[Any],
        saturated: int = 0,
        *,
        written: Callable[[], None] | None = None,
    ) -> None:
        """Put an object, then log it. Durable on return; safe from several threads.

        Args:
            spec: its array.
            view: its view.
            shard: its number.
            parts: its content, as `feedfast.storage.assemble.encode_shard` returns it.
            saturated: see `Commit`.
            written: called when nothing is left but to wait until it is durable: the buffers of ``parts`` may be used
                again.

        Raises:
            FeedfastError: it cannot be written.
        """
        key = spec.key(view, shard)
        crc, sha = 0, hashlib.sha256()
        for part in parts:
            crc = crc32c(part, crc)
            sha.update(part)
        content = [memoryview(part).cast("B") for part in parts]
        sums = block_sums(spec, parts)
        earlier = self.commits.get((spec.name, key)) or self._stale.get((spec.name, key))
        taken = None if earlier else partial(self._refuse_other_writer, spec, key)
        self.store.put(object_key(spec.name, key), content, self._owner, taken=taken, written=written)
        commit = Commit(
            array=spec.name,
            shard=key,
            view=view,
            rows=spec.shard_span(shard),
            bytes=sum(part.nbytes for part in content),
            crc32c=f"{crc:08x}",
            sha256=sha.hexdigest(),
            manifest=self._digests[spec.name],
            saturated=saturated,
            fit=fit_of(spec.name, self.commits),
            block_sums=sums,
            attempt=earlier.attempt + 1 if earlier else 0,
        )
        with self._appending:
            self._log.append(commit.to_line().encode())
            self.commits[spec.name, key] = commit
            self._forget_codes_of_another(commit)
            self.bytes_written += commit.bytes
            self.shards_written += 1

    def _refuse_other_writer(self, spec: ArraySpec, key: str) -> None:
        """Of an object that was there, with other bytes: one who died left it, or one who lives has logged it."""
        if (spec.name, key) in read_log(self.store).commits:
            where = self.store.where(object_key(spec.name, key))
            raise FeedfastError(
                f"{where}: another process has committed this shard meanwhile, with other bytes; expected one writer "
                "per part. What is committed stays valid: run the same command again"
            )

    def _forget_codes_of_another(self, scale: Commit) -> None:
        """With a new scale, codes made with another one are absent."""
        target = names.parse(scale.array)
        if target is None or target.part != "scale":
            return
        array = names.codes(target.teacher, target.tap)
        expected = fit_of(array, self.commits)
        for key, commit in list(self.commits.items()):
            if commit.array == array and commit.fit != expected:
                self._stale[key] = self.commits.pop(key)
                self.done[array].discard(self.specs[array].locate(commit.shard))

    def close(self) -> None:
        """Give the part back."""
        self._log.close()
        self._split.close()
