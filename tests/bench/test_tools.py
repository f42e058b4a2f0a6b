"""The scripts in tools/ that measure: they find a difference that is there, and claim nothing without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan

TOOLS = Path(__file__).parents[2] / "tools"


def test_compare_decode_counts_what_differs(shared_data: Path) -> None:
    """Mirrored against not mirrored stands for two decoders; the figures are NumPy's, image by image."""
    data = open_dataset(shared_data / "imagenette-small" / "val", limit=2)
    loaders = [Loader(data, ViewPlan(0, 64, "resized-crop-flip", flip=flip), batch_size=7) for flip in (0.0, 1.0)]
    compare = runpy.run_path(str(TOOLS / "compare_decode.py"))["compare"]
    assert compare(loaders[0], loaders[0])["max"] == 0
    found = compare(*loaders)
    images, turned = (
        np.concatenate([batch.images.numpy() for batch in loader.stream(0, np.arange(20))]).astype(int)
        for loader in loaders
    )
    np.testing.assert_array_equal(turned, images[:, :, ::-1])
    off = np.abs(images - turned)
    assert (found["images"], found["max"]) == (20, off.max())
    assert found["mean"] == pytest.approx(off.mean())
    assert found["share_beyond_1"] == pytest.approx((off > 1).mean())
    assert found["worst_image_mean"] == pytest.approx(off.mean((1, 2, 3)).max())
    worst = loaders[0].plan.order(0, data.ids)[off.mean((1, 2, 3)).argmax()]
    assert found["worst_image"] == data.name(int(np.searchsorted(data.ids, worst)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check itself would run")
def test_gpu_check_says_that_there_is_no_gpu() -> None:
    job = subprocess.run(
        ["bash", str(TOOLS / "gpu_check.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        timeout=120,
    )
    assert (job.returncode, job.stdout) == (2, '{"gpu": null, "checked": false}\n')
    assert "no CUDA GPU" in job.stderr


@pytest.fixture
def gpu_check() -> Any:
    """The module behind gpu_check.sh."""
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # sanitize_kernels.py imports it, too
    spec.loader.exec_module(module)
    return module


def shell(check: Any, name: str, script: str, limit_s: float = 60.0, **others: Any) -> Any:
    return check.Part(name, ("bash", "-c", script), limit_s, **others)


ROW = {
    "operation": "partial_l2", "shape": "2x3", "dtype": "bf16", "codec": "u8", "layout": "NHWC", "direction": "both",
    "variant": "feedfast", "median_ms": 2.0, "gbps": 4000.0, "percent_of_copy": 93.5, "note": "",
}  # fmt: skip


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 30, 140 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU that is not here")


def pretend_parts(check: Any, monkeypatch: pytest.MonkeyPatch, tests_exit: int) -> None:
    """Parts that answer at once: the report spills nothing, a bench has rows, one tool is not there."""
    answer = json.dumps({"measured": 2, "skipped": 0, "wrong_or_failed": 0, "rows": [
        ROW, {**ROW, "variant": "compile default", "median_ms": 5.0}, {**ROW, "variant": "copy", "median_ms": 1.9},
    ]})  # fmt: skip
    report = '{"reports": [{"name": "k", "regs": 32, "spills": 0, "stack_bytes": 0}]}'
    real = check.start_part

    def start(part: Any) -> Any:
        if part.name == "compile report":
            part = shell(check, part.name, f"echo '{report}'", read=part.read)
        return real(part)

    monkeypatch.setattr(check, "start_part", start)
    monkeypatch.setattr(check, "parts_before", lambda *_: [shell(check, "kernel tests", f"exit {tests_exit}")])
    monkeypatch.setattr(
        check, "bench_part", lambda name, *_: shell(check, f"bench {name}", f"echo '{answer}'", read=check.read_bench)
    )
    monkeypatch.setattr(check, "parts_after", lambda *_: [shell(check, "memcheck", "exit 1", missing="not on PATH")])


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize("tests_exit", [0, 1])
def test_gpu_check_goes_on_after_a_failure(
    gpu_check: Any, tests_exit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend_parts(gpu_check, monkeypatch, tests_exit)
    file = tmp_path / "gpu.json"
    assert gpu_check.main(["--json", str(file)]) == tests_exit
    said = capfd.readouterr()
    document = json.loads(file.read_text())
    assert (document["checked"], document["ok"], document["gpu"]) == (True, tests_exit == 0, "a GPU that is not here")
    parts = document["parts"]
    assert parts["kernel tests"]["ok"] is (tests_exit == 0)
    assert parts["bench partial_l2"]["rows"][0] == ROW
    assert parts["compile report"]["most_registers"] == 32
    assert parts["memcheck"] == {"ok": None, "seconds": 0.0, "note": "skipped: not on PATH"}
    short = json.loads(said.out.splitlines()[-1])
    assert "rows" not in short["parts"]["bench partial_l2"]
    line = next(line for line in said.err.splitlines() if line.startswith("partial_l2"))
    assert line.split() == ["partial_l2", "2x3", "bf16/u8", "NHWC", "both", "2.0000", "4000", "93.5", "2.50", "-", "-"]
    assert gpu_check.main([]) == tests_exit
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["parts"]["bench partial_l2"]["rows"]


def test_gpu_check_stops_what_takes_too_long(gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "END", 2)
    # both outlive the limit on a test, so this returns only where the part is stopped, together with what it started
    script = f"sleep 3600 & echo $! > {tmp_path}/child; sleep 3600"
    details = gpu_check.run_part(shell(gpu_check, "stuck", script, limit_s=1))
    assert (details["ok"], details["note"]) == (False, "stopped after 1 s")
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":  # dead: gone, or not yet collected
        time.sleep(0.05)
    silent = gpu_check.run_part(shell(gpu_check, "silent", "true", read=gpu_check.read_bench))
    assert silent["ok"] is False
    assert silent["note"] == "its answer could not be read: ValueError: it printed nothing"


@pytest.mark.usefixtures("pretend_gpu")
def test_gpu_check_keeps_its_time(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the tests took all the time, the rest says so instead of running over; that is not `all passed`."""
    pretend_parts(gpu_check, monkeypatch, 0)
    assert gpu_check.main(["--seconds", "1"]) == 1
    parts = json.loads(capfd.readouterr().out.splitlines()[-1])["parts"]
    assert parts["bench partial_l2"]["note"] == "skipped: the 1 s of the check are over"


def test_gpu_check_reads_what_tests_and_tools_say(gpu_check: Any, tmp_path: Path) -> None:
    xml = tmp_path / "t.xml"
    head = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="{}">'
    for counts, body, code, ok in (
        ((2, 0, 1), '<testcase classname="a" name="b"/>', 0, True),
        ((2, 1, 0), '<testcase classname="a" name="b"><failure/></testcase>', 1, False),
        ((2, 0, 2), "", 0, False),  # all skipped: nothing was tested
        ((0, 0, 0), "", 5, False),
    ):
        xml.write_text(head.format(*counts) + body + "</testsuite></testsuites>")
        details = gpu_check.read_tests(xml)(code, "")
        assert details["ok"] is ok
        assert details.get("failed") == (["a::b"] if counts[1] else None)
    assert gpu_check.read_sanitizer(0, "========= ERROR SUMMARY: 0 errors\n")["ok"] is True
    assert gpu_check.read_sanitizer(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n")["ok"] is True
    bad = gpu_check.read_sanitizer(86, "========= Invalid __global__ write\n========= ERROR SUMMARY: 10 errors\n")
    assert (bad["ok"], bad["said"][0]) == (False, "========= Invalid __global__ write")
    assert gpu_check.read_sanitizer(1, "")["ok"] is False, "no summary is no success"
    assert gpu_check.read_sanitizer(1, "========= Error: Device not supported.\n")["ok"] is None
    spilled = '{"reports": [{"name": "k", "regs": 255, "spills": 3, "stack_bytes": 8}]}'
    assert gpu_check.read_report(0, spilled)["ok"] is False


def test_gpu_check_runs_other_tests_where_one_file_cannot_be_imported(gpu_check: Any, tmp_path: Path) -> None:
    """A GPU machine without hypothesis loses the file that needs it, says so, and nothing else."""
    (tmp_path / "test_a.py").write_text("import no_such_package")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    details = gpu_check.run_part(gpu_check.pytest_part("t", [str(tmp_path)], tmp_path, 60))
    assert (details["ok"], details["tests"], details["errors"]) == (False, 2, 1)
    assert len(details["failed"]) == 1
    assert "test_a" in details["failed"][0]


def test_gpu_check_starts_from_a_bare_clone(gpu_check: Any, tmp_path: Path) -> None:
    """Its commands name files that are there, and what is not installed is named as the reason."""
    parts = gpu_check.parts_before(tmp_path, 4) + gpu_check.parts_after(tmp_path, "nowhere")
    parts += [gpu_check.bench_part("partial_l2", 60, None)]
    assert {"kernel tests", "drive", "memcheck", "racecheck", "other tests", "decode"} <= {part.name for part in parts}
    files = [word for part in parts for word in part.command if word.startswith(("tools/", "bench/", "tests/"))]
    assert files
    assert all((TOOLS.parent / file).is_file() for file in files)
    # an error of a library's question to the driver is none of a kernel's; racecheck does not know the option
    api = {part.name: "--report-api-errors" in part.command for part in parts}
    assert (api["memcheck"], api["racecheck"]) == (True, False)
    assert gpu_check.absent(["no_such_package", "no_such_package.inner", "torch"]) == [
        "no_such_package",
        "no_such_package.inner",
    ]


@pytest.mark.slow
def test_the_driver_of_the_sanitizer_calls_every_kernel(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    driver = runpy.run_path(str(TOOLS / "sanitize_kernels.py"))
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    assert driver["main"](["--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["wrong"] == []
    for name in gpu_check.BENCHES:
        if (TOOLS.parent / f"bench/bench_{name}.py").is_file():
            assert f"{'encode' if name == 'codes' else name} " in said.err
    assert driver["main"]([]) == 2
