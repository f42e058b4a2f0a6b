"""Networks that are passed as objects, in the place of a name: what they are called, and that they stay as they are.

Such a network is called ``python/package.Class``. That is a word and no address: nothing imports it, whoever wrote it
down, so a cache or a run that names one only says that the network itself must be passed again. What tells two of them
apart is the hash of their weights. Teachers are copies, since freezing, moving and batch statistics change a network;
a student is the object itself, whose flags and hooks are put back when training ends.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError

__all__ = ["AsFound", "bare", "copied", "is_given", "missing", "word_of"]

GIVEN: Final = "python/"
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def is_given(name: str) -> bool:
    """Whether a model's name says that it was an object."""
    return name.startswith(GIVEN)


def missing(name: str) -> RequestError:
    """For whoever has only the name."""
    return RequestError(
        f"model {name}: was passed as a Python object, which its name cannot bring back: pass the network itself, "
        "as teachers={name: network} to feedfast.cache, fit, plan or verify, as student=network to fit or export"
    )


def word_of(network: nn.Module) -> str:
    """What recipe, cache and run call a network that was passed: its class."""
    kind = type(bare(network))
    return f"{GIVEN}{kind.__module__}.{kind.__qualname__}"[:512]


def bare(network: nn.Module) -> nn.Module:
    """The network inside `torch.compile`'s and data-parallel wrappers, whose weights are the same tensors."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner: Any = network.module if isinstance(network, wrappers) else getattr(network, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def copied(network: nn.Module, where: str) -> nn.Module:
    """A copy on the CPU in fp32, as a network into which the same weights were loaded.

    Raises:
        RequestError: it cannot be copied, or its weights have no values yet; ``where`` begins the message.
    """
    network = bare(network)
    state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    odd = [key for key, value in state.items() if value.is_meta or nn.parameter.is_lazy(value)]
    if odd:
        raise RequestError(f"{where}: expected a network whose weights have values, found {odd[0]} without any")
    try:
        return copy.deepcopy(network).to(device="cpu", dtype=torch.float32)
    except Exception as error:  # whatever a network holds that has no copy
        raise RequestError(
            f"{where}: expected a network that copy.deepcopy can copy: {type(error).__name__}: {str(error)[:200]}"
        ) from error


class AsFound:
    """Flags and hooks of a network, to be put back after it was trained."""

    def __init__(self, network: nn.Module) -> None:
        self._modules = [
            (
                module,
                module.training,
                getattr(module, "inplace", None),
                {name: [*_table(module, name)] for name in _HOOKS},
            )
            for module in network.modules()
        ]

    def restore(self) -> None:
        """Put them back; weights, gradients and device stay as they are."""
        for module, training, inplace, hooks in self._modules:
            module.training = training
            if isinstance(inplace, bool):
                module.inplace = inplace  # type: ignore[assignment]
            for name, kept in hooks.items():
                table = _table(module, name)
                for key in [key for key in table if key not in kept]:
                    del table[key]


def _table(module: nn.Module, name: str) -> dict[int, Any]:
    found: dict[int, Any] = getattr(module, name)
    return found
