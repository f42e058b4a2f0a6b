"""What a writer leaves behind that is killed, crowded by others or out of space: a cache to go on with, always.

The end is the same every time: the same command again makes the objects and the digest of an undisturbed writer.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cache_samples import (
    FINAL,
    append_missing,
    fill_cache,
    make_manifest,
    make_tap,
    make_teacher,
    memory_path,
    object_path,
    objects,
    rows_of,
    small_values,
    stamps,
    standard,
    tiny,
)

from feedfast.errors import CacheDamageError, FeedfastError, RequestError
from feedfast.storage.create import manifest_lock
from feedfast.storage.disk import Disk
from feedfast.storage.layout import array_specs
from feedfast.storage.log import cache_digest, read_log
from feedfast.storage.store import COMMITS
from feedfast.storage.writer import CacheWriter, open_for_writing

HELPERS = Path(__file__).parents[1] / "helpers"

tmp_path = memory_path  # every test of this file writes into memory


# ---- killed


def test_killed_anywhere_then_finished_equals_uninterrupted(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HELPERS / "kill_writer.py", tmp_path, "5"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) > 40
    assert [row for row in rows if row[1:] != [True, True]] == []


def test_an_object_is_durable_before_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show this, a power cut would: the order of system calls, with what each was called on."""
    manifest = open_for_writing(tmp_path / "c", tiny())
    spec = array_specs(manifest)[FINAL]
    calls: list[tuple[str, str]] = []

    def name_of(file: Any) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
        return "temporary" if path.name.startswith(".tmp-") else str(path.relative_to(tmp_path / "c"))

    def trace(name: str) -> None:
        real = getattr(os, name)

        def traced(file: Any, *rest: Any) -> Any:
            calls.append((name, name_of(file)))
            return real(file, *rest)

        monkeypatch.setattr(os, name, traced)

    with CacheWriter(tmp_path / "c", manifest) as writer:
        for name in ("writev", "fsync", "rename"):
            trace(name)
        writer.append(FINAL, 0, 0, rows_of(spec, 0, 0, 16))
    log = "commits/part-0-of-1.jsonl"
    made = [FINAL, f"{FINAL}/c", f"{FINAL}/c/0", f"{FINAL}/c/0/0", f"{FINAL}/c/0/0/0"]
    assert calls == [
        *(("fsync", folder) for folder in made),
        *((name, "temporary") for name in ("writev", "fsync", "rename")),
        ("fsync", f"{FINAL}/c/0/0/0/0"),
        ("writev", log),
        ("fsync", log),
    ]


def test_a_torn_last_line_is_cut_and_its_shard_written_again(tmp_path: Path) -> None:
    digest = fill_cache(tmp_path / "c", tiny())
    wanted = objects(tmp_path / "c")
    log = tmp_path / "c" / COMMITS / "part-0-of-1.jsonl"
    data = log.read_bytes()
    for cut in (len(data) - 1, len(data) - 40, data[:-1].rindex(b"\n") + 2):
        log.write_bytes(data[:cut])
        assert read_log(tmp_path / "c").problems[0]["kind"] == "log-torn"
        assert fill_cache(tmp_path / "c", tiny()) == digest
        assert len(log.read_bytes()) == len(data)
        assert read_log(tmp_path / "c").problems == []
        assert objects(tmp_path / "c") == wanted


def test_damage_within_a_log_is_refused(tmp_path: Path) -> None:
    fill_cache(tmp_path / "c", tiny())
    log = tmp_path / "c" / COMMITS / "part-0-of-1.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for bad, kind in (
        ("x" + lines[1], "log-damaged"),
        (lines[1].replace("c/0/0", "c/9/0"), "log-damaged"),
        (lines[1].replace('"manifest":"', '"manifest":"0'), "manifest-digest"),
        (lines[0].replace('"crc32c":"', '"crc32c":"0') + lines[1], "log-duplicate"),
    ):
        log.write_text("".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(CacheDamageError, match=kind) as caught:
            CacheWriter(tmp_path / "c", tiny())
        assert caught.value.problems[0]["kind"] == kind
    log.write_text("".join(lines))
    CacheWriter(tmp_path / "c", tiny()).close()


@pytest.mark.parametrize("kind", ["missing", "length"])
def test_objects_that_are_gone_or_short_are_written_again(tmp_path: Path, kind: str) -> None:
    manifest = tiny()
    digest = fill_cache(tmp_path / "c", manifest)
    wanted = stamps(tmp_path / "c")
    key = array_specs(manifest)[FINAL].key(0, 2)
    victim = object_path(tmp_path / "c", FINAL, key)
    if kind == "missing":
        victim.unlink()
    else:
        os.truncate(victim, 5)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        assert [(entry["array"], entry["shard"], entry["kind"]) for entry in writer.damaged] == [(FINAL, key, kind)]
        assert writer.missing(FINAL) == {(0, 2)}
        append_missing(writer)
    assert writer.shards_written == 1
    assert cache_digest(tmp_path / "c") == digest
    assert read_log(tmp_path / "c").commits[FINAL, key].attempt == 1
    found = stamps(tmp_path / "c")
    assert {name for name in wanted if wanted[name] != found[name]} == {f"{FINAL}/{key}"}
    assert {name: entry[2] for name, entry in wanted.items()} == {name: entry[2] for name, entry in found.items()}
    CacheWriter(tmp_path / "c", manifest).close()


def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    commits = tmp_path / "c" / COMMITS
    for name in (".tmp-part-0-of-2-17-0", ".tmp-part-1-of-2-17-0", ".tmp-part-0-of-3-1-1", ".tmp-manifest-9-0"):
        (commits / name).write_bytes(b"x")
    CacheWriter(tmp_path / "c", manifest, part=(0, 2)).close()
    assert sorted(file.name for file in commits.glob(".tmp-*")) == [".tmp-manifest-9-0", ".tmp-part-1-of-2-17-0"]
    open_for_writing(tmp_path / "c", manifest)
    assert sorted(file.name for file in commits.glob(".tmp-*")) == [".tmp-part-1-of-2-17-0"]


# ---- crowded


def test_two_writers_at_once(tmp_path: Path) -> None:
    script = """
import sys; from pathlib import Path; from cache_samples import fill_cache, standard
fill_cache(Path(sys.argv[1]), standard(), part=(int(sys.argv[2]), 2))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "two", str(part)], cwd=HELPERS, stderr=subprocess.PIPE, text=True
        )
        for part in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    digest = fill_cache(tmp_path / "one", standard())
    assert cache_digest(tmp_path / "two") == digest
    assert objects(tmp_path / "two") == objects(tmp_path / "one")
    logs = sorted(file.name for file in (tmp_path / "two" / COMMITS).glob("*.jsonl"))
    assert logs == ["part-0-of-2.jsonl", "part-1-of-2.jsonl"]
    assert read_log(tmp_path / "two").problems == []
    assert fill_cache(tmp_path / "two", standard()) == digest  # another division finds nothing left to do
    assert (tmp_path / "two" / COMMITS / "part-0-of-1.jsonl").read_bytes() == b""


def test_the_same_part_twice_and_mixed_divisions_are_refused(tmp_path: Path) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    with CacheWriter(tmp_path / "c", manifest, part=(0, 2)):
        with pytest.raises(RequestError, match="part 0/2 is already being written"):
            CacheWriter(tmp_path / "c", manifest, part=(0, 2))
        with pytest.raises(RequestError, match=r"1 part\(s\), found .* at work on one of 2"):
            CacheWriter(tmp_path / "c", manifest)
        CacheWriter(tmp_path / "c", manifest, part=(1, 2)).close()
    CacheWriter(tmp_path / "c", manifest).close()
    for part in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(RequestError, match="part"):
            CacheWriter(tmp_path / "c", manifest, part=part)


def test_the_manifest_lock_excludes_and_is_waited_for(tmp_path: Path) -> None:
    open_for_writing(tmp_path / "c", tiny())
    other, key = Disk(tmp_path / "c"), f"{COMMITS}/.lock-manifest"
    with manifest_lock(Disk(tmp_path / "c")):
        assert other.lock(key) is None
        start = time.monotonic()
        assert other.lock(key, patience_s=0.1) is None
        assert time.monotonic() - start >= 0.1
    taken = other.lock(key)
    assert taken is not None
    taken.close()


# ---- out of space


def refuse_after(monkeypatch: pytest.MonkeyPatch, room: int, code: int = errno.ENOSPC) -> None:
    """A disk with room for so many more bytes: writes fill it, then fail."""
    real, left = os.writev, [room]

    def writev(fd: int, buffers: Any) -> int:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        buffer = memoryview(buffers[0])[: left[0]]
        left[0] -= len(buffer)
        return real(fd, [buffer])

    monkeypatch.setattr(os, "writev", writev)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 100, 700, 1500, 2300])
def test_a_full_disk_is_one_error_and_a_cache_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, code: int
) -> None:
    digest = fill_cache(tmp_path / "whole", tiny())
    manifest = open_for_writing(tmp_path / "c", tiny())
    for spec in array_specs(manifest).values():
        if not spec.sharded:
            with CacheWriter(tmp_path / "c", manifest) as writer:
                writer.put(spec.name, small_values(spec))
    refuse_after(monkeypatch, room, code)
    with pytest.raises(FeedfastError, match=r"no room for \d+ bytes .*\d+ bytes free.* run the same command again"):
        fill_cache(tmp_path / "c", tiny())
    monkeypatch.undo()
    assert list((tmp_path / "c").rglob(".tmp-*")) == []
    assert read_log(tmp_path / "c").problems == []
    assert fill_cache(tmp_path / "c", tiny()) == digest
    assert objects(tmp_path / "c") == objects(tmp_path / "whole")


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.decode().strip()}")
    try:
        manifest = make_manifest(
            make_teacher("a", make_tap("final", (64, 4, 4))), rows=4000, views=1, shard_bytes=1 << 17
        )
        with pytest.raises(FeedfastError, match="no room for"):
            fill_cache(disk / "c", manifest, batch=500)
        log = read_log(disk / "c")
        assert log.problems == []
        assert 0 < len(log.of(FINAL)) < array_specs(manifest)[FINAL].num_shards
        assert list(disk.rglob(".tmp-*")) == []
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        digest = fill_cache(disk / "c", manifest, batch=500)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert digest == fill_cache(tmp_path / "whole", manifest, batch=500)


def test_other_write_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_for_writing(tmp_path / "c", tiny())
    refuse_after(monkeypatch, 0, errno.EIO)
    with (
        pytest.raises(FeedfastError, match=r"samples/label/c/0: cannot be written: Input/output error"),
        CacheWriter(tmp_path / "c", manifest) as writer,
    ):
        writer.put("samples/label", small_values(writer.specs["samples/label"]))
