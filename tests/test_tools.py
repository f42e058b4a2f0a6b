"""The scripts in tools/ that measure: they find a difference that is there, and claim nothing without a GPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan

TOOLS = Path(__file__).parents[1] / "tools"


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
