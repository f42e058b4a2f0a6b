"""`feedfast doctor`: what this machine is, which versions run on it, and whether bf16 pays on its processor."""

from __future__ import annotations

import logging
from typing import Any

import torch

from feedfast.provenance import Provenance
from feedfast.report.compare import print_table
from feedfast.stages.bf16 import SLOW, bf16_ratio, has_bf16

log = logging.getLogger(__name__)


def run_doctor() -> dict[str, Any]:
    """Look at this machine.

    Returns:
        The JSON of `feedfast doctor`: ``versions``, ``machine``, ``commit``, ``dirty``, ``bf16`` (``instructions``:
        whether the processor has any for it; ``over_fp32``: measured time per that of fp32).
    """
    here = Provenance.begin()
    ratio = bf16_ratio()
    rows = [{"what": name, "found": found or "not installed"} for name, found in here.versions.items()]
    rows += [{"what": name, "found": str(value)} for name, value in here.machine.model_dump(exclude={"gpus"}).items()]
    rows += [{"what": f"GPU {number}", "found": name} for number, name in enumerate(here.machine.gpus)]
    rows.append({"what": "bf16 on the processor", "found": f"{ratio:.2f} times the time of fp32 (a trial)"})
    print_table("this machine", rows)
    if ratio > SLOW:
        log.warning("bf16 takes %.1f times as long as fp32 on this processor: expected precision fp32 there", ratio)
    if not torch.cuda.is_available():
        log.info("torch sees no CUDA GPU; everything runs on the processor")
    return {
        "versions": here.versions,
        "machine": here.machine.model_dump(mode="json"),
        "commit": here.commit,
        "dirty": here.dirty,
        "bf16": {"instructions": has_bf16(), "over_fp32": ratio},
    }
