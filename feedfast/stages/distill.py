"""A method's loss in any training loop: `feedfast.distiller`.

    cache = feedfast.open_cache("runs/c100.zarr")
    distiller = feedfast.distiller(cache, student, method="ofd")
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    for batch in cache.epochs(batch_size=128, taps=distiller.taps):
        losses = distiller(student(batch.images), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()

The loss is that of `feedfast train`: the same methods, adapters, weights and taps. What differs is who runs the
student; its maps are caught by hooks while it runs (`feedfast.models.listen`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from feedfast.data.batch import Batch
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.methods import Method, StudentOutput, Targets, refuse_dense
from feedfast.methods.base import apart
from feedfast.models.listen import Listener
from feedfast.models.normalize import Normalize
from feedfast.models.taps import logits_of
from feedfast.recipe import Methods
from feedfast.stages.loop import view_and_pass
from feedfast.stages.open_cache import OpenedCache, open_cache
from feedfast.stages.proof import selection_of
from feedfast.stages.source import manifest_taps, needed
from feedfast.stages.trainee import (
    Entry,
    build_methods,
    gray_images,
    losses_of,
    method_entries,
    names_of,
    needs_of,
    student_needs_of,
    tap_student,
)
from feedfast.stages.usable import lacks, refuse_mixed
from feedfast.tasks import Task, task_named

MethodLike = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A method's name, or the table of a recipe's ``[method]`` (``{"name": "ofd", "alpha": 1e-3}``), or several of them."""

# Shares of a run at which weights are compared: whoever ramps, waits or changes phase differs at some of them.
_SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Distiller(nn.Module):
    """The loss of a student that somebody else runs. Made by `distiller`.

    Its parameters and its ``state_dict`` are the methods' adapters, which belong into the optimizer and into
    checkpoints; the student is not part of it.

    Attributes:
        taps: teacher → names of the targets that batches must carry; for ``cache.epochs(taps=...)``.
        methods: the methods, each with its adapters.
        task: what the student learns: classification, segmentation or detection, with its loss.
    """

    def __init__(
        self,
        listener: Listener,
        task: Task,
        entries: Sequence[Entry],
        methods: nn.ModuleList,
        taps: Mapping[str, tuple[str, ...]],
        task_weight: float,
    ) -> None:
        super().__init__()
        self.methods, self.task = methods, task
        self.taps = dict(taps)
        self._listener, self._entries, self._task_weight = listener, tuple(entries), task_weight
        kinds = self._methods
        varying = [
            method.name
            for method in kinds
            if len({(str(method.weights(share)), method.task_weight(share)) for share in _SHARES}) > 1
        ]
        self._varying = " + ".join(varying)

    @property
    def student(self) -> nn.Module:
        """The bare network that was given."""
        return self._listener.tapped.model

    @property
    def _methods(self) -> list[Method]:
        return cast("list[Method]", list(self.methods))

    def forward(
        self, output: Any, batch: Batch, *, progress: float | None = None, task_loss: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of the student's last forward pass, which must have been of this batch.

        Args:
            output: what the student has returned: logits [B, K], or an object that has them as ``logits``. None = what
                it returned when it was called, before anything wrapped around it changed that.
            batch: of a stream of the cache, with the targets in `taps`.
            progress: share of the run that is done, 0..1. Needed by methods whose weights change in a run.
            task_loss: the task's loss, a scalar with gradient, where it is not to be computed here from
                ``batch.annotations`` (for classification: cross-entropy).

        Returns:
            ``loss``, with gradient: the sum of all, weighted. And detached, without their weights: the task's loss
            (``ce`` for classification) and the methods' terms.

        Raises:
            FeedfastError: the student has not run since the last call.
            CacheMismatchError: the batch lacks a target.
            RequestError: ``progress`` is missing, or the last pass was of another number of images.
        """
        if progress is None and self._varying:
            raise RequestError(
                f"progress: method {self._varying!r} changes with it; expected progress=step / steps, found None"
            )
        own, maps = self._listener.take()
        logits = own if output is None else logits_of(output)
        found = next((len(value) for value in (*maps.values(), logits) if isinstance(value, Tensor)), len(batch))
        if found != len(batch):
            raise RequestError(
                f"batch: expected the {found} images of the student's last forward pass, found {len(batch)}"
            )
        plain, sampled = apart(self._targets(batch))
        student = StudentOutput(logits, maps, sampled=sampled)
        if any(method.remembers for method in self._methods):
            student.ids = torch.from_numpy(batch.ids.astype(np.int64)).to(batch.images.device)
        return losses_of(
            self.task,
            self._entries,
            self._methods,
            student,
            plain,
            batch.annotations,
            progress or 0.0,
            task_weight=self._task_weight,
            own=task_loss,
        )

    def outside(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The adapters' trainable parameters that an optimizer does not have yet."""
        known = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [weight for weight in self.parameters() if weight.requires_grad and id(weight) not in known]

    def average_gradients(self) -> None:
        """With several processes: replace the adapters' gradients by their mean over ranks, as DDP does the student's.

        Between ``backward`` and ``optimizer.step``, on every rank; without a process group nothing happens. Not needed
        where the distiller itself is part of a module that DDP wraps.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def remove(self) -> None:
        """Take the hooks off the student; no further losses can be asked for."""
        self._listener.remove()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def extra_repr(self) -> str:
        """Methods and targets."""
        return f"{names_of(self._entries)}, taps={self.taps}"

    def _targets(self, batch: Batch) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for teacher, taps in self.taps.items():
            have = batch.targets.get(teacher, {})
            for tap in taps:
                if tap not in have:
                    held = {name: list(some) for name, some in batch.targets.items()}
                    raise CacheMismatchError(
                        f"batch.targets: expected tap {tap!r} of teacher {teacher!r}, found {held}; "
                        "stream the cache with taps=distiller.taps"
                    )
                found.setdefault(teacher, {})[tap] = have[tap]
        return found


def distiller(
    cache: OpenedCache | str | Path,
    student: nn.Module,
    method: MethodLike = "kd",
    *,
    teachers: Sequence[str] | None = None,
    task_weight: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
) -> Distiller:
    """What a training loop of your own adds to learn from a cache; the example is at the top of this module.

    Make it when the student is on its device and before it is wrapped (DDP) or compiled: what is called later, wrapped
    or not, is heard. The student's outputs stay the same bit for bit, activations whose input is read are no longer in
    place.

    Args:
        cache: an open one, or its path.
        student: the bare network: normalized images [B, 3, H, W] → logits [B, K], alone or as ``.logits``.
        method: its name, ``{"name": ..., **options}``, or a sequence of these with a ``weight`` each; as in a recipe.
        teachers: names of those to learn from; all of the cache without it.
        task_weight: of the task's own loss, next to the methods' terms.
        seed: of the adapters' start; `feedfast train` takes the recipe's.
        batch_size: rows that a method which learns from the targets beforehand (``ft``) reads at a time.

    Raises:
        RequestError: an unknown method, option or teacher, or a student that cannot learn by it.
        CacheMismatchError: the cache lacks targets that the method reads.
    """
    cache = cache if isinstance(cache, OpenedCache) else open_cache(cache)
    try:
        entries = method_entries(_ADAPTER.validate_python({"name": method} if isinstance(method, str) else method))
    except ValidationError as error:
        raise RequestError(
            f"method: expected a name, {{'name': ..., **options}} or several of these, found {method!r} "
            f"({error.errors()[0]['msg']})"
        ) from None
    names, classes, plan = _teachers(cache, teachers), len(cache.data.classes), cache.plan
    refuse_mixed(plan, entries)
    task_name = selection_of(cache.reader).task
    for entry in entries:
        refuse_dense(entry.kind, task_name, entry.options)
    needs, known = needs_of(entries), manifest_taps(cache.manifest)
    lacking = lacks(needs, {name: known[name] for name in names})
    if lacking:
        raise CacheMismatchError(
            f"{cache.reader.path}: method {names_of(entries)!r} {lacking}; run `feedfast cache` to add them"
        )
    infos = {name: needed(known[name], needs) for name in names} if needs else {}
    taps = {name: tuple(some) for name, some in infos.items()}
    weights = next(student.parameters(), torch.empty(0))
    first = next(iter(cache.manifest.teachers.values()))
    example = gray_images(Normalize(first.mean, first.std).to(weights.device), plan.size, weights.device)
    task = task_named(task_name, classes or first.num_classes, plan.size)
    tapped = tap_student(student, student_needs_of(entries), example, task, f"student {type(student).__name__}")
    try:
        samples = (torch.from_numpy(some.astype(np.int64)) for some in (cache.data.ids, cache.data.labels))
        methods = build_methods(entries, tapped.shapes, infos, tapped.outputs, seed, tuple(samples))  # type: ignore[arg-type]
        methods = methods.to(device=weights.device, memory_format=_memory_format(student))  # type: ignore[call-overload]
        _prepare(cache, methods, taps, weights.device, batch_size)
    except BaseException:
        tapped.remove()
        raise
    return Distiller(Listener(tapped), task, entries, methods, taps, task_weight)


_ADAPTER: TypeAdapter[Any] = TypeAdapter(Methods)


def _teachers(cache: OpenedCache, asked: Sequence[str] | None) -> list[str]:
    have = list(cache.manifest.teachers)
    if asked is None:
        return have
    unknown = [name for name in asked if name not in have]
    if unknown or not asked or isinstance(asked, str):
        raise RequestError(f"teachers: expected names among {have}, as {have[:1]}, found {asked!r}")
    return list(asked)


def _memory_format(student: nn.Module) -> torch.memory_format:
    """Adapters lie in memory as the student's weights do."""
    for weight in student.parameters():
        if weight.dim() == 4 and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def _prepare(
    cache: OpenedCache, methods: nn.ModuleList, taps: dict[str, tuple[str, ...]], device: torch.device, batch_size: int
) -> None:
    """Let methods learn from targets what they must know before the first step; alike on every rank."""
    learning = [method for method in cast("list[Method]", list(methods)) if type(method).prepare is not Method.prepare]
    if not learning:
        return
    source = cache.source(device=device, taps=taps)
    batch_size = min(batch_size, len(cache))

    def passes(epoch: int) -> Iterator[Targets]:
        view, _ = view_and_pass(epoch, cache.views)
        return source.target_batches(view, np.arange(len(cache) // batch_size * batch_size), batch_size)

    try:
        with torch.random.fork_rng(devices=[]):
            for method in learning:
                method.prepare(passes)
    finally:
        source.close()
