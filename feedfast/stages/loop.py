"""The training loop: batches in, optimizer steps, rows of metrics, evaluations and checkpoints out.

Everything that decides a step is a pure function of its number: the view (epoch modulo views), the order of its rows,
each crop, the learning rate, what dropout draws. So resuming seeks to a batch in O(1) and ends with the weights that
an uninterrupted run would have.

Losses stay on the device and are fetched only when a row of metrics.jsonl is due, so the loop does not wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from feedfast.data.batch import Batch
from feedfast.data.passes import pass_order
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError
from feedfast.methods import Targets
from feedfast.recipe import Train
from feedfast.report.events import EventLog
from feedfast.stages.checkpoint import CHECKPOINT, save_checkpoint
from feedfast.stages.interrupt import Hold
from feedfast.stages.progress import Meter
from feedfast.stages.schedule import Schedule
from feedfast.stages.source import Source
from feedfast.stages.timing import Timing
from feedfast.stages.worker import Worker


@dataclass
class Trainer:
    """Networks and optimizer, and one step of them.

    Attributes:
        trainee: images, targets and annotations → losses; wrapped for several ranks.
        student: the bare network that is saved.
        methods: adapters, in the checkpoint and not in the saved student.
        optimizer: of both.
        schedule: learning rate by step.
        device: where all of them are.
        autocast: compute in bfloat16 where torch does so safely.
        seed: of what networks draw while training (dropout).
        rank: ranks draw differently.
    """

    trainee: nn.Module
    student: nn.Module
    methods: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    autocast: bool
    seed: int
    rank: int

    def step(self, index: int, batch: Batch) -> dict[str, Tensor]:
        """Optimizer step number ``index``; the detached losses, still on the device."""
        self.trainee.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(index)
        progress = index / max(self.schedule.total, 1)
        # Dropout draws from torch's generator: seeded by the step, a live, a cached and a resumed run draw the same.
        seed_step(self.device, self.seed, index, self.rank)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses: dict[str, Tensor] = self.trainee(
                batch.images, batch.targets, batch.annotations, progress, batch.ids
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


def seed_step(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank: what a network draws is then a function of the step."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond while CUDA is not in use
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def view_and_pass(epoch: int, views: int) -> tuple[int, int]:
    """Which view an epoch walks, and for how manieth time; ``views`` 0 = a new view every epoch."""
    return (epoch % views, epoch // views) if views else (epoch, 0)


def rank_rows(order: np.ndarray, batch: int, rank: int, world: int) -> np.ndarray:
    """This rank's rows of whole global batches: its slice of each, in order.

    Args:
        order: int64 [n], the rows of a pass.
        batch: rows per global batch, a multiple of ``world``; rows that fill no whole batch are left out.
        rank: which slice.
        world: slices per batch.
    """
    slices = order[: len(order) // batch * batch].reshape(-1, world, batch // world)
    return np.ascontiguousarray(slices[:, rank].reshape(-1))


class Loop:
    """From one step to another, epoch by epoch.

    Attributes:
        steps_per_epoch: whole batches in a view.
        total: steps of the whole run.
        kept: step of the checkpoint in ``out``, None before the first.
        run: the run's name, which its checkpoints carry.
        reached: steps that the networks have taken; None while they are taking one, or have failed in it.
        hold: keeps signals back while a step lasts; with several ranks until all have agreed where to stop.
    """

    def __init__(
        self, trainer: Trainer, source: Source, plan: ViewPlan, count: int, train: Train, worker: Worker, out: Path
    ) -> None:
        """``count``: rows of a view. ``train``: the recipe's section. ``out``: the run's folder."""
        self.trainer, self.source, self.plan, self.count = trainer, source, plan, count
        self.train, self.worker, self.out = train, worker, out
        self.steps_per_epoch, self.total = trainer.schedule.steps_per_epoch, trainer.schedule.total
        self.kept: int | None = None
        self.run = ""
        self.reached: int | None = None
        self.hold = Hold()
        self.timing = Timing(train.batch, queued=trainer.device.type == "cuda")

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's part of each batch from ``step`` to the end of its epoch."""
        epoch, start = divmod(step, self.steps_per_epoch)
        view, pass_index = view_and_pass(epoch, self.source.views)
        order = pass_order(self.count, self.plan.seed, view, pass_index, self.plan.granule, self.plan.window)
        rows = rank_rows(order, self.train.batch, self.worker.rank, self.worker.world)
        return self.source.batches(view, rows, self.train.batch // self.worker.world, start)

    def targets(self, epoch: int) -> Iterator[Targets]:
        """The targets of an epoch's batches, of all ranks, without images where the source can."""
        view, _ = view_and_pass(epoch, self.source.views)
        rows = np.arange(self.steps_per_epoch * self.train.batch)
        return self.source.target_batches(view, rows, self.train.batch)

    def epoch(self, step: int, stop: int, events: EventLog | None, meter: Meter) -> int:
        """Train to the end of the epoch that ``step`` is in, or to ``stop``; the step reached."""
        train, timing = self.train, self.timing
        end = min(stop, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        remark = ""
        self.reached, batches = step, self.batches(step)
        try:
            while step < end:
                timing.begin()
                batch = self._next(batches, step)
                timing.waited()
                if batch is None:
                    raise FeedfastError(
                        f"train: the data loader stopped at step {step}; expected batches up to step {end}"
                    )
                self.reached = None
                losses = self.trainer.step(step, batch)
                step += 1
                self.reached = step
                if step % train.log_every == 0 or step == stop:
                    values = self._values(losses)
                    self._require_finite(values["loss"], step)
                    timing.end()
                    if events is not None:
                        events.scalars(step, {**values, "lr": self.trainer.schedule.lr(step - 1), **timing.row()})
                    remark = f"loss {values['loss']:.3f}"
                else:
                    timing.end()
                meter.advance(train.batch, remark)
                if train.checkpoint_minutes and timing.minutes_since_checkpoint() > train.checkpoint_minutes:
                    self.checkpoint(step)
        finally:
            # Closed here and under the hold: an interrupt in a generator that is thrown away would be lost.
            self.hold.busy = True
            if isinstance(batches, Generator):
                batches.close()
        self._end_if_asked(step)
        return step

    def _values(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Losses of the global batch: the mean over ranks, whose slices are equally long; the same on every rank."""
        if self.worker.world == 1:
            return {name: float(value) for name, value in losses.items()}
        # in float64, so that adding them up rounds nothing a float32 loss would show
        total = torch.stack([value.double() for value in losses.values()])
        dist.all_reduce(total)
        return dict(zip(losses, (total / self.worker.world).tolist(), strict=True))

    def _next(self, batches: Iterator[Batch], step: int) -> Batch | None:
        """The next batch; while it is waited for, which may be for ever, a signal is not kept back."""
        self._end_if_asked(step)
        batch = next(batches, None)
        self.hold.busy = True
        return batch

    def _end_if_asked(self, step: int) -> None:
        """A sound moment: a signal that waits is delivered, with several ranks where all have agreed to end."""
        self.hold.busy = self.worker.world > 1
        if self.hold.number is not None and step >= self.worker.agreed_end(step):
            self.hold.deliver()

    def checkpoint(self, step: int) -> None:
        """Write ``checkpoint.pt``; the first rank's suffices, all have the same.

        Raises:
            FeedfastError: as `write_state`; the last good checkpoint stays.
        """
        if self.worker.first:
            trainer = self.trainer
            save_checkpoint(self.out, trainer.student, trainer.methods, trainer.optimizer, step, self.run)
        self.kept = step
        self.timing.checkpointed()

    def rescue(self) -> None:
        """Before a job ends halfway: a checkpoint of the steps taken since the last, if the networks are sound."""
        if self.reached and self.reached != self.kept:
            self.checkpoint(self.reached)

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            held = self.out / CHECKPOINT
            kept = f"{held} holds step {self.kept}" if self.kept is not None else f"there is no {held} yet"
            raise FeedfastError(
                f"train: expected a finite loss, found {loss} at step {step}; lower train.lr or the method's weight "
                f"({kept})"
            )
