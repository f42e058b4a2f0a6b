"""A student of parallel branches is its branches: the same numbers, each of them a plain network."""

from __future__ import annotations

import pytest
import torch

from feedfast.errors import RequestError
from feedfast.models.branched import Branched
from feedfast.models.build import build_model
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped

NETWORKS = ["zoo/wrn-10-1", "zoo/resnet-8"]


def branched(name: str, branches: int = 3) -> Branched:
    return Branched([build_model(name, num_classes=7, seed=seed) for seed in range(branches)], name)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_the_output_is_the_mean_of_plain_networks(name: str, training: bool) -> None:
    student = branched(name).train(training)
    x = torch.randn(4, 3, 16, 16)
    alone = []
    for number in range(3):
        plain = build_model(name, num_classes=7, seed=99)
        plain.load_state_dict(student.branch_state(number))  # strict: exactly a plain network's tensors
        alone.append(plain.train(training)(x))
    expected = torch.stack(alone).mean(0)
    torch.testing.assert_close(student(x), expected)
    for logits, one in zip(student.branch_logits(x), alone, strict=True):
        torch.testing.assert_close(logits, one)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_one_stem_and_so_many_bodies(name: str) -> None:
    plain = build_model(name, num_classes=7)
    stem = sum(p.numel() for part in plain.STEM for p in plain.get_submodule(part).parameters())  # type: ignore[union-attr]
    every = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in branched(name).parameters()) == stem + 3 * (every - stem)
    assert 0 < stem < every


@pytest.mark.parametrize("name", NETWORKS)
def test_taps_of_every_branch(name: str) -> None:
    student = branched(name).eval()
    x = torch.randn(2, 3, 16, 16)
    tapped = Tapped(student, preset_taps(student, "branch"), x)
    output, taps = tapped(x)
    torch.testing.assert_close(torch.stack([taps[f"branch{b}.logits"] for b in (1, 2, 3)]).mean(0), output)
    for number, logits in enumerate(student.branch_logits(x), start=1):
        torch.testing.assert_close(taps[f"branch{number}.logits"], logits)
        assert taps[f"branch{number}.final"].shape == (2, 64, 4, 4)
        pooled = taps[f"branch{number}.final"].mean((2, 3))
        torch.testing.assert_close(student.branches[number - 1].fc(pooled), logits)


def test_what_has_no_branches_is_refused() -> None:
    with pytest.raises(RequestError, match=r"student.branches: my/net has no known stem to share"):
        Branched([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], "my/net")
    with pytest.raises(RequestError, match=r"student.branches: expected a student of parallel branches.*single Wide"):
        preset_taps(build_model("zoo/wrn-10-1"), "branch")
