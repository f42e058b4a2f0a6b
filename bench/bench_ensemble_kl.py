"""How fast is `ensemble_kl`, with the labels' cross-entropy in the same pass, from the cache's 16-bit logits?

    python bench/bench_ensemble_kl.py [--seconds 60] [--out bench/results.csv]
    python bench/bench_ensemble_kl.py --tiny --device cpu

Shapes: ImageNet's 1,000 classes with three and five teachers at batch 256, 21,841 classes at batch 1,024, CIFAR-100 at
batch 128. These are small: all but the second fit in the L2, and what decides in training is how many kernels the host
has to launch; the note has the host's time. The last rows are the reverse divergence of averaged logits, no labels.

    feedfast            the public function: on a GPU one Triton kernel a direction
    reference eager     the same in PyTorch operators, gradients by autograd
    compile ...         torch.compile of that, one graph for the shape
    official eager      as distillation is usually written: kl_div of log_softmax against the mean of the softmaxes,
                        "batchmean", times tau^2, plus cross_entropy
    copy                a device copy of as many bytes as the operation must move

How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from inputs import DTYPES, random_map
from measure import Call, Setting, Work, exact, main
from torch import Tensor
from torch.nn import functional

from feedfast_kernels.ensemble_kl import ensemble_kl, reference

TAU = 4.0
HINTON: dict[str, Any] = {"tau": TAU, "weight": 0.9}
REVERSE: dict[str, Any] = {"tau": TAU, "average": "logits", "direction": "reverse"}
EVERYONE = ("feedfast", "copy", "compile default", "reference eager", "official eager", "compile max-autotune")


def settings(tiny: bool) -> list[Setting]:
    """Mean of probabilities with labels at all shapes, then the reverse divergence of the logits' mean at one."""

    def setting(name: str, teachers: int, batch: int, classes: int, dtype: str, variants: tuple[str, ...]) -> Setting:
        make = partial(build, teachers=teachers, batch=batch, classes=classes, dtype=DTYPES[dtype], kind=name)
        shape = f"{name}, {teachers} x {batch}x{classes}"
        return Setting("ensemble_kl", shape, dtype, "", "", make, variants)

    sizes = [(5, 256, 1000), (3, 1024, 21841), (3, 256, 1000), (5, 128, 100)]
    if tiny:
        sizes = [(2, 5, 17), (3, 4, 8)]
    found = [setting("KL+CE", *size, "bf16", EVERYONE) for size in sizes]
    other = ("feedfast", "copy", "compile default", "reference eager")
    return [*found, setting("KL+CE", *sizes[0], "fp32", other), setting("reverse KL", *sizes[0], "bf16", other)]


def moved(student: Tensor, teachers: Sequence[Tensor]) -> dict[str, int]:
    """Bytes: of a logit in 16 bits with N teachers 2 + 2 N + 2 forward, 4 backward; labels are left out."""
    s = student.numel() * student.element_size()
    t = sum(x.numel() * x.element_size() for x in teachers)
    # forward:  read the student (2) and every teacher (2 N); the gradient is known with the loss: keep it (2, though
    #           feedfast keeps 4). Reading all logits again in backward costs as much for one teacher, more for two.
    # backward: read what was kept (2), write the gradient (2)
    return {"forward": s + t + s, "backward": s + s, "both": s + t + s + s + s}


def build(device: torch.device, *, teachers: int, batch: int, classes: int, dtype: torch.dtype, kind: str) -> Work:
    """Logits of a student and of teachers, labels of which one is missing, and everyone who compares them."""
    shape = (batch, classes)
    student = random_map(shape, dtype, "", device, seed=1, like=3.0).requires_grad_()
    logits = [random_map(shape, torch.float16, "", device, seed=2 + index, like=4.0) for index in range(teachers)]
    labels = torch.randint(0, classes, (batch,), generator=torch.Generator(device).manual_seed(0), device=device)
    labels[0] = -1
    options = {**HINTON, "labels": labels} if kind == "KL+CE" else REVERSE

    @cache
    def expected() -> list[Tensor]:
        return exact(lambda z: reference(z, logits, **options), [student])

    plain = Call(lambda: reference(student, logits, **options), (), expected)
    calls = {
        "feedfast": Call(lambda: ensemble_kl(student, logits, **options), (), expected),
        "reference eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
        "official eager": Call(official, (student, logits, labels), expected),
    }
    return Work([student], moved(student, logits), calls)


def official(student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Hinton's loss with the ensemble's mean probabilities, in fp32 as autocast computes it."""
    z = student.float()
    probabilities = torch.stack([torch.softmax(logits.float() / TAU, 1) for logits in teachers]).mean(0)
    divergence = functional.kl_div(torch.log_softmax(z / TAU, 1), probabilities, reduction="batchmean")
    return HINTON["weight"] * TAU * TAU * divergence + functional.cross_entropy(z, labels, ignore_index=-1)


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
