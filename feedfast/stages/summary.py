"""A run in words, for its report: what was asked of it, and what it cost besides the time of its steps.

The pages know no recipe; here it is put into a dozen lines. What stands at its default and says nothing is left out.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

from feedfast.provenance import redacted
from feedfast.recipe import MethodEntry, Recipe, Teacher
from feedfast.stages.compare import bytes_per_sample
from feedfast.stages.progress import format_bytes

__all__ = ["asked_of", "cost_of"]

_SOURCES = {
    "cache": "the cache {path}",
    "live": "live teachers",
    "record": "live teachers, recorded into the cache {path}",
    "none": "no teachers: plain training",
}


def asked_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe asks for: name → words, or several lines."""
    data, train, student = recipe.data, recipe.train, recipe.student
    views = f"{recipe.cache.views} views in turn" if recipe.cache.views else "a new view every epoch"
    augment = (
        data.augment if isinstance(data.augment, str) else " + ".join(str(step.get("op")) for step in data.augment)
    )
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"
    plan = [f"{length} in batches of {train.batch:,}", f"{train.optimizer}, {train.schedule}, lr {train.lr:g}"]
    plan += [f"weight decay {train.weight_decay:g}"] * (train.weight_decay > 0)
    plan += [f"warm-up {train.warmup_epochs:g} epochs"] * (train.warmup_epochs > 0)
    start = "" if student.weights is None else f", from {student.weights or 'its published weights'}"
    said: dict[str, Any] = {
        "Task": recipe.task.name,
        "Student": f"{student.model}{start}" + (f", {student.branches} branches" if student.branches > 1 else ""),
        "Method": [_method(entry) for entry in recipe.method],
        "Targets from": _SOURCES[train.source].format(path=recipe.cache.path),
        "Teachers": [_teacher(teacher) for teacher in recipe.teachers] if train.source != "none" else None,
        "Training images": [*data.train],
        "Validation images": [*data.val] or None,
        "Images": f"{data.size} px, {augment}, {views}"
        + (f", {data.limit:,} per class" if data.limit else "")
        + (f", {data.fraction:.1%} of each class" if data.fraction < 1 else ""),
        "Training": ", ".join([*plan, train.precision]),
        "Seeds": f"views {recipe.seed}, student {recipe.train_seed}",
    }
    # addresses may carry logins
    return {
        name: [redacted(line) for line in words] if isinstance(words, list) else words and redacted(words)
        for name, words in said.items()
    }


def _method(entry: MethodEntry) -> str:
    options = [f"{key} {value}" for key, value in entry.parameters.items()]
    options += [f"weight {entry.weight:g}"] * (entry.weight != 1)
    return entry.name + (f" ({', '.join(options)})" if options else "")


def _teacher(teacher: Teacher) -> str:
    taps = ", ".join(str(tap.model_dump(mode="json")) for tap in teacher.taps) or "what the methods need"
    return f"{teacher.name}: {teacher.model} with {teacher.weights or 'its published weights'}; taps {taps}"


def cost_of(recipe: Recipe, steps: int, device: torch.device, devices: Sequence[str] = ()) -> dict[str, Any]:
    """What a run that has just ended cost: bytes of targets, and memory at its peak.

    Args:
        recipe: of the run.
        steps: that it took in all.
        device: of the training.
        devices: names of what ran it.
    """
    found: dict[str, Any] = {}
    each = bytes_per_sample(recipe) if recipe.train.source == "cache" else None
    if each is not None:
        total = format_bytes(each * steps * recipe.train.batch)
        found["Targets read"] = f"{format_bytes(each)} per sample and view as stored, {total} in all steps"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found["Peak memory of the process"] = format_bytes(peak)
    if device.type == "cuda":
        found["Peak memory of the GPU"] = format_bytes(torch.cuda.max_memory_allocated(device))
    found["Machine"] = ", ".join(devices) or None
    return found
