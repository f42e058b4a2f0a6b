"""The plain tier runs every kernel once for each codec, and once for each form of the loss of logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAPS = ("u8", "u6", "u5", "u4", "float|f32")
SELECTED = {
    "test_partial_l2_kernel.py::test_equals_the_reference": MAPS,
    "test_positions_kernel.py::test_equals_the_reference": MAPS,
    "test_connector_partial_l2_kernel.py::test_equals_batch_norm_and_reference": MAPS,
    "test_normalized_l1_kernel.py::test_equals_the_reference": MAPS,
    "test_normalized_l1_kernel.py::test_two_sweeps_equal_the_reference": MAPS,
    "test_codes_kernel.py::test_encode_is_the_formula": MAPS[:4],
    "test_codes_kernel.py::test_decode_has_the_bits_of_the_cpu": MAPS[:4],
    "test_ensemble_kl_kernel.py::test_equals_float64": ("probabilities", "logits", "forward", "reverse"),
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_plain_tier_has_every_codec() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q", "-p", "no:cacheprovider", "."]
    job = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    cases = [line.split("/")[-1] for line in job.stdout.splitlines() if "[interpreter-" in line]
    for test, values in SELECTED.items():
        arguments = [set(case.rstrip("]").split("-")) for case in cases if case.startswith(f"{test}[")]
        assert 0 < len(arguments) <= 8, test
        for value in values:
            assert any(found & set(value.split("|")) for found in arguments), (test, value)
