"""An epoch of somebody else's trainer, one process per rank: ``trained_by.py TRAINER CACHE VAL OUT``.

Each rank writes ``OUT/RANK.json``: its weights, the rows it was given, and what validation said. Batch norms are frozen
everywhere, so two ranks with half a batch each are one with a whole batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from distilled_ddp import weights
from own_loop import LR, OFD, sgd, student
from torch import nn

import feedfast

ROWS = 32 // int(os.environ.get("WORLD_SIZE", "1"))


def frozen() -> nn.Module:
    """The student of everybody, which no trainer puts into training mode."""
    network = student().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    network.train = lambda mode=True: network  # type: ignore[method-assign]
    return network


def by_lightning(cache: Any, val: str, out: Path) -> dict[str, Any]:
    """`DistillationCallback` and `CachedDataModule` with the strategy ``ddp``."""
    import lightning.pytorch as lightning

    from feedfast.integrations.lightning import CachedDataModule, DistillationCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = frozen()
            self.ids: list[int] = []
            self.seen = torch.zeros((), dtype=torch.int64)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.ids += batch.ids.tolist()
            return nn.functional.cross_entropy(self.model(batch.images), batch.labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self.model(batch.images)
            self.seen += len(logits)
            right = (logits.argmax(1) == batch.labels).float().mean()
            self.log("accuracy", right, batch_size=len(logits), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.model.parameters())

    class Frozen(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            callback.distiller.eval()

    module, callback = Module(), DistillationCallback(OFD)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[callback, Frozen()], default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module, datamodule=CachedDataModule(cache, val=val, batch_size=ROWS))
    seen = trainer.strategy.reduce(module.seen, reduce_op="sum")
    accuracy = trainer.callback_metrics["accuracy"]
    return {
        **weights(module.model, callback.distiller),
        "ids": module.ids,
        "seen": int(seen),
        "accuracy": float(accuracy),
    }


def by_transformers(cache: Any, val: str, out: Path) -> dict[str, Any]:
    """`DistillationTrainer`."""
    from transformers import TrainingArguments

    from feedfast.integrations.huggingface import DistillationTrainer

    arguments = TrainingArguments(
        str(out / "trainer"), num_train_epochs=1, per_device_train_batch_size=ROWS, learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", seed=0, optim="sgd", optim_args="momentum=0.9", eval_strategy="epoch",
    )  # fmt: skip
    shown: list[int] = []

    def accuracy(found: Any) -> dict[str, float]:
        shown.extend(found.label_ids.tolist())
        return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}

    trainer = DistillationTrainer(
        frozen(), arguments, cache=cache, method=OFD, val=val, compute_metrics=accuracy
    )  # fmt: skip
    trainer.distiller.eval()
    ids: list[int] = []
    plain = trainer.compute_loss

    def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids.extend(inputs["batch"].ids.tolist() if inputs["batch"].view >= 0 else ())
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    (said,) = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    return {
        **weights(trainer.model, trainer.distiller),
        "ids": ids,
        "seen": len(shown),
        "labels": shown,
        "accuracy": said,
    }


def main(trainer: str, path: str, val: str, out: Path) -> None:
    torch.set_num_threads(1)
    train = {"lightning": by_lightning, "transformers": by_transformers}[trainer]
    found = train(feedfast.open_cache(path, replay=0), val, out)
    out.joinpath(f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
