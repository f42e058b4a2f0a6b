"""DistributedDataParallel: every process gets rows of its own, and all together the batches of a single process.

    python examples/plain_pytorch.py runs/examples
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 examples/with_ddp.py runs/examples

The cache in the folder is that of plain_pytorch.py. On several GPUs every process takes the one of its local rank.

Expected output (losses and accuracies differ a little between machines):

    2 processes, 150 + 150 rows, 300 in all
    60 steps, accuracy 79.4 % of 359 images
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import feedfast
from feedfast.models.build import build_model

out = Path(sys.argv[1])
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

cache = feedfast.open_cache(out / "digits.zarr")
student = build_model("zoo/wrn-10-1", num_classes=10, seed=0)
student.to(device, memory_format=torch.channels_last)  # as the images are: DDP copies gradients of other layouts
distiller = feedfast.distiller(cache, student, method={"name": "ofd", "alpha": 1e-3})  # before DDP wraps the student
model = DistributedDataParallel(student)
optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05, momentum=0.9)
loader = cache.epochs(batch_size=50 // world, device=device, taps=distiller.taps)  # rows per process
steps, ids = 0, set()
for epoch in range(10):
    model.train()
    for batch in loader:
        losses = distiller(model(batch.images), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        distiller.average_gradients()  # of the adapters; DDP averages the student's
        optimizer.step()
        steps += 1
        if epoch == 0:
            ids |= set(batch.ids.tolist())

shares = [None] * world
dist.all_gather_object(shares, ids)
shown = cache.evaluation(out / "digits-val.npz", device=device)  # every process takes a share
student.eval()
with torch.no_grad():
    right = sum((student(batch.images).argmax(1) == batch.labels).sum() for batch in shown)
dist.all_reduce(right)
if rank == 0:
    print(
        f"{world} processes, {' + '.join(str(len(share)) for share in shares)} rows, {len(set.union(*shares))} in all"
    )
    print(f"{steps} steps, accuracy {right / len(shown.data) * 100:.1f} % of {len(shown.data)} images")
dist.destroy_process_group()
