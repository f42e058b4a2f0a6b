"""Weight files as trainers write them: timm's, Lightning's, data-parallel, averaged, safetensors, torchvision's own."""

from __future__ import annotations

import argparse
import builtins
import importlib
import logging
import re
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.models.build import build_model
from feedfast.models.own import own_input
from feedfast.models.weights import load_weights

State = dict[str, Tensor]


def small(seed: int = 0, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = nn.Sequential(OrderedDict(body=body, fc=nn.Linear(4, classes)))
        network.body[1].running_mean.uniform_(-1, 1)
    return network


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def timms(state: State, other: State) -> Any:
    """As timm's CheckpointSaver writes it: the parsed command line and NumPy's scalars beside the weights."""
    arguments = argparse.Namespace(model="resnet50", lr=0.1, opt=argparse.Namespace(betas=(0.9, 0.999)))
    return {
        "epoch": 3,
        "arch": "resnet50",
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": arguments,
        "metric": np.float64(71.5),
        "history": np.arange(3.0),
    }


def lightnings(state: State, other: State) -> Any:
    return {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(state, "model."),
        "loops": {},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": Path("x")}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"width": 4, "seen": defaultdict(int, a=1)},
    }


FILES: dict[str, Any] = {
    "bare": lambda state, other: state,
    "timm": timms,
    "lightning": lightnings,
    "net and acc": lambda state, other: {"net": state, "acc": np.float32(0.7), "epoch": 4},
    "model_state_dict": lambda state, other: {"model_state_dict": state, "epoch": 3, "loss": torch.tensor(0.1)},
    "data parallel": lambda state, other: {"state_dict": prefixed(state, "module.")},
    "lightning and compiled": lambda state, other: {"state_dict": prefixed(state, "net._orig_mod.")},
    "backbone.encoder": lambda state, other: prefixed(state, "backbone.encoder."),
    "parameters, not tensors": lambda state, other: {k: nn.Parameter(v, False) for k, v in state.items()},
    "one of two fits": lambda state, other: {"generator": state, "critic": {"w": torch.zeros(2)}},
    "in another mapping": lambda state, other: {"run": {"weights": state, "step": 2}},
    "averaged beside": lambda state, other: {"state_dict": state, "state_dict_ema": other, "a": argparse.Namespace()},
    "averaged alone": lambda state, other: {"model_ema": state, "epoch": 1},
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old pickle"])
@pytest.mark.parametrize("kind", FILES)
def test_files_of_trainers_load(kind: str, old: bool, tmp_path: Path) -> None:
    wanted, other = small(1), small(2)
    content = FILES[kind](dict(wanted.state_dict()), dict(other.state_dict()))
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    found = small(3)
    load_weights(found, tmp_path / "w.pth")
    assert same(found, wanted)


@pytest.mark.slow
def test_a_real_lightning_checkpoint_loads(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = small(1)

    trainer = lightning.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    module = Module(4)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    found = small(3)
    load_weights(found, tmp_path / "w.ckpt")
    assert same(found, module.net)


def test_averaged_weights_are_named_and_taken_by_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, average = small(1), small(2)
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "w.pth")
    found = small(3)
    with caplog.at_level(logging.INFO, "feedfast"):
        load_weights(found, tmp_path / "w.pth")
    assert same(found, plain)
    assert "EMA" in caplog.text
    assert "state_dict_ema" in caplog.text
    load_weights(found, tmp_path / "w.pth", key="state_dict_ema")
    assert same(found, average)
    with pytest.raises(RequestError, match=r"key: expected 'state_dict' \| 'state_dict_ema', found 'ema'"):
        load_weights(found, tmp_path / "w.pth", key="ema")


def test_two_that_fit_are_not_chosen_between(tmp_path: Path) -> None:
    torch.save({"student": small(1).state_dict(), "teacher": small(2).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"found 2, of which 2 fit; key says which: 'student' \| 'teacher'"):
        load_weights(small(3), tmp_path / "w.pth")


def test_a_network_among_others_is_taken_by_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A Lightning module with a network and a loss of its own weights."""
    wanted = small(1)
    torch.save(
        {"state_dict": prefixed(wanted.state_dict(), "model.") | {"criterion.weight": torch.ones(4)}}, tmp_path / "w"
    )
    found = small(3)
    with pytest.raises(RequestError, match=r"prefix = 'model\.' takes the 9 of them"):
        load_weights(found, tmp_path / "w")
    with caplog.at_level(logging.INFO, "feedfast"):
        load_weights(found, tmp_path / "w", prefix="model")
    assert same(found, wanted)
    assert "1 entries without the prefix" in caplog.text
    with pytest.raises(RequestError, match=r"prefix: expected one of \['criterion\.', 'model\.'\], found 'net'"):
        load_weights(found, tmp_path / "w", prefix="net")


class Danger:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return builtins.open, (self.mark, "w")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old pickle"])
def test_nothing_of_a_file_is_executed(old: bool, tmp_path: Path) -> None:
    """Beside sound weights a stranger's object is an inert stand-in, or the file is refused."""
    mark = tmp_path / "executed"
    torch.save({"state_dict": small(1).state_dict(), "args": Danger(str(mark))}, tmp_path / "w.pt",
               _use_new_zipfile_serialization=not old)  # fmt: skip
    found = small(3)
    load_weights(found, tmp_path / "w.pt")
    assert same(found, small(1))
    assert not mark.exists()


@pytest.mark.parametrize("module", ["os", "posix", "sys"])
def test_what_torch_blocks_stays_blocked_and_is_named(module: str, tmp_path: Path) -> None:
    """Written as a stranger would: with names that no object here has."""
    torch.save({"state_dict": small(1).state_dict(), "args": Danger(str(tmp_path / "executed"))}, tmp_path / "w.pt")
    swapped = tmp_path / "swapped.pt"
    with zipfile.ZipFile(tmp_path / "w.pt") as source, zipfile.ZipFile(swapped, "w") as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry).replace(b"c_io\nopen\n", f"c{module}\nsystem\n".encode())
                            .replace(b"cio\nopen\n", f"c{module}\nsystem\n".encode()))  # fmt: skip
    with pytest.raises(RequestError, match=rf"it names {module}\.system"):
        load_weights(small(3), swapped)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 1}], ids=["bare", "under a key"])
def test_a_whole_pickled_network_says_what_saves_its_weights(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(small(1)), tmp_path / "w.pt")
    with pytest.raises(RequestError) as caught:
        load_weights(small(3), tmp_path / "w.pt")
    assert "torch.nn.modules.container.Sequential" in str(caught.value)
    assert "torch.save(model.state_dict(), 'weights.pt')" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_named(tmp_path: Path) -> None:
    torch.jit.trace(small(1).eval(), torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "w.pt"))
    with pytest.raises(RequestError, match=r"TorchScript.*torch\.save\(model\.state_dict\(\)"):
        load_weights(small(3), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_hold_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    for wrong in (torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta"), torch.zeros(4, 4, dtype=torch.long)):
        torch.save({**small(1).state_dict(), "fc.weight": wrong}, tmp_path / "w.pt")
        with pytest.raises(RequestError, match=r"fc\.weight"):
            load_weights(small(3), tmp_path / "w.pt")


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    wanted, found = small(1), small(3)
    safetensors.save_file({k: v.contiguous() for k, v in wanted.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(found, tmp_path / "w.safetensors")
    assert same(found, wanted)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-8])
    with pytest.raises(RequestError, match="whole safetensors file"):
        load_weights(found, tmp_path / "cut.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RequestError, match="pip install safetensors"):
        load_weights(found, tmp_path / "w.safetensors")


def old_names(state: State) -> State:
    """DenseNet's names before torchvision 0.2: denselayer1.norm.1.weight."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value for key, value in state.items()}


def test_old_densenets_load(tmp_path: Path) -> None:
    from torchvision.models.densenet import DenseNet

    wanted, found = DenseNet(4, (2, 2), 8, num_classes=3), DenseNet(4, (2, 2), 8, num_classes=3)
    renamed = old_names(wanted.state_dict())
    assert any(".norm.1." in key for key in renamed)
    torch.save(renamed, tmp_path / "w.pth")
    load_weights(found, tmp_path / "w.pth")
    assert same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [("inception_v3", "inception_v3_google-0cc3c7bd.pth"), ("googlenet", "googlenet-1378be20.pth")],
)
def test_networks_with_auxiliary_heads_take_torchvisions_own_files(name: str, file: str, tmp_path: Path) -> None:
    """With the heads in them, and with the normalization inside that torchvision adds for its published weights."""
    tv = importlib.import_module("torchvision.models")
    torch.manual_seed(0)
    whole = tv.get_model(name, weights=None, aux_logits=True, init_weights=False, transform_input=True)
    torch.save(whole.state_dict(), tmp_path / file)
    x = torch.randn(2, 3, 96, 96)
    found = build_model(f"torchvision/{name}", weights=tmp_path / file).eval()
    with torch.no_grad():
        assert torch.equal(found(x), whole.eval()(x))
    own = own_input(f"torchvision/{name}", tmp_path / file)
    assert own is not None
    assert own.size == tv.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    (tmp_path / file).rename(tmp_path / "mine.pth")
    assert not build_model(f"torchvision/{name}", weights=tmp_path / "mine.pth").transform_input
    assert own_input(f"torchvision/{name}", tmp_path / "mine.pth") is None


def test_another_head_is_left_at_random_only_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = small(1, classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"fc\.weight expected \[4, 4\], found \[7, 4\]"):
        load_weights(small(3), tmp_path / "w.pth")
    found, fresh = small(3), small(3)
    load_weights(found, tmp_path / "w.pth", new_head=True)
    assert torch.equal(found.fc.weight, fresh.fc.weight)
    assert torch.equal(found.fc.bias, fresh.fc.bias)
    for ours, theirs in zip(found.body.state_dict().values(), source.body.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert "classifier fc has 7 classes and not 4" in caplog.text


def test_what_is_no_head_is_refused_also_when_asked(tmp_path: Path) -> None:
    state = small(1).state_dict()
    state["body.0.weight"] = torch.zeros(4, 3, 5, 5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"body\.0\.weight expected"):
        load_weights(small(3), tmp_path / "w.pth", new_head=True)
    state = small(1).state_dict()  # a wider trunk: first axes differ, but not only those of one layer
    for key in ("body.0.weight", "body.0.bias"):
        state[key] = torch.cat([state[key], state[key]])
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"body\.0\.weight expected"):
        load_weights(small(3), tmp_path / "w.pth", new_head=True)


def test_published_weights_with_another_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torchvision = importlib.import_module("torchvision")
    file = tmp_path / "hub/checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    source = build_model("torchvision/resnet18", seed=8)
    torch.save(source.state_dict(), file)
    found = build_model("torchvision/resnet18", weights="", num_classes=10, seed=1, new_head=True)
    assert found.fc.weight.shape == (10, 512)
    assert torch.equal(found.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_timms_vit_from_timms_trainer(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    wanted, found = networks.vit(), networks.vit()
    assert not same(found, wanted)
    torch.save(timms(prefixed(wanted.state_dict(), "module.model."), {}), tmp_path / "w.pth.tar")
    load_weights(found, tmp_path / "w.pth.tar")
    assert same(found, wanted)
