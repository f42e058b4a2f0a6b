"""The zoo against published sizes and against the definitions of the papers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from feedfast.errors import RequestError
from feedfast.models.branched import Branched
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped
from feedfast.models.zoo import build_zoo

PYRAMIDS = ("pyramidnet-20-24", "pyramidnet-29-24b")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        # the sizes printed in the Overhaul paper's table 3 (CIFAR-100)
        ("wrn-16-2", 100, 0.70),
        ("wrn-16-4", 100, 2.77),
        ("wrn-28-2", 100, 1.47),
        ("wrn-28-4", 100, 5.87),
        ("resnet-56", 100, 0.86),
        ("pyramidnet-110-84", 100, 3.91),
        ("pyramidnet-200-240", 100, 26.84),
        # He et al. 2015, table 6 (CIFAR-10)
        ("resnet-20", 10, 0.27),
        ("resnet-110", 10, 1.7),
        # Howard et al. 2017, table 8 (1.0 MobileNet, ImageNet classes)
        ("mobilenetv1", 1000, 4.2),
        # Han et al. 2017, table 4 (CIFAR-10)
        ("pyramidnet-110-48", 10, 1.7),
        # Zagoruyko & Komodakis 2016, table 4
        ("wrn-28-10", 10, 36.5),
        ("wrn-40-2", 10, 2.2),
    ],
)
def test_size_is_the_published_one(name: str, classes: int, millions: float) -> None:
    found = parameters(build_zoo(name, classes)) / 1e6
    digits = len(str(millions).partition(".")[2])
    # papers cut or round the last digit
    assert millions - 0.5 * 10**-digits <= found < millions + 10**-digits


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (56, 9), (110, 18)])
def test_resnet_depth_counts_weighted_layers(depth: int, blocks: int) -> None:
    model = build_zoo(f"resnet-{depth}", 10)
    assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3)] == [blocks] * 3
    main_path = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(main_path) == depth


@pytest.mark.parametrize("name", ["wrn-16-1", "resnet-20", "mobilenetv1", "fitnet-1", *PYRAMIDS])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_runs_at_small_sizes(name: str, size: int) -> None:
    model = build_zoo(name, 7).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["wrn-16-2", "resnet-20", "mobilenetv1", "fitnet-4", *PYRAMIDS])
def test_activations_keep_their_scale_at_initialization(name: str) -> None:
    torch.manual_seed(0)
    model = build_zoo(name, 100).train()
    logits = model(torch.randn(32, 3, 32, 32))
    logits.sum().backward()
    assert 0.05 < logits.std().item() < 20
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["wrn-16-2", "resnet-20", "mobilenetv1", *PYRAMIDS])
def test_in_place_operations_change_no_result_and_no_gradient(name: str) -> None:
    """The same network with every in-place ReLU made out of place, in float64."""
    torch.manual_seed(1)
    fast, slow = build_zoo(name, 10).double(), build_zoo(name, 10).double()
    slow.load_state_dict(fast.state_dict())
    for module in slow.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for model in (fast, slow):
        logits = model(x)
        (logits * torch.linspace(-1, 1, 10, dtype=torch.float64)).sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["wrn-16-2", "resnet-20", "mobilenetv1", "fitnet-4", *PYRAMIDS])
def test_channels_last_bf16_reaches_every_layer_without_a_copy(name: str) -> None:
    model = build_zoo(name, 10).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    seen: list[tuple[str, bool, torch.dtype]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            module.register_forward_hook(
                lambda _m, _a, y, path=path: seen.append(
                    (path, y.dim() == 2 or y.is_contiguous(memory_format=torch.channels_last), y.dtype)
                )
            )
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert seen
    assert [s for s in seen if not s[1] or s[2] != torch.bfloat16] == []


@pytest.mark.parametrize("name", ["wrn-16-1", "resnet-20", "fitnet-1", "resnet-50-p50", *PYRAMIDS])
def test_branches_on_one_stem_are_the_plain_networks(name: str) -> None:
    """Logits and the gradient of the stem are the mean of those of two networks with the same stem's weights."""
    torch.manual_seed(5)
    student = Branched([build_zoo(name, 7).double() for _ in range(2)], name).eval()
    plain = [build_zoo(name, 7).double().eval() for _ in range(2)]
    for number, network in enumerate(plain):
        network.load_state_dict(student.branch_state(number))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = torch.stack([network(x) for network in plain]).mean(0)
    found = student(x)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    stem = [path for path, _ in student.branches[0].named_parameters() if path.startswith(student.stem_names)]
    assert stem
    for path in stem:
        parts = [network.get_parameter(path).grad for network in plain]
        assert all(part is not None for part in parts)
        torch.testing.assert_close(student.branches[0].get_parameter(path).grad, torch.stack(parts).sum(0))  # type: ignore[arg-type]
    assert [tap.path.rpartition(".")[2] for tap in preset_taps(student, "branch")][1::2] == ["fc", "fc"]
    assert len(Tapped(student, preset_taps(student, "branch"), x).shapes) == 4


def test_wrn_block_is_the_papers() -> None:
    """The first shape-changing block and the plain one after it, recomputed from their weights."""
    torch.manual_seed(2)
    model = build_zoo("wrn-16-2", 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    f = torch.nn.functional
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def bn(x: torch.Tensor, path: str) -> torch.Tensor:
        mean, var, gamma, beta = (
            state[f"{path}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    x = torch.randn(2, 32, 16, 16)
    a = bn(x, "block2.0.bn1").clamp(min=0)
    y = f.conv2d(a, state["block2.0.conv1.weight"], stride=2, padding=1)
    y = f.conv2d(bn(y, "block2.0.bn2").clamp(min=0), state["block2.0.conv2.weight"], padding=1)
    y = y + f.conv2d(a, state["block2.0.shortcut.weight"], stride=2)
    z = f.conv2d(bn(y, "block2.1.bn1").clamp(min=0), state["block2.1.conv1.weight"], padding=1)
    z = y + f.conv2d(bn(z, "block2.1.bn2").clamp(min=0), state["block2.1.conv2.weight"], padding=1)
    with torch.no_grad():
        torch.testing.assert_close(model.block2(x), z, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramid_blocks_are_the_papers(name: str) -> None:
    """The strided block of the second stage, with shortcut and padding written out; and the widths of all blocks."""
    torch.manual_seed(3)
    model = build_zoo(name, 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    block: Any = model.layer2[0]  # type: ignore[index]
    f = torch.nn.functional
    x = torch.randn(2, block.bn1.num_features, 7, 7)  # an odd side: 7 becomes 4
    if name.endswith("b"):
        y = f.conv2d(block.bn1(x), block.conv1.weight)
        y = f.conv2d(block.bn2(y).clamp(min=0), block.conv2.weight, stride=2, padding=1)
        y = block.bn4(f.conv2d(block.bn3(y).clamp(min=0), block.conv3.weight))
    else:
        y = f.conv2d(block.bn1(x), block.conv1.weight, stride=2, padding=1)
        y = block.bn3(f.conv2d(block.bn2(y).clamp(min=0), block.conv2.weight, padding=1))
    pooled = torch.stack(
        [x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2, 4, 6) for j in (0, 2, 4, 6)], dim=-1
    ).reshape(2, -1, 4, 4)
    expected = torch.cat([y[:, : x.shape[1]] + pooled, y[:, x.shape[1] :]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    # 24 channels over 9 blocks, by hand: 18.67, 21.33, 24, ... 40
    blocks = [block for layer in ("layer1", "layer2", "layer3") for block in getattr(model, layer)]
    assert [block.conv1.out_channels for block in blocks] == [19, 21, 24, 27, 29, 32, 35, 37, 40]
    assert model.fc.in_features == (160 if name.endswith("b") else 40)


@pytest.mark.parametrize(
    ("name", "width"),
    [("110-48", 64), ("110-84", 100), ("110-270", 286), ("164-48", 256), ("164-84", 400), ("164-270", 1144),
     ("200-240", 1024), ("236-220", 944), ("272-200", 864)],
)  # fmt: skip
def test_pyramids_end_as_wide_as_the_papers(name: str, width: int) -> None:
    """The output feature dimensions of the paper's tables: up to 110 layers of basic blocks, then of bottlenecks."""
    with torch.device("meta"):
        model: Any = build_zoo(f"pyramidnet-{name}", 10)
    assert model.fc.in_features == width
    main_path = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(main_path) == int(name.partition("-")[0])


def test_pyramid_blocks_are_basic_up_to_depth_110() -> None:
    kinds = {name: type(build_zoo(name, 10).layer1[0]).__name__ for name in (*PYRAMIDS, "pyramidnet-110-1")}  # type: ignore[index]
    assert kinds == {PYRAMIDS[0]: "PyramidBasic", PYRAMIDS[1]: "PyramidBottleneck", "pyramidnet-110-1": "PyramidBasic"}
    deep: Any = build_zoo("pyramidnet-164-1", 10)
    assert type(deep.layer1[0]).__name__ == "PyramidBottleneck"
    assert [len(layer) for layer in (deep.layer1, deep.layer2, deep.layer3)] == [18] * 3


@pytest.mark.parametrize(
    ("percent", "trainable", "stored"),
    [("25", 14_778_216, 14_818_088), ("37.5", 10_486_856, 10_520_104), ("50", 6_927_528, 6_954_152)],
)
def test_pruned_resnets_have_the_published_sizes(percent: str, trainable: int, stored: int) -> None:
    """Weights, and weights with the statistics of batch norms, which Keras counts (Adlik's README: 6,954,152)."""
    with torch.device("meta"):
        model = build_zoo(f"resnet-50-p{percent}", 1000)
        whole = importlib.import_module("torchvision.models").resnet50()
    statistics = sum(b.numel() for path, b in model.named_buffers() if "num_batches" not in path)
    assert (parameters(model), parameters(model) + statistics) == (trainable, stored)
    assert list(model.state_dict()) == list(whole.state_dict())
    left = {path: m.out_channels for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for path, m in whole.named_modules():
        if isinstance(m, nn.Conv2d):
            kept = m.out_channels - int(m.out_channels * float(percent) / 100)
            assert left[path] == (64 if path == "conv1" else kept), path


def test_pruned_resnets_run_and_are_initialized_as_torchvisions() -> None:
    torch.manual_seed(4)
    model: Any = build_zoo("resnet-50-p50", 7)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), path
    logits = model.train()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("student", "layers", "millions"), [(1, 11, 0.18), (2, 11, 0.73), (3, 13, 1.37), (4, 19, 2.41)]
)
def test_fitnets_are_the_papers(student: int, layers: int, millions: float) -> None:
    """Weighted layers as in the paper's tables; two-piece maxout has twice our weights in its convolutions."""
    model: Any = build_zoo(f"fitnet-{student}", 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + sum(isinstance(m, nn.Linear) for m in model.modules()) == layers
    assert round(2 * sum(m.weight.numel() for m in convolutions) / 1e6, 2) == millions
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    # groups are pooled by 2, 2 and 8
    y = torch.nn.functional.max_pool2d(model.layer1(x), 2)
    y = torch.nn.functional.max_pool2d(model.layer2(y), 2)
    y = torch.nn.functional.max_pool2d(model.layer3(y), 8).flatten(1)
    assert y.shape == (2, 64 if student == 1 else 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.fc(model.fc1(y).clamp(min=0)))
    assert model.fc.in_features == 500


def test_dropout_of_a_fitnet_works_while_training() -> None:
    model = build_zoo("fitnet-1", 10)
    x = torch.randn(4, 3, 28, 28)
    torch.manual_seed(0)
    first, second = model.train()(x), model(x)
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrn-16", "zoo/wrn-16-2"),
        ("wrn-17-2", "6n+4"),
        ("wrn-16-0", "width"),
        ("wrn-16-4096", "width"),
        ("resnet-18", "torchvision/resnet18"),
        ("resnet-999998", "6n+2"),
        ("mobilenet", "zoo/mobilenetv1"),
        ("pyramidnet-110", "zoo/pyramidnet-110-84"),
        ("pyramidnet-111-84", "9n+2"),
        ("pyramidnet-21-84", "6n+2"),
        ("pyramidnet-26-84b", "bottleneck"),
        ("pyramidnet-20-0", "alpha"),
        ("resnet-50-p30", "zoo/resnet-50-p50"),
        ("fitnet-5", "zoo/fitnet-4"),
        ("vit", "known:"),
    ],
)
def test_wrong_names_say_what_is_right(name: str, words: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        build_zoo(name, 10)
    assert words in str(caught.value)


def test_class_count_is_checked() -> None:
    with pytest.raises(RequestError, match="num_classes"):
        build_zoo("wrn-16-1", 0)
