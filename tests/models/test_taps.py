"""Taps of whole networks against forward passes written out by hand; tapped, compiled, copied and in parallel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from feedfast.errors import RequestError
from feedfast.models.build import build_model
from feedfast.models.taps import Tap, Tapped, bn_parameters, parse_tap


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters as a trained network has them; fresh ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.3, 1.2),
                (module.bias.data, -0.4, 0.4),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return model


class ByHand:
    """torchvision's ResNets from their state_dict alone: no module is called and nothing works in place."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        for name, _ in model.named_parameters():
            self.state[name].requires_grad_()

    def bn(self, x: Tensor, path: str) -> Tensor:
        mean, var, gamma, beta = (
            self.state[f"{path}.{n}"].reshape(1, -1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def conv(self, x: Tensor, path: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{path}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {}
        x = self.bn(self.conv(x, "conv1", 2), "bn1").clamp(min=0)
        x = F.max_pool2d(x, 3, 2, 1)
        for layer in (1, 2, 3, 4):
            block = 0
            while f"layer{layer}.{block}.conv1.weight" in self.state:
                path = f"layer{layer}.{block}"
                stride = 2 if layer > 1 and block == 0 else 1
                last = 3 if f"{path}.conv3.weight" in self.state else 2
                y = x
                for k in range(1, last + 1):
                    # torchvision strides in the 3x3 convolution: the second of a bottleneck, the first of a basic block
                    y = self.conv(y, f"{path}.conv{k}", stride if k == last - 1 else 1)
                    y = self.bn(y, f"{path}.bn{k}")
                    if k < last:
                        y = y.clamp(min=0)
                if f"{path}.downsample.0.weight" in self.state:
                    x = self.bn(self.conv(x, f"{path}.downsample.0", stride), f"{path}.downsample.1")
                maps[f"layer{layer}"] = y + x
                x = (y + x).clamp(min=0)
                block += 1
        return F.linear(x.mean((2, 3)), self.state["fc.weight"], self.state["fc.bias"]), maps


def short(name: str) -> nn.Module:
    """A network by name, or the shortest one made of torchvision's Bottleneck."""
    if name != "bottleneck":
        return build_model(name, num_classes=10, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10)


LAYERS = tuple(Tap(f"layer{i}", f"layer{i}", "pre") for i in (1, 2, 3, 4))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_maps_before_the_last_relu_equal_a_hand_written_forward(name: str) -> None:
    model = randomize(build_model(f"torchvision/{name}", num_classes=10, seed=0)).double().eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    hand = ByHand(model)
    logits, maps = Tapped(model, LAYERS, x)(x)
    expected_logits, expected = hand(x)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    for key, found in maps.items():
        torch.testing.assert_close(found, expected[key], rtol=1e-9, atol=1e-9)
        assert (found < 0).double().mean() > 0.1, "the map was activated"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gradients_through_taps_equal_those_of_a_hand_written_forward(name: str) -> None:
    model = randomize(build_model(f"torchvision/{name}", num_classes=10, seed=1)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    hand = ByHand(model)
    tapped = Tapped(model, LAYERS, x)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(tapped.shapes[f"layer{i}"], generator=generator, dtype=torch.float64) for i in (1, 2, 3, 4)]

    def objective(logits: Tensor, maps: dict[str, Tensor]) -> Tensor:
        parts = [(m * w).sum() + m.square().mean() for m, w in zip(maps.values(), weights, strict=True)]
        return logits.square().sum() + torch.stack(parts).sum()

    objective(*tapped(x)).backward()
    objective(*hand(x)).backward()
    for key, parameter in model.named_parameters():
        expected = hand.state[key].grad
        assert parameter.grad is not None
        assert expected is not None
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-9 * scale, msg=key)


def test_every_call_of_a_reused_relu_can_be_told_apart() -> None:
    """Bottleneck.relu runs three times: the tap is its last call, in the block and through the relu itself."""
    model = randomize(build_model("torchvision/resnet50", num_classes=10, seed=0)).eval()
    x = torch.randn(2, 3, 32, 32)
    taps = (Tap("block", "layer1.1", "pre"), Tap("relu", "layer1.1.relu", "pre"), Tap("out", "layer1.1.relu", "post"))
    _, maps = Tapped(model, taps, x)(x)
    with torch.no_grad():
        inner = model.layer1[0](model.maxpool(model.relu(model.bn1(model.conv1(x)))))  # type: ignore[index,operator]
        expected = model.layer1[1](inner.clone())  # type: ignore[index,operator]
    assert torch.equal(maps["block"], maps["relu"])
    assert torch.equal(maps["block"].relu(), expected)
    assert torch.equal(maps["out"], expected)
    assert maps["block"].shape[1] == 256  # the first two calls have 64 channels


def pre(model: nn.Module, *paths: str) -> tuple[Tap, ...]:
    return tuple(Tap(f"t{i}", path, "pre") for i, path in enumerate(paths))


def test_wrn_taps_are_after_the_next_norm_and_before_its_relu() -> None:
    model: Any = randomize(build_model("zoo/wrn-16-2", num_classes=10, seed=0)).eval()
    x = torch.randn(2, 3, 32, 32)
    _, maps = Tapped(model, pre(model, "block2.0.relu1", "block3.0.relu1", "relu"), x)(x)
    with torch.no_grad():
        one = model.block1(model.conv1(x))
        two = model.block2(one)
        three = model.block3(two)
        expected = [model.block2[0].bn1(one), model.block3[0].bn1(two), model.bn(three)]
    assert all(torch.equal(m, e) for m, e in zip(maps.values(), expected, strict=True))


def test_mobilenet_and_thin_resnet_taps_from_their_own_modules() -> None:
    x = torch.randn(2, 3, 32, 32)
    mobile: Any = randomize(build_model("zoo/mobilenetv1", num_classes=10, seed=0)).eval()
    _, maps = Tapped(mobile, pre(mobile, "features.3", "features.13"), x)(x)
    with torch.no_grad():
        for key, i in (("t0", 3), ("t1", 13)):
            block = mobile.features[i]
            y = block.relu1(block.bn1(block.conv1(mobile.features[:i](x))))
            assert torch.equal(maps[key], block.bn2(block.conv2(y)))
    thin: Any = randomize(build_model("zoo/resnet-20", num_classes=10, seed=0)).eval()
    _, maps = Tapped(thin, pre(thin, "layer2"), x)(x)
    with torch.no_grad():
        y = thin.layer2[:2](thin.layer1(thin.relu(thin.bn1(thin.conv1(x)))))
        block = thin.layer2[2]
        assert torch.equal(maps["t0"], block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(y))))) + y)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["zoo/wrn-16-1", "bottleneck", "torchvision/mobilenet_v3_small"])
def test_taps_change_neither_outputs_nor_statistics_nor_gradients(name: str, training: bool) -> None:
    bare = randomize(short(name)).train(training)
    other = copy.deepcopy(bare)
    x = torch.randn(4, 3, 32, 32)
    paths = [path for path, m in bare.named_modules() if isinstance(m, nn.ReLU | nn.Hardswish)]
    taps = [Tap(f"t{i}", path, side) for i, path in enumerate(paths) for side in ("pre",)]
    taps += [Tap(f"p{i}", path, "post") for i, path in enumerate(p for p, _ in bare.named_children())]
    tapped = Tapped(bare, taps, x)
    torch.manual_seed(1)
    logits, maps = tapped(x)
    logits.square().sum().backward()
    torch.manual_seed(1)
    expected = other(x)
    expected.square().sum().backward()
    assert torch.equal(logits, expected)
    assert len(maps) == len(taps)
    assert all(torch.equal(a, b) for a, b in zip(bare.state_dict().values(), other.state_dict().values(), strict=True))
    for a, b in zip(bare.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_the_example_leaves_no_trace() -> None:
    model = randomize(build_model("torchvision/mobilenet_v3_small", num_classes=10, seed=0)).train()
    model.features[0][1].eval()  # type: ignore[index]  # a frozen norm in a training network
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    tapped = Tapped(model, (Tap("a", "features", "post"), Tap("b", "classifier", "pre")), torch.randn(1, 3, 32, 32))
    generator_after = torch.get_rng_state()
    torch.randn(1, 3, 32, 32)
    assert not torch.equal(generator_after, generator)  # the example itself was drawn
    torch.set_rng_state(generator)
    torch.randn(1, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), generator_after)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert tapped.model is model
    assert tapped.model.state_dict().keys() == state.keys()
    assert list(tapped.parameters()) == list(model.parameters())


def test_copies_are_independent_and_the_bare_network_holds_no_maps() -> None:
    model = randomize(build_model("zoo/resnet-20", num_classes=10, seed=0)).eval()
    x = torch.randn(2, 3, 32, 32)
    tapped = Tapped(model, (Tap("y", "layer3", "pre"),), x)
    _, before = tapped(x)
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(0.1)
    _, changed = twin(x)
    _, after = tapped(x)
    assert torch.equal(before["y"], after["y"])
    assert not torch.equal(before["y"], changed["y"])
    average = copy.deepcopy(tapped.model)  # as a moving average would
    assert torch.equal(average(x), model(x))
    recorders = {
        hook.recorder
        for m in average.modules()
        for hook in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]  # type: ignore[attr-defined]
    }
    assert recorders
    assert all(m is None for r in recorders for m in r.maps)


def test_two_tapped_views_of_one_network() -> None:
    model = randomize(build_model("zoo/resnet-20", num_classes=10, seed=0)).eval()
    x = torch.randn(2, 3, 32, 32)
    a = Tapped(model, (Tap("y", "layer1", "pre"),), x)
    b = Tapped(model, (Tap("y", "layer2", "post"),), x)
    assert a(x)[1]["y"].shape[1] == 16
    assert b(x)[1]["y"].shape[1] == 32


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["zoo/wrn-10-1", "bottleneck"])
def test_compiled_taps_are_the_same(name: str, training: bool) -> None:
    torch._dynamo.reset()
    model = randomize(short(name)).train(training)
    paths = ("block2.0.relu1", "relu") if "wrn" in name else ("layer1", "layer4")
    x = torch.randn(4, 3, 32, 32)
    tapped = Tapped(model, (*pre(model, *paths), Tap("post", paths[1])), x)
    reference = copy.deepcopy(tapped)
    results = []
    for version in (reference, torch.compile(tapped, backend="aot_eager", fullgraph=True)):
        for _ in range(2):  # the second call must not see anything of the first
            logits, maps = version(x)
        (logits.square().sum() + sum(m.square().mean() for m in maps.values())).backward()
        bare = tapped.model if version is not reference else reference.model
        results.append([logits, *maps.values(), *(p.grad for p in bare.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch._dynamo.reset()


def test_autocast_and_memory_format_pass_through() -> None:
    model = randomize(build_model("torchvision/resnet18", num_classes=10, seed=0)).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    tapped = Tapped(model, (*LAYERS, Tap("final", "layer4")), x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, maps = tapped(x)
        assert torch.equal(logits, model(x))
    assert {m.dtype for m in maps.values()} == {torch.bfloat16}
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps.values())
    assert torch.equal(maps["layer4"].relu(), maps["final"])
    with torch.inference_mode():
        _, plain = tapped(x)
    with torch.no_grad():
        assert all(torch.equal(plain[k], v) for k, v in tapped(x)[1].items())


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_data_parallel_training_uses_the_taps_and_saves_the_bare_network() -> None:
    model = randomize(build_model("zoo/resnet-20", num_classes=10, seed=0))
    x = torch.randn(4, 3, 16, 16)
    alone = copy.deepcopy(model)
    tapped = Tapped(model, (Tap("y", "layer3", "pre"),), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DDP's own, about versions and strides
        parallel = nn.parallel.DistributedDataParallel(tapped)
        logits, maps = parallel(x)
        (logits.sum() + maps["y"].square().sum()).backward()
    single = Tapped(alone, (Tap("y", "layer3", "pre"),), x)
    logits, maps = single(x)
    (logits.sum() + maps["y"].square().sum()).backward()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert parallel.module.model.state_dict().keys() == alone.state_dict().keys()


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("final=layer4", Tap("final", "layer4", "post")),
        ("ofd1=layer1.0:pre", Tap("ofd1", "layer1.0", "pre")),
        ("a-b.c_1=features.3:post", Tap("a-b.c_1", "features.3", "post")),
    ],
)
def test_parse_tap(text: str, tap: Tap) -> None:
    assert parse_tap(text) == tap


@pytest.mark.parametrize(
    "text", ["", "layer4", "=layer4", "a=", "a=:pre", "a/b=layer4", "..=layer4", "a=layer4:in", "a=b:"]
)
def test_parse_tap_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="expected"):
        parse_tap(text)


def test_batch_norm_of_a_tap_written_by_hand() -> None:
    """Found directly before the activation, and before a residual sum (not the shortcut's, which runs later)."""
    model: Any = randomize(build_model("torchvision/resnet18", num_classes=10, seed=0))
    x = torch.randn(1, 3, 32, 32)
    taps = (
        Tap("a", "relu", "pre"),
        Tap("b", "layer2.0", "pre"),
        Tap("c", "layer2.0"),
        Tap("d", "layer1", "pre", "bn1"),
    )
    a, b, c, d = Tapped(model, taps, x).taps
    assert (a.bn, b.bn, c.bn, d.bn) == ("bn1", "layer2.0.bn2", None, "bn1")
    found = bn_parameters(model, b)
    assert found is not None
    gamma, beta = found
    assert torch.equal(gamma, model.layer2[0].bn2.weight)
    assert torch.equal(beta, model.layer2[0].bn2.bias)
    assert not gamma.requires_grad
    gamma.zero_()
    assert model.layer2[0].bn2.weight.abs().min() > 0, "a copy was expected"
    assert bn_parameters(model, c) is None
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    found = bn_parameters(plain, Tap("x", "0", "pre", "0"))
    assert found is not None
    assert torch.equal(found[0], torch.ones(3))
    assert torch.equal(found[1], torch.zeros(3))
    with pytest.raises(RequestError, match="found Conv2d"):
        bn_parameters(model, Tap("x", "layer1", "pre", "conv1"))
