"""How fast is OFD's loss after the connector's convolution: batch norm with batch statistics, then `partial_l2`?

    python bench/bench_connector_partial_l2.py [--seconds 180] [--out bench/results.csv]
    python bench/bench_connector_partial_l2.py --tiny --device cpu

Shapes: the taps of ResNet-152 -> ResNet-50 at batch 256 and of WRN-28-4 -> WRN-16-2 at batch 128, first all taps of a
network as one loss, then one by one. Gradients go to the convolution's output, gamma and beta; running statistics are
updated.

    feedfast            the public function: on a GPU the Triton kernels, elsewhere PyTorch over tiles
    feedfast, graph     the same, forward and backward captured in one CUDA graph; what is timed is its replay
    reference eager     batch norm in fp32, then the reference of `partial_l2`
    composite eager     batch norm in fp32, then the loss as one would write it, gradients by autograd
    compile ...         torch.compile of that, one graph for the shape
    official eager      as under autocast: the batch norm's result in 16 bits, then a mask of floats times the squared
                        difference, from a decoded map
    copy                a device copy of as many bytes as the operation must move

How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial

import bench_partial_l2 as distance
import torch
from inputs import DTYPES, random_codes, random_map
from measure import Call, Setting, Tolerance, Work, exact, main
from torch import Tensor
from torch.nn import functional

from feedfast_kernels import Codes, decode
from feedfast_kernels.connector_partial_l2 import connector_partial_l2, reference

EVERYONE = (
    "feedfast", "copy", "compile default", "reference eager", "official eager", "composite eager",
    "compile max-autotune",
)  # fmt: skip
WHOLE = ("feedfast", "copy", "feedfast, graph", "compile default", "official eager")
# batch norm's result in 16 bits: relative 2^-9 of values up to 6 (a few beyond), against differences of about 1
ROUNDED = Tolerance(value=1e-3, gradient=2e-2, vector=2e-2, share=1e-3)


def settings(tiny: bool) -> list[Setting]:
    """Whole networks, single taps, then other code types and memory orders at one of them."""

    def setting(
        name: str, shapes: Sequence[Sequence[int]], dtype: str, codec: str, layout: str, variants: tuple[str, ...]
    ) -> Setting:
        make = partial(build, shapes=shapes, dtype=DTYPES[dtype], codec=codec, layout=layout)
        return Setting("connector_partial_l2", name, dtype, codec, layout, make, variants)

    networks = {"ResNet-50": distance.RESNET, "WRN-16-2": distance.WRN}
    if tiny:
        networks = {"tiny": distance.TINY}
    found = []
    for network, shapes in networks.items():
        name = f"{network}: {len(shapes)} taps x {shapes[0][0]}"
        found.append(setting(name, shapes, "bf16", "u8", "NHWC", WHOLE))
    for shapes in networks.values():
        found += [setting("x".join(map(str, shape)), [shape], "bf16", "u8", "NHWC", EVERYONE) for shape in shapes]
    one = distance.TINY[0] if tiny else distance.RESNET[1]
    for dtype, codec, layout in (
        ("bf16", "u6", "NHWC"), ("bf16", "u4", "NHWC"), ("bf16", "u8", "NCHW"), ("fp32", "u8", "NHWC"),
    ):  # fmt: skip
        found.append(
            setting("x".join(map(str, one)), [one], dtype, codec, layout, ("feedfast", "copy", "compile default"))
        )
    return found


def moved(y: Tensor, codes: Codes) -> dict[str, int]:
    """Bytes: of an element of a bf16 map with u8 codes 5 forward, 5 backward."""
    s, t = y.numel() * y.element_size(), codes.data.numel()
    # statistics: read the map (bf16: 2); it is larger than any cache, so the loss has to read it again
    # loss:       read the map (2), read the codes (u8: 1); the sums that backward needs are taken here, too
    # backward:   read the map (2) and the codes (1), write the gradient (2)
    forward, backward = s + s + t, s + t + s
    return {"forward": forward, "backward": backward, "both": forward + backward}


def build(
    device: torch.device, *, shapes: Sequence[Sequence[int]], dtype: torch.dtype, codec: str, layout: str
) -> Work:
    """For every tap a map, codes, the batch norm's parameters and a margin; and everyone who computes the loss."""
    leaves, extras, sizes = [], [], {"forward": 0, "backward": 0, "both": 0}
    for index, shape in enumerate(shapes):
        seed, channels = 10 * index, (shape[1],)
        y = random_map(shape, dtype, layout, device, seed=seed + 1, like=0.7)
        codes = random_codes(shape, codec, device, seed=seed + 2)
        gamma = 1 + random_map(channels, torch.float32, "", device, seed=seed + 3, like=0.2)
        beta = random_map(channels, torch.float32, "", device, seed=seed + 4, like=0.5)
        margin = random_map(channels, torch.float32, "", device, seed=seed + 5).abs_().neg_()
        running = (torch.zeros(channels, device=device), torch.ones(channels, device=device))
        decoded = decode(codes, dtype)
        decoded = decoded.contiguous() if layout == "NCHW" else decoded
        clipped = torch.maximum(decoded, margin.to(dtype)[:, None, None])  # the live path clips beforehand
        leaves += [y.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()]
        extras.append((codes, clipped, margin, running, 1.0 / shape[0]))
        for direction, size in moved(y, codes).items():
            sizes[direction] += size

    def over_taps(tap: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The sum over the taps of a loss of (y, gamma, beta) and that tap's other tensors."""

        def loss(*leaves: Tensor) -> Tensor:
            total = tap(*leaves[:3], *extras[0])
            for index in range(1, len(extras)):
                total = total + tap(*leaves[3 * index : 3 * index + 3], *extras[index])
            return total

        return loss

    @cache
    def expected() -> list[Tensor]:
        return exact(over_taps(lambda y, g, b, c, _t, m, *_: reference(y, c, g, b, margin_C=m)), leaves)

    @cache
    def expected_of_clipped() -> list[Tensor]:
        return exact(over_taps(lambda y, g, b, _c, t, *_: reference(y, t, g, b)), leaves)

    def ours(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return over_taps(lambda y, g, b, c, _t, m, r, _scale: function(y, c, g, b, *r, margin_C=m))

    plain = Call(over_taps(composite), tuple(leaves), expected)
    note = "reads a decoded map, clipped beforehand; the batch norm's result is rounded to 16 bits"
    calls = {
        "feedfast": Call(ours(connector_partial_l2), tuple(leaves), expected),
        "feedfast, graph": Call(
            ours(connector_partial_l2), tuple(leaves), expected, note="one replay of a CUDA graph", graph=True
        ),
        "reference eager": Call(ours(reference), tuple(leaves), expected),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
        "official eager": Call(over_taps(official), tuple(leaves), expected_of_clipped, ROUNDED, note),
    }
    return Work(leaves, sizes, calls)


def composite(
    y: Tensor, gamma: Tensor, beta: Tensor, codes: Codes, _clipped: Tensor, margin: Tensor,
    running: tuple[Tensor, Tensor], scale: float,
) -> Tensor:  # fmt: skip
    """Batch norm and distance in fp32, written down; autograd keeps what it needs."""
    s = functional.batch_norm(y.float(), *running, gamma, beta, True, 0.1, 1e-5)
    return distance.composite(s, *distance.parts(codes), margin, scale)


def official(
    y: Tensor, gamma: Tensor, beta: Tensor, _codes: Codes, clipped: Tensor, _margin: Tensor,
    running: tuple[Tensor, Tensor], scale: float,
) -> Tensor:  # fmt: skip
    """As OFD's authors compute it, in the dtypes autocast gives."""
    return distance.official(functional.batch_norm(y, *running, gamma, beta, True, 0.1, 1e-5), clipped, scale)


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
