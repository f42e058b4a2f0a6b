"""Every trap that a hook on an activation can fall into, each in a network of a few lines that lays it.

Maps overwritten later, in place or behind autograd's back; activations used several times, shared by blocks, or called
as functions; networks that run differently from their example. Either the map is the one that was there, or the
request is refused with a sentence; nothing in between.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast.errors import FeedfastError, RequestError
from feedfast.models.taps import Tap, Tapped


class Net(nn.Module):
    """A small network whose forward pass is given by the test."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        for name, module in modules.items():
            setattr(self, name, module)
        self.fc = nn.Linear(4, 5)
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.how(self, x).mean((2, 3)))
        return logits


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_output_overwritten_later_is_kept_as_it_was() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y)
        z += y
        y.mul_(2)
        z.add_(y)
        return z

    model = Net(forward)
    tapped = Tapped(model, (Tap("y", "a"), Tap("z", "b")), X)
    with torch.no_grad():
        _, maps = tapped(X)
        y = F.conv2d(X, model.a.weight, model.a.bias, padding=1)
        z = F.conv2d(y, model.b.weight, model.b.bias, padding=1)
    assert torch.equal(maps["y"], y)
    assert torch.equal(maps["z"], z)


def test_writing_behind_autograds_back_is_seen_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        y.data.zero_()  # leaves no version behind
        return y

    model = Net(forward)
    _, maps = Tapped(model, (Tap("y", "a"),), X)(X)
    assert torch.equal(maps["y"], F.conv2d(X, model.a.weight, model.a.bias, padding=1))


def test_maps_that_nobody_overwrites_are_not_copied() -> None:
    caught: list[Tensor] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        caught.append(y)
        return m.b(y) + y

    tapped = Tapped(Net(forward), (Tap("y", "a"),), X)
    _, maps = tapped(X)
    assert maps["y"] is caught[-1]


def test_an_in_place_activation_is_made_out_of_place_instead_of_copied() -> None:
    model = Net(lambda m, x: m.relu(m.b(m.a(x))))
    caught: list[Tensor] = []
    model.b.register_forward_hook(lambda _m, _a, y: caught.append(y))
    _, maps = Tapped(model, (Tap("y", "relu", "pre"),), X)(X)
    assert maps["y"] is caught[-1]
    assert (maps["y"] < 0).any()


def test_an_activation_that_serves_a_whole_network_stays_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.relu(m.a(x))
        for _ in range(4):
            x = m.relu(m.b(x))
        return x

    model = Net(forward)
    _, maps = Tapped(model, (Tap("y", "relu", "pre"),), X)(X)
    assert model.relu.inplace
    y = F.conv2d(X, model.a.weight, model.a.bias, padding=1).relu()
    for _ in range(3):
        y = F.conv2d(y, model.b.weight, model.b.bias, padding=1).relu()
    assert torch.equal(maps["y"], F.conv2d(y, model.b.weight, model.b.bias, padding=1))


def test_in_place_dropout_writes_only_while_training() -> None:
    model = Net(lambda m, x: m.drop(m.a(x)), drop=nn.Dropout(0.5, inplace=True)).train()
    tapped = Tapped(model, (Tap("y", "a"),), X)
    expected = F.conv2d(X, model.a.weight, model.a.bias, padding=1)
    assert torch.equal(tapped(X)[1]["y"], expected)
    assert torch.equal(tapped.eval()(X)[1]["y"], expected)


def test_a_map_overwritten_only_after_the_example_is_refused() -> None:
    model = Net(lambda m, x: m.a(x).mul_(2) if m.training else m.a(x))
    tapped = Tapped(model, (Tap("y", "a"),), X)
    tapped.eval()(X)
    with pytest.raises(FeedfastError, match="overwritten after it was captured"):
        tapped.train()(X)


def test_another_number_of_calls_is_refused_and_nothing_sticks() -> None:
    model: Any = Net(lambda m, x: m.relu(m.b(m.relu(m.a(x)))) if m.deep else m.relu(m.a(x)))
    model.deep = True
    tapped = Tapped(model, (Tap("y", "relu", "pre"),), X)
    model.deep = False
    with pytest.raises(FeedfastError, match="called 1 times, expected 2"):
        tapped(X)
    model.deep = True
    _, maps = tapped(X)
    y = F.conv2d(X, model.a.weight, model.a.bias, padding=1).relu()
    assert torch.equal(maps["y"], F.conv2d(y, model.b.weight, model.b.bias, padding=1))


@pytest.mark.parametrize(
    ("forward", "tap", "words"),
    [
        (lambda m, x: F.relu(m.b(m.relu(m.a(x)))), Tap("y", "block", "pre"), "function call"),
        (lambda m, x: m.b(m.a(x)).relu_(), Tap("y", "block", "pre"), "function call"),
        (lambda m, x: torch.clamp_min(m.b(m.relu(m.a(x))), 0), Tap("y", "block", "pre"), "function call"),
        (lambda m, x: m.b(m.a(x)), Tap("y", "block", "pre"), "no activation"),
        (lambda m, x: m.b(m.a(x)), Tap("y", "block.relu", "pre"), "never called"),
        (lambda m, x: m.b(m.a(x)), Tap("y", "block.rellu", "pre"), "did you mean block.relu"),
        (lambda m, x: m.b(m.pair(m.a(x))[0]), Tap("y", "block.pair"), "found tuple"),
        (lambda m, x: m.b(m.a(x[:, :2])), Tap("y", "block.a"), "cannot run on an example of shape"),
    ],
)
def test_what_cannot_be_tapped_is_refused(forward: Any, tap: Tap, words: str) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Block(Net):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.how(self, x)
            return result

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(forward, pair=Pair())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.block(x).mean((2, 3))
            return result

    model = Whole()
    with pytest.raises(RequestError) as caught:
        Tapped(model, (tap,), X)
    assert words in str(caught.value)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_activation_is_looked_for_where_it_runs_not_where_it_is_registered() -> None:
    """One ReLU shared by two blocks and registered in the first only."""
    relu = nn.ReLU(inplace=True)
    one = nn.Sequential(nn.Conv2d(3, 4, 1), relu)
    two = nn.Sequential(nn.Conv2d(4, 6, 1), relu)
    model = nn.Sequential(one, two, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    _, maps = Tapped(model, (Tap("one", "0", "pre"), Tap("two", "1", "pre")), X)(X)
    with torch.no_grad():
        first = one[0](X)
        assert torch.equal(maps["one"], first)
        assert torch.equal(maps["two"], two[0](first.relu()))


def test_names_and_models_are_checked() -> None:
    model = Net(lambda m, x: m.a(x))
    for names in (("logits",), ("a", "a"), ("a/b",), ("",)):
        with pytest.raises(RequestError, match="expected different names"):
            Tapped(model, [Tap(name, "a") for name in names], X)
    with pytest.raises(RequestError, match=r"torch\.compile\(Tapped"):
        Tapped(torch.compile(model), (Tap("y", "a"),), X)  # type: ignore[arg-type]


def test_no_taps_and_removed_taps() -> None:
    model = Net(lambda m, x: m.a(x)).eval()
    logits, maps = Tapped(model, (), X)(X)
    assert maps == {}
    assert torch.equal(logits, model(X))
    tapped = Tapped(model, (Tap("y", "a"),), X)
    tapped.remove()
    assert not model.a._forward_hooks
    with pytest.raises(FeedfastError, match="called 0 times"):
        tapped(X)
