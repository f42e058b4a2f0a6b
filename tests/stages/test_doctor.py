"""`feedfast doctor`: one real look at this machine, and each sentence on machines that are made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commands import feedfast
from small import as_toml, digits_recipe

import feedfast as ff
from feedfast.provenance import library_versions
from feedfast.stages import probes
from feedfast.stages.doctor import findings
from feedfast.stages.probes import (
    DiskFact,
    Facts,
    GpuFact,
    decode_one,
    disk_of,
    filesystem_of,
    quota_cores,
    triton_problem,
)

DISK = DiskFact("/data", "ext4", 1 << 40, 2e9, 1e9, direct=True)
GPU = GpuFact("NVIDIA H100", "9.0", 80 << 30)
FINE = Facts(
    torch_cuda="13.0",
    driver="580.65.06",
    gpus=(GPU,),
    dali_decodes=True,
    disk=DISK,
    cores=32,
    machine_cores=32,
    memory_bytes=256 << 30,
    available_bytes=200 << 30,
    bf16_instructions=True,
    bf16_over_fp32=0.6,
    crc32c="c",
    open_files=65536,
    shm_bytes=64 << 30,
)


def test_a_good_machine_has_nothing() -> None:
    assert list(findings(FINE)) == []


CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "no DALI": ({"dali_problems": ("NVIDIA DALI: not installed; pip install x",), "dali_decodes": None}, "broken",
                ["NVIDIA DALI: not installed"]),
    "DALI that fails": ({"dali_decodes": False, "dali_error": "RuntimeError: nvjpeg"}, "broken",
                        ["does not decode a JPEG", "RuntimeError: nvjpeg"]),
    "no GPU": ({"gpus": (), "driver": None}, "note", ["GPU: none", "plan"]),
    "torch without CUDA": ({"gpus": (), "torch_cuda": None}, "broken",
                           ["driver 580.65.06", "built without CUDA", "pip install"]),
    "hidden GPU": ({"gpus": ()}, "broken", ["sees no GPU", "CUDA 13.0", "CUDA_VISIBLE_DEVICES", "--gpus"]),
    "GPU that fails": ({"gpus": (dataclasses.replace(GPU, problem="no kernel image"),)}, "broken",
                       ["GPU 0 (NVIDIA H100, compute capability 9.0)", "no kernel image", "CUDA_VISIBLE_DEVICES"]),
    "old GPU": ({"gpus": (GPU, GpuFact("Tesla V100", "7.0", 16 << 30))}, "slow", ["GPU 1 (Tesla V100)", "7.0", "7.5"]),
    "no Triton": ({"triton_error": "RuntimeError: no C compiler"}, "broken", ["Triton", "no C compiler", "pip check"]),
    "bf16": ({"bf16_instructions": False, "bf16_over_fp32": 2.9}, "slow",
             ["2.9 times", "no instructions", "train.precision", "fp32"]),
    "bf16 with instructions": ({"bf16_over_fp32": 1.4}, "slow", ["1.4 times as long as fp32 on this processor; keep"]),
    "crc32c": ({"crc32c": "python"}, "slow", ["google-crc32c", "not in hardware", "pip install"]),
    "quota": ({"quota_cores": 4.5}, "slow", ["4.5 of the 32", "OMP_NUM_THREADS to 4"]),
    "two cores": ({"cores": 2}, "slow", ["cores: 2 decode", "cache.images=stored"]),
    "two cores without GPU": ({"cores": 2, "gpus": (), "driver": None}, "slow", ["cores: 2 decode", "a GPU"]),
    "memory": ({"available_bytes": 3 << 30}, "slow", ["3.0 GiB", "cache.batch", "data.threads"]),
    "open files": ({"open_files": 256}, "broken", ["256", "1024", "ulimit -n 4096"]),
    "shm": ({"shm_bytes": 64 << 20}, "note", ["/dev/shm: 64.0 MiB", "--shm-size"]),
}  # fmt: skip
DISKS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "hard disk": ({"read_per_second": 120e6}, "slow",
                  ["reads 120 MB/s", "1,200 images/s", "cache.codec=u4", "train.residency=ram", "feedfast plan"]),
    "slow writes": ({"written_per_second": 20e6}, "slow", ["writes 20 MB/s"]),
    "nfs": ({"kind": "nfs4"}, "slow", ["network file system (nfs4)", "cache.local"]),
    "lustre": ({"kind": "lustre"}, "note", ["parallel file system (lustre)", "cache.shard_mb"]),
    "tmpfs": ({"kind": "tmpfs"}, "note", ["memory, gone", "elsewhere"]),
    "overlay": ({"kind": "overlay"}, "note", ["container's own", "elsewhere"]),
    "read-only": ({"read_per_second": None, "written_per_second": None}, "broken", ["nothing can be written"]),
    "nearly full": ({"free_bytes": 5 << 30}, "note", ["5.0 GiB free", "feedfast plan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *DISKS])
def test_what_is_wrong_is_one_sentence_with_what_helps(case: str) -> None:
    if case in DISKS:
        change, kind, words = DISKS[case]
        change = {"disk": dataclasses.replace(DISK, **change)}
        words = ["disk of /data", *words]
    else:
        change, kind, words = CASES[case]
    found = list(findings(dataclasses.replace(FINE, **change)))
    assert found[-1 if kind == "note" else 0].kind == kind
    (sentence,) = [one.sentence for one in found if one.kind == kind]
    assert all(word in sentence for word in words), sentence
    assert "; " in sentence, "what helps follows"
    assert sentence == sentence.strip()
    assert not sentence.endswith(".")


def test_what_was_not_measured_is_not_judged() -> None:
    cached = dataclasses.replace(DISK, read_per_second=1e6, direct=False)  # memory's rate, or of a busy machine
    unknown = {"available_bytes": None, "open_files": None, "shm_bytes": None, "disk": cached}
    assert list(findings(dataclasses.replace(FINE, **unknown))) == []
    assert list(findings(dataclasses.replace(FINE, disk=None))) == []


def test_what_is_broken_comes_first() -> None:
    found = list(findings(dataclasses.replace(FINE, cores=1, shm_bytes=0, open_files=64, crc32c="python")))
    assert [one.kind for one in found] == ["broken", "slow", "slow", "note"]


def test_the_exit_code_and_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 where something is broken; the sentences are warnings, the document the last line of stdout."""
    for facts, code in ((FINE, 0), (dataclasses.replace(FINE, open_files=64, shm_bytes=0), 1)):
        monkeypatch.setattr(probes, "look", lambda *rest, facts=facts: facts)
        outcome = feedfast("doctor")
        assert outcome.code == code
        assert outcome.document["ok"] is (code == 0)
        assert (
            Facts(**{**outcome.document["facts"], "gpus": facts.gpus, "disk": facts.disk, "dali_problems": ()}) == facts
        )
        sentences = [one["sentence"] for one in outcome.document["findings"]]
        assert all(sentence in outcome.err for sentence in sentences)
        quiet = feedfast("-q", "doctor")
        assert [one["sentence"] in quiet.err for one in quiet.document["findings"]] == [
            one["kind"] != "note" for one in quiet.document["findings"]
        ]


def test_this_machine(tmp_path: Path) -> None:
    """A real look: DALI decodes, the disk is measured where the recipe's cache will be, and nothing is left there."""
    recipe = as_toml(digits_recipe(tmp_path, teachers=1), tmp_path / "r.toml")
    place = tmp_path / "place"
    place.mkdir()
    outcome = feedfast("doctor", "--recipe", recipe, f"cache.path={place}/not/yet.zarr")
    found = outcome.document
    assert found["versions"] == library_versions()
    assert found["machine"]["cores"] == found["facts"]["cores"] >= 1
    assert found["bf16"]["over_fp32"] > 0
    assert found["facts"]["dali_decodes"] is True
    assert found["facts"]["disk"]["folder"] == str(place)
    assert found["facts"]["disk"]["read_per_second"] > 0
    assert found["facts"]["disk"]["written_per_second"] > 0
    assert found["facts"]["crc32c"] in ("c", "python")
    assert outcome.code == (0 if found["ok"] else 1)
    assert list(place.iterdir()) == []
    assert "bf16 on the processor" in outcome.err
    assert "disk reads, writes" in outcome.err
    assert "expected --recipe" in feedfast("doctor", "cache.path=x").error


def test_a_bucket_has_no_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path | None] = []

    def look(folder: Path | None, *rest: Any) -> Facts:
        asked.append(folder)
        return FINE

    monkeypatch.setattr(probes, "look", look)
    tree = {"data": {"train": "x"}, "cache": {"path": "s3://bucket/c.zarr"}}
    assert ff.doctor(recipe=tree).ok
    assert ff.doctor({"cache.local": str(tmp_path)}, recipe=tree).facts == FINE
    ff.doctor(folder=tmp_path / "mine", recipe=tree)
    ff.doctor()
    assert asked == [None, tmp_path, tmp_path / "mine", Path()]


# ---- probes


def test_a_loader_that_fails_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_one() == (True, None)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("libnvjpeg.so: cannot open\nmore")

    monkeypatch.setattr("feedfast.data.loader.Loader.evaluation", broken)
    assert decode_one() == (False, "RuntimeError: libnvjpeg.so: cannot open")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_kernel_is_tried(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in Triton's interpreter."""
    from feedfast_kernels import _ops

    monkeypatch.setattr(_ops, "INTERPRET", device == "cpu")
    assert triton_problem(device) is None
    monkeypatch.setattr("feedfast_kernels.partial_l2", lambda student, target: student.sum() + 1e3)
    assert "came back as 1000" in str(triton_problem(device))

    def broken(student: Any, target: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("feedfast_kernels.partial_l2", broken)
    assert triton_problem(device) == "RuntimeError: no C compiler"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    disk = disk_of(Path("/proc/self"))
    assert disk.read_per_second is None
    assert disk.kind == "proc"
    assert disk_of(tmp_path / "a" / "b").folder == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_mount_counts(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    lines = ["/dev/vda / ext4 rw 0 0", f"server:/x {tmp_path}/with\\040space nfs4 rw 0 0", "none /dev tmpfs rw 0 0"]
    mounts.write_text("\n".join(lines) + "\n")
    for folder, kind in (("with space/deep", "nfs4"), ("with space", "nfs4"), ("with space-2", "ext4"), ("", "ext4")):
        assert filesystem_of(tmp_path / folder, mounts) == kind, folder
    assert filesystem_of(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2 above", "v2 none", "v2 in a container", "v1 in a container", "v1 none", "no groups"],
)
def test_the_quota_of_control_groups(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cores(tmp_path) == cores


def test_the_document_is_json_of_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "look", lambda *rest: FINE)
    document = ff.doctor()
    assert json.loads(document.to_json())["facts"]["gpus"][0]["capability"] == "9.0"
