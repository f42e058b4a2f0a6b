"""Presets against the published tables, and the rows of `feedfast taps`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.build import build_model
from feedfast.models.doctor import describe_taps
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped, bn_parameters

# name, image size, channels and sizes of ofd1.., channels of final: the Overhaul paper's networks (and their channel
# counts as its authors publish them), then the same idea for the networks they did not use
TABLE = [
    ("zoo/wrn-16-2", 32, [(32, 32), (64, 16), (128, 8)], 128),
    ("zoo/wrn-28-4", 32, [(64, 32), (128, 16), (256, 8)], 256),
    ("zoo/resnet-20", 32, [(16, 32), (32, 16), (64, 8)], 64),
    ("zoo/mobilenetv1", 32, [(128, 16), (256, 8), (512, 4), (1024, 2)], 1024),
    ("zoo/mobilenetv1-224", 224, [(128, 56), (256, 28), (512, 14), (1024, 7)], 1024),
    ("zoo/pyramidnet-20-24", 32, [(24, 32), (32, 16), (40, 8)], 40),
    ("zoo/pyramidnet-29-24b", 32, [(27, 32), (35, 16), (160, 8)], 160),
    ("zoo/fitnet-1", 32, [(16, 32), (32, 16), (64, 8)], 64),
    ("zoo/fitnet-4", 28, [(48, 28), (80, 14), (128, 7)], 128),
    ("zoo/resnet-50-p25", 64, [(192, 16), (384, 8), (768, 4), (1536, 2)], 1536),
    ("zoo/resnet-50-p37.5", 64, [(160, 16), (320, 8), (640, 4), (1280, 2)], 1280),
    ("torchvision/resnet18", 64, [(64, 16), (128, 8), (256, 4), (512, 2)], 512),
    ("torchvision/resnet50", 64, [(256, 16), (512, 8), (1024, 4), (2048, 2)], 2048),
    ("torchvision/resnext50_32x4d", 64, [(256, 16), (512, 8), (1024, 4), (2048, 2)], 2048),
    ("torchvision/mobilenet_v2", 64, [(144, 16), (192, 8), (576, 4), (320, 2)], 1280),
    ("torchvision/mobilenet_v3_large", 64, [(72, 16), (240, 8), (672, 4), (160, 2)], 960),
    ("torchvision/mobilenet_v3_small", 64, [(72, 16), (96, 8), (288, 4), (96, 2)], 576),
    ("torchvision/vgg11_bn", 64, [(128, 32), (256, 16), (512, 8), (512, 4)], 512),
    ("torchvision/vgg11", 64, [(128, 32), (256, 16), (512, 8), (512, 4)], 512),
    ("timm/resnet18", 64, [(64, 16), (128, 8), (256, 4), (512, 2)], 512),
    ("timm/regnetx_002", 64, [(24, 16), (56, 8), (152, 4), (368, 2)], 368),
    ("timm/efficientnet_b0", 64, [(24, 16), (40, 8), (112, 4), (320, 2)], 1280),
]


def build(name: str) -> nn.Module:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = build_model(name, num_classes=10, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh norms hide mistakes, and timm's last ones are zero
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-1, 1, generator=generator)
    return model


@pytest.mark.parametrize(("name", "size", "stages", "final"), TABLE, ids=[row[0] for row in TABLE])
def test_presets_have_the_published_places(name: str, size: int, stages: list[tuple[int, int]], final: int) -> None:
    model = build(name).eval()
    x = torch.randn(2, 3, size, size)
    taps = (*preset_taps(model, "ofd"), *preset_taps(model, "final"))
    tapped = Tapped(model, taps, x)
    assert [t.name for t in taps] == [*(f"ofd{i + 1}" for i in range(len(stages))), "final"]
    assert [tapped.shapes[t.name] for t in taps[:-1]] == [(c, s, s) for c, s in stages]
    assert tapped.shapes["final"][0] == final
    assert taps[-1].position == "post"
    with torch.no_grad():
        _, maps = tapped(x)
    for tap in taps[:-1]:
        assert (maps[tap.name] < 0).any(), f"{tap.name} is activated"
        if tap.bn is not None:
            gamma, _ = bn_parameters(model, tap) or (None, None)
            assert gamma is not None
            assert len(gamma) == tapped.shapes[tap.name][0]
        else:
            assert name == "torchvision/vgg11"


# channels of stage1.. where they are not those of ofd1..: linear bottlenecks are tapped before the next expansion
LINEAR = {
    "torchvision/mobilenet_v2": [24, 32, 96, 320],
    "torchvision/mobilenet_v3_large": [24, 40, 112, 160],
    "torchvision/mobilenet_v3_small": [16, 24, 48, 96],
    "timm/efficientnet_b0": [24, 40, 112, 320],
}


@pytest.mark.parametrize(("name", "size", "stages"), [row[:3] for row in TABLE], ids=[row[0] for row in TABLE])
def test_stages_are_the_overhauls_after_their_activation(name: str, size: int, stages: list[tuple[int, int]]) -> None:
    model = build(name).eval()
    x = torch.randn(2, 3, size, size)
    before, after = preset_taps(model, "ofd"), preset_taps(model, "stage")
    assert [t.name for t in after] == [f"stage{i + 1}" for i in range(len(stages))]
    assert all(t.position == "post" and t.bn is None for t in after)
    channels = LINEAR.get(name, [c for c, _ in stages])
    tapped = Tapped(model, (*before, *after), x)
    assert [tapped.shapes[t.name] for t in after] == [(c, s, s) for c, (_, s) in zip(channels, stages, strict=True)]
    with torch.no_grad():
        _, maps = tapped(x)
    for number, _ in enumerate(stages, start=1):
        found = maps[f"stage{number}"]
        if name in LINEAR or (name == "zoo/pyramidnet-20-24" and number < 3):
            assert (found < 0).any(), "a linear bottleneck is not activated"
        else:
            assert torch.equal(found, maps[f"ofd{number}"].relu())


def ends_by_hand(name: str, x: Tensor) -> list[Tensor]:
    """The ends of the stages, by calling the network's own modules one after the other."""
    net: Any = build(name).eval()
    last = {
        "zoo/mobilenetv1": (3, 5, 11, 13),
        "zoo/mobilenetv1-224": (3, 5, 11, 13),
        "torchvision/vgg11_bn": (6, 13, 20, 27),
        "torchvision/mobilenet_v2": (3, 6, 13, 17),
        "torchvision/mobilenet_v3_large": (3, 6, 12, 15),
        "torchvision/mobilenet_v3_small": (1, 3, 8, 11),
    }
    if name in last:
        return [net.features[: end + 1](x) for end in last[name]]
    if name.startswith("zoo/wrn"):
        one = net.block1(net.conv1(x))
        two = net.block2(one)
        return [net.block2[0].bn1(one).relu(), net.block3[0].bn1(two).relu(), net.bn(net.block3(two)).relu()]
    if name.startswith("zoo/pyramid"):
        one = net.layer1(net.bn1(net.conv1(x)))
        two = net.layer2(one)
        starts = [(net.layer2[0], one), (net.layer3[0], two)]
        if name.endswith("b"):
            ends = [block.bn2(block.conv1(block.bn1(y))).relu() for block, y in starts]
        else:
            ends = [block.bn1(y) for block, y in starts]
        return [*ends, net.bn_final(net.layer3(two)).relu()]
    if name.startswith("zoo/fitnet"):
        one = net.layer1(x)
        two = net.layer2(F.max_pool2d(one, 2))
        return [one, two, net.layer3(F.max_pool2d(two, 2))]
    y = net.relu(net.bn1(net.conv1(x)))
    y = net.maxpool(y) if hasattr(net, "maxpool") else y
    ends = []
    for layer in (net.layer1, net.layer2, net.layer3, getattr(net, "layer4", None)):
        if layer is not None:
            y = layer(y)
            ends.append(y)
    return ends


@pytest.mark.parametrize("name", [row[0] for row in TABLE if not row[0].startswith("timm/") and row[0][-5:] != "vgg11"])
def test_stages_by_hand(name: str) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = ends_by_hand(name, x)
    model = build(name).eval()
    _, found = Tapped(model, preset_taps(model, "stage"), x)(x)
    assert list(found) == [f"stage{i + 1}" for i in range(len(expected))]
    assert all(torch.equal(map_, y) for map_, y in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/regnetx_002", "timm/efficientnet_b0"])
def test_stages_of_timms_networks_are_its_features(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = build(name).eval()
    features = timm.create_model(name.removeprefix("timm/"), pretrained=False, features_only=True).eval()
    left_out = features.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not left_out
    x = torch.randn(2, 3, 64, 64)
    _, found = Tapped(model, preset_taps(model, "stage", x), x)(x)
    expected = features(x)[-4:]
    assert len(found) == 4
    for map_, y in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(map_, y)


@pytest.mark.parametrize(
    "name", ["zoo/wrn-16-2", "zoo/mobilenetv1", "zoo/pyramidnet-20-24", "zoo/pyramidnet-29-24b",
             "zoo/fitnet-2", "torchvision/vgg11_bn", "torchvision/mobilenet_v2", "timm/vgg11_bn"]
)  # fmt: skip
def test_the_batch_norm_of_a_preset_is_the_one_that_made_the_map(name: str) -> None:
    """With batch statistics a norm's output has mean beta and deviation |gamma|, whatever came before it."""
    model = build(name)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    taps = preset_taps(model, "ofd")
    _, maps = Tapped(model.train(), taps, x)(x)
    for tap in taps:
        if tap.position == "post" and tap.path != tap.bn:
            continue  # a residual sum
        gamma, beta = bn_parameters(model, tap) or (torch.zeros(1), torch.zeros(1))
        found = maps[tap.name].detach()
        torch.testing.assert_close(found.mean((0, 2, 3)), beta, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.std((0, 2, 3), correction=0), gamma, rtol=1e-2, atol=1e-3)


def test_final_is_what_the_classifier_pools() -> None:
    for name in (
        "zoo/wrn-16-2",
        "zoo/resnet-20",
        "zoo/mobilenetv1",
        "zoo/pyramidnet-29-24b",
        "zoo/resnet-50-p50",
        "torchvision/resnet18",
    ):
        model = build(name).eval()
        x = torch.randn(2, 3, 64, 64)
        logits, maps = Tapped(model, preset_taps(model, "final"), x)(x)
        fc = model.fc
        assert isinstance(fc, nn.Linear)
        torch.testing.assert_close(F.linear(maps["final"].mean((2, 3)), fc.weight, fc.bias), logits)


@pytest.mark.parametrize(
    "name", ["torchvision/efficientnet_b0", "torchvision/shufflenet_v2_x1_0", "torchvision/convnext_tiny",
             "torchvision/regnet_y_400mf", "torchvision/densenet121", "torchvision/alexnet"]
)  # fmt: skip
def test_final_of_networks_without_a_table_is_found_on_one_pass(name: str) -> None:
    model = build(name)
    x = torch.randn(1, 3, 224 if "alexnet" in name else 64, 224 if "alexnet" in name else 64)
    (tap,) = preset_taps(model, "final", x)
    expected = {"shufflenet": "conv5", "regnet": "trunk_output"}
    assert tap.path == next((path for key, path in expected.items() if key in name), "features")
    assert len(Tapped(model, (tap,), x).shapes["final"]) == 3
    if "regnet" not in name and "convnext" not in name:
        for group in ("ofd", "stage"):
            with pytest.raises(RequestError, match=f"taps '{group}': the stages of .* by hand"):
                preset_taps(model, group, x)


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(RequestError, match="'final', 'ofd', 'stage' or name="):
        preset_taps(build("zoo/resnet-20"), "fitnet")
    with pytest.raises(RequestError, match=r"^taps 'ofd4': expected one of ofd1, ofd2, ofd3$"):
        preset_taps(build("zoo/resnet-20"), "ofd4")


def test_one_tap_of_a_group() -> None:
    """So that a recipe can store some of the large maps: ``taps = ["ofd2+margin", "ofd3+margin"]``."""
    model = build("zoo/resnet-20")
    for group in ("ofd", "stage"):
        every = preset_taps(model, group)
        assert [preset_taps(model, f"{group}{number}") for number in (1, 2, 3)] == [(tap,) for tap in every]


class FunctionalBlock(nn.Module):
    """A residual block as many CIFAR repositories write it, with activations as functions."""

    def __init__(self, module_relu: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU() if module_relu else None

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu if self.relu is None else self.relu
        return act(self.bn2(self.conv2(act(self.bn1(self.conv1(x))))) + x)


class OwnResNet(nn.Module):
    def __init__(self, module_relu: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(FunctionalBlock(module_relu)) for _ in range(3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))
        return logits


def test_a_resnet_of_ones_own() -> None:
    model = OwnResNet(module_relu=True)
    taps = preset_taps(model, "ofd")
    assert [(t.path, t.position, t.bn) for t in taps] == [(f"layer{i}", "pre", f"layer{i}.0.bn2") for i in (1, 2, 3)]
    assert preset_taps(model, "final")[0].path == "layer3"
    with pytest.raises(RequestError, match="called as a function"):
        preset_taps(OwnResNet(module_relu=False), "ofd")
    # after the activation there is nothing a hook could miss
    written = OwnResNet(module_relu=False).eval()
    x = torch.randn(2, 3, 8, 8)
    _, maps = Tapped(written, preset_taps(written, "stage"), x)(x)
    first = written.layer1(written.stem(x))
    assert torch.equal(maps["stage1"], first)
    assert torch.equal(maps["stage3"], written.layer3(written.layer2(first)))


def test_rows_of_a_resnet() -> None:
    model = build("torchvision/resnet50").train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rows = {row.path: row for row in describe_taps(model, torch.randn(1, 3, 64, 64))}
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert rows["layer4"].suggestions == ("final:post", "ofd4:pre", "stage4:post")
    assert rows["layer4"].shape == (2048, 2, 2) == rows["layer4"].pre_shape
    assert rows["layer4"].values == 2048 * 4
    assert rows["layer4"].bn == "layer4.2.bn3"
    assert rows["layer1"].positions == ("post", "pre")
    assert rows["layer1.0.conv1"].positions == ("post",)
    assert rows["layer1.0.relu"].calls == 3
    assert any("called 3 times" in h for h in rows["layer1.0.relu"].hazards)
    assert any("works in place" in h for h in rows["layer1.0.relu"].hazards)
    assert any("overwritten in place later" in h for h in rows["layer1.0.bn3"].hazards)
    assert any("not a map" in h for h in rows["fc"].hazards)
    assert "" not in rows


def test_rows_tell_of_functions_and_inner_activations() -> None:
    rows = {row.path: row for row in describe_taps(OwnResNet(module_relu=False), torch.randn(1, 3, 8, 8))}
    assert rows["layer2"].positions == ("post",)
    assert any("function call (relu)" in h for h in rows["layer2"].hazards)
    assert rows["layer3"].suggestions == ("final:post", "stage3:post")
    rows = {row.path: row for row in describe_taps(build("torchvision/mobilenet_v2"), torch.randn(1, 3, 64, 64))}
    assert any("is not the last layer inside" in h for h in rows["features.17"].hazards)
    assert rows["features.17"].pre_shape == (960, 2, 2)
