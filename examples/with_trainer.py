"""Hugging Face: a vision model of transformers, trained by its `Trainer` from a cache.

    python examples/with_trainer.py [FOLDER]

Teacher and cache are those of plain_pytorch.py: made in FOLDER (default runs/examples) unless they are there.

Expected output (losses and accuracies differ a little between machines; between a Trainer's own lines):

    step 30, loss 27.21, kd 5.62, feature 0.0441
    step 60, loss 11.60, kd 1.51, feature 0.0205
    step 90, loss 8.54, kd 0.80, feature 0.0156
    step 120, loss 7.48, kd 0.59, feature 0.0139
    120 steps, accuracy 95.0 %
"""

import sys
from pathlib import Path

from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed

import feedfast
from feedfast.integrations.huggingface import DistillationTrainer
from feedfast.stages.demo import write_digits

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples")
out.mkdir(parents=True, exist_ok=True)
train, val = write_digits(out)  # two .npz files: images uint8 [N, 16, 16] and labels
data = {"train": str(train), "val": str(val), "size": 16, "flip": 0.0, "mean": [0.3] * 3, "std": [0.35] * 3}

# A teacher, trained plainly on all 1,437 images. Have you got one? Name its weights below instead.
schedule = {"source": "none", "epochs": 6, "batch": 64, "schedule": "one-cycle", "eval_every": 0}
teacher = feedfast.fit(data=data, student="zoo/wrn-10-2", train={**schedule, "out": str(out / "teacher")})

# It runs once over two views of 30 images per class; its maps and logits are kept.
feedfast.cache(
    data={**data, "limit": 30},
    teachers={"a": {"model": "zoo/wrn-10-2", "weights": f"{teacher.out}/student.pt", "taps": ["final", "ofd+margin"]}},
    cache={"path": str(out / "digits.zarr"), "views": 2, "pilot": 200},
)
cache = feedfast.open_cache(out / "digits.zarr")

set_seed(0)
config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10)
student = ResNetForImageClassification(config)
arguments = TrainingArguments(
    str(out / "trainer"), num_train_epochs=20, per_device_train_batch_size=50, learning_rate=5e-3, logging_steps=30,
    save_strategy="no", report_to="none", disable_tqdm=True,
)  # fmt: skip
trainer = DistillationTrainer(
    student,
    arguments,
    cache=out / "digits.zarr",
    method=[{"name": "kd"}, {"name": "pfeed", "beta": 500.0}],
    val=val,
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
)
trainer.train()
for row in trainer.state.log_history[:-1]:
    print(f"step {row['step']}, loss {row['loss']:.2f}, kd {row['kd.kd']:.2f}, feature {row['pfeed.feature']:.4f}")
print(f"{trainer.state.global_step} steps, accuracy {trainer.evaluate()['eval_accuracy'] * 100:.1f} %")
