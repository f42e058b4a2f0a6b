"""Who made a run, a cache or a page, and how: recorded, shown, escaped, and compared by nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import feedfast
from small import as_toml, digits_recipe

from feedfast.provenance import Provenance, _commit, began_with, library_versions, redacted
from feedfast.stages.folder import processes_of
from feedfast.storage.manifest import read_manifest
from feedfast.storage.schema import MAX_PASSES, differences

ODD = "<b>odd"  # a word of a command that no page may take for markup


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one view, and a student that was stopped after two steps and continued."""
    folder = tmp_path_factory.mktemp(ODD)
    file = as_toml(digits_recipe(folder, ("cache.views=1", "train.epochs=1"), teachers=1), folder / "r.toml")
    for arguments in (["cache"], ["train", "train.max_steps=2"], ["train"]):
        command, *overrides = arguments
        outcome = feedfast(command, file, *overrides)
        assert outcome.code == 0, outcome.err
    return folder


def complete(entry: dict[str, Any], command: list[str]) -> None:
    assert shlex.split(entry["command"])[1:] == command
    assert entry["started"] < entry["ended"]
    assert entry["versions"] == library_versions()
    assert set(entry["versions"]) >= {"feedfast", "python", "torch", "triton", "nvidia-dali-cuda130", "numcodecs"}
    assert entry["machine"]["cores"] >= 1
    assert len(entry["machine"]["host"]) == 12


def test_a_cache_names_the_jobs_that_wrote_to_it(made: Path) -> None:
    """A job that finds nothing to do leaves no trace; one that adds a view does, and changes nothing else."""
    path, file = made / "digits.zarr", made / "r.toml"
    before = feedfast("inspect", path).document
    (entry,) = before["manifest"]["passes"]
    complete(entry, ["cache", str(file)])
    assert entry["recipe"]["cache"]["path"] == str(path)
    assert feedfast("cache", file).document["rows_written"] == 0
    assert len(read_manifest(path).passes) == 1
    assert feedfast("cache", file, "cache.views=2").code == 0
    later = read_manifest(path)
    complete(later.passes[1].model_dump(mode="json"), ["cache", str(file), "cache.views=2"])
    assert later.passes[1].recipe is not None
    assert later.passes[1].recipe["cache"]["views"] == 2
    bare = later.model_copy(update={"passes": ()})
    assert differences(later, bare) == []
    arrays = ("samples/label", "views/order", "targets/a/final/codes", "targets/a/final/scale")
    assert [later.digest_for(name) for name in arrays] == [bare.digest_for(name) for name in arrays]


def test_a_run_names_the_processes_that_trained_it(made: Path) -> None:
    out = made / "student"
    result = json.loads((out / "result.json").read_text())
    first, second = result["provenance"]
    complete(first, ["train", str(made / "r.toml"), "train.max_steps=2"])
    complete(second, ["train", str(made / "r.toml")])
    assert first["recipe"]["train"]["max_steps"] == 2
    assert [entry.model_dump(mode="json") for entry in processes_of(out)] == [first, second]
    assert "provenance" not in feedfast("train", made / "r.toml").document, "nothing to train: nothing to record"
    assert len(processes_of(out)) == 2
    (out / "provenance.json").write_text('{"processes": [' * 5000)
    assert processes_of(out) == ()


def test_pages_show_it(made: Path, tmp_path: Path) -> None:
    command = ("analyze", "reconstruction", made / "student", "--epochs", "1", "--limit", "64", "--out", tmp_path)
    assert feedfast(*command).code == 0
    inspected = feedfast("inspect", made / "digits.zarr", "--out", tmp_path)
    assert " cache " in inspected.err.split("passes")[1]
    pages = {
        made / "student" / "report.html": "train",
        tmp_path / "reconstruction.html": "analyze",
        tmp_path / "inspect.html": "cache",
    }
    for path, word in pages.items():
        text = path.read_text()
        assert f"{word} " in text.split("was made</h2>")[1]
        assert "&lt;b&gt;odd" in text
        assert ODD not in text
        assert library_versions()["torch"] in text
    document = json.loads((tmp_path / "reconstruction.json").read_text())
    assert document["provenance"][0]["command"].split()[1:3] == ["analyze", "reconstruction"]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_commit_of_the_working_folder(tmp_path: Path) -> None:
    """Dirty by what is tracked alone: runs and caches lie in working folders too. Nothing outside of git."""
    assert _commit(str(tmp_path)) == (None, None, None)
    git(tmp_path, "init", "-q")
    below = tmp_path / "below"
    below.mkdir()
    (below / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "untracked").touch()
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert _commit(str(below)) == (head, False, None)
    seen = []
    for text in ("2", "3", "2"):  # the same changes have the same hash
        (below / "a").write_text(text)
        _commit.cache_clear()
        seen.append(_commit(str(below)))
        assert seen[-1][:2] == (head, True)
    assert seen[0] == seen[2] != seen[1]
    assert len(seen[0][2] or "") == 16


def test_nothing_of_a_repository_is_run(tmp_path: Path) -> None:
    """A folder of a stranger may be one, with a program of his named in its settings."""
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / ".gitattributes").write_text("*.txt diff=theirs\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    for key in ("core.fsmonitor", "diff.external", "diff.theirs.command", "diff.theirs.textconv"):
        git(tmp_path, "config", key, f"touch {tmp_path}/run-by-{key}; false")
    (tmp_path / "a.txt").write_text("2")
    _commit.cache_clear()
    assert _commit(str(tmp_path))[1] is True
    assert not list(tmp_path.glob("run-by-*"))


SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"
LOGINS = {
    "a variable's value": f"train x={SECRET}",
    "a variable as an argument": "env AWS_SECRET_ACCESS_KEY=abcdef feedfast",
    "a URL with a password": "cache.path=s3://AKIAIOSFODNN7:abcdef@bucket/p",
    "a URL with a token": "data.train=https://ghp_abcdef@github.com/x",
    "a signed URL": "data.train=https://host/x?sv=1&sig=abcdef&se=2",
    "an option": "train.py --api-key abcdef --wandb-token=abcdef",
    "in quotes": "'password=\"abcdef\"'",
}


@pytest.mark.parametrize("case", LOGINS)
def test_no_login_is_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In command, recipe or environment; the rest of the text stays."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NCCL_AUTH_TOKEN", "abcdef")
    monkeypatch.setenv("CUDA_PATH_NOTE", f"{SECRET} https://a:abcdef@b")
    monkeypatch.setattr("sys.argv", ["feedfast", LOGINS[case]])
    text = Provenance.begin({"data": {"train": [LOGINS[case]]}}).model_dump_json()
    assert SECRET not in text
    assert "abcdef" not in text
    assert "***" in text
    kept = ("github.com/x", "bucket/p", "sv=1", "se=2", "train x=", "feedfast")
    assert all(part in redacted(LOGINS[case]) for part in kept if part in LOGINS[case])


@pytest.mark.parametrize(
    "text",
    ["teachers.0.key=state_dict_ema", "s3://bucket/a@b", "data.size=32 design=1", "a:b@c", "student.model=my.tokens:f"],
)
def test_what_is_no_login_stays(text: str) -> None:
    assert redacted(text) == text


def test_the_environment_that_decides_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "NCCL_DEBUG": "WARN"}
    for name, value in {**kept, "HOME": "/home/somebody", "HOSTNAME": "their-machine", "NCCL_API_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    found = Provenance.begin()
    assert {name: found.environment.get(name) for name in kept} == kept
    assert not {"HOME", "HOSTNAME", "NCCL_API_KEY", "PATH"} & found.environment.keys()
    assert found.machine.memory_bytes > 1 << 28
    assert "their-machine" not in found.model_dump_json()


def test_the_first_and_the_newest_are_kept() -> None:
    here = Provenance.begin()
    known: tuple[Provenance, ...] = ()
    for number in range(300):
        job = here.model_copy(update={"started": f"{number:03}"})
        known = began_with(known, job, MAX_PASSES)
        known = began_with(known, job.finished(), MAX_PASSES)
    assert [entry.started for entry in known] == ["000", *(f"{number:03}" for number in range(45, 300))]
    assert all(entry.ended for entry in known)
