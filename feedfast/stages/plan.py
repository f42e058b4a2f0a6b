"""`feedfast plan`: what a caching job will cost, before it costs it.

The first question everybody meets is disk space, the second is time. Both are estimated from one batch: real pixels
through the real teachers, maps encoded and compressed as they will be, and a student step. Estimates are
labeled by how they were made: ``raw_bytes`` is exact arithmetic, ``bytes`` multiplies it by the compression one
batch of real codes reached.

Break-even is the number of epochs after which caching has paid: a live run pays the teachers' forward pass every
epoch, a cached one paid it once per view.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedfast.cache.blocks import compress_block
from feedfast.cache.create import refuse_foreign
from feedfast.cache.fit import fit_affine
from feedfast.cache.layout import block_rows_for
from feedfast.cache.log import read_log
from feedfast.cache.schema import CodecName
from feedfast.errors import RequestError
from feedfast.models.build import build_model
from feedfast.models.normalize import Normalize
from feedfast.models.taps import Tapped, logits_of
from feedfast.recipe import Recipe
from feedfast.report.compare import print_table
from feedfast.stages.data import facts_of, open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import LOGITS, FrozenTeacher, load_teachers
from feedfast.stages.pilot import PILOT_VIEWS, mixing_plan, row_bytes, tap_row_bytes
from feedfast.stages.progress import format_bytes
from feedfast.stages.record import encode_rows
from feedfast.stages.worker import pick_device

BLOCK_EXTRA = 20  # bytes: a place in the shard's index and a checksum
VIEW_ROW = 25  # bytes per row of views/order, views/window, views/flip and pixels/sums
SAMPLE = 12  # bytes per sample of samples/label and samples/content


def run_plan(recipe: Recipe) -> dict[str, Any]:
    """Estimate the recipe's cache.

    Returns:
        The JSON of `feedfast plan`: ``bytes``, ``raw_bytes``, ``bytes_per_sample`` (of one view), ``targets`` (per
        teacher/tap the same), ``bytes_present``, ``free_bytes``, ``fits``, ``seconds``, ``images_per_second``,
        ``teachers_ms`` and ``student_ms`` (one batch, forward, and forward with backward), ``live_over_cached``,
        ``break_even_epochs``, ``data`` (see `feedfast.stages.data.facts_of`).

    Raises:
        RequestError: the recipe cannot be run.
    """
    if not recipe.teachers or not recipe.cache.path or not recipe.cache.views:
        raise RequestError(
            "plan: expected [[teachers]], cache.path and cache.views, found at least one of them missing"
        )
    refuse_foreign(Path(recipe.cache.path))
    device = pick_device(recipe.train.device)
    data = open_train(recipe.data)
    teachers = load_teachers(recipe, len(data.classes), device)
    plan = view_plan(recipe.data, recipe.seed)
    loader = pixel_loader(data, plan, recipe.cache.batch, device, recipe.data.threads)
    images = next(iter(loader.stream(0, np.arange(min(len(data), recipe.cache.batch))))).images
    loader.close()
    rows = len(data) * recipe.cache.views
    targets: dict[str, dict[str, Any]] = {}
    plan = mixing_plan(plan, row_bytes(teachers.values(), recipe.cache.codec, recipe.cache.images, plan.size))
    for name, teacher in teachers.items():
        teacher.fit_margins([images])
        for tap, values in teacher(images).items():
            raw = tap_row_bytes(tap, teacher.shapes[tap], recipe.cache.codec)
            block = block_rows_for(raw, plan.granule)
            blocks = -(-len(data) // block) * recipe.cache.views
            ratio = _compression(teacher, tap, values[:block], recipe.cache.codec)
            # Blocks are whole: what fills up the last one of a view takes room unless zstd squeezes it to nothing.
            stored = raw * rows / ratio if ratio > 1 else raw * blocks * block
            size = int(stored) + BLOCK_EXTRA * blocks
            targets[f"{name}/{tap}"] = {
                "shape": list(teacher.shapes[tap]),
                "raw_bytes": int(raw * rows),
                "bytes": size,
                "bytes_per_sample": size / rows,
                "compression": ratio,
            }
    if recipe.cache.images == "stored":
        pixels = recipe.data.size**2 * 3
        block = block_rows_for(pixels, plan.granule)
        blocks = -(-len(data) // block) * recipe.cache.views
        targets["pixels"] = {
            "shape": [3, recipe.data.size, recipe.data.size],
            "raw_bytes": pixels * rows,
            "bytes": pixels * blocks * block + BLOCK_EXTRA * blocks,
            "bytes_per_sample": pixels * blocks * block / rows,
            "compression": 1.0,
        }
    teachers_ms = _median_ms(lambda: [teacher(images) for teacher in teachers.values()])
    student_ms = _student_ms(recipe, images, len(data.classes) or 1000, device)
    path = Path(recipe.cache.path)
    present = sum(commit.bytes for commit in read_log(path).commits.values())
    total = sum(entry["bytes"] for entry in targets.values()) + VIEW_ROW * rows + SAMPLE * len(data)
    standing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(standing).free
    # A quarter of the fitting rows measures the fit.
    pilot = 1.25 * min(recipe.cache.pilot, PILOT_VIEWS * len(data))
    seconds = teachers_ms * (rows + pilot) / len(images) / 1e3
    epoch_batches = len(data) / len(images)
    table = [
        {
            "target": name,
            "shape": "x".join(map(str, entry["shape"])),
            "per sample": format_bytes(entry["bytes_per_sample"]),
            "per view": format_bytes(entry["bytes"] / recipe.cache.views),
            "in all": format_bytes(entry["bytes"]),
        }
        for name, entry in targets.items()
    ]
    print_table(f"plan: {len(data):,} images, {recipe.cache.views} views, {recipe.cache.codec}", table)
    return {
        "bytes": total,
        "raw_bytes": sum(entry["raw_bytes"] for entry in targets.values()),
        "bytes_per_sample": total / rows,
        "targets": targets,
        "bytes_present": present,
        "free_bytes": free,
        "fits": max(total - present, 0) * 1.02 < free,
        "seconds": seconds,
        "images_per_second": len(images) / teachers_ms * 1e3,
        "teachers_ms": teachers_ms,
        "student_ms": student_ms,
        "live_over_cached": (teachers_ms + student_ms) / student_ms,
        "break_even_epochs": seconds * 1e3 / (teachers_ms * epoch_batches),
        "data": facts_of(data),
    }


def _compression(teacher: FrozenTeacher, tap: str, block: Tensor, codec: CodecName) -> float:
    """What zstd makes of a block of real codes; 1 where it would not be used."""
    if tap == LOGITS:
        return 1.0
    values = block.cpu()
    transform = teacher.transform(tap)
    flat = transform.teacher(values).movedim(1, -1).reshape(-1, values.shape[1])
    thin = flat[:: max(1, len(flat) // 4096)].contiguous().numpy()
    offset, step = fit_affine(thin, codec)
    codes, _ = encode_rows(values, codec, torch.from_numpy(offset), torch.from_numpy(step), transform)
    ratio = codes.nbytes / len(compress_block(np.ascontiguousarray(codes), "zstd"))
    return ratio if ratio >= 1.15 else 1.0


def _student_ms(recipe: Recipe, images: Tensor, classes: int, device: torch.device) -> float:
    """Forward and backward of the plain student on one batch."""
    memory = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    student = build_model(recipe.student.model, num_classes=classes, weights=None, seed=0)
    student = student.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    normalize = Normalize(*recipe.data.normalization).to(device)
    Tapped(student, (), normalize(images[:2]))  # refuses a network that cannot run at this size

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            logits_of(student(normalize(images))).float().logsumexp(1).sum().backward()

    return _median_ms(step)


def _median_ms(work: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times[1:]))
