"""What is trained: student, task and methods as one module, and how it is built from a recipe's words.

The module is what DDP wraps and the optimizer steps. Its loss is

    task weight * task loss + sum over methods, sum over terms of  entry weight * weight * term

where weights are pure functions of the run's progress. A method that fuses the task's loss with its own (`kd` with
cross-entropy) is asked for both at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feedfast import recipe as recipes
from feedfast.data.dataset import Dataset
from feedfast.errors import RequestError
from feedfast.methods import Method, StudentOutput, Targets, method_named, parse_options, refuse_other_logits
from feedfast.methods.base import GivenTargets, Shapes, Teachers, apart, tap_groups
from feedfast.models.branched import Branched
from feedfast.models.build import build_model, load_weights, refuse_misnamed
from feedfast.models.given import bare, is_given
from feedfast.models.normalize import Normalize
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped
from feedfast.recipe import MethodEntry
from feedfast.tasks import Outputs, Task


@dataclass(frozen=True)
class Entry:
    """One ``[[method]]`` of a recipe: its class with validated options, and its weight.

    Attributes:
        kind: the method's class.
        options: of ``kind.Options``.
        weight: of all its terms.
        label: what its terms are called among several methods.
    """

    kind: type[Method]
    options: Any
    weight: float
    label: str


def method_entries(methods: Sequence[MethodEntry]) -> tuple[Entry, ...]:
    """The recipe's methods, validated.

    Raises:
        RequestError: an unknown method, or an option that is unknown, ill-typed or out of range.
    """
    entries = []
    names = [entry.name for entry in methods]
    for number, entry in enumerate(methods):
        where = "method" if len(methods) == 1 else f"method.{number}"
        kind = method_named(entry.name, where)
        label = entry.name if names.count(entry.name) == 1 else f"{entry.name}{number}"
        entries.append(Entry(kind, parse_options(kind, entry.parameters, where), entry.weight, label))
    return tuple(entries)


def needs_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Selectors of the taps that any of the methods reads."""
    return tuple(dict.fromkeys(need for entry in entries for need in entry.kind.needed(entry.options)))


def student_needs_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Selectors of the student's taps that any of the methods reads."""
    needs = (entry.kind.student_needs or entry.kind.needed(entry.options) for entry in entries)
    return tuple(dict.fromkeys(need for some in needs for need in some))


def names_of(entries: Sequence[Entry]) -> str:
    """``kd``, or ``kd + ofd``."""
    return " + ".join(entry.kind.name for entry in entries)


class Trainee(nn.Module):
    """Student, task and methods: images and targets in, losses out."""

    def __init__(
        self,
        normalize: Normalize,
        tapped: nn.Module,
        task: Task,
        methods: nn.ModuleList,
        entries: Sequence[Entry],
        task_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.normalize, self.tapped, self.task, self.task_weight = normalize, tapped, task, task_weight
        self.methods, self.entries = methods, entries

    def forward(
        self,
        images: Tensor,
        targets: GivenTargets,
        annotations: Any,
        progress: float,
        ids: NDArray[np.uint32] | None = None,
    ) -> dict[str, Tensor]:
        """uint8 pixels [batch, height, width, 3] → ``loss``, and the task's loss and every term before their weights.

        Args:
            images: pixels of a batch.
            targets: teacher → tap → target.
            annotations: what the batch is annotated with.
            progress: share of the run that is done, 0..1.
            ids: uint32 [batch], which samples these are, for methods that remember them.
        """
        output, taps = self.tapped(self.normalize(images))
        methods = cast("list[Method]", list(self.methods))
        plain, sampled = apart(targets)
        student = StudentOutput(output, taps, sampled=sampled)
        if ids is not None and any(method.remembers for method in methods):
            student.ids = torch.from_numpy(ids.astype(np.int64)).to(images.device)
        return losses_of(
            self.task, self.entries, methods, student, plain, annotations, progress, task_weight=self.task_weight
        )


def losses_of(
    task: Task,
    entries: Sequence[Entry],
    methods: Sequence[Method],
    student: StudentOutput,
    targets: Targets,
    annotations: Any,
    progress: float,
    *,
    task_weight: float = 1.0,
    own: Tensor | None = None,
) -> dict[str, Tensor]:
    """``loss`` with gradient; the task's loss and the methods' terms, unweighted and detached.

    ``own`` stands for the task's loss where somebody else has computed it; no method fuses that one.
    """
    task_weight *= math.prod(method.task_weight(progress) for method in methods)
    fusing = next((n for n, method in enumerate(methods) if method.fuses and isinstance(task, method.fuses)), None)
    terms: dict[str, Tensor] = {}
    if fusing is None or own is not None:
        fusing = None
        own = task.loss(student.output, annotations) if own is None else own
        total = task_weight * own
    else:
        method, entry = methods[fusing], entries[fusing]
        total, own, found = method.fused(student, targets, annotations, entry.weight, task_weight, progress)
        terms.update(_labeled(entry, found, len(entries)))
    for number, (method, entry) in enumerate(zip(methods, entries, strict=True)):
        if number != fusing:
            found = method(student, targets, annotations)
            weights = method.weights(progress)
            for name, term in found.items():
                total = total + entry.weight * weights[name] * term
            terms.update(_labeled(entry, found, len(entries)))
    return {"loss": total, task.term: own.detach(), **terms}


def _labeled(entry: Entry, terms: Mapping[str, Tensor], entries: int) -> dict[str, Tensor]:
    prefix = "" if entries == 1 else f"{entry.label}."
    return {f"{prefix}{name}": term.detach() for name, term in terms.items()}


def build_student(asked: recipes.Student, classes: int, seed: int, given: nn.Module | None = None) -> nn.Module:
    """The bare network of a recipe; of several branches each starts from a seed of its own.

    Args:
        asked: what the recipe says of it.
        classes: that it tells apart.
        seed: of its start.
        given: the network itself, where it was passed as an object: it starts as it is.

    Raises:
        RequestError: it cannot be built, or its weights do not fit; or an object is not what the recipe says.
    """
    if given is not None:
        if asked.branches > 1:
            raise RequestError(f"student.branches: expected 1 of a network that is passed, found {asked.branches}")
        if asked.weights is not None or asked.backbone is not None:
            key = "backbone" if asked.weights is None else "weights"
            raise RequestError(f"student.{key}: expected none with a network that is passed, which brings its own")
        if not is_given(asked.model):
            refuse_misnamed(given, asked.model, (classes,), "student")
        return bare(given)
    if asked.branches == 1:
        return build_model(
            asked.model,
            num_classes=classes,
            weights=asked.weights,
            seed=seed,
            key=asked.key,
            prefix=asked.prefix,
            new_head=True,
            backbone=asked.backbone,
        )
    seeds = np.random.SeedSequence((seed, asked.branches)).generate_state(asked.branches, np.uint64)
    networks = [build_model(asked.model, num_classes=classes, seed=int(s)) for s in seeds]
    student = Branched(networks, asked.model)
    if asked.weights is not None:
        name = f"{asked.model} with {asked.branches} branches"
        load_weights(student, asked.weights, name=name, key=asked.key, prefix=asked.prefix)
    return student


def tap_student(student: nn.Module, needs: Sequence[str], example: Tensor, task: Task, where: str) -> Tapped:
    """The student with its taps, checked against the task.

    Args:
        student: the bare network.
        needs: selectors of the methods.
        example: normalized images [2, 3, H, W].
        task: what it is to learn.
        where: begins the message.

    Raises:
        RequestError: the network has no such maps, or cannot learn the task.
    """
    taps = tuple(tap for group in tap_groups(needs) for tap in preset_taps(student, group, example))
    tapped = Tapped(student, taps, example)
    task.check(tapped.outputs, where)
    return tapped


def build_trainee(
    recipe: recipes.Recipe,
    student: nn.Module,
    entries: Sequence[Entry],
    teachers: Teachers,
    data: Dataset,
    normalize: Normalize,
    task: Task,
    device: torch.device,
) -> Trainee:
    """Student, task and methods as one module on ``device``.

    Args:
        recipe: for memory format, size of images, seed and weights.
        student: the bare network; it is moved.
        entries: the recipe's methods.
        teachers: teacher → tap → shape and margin.
        data: the training images; methods that remember samples are told of all.
        normalize: uint8 pixels [B, H, W, 3] → what the student takes, on ``device``.
        task: what it is to learn.
        device: where it is trained.

    Raises:
        RequestError: taps or classes do not fit.
    """
    memory, size = memory_format(recipe.train), recipe.data.size
    student = student.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    example = gray_images(normalize, size, device)
    tapped = tap_student(student, student_needs_of(entries), example, task, f"student {recipe.student.model}")
    samples = torch.from_numpy(data.ids.astype(np.int64)), torch.from_numpy(data.labels.astype(np.int64))
    methods = build_methods(entries, tapped.shapes, teachers, tapped.outputs, recipe.train_seed, samples)
    methods = methods.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    return Trainee(normalize, tapped, task, methods, entries, recipe.task.weight)


def gray_images(normalize: nn.Module, size: int, device: torch.device) -> Tensor:
    """Two normalized gray images [2, 3, size, size]: what networks are watched on."""
    images: Tensor = normalize(torch.full((2, size, size, 3), 128, dtype=torch.uint8, device=device))
    return images


def memory_format(train: recipes.Train) -> torch.memory_format:
    """Of the student and its images."""
    return torch.channels_last if train.channels_last else torch.contiguous_format


def optimizer_of(train: recipes.Train, trainee: nn.Module) -> torch.optim.Optimizer:
    """The recipe's, of all that learns: the student and the methods' adapters."""
    weights = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    if train.optimizer == "sgd":
        nesterov = train.nesterov and train.momentum > 0
        return torch.optim.SGD(weights, train.lr, train.momentum, weight_decay=train.weight_decay, nesterov=nesterov)
    return torch.optim.AdamW(weights, train.lr, weight_decay=train.weight_decay)


def build_methods(
    entries: Sequence[Entry],
    student: Shapes,
    teachers: Teachers,
    outputs: Outputs,
    seed: int,
    samples: tuple[Tensor, Tensor] | None = None,
) -> nn.ModuleList:
    """Every method with its adapters.

    Args:
        entries: the recipe's methods.
        student: tap name → shape.
        teachers: teacher → tap → shape and margin.
        outputs: shape of the student's output, None if it is no tensor; where logits are compared, the teachers' too.
        seed: adapters start from it and nothing else, so that live and cached runs start equal.
        samples: ids and labels of all the run's samples, int64 [n], for methods that remember them.

    Raises:
        RequestError: taps or classes do not fit.
    """
    methods = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for entry in entries:
            method = entry.kind(entry.options, student, teachers)
            if samples is not None:
                method.meet(*samples)
            methods.append(method)
    for entry in entries:
        refuse_other_logits(entry.kind, entry.options, outputs, teachers)
    return methods
