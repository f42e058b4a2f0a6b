"""The student stage: a recipe becomes a trained student (and, with ``source = "none"``, a trained teacher).

Everything is opened and built first, so that every mistake shows before the first step; `feedfast.stages.loop` trains.
The recipe is opened here, once; what is below is given values.

With several ranks each takes its slice of every global batch and gradients are averaged: of a loss per image that is
the mean over the global batch; segment and detect divide by each rank's own valid pixels or matched anchors. Batch
statistics stay local, as in plain DDP. All ranks evaluate, the first one writes; a logged loss is the mean over ranks.
The saved student carries no adapters.
"""

from __future__ import annotations

import contextlib
import logging
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import nn

from feedfast.data.dali import require_dali
from feedfast.data.dataset import Dataset, ImageSource
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, remove_temporary, write_sealed
from feedfast.methods import Method
from feedfast.models.branched import Branched
from feedfast.models.build import build_model
from feedfast.models.given import AsFound, bare
from feedfast.models.normalize import Normalize
from feedfast.models.own import own_input
from feedfast.models.taps import Tapped, refuse_lone_norms
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.report.events import EventLog
from feedfast.report.loggers import About, pick_loggers
from feedfast.report.page import Html, Section
from feedfast.report.run import write_report
from feedfast.stages.bf16 import say_slow_bf16
from feedfast.stages.checkpoint import load_checkpoint, require_finite, write_state
from feedfast.stages.data import open_train, open_val, pixel_loader, view_plan
from feedfast.stages.ensemble import Networks
from feedfast.stages.evaluate import BATCH, evaluate
from feedfast.stages.folder import (
    BRANCH,
    RunLock,
    check_run_dir,
    ensure_dir,
    processes_of,
    record_process,
    resumed_run,
    start_run_dir,
)
from feedfast.stages.loop import Loop, Trainer
from feedfast.stages.plan_record import predicted_step, prediction_error
from feedfast.stages.predictions import maps_html, predictions_html
from feedfast.stages.progress import Meter
from feedfast.stages.recorded import Recorded, open_recorded, refuse_unrecordable
from feedfast.stages.schedule import Schedule, total_steps
from feedfast.stages.sheet import contact_sheet
from feedfast.stages.source import Cached, Source, open_source
from feedfast.stages.summary import asked_of, cost_of
from feedfast.stages.trainee import (
    build_student,
    build_trainee,
    gray_images,
    memory_format,
    names_of,
    needs_of,
    optimizer_of,
    student_needs_of,
    tap_student,
)
from feedfast.stages.usable import trainable_entries
from feedfast.stages.worker import Worker, pick_device
from feedfast.tasks import Task, task_named
from feedfast.words import toml_text

log = logging.getLogger(__name__)

Found = dict[str, float | None]
"""Metric → value, of the validation images."""


def run_train(
    recipe: Recipe,
    *,
    train: ImageSource | None = None,
    val: ImageSource | None = None,
    teachers: Networks | None = None,
    student: nn.Module | None = None,
) -> dict[str, Any]:
    """Train (or resume) the recipe's student.

    Args:
        recipe: what to do.
        train: the object that the images come from, with ``data.train = "python"``: its items are (image, label).
        val: the same for ``data.val = "python"``.
        teachers: networks of the recipe's teachers that need not be built; they are copied.
        student: the network itself, which is trained where it is: it stays on the training device.

    Returns:
        The JSON of `feedfast train`: ``val_accuracy`` (of dense tasks ``val_miou`` or ``val_ap50``, and ``val_metrics``
        with all that was measured), ``final_loss``, ``steps``, ``images_per_second``,
        ``data_wait_fraction``, ``step_ms`` (median; on a GPU mean), ``seconds``, ``source``, ``method``,
        ``model``, ``parameters`` (of the bare student), ``out``; ``branch_accuracy`` of a student of branches, whose
        best branch is saved as a plain network, ``branch.pt``; ``views_complete`` of a run that records; ``predicted``
        (``step_ms``, by `run_plan` of the same recipe and one rank; None without one) and ``prediction_error`` (found /
        predicted - 1).

    Raises:
        RequestError: the recipe cannot be run, or ``train.out`` holds another run.
        CacheMismatchError, CacheDamageError: the cache is not the recipe's, or is incomplete or damaged.
        FeedfastError: the loss is no longer finite.
    """
    require_dali()
    me = Worker.from_env()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    picked = partial(pick_device, recipe.train.device, me.local)
    with me.process_group(picked, memory=recipe.train.source == "record"):
        return StudentRun(recipe, me, train, val, teachers, student).run()


def _save_network(network: nn.Module, path: Path) -> None:
    """Its state_dict, for plain torch."""
    write_state(path, {name: value.cpu() for name, value in network.state_dict().items()})


class StudentRun:
    """One run of the student stage, opened and built."""

    def __init__(
        self,
        recipe: Recipe,
        me: Worker,
        images: ImageSource | None = None,
        val_images: ImageSource | None = None,
        networks: Networks | None = None,
        given: nn.Module | None = None,
    ) -> None:
        self.recipe, self.me, self._networks, self._given = recipe, me, networks, given
        self._as_found = None if given is None else AsFound(bare(given))
        self.provenance = Provenance.begin(recipe.model_dump(mode="json"))
        train = recipe.train
        self.device = pick_device(train.device, me.local)
        self.out = Path(train.out)
        if train.batch % me.world:
            raise RequestError(f"train.batch: expected a multiple of the {me.world} ranks, found {train.batch}")
        self.loggers = pick_loggers(train.loggers)
        self.entries = trainable_entries(recipe)
        if train.source == "record":
            refuse_unrecordable(recipe)
        say_slow_bf16(recipe, self.device, teachers=train.source in ("live", "record"))
        self.needs = needs_of(self.entries)
        ensure_dir(self.out, "train.out")
        # The first rank holds it for all; they end together.
        self._lock = RunLock(self.out) if me.first else None
        with contextlib.ExitStack() as undo:
            undo.callback(self._give_back)
            self.resumed = check_run_dir(self.out, recipe)
            self.data = open_train(recipe, images)
            if len(self.data) < train.batch:
                raise RequestError(
                    f"train.batch: expected at most the {len(self.data)} training samples, found {train.batch}"
                )
            plan = view_plan(recipe.data, recipe.seed)
            val: Dataset | None = open_val(recipe, self.data, val_images)
            self.val: Loader | None = None
            if val is not None:
                shown = replace(plan, size=recipe.data.val_size or plan.size)
                batch = BATCH if recipe.task.name == "classify" else train.batch  # dense outputs are large
                self.val = pixel_loader(val, shown, batch, self.device, recipe.data.threads)
            # Where the images say how many classes there are, a student that cannot be built is named before a cache.
            student = self._student() if self.data.classes else None
            self.source: Source = self._open_source(plan)
            self.identity = {
                "data": self.data.fingerprint(),
                "val": None if val is None else val.fingerprint(),
                **self.source.identity(),
            }
            run = resumed_run(self.out, self.identity) if self.resumed else ""
            self._warn_of_other_input()
            self.normalize = Normalize(*recipe.data.normalization).to(self.device)
            side = recipe.data.val_size or recipe.data.size
            self.task: Task = task_named(recipe.task.name, self._num_classes(), side)
            student = student or self._student()
            kept = given is not None and me.first and not self.resumed  # the start of an object is known by no seed
            self._start = {name: value.cpu().clone() for name, value in student.state_dict().items()} if kept else None
            self.trainer = self._trainer(student, total_steps(train, len(self.data)))
            self.loop = Loop(self.trainer, self.source, self.source.plan, len(self.data), train, me, self.out)
            self.loop.run = run
            undo.pop_all()

    def _open_source(self, plan: ViewPlan) -> Source:
        if self.recipe.train.source == "record":
            return open_recorded(
                self.recipe, self.data, plan, self.device, self.entries, self.me, self._networks, self._given
            )
        label = names_of(self.entries)
        return open_source(self.recipe, self.data, plan, self.device, self.needs, label, self._networks)

    def _student(self) -> nn.Module:
        return build_student(self.recipe.student, self._num_classes(), self.recipe.train_seed, self._given)

    def _warn_of_other_input(self) -> None:
        asked, ours = self.recipe.student, self.recipe.data.normalization
        own = own_input(asked.model, asked.weights)
        if self.recipe.task.name == "detect" and own is not None and (own.mean, own.std) != ours:
            log.warning(
                "student %s: it normalizes by mean %s, std %s, and data.mean, data.std are %s, %s: its published "
                "weights, teachers made of this student and plain torchvision expect the former",
                *(asked.model, own.mean, own.std, *ours),
            )

    def _num_classes(self) -> int:
        found = len(self.data.classes) or self.source.classes
        if not found:
            raise RequestError(
                f"data.train: expected labeled images (class sub-folders), found none in {self.data.source}"
            )
        return found

    def _trainer(self, student: nn.Module, total: int) -> Trainer:
        recipe, train = self.recipe, self.recipe.train
        built = build_trainee(
            recipe, student, self.entries, self.source.taps, self.data, self.normalize, self.task, self.device
        )
        if train.batch == self.me.world:
            example = gray_images(self.normalize, recipe.data.size, self.device)
            where = f"train.batch: expected 2 or more images per rank for {recipe.student.model}"
            refuse_lone_norms(student, example, where)
        if train.compile:
            built.tapped = torch.compile(built.tapped)  # type: ignore[assignment]
        trainee: nn.Module = built
        if self.me.world > 1:
            trainee = nn.parallel.DistributedDataParallel(
                trainee, device_ids=None if self.device.type == "cpu" else [self.device.index]
            )
        return Trainer(
            trainee=trainee,
            student=student,
            methods=built.methods,
            optimizer=optimizer_of(train, trainee),
            schedule=Schedule(train, total, len(self.data) // train.batch),
            device=self.device,
            autocast=train.precision == "bf16",
            seed=recipe.train_seed,
            rank=self.me.rank,
        )

    @property
    def parameters(self) -> int:
        """Of the bare student."""
        return sum(parameter.numel() for parameter in self.trainer.student.parameters())

    def run(self) -> dict[str, Any]:
        """See `run_train`."""
        try:
            return self._run()
        finally:
            self.close()

    def _run(self) -> dict[str, Any]:
        train, loop, trainer = self.recipe.train, self.loop, self.trainer
        step = 0
        if self.me.first and not self.resumed:
            loop.run = start_run_dir(self.out, self.recipe, self.identity)
        if self.resumed:
            step = load_checkpoint(self.out, trainer.student, trainer.methods, trainer.optimizer, loop.total, loop.run)
            loop.kept = step
            if self.me.first:
                remove_temporary(self.out)
        stop = min(loop.total, train.max_steps) if train.max_steps else loop.total
        log.info(
            "train: %s (%s parameters), %s from %s, %s images, %s steps of %d, %s on %s%s",
            self.recipe.student.model,
            f"{self.parameters:,}",
            names_of(self.entries),
            train.source,
            f"{len(self.data):,}",
            f"{loop.total:,}",
            train.batch,
            train.precision,
            self.device,
            f", resumed at step {step}" if step else "",
        )
        if step == 0:
            self._prepare()
            start = {"student": trainer.student.state_dict(), "method": trainer.methods.state_dict()}
            require_finite(f"train: before the first step of {self.out}", start)
        trains = self.me.first and step < stop
        if trains:
            record_process(self.out, self.provenance)
        events = self._events(step, trains) if self.me.first else None
        with events or contextlib.nullcontext():
            step, found, branches = self._train(step, stop, events)
            if trains:
                record_process(self.out, self.provenance.finished())
            result = self._finish(step, found, branches, events)
            if events is not None:
                events.result(result)
        return result

    def _events(self, step: int, trains: bool) -> EventLog:
        tree = self.provenance.model_dump(mode="json")
        recipe = tree.pop("recipe")  # without logins
        about = About(self.out, step, recipe["train"]["out"], recipe, tree, tuple(recipe["train"]["tags"]))
        ended = not trains and (self.out / "result.json").is_file()  # then they have been told all
        return EventLog(about, () if ended else self.loggers)

    def _train(
        self, step: int, stop: int, events: EventLog | None
    ) -> tuple[int, Found, list[tuple[nn.Module, float | None]]]:
        """From ``step`` to ``stop``: the step reached, what was measured there, and the branches."""
        train, loop = self.recipe.train, self.loop
        try:
            with loop.hold, Meter("train", (stop - step) * train.batch) as meter:
                found: Found = {}
                while step < stop:
                    step = loop.epoch(step, stop, events, meter)
                    found = self._evaluate_if_due(step, stop, events)
                    loop.checkpoint(step)
                loop.hold.deliver()
                found = found or self.evaluate()
                branches = self._branches()
        except KeyboardInterrupt:
            loop.rescue()
            raise
        return step, found, branches

    def _prepare(self) -> None:
        """Let the methods learn from targets what they must know before the first step, and tell all ranks."""
        methods = cast("list[Method]", list(cast("nn.ModuleList", self.trainer.methods)))
        learning = [method for method in methods if type(method).prepare is not Method.prepare]
        if not learning:
            return
        # Targets that are not recorded yet are recorded by all ranks, so all of them walk through them.
        if self.me.first or isinstance(self.source, Recorded):
            with torch.random.fork_rng(devices=[]):
                for method in learning:
                    method.prepare(self.loop.targets)
        if self.me.world > 1:
            for value in self.trainer.methods.state_dict().values():
                torch.distributed.broadcast(value, 0)

    def close(self) -> None:
        """Stop what is read ahead, and give the folder back, and a student that was passed."""
        self.source.close()
        if self.val is not None:
            self.val.close()
        self._give_back()

    def _give_back(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._as_found is not None:
            self._as_found.restore()

    def evaluate(self) -> Found:
        """The task's metric of the bare student on ``data.val``, the same on every rank; empty without it."""
        return self._measured(self.trainer.student)

    def _branches(self) -> list[tuple[nn.Module, float | None]]:
        """The plain networks a student of branches is made of, with their accuracies; empty for a single one."""
        student, asked = self.trainer.student, self.recipe.student
        if not isinstance(student, Branched):
            return []
        found = []
        for number in range(len(student.branches)):
            branch = build_model(asked.model, num_classes=self._num_classes(), seed=0)
            branch.load_state_dict(student.branch_state(number))
            found.append((branch, self._measured(branch.to(self.device)).get(self.task.score)))
        return found

    def _measured(self, student: nn.Module) -> Found:
        if self.val is None:
            return {}
        return evaluate(student, self.normalize, self.val, self.task, self.me, autocast=self.trainer.autocast)

    def _pictures(self) -> list[Section]:
        """What a dense student says of validation images, maps of it and its teachers, and views of the images."""
        said = Html("")
        if self.val is not None and self.task.name != "classify":
            said = predictions_html(self.trainer.student, self.normalize, self.val, self.task, self.data.classes)
        maps = Html("")
        # rows that nobody has recorded yet would be run for the picture alone
        if not isinstance(self.source, Recorded) or self.source.is_complete(0):
            trainee = getattr(self.trainer.trainee, "module", self.trainer.trainee)  # of DistributedDataParallel
            tapped = cast("Tapped", getattr(trainee.tapped, "_orig_mod", trainee.tapped))  # of torch.compile
            rows = self.recipe.train.batch // self.me.world
            before = self._before(tapped)
            maps = maps_html(tapped, before, self.normalize, self.source, self.data, rows)
        stored = isinstance(self.source, Cached) and self.source.stored_images  # then the images may be elsewhere
        sheet = Html("") if stored else contact_sheet(self.data, self.source.plan, self.recipe.cache.views)
        return [
            Section("Validation images", said),
            Section("Maps of teachers and student", maps),
            Section("Views of the training images", sheet),
        ]

    def _before(self, tapped: Tapped) -> Tapped | None:
        """The student as it started: built again, as the recipe says how; of an object its weights were kept."""
        if not any(len(shape) == 3 for shape in tapped.shapes.values()):
            return None
        if self._given is not None and self._start is None:
            return None
        try:
            student = self._student() if self._start is None else deepcopy(self.trainer.student)
            if self._start is not None:
                student.load_state_dict(self._start)
            student = student.to(device=self.device, memory_format=memory_format(self.recipe.train))  # type: ignore[call-overload]
            example = gray_images(self.normalize, self.recipe.data.size, self.device)
            return tap_student(student, student_needs_of(self.entries), example, self.task, self.recipe.student.model)
        except FeedfastError as error:  # its weights' file may be gone by now, and the run has ended well
            log.warning("report: maps before training are not shown: %s", error)
            return None

    def _evaluate_if_due(self, step: int, stop: int, events: EventLog | None) -> Found:
        epoch = math.ceil(step / self.loop.steps_per_epoch)
        every = self.recipe.train.eval_every
        if not (step == stop or (every and epoch % every == 0)):
            return {}
        found = self.evaluate()
        known = {f"val_{name}": value for name, value in found.items() if value is not None}
        if events is not None and known:
            events.scalars(step, {**known, "epoch": epoch})
        return found

    def _finish(
        self,
        step: int,
        found: Found,
        branches: list[tuple[nn.Module, float | None]],
        events: EventLog | None,
    ) -> dict[str, Any]:
        held, timing = self.out / "result.json", self.loop.timing
        earlier: dict[str, Any] = {}
        if held.is_file() and not timing.steps:
            with contextlib.suppress(OSError, ValueError):  # a damaged one is written again
                earlier = read_sealed(held)
        result: dict[str, Any] = {
            f"val_{self.task.score}": found.get(self.task.score),
            "final_loss": events.last("loss") if events is not None else None,
            "steps": step,
            "images_per_second": timing.images_per_second(),
            "data_wait_fraction": timing.wait_fraction(),
            "step_ms": timing.step_ms(),
            "seconds": timing.seconds(),
            "source": self.recipe.train.source,
            "method": names_of(self.entries),
            "model": self.recipe.student.model,
            "parameters": self.parameters,
            "out": str(self.out),
        }
        predicted = predicted_step(self.recipe, self.device) if self.me.world == 1 else None
        result["predicted"] = predicted
        result["prediction_error"] = prediction_error("train", predicted, {"step_ms": result["step_ms"]})
        timed = ("predicted", "prediction_error", "images_per_second", "data_wait_fraction", "step_ms", "seconds")
        result.update({key: earlier[key] for key in timed if key in earlier})
        if len(found) > 1:
            result["val_metrics"] = found
        if isinstance(self.source, Recorded):
            result["views_complete"] = self.source.views_complete()
        if branches:
            result["branch_accuracy"] = [found for _, found in branches]
        if self.me.first:
            _save_network(self.trainer.student, self.out / "student.pt")
            if branches:
                _save_network(max(branches, key=lambda found: found[1] or 0.0)[0], self.out / BRANCH)
            made = processes_of(self.out)
            write_sealed(held, {**result, "provenance": [process.model_dump(mode="json") for process in made]})
            ran = made[-1].machine if made else None
            write_report(
                self.out,
                result,
                toml_text(self.provenance.recipe or {}),
                made,
                asked=asked_of(self.recipe),
                cost=cost_of(self.recipe, step, self.device, [ran.cpu, *ran.gpus] if ran else []),
                pictures=self._pictures(),
            )
        return result
