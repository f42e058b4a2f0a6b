"""Which axis is what: every layout against a hand-written rearrangement, and what cannot be told is refused."""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.build import build_model
from feedfast.models.doctor import describe_taps
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tap, Tapped, parse_tap

pytest.importorskip("timm")


def outputs_of(model: nn.Module, x: Tensor) -> tuple[dict[str, Any], Any]:
    """What every module returned last, caught by plain hooks, and the network's own output."""
    caught: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _, __, out: caught.update({name: out.clone() if isinstance(out, Tensor) else out})

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        output = model(x)
    for handle in handles:
        handle.remove()
    return caught, output


def tokens_as_map(x: Tensor, prefix: int, side: int) -> Tensor:
    """[B, prefix + side^2, C] → [B, C, side, side], position by position."""
    out = torch.empty(len(x), x.shape[2], side, side)
    for row in range(side):
        for column in range(side):
            out[:, :, row, column] = x[:, prefix + row * side + column]
    return out


VIT_B = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
# network, its side, tap, words of the layout, prefix tokens (None = a map) and side of the map
PLACES = [
    ("vit", 32, "final=norm", "tokens (1 + 4x4)", 1, 4),
    ("vit", 32, "stage1=blocks.0", "tokens (1 + 4x4)", 1, 4),
    ("vit", 32, "x=blocks.1.mlp.act:pre:map", "tokens (1 + 4x4)", 1, 4),
    ("vit", 32, "x=patch_embed:map", "tokens (4x4)", 0, 4),
    ("registers", 32, "final=norm", "tokens (5 + 4x4)", 5, 4),
    ("distilled", 32, "final=norm", "tokens (2 + 4x4)", 2, 4),
    ("square", 32, "final=blocks.0", "tokens (16x16)", 0, 16),  # [256 tokens, 256 channels]: only layers tell
    ("mixer", 32, "final=norm", "tokens (4x4)", 0, 4),
    ("torchvision", 32, "final=encoder", "tokens (1 + 4x4)", 1, 4),
    ("swin", 32, "final=norm", "map, channels last", None, 2),
    ("swin", 32, "x=layers.1", "map, channels last", None, 8),  # [8, 8, 16]
    ("swin", 32, "x=layers.0", "map, channels last", None, 16),
    ("convnext", 64, "x=stages.1", "map", None, 8),
    ("convnext", 64, "x=stages.1.blocks.0.mlp.fc1", "map", None, 8),
]  # fmt: skip


def network_of(name: str) -> nn.Module:
    if name in ("vit", "swin", "convnext"):
        return getattr(networks, name)().eval()
    made = {
        "registers": lambda: networks.timm_network("vit_tiny_patch16_224", reg_tokens=4, **VIT_B),
        "distilled": lambda: networks.timm_network("deit_tiny_distilled_patch16_224", **VIT_B),
        "square": lambda: networks.timm_network(
            "vit_tiny_patch16_224", class_token=False, global_pool="avg", **{**VIT_B, "patch_size": 2, "embed_dim": 256}
        ),
        "mixer": _mixer,
        "torchvision": _torchvision_vit,
    }
    return made[name]().eval()


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=1, embed_dim=24)


def _torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    return VisionTransformer(**sizes, num_classes=10)


@pytest.mark.parametrize(
    ("name", "size", "spec", "words", "prefix", "side"), PLACES, ids=[f"{p[0]}-{p[2]}" for p in PLACES]
)
def test_maps_leave_channels_first_wherever_they_come_from(
    name: str, size: int, spec: str, words: str, prefix: int | None, side: int
) -> None:
    torch.manual_seed(0)
    model, x = network_of(name), torch.randn(2, 3, size, size)
    tap = parse_tap(spec)
    caught, logits = outputs_of(model, x)
    own = caught["blocks.1.mlp.fc1" if tap.position == "pre" else tap.path]
    channels_last = words == "map, channels last"
    expected = own.permute(0, 3, 1, 2) if channels_last else own if prefix is None else tokens_as_map(own, prefix, side)
    tapped = Tapped(model, (tap,), x)
    with torch.no_grad():
        output, maps = tapped(x)
    assert tapped.layouts[tap.name].words() == words
    assert torch.equal(maps[tap.name], expected)
    assert tapped.shapes[tap.name] == tuple(expected.shape[1:]) == (expected.shape[1], side, side)
    assert torch.equal(output, logits if isinstance(logits, Tensor) else logits[0])


def test_tokens_under_a_name_of_their_own_stay_tokens() -> None:
    model, x = networks.vit().eval(), torch.randn(2, 3, 32, 32)
    caught, _ = outputs_of(model, x)
    taps = ("mine=norm", "final=norm:tokens", "stage1=norm:post:map")
    with torch.no_grad():
        _, maps = Tapped(model, tuple(parse_tap(text) for text in taps), x)(x)
    assert torch.equal(maps["mine"], caught["norm"].transpose(1, 2))
    assert torch.equal(maps["final"], caught["norm"].transpose(1, 2))
    assert torch.equal(maps["stage1"], tokens_as_map(caught["norm"], 1, 4))


class Odd(nn.Module):
    """Returns what nothing near it explains."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.inner, self.fc = shape, nn.Module(), nn.Linear(3, 4)
        self.inner.forward = lambda x: x.new_ones((*self.shape,)) * 2

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 5, 7), r"\[5, 7\] per sample may be \[N, C\] or \[C, N\]"),
        ((2, 6, 6, 6), r"\[6, 6, 6\] per sample may be \[C, H, W\] or \[H, W, C\]"),
        ((9, 2, 4), r"expected \[batch, …\].*found \[9, 2, 4\] for a batch of 2"),
        ((2, 3, 3, 3, 3), r"one to three axes per sample, found \[2, 3, 3, 3, 3\]"),
    ],
)
def test_what_cannot_be_told_is_refused(shape: tuple[int, ...], words: str) -> None:
    model, x = Odd(shape), torch.randn(2, 3, 8, 8)
    with pytest.raises(RequestError, match=f"tap mine .inner:post.: .*{words}"):
        Tapped(model, (Tap("mine", "inner"),), x)
    rows = {row.path: row for row in describe_taps(model, x)}
    if shape[0] == 2:
        assert rows["inner"].layout == "unknown"
        assert any("cannot be tapped" in hazard for hazard in rows["inner"].hazards)


def test_tokens_out_of_order_are_no_map() -> None:
    """Hiera's tokens come in the order of its mask units: 3,136 of them, as many as its first grid has places."""
    model = networks.timm_network("hiera_tiny_224", embed_dim=8, stages=(1, 1, 1, 1), num_heads=1).eval()
    x = torch.randn(2, 3, 224, 224)
    with pytest.raises(RequestError, match="expected tokens that form a grid"):
        Tapped(model, (Tap("final", "blocks.0"),), x)
    assert Tapped(model, (Tap("mine", "blocks.0"),), x).shapes["mine"] == (8, 3136)


TORCHVISION = ("resnet18", "densenet121", "googlenet", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5",
               "squeezenet1_1", "efficientnet_b0", "regnet_y_400mf")  # fmt: skip
TIMM = ("densenet121", "pvt_v2_b0", "mobilevit_xxs", "regnety_002", "mobilenetv3_small_050", "ghostnet_050",
        "edgenext_xx_small", "repvgg_a0", "mambaout_femto", "starnet_s1", "efficientvit_b0", "fastvit_t8")  # fmt: skip
SMALL = ("convnext", "swin", "square", "mixer")
QUICK = {"torchvision/densenet121", "torchvision/shufflenet_v2_x0_5", "timm/mambaout_femto", *SMALL}
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*(f"torchvision/{n}" for n in TORCHVISION), *(f"timm/{n}" for n in TIMM), *SMALL)
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mean_of_final_is_what_the_classifiers_pooling_returned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every family with a global average pooling, by watching the pooling itself: modules, functions and means."""
    torch.manual_seed(0)
    model = (build_model(name, num_classes=10, seed=0) if "/" in name else network_of(name)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh ones make every map positive on average
            module.running_mean.uniform_(-0.1, 0.1)
    x = torch.randn(
        2, 3, 32 if name in ("swin", "square", "mixer") else 64, 32 if name in ("swin", "square", "mixer") else 64
    )
    pooled: list[Tensor] = []

    def kept(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            pooled.append(out)
            return out

        return call

    with monkeypatch.context() as patch:
        patch.setattr(F, "adaptive_avg_pool2d", kept(F.adaptive_avg_pool2d))
        patch.setattr(F, "avg_pool2d", kept(F.avg_pool2d))
        patch.setattr(Tensor, "mean", kept(Tensor.mean))
        with torch.no_grad():
            model(x)
    (tap,) = preset_taps(model, "final", x)
    with torch.no_grad():
        _, maps = Tapped(model, (tap,), x)(x)
    mean = maps["final"].mean((2, 3))
    same = [out for out in pooled if out.numel() == mean.numel()]
    assert same, "nothing of that size was pooled"
    torch.testing.assert_close(same[-1].reshape(mean.shape), mean, rtol=1e-4, atol=1e-5)
    if "densenet121" in name:
        assert (maps["final"] >= 0).all(), "before its last ReLU"


def test_a_function_in_place_after_the_last_module_is_part_of_final() -> None:
    """Also with gradients, in training mode: what reaches the student's loss is what its classifier saw."""
    from torchvision.models.densenet import DenseNet

    torch.manual_seed(0)
    model = DenseNet(4, (1, 1), 8, num_classes=3).train()
    x = torch.randn(2, 3, 32, 32)
    (tap,) = preset_taps(model, "final", x)
    assert (tap.path, tap.position) == ("features", "end")
    _, maps = Tapped(model, (tap,), x)(x)
    maps["final"].square().sum().backward()
    found = [p.grad.clone() for p in model.features.parameters()]
    model.zero_grad()
    F.relu(model.features(x)).square().sum().backward()
    for grad, parameter in zip(found, model.features.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "torchvision"])
def test_presets_of_transformers(name: str) -> None:
    model, size = network_of(name), 64 if name == "convnext" else 32
    x = torch.randn(2, 3, size, size)
    for group in ("stage", "ofd"):
        taps = preset_taps(model, group, x)
        shapes = Tapped(model, taps, x).shapes
        # two blocks; the stages of a Swin of 2x2 patches but its first, at stride 2; all four of a ConvNeXt
        assert len(shapes) == {"vit": 2, "torchvision": 2, "swin": 3, "convnext": 4}[name]
        assert all(len(shape) == 3 and shape[1] == shape[2] for shape in shapes.values())


@pytest.mark.parametrize("name", ["timm/crossvit_tiny_240", "timm/volo_d1_224"])
@pytest.mark.slow
def test_networks_whose_last_map_is_not_clear_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"taps 'final': .* by hand"):
        preset_taps(build_model(name, num_classes=10, seed=0), "final")


WRAPS = {
    "tuple": lambda z: (z, None),
    "mapping": lambda z: {"logits": z},
    "object": lambda z: type("Out", (), {"logits": z})(),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_logits_are_found_in_what_networks_return(wrap: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.convnext()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    model, x = Wrapped().eval(), torch.randn(2, 3, 64, 64)
    tapped = Tapped(model, (Tap("final", "net.stages"),), x)
    assert tapped.outputs == (10,)
    with torch.no_grad():
        assert torch.equal(tapped(x)[0], model.net(x))
