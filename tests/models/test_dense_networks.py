"""Networks of segmentation and detection: sizes, boxes and taps against published figures and independent passes."""

from __future__ import annotations

import copy
import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.models.build import build_model, weights_sha256
from feedfast.models.doctor import describe_taps
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped, bn_parameters
from feedfast.models.zoo import build_zoo

DEEPLAB, SSD = "zoo/deeplabv3plus-resnet18", "zoo/ssd300-resnet18"
SMALL = (DEEPLAB, "zoo/deeplabv3plus-mobilenetv2", SSD, pytest.param("zoo/ssd300-vgg16", marks=pytest.mark.slow))


def build(name: str, classes: int = 3) -> nn.Module:
    """A network whose batch norms are not fresh: those hide mistakes."""
    return copy.deepcopy(_built(name, classes))


@functools.cache
def _built(name: str, classes: int) -> nn.Module:
    model = build_model(name, num_classes=classes, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-1, 1, generator=generator)
    return model


def images(*sides: int, batch: int = 2) -> Tensor:
    height, width = sides if len(sides) == 2 else sides * 2
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def leaves(output: Any) -> dict[str, Tensor]:
    return output if isinstance(output, dict) else {"logits": output}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # printed by the Overhaul method's authors for 21 classes
        ("zoo/deeplabv3plus-resnet18", 16.6),
        ("zoo/deeplabv3plus-mobilenetv2", 5.8),
        ("zoo/deeplabv3plus-resnet101", 59.3),
        # torchvision's figure for 91 classes, less what its head has more
        (
            "zoo/ssd300-vgg16",
            35.641826 - 70 * (4 * (512 + 256 + 256) + 6 * (1024 + 512 + 256)) * 9 / 1e6 - 70 * 30 / 1e6,
        ),
    ],
)
def test_size_is_the_published_one(name: str, millions: float) -> None:
    with torch.device("meta"):
        found = sum(p.numel() for p in build_model(name).parameters()) / 1e6
    digits = min(6, len(str(millions).partition(".")[2]))
    assert round(found, digits) == round(millions, digits)


# maps and boxes at 300 pixels: NVIDIA's and the paper's
GRIDS = [38, 19, 10, 5, 3, 1]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("zoo/ssd300-resnet18", [256, 512, 512, 256, 256, 128]),
        ("zoo/ssd300-resnet34", [256, 512, 512, 256, 256, 256]),
        pytest.param("zoo/ssd300-resnet50", [1024, 512, 512, 256, 256, 256], marks=pytest.mark.slow),
        pytest.param("zoo/ssd300-vgg16", [512, 1024, 512, 256, 256, 256], marks=pytest.mark.slow),
    ],
)
def test_detectors_have_the_papers_maps_and_boxes(name: str, channels: list[int]) -> None:
    model = build_model(name, num_classes=20, seed=0).eval()
    x = images(300, batch=1)
    tapped = Tapped(model, preset_taps(model, "ofd"), x)
    assert list(tapped.shapes.values()) == [(c, s, s) for c, s in zip(channels, GRIDS, strict=True)]
    assert tapped.outputs == {"cls_logits": (8732, 21), "bbox_regression": (8732, 4), "anchors": (4,)}


def test_boxes_are_torchvisions_at_300_pixels() -> None:
    from torchvision.models.detection import ssd300_vgg16
    from torchvision.models.detection.image_list import ImageList

    with torch.device("meta"):
        theirs = ssd300_vgg16(weights=None, weights_backbone=None)
    maps = [torch.zeros(1, 1, s, s) for s in GRIDS]
    (expected,) = theirs.anchor_generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)
    with torch.no_grad():
        found = build_model(SSD).eval()(images(300, batch=1))["anchors"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sides", [(33, 33), (65, 97), (160, 160)])
def test_boxes_lie_on_the_maps(sides: tuple[int, int]) -> None:
    """The centers by hand: of the first four maps at (i + 1/2) strides, of the last two evenly in the image."""
    model = build_model(SSD, num_classes=3, seed=0).eval()
    with torch.no_grad():
        output, maps = Tapped(model, preset_taps(model, "stage"), images(*sides, batch=1))(images(*sides, batch=1))
    assert output["cls_logits"].shape[1] == output["bbox_regression"].shape[1] == len(output["anchors"])
    centers = (output["anchors"][:, :2] + output["anchors"][:, 2:]) / 2
    at = 0
    for number, (grid, per_place) in enumerate(zip(maps.values(), (4, 6, 6, 6, 4, 4), strict=True)):
        height, width = grid.shape[2:]
        strides = [s / n for s, n in zip(sides, (height, width), strict=True)] if number > 3 else [8 * 2**number] * 2
        rows, columns = ((torch.arange(n) + 0.5) * s for n, s in zip((height, width), strides, strict=True))
        expected = torch.stack([columns.repeat(height), rows.repeat_interleave(width)], 1)
        here = centers[at : at + height * width * per_place]
        torch.testing.assert_close(here, expected.repeat_interleave(per_place, 0), rtol=0, atol=1e-3)
        at += len(here)
    assert at == len(centers)


class Plain(nn.Module):
    """A ReLU that keeps what it was given last."""

    def __init__(self, six: bool) -> None:
        super().__init__()
        self.six, self.last = six, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.clone()
        return x.clamp(0, 6) if self.six else x.clamp(min=0)


# module path of each ofd map's last activation, or of its linear end
ENDS = {
    DEEPLAB: [*(f"backbone.layer{i}.1.relu" for i in (1, 2, 3, 4)), "aspp.relu", "decoder.last_conv.6"],
    "zoo/deeplabv3plus-mobilenetv2": [
        *(f"backbone.features.{i}.conv.0.2" for i in (4, 7, 14)), "backbone.features.17", "aspp.relu",
        "decoder.last_conv.6",
    ],
    SSD: ["backbone.layer3.1.relu", *(f"backbone.extra.{i}.5" for i in range(5))],
    "zoo/ssd300-vgg16": [
        "backbone.features.22", "backbone.extra.0.7.4", *(f"backbone.extra.{i}.3" for i in range(1, 5))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_taps_are_those_of_an_independent_pass(name: str) -> None:
    x = images(65, 97)
    plain = build(name)
    kept: dict[str, Tensor] = {}
    for path, module in list(plain.named_modules()):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            plain.set_submodule(path, Plain(isinstance(module, nn.ReLU6)))
    linear = [path for path in ENDS[name] if path.endswith("features.17")]
    for path in linear:
        plain.get_submodule(path).register_forward_hook(lambda _m, _a, y, p=path: kept.update({p: y.clone()}))
    with torch.no_grad():
        expected = plain(x)
        ends = [kept[p] if p in linear else plain.get_submodule(p).last for p in ENDS[name]]
        model = build(name)
        taps = (*preset_taps(model, "ofd"), *preset_taps(model, "stage"), *preset_taps(model, "final"))
        output, maps = Tapped(model, taps, x)(x)
    for key, value in leaves(expected).items():
        torch.testing.assert_close(leaves(output)[key], value)
    assert len(ends) == 6
    for number, end in enumerate(ends, start=1):
        torch.testing.assert_close(maps[f"ofd{number}"], end)
        if "mobilenet" not in name or number > 4:
            assert torch.equal(maps[f"stage{number}"], maps[f"ofd{number}"].relu())
    assert torch.equal(maps["final"], maps["stage1" if "ssd" in name else "stage6"])


@pytest.mark.parametrize("name", SMALL)
def test_margins_come_from_the_norm_that_made_the_map(name: str) -> None:
    """With batch statistics a norm's output has mean beta and deviation |gamma|; residual sums are as documented."""
    model = build(name).train()
    tapped = Tapped(model, preset_taps(model, "ofd"), images(97))
    with torch.no_grad():
        _, maps = tapped(images(97, batch=4))
    found = Tapped(model, [replace(tap, bn=None) for tap in tapped.taps if tap.position == "pre"], images(97))
    assert {tap.name: tap.bn for tap in found.taps}.items() <= {tap.name: tap.bn for tap in tapped.taps}.items()
    for tap in tapped.taps:
        if "vgg" in name:
            assert tap.bn is None
            continue
        gamma, beta = bn_parameters(model, tap) or (torch.zeros(1), torch.zeros(1))
        assert len(gamma) == maps[tap.name].shape[1]
        if "layer" not in tap.path and maps[tap.name].shape[2] > 2:
            torch.testing.assert_close(maps[tap.name].mean((0, 2, 3)), beta, rtol=0, atol=2e-3)
            torch.testing.assert_close(maps[tap.name].std((0, 2, 3), correction=0), gamma, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    "name", [*SMALL, *(f"torchvision/{n}" for n in ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"))]
)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = build(name).train()
    output, _ = Tapped(model, preset_taps(model, "ofd"), images(65))(images(65))
    parts = [value for value in leaves(output).values() if value.requires_grad]
    sum(part.float().square().mean() for part in parts).backward()  # type: ignore[union-attr]
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum().isfinite()]
    still = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert (lost, still) == ([], [])


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_changes_no_result(name: str) -> None:
    model, x = build(name), images(64)
    with torch.no_grad():
        expected = leaves(model(x))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = leaves(model(x.to(memory_format=torch.channels_last)))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(33, 33), (35, 50), (113, 64)])
@pytest.mark.parametrize("name", [DEEPLAB, "zoo/deeplabv3plus-mobilenetv2"])
def test_segmenters_take_any_size(name: str, sides: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = build(name, 5)(images(*sides))
    assert logits.shape == (2, 5, *(-(-side // 4) for side in sides))
    assert logits.isfinite().all()


def by_hand(state: dict[str, Tensor], low: Tensor, x: Tensor) -> Tensor:
    """DeepLabV3+ behind layer3 of a ResNet-18, as the authors' code has it: from names and tensors alone."""

    def layer(x: Tensor, conv: str, norm: str, padding: int = 0, dilation: int = 1) -> Tensor:
        y = F.conv2d(x, state[f"{conv}.weight"], padding=padding, dilation=dilation)
        return F.batch_norm(y, *(state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))

    for block in ("backbone.layer4.0", "backbone.layer4.1"):
        y = layer(x, f"{block}.conv1", f"{block}.bn1", 2, 2).relu()
        y = layer(y, f"{block}.conv2", f"{block}.bn2", 2, 2)
        shortcut = layer(x, f"{block}.downsample.0", f"{block}.downsample.1") if block.endswith("0") else x
        x = (y + shortcut).relu()
    branches = [layer(x, "aspp.aspp1.atrous_conv", "aspp.aspp1.bn").relu()]
    for number, rate in ((2, 6), (3, 12), (4, 18)):
        branches.append(layer(x, f"aspp.aspp{number}.atrous_conv", f"aspp.aspp{number}.bn", rate, rate).relu())
    pooled = layer(x.mean((2, 3), keepdim=True), "aspp.global_avg_pool.1", "aspp.global_avg_pool.2").relu()
    branches.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=True))
    x = layer(torch.cat(branches, 1), "aspp.conv1", "aspp.bn1").relu()
    low = layer(low, "decoder.conv1", "decoder.bn1").relu()
    x = torch.cat([F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True), low], 1)
    x = layer(x, "decoder.last_conv.0", "decoder.last_conv.1", 1).relu()
    x = layer(x, "decoder.last_conv.4", "decoder.last_conv.5", 1).relu()
    return F.conv2d(x, state["decoder.last_conv.8.weight"], state["decoder.last_conv.8.bias"])


def test_deeplab_is_the_authors() -> None:
    model, x = build(DEEPLAB), images(129, batch=1)
    with torch.no_grad():
        logits, maps = Tapped(model, preset_taps(model, "stage"), x)(x)
        expected = by_hand(model.state_dict(), maps["stage1"], maps["stage3"])
    torch.testing.assert_close(logits, expected)
    # at a side of 16n+1 the grids nest: every fourth place of the decoder's is one of the pyramid's
    assert [m.shape[2] for m in maps.values()] == [33, 17, 9, 9, 9, 33]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "values"),
    [("zoo/deeplabv3plus-resnet101", 513, 14_307_584), ("zoo/ssd300-resnet50", 300, 1_723_648), (SSD, 300, 614_528)],
)
def test_an_images_taps_have_as_many_values_as_the_authors_networks(name: str, side: int, values: int) -> None:
    model = build_model(name, seed=0).eval()
    shapes = Tapped(model, preset_taps(model, "ofd"), images(side, batch=1)).shapes.values()
    assert sum(math.prod(shape) for shape in shapes) == values


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("resnet50", [2, 4, 8]),
        ("resnet18", [2, 2, 2, 2]),
        # the authors' MobileNetV2: the 160-channel blocks stand at dilation 1
        ("mobilenetv2", [1, 1, 1, 2]),
    ],
)
def test_the_last_stage_is_dilated_and_does_not_stride(name: str, dilations: list[int]) -> None:
    with torch.device("meta"):
        model = build_zoo(f"deeplabv3plus-{name}", 2)
    last = [m for n, m in model.named_modules() if re.match(r"backbone\.(layer4|features\.1[4-7])\.", n)]
    convs = [m for m in last if isinstance(m, nn.Conv2d)]
    assert {m.stride for m in convs} == {(1, 1)}
    assert [m.dilation[0] for m in convs if m.kernel_size == (3, 3)] == dilations
    assert all(m.padding == m.dilation for m in convs if m.kernel_size == (3, 3))


@pytest.mark.parametrize("name", [DEEPLAB, SSD])
def test_state_dicts_go_round(name: str, tmp_path: Path) -> None:
    model, x = build(name), images(64)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = build_model(name, num_classes=3, weights=tmp_path / "w.pt").eval()
    with torch.no_grad():
        for key, value in leaves(model(x)).items():
            assert torch.equal(leaves(again(x))[key], value)
    assert weights_sha256(again) == weights_sha256(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [DEEPLAB, SSD])
def test_compiles_as_one_graph(name: str) -> None:
    model, x = build(name), images(64)
    tapped = Tapped(model, preset_taps(model, "ofd"), x)
    with torch.no_grad():
        expected, maps = tapped(x)
        found, again = torch.compile(tapped, backend="eager", fullgraph=True)(x)
    for key, value in leaves(expected).items():
        torch.testing.assert_close(leaves(found)[key], value)
    assert all(torch.equal(again[name], value) for name, value in maps.items())


def test_boxes_made_while_evaluating_serve_training() -> None:
    model = build(SSD)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = model(images(64))["anchors"]
    again = model(images(64))["anchors"]
    assert again.dtype == torch.float32
    assert not again.is_inference()
    assert torch.equal(boxes, again)
    (again * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_feedfast_taps(name: str) -> None:
    rows = describe_taps(build(name), images(64))
    named = [word for row in rows for word in row.suggestions]
    assert sorted(w.partition(":")[0] for w in named) == sorted(
        ["final", *(f"{g}{i}" for g in ("ofd", "stage") for i in range(1, 7))]
    )
