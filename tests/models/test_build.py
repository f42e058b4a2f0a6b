"""Names to networks: seeds, weight files that fit and that do not, factories, missing extras."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feedfast.errors import RequestError
from feedfast.models.build import build_model, load_weights, weights_sha256


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("name", ["zoo/resnet-20", "torchvision/resnet18", "timm/resnet18"])
def test_seed_decides_the_weights_and_leaves_the_generator_alone(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = build_model(name, num_classes=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    b = build_model(name, num_classes=10, seed=3)
    c = build_model(name, num_classes=10, seed=4)
    assert same(a, b)
    assert not same(a, c)
    assert weights_sha256(a) == weights_sha256(b) != weights_sha256(c)
    assert a(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_without_a_seed_two_networks_differ() -> None:
    assert not same(build_model("zoo/resnet-20"), build_model("zoo/resnet-20"))


def test_weights_round_trip_without_touching_the_generator(tmp_path: Path) -> None:
    model = build_model("zoo/resnet-20", num_classes=10, seed=1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    before = torch.get_rng_state()
    again = build_model("zoo/resnet-20", num_classes=10, weights=tmp_path / "w.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(model, again)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_and_prefixed_files_load(tmp_path: Path, wrap: str) -> None:
    model = build_model("zoo/resnet-20", num_classes=10, seed=1)
    state: Any = model.state_dict()
    if wrap.endswith("."):
        state = {wrap + k: v for k, v in state.items()}
    elif wrap != "bare":
        state = {wrap: state, "epoch": 3}
    torch.save(state, tmp_path / "w.pt")
    assert same(model, build_model("zoo/resnet-20", num_classes=10, weights=str(tmp_path / "w.pt"), seed=9))


def test_a_network_whose_own_keys_start_with_a_prefix_keeps_them(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    load_weights(other, tmp_path / "w.pt")
    assert same(model, other)


def test_files_without_batch_counters_load(tmp_path: Path) -> None:
    model = build_model("zoo/resnet-20", seed=1)
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pt")
    assert same(model, build_model("zoo/resnet-20", weights=tmp_path / "w.pt"))


def test_mismatch_names_keys_and_shapes_and_changes_nothing(tmp_path: Path) -> None:
    state = build_model("zoo/resnet-20", num_classes=10, seed=1).state_dict()
    state["extra.weight"] = torch.zeros(2, 3)
    del state["conv1.weight"]
    torch.save(state, tmp_path / "w.pt")
    model = build_model("zoo/resnet-20", num_classes=100, seed=2)
    digest = weights_sha256(model)
    with pytest.raises(RequestError) as caught:
        load_weights(model, tmp_path / "w.pt", name="zoo/resnet-20")
    text = str(caught.value)
    assert "1 missing: conv1.weight [16, 3, 3, 3]" in text
    assert "1 not expected: extra.weight [2, 3]" in text
    assert "fc.weight expected [100, 64], found [10, 64]" in text
    assert "zoo/resnet-20" in text
    assert str(tmp_path) in text
    assert weights_sha256(model) == digest


class Bomb:
    """Unpickling it would create the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"fc.weight": Bomb(str(mark))}))
    torch.save({"state_dict": {"fc.weight": Bomb(str(mark))}}, tmp_path / "z.pt")
    for file in ("w.pt", "z.pt"):
        with pytest.raises(RequestError, match="weights_only"):
            build_model("zoo/resnet-20", weights=tmp_path / file)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(40)])
def test_a_file_that_is_no_state_dict(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(RequestError, match="state_dict"):
        build_model("zoo/resnet-20", weights=tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"model": {"a": 1.5}}, [1, 2]])
def test_a_file_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RequestError, match="mapping of names to tensors"):
        build_model("zoo/resnet-20", weights=tmp_path / "w.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found nothing"):
        build_model("zoo/resnet-20", weights=tmp_path / "absent.pt")
    with pytest.raises(RequestError, match="found a folder"):
        build_model("zoo/resnet-20", weights=tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("resnet18", "did you mean torchvision/resnet18?"),
        ("wrn-16-2", "did you mean zoo/wrn-16-2?"),
        ("tourchvision/resnet18", "torchvision/resnet18"),
        ("zoo/wrn16-2", "zoo/wrn-16-2"),
        ("", "package.module:factory"),
        ("no_such_package.models:f", "no_such_package"),
        ("feedfast.models.zoo:build_zo", "build_zoo"),
        ("feedfast.models.zoo:ZOO_NAMES", "callable"),
        ("os.path:join", "must accept a call"),
        ("feedfast.errors:RequestError", "nn.Module"),
        ("a b:c", "dotted Python names"),
    ],
)
def test_wrong_names_get_close_matches(name: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        build_model(name)
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_factory_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks_for_test.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=4):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "def fixed():\n    return nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    before = list(sys.path)
    assert build_model("my_networks_for_test:small", num_classes=6)[1].out_features == 6  # type: ignore[index]
    assert build_model("my_networks_for_test:small")[1].out_features == 4  # type: ignore[index]
    a, b = (build_model("my_networks_for_test:small", seed=1) for _ in range(2))
    assert same(a, b)
    with pytest.raises(RequestError, match="num_classes"):
        build_model("my_networks_for_test:fixed", num_classes=6)
    assert sys.path == before
    sys.modules.pop("my_networks_for_test")


def test_published_weights() -> None:
    with pytest.raises(RequestError, match="the zoo has none"):
        build_model("zoo/wrn-16-2", weights="")
    with pytest.raises(RequestError, match="1000 classes, expected 10"):
        build_model("torchvision/resnet18", weights="", num_classes=10)


def test_published_weights_come_from_the_librarys_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where torchvision keeps its downloads is used; one with code in it is not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torchvision = importlib.import_module("torchvision")
    file = tmp_path / "hub/checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    source = build_model("torchvision/resnet18", seed=8)
    torch.save(source.state_dict(), file)
    assert same(source, build_model("torchvision/resnet18", weights=""))
    assert same(source, build_model("torchvision/resnet18", weights="IMAGENET1K_V1", num_classes=1000))
    torch.save({"fc.weight": Bomb(str(tmp_path / "executed"))}, file)
    with pytest.raises(RequestError, match="could not be fetched"):
        build_model("torchvision/resnet18", weights="")
    assert not (tmp_path / "executed").exists()


def test_published_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(RequestError, match=r"download\.pytorch\.org.*Name or service not known"):
        build_model("torchvision/resnet18", weights="")
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RequestError, match="could not be fetched from the Hugging Face hub"):
        build_model("timm/resnet18", weights="")


def test_timm_is_optional_and_hub_addresses_are_not_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with pytest.raises(RequestError, match="timm/resnet50"):
        build_model("timm/resnet51")
    with pytest.raises(RequestError, match="not known"):
        build_model("timm/hf-hub:someone/something")
    with pytest.raises(RequestError, match="Invalid pretrained tag"):
        build_model("timm/resnet18.no_such_tag")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RequestError, match=r"feedfast\[timm\]"):
        build_model("timm/resnet18")


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_networks_with_auxiliary_heads_return_plain_logits(name: str) -> None:
    model = build_model(name, num_classes=5, seed=0).train()
    assert isinstance(model(torch.randn(2, 3, 96, 96)), torch.Tensor)


def test_sha256_sees_one_bit_and_not_the_memory_format() -> None:
    model = build_model("zoo/resnet-20", seed=0)
    digest = weights_sha256(model)
    assert len(digest) == 64
    assert weights_sha256(model.to(memory_format=torch.channels_last)) == digest  # type: ignore[call-overload]
    assert weights_sha256(torch.compile(model)) == digest  # type: ignore[arg-type]
    assert weights_sha256(nn.Sequential(OrderedDict(module=model))) == digest
    with torch.no_grad():
        model.layer1[0].bn1.running_mean[3] += 1e-7  # type: ignore[index,union-attr]
    assert weights_sha256(model) != digest
