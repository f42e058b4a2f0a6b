"""Lightning with the data module and the callback: the losses of a plain loop, checkpoints, and a module left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_loop import BATCH, OFD, own_loop, same_weights, sgd, student
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.recipe import Recipe
from feedfast.stages.open_cache import OpenedCache

lightning = pytest.importorskip("lightning.pytorch")
integration = pytest.importorskip("feedfast.integrations.lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning's use of torch's trees
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),  # threads read ahead here
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Student(lightning.LightningModule):  # type: ignore[name-defined, misc]
    """Written for plain training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = student()
        self.shown, self.views = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.views.append(batch.view)
        return nn.functional.cross_entropy(self.model(batch.images), batch.labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.shown += len(self.model(batch.images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.model.parameters())


class Losses(lightning.Callback):  # type: ignore[name-defined, misc]
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.logged: set[str] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.seen += [outputs["loss"].item()] if outputs else []
        self.logged |= set(trainer.callback_metrics)


def fit(module: Any, data: Any, *callbacks: Any, resume: Path | None = None, **options: Any) -> list[float]:
    losses = Losses()
    given = {"max_epochs": 2, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[*callbacks, losses], **given,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    module.logged = losses.logged
    return losses.seen


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_trainer_has_the_losses_of_a_plain_loop(cache: OpenedCache, recipe: Recipe) -> None:
    network = student()
    expected = own_loop(cache, network, OFD, epochs=2)
    module = Student()
    data = integration.CachedDataModule(cache, val=recipe.data.val[0], batch_size=BATCH, val_batch_size=100)
    callback = integration.DistillationCallback(OFD, seed=42)
    found = fit(module, data, callback)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert same_weights(module.model, network)
    assert module.views == [0] * 6 + [1] * 6
    assert module.shown == 2 * len(np.load(recipe.data.val[0])["labels"])
    assert {"distill/ce", "distill/feature"} <= module.logged
    assert data.taps == {"a": ("ofd1", "ofd2", "ofd3"), "b": ("ofd1", "ofd2", "ofd3")}, "nothing else was read"
    assert hooks(module) == 0
    assert "training_step" not in vars(module)
    assert [name for name, _ in module.named_children()] == ["model"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stop", [6, 8])  # an epoch's end, and within the second epoch
def test_a_checkpoint_holds_the_bare_student_and_continues(cache: OpenedCache, tmp_path: Path, stop: int) -> None:
    def parts() -> tuple[Any, Any]:
        return (
            integration.CachedDataModule(cache, batch_size=BATCH),
            integration.DistillationCallback([{"name": "kd"}, OFD], seed=1),
        )

    saving = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    whole = Student()
    expected = fit(whole, *parts(), saving, enable_checkpointing=True)
    file = tmp_path / f"step={stop}.ckpt"
    assert set(torch.load(file, weights_only=True)["state_dict"]) == set(Student().state_dict())
    again = Student()
    assert fit(again, *parts(), saving, resume=file, enable_checkpointing=True) == expected[stop:]
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_recipe_says_all_that_a_data_module_needs(cache: OpenedCache, recipe: Recipe) -> None:
    data = integration.CachedDataModule.from_recipe(recipe)
    module = Student()
    assert len(fit(module, data, integration.DistillationCallback("kd"), max_epochs=1)) == 200 // recipe.train.batch
    assert module.shown == len(np.load(recipe.data.val[0])["labels"])


class Broken(Student):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise KeyError("mine")
        return {"loss": loss} if batch_idx else None  # type: ignore[return-value]


def test_a_fit_that_fails_leaves_nothing_behind(cache: OpenedCache) -> None:
    module = Broken()
    with pytest.raises(KeyError, match="mine"):
        fit(module, integration.CachedDataModule(cache, batch_size=BATCH), integration.DistillationCallback("kd"))
    assert hooks(module) == 0
    assert "training_step" not in vars(module)


class ByHand(Student):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Student, {"student": "net"}, r"^DistillationCallback.student: expected the name .* \(model\), found 'net'"),
        (Student, {"student": ""}, r"^DistillationCallback.student: expected the name"),
        (ByHand, {}, r"^ByHand: expected automatic optimization"),
    ],
)
def test_what_cannot_be_distilled_is_said(cache: OpenedCache, kind: Any, options: Any, words: str) -> None:
    data = integration.CachedDataModule(cache, batch_size=BATCH)
    with pytest.raises(RequestError, match=words):
        fit(kind(), data, integration.DistillationCallback("kd", **options))
    with pytest.raises(RequestError, match=r"^CachedDataModule: expected a trainer"):
        integration.CachedDataModule(cache).train_dataloader()
