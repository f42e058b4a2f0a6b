"""Accelerate: a loop of your own, prepared for any number of processes and for mixed precision.

    python examples/with_accelerate.py [FOLDER]

Teacher and cache are those of plain_pytorch.py: made in FOLDER (default runs/examples) unless they are there.

Expected output (losses and accuracies differ a little between machines):

    epoch 0, view 0, loss 9.54
    epoch 3, view 1, loss 7.89
    epoch 6, view 0, loss 2.77
    epoch 9, view 1, loss 1.18
    60 steps, accuracy 70.5 % of 359 images
"""

import sys
from pathlib import Path

import accelerate
import torch

import feedfast
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

accelerator = accelerate.Accelerator()
cache = feedfast.open_cache(out / "digits.zarr")
student = build_model("zoo/wrn-10-1", num_classes=10, seed=0).to(accelerator.device)
distiller = feedfast.distiller(cache, student, method="kd")  # of the bare student, before it is prepared
optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05, momentum=0.9)
model, optimizer = accelerator.prepare(student, optimizer)
# The stream is not prepared: it deals rows out to the processes itself, and puts them on the device.
loader = cache.epochs(batch_size=50 // accelerator.num_processes, device=accelerator.device, taps=distiller.taps)
steps = 0
for epoch in range(10):
    model.train()
    for batch in loader:
        with accelerator.autocast():
            losses = distiller(model(batch.images), batch)
        accelerator.backward(losses["loss"])
        distiller.average_gradients()  # of the adapters, over processes; the prepared model's are averaged already
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    if epoch % 3 == 0:
        accelerator.print(f"epoch {epoch}, view {batch.view}, loss {losses['loss']:.2f}")

model.eval()
with torch.no_grad():
    shown = cache.evaluation(val, device=accelerator.device)  # every process takes a share
    right = [(model(batch.images).argmax(1) == batch.labels).sum() for batch in shown]
found = accelerator.reduce(torch.stack(right).sum())
accelerator.print(f"{steps} steps, accuracy {found / len(shown.data) * 100:.1f} % of {len(shown.data)} images")
