"""torchvision's dense networks by name against torchvision's own forward passes; their weights and backbones."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from feedfast.errors import RequestError
from feedfast.models.branched import Branched
from feedfast.models.build import build_model, published_weights
from feedfast.models.normalize import Normalize
from feedfast.models.own import own_input
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped, logits_of

SSDLITE, LRASPP = "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def theirs(name: str, classes: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options).eval()


def pixels(side: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "side"), [(SSDLITE, 320), slow("ssd300_vgg16", 300)])
def test_a_detector_finds_what_torchvisions_own_pass_finds(name: str, side: int, tmp_path: Path) -> None:
    """From its plain state_dict, through our normalization, and after its own postprocessing."""
    original = theirs(name, 4)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    model = build_model(f"torchvision/{name}", num_classes=3, weights=tmp_path / "w.pth").eval()
    assert list(model.state_dict()) == list(original.state_dict())
    own = own_input(f"torchvision/{name}", tmp_path / "w.pth", model)
    assert own is not None
    assert own.size == side
    image = pixels(side)
    with torch.no_grad():
        expected = original([image[0].permute(2, 0, 1) / 255])[0]
        output = model(Normalize(own.mean, own.std)(image))
        found = original.postprocess_detections(output, [output["anchors"]], [(side, side)])[0]
    assert len(expected["boxes"]) > 10
    for key in ("labels", "scores", "boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "name", [LRASPP, "deeplabv3_mobilenet_v3_large", slow("fcn_resnet50"), slow("deeplabv3_resnet50")]
)
def test_a_segmenters_logits_are_torchvisions_before_upsampling(name: str, tmp_path: Path) -> None:
    auxiliary = {} if name == LRASPP else {"aux_loss": True}
    original = theirs(name, 5, **auxiliary)
    torch.save({"model": original.state_dict()}, tmp_path / "w.pth")
    model = build_model(f"torchvision/{name}", num_classes=5, weights=tmp_path / "w.pth").eval()
    keys = [key for key in original.state_dict() if not key.startswith("aux_classifier.")]
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 3, 70, 65)
    with torch.no_grad():
        expected = original(x)["out"]
        logits = model(x)
    assert logits.shape[2] < expected.shape[2]
    torch.testing.assert_close(F.interpolate(logits, (70, 65), mode="bilinear", align_corners=False), expected)
    assert Tapped(model, (), x).outputs == tuple(logits.shape[1:])


@pytest.mark.parametrize(("name", "own", "count"), [(SSDLITE, 90, 91), (LRASPP, 21, 21)])
def test_published_weights_and_a_head_of_another_number_of_classes(
    name: str, own: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = models.get_model_weights(name).DEFAULT
    file = tmp_path / "hub/checkpoints" / published.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    state = theirs(name, count).state_dict()
    torch.save(state, file)
    full = f"torchvision/{name}"
    assert published_weights(full, "")
    assert published_weights(full, published.name)
    model = build_model(full, weights="", num_classes=own)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(RequestError, match=f"{own} classes, expected 3"):
        build_model(full, weights="", num_classes=3)
    caplog.set_level(logging.WARNING)
    for weights in ("", file):
        changed = build_model(full, weights=weights, num_classes=3, new_head=True, seed=1)
        assert f"has {own} classes and not 3" in caplog.text
        differ = [key for key, value in changed.state_dict().items() if value.shape != state[key].shape]
        assert differ
        assert all("classif" in key for key in differ)
        caplog.clear()


def test_what_published_weights_were_shown() -> None:
    """Detectors normalize inside, whoever made the weights; the size is that of published weights alone."""
    found = {name: own_input(f"torchvision/{name}", "") for name in ("ssd300_vgg16", SSDLITE, LRASPP)}
    assert {n: (o.mean, o.size, o.binding) for n, o in found.items() if o is not None} == {
        "ssd300_vgg16": ((0.48235, 0.45882, 0.40784), 300, True),
        SSDLITE: ((0.5, 0.5, 0.5), 320, True),
        LRASPP: ((0.485, 0.456, 0.406), 0, False),
    }
    mine = own_input("torchvision/ssd300_vgg16", "mine.pth")
    assert mine is not None
    assert (mine.std, mine.binding) == ((1 / 255, 1 / 255, 1 / 255), False)
    assert own_input(f"torchvision/{LRASPP}", "mine.pth") is None


@pytest.mark.parametrize(
    ("name", "ofd", "stage"),
    [
        (SSDLITE, [672, 480, 512, 256, 256, 128], None),
        slow("ssd300_vgg16", [512, 1024, 512, 256, 256, 256], None),
        (LRASPP, [72, 240, 672, 160, 128], [24, 40, 112, 160, 128]),
        ("deeplabv3_mobilenet_v3_large", [72, 240, 672, 160, 256, 256], [24, 40, 112, 160, 256, 256]),
        slow("fcn_resnet50", [256, 512, 1024, 2048, 512], None),
        slow("deeplabv3_resnet101", [256, 512, 1024, 2048, 256, 256], None),
    ],
)
def test_taps(name: str, ofd: list[int], stage: list[int] | None) -> None:
    """Every map is before its activation; the norm named is the one that a trace finds by itself."""
    model, x = build_model(f"torchvision/{name}", num_classes=3, seed=0).eval(), torch.randn(2, 3, 96, 96)
    groups = {group: preset_taps(model, group) for group in ("ofd", "stage", "final")}
    tapped = Tapped(model, [tap for taps in groups.values() for tap in taps], x)
    shapes = list(tapped.shapes.values())
    assert [shape[0] for shape in shapes[: len(ofd)]] == ofd
    assert [shape[0] for shape in shapes[len(ofd) : -1]] == (stage or ofd)
    with torch.no_grad():
        _, maps = tapped(x)
    assert all((maps[tap.name] < 0).any() for tap in groups["ofd"])
    bare = [replace(tap, bn=None) for tap in groups["ofd"] if tap.position == "pre"]
    assert [tap.bn for tap in Tapped(model, bare, x).taps] == [t.bn for t in groups["ofd"] if t.position == "pre"]


def classifier(name: str, classes: int, path: Path, **wrap: Any) -> dict[str, Tensor]:
    torch.manual_seed(4)
    state: dict[str, Tensor] = models.get_model(name, weights=None, num_classes=classes).state_dict()
    torch.save({**wrap, "state_dict": {f"module.{k}": v for k, v in state.items()}} if wrap else state, path)
    return state


@pytest.mark.parametrize(
    ("name", "source", "left_out"),
    [
        ("zoo/deeplabv3plus-resnet18", "resnet18", "fc"),
        ("zoo/ssd300-resnet18", "resnet18", "fc, layer4"),
        ("zoo/deeplabv3plus-mobilenetv2", "mobilenet_v2", r"classifier.1, features.18"),
    ],
)
def test_backbones_start_from_a_classifiers_file(
    name: str, source: str, left_out: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = classifier(source, 7, tmp_path / "w.pt", epoch=3)
    caplog.set_level(logging.INFO)
    model = build_model(name, num_classes=3, seed=0, backbone=tmp_path / "w.pt")
    assert f"left out: {left_out}" in caplog.text
    fresh = build_model(name, num_classes=3, seed=0).state_dict()
    for key, value in model.state_dict().items():
        here = state.get(key.removeprefix("backbone."))
        assert torch.equal(value, fresh[key] if here is None else here), key
    assert sum(k.removeprefix("backbone.") in state for k in fresh) >= 90


@pytest.mark.slow
def test_a_vggs_backbone_goes_on_behind_the_fourth_pooling(tmp_path: Path) -> None:
    classifier("vgg16", 2, tmp_path / "w.pt")
    whole: Any = models.vgg16(num_classes=2).eval()
    whole.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    model: Any = build_model("zoo/ssd300-vgg16", num_classes=3, seed=0, backbone=tmp_path / "w.pt").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.extra[0][:7](model.backbone.features(x)), whole.features[:30](x))


def test_torchvisions_segmenters_take_backbones_too(tmp_path: Path) -> None:
    state = classifier("mobilenet_v3_large", 2, tmp_path / "w.pt")
    model = build_model(f"torchvision/{LRASPP}", num_classes=3, seed=0, backbone=tmp_path / "w.pt")
    body = model.get_submodule("backbone").state_dict()
    assert all(torch.equal(value, state[f"features.{key}"]) for key, value in body.items())


def test_backbones_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    classifier("resnet34", 2, tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"w.pt do not fit the backbone of model zoo/ssd300-resnet18: .*layer1\.2"):
        build_model("zoo/ssd300-resnet18", backbone=tmp_path / "w.pt")
    inside = {f"net.{k}": v for k, v in models.resnet18(num_classes=2).state_dict().items() if "fc" not in k}
    torch.save(inside, tmp_path / "inside.pt")
    with pytest.raises(RequestError, match=r"prefix = 'net\.' takes the 120 of them"):
        build_model("zoo/ssd300-resnet18", backbone=tmp_path / "inside.pt")
    build_model("zoo/ssd300-resnet18", backbone=tmp_path / "inside.pt", prefix="net.")
    with pytest.raises(RequestError, match=r"zoo/resnet-20: backbone: expected .* found CifarResNet"):
        build_model("zoo/resnet-20", backbone=tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"ssdlite.*backbone: expected"):
        build_model(f"torchvision/{SSDLITE}", backbone="")
    with pytest.raises(RequestError, match="expected none where weights are given"):
        build_model("zoo/ssd300-resnet18", weights=tmp_path / "w.pt", backbone=tmp_path / "w.pt")


def test_published_backbones_come_from_the_librarys_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / models.MobileNet_V2_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    state = classifier("mobilenet_v2", 1000, file)
    model = build_model("zoo/deeplabv3plus-mobilenetv2", backbone="")
    assert torch.equal(model.state_dict()["backbone.features.5.conv.2.weight"], state["features.5.conv.2.weight"])


def test_branches_of_dense_networks_are_refused() -> None:
    networks = [build_model("zoo/ssd300-resnet18", num_classes=2) for _ in range(2)]
    with pytest.raises(RequestError, match=r"student\.branches: zoo/ssd300-resnet18 has no known stem to share"):
        Branched(networks, "zoo/ssd300-resnet18")


def test_outputs_of_every_kind() -> None:
    """What tasks are told: a shape, shapes by name, or nothing."""

    class Returns(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap, self.conv = wrap, nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.conv(x))

    x = torch.randn(2, 3, 5, 6)
    expected: list[tuple[Any, Any]] = [
        (lambda y: y, (4, 5, 6)),
        (lambda y: {"out": y, "aux": y}, (4, 5, 6)),
        (lambda y: (y, y), (4, 5, 6)),
        (lambda y: y.mean((2, 3)), (4,)),
        (lambda y: {"logits": y.mean((2, 3)), "map": y}, (4,)),
        (lambda y: {"cls_logits": y.flatten(2), "anchors": y[0, 0]}, {"cls_logits": (4, 30), "anchors": (6,)}),
        (lambda y: {"boxes": [y]}, None),
        (lambda y: [], None),
    ]
    assert [Tapped(Returns(wrap), (), x).outputs for wrap, _ in expected] == [shapes for _, shapes in expected]
    mapping = {"cls_logits": x, "anchors": x}
    assert logits_of(mapping) is mapping
