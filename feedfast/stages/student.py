"""The student stage: a recipe becomes a trained student (and, with ``source = "none"``, a trained teacher).

Everything that decides a run is a pure function of the step: the view (epoch modulo views), the order of its rows,
each crop, the learning rate. A checkpoint therefore holds weights, optimizer state and one number; resuming seeks
to that batch in O(1) and ends with the weights an uninterrupted run would have.

Order of one step: pixels from DALI and targets from the source arrive already read ahead; student forward; method;
backward; optimizer. Losses are kept on the device and fetched only when a row of metrics.jsonl is due, so the loop
does not wait for the GPU.

Under torchrun every rank takes its slice of each global batch and gradients are averaged, so the mean over the
global batch is what is minimized; batch statistics stay local, as in plain DDP. The saved student carries no
adapters.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader, PixelBatch
from feedfast.data.views import pass_order
from feedfast.errors import FeedfastError, RequestError
from feedfast.methods import StudentOutput, TapInfo, build_method, taps_needed
from feedfast.models.build import build_model
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped
from feedfast.recipe import Recipe, Train
from feedfast.report.run import EventLog, write_report
from feedfast.stages.checkpoint import load_checkpoint, save_checkpoint
from feedfast.stages.common import write_durably, write_json
from feedfast.stages.data import open_train, open_val, view_plan
from feedfast.stages.ensemble import LOGITS, Normalize, class_logits
from feedfast.stages.folder import CHECKPOINT, check_run_dir, start_run_dir
from feedfast.stages.progress import Meter
from feedfast.stages.sources import open_source
from feedfast.stages.targets import Targets, TargetSource
from feedfast.stages.worker import Worker, pick_device

log = logging.getLogger(__name__)


class Trainee(nn.Module):
    """Student, adapters and loss as one module: what is wrapped by DDP and stepped by the optimizer."""

    def __init__(self, normalize: Normalize, tapped: nn.Module, method: nn.Module) -> None:
        super().__init__()
        self.normalize, self.tapped, self.method = normalize, tapped, method

    def forward(self, images: Tensor, targets: Targets, labels: Tensor) -> dict[str, Tensor]:
        """uint8 pixels [batch, height, width, 3] → the method's losses."""
        logits, taps = self.tapped(self.normalize(images))
        losses: dict[str, Tensor] = self.method(StudentOutput(logits, taps), targets, labels)
        return losses


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a pure function of the step; ``total`` steps in ``epochs`` epochs."""

    train: Train
    total: int

    def lr(self, step: int) -> float:
        """The rate of ``step`` (0-based).

        Warm-up is linear from lr/warm-up steps; cosine ends at 0; one-cycle climbs for 30 % from lr/25 and ends at
        lr/25e4 (torch's OneCycleLR defaults, with ``lr`` as its peak); step multiplies by ``gamma`` at each milestone.
        """
        train = self.train
        warm = round(train.warmup_epochs * self.total / train.epochs)
        if step < warm:
            return train.lr * (step + 1) / warm
        done = (step - warm) / max(self.total - warm, 1)
        if train.schedule == "cosine":
            return _anneal(train.lr, 0.0, done)
        if train.schedule == "step":
            passed = sum(step >= round(milestone * self.total) for milestone in train.milestones)
            return train.lr * train.gamma**passed
        if train.schedule == "one-cycle":
            low, last, rise = train.lr / 25, train.lr / 25e4, 0.3
            if done < rise:
                return _anneal(low, train.lr, done / rise)
            return _anneal(train.lr, last, (done - rise) / (1 - rise))
        return train.lr


def _anneal(start: float, end: float, done: float) -> float:
    """Half a cosine from ``start`` (done = 0) to ``end`` (done = 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def seed_step(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank: what a network draws is then a function of the step."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond while CUDA is not in use
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def run_train(recipe: Recipe) -> dict[str, Any]:
    """Train (or resume) the recipe's student.

    Returns:
        The JSON of `feedfast train`: ``val_accuracy``, ``final_loss``, ``steps``, ``images_per_second``,
        ``data_wait_fraction``, ``step_ms`` (median; on a GPU mean), ``seconds``, ``source``, ``method``,
        ``model``, ``parameters`` (of the bare student), ``out``.

    Raises:
        RequestError: the recipe cannot be run, or ``train.out`` holds another run.
        CacheMismatchError, CacheDamageError: the cache is not the recipe's, or is incomplete or damaged.
        FeedfastError: the loss is no longer finite.
    """
    me = Worker.from_env()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    with me.process_group(pick_device(recipe.train.device, me.local)):
        return StudentRun(recipe, me).run()


class StudentRun:
    """One run of the student stage; built first, so that every mistake shows before the first step."""

    def __init__(self, recipe: Recipe, me: Worker) -> None:
        self.recipe, self.me = recipe, me
        train = recipe.train
        self.device = pick_device(train.device, me.local)
        self.out = Path(train.out)
        if train.batch % me.world:
            raise RequestError(f"train.batch: expected a multiple of the {me.world} ranks, found {train.batch}")
        self.resumed = check_run_dir(self.out, recipe)
        self.data = open_train(recipe.data)
        if len(self.data) < train.batch:
            raise RequestError(
                f"train.batch: expected at most the {len(self.data)} training samples, found {train.batch}"
            )
        self.plan = view_plan(recipe.data, recipe.seed)
        threads = recipe.data.threads or None
        self.loader = Loader(
            self.data, self.plan, batch_size=train.batch // me.world, device=str(self.device), threads=threads
        )
        self.val: Dataset | None = open_val(recipe.data, self.data)
        opened = open_source(recipe, self.data, self.plan, self.device)
        self.views = opened.views
        self.num_classes = len(self.data.classes) or opened.num_classes
        if not self.num_classes:
            raise RequestError(
                f"data.train: expected labelled images (class sub-folders), found none in {self.data.source}"
            )
        self._build_student(opened.taps)
        self.source: TargetSource = opened.select(self.method.teacher_taps)
        self.steps_per_epoch = len(self.data) // train.batch
        self.total = self.steps_per_epoch * train.epochs
        self.schedule = Schedule(train, self.total)
        self.kept: int | None = None  # step of the checkpoint in `out`

    def _build_student(self, teachers: Mapping[str, Mapping[str, TapInfo]]) -> None:
        recipe, train, size = self.recipe, self.recipe.train, self.recipe.data.size
        bare = build_model(
            recipe.student.model, num_classes=self.num_classes, weights=recipe.student.weights, seed=recipe.seed
        )
        memory = torch.channels_last if train.channels_last else torch.contiguous_format
        bare = bare.to(device=self.device, memory_format=memory)  # type: ignore[call-overload]
        normalize = Normalize(*recipe.data.normalization).to(self.device)
        example = normalize(torch.full((2, size, size, 3), 128, dtype=torch.uint8, device=self.device))
        taps = tuple(tap for group in taps_needed(recipe.method.name) for tap in preset_taps(bare, group, example))
        tapped = Tapped(bare, taps, example)
        class_logits(tapped, f"student {recipe.student.model}", self.num_classes)
        # Adapters start from the recipe's seed and nothing else, so that live and cached runs start equal.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            method = build_method(
                recipe.method.name, recipe.method.parameters, student_taps=tapped.shapes, teachers=teachers
            )
        for name, infos in teachers.items():
            if LOGITS in method.teacher_taps and infos[LOGITS].shape != (self.num_classes,):
                raise RequestError(
                    f"method.name: {recipe.method.name!r} compares classes one by one, "
                    f"expected {self.num_classes} in every teacher, found {infos[LOGITS].shape[0]} in {name!r}"
                )
        method = method.to(device=self.device, memory_format=memory)  # type: ignore[call-overload]
        self.bare, self.method = bare, method
        self.parameters = sum(parameter.numel() for parameter in bare.parameters())
        stepped: nn.Module = torch.compile(tapped) if train.compile else tapped  # type: ignore[assignment]
        self.trainee: nn.Module = Trainee(normalize, stepped, method)
        if self.me.world > 1:
            self.trainee = nn.parallel.DistributedDataParallel(
                self.trainee, device_ids=None if self.device.type == "cpu" else [self.device.index]
            )
        weights = [parameter for parameter in self.trainee.parameters() if parameter.requires_grad]
        if train.optimizer == "sgd":
            nesterov = train.nesterov and train.momentum > 0
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                weights, train.lr, train.momentum, weight_decay=train.weight_decay, nesterov=nesterov
            )
        else:
            self.optimizer = torch.optim.AdamW(weights, train.lr, weight_decay=train.weight_decay)

    def batches(self, step: int) -> Iterator[tuple[PixelBatch, Any]]:
        """Pixels and read-ahead targets from ``step`` to the end of its epoch, this rank's part of each batch."""
        epoch, start = divmod(step, self.steps_per_epoch)
        view, pass_index = (epoch % self.views, epoch // self.views) if self.views else (epoch, 0)
        local = self.recipe.train.batch // self.me.world
        order = pass_order(len(self.data), self.recipe.seed, view, pass_index)
        slices = order[: self.steps_per_epoch * self.recipe.train.batch].reshape(-1, self.me.world, local)
        rows = np.ascontiguousarray(slices[:, self.me.rank].reshape(-1))
        pixels = self.loader.stream(view, rows, start_batch=start)
        return zip(pixels, self.source.stream(view, rows, local, start), strict=False)

    def run(self) -> dict[str, Any]:
        """See `run_train`."""
        train = self.recipe.train
        step = 0
        if self.me.first and not self.resumed:
            start_run_dir(self.out, self.recipe)
        if self.resumed:
            step = self.kept = load_checkpoint(self.out, self.bare, self.method, self.optimizer)
        stop = min(self.total, train.max_steps) if train.max_steps else self.total
        resumed = f", resumed at step {step}" if step else ""
        log.info(
            "train: %s (%s parameters), %s from %s, %s images, %s steps of %d, %s on %s%s",
            self.recipe.student.model,
            f"{self.parameters:,}",
            self.recipe.method.name,
            train.source,
            f"{len(self.data):,}",
            f"{self.total:,}",
            train.batch,
            train.precision,
            self.device,
            resumed,
        )
        timing = Timing(train.batch, queued=self.device.type == "cuda")
        events = EventLog(self.out, step) if self.me.first else None
        try:
            with Meter("train", (stop - step) * train.batch) as meter:
                accuracy = None
                while step < stop:
                    step = self._epoch(step, stop, events, timing, meter)
                    accuracy = self._evaluate_if_due(step, stop, events)
                    self._checkpoint(step, timing)
                if accuracy is None and self.val is not None:
                    accuracy = self.evaluate()
        finally:
            self.loader.close()
            if events is not None:
                events.close()
        return self._finish(step, accuracy, events, timing)

    def _epoch(self, step: int, stop: int, events: EventLog | None, timing: Timing, meter: Meter) -> int:
        """Train to the end of the epoch that ``step`` is in, or to ``stop``; returns the step reached."""
        train = self.recipe.train
        stream = self.batches(step)
        end = min(stop, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        remark = ""
        while step < end:
            timing.begin()
            pair = next(stream, None)
            if pair is None:
                raise FeedfastError(f"train: the data of step {step} never came; expected batches up to step {end}")
            batch, item = pair
            timing.waited()
            losses = self.step(step, batch, item)
            step += 1
            if step % train.log_every == 0 or step == stop:
                values = {name: float(value) for name, value in losses.items()}
                self._check_finite(values["loss"], step)
                timing.end()
                if events is not None:
                    events.scalars(step, {**values, "lr": self.schedule.lr(step - 1), **timing.row()})
                remark = f"loss {values['loss']:.3f}"
            else:
                timing.end()
            meter.advance(train.batch, remark)
            if train.checkpoint_minutes and timing.minutes_since_checkpoint() > train.checkpoint_minutes:
                self._checkpoint(step, timing)
        return step

    def _evaluate_if_due(self, step: int, stop: int, events: EventLog | None) -> float | None:
        epoch = math.ceil(step / self.steps_per_epoch)
        every = self.recipe.train.eval_every
        if self.val is None or not (step == stop or (every and epoch % every == 0)):
            return None
        accuracy = self.evaluate()
        if events is not None and accuracy is not None:
            events.scalars(step, {"val_accuracy": accuracy, "epoch": epoch})
        return accuracy

    def step(self, index: int, batch: PixelBatch, item: Any) -> dict[str, Tensor]:
        """One optimizer step; returns the detached losses, still on the device."""
        self.trainee.train()
        targets = self.source.targets(item, batch.images)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(index)
        # Dropout draws from torch's generator: seeded by the step, a live, a cached and a resumed run draw the same.
        seed_step(self.device, self.recipe.seed, index, self.me.rank)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            losses: dict[str, Tensor] = self.trainee(batch.images, targets, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Top-1 accuracy of the bare student on ``data.val`` (on the first rank; ``None`` on the others)."""
        if not self.me.first or self.val is None:
            return None
        self.bare.eval()
        normalize = Normalize(*self.recipe.data.normalization).to(self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        total = 0
        loader = Loader(
            self.val, self.plan, batch_size=256, device=str(self.device), threads=self.recipe.data.threads or None
        )
        for batch in loader.evaluation():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
                logits = self.bare(normalize(batch.images))
            labelled = batch.labels >= 0
            right += ((logits.argmax(1) == batch.labels) & labelled).sum()
            total += int(labelled.sum())
        loader.close()
        return int(right) / total if total else None

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            held = self.out / CHECKPOINT
            kept = f"{held} holds step {self.kept}" if self.kept is not None else f"there is no {held} yet"
            raise FeedfastError(
                f"train: expected a finite loss, found {loss} at step {step}; lower train.lr or the method's weight "
                f"({kept})"
            )

    def _checkpoint(self, step: int, timing: Timing) -> None:
        if self.me.first:
            save_checkpoint(self.out, self.bare, self.method, self.optimizer, step)
        self.kept = step
        timing.checkpointed()

    def _finish(self, step: int, accuracy: float | None, events: EventLog | None, timing: Timing) -> dict[str, Any]:
        held = self.out / "result.json"
        earlier: dict[str, Any] = {}
        if held.is_file() and not timing.steps:
            with contextlib.suppress(OSError, ValueError):  # a damaged one is written again
                earlier = json.loads(held.read_bytes())
        result: dict[str, Any] = {
            "val_accuracy": accuracy,
            "final_loss": events.last("loss") if events is not None else None,
            "steps": step,
            "images_per_second": timing.images_per_second(),
            "data_wait_fraction": timing.wait_fraction(),
            "step_ms": timing.step_ms(),
            "seconds": timing.seconds(),
            "source": self.recipe.train.source,
            "method": self.recipe.method.name,
            "model": self.recipe.student.model,
            "parameters": self.parameters,
            "out": str(self.out),
        }
        timed = ("images_per_second", "data_wait_fraction", "step_ms", "seconds")
        result.update({key: earlier[key] for key in timed if key in earlier})
        if self.me.first:
            buffer = io.BytesIO()
            torch.save({name: value.cpu() for name, value in self.bare.state_dict().items()}, buffer)
            write_durably(self.out / "student.pt", buffer.getvalue())
            write_json(held, result)
            write_report(self.out, result, self.recipe.model_dump(mode="json"))
        if self.me.world > 1:
            torch.distributed.barrier()
        return result


class Timing:
    """Step and waiting times of this process, in milliseconds, without evaluation and checkpoints."""

    def __init__(self, batch: int, *, queued: bool = False) -> None:
        self.batch, self.queued = batch, queued
        self.steps: list[float] = []
        self.waits: list[float] = []
        self._checkpoint = time.perf_counter()

    def begin(self) -> None:
        """A step starts: its data are asked for."""
        self._begin = time.perf_counter()

    def waited(self) -> None:
        """The data have come."""
        self._waited = time.perf_counter()

    def end(self) -> None:
        """The step is queued (on the CPU: done)."""
        self.steps.append((time.perf_counter() - self._begin) * 1e3)
        self.waits.append((self._waited - self._begin) * 1e3)

    def checkpointed(self) -> None:
        """Restart the checkpoint clock."""
        self._checkpoint = time.perf_counter()

    def minutes_since_checkpoint(self) -> float:
        """Minutes since the last checkpoint."""
        return (time.perf_counter() - self._checkpoint) / 60

    def row(self) -> dict[str, float]:
        """The last twenty steps, for metrics.jsonl."""
        steps, waits = self.steps[-20:], self.waits[-20:]
        return {
            "images_per_second": self.batch * len(steps) / max(sum(steps) / 1e3, 1e-9),
            "data_wait_fraction": sum(waits) / max(sum(steps), 1e-9),
        }

    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(self.steps) / 1e3

    def images_per_second(self) -> float | None:
        """Images a second over the whole run, the first step (warm-up) left out when there are more."""
        steps = self.steps[1:] or self.steps
        return self.batch * len(steps) / max(sum(steps) / 1e3, 1e-9) if steps else None

    def wait_fraction(self) -> float | None:
        """Share of the time spent waiting for pixels or targets."""
        steps, waits = self.steps[1:] or self.steps, self.waits[1:] or self.waits
        return sum(waits) / max(sum(steps), 1e-9) if steps else None

    def step_ms(self) -> float | None:
        """Median step; on a GPU the mean, because there a step only queues its work until a later one waits for it."""
        steps = self.steps[1:] or self.steps
        if not steps:
            return None
        return float(np.mean(steps) if self.queued else np.median(steps))
