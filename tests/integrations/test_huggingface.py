"""Hugging Face's Trainer on a cache: the losses of a plain loop, evaluation, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_loop import BATCH, LR, OFD, own_loop, same_weights, sgd, student

from feedfast.errors import RequestError
from feedfast.recipe import Recipe
from feedfast.stages.open_cache import OpenedCache

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("feedfast.integrations.huggingface")


def arguments(folder: Path, **options: Any) -> Any:
    given = {
        "num_train_epochs": 2, "per_device_train_batch_size": BATCH, "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "no", "seed": 42, "optim": "sgd", "optim_args": "momentum=0.9", **options,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **given)


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean()), "images": len(found.label_ids)}


def test_a_trainer_has_the_losses_of_a_plain_loop(cache: OpenedCache, recipe: Recipe, tmp_path: Path) -> None:
    network, own = student(), student()
    expected = own_loop(cache, own, OFD, epochs=2)
    trainer = integration.DistillationTrainer(
        network, arguments(tmp_path, eval_strategy="epoch"), cache=cache, method=OFD, val=recipe.data.val[0],
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-4)  # a Trainer rounds what it logs
    assert same_weights(network, own)
    assert len(logged(trainer, "ce")) == len(logged(trainer, "feature")) == 12
    val = np.load(recipe.data.val[0])
    assert logged(trainer, "eval_images") == [len(val["labels"])] * 2
    own.eval()
    right = sum(
        int((own(batch.images).argmax(1) == batch.labels).sum()) for batch in cache.evaluation(recipe.data.val[0])
    )
    assert logged(trainer, "eval_accuracy")[-1] == pytest.approx(right / len(val["labels"]))
    with torch.no_grad():
        loss = sum(
            float(torch.nn.functional.cross_entropy(own(batch.images), batch.labels, reduction="sum"))
            for batch in cache.evaluation(recipe.data.val[0])
        )
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(loss / len(val["labels"]), rel=1e-3)


@pytest.mark.slow
def test_gradients_of_adapters_are_zeroed_and_accumulated_as_the_students(cache: OpenedCache, tmp_path: Path) -> None:
    """Two batches of 16 are one of 32, but for the statistics of batch norms: a network without any."""

    def network() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(),
            torch.nn.Linear(128, 10),
        )  # fmt: skip

    runs = []
    for batch, accumulated in ((32, 1), (16, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 4}
        trainer = integration.DistillationTrainer(network(), arguments(tmp_path, **options), cache=cache, method="kd")
        trainer.train()
        runs.append(logged(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 8])  # an epoch's end, and within the second epoch
def test_a_run_continues_from_its_checkpoint(cache: OpenedCache, tmp_path: Path, stop: int) -> None:
    def made(**options: Any) -> Any:
        given = arguments(tmp_path, save_strategy="steps", save_steps=stop, **options)
        return integration.DistillationTrainer(student(), given, cache=cache, method=OFD)

    whole = made()
    whole.train()
    folder = tmp_path / f"checkpoint-{stop}"
    again = made()
    again.train(resume_from_checkpoint=str(folder))
    assert logged(again)[-(12 - stop) :] == logged(whole)[stop:]
    assert same_weights(again.model, whole.model)
    assert same_weights(again.distiller, whole.distiller)
    (folder / integration.ADAPTERS).unlink()
    with pytest.raises(RequestError, match=r"^resume_from_checkpoint: expected .*feedfast_adapters.pt, found none"):
        made().train(resume_from_checkpoint=str(folder))


def test_a_model_of_transformers_learns(cache: OpenedCache, tmp_path: Path) -> None:
    """Its output is an object with logits; its maps are tokens."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    options = {"max_steps": 40, "learning_rate": 2e-3, "optim": "adamw_torch", "optim_args": None}
    trainer = integration.DistillationTrainer(
        model, arguments(tmp_path, **options), cache=cache, method=[{"name": "kd"}, {"name": "pfeed"}]
    )
    trainer.train()
    losses = logged(trainer, "kd.kd")
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])


def test_batches_come_from_the_cache_alone(cache: OpenedCache, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^train_dataset: expected none, batches and loss come from the cache"):
        integration.DistillationTrainer(student(), arguments(tmp_path), cache=cache, train_dataset=[1])
    trainer = integration.DistillationTrainer(student(), arguments(tmp_path), cache=cache)
    with pytest.raises(RequestError, match=r"^val: expected validation images, found none"):
        trainer.evaluate()
    several = arguments(tmp_path)
    assert several.n_gpu == 0  # it looks at the machine the first time
    several._n_gpu = 2
    with pytest.raises(RequestError, match=r"^args: expected one GPU per process, found 2, .* --nproc-per-node=2"):
        integration.DistillationTrainer(student(), several, cache=cache)
    optimizer = sgd(trainer.model.parameters())
    own = integration.DistillationTrainer(
        trainer.model, arguments(tmp_path), cache=cache, method=OFD, optimizers=(optimizer, None)
    )
    own.create_optimizer()
    own.create_optimizer()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(own.model.parameters())) + len(
        list(own.distiller.parameters())
    )
