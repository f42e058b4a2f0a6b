"""The one writer of whole files: killed between any two of its steps, on a full disk, where it may not write."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from feedfast.errors import FeedfastError, printable
from feedfast.files import (
    check_zip,
    make_dirs,
    open_in_place,
    parse_json,
    read_file,
    refuse_links,
    remove_temporary,
    replace_file,
    wrap_write_errors,
    write_all,
    write_json,
    write_text,
)

OLD, NEW = b"old content", [b"new ", memoryview(b"content"), b"", b" of several parts"]
STEPS = ("open", "writev", "fsync", "close", "rename", "open", "fsync", "close")  # the last three: the folder


def steps(monkeypatch: pytest.MonkeyPatch, before: Any) -> list[str]:
    """Call ``before(n, name)`` before the n-th system call of a write; the list of those made so far."""
    made: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def patched(*args: Any, **more: Any) -> Any:
            before(len(made), name)
            made.append(name)
            return real(*args, **more)

        monkeypatch.setattr(os, name, patched)

    for name in set(STEPS):
        wrap(name)
    return made


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        made = steps(patch, lambda *_: None)
        replace_file(tmp_path / "f", NEW)
    assert tuple(made) == STEPS
    assert (tmp_path / "f").read_bytes() == b"new content of several parts"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("step", range(len(STEPS) + 1))
def test_killed_between_any_two_steps_the_file_is_old_or_new(step: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)
    pid = os.fork()
    if pid == 0:  # the child touches nothing but os
        patch = pytest.MonkeyPatch()
        steps(patch, lambda n, _: os.kill(os.getpid(), signal.SIGKILL) if n == step else None)
        replace_file(tmp_path / "f", NEW)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed == (step < len(STEPS))
    named = step > STEPS.index("rename")
    assert (tmp_path / "f").read_bytes() == (b"".join(NEW) if named else OLD)
    replace_file(tmp_path / "f", [b"again"])  # what the killed one left is in nobody's way
    assert (tmp_path / "f").read_bytes() == b"again"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("step", range(STEPS.index("rename") + 1))
def test_a_step_that_fails_leaves_the_old_file_and_no_other(
    step: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(OLD)

    def fail(n: int, _: str) -> None:
        if n == step:
            raise OSError(code, os.strerror(code))

    steps(monkeypatch, fail)
    with pytest.raises(FeedfastError) as caught:
        replace_file(tmp_path / "f", NEW)
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{tmp_path / 'f'}: ")
    expected = "cannot be written" if code == errno.EIO else f"no room for {len(b''.join(NEW))} bytes"
    assert expected in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert (tmp_path / "f").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["f"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int, name: str) -> None:
        if name == "fsync":
            raise KeyboardInterrupt

    steps(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "f", NEW)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_quota_of_the_kernel(tmp_path: Path) -> None:
    """No simulation: no file of the child may grow beyond 1000 bytes."""
    (tmp_path / "f").write_bytes(OLD)
    script = """
import resource, signal, sys; from pathlib import Path; from feedfast.files import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file(Path(sys.argv[1]), [bytes(600), bytes(600)])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"FeedfastError {tmp_path / 'f'}: no room for 1200 bytes (File too large; ")
    assert (tmp_path / "f").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``/proc`` refuses whoever asks, the superuser too; a folder that is missing or a file does as well."""
    (tmp_path / "file").write_bytes(OLD)
    for path, reason in (
        (Path("/proc/f"), "No such file or directory"),
        (tmp_path / "missing/f", "No such file or directory"),
        (tmp_path / "file/f", "Not a directory"),
    ):
        with pytest.raises(FeedfastError, match=rf"{path}: cannot be written: {reason}"):
            write_text(path, "x")
    readonly = tmp_path / "readonly"
    readonly.mkdir()
    readonly.chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "open", _refusing(readonly, os.open))  # the superuser is not asked for permission
    with pytest.raises(FeedfastError, match="readonly/f: cannot be written: Permission denied"):
        write_text(readonly / "f", "x")
    assert list(readonly.iterdir()) == []


def _refusing(folder: Path, real: Any) -> Any:
    def patched(path: Any, *args: Any) -> int:
        if Path(path).parent == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        descriptor: int = real(path, *args)
        return descriptor

    return patched


def test_a_name_given_for_the_time_being_must_be_free(tmp_path: Path) -> None:
    """Else two writers would write into one file."""
    (tmp_path / "busy").write_bytes(b"theirs")
    with pytest.raises(FeedfastError, match="File exists"):
        replace_file(tmp_path / "f", NEW, temporary=tmp_path / "busy")
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "busy").read_bytes() == b"theirs"


def test_buffers_of_any_number_and_short_writes_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [bytes([n % 251]) * (n % 7) for n in range(3000)] + [os.urandom(2_500_000), b"x", os.urandom(1_100_000)]
    real = os.writev

    def short(fd: int, buffers: Any) -> int:
        assert len(buffers) <= 1024, "more than the kernel takes"
        assert sum(map(len, buffers)) <= 1 << 20, "more than is written at full speed"
        return real(fd, [*buffers[:2], memoryview(buffers[2])[:1]] if len(buffers) > 2 else buffers)

    monkeypatch.setattr(os, "writev", short)
    with (tmp_path / "f").open("wb") as file:
        write_all(file.fileno(), parts)
    assert (tmp_path / "f").read_bytes() == b"".join(parts)


def test_texts_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "größer ≥ 1\n")
    assert (tmp_path / "t").read_text("utf-8") == "größer ≥ 1\n"
    write_json(tmp_path / "j", {"a": [1, 2.5, None]})
    assert json.loads((tmp_path / "j").read_text()) == {"a": [1, 2.5, None]}
    assert oct((tmp_path / "j").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folders_are_synced_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    make_dirs(tmp_path / "a/b/c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")]
    make_dirs(tmp_path / "a/b/c")
    assert len(synced) == 3


def test_failures_of_other_writers_are_said_in_the_same_words(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, words in (
        (full, r"log: no room for more \(No space left on device; \d+ bytes free"),
        (OSError("no reason given"), "log: cannot be written: no reason given"),
    ):
        with pytest.raises(FeedfastError, match=words), wrap_write_errors(tmp_path / "log"):
            raise error


# ---- files of strangers


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / f".f.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "f", NEW)
    assert (tmp_path / "victim").read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == ["f", "victim"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_only_a_file_of_its_own_is_written_in_place(kind: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "log", tmp_path / "victim"
    victim.write_bytes(OLD)
    if kind.endswith("k") and kind != "hard link":
        path.symlink_to(victim if kind == "link" else tmp_path / "new")
    elif kind == "hard link":
        os.link(victim, path)
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(FeedfastError, match=r"log: expected a file or folder of its own, found "):
        open_in_place(path, os.O_RDWR)
    assert victim.read_bytes() == OLD
    assert not (tmp_path / "new").exists()


def test_links_are_refused_below_a_folder_and_not_above_it(tmp_path: Path) -> None:
    (tmp_path / "real/a/b").mkdir(parents=True)
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    refuse_links(tmp_path / "cache", tmp_path / "cache/a/b/missing/too")
    (tmp_path / "real/a/c").symlink_to(tmp_path)
    for below in ("a/c", "a/c/x/y"):
        with pytest.raises(FeedfastError, match=f"cache/a/c: .* a link to {tmp_path}"):
            refuse_links(tmp_path / "cache", tmp_path / "cache" / below)


def test_what_is_read_is_an_ordinary_file_of_bounded_length(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    assert read_file(tmp_path / "f", 10) == bytes(10)
    with pytest.raises(OSError, match="10 bytes long, expected at most 9"):
        read_file(tmp_path / "f", 9)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(OSError, match="not an ordinary file"):
            read_file(path, 10)
    with pytest.raises(OSError, match="null byte"):
        read_file("a\0b", 10)


@pytest.mark.parametrize(
    "text", ["[" * 66 + "]" * 66, '{"a":' * 5000, "NaN", "[-Infinity]", "9" * 5000, "", "{", "\ud800"]
)
def test_json_of_strangers_is_bounded(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert len(str(caught.value)) < 300
    assert parse_json("[" * 60 + "]" * 60)
    assert parse_json(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


def test_archives_of_tensors_hold_what_they_say(tmp_path: Path) -> None:
    for packing, words in ((zipfile.ZIP_STORED, None), (zipfile.ZIP_DEFLATED, "unpacks to 4096 bytes from")):
        with zipfile.ZipFile(tmp_path / "z", "w", packing) as archive:
            archive.writestr("data/0", bytes(4096))
        if words is None:
            check_zip(tmp_path / "z")
            content = bytearray((tmp_path / "z").read_bytes())
            content[1000] ^= 1
            (tmp_path / "z").write_bytes(content)
            words = "'data/0' in it is damaged: its CRC-32 is another"
        with pytest.raises(ValueError, match=words):
            check_zip(tmp_path / "z")
    (tmp_path / "old").write_bytes(b"torch's old format is no zip")
    check_zip(tmp_path / "old")


def test_only_temporary_files_are_removed(tmp_path: Path) -> None:
    kept = {"f", ".f", "f.1.tmp", ".f.tmp", ".f.x.tmp"}
    for name in (*kept, ".f.1.tmp", ".checkpoint.pt.4711.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.1.tmp").mkdir()
    remove_temporary(tmp_path)
    assert set(os.listdir(tmp_path)) == kept | {".folder.1.tmp"}
    remove_temporary(tmp_path / "missing")


def test_no_text_is_obeyed() -> None:
    assert printable("größer ≥ 1\n\t→ 你好 🙂") == "größer ≥ 1\n\t→ 你好 🙂"
    odd = [chr(code) for code in (*range(9), 11, 12, 13, *range(14, 32), *range(127, 160), 0x200F, 0x202E, 0xD800)]
    for char in odd:
        assert printable(f"a{char}b") == "a" + repr(char)[1:-1].replace("\\x0b", "\\x0b") + "b"
        assert char not in str(FeedfastError(char))
        str(FeedfastError(char)).encode()
