"""torch.compile: the student is compiled after the distiller has been made, which then hears the compiled one.

    python examples/with_compile.py [FOLDER] [BACKEND]

Teacher and cache are those of plain_pytorch.py: made in FOLDER (default runs/examples) unless they are there.

Expected output (losses and accuracies differ a little between machines; compiling takes a minute on a CPU):

    epoch 0, view 0, loss 9.93
    epoch 3, view 1, loss 5.78
    epoch 6, view 0, loss 3.85
    epoch 9, view 1, loss 2.60
    60 steps, accuracy 87.5 % of 359 images
"""

import sys
from pathlib import Path

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

backend = sys.argv[2] if len(sys.argv) > 2 else "inductor"
device = "cuda" if torch.cuda.is_available() else "cpu"
cache = feedfast.open_cache(out / "digits.zarr")
student = build_model("zoo/wrn-10-1", num_classes=10, seed=0).to(device)
distiller = feedfast.distiller(cache, student, method={"name": "ofd", "alpha": 1e-3})
compiled = torch.compile(student, backend=backend, fullgraph=True)
optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05, momentum=0.9)
loader = cache.epochs(batch_size=50, device=device, taps=distiller.taps)
steps = 0
for epoch in range(10):
    student.train()
    for batch in loader:  # every epoch the next view
        losses = distiller(compiled(batch.images), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        steps += 1
    if epoch % 3 == 0:
        print(f"epoch {epoch}, view {batch.view}, loss {losses['loss']:.2f}")

student.eval()
with torch.no_grad():
    right = [student(batch.images).argmax(1) == batch.labels for batch in cache.evaluation(val, device=device)]
found = torch.cat(right).float()
print(f"{steps} steps, accuracy {found.mean() * 100:.1f} % of {len(found)} images")
distiller.remove()  # the student is an ordinary network: torch.save(student.state_dict(), ...)
