"""timm: networks from `create_model`, their own normalization, and timm's checkpoints for teacher and student.

    python examples/with_timm.py [FOLDER]

The teacher is trained on handwritten digits and saved as timm's train.py saves; both its folder and the cache are made
in FOLDER (default runs/examples) unless they are there. With ``pretrained=True`` and no weights of your own the rest
is the same: ``{"model": f"timm/{TEACHER}", "weights": ""}`` are the published ones.

Expected output (losses and accuracies differ a little between machines; about a minute on two cores):

    teacher resnet10t, normalized by mean (0.485, 0.456, 0.406), as its pretrained_cfg says
    epoch 0, view 0, loss 25.85
    epoch 5, view 1, loss 8.34
    epoch 10, view 0, loss 4.85
    72 steps, accuracy 79.9 % of 359 images
    the same from its checkpoint: True
"""

import sys
from pathlib import Path

import timm
import torch

import feedfast
from feedfast.stages.demo import write_digits

TEACHER, STUDENT = "resnet10t", "mobilenetv3_small_050"

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples")
out.mkdir(parents=True, exist_ok=True)
train, val = write_digits(out)  # two .npz files: images uint8 [N, 16, 16] and labels
network = timm.create_model(TEACHER, num_classes=10)
mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
crops = [{"op": "resized-crop", "scale": [0.7, 1.0]}]
data = {"train": str(train), "val": str(val), "size": 32, "augment": crops, "mean": mean, "std": std}

# Any network can be trained by `fit`; its state_dict is that of create_model's network.
checkpoint = out / "timm-teacher.pth.tar"
if not checkpoint.exists():
    schedule = {"source": "none", "epochs": 4, "batch": 64, "schedule": "one-cycle", "eval_every": 0}
    feedfast.fit(data=data, student=network, train={**schedule, "out": str(out / "timm-teacher")})
    torch.save({"epoch": 4, "arch": TEACHER, "state_dict": network.state_dict()}, checkpoint)

feedfast.cache(
    data={**data, "limit": 30},
    teachers={"a": {"model": f"timm/{TEACHER}", "weights": str(checkpoint), "key": "state_dict", "taps": ["final"]}},
    cache={"path": str(out / "timm.zarr"), "views": 2, "pilot": 200},
)
cache = feedfast.open_cache(out / "timm.zarr")
print(f"teacher {TEACHER}, normalized by mean {cache.manifest.teachers['a'].mean}, as its pretrained_cfg says")

torch.manual_seed(0)
student = timm.create_model(STUDENT, num_classes=10)
config = student.pretrained_cfg  # the student's own, which need not be the teacher's
normalize = (config["mean"], config["std"])
distiller = feedfast.distiller(cache, student, method=[{"name": "kd"}, {"name": "pfeed", "beta": 100.0}])
optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=3e-3)
loader = cache.epochs(batch_size=50, taps=distiller.taps, normalize=normalize)
steps = 0
for epoch in range(12):
    student.train()
    for batch in loader:
        losses = distiller(student(batch.images), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        steps += 1
    if epoch % 5 == 0:
        print(f"epoch {epoch}, view {batch.view}, loss {losses['loss']:.2f}")


def answers(network: torch.nn.Module) -> torch.Tensor:
    """Class of every validation image."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(batch.images).argmax(1) for batch in cache.evaluation(val, normalize=normalize)])


labels = torch.cat([batch.labels for batch in cache.evaluation(val)])
print(f"{steps} steps, accuracy {(answers(student) == labels).float().mean() * 100:.1f} % of {len(labels)} images")
torch.save({"arch": STUDENT, "state_dict": student.state_dict()}, out / "timm-student.pth.tar")
loaded = timm.create_model(STUDENT, num_classes=10, checkpoint_path=str(out / "timm-student.pth.tar"))
print(f"the same from its checkpoint: {torch.equal(answers(loaded), answers(student))}")
