"""Lightning: a data module that streams a cache, and a callback that adds a method's loss.

    data = CachedDataModule("runs/c100.zarr", val="data/test.bin", batch_size=128)
    trainer = lightning.Trainer(max_epochs=30, callbacks=[DistillationCallback("ofd", student="model")])
    trainer.fit(module, datamodule=data)

``module.training_step`` stays as it is for plain training: it runs the student on ``batch.images`` and returns the
task's loss, to which the callback adds the method's terms with their weights. Checkpoints hold the student as it is
without the callback; the adapters lie in the callback's own state. For one device and for DDP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from feedfast.data.batch import Batch
from feedfast.data.dataset import ImageSource
from feedfast.errors import RequestError
from feedfast.recipe import Recipe, load_recipe
from feedfast.stages.distill import Distiller, MethodLike, distiller
from feedfast.stages.epochs import Epochs, Evaluation
from feedfast.stages.open_cache import NormalizeWith, OpenedCache, Wanted, open_cache
from feedfast.stages.resident import Residency


class CachedDataModule(LightningDataModule):
    """Training batches from a cache, one view per epoch, and validation images.

    Batches are `feedfast.data.batch.Batch`: ``images``, ``labels``, ``targets``. Each rank gets rows of its own, and a
    checkpoint within an epoch continues with the batch that comes next.

    Attributes:
        cache: the open cache; opened by ``setup`` where a path was given.
        taps: teacher → targets to read; None = all of them, or those that a `DistillationCallback` asks for.
    """

    def __init__(
        self,
        cache: OpenedCache | str | Path,
        *,
        val: ImageSource | None = None,
        batch_size: int = 128,
        val_batch_size: int = 256,
        taps: Wanted | None = None,
        normalize: NormalizeWith = True,
        residency: Residency = "disk",
    ) -> None:
        """Keep what is wanted; a path is opened by ``setup``.

        Args:
            cache: an open cache, or its path.
            val: validation images, as `OpenedCache.evaluation` takes them; None = no validation.
            batch_size: rows per batch and rank, as of a DataLoader.
            val_batch_size: likewise of validation.
            taps: teacher → targets wanted.
            normalize: as of `OpenedCache.epochs`.
            residency: as of `OpenedCache.epochs`.
        """
        super().__init__()
        self.cache, self.taps = cache, taps
        self._val, self._normalize, self._residency = val, normalize, residency
        self._batch_size, self._val_batch_size = batch_size, val_batch_size
        self._whole_batch = 0
        if val is not None:
            # Lightning validates where this is defined, and warns of a loader that is empty.
            self.val_dataloader = self._evaluation  # type: ignore[method-assign]

    @classmethod
    def from_recipe(cls, recipe: Recipe | str | Path, **options: Any) -> CachedDataModule:
        """The cache, validation images, normalization and batch of a recipe, as `feedfast train` has them.

        Args:
            recipe: the file, or the object. ``train.batch`` is divided among ranks.
            options: of the constructor, in the place of the recipe's.
        """
        found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        given: dict[str, Any] = {
            "cache": found.cache.path,
            "val": found.data.val or None,
            "normalize": found.data.normalization,
            **options,
        }
        made = cls(**given)
        if "batch_size" not in options:
            made._whole_batch = found.train.batch
        return made

    def setup(self, stage: str) -> None:
        """Open the cache; on every rank."""
        self._opened()

    def train_dataloader(self) -> Epochs:
        """A loader whose every epoch is the cache's next view; on the trainer's device."""
        trainer = self._attached()
        world = trainer.world_size
        if self._whole_batch % world:
            raise RequestError(f"train.batch: expected a multiple of the {world} ranks, found {self._whole_batch}")
        return self._opened().epochs(
            self._whole_batch // world or self._batch_size,
            device=trainer.strategy.root_device,
            taps=self.taps,
            normalize=self._normalize,
            rank=trainer.global_rank,
            world_size=world,
            residency=self._residency,
        )

    def _evaluation(self) -> Evaluation:
        """Validation images without targets, each once over all ranks."""
        assert self._val is not None  # else it is not in the place of `val_dataloader`
        trainer = self._attached()
        return self._opened().evaluation(
            self._val,
            self._val_batch_size,
            device=trainer.strategy.root_device,
            normalize=self._normalize,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def _opened(self) -> OpenedCache:
        if not isinstance(self.cache, OpenedCache):
            self.cache = open_cache(self.cache)
        return self.cache

    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise RequestError("CachedDataModule: expected a trainer, whose device and ranks count; found none")
        return self.trainer


class DistillationCallback(Callback):
    """Adds a method's terms to the loss of ``training_step`` while a trainer fits.

    When fitting starts, the student is given taps, the method's adapters are made and put into the first optimizer's
    first group, and ``training_step`` is wrapped; when it ends, however it ends, all of that is taken back but the
    adapters. Terms are logged as ``distill/NAME``.

    Attributes:
        distiller: what makes the loss, with the adapters; None before the first fit.
    """

    def __init__(
        self,
        method: MethodLike = "kd",
        *,
        student: str = "model",
        cache: OpenedCache | str | Path | None = None,
        teachers: Sequence[str] | None = None,
        task_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Keep what is wanted.

        Args:
            method: as of `feedfast.distiller`.
            student: dotted name of the bare network within the LightningModule.
            cache: where batches come from; None = the trainer's `CachedDataModule` knows.
            teachers: as of `feedfast.distiller`.
            task_weight: of the loss that ``training_step`` returns.
            seed: of the adapters' start.
        """
        super().__init__()
        self.distiller: Distiller | None = None
        self._method, self._student, self._cache = method, student, cache
        self._teachers, self._task_weight, self._seed = teachers, task_weight, seed
        self._held: dict[str, Any] | None = None
        self._steps = math.inf

    @property
    def state_key(self) -> str:
        """Its state in a checkpoint is that of this method and student."""
        return self._generate_state_key(method=repr(self._method), student=self._student)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tap the student, make the adapters, wrap ``training_step``.

        Raises:
            RequestError: there is no such student or no cache, or it optimizes by hand.
        """
        if not pl_module.automatic_optimization:
            raise RequestError(
                f"{type(pl_module).__name__}: expected automatic optimization, found manual; "
                "use feedfast.distiller in training_step instead of DistillationCallback"
            )
        cache = self._cache or getattr(trainer.datamodule, "cache", None)  # type: ignore[attr-defined]
        if cache is None:
            raise RequestError("DistillationCallback.cache: expected a cache or a CachedDataModule, found neither")
        made = distiller(
            cache,
            self._network(pl_module),
            self._method,
            teachers=self._teachers,
            task_weight=self._task_weight,
            seed=self._seed,
        )
        self.distiller = made
        if self._held is not None:
            made.load_state_dict(self._held)
            self._held = None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, CachedDataModule) and data.taps is None:
            data.taps = made.taps
        _join(trainer.optimizers[0], made)
        self._wrap(trainer, pl_module, made)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask how long the run is: some methods' weights depend on that."""
        self._steps = trainer.estimated_stepping_batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Average the adapters' gradients over ranks, as DDP does the module's."""
        if self.distiller is not None:
            self.distiller.average_gradients()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The adapters."""
        return {} if self.distiller is None else {"adapters": self.distiller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the adapters of a checkpoint; they are made when fitting starts, which comes later."""
        self._held = state_dict.get("adapters")

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            found = pl_module.get_submodule(self._student)
        except AttributeError:
            found = pl_module
        if found is pl_module:
            names = [name for name, _ in pl_module.named_children()]
            raise RequestError(
                f"DistillationCallback.student: expected the name of a network in {type(pl_module).__name__} "
                f"({', '.join(names)}), found {self._student!r}"
            )
        return found

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, made: Distiller) -> None:
        plain = pl_module.training_step

        @functools.wraps(plain)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            found = plain(batch, *args, **kwargs)
            if found is None:
                return None  # this batch is skipped
            if not isinstance(batch, Batch):
                raise RequestError(
                    f"training_step: expected batches of a cache, found {type(batch).__name__}; "
                    "fit with a CachedDataModule, or with cache.epochs(...) as the loader"
                )
            own = found["loss"] if isinstance(found, Mapping) else found
            progress = trainer.global_step / self._steps if math.isfinite(self._steps) else None
            losses = made(None, batch, progress=progress, task_loss=own)
            terms = {f"distill/{name}": value for name, value in losses.items() if name != "loss"}
            pl_module.log_dict(terms, batch_size=len(batch))
            return {**found, "loss": losses["loss"]} if isinstance(found, Mapping) else losses["loss"]

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _leave(self, pl_module: LightningModule) -> None:
        if self.distiller is not None:
            self.distiller.remove()
        vars(pl_module).pop("training_step", None)


def _join(optimizer: Optimizer, made: Distiller) -> None:
    """Adapters join the first group: its schedule and weight decay are then theirs, and no scheduler counts more groups
    than it has seen."""
    optimizer.param_groups[0]["params"].extend(made.outside(optimizer))
