"""bfloat16 on a processor that has no instructions for it: said once, with what was measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import feedfast
from small import as_toml, digits_recipe

from feedfast.stages import bf16


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    bf16.bf16_ratio.cache_clear()
    bf16._warn.cache_clear()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    overrides = ("teachers.0.precision=bf16", "train.precision=bf16", "train.source=live", "train.max_steps=1")
    return as_toml(digits_recipe(folder, overrides, teachers=1), folder / "r.toml")


AVX2 = "fpu sse4_2 avx avx2 fma f16c"


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (AVX2, False),
        ("", False),
        (f"{AVX2} avx512f", True),
        (f"{AVX2} avx512f avx512_bf16", True),
        ("fp asimd bf16 sve", True),
    ],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, flags: str, has: bool) -> None:
    monkeypatch.setattr(bf16, "_processor_flags", lambda: set(flags.split()))
    assert bf16.has_bf16() is has


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("plan", "train.precision, teachers[a].precision"),
        pytest.param("cache", "teachers[a].precision", marks=pytest.mark.slow),
        pytest.param("train", "train.precision, teachers[a].precision", marks=pytest.mark.slow),
    ],
)
def test_it_is_said_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, keys: str) -> None:
    monkeypatch.setattr(bf16, "_processor_flags", lambda: set(AVX2.split()))
    monkeypatch.setattr(bf16, "_trial_seconds", lambda enabled: 0.68 if enabled else 0.2)
    own = (f"cache.path={tmp_path / 'c.zarr'}", "cache.views=1", "method.name=kd", f"train.out={tmp_path / 'out'}")
    outcome = feedfast(command, file, *own)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("bf16 takes 3.4 times as long as fp32 here") == 1
    assert f"{keys}: bf16 takes" in outcome.err
    assert command != "plan" or outcome.document["bf16_over_fp32"] == pytest.approx(3.4)
    assert "bf16 takes" not in feedfast("plan", file, *own, "train.precision=fp32", "teachers.0.precision=fp32").err
    monkeypatch.setattr(bf16, "_trial_seconds", lambda enabled: 0.2)
    bf16.bf16_ratio.cache_clear()
    bf16._warn.cache_clear()
    assert "bf16 takes" not in feedfast("plan", file, *own).err, "the trial decides"


@pytest.mark.slow
def test_the_trial_is_real(file: Path) -> None:
    """oneDNN kept from everything above AVX2 emulates bf16, and the trial shows it."""
    code = "from feedfast.stages.bf16 import bf16_ratio; print(bf16_ratio())"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=240
    )
    assert float(done.stdout) > 1.1
    assert torch.is_grad_enabled()
