"""What the compiler makes of every kernel for GPUs that are not here: no spills, full-width accesses, enough warps.

The launches are those the operations plan for the shapes real networks have (tools/launches.py). All of them are
compiled for sm_90, and the main ones for sm_80 and sm_100.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = pytest.mark.timeout(600)

# Little's law: 4.3 TB/s at 0.6 microseconds of latency is 20 KiB under way on each of 132 multiprocessors. A thread of
# the losses asks for at least 48 bytes before it needs them (12 warps: 18 KiB), one of encode for 128 (8: 32 KiB).
LEAST_WARPS = {"codes": 8}
OTHER_WARPS = 12


def document(*arguments: str) -> dict[str, Any]:
    """The JSON document on the last line of what Python says with these arguments; compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    job = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert job.returncode == 0, job.stderr[-3000:]
    said: dict[str, Any] = json.loads(job.stdout.splitlines()[-1])
    return said


def reports(*options: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = document(str(TOOLS / "compile_report.py"), "--quick", "--jobs", "2", *options)[
        "reports"
    ]
    assert rows
    return rows


def once(name: str, shared: pytest.TempPathFactory, worker: str, *options: str) -> list[dict[str, Any]]:
    """Compile once, also where pytest-xdist gives the tests of this file to several workers."""
    if worker == "master":
        return reports(*options)
    file = shared.getbasetemp().parent / f"compiled-{name}.json"  # of this run, for all its workers
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            file.write_text(json.dumps(reports(*options)))
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[dict[str, Any]]:
    return once("hopper", tmp_path_factory, worker_id, "--arch", "90")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[dict[str, Any]]:
    main = "256x56x56 bf16/(u8|u6 NHWC)|2048x7x7 bf16/u8 NHWC|64x8x8 .*u[86] NHWC|ensemble_kl 1000 x 3 prob.* labels"
    return once("others", tmp_path_factory, worker_id, "--arch", "80", "100", "--match", main)


def test_every_operation_is_there(hopper: list[dict[str, Any]]) -> None:
    kernels = {path.stem for path in (TOOLS.parent / "kernels/feedfast_kernels/gpu").glob("*.py")}
    assert {row["operation"] for row in hopper} == kernels - {"__init__", "launch", "tile", "unit_length"}


@pytest.mark.parametrize("which", ["hopper", "others"])
def test_nothing_spills(which: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(which)
    assert [row for row in rows if row["stack_bytes"] or row["spills"]] == []


@pytest.mark.parametrize("which", ["hopper", "others"])
def test_accesses_are_wide_where_the_shape_allows(which: str, request: pytest.FixtureRequest) -> None:
    """No 8- or 16-bit access; of channels-last maps, at least half of the bytes come with 128-bit loads.

    Of u6 and u5 the upper bits of 8 or 16 channels are 8 or 16 bits: one access for a tile, and so for the map's.
    """
    rows = [row for row in request.getfixturevalue(which) if row["aligned"]]
    parts = [row for row in rows if "/u6 " in row["name"] or "/u5 " in row["name"]]
    assert parts
    assert [row for row in rows if row["narrow"] > (row["wide"] if row in parts else 0)] == []
    nhwc = [row for row in rows if "NHWC" in row["name"] and not row["name"].startswith("decode")]
    # of positions every thread loads its rows' 4 bytes, which all lanes of a row share: next to u4 codes that is half
    nhwc = [row for row in nhwc if not (" of " in row["name"] and "/u4" in row["name"])]
    assert len(nhwc) >= 10
    assert [row for row in nhwc if row["widest_load_bits"] != 128 or row["wide_share"] < 0.5] == []
    backward = [row for row in nhwc if " backward " in row["name"]]
    assert backward
    assert [row for row in backward if row["widest_store_bits"] != 128] == []


def test_the_check_can_fail(hopper: list[dict[str, Any]]) -> None:
    """7x7 maps in NCHW order have rows of 98 bytes: there the report must show narrow accesses."""
    rows = [row for row in hopper if row["name"] == "partial_l2 forward 2048x7x7 bf16/u8 NCHW"]
    assert [row["narrow"] > 0 for row in rows] == [True]


@pytest.mark.parametrize("which", ["hopper", "others"])
def test_enough_warps_fit_to_hide_memory(which: str, request: pytest.FixtureRequest) -> None:
    rows = [row for row in request.getfixturevalue(which) if "NHWC" in row["name"] and "fp32" not in row["name"]]
    assert [row for row in rows if row["occupancy_warps"] < LEAST_WARPS.get(row["operation"], OTHER_WARPS)] == []


def test_instructions_leave_memory_the_bottleneck(hopper: list[dict[str, Any]]) -> None:
    """132 multiprocessors issue 33 T lane instructions per second: at 4.3 TB/s and 3 bytes per element, 23 of them."""
    large = [
        row
        for row in hopper
        if "256x56x56 bf16/u8 NHWC" in row["name"]
        and row["operation"] in ("partial_l2", "connector_partial_l2", "codes")
    ]
    assert len(large) >= 7
    assert [row for row in large if row["sass_per_element"] > 23] == []


def test_the_jit_binds_these_launches_to_the_same_types() -> None:
    said = document(str(Path(__file__).parents[1] / "helpers" / "jit_launches.py"))
    assert said["different"] == []
    assert said["compared"] >= 12


JOINT_SUMS = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import compile_report, launches, triton
found = {}
for case in launches.normalized_l1_cases(quick=True):
    if " forward " in case.name:
        options = {"num_warps": case.launch.warps, "enable_fp_fusion": False}
        target = compile_report.GPUTarget("cuda", 90, 32)
        code = triton.compile(compile_report.source_of(case.launch), target=target, options=options).asm["ttgir"]
        found[case.name] = bool(re.search(r'tt.reduce"\\([^,)]+, [^,)]+\\)', code))
print(json.dumps(found))
"""


def test_normalized_l1_adds_both_sums_of_squares_in_one_order() -> None:
    """Equal maps are at distance 0 only then, and the interpreter, which has one order, cannot tell."""
    found = document("-c", JOINT_SUMS, str(TOOLS))
    assert len(found) >= 8
    assert [name for name, together in found.items() if not together] == []
