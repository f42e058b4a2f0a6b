"""Lightning: a data module that streams a cache, a callback that adds a method's loss.

    python examples/with_lightning.py [FOLDER]

Teacher and cache are those of plain_pytorch.py: made in FOLDER (default runs/examples) unless they are there.

Expected output (accuracies differ a little between machines; after Lightning's own lines):

    views [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    distill/ce 0.50, distill/feature 2096.65
    60 steps, accuracy 85.8 % of 359 images
"""

import sys
from pathlib import Path

import lightning
import torch
from torch.nn import functional as F

import feedfast
from feedfast.integrations.lightning import CachedDataModule, DistillationCallback
from feedfast.models.build import build_model
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


class Student(lightning.LightningModule):
    """Written for plain training: nothing in it knows of teachers."""

    def __init__(self):
        super().__init__()
        self.model = build_model("zoo/wrn-10-1", num_classes=10, seed=0)
        self.right, self.views = [], []

    def training_step(self, batch, batch_idx):
        """The task's loss of one batch; the callback adds the method's."""
        if batch_idx == 0:
            self.views.append(batch.view)
        return F.cross_entropy(self.model(batch.images), batch.labels)

    def validation_step(self, batch, batch_idx):
        """Which images are classified rightly."""
        self.right.append(self.model(batch.images).argmax(1) == batch.labels)

    def configure_optimizers(self):
        """Of the student; the callback adds the method's adapters."""
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)


student = Student()
trainer = lightning.Trainer(
    max_epochs=10, check_val_every_n_epoch=10, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[DistillationCallback({"name": "ofd", "alpha": 1e-3}, student="model")],
)  # fmt: skip
trainer.fit(student, datamodule=CachedDataModule(out / "digits.zarr", val=val, batch_size=50))
found = torch.cat(student.right).float()
print(f"views {student.views}")
print(", ".join(f"{name} {float(value):.2f}" for name, value in sorted(trainer.callback_metrics.items())))
print(f"{trainer.global_step} steps, accuracy {found.mean() * 100:.1f} % of {len(found)} images")
