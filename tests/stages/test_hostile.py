"""Files of strangers, through the commands: what they may not do. One case of each kind; tests/fuzz makes the others.

Nothing is written through a link, nothing but ordinary files is opened, nothing is read, allocated, walked or recursed
into without a bound, no terminal is told what to do, and what is refused is refused in one sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import feedfast
from hostile import CACHE, LOG, copy_world, make_whole, manifest, run

import feedfast as package
from feedfast.errors import RequestError
from feedfast.files import read_sealed, write_sealed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def world(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoiled; the current folder."""
    folder = copy_world(whole, tmp_path / "world")
    monkeypatch.chdir(folder)
    return folder


# ---- links


def put_link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


LINKS = {
    "commits/.lock-prepare": ("cache", "file"),
    "commits/.lock-manifest": ("cache", "file"),
    "commits/.lock-split": ("cache", "file"),
    "commits/part-0-of-1.jsonl": ("cache", "log"),
    "commits": ("cache", "log folder"),
    "targets/a/final/codes/c": ("cache", "folder"),
    "targets/a": ("cache", "folder"),
    "../student/tensorboard": ("train", "folder"),
    "../student/wandb": ("train", "folder"),
}


@pytest.mark.parametrize("link", LINKS)
def test_nothing_is_written_through_a_link(link: str, world: Path, tmp_path: Path) -> None:
    command, kind = LINKS[link]
    place, victim = world / CACHE / link, tmp_path / "victim"
    if kind == "file":
        victim.write_text("precious\n")
    elif kind == "log":  # of which the torn end would be cut
        victim.write_bytes(place.read_bytes() + b"precious")
    else:
        if place.exists():
            shutil.copytree(place, victim)
        victim.mkdir(exist_ok=True)
        for file in victim.rglob("*"):
            if file.is_file() and file.suffix == "" and "codes" in str(file.relative_to(tmp_path)) + link:
                file.unlink()  # so that it would be written again
        (victim / "events.out.tfevents.1").write_text("precious")
    before = {path: path.read_bytes() for path in [victim, *victim.rglob("*")] if path.is_file()}
    put_link(place, victim)
    outcome = run(command)
    assert outcome.code == 1
    assert "nothing is written through it" in outcome.error
    assert "a link to" in outcome.error
    assert {path: path.read_bytes() for path in [victim, *victim.rglob("*")] if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.tmp", "recipe.json", "student.pt", "report.html"])
def test_what_a_run_replaces_is_replaced_where_a_link_lay(name: str, world: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    put_link(world / "student" / name, victim)
    put_link(world / "student" / f".{name}.{os.getpid()}.tmp", victim)
    assert run("train").code == 0
    assert victim.read_text() == "precious\n"
    assert not (world / "student" / name).is_symlink() or name == ".metrics.jsonl.tmp"


def test_a_log_with_another_name_is_not_written_to(world: Path, tmp_path: Path) -> None:
    """A copy made of hard links shares its log with the original: appending would corrupt both."""
    os.link(world / LOG, tmp_path / "other")
    assert "other names" in run("cache").error


# ---- what is no ordinary file


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
@pytest.mark.parametrize(
    ("file", "command", "code"),
    [
        (LOG, "verify", 1), (LOG, "cache", 1), (f"{CACHE}/zarr.json", "verify", 1), (f"{CACHE}/zarr.json", "cache", 1),
        (f"{CACHE}/samples/label/c/0", "verify", 1), ("recipe.toml", "plain", 2), ("digits-train.npz", "plain", 2),
        ("images/a/x.png", "images", 2), ("a.pt", "cache", 2), ("student/recipe.json", "resume", 2),
        ("mnist/train-images-idx3-ubyte", "mnist", 2),
    ],
)  # fmt: skip
def test_only_ordinary_files_are_opened(file: str, kind: str, command: str, code: int, world: Path) -> None:
    path = world / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    outcome = run("plain", f"data.train={file}") if command == "mnist" else run(command)
    assert outcome.code == code
    if command != "verify":
        assert outcome.error


# ---- bombs


def sparse(path: Path) -> None:
    path.unlink()
    path.touch()
    os.truncate(path, 200 << 30)


def png(side: int) -> bytes:
    """One bit per pixel, all black: 16,000 x 16,000 are 32 kB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
             for kind, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def image_bomb() -> None:
    Path("images/a").mkdir(parents=True)
    Path("images/a/x.png").write_bytes(png(16_000))


def npz_bomb() -> None:
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }".ljust(117) + "\n"
    with zipfile.ZipFile("digits-train.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())


def weights_bomb() -> None:
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(1 << 26) if name.endswith("/data/0") else old.read(name))
    os.replace("b.pt", "a.pt")


def huge_label() -> None:
    import numpy as np

    np.savez("digits-train.npz", images=np.zeros((40, 16, 16), np.uint8), labels=np.full(40, 2**31 - 2))


def in_recipe(line: str) -> Callable[[], Any]:
    return lambda: Path("recipe.toml").write_text(line + "\n" + Path("recipe.toml").read_text())


ROWS = 2**32 - 1
BOMBS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "views": (lambda: manifest(views=65535), "verify", "and 588797 more of these"),
    "views to write": (lambda: manifest(views=65535), "cache", "says 65535 views, but its log holds rows of 2"),
    "rows": (lambda: manifest(num_rows=ROWS, dataset={**_dataset(), "id_space": ROWS}), "verify", "more of these"),
    "sparse log": (lambda: sparse(Path(LOG)), "verify", "line 1 is longer than 1048576 bytes"),
    "sparse log to write": (lambda: sparse(Path(LOG)), "cache", "line 1 is longer than 1048576 bytes"),
    "sparse manifest": (lambda: sparse(Path(CACHE, "zarr.json")), "verify", "at most 16777216 bytes"),
    "sparse recipe": (lambda: sparse(Path("recipe.toml")), "plain", "at most 262144"),
    "sparse run": (lambda: sparse(Path("student/recipe.json")), "resume", "at most 16777216"),
    "deep log": (lambda: Path(LOG).write_bytes(b"[" * 5000 + b"\n" + Path(LOG).read_bytes()), "verify", "log-damaged"),
    "deep manifest": (lambda: Path(CACHE, "zarr.json").write_text("[" * 5000), "verify", "nested too deeply"),
    "deep array": (lambda: Path(CACHE, "views/flip/zarr.json").write_text("[" * 5000), "verify", "nested too deeply"),
    "deep run": (lambda: Path("student/recipe.json").write_text("[" * 5000), "resume", "nested too deeply"),
    "deep result": (lambda: Path("student/result.json").write_text("[" * 5000), "resume", "val_accuracy"),
    "digits": (in_recipe(f"seed = {'9' * 5000}"), "plain", "5000 digits"),
    "digits in a run": (lambda: Path("student/recipe.json").write_text("9" * 5000), "resume", "5000 digits"),
    "parts": (in_recipe(f"{'.'.join(['a'] * 3000)} = 1"), "plain", "nested too deeply"),
    "quoted parts": (in_recipe('"a".' * 40000 + "a = 1"), "plain", "nested too deeply"),
    "arrays": (in_recipe(f"x = {'[' * 2000}{']' * 2000}"), "plain", "nested too deeply"),
    "npz": (npz_bomb, "plain", "[1000000, 1000, 1000, 3] is not 0 bytes"),
    "labels": (huge_label, "plain", "integers >= -1 and below 1048576"),
    "image": (image_bomb, "images", "16000x16000 pixels"),
    "weights": (weights_bomb, "cache", "it unpacks to 67"),
}  # fmt: skip


def _dataset() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(CACHE, "zarr.json").read_text())["attributes"]["feedfast"]["dataset"]
    return found


@pytest.mark.parametrize(
    "bomb", [pytest.param(name, marks=[pytest.mark.slow] if name == "deep result" else []) for name in BOMBS]
)
def test_nothing_is_read_or_walked_without_a_bound(bomb: str, world: Path) -> None:
    make, command, words = BOMBS[bomb]
    make()
    outcome = run(command)
    assert words in outcome.err + outcome.out
    assert outcome.code == (0 if bomb == "deep result" else outcome.code)
    if command != "verify" and outcome.code:
        assert outcome.error


@pytest.mark.parametrize("key", [".".join(["data"] * 3000), "train.epochs", "data.train"])
def test_overrides_are_bounded_too(key: str, world: Path) -> None:
    value = {"train.epochs": "9" * 5000, "data.train": "[" * 2000 + "]" * 2000}.get(key, "1")
    outcome = run("plain", f"{key}={value}")
    assert outcome.code == 2
    assert len(outcome.error) < 500


# ---- what a terminal would obey

EVIL = "\x1b]0;evil\x07\x1b[2J\x9b31m\u202e[/red]"


def test_no_terminal_is_told_what_to_do(world: Path) -> None:
    line = json.loads(Path(LOG).read_text().splitlines()[0])
    with Path(LOG).open("a") as file:
        file.write(json.dumps({**line, "array": EVIL}) + "\n")
    manifest(created=EVIL)
    Path("images/a").mkdir(parents=True)
    Path("images/a", EVIL.replace("/", "") + ".png").write_bytes(b"x")
    for outcome in (run("verify"), run("cache"), run("images")):
        assert outcome.code
        assert "\\x1b]0;evil\\x07\\x1b[2J\\x9b31m\\u202e" in outcome.err
    shutil.copytree(CACHE, "c[/red]d.zarr")
    shutil.copy(LOG.replace("part", "part"), "log")
    lines = Path(LOG).read_text().splitlines(keepends=True)
    Path("c[/red]d.zarr/commits/part-0-of-1.jsonl").write_text("".join(lines[:-1]))
    outcome = feedfast("inspect", "c[/red]d.zarr")
    assert outcome.code == 0
    assert "c[/red]d.zarr" in outcome.err


# ---- numbers

NUMBERS = [
    "train.warmup_epochs=inf", "train.milestones=[nan]", "train.lr=1e39", "train.weight_decay=inf", "method.weight=inf",
    "method.tau=nan", "method.tau=1e39", "train.checkpoint_minutes=nan", f"train.steps={10**30}", f"data.limit={2**63}",
    "train.epochs=1" + "0" * 400, f"train.threads={2**62}", "data.threads=1000000", f"cache.batch={2**62}",
    "cache.part=0/" + "9" * 5000, "cache.part=٣/٤", 'train.out="a\\u0000b"', 'data.train=["a\\u0000b"]',
    'cache.path="a\\u0000b"', 'teachers.0.weights="a\\u0000b"', 'student.weights="\\u001b[2J"',
    "train.out=" + "a" * 5000, "data.std=[nan,1,1]",
]  # fmt: skip


@pytest.mark.parametrize("override", NUMBERS)
def test_every_number_and_text_of_a_recipe_is_checked(override: str, world: Path) -> None:
    outcome = run("train", override)
    assert outcome.code == 2
    assert override.split("=")[0] in outcome.error
    assert len(outcome.error) < 600


def odd_checkpoints() -> dict[str, Callable[[dict[str, Any]], Any]]:
    first = "conv1.weight"

    def tensor(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
        return lambda state: state["student"].__setitem__(first, make(state["student"][first]))

    return {
        "step -7": lambda state: state.__setitem__("step", -7),
        "step 1e9": lambda state: state.__setitem__("step", 10**9),
        "step true": lambda state: state.__setitem__("step", True),
        "step nan": lambda state: state.__setitem__("step", float("nan")),
        "sparse": tensor(torch.Tensor.to_sparse),
        "meta": tensor(lambda value: value.to("meta")),
        "state of the optimizer": lambda state: state["optimizer"]["state"].__setitem__(0, 7),
        "momentum of another shape": lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)),
        "another key": lambda state: state["optimizer"]["state"][0].update(exp_avg=None),
        "not finite": tensor(lambda value: value * float("nan")),
    }


@pytest.mark.parametrize("odd", odd_checkpoints())
def test_every_number_of_a_checkpoint_is_checked(odd: str, world: Path) -> None:
    path = world / "student/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    odd_checkpoints()[odd](state)
    torch.save(state, path)
    outcome = run("resume")
    assert outcome.code == 1
    assert str(Path("student/checkpoint.pt")) in outcome.error


@pytest.mark.parametrize("odd", ["sparse", "meta", "complex", "whole numbers"])
def test_weights_are_plain_tensors(odd: str, world: Path) -> None:
    state = torch.load("a.pt", weights_only=True)
    value = state["conv1.weight"]
    state["conv1.weight"] = {
        "sparse": value.to_sparse, "meta": lambda: value.to("meta"), "complex": lambda: value.to(torch.complex64),
        "whole numbers": value.char,
    }[odd]()  # fmt: skip
    torch.save(state, "a.pt")
    outcome = run("cache", "cache.path=new.zarr")
    assert outcome.code == 2
    # of sparse ones torch itself warns, which is an error here
    assert ("a.pt" if odd == "sparse" else "conv1.weight") in outcome.error


# ---- paths of a stranger's manifest


def test_a_copied_cache_opens_no_path_that_only_its_manifest_names(world: Path, whole: Path) -> None:
    for source in ("/", "/proc/self", str(whole / "digits-train.npz")):
        manifest(dataset={**_dataset(), "source": json.dumps({"train": [source], "limit": 6, "fraction": 1.0})})
        with pytest.raises(RequestError, match=rf"copied or made elsewhere.*: {source}\. Say where"):
            package.open_cache(CACHE)
        outcome = run("verify", "--replay", "1")
        assert outcome.code == 2
        assert source in outcome.error
    # whoever repeats it is believed; the fingerprint decides whether they are the same images
    assert len(package.open_cache(CACHE, data="digits-train.npz")) == 60
    assert run("verify", "--replay", "1", "--recipe", "recipe.toml").code == 0
    # and who extends a cache has named its images: from then on it lies where it was made
    assert run("cache").code == 0
    assert len(package.open_cache(CACHE)) == 60


def test_a_cache_where_it_was_made_names_its_images_before_it_opens_them(whole: Path) -> None:
    outcome = feedfast("verify", whole / CACHE, "--replay", "1")
    assert outcome.code == 0
    assert f"images: {whole / 'digits-train.npz'}, as the manifest of" in outcome.err


def test_a_run_folder_imports_no_code(world: Path) -> None:
    recipe = world / "student/recipe.json"
    tree = read_sealed(recipe)
    tree["student"]["model"] = "antigravity:fly"
    write_sealed(recipe, tree)
    (world / "student/student.pt").touch()
    outcome = feedfast("analyze", "reconstruction", "student")
    assert "would import code that a folder names" in outcome.error
    assert "antigravity" not in sys.modules
