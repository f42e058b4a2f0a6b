"""Hugging Face: a `Trainer` whose batches come from a cache and whose loss is a method's.

    arguments = TrainingArguments("runs/hf", num_train_epochs=30, per_device_train_batch_size=128)
    trainer = DistillationTrainer(model, arguments, cache="runs/c100.zarr", method="ofd", val="data/test.bin")
    trainer.train()

The model is any network that takes images as its first argument, and need not be one of transformers. Checkpoints hold
the student as without this class; the adapters lie in a file of their own beside it. Gradients of the adapters are
averaged over ranks and are not clipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from feedfast.data.dataset import ImageSource
from feedfast.errors import RequestError
from feedfast.models.taps import logits_of
from feedfast.stages.distill import MethodLike, distiller
from feedfast.stages.epochs import Epochs, Evaluation
from feedfast.stages.open_cache import NormalizeWith, OpenedCache, open_cache

ADAPTERS = "feedfast_adapters.pt"


class _Inputs(IterableDataset[dict[str, Any]]):
    """Batches as a Trainer passes them around; whole ones, made on the right device."""

    def __init__(self, batches: Epochs | Evaluation) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield {"pixel_values": batch.images, "labels": batch.annotations, "batch": batch}


class _Shown(DataLoader[dict[str, Any]], DataLoaderStateMixin):  # type: ignore[misc]
    """Validation images; Accelerate asks it how many of what ranks found at the last step are no repetition."""

    def __init__(self, images: Evaluation, whole_batch: int) -> None:
        super().__init__(_Inputs(images), batch_size=None, collate_fn=_same)
        self.gradient_state = GradientState()
        self._last = len(images.data) % whole_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.begin()
        self.remainder = self._last
        steps = len(self)
        try:
            for step, inputs in enumerate(super().__iter__(), 1):
                self.end_of_dataloader = step == steps
                yield inputs
        finally:
            self.end()


def _same(value: Any) -> Any:
    return value


class _Following(TrainerCallback):  # type: ignore[misc]
    """What a Trainer does to its model and must be done to the stream and the adapters, too."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also of a resumed run; within an epoch the Trainer itself skips batches."""
        self.trainer.epochs.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A Trainer zeroes the gradients of its model alone."""
        self.trainer.distiller.zero_grad()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside the model."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            torch.save(self.trainer.distiller.state_dict(), folder / ADAPTERS)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on a cache.

    Attributes:
        cache: the open cache.
        distiller: what makes the loss, with the method's adapters.
        epochs: the stream of training batches, one view per epoch; made by `get_train_dataloader`.
    """

    epochs: Epochs

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        cache: OpenedCache | str | Path,
        method: MethodLike = "kd",
        val: ImageSource | None = None,
        normalize: NormalizeWith = True,
        task_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Everything else is the Trainer's; ``args.seed`` is the adapters', too.

        Args:
            model: the bare student.
            args: as of a Trainer.
            cache: an open cache, or its path.
            method: as of `feedfast.distiller`.
            val: validation images, as `OpenedCache.evaluation` takes them, in the place of ``eval_dataset``.
            normalize: as of `OpenedCache.epochs`.
            task_weight: as of `feedfast.distiller`.
            kwargs: of a Trainer.

        Raises:
            RequestError: a data set or ``model_init`` is given, one process has several GPUs, or as
                `feedfast.distiller`.
        """
        for name in ("train_dataset", "eval_dataset", "data_collator", "model_init", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise RequestError(f"{name}: expected none, batches and loss come from the cache (cache, val, method)")
        self.cache = cache if isinstance(cache, OpenedCache) else open_cache(cache)
        self._val, self._normalize = val, normalize
        super().__init__(model, args, eval_dataset=None if val is None else [], **kwargs)
        if self.args.n_gpu > 1:
            raise RequestError(
                f"args: expected one GPU per process, found {self.args.n_gpu}, for which a Trainer copies the "
                f"model, and the copies' maps mix; start it with torchrun --nproc-per-node={self.args.n_gpu}, or with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        # The loss is a mean over the batch; a Trainer divides it by the steps it accumulates then.
        self.model_accepts_loss_kwargs = False
        self.label_names = ["labels"]
        self.distiller = distiller(self.cache, self.model, method, task_weight=task_weight, seed=self.args.seed)
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self.add_callback(_Following(self))

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The cache's views, an epoch each; this rank's rows."""
        self.epochs = self.cache.epochs(
            self.args.train_batch_size,
            device=self.args.device,
            taps=self.distiller.taps,
            normalize=self._normalize,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return DataLoader(_Inputs(self.epochs), batch_size=None, collate_fn=_same)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Any]]:
        """The validation images."""
        if self._val is None:
            raise RequestError("val: expected validation images, found none; DistillationTrainer(..., val=...)")
        images = self.cache.evaluation(
            self._val,
            self.args.eval_batch_size,
            device=self.args.device,
            normalize=self._normalize,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            even=True,
        )
        return _Shown(images, self.args.eval_batch_size * self.args.world_size)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Images of one pass."""
        batches = getattr(dataloader.dataset, "batches", None)
        return len(batches.data) if isinstance(batches, Evaluation) else len(self.cache)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, with a further group for the adapters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        new = self.distiller.outside(optimizer)
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer  # type: ignore[no-any-return]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss; of validation images, which have no targets, the task's."""
        batch = inputs["batch"]
        outputs = model(batch.images)
        logits = logits_of(outputs)
        if batch.view < 0:
            loss = self.distiller.task.loss(logits, batch.annotations)
        else:
            progress = self.state.global_step / max(self.state.max_steps, 1)
            losses = self.distiller(outputs, batch, progress=progress)
            loss = losses.pop("loss")
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._summed += 1
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A Trainer's, then the adapters' gradients are averaged over ranks as DDP does the model's."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.distiller.average_gradients()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the means of the task's loss and of each term since the last time."""
        if "loss" in logs and self._summed:
            logs = {**logs, **{name: float(value) / self._summed for name, value in self._sums.items()}}
            self._sums, self._summed = {}, 0
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        held = os.path.join(resume_from_checkpoint, ADAPTERS)
        if not os.path.isfile(held):
            raise RequestError(f"resume_from_checkpoint: expected {held}, found none; the adapters would start anew")
        self.distiller.load_state_dict(torch.load(held, map_location=self.args.device, weights_only=True))
