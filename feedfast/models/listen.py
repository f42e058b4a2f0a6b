"""Maps of a network that somebody else calls: a training loop of their own, Lightning, a Trainer, DDP.

`Tapped` runs the network itself. A `Listener` hooks the network instead, so that whoever calls it, wrapped or compiled
after this, gets what it always returns, and the maps of that call can be taken afterwards. Passes without gradient
(validation) are not listened to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from feedfast.errors import FeedfastError
from feedfast.models.taps import Tapped


class _Heard:
    """What the last pass left: output and maps. A copy of the network begins with nothing heard."""

    def __init__(self) -> None:
        self.value: tuple[Any, dict[str, Tensor]] | None = None

    def __deepcopy__(self, memo: Any) -> _Heard:
        # Maps have a graph, and torch copies no tensor that has one.
        return _Heard()

    def __reduce__(self) -> tuple[type[_Heard], tuple[()]]:
        return _Heard, ()


class _Begin:
    """Hook before the network runs. An object, not a closure: a deep copy of the network carries hooks of its own.

    torch.compile would compile what runs around a compiled network, too: nothing is gained by that here.
    """

    def __init__(self, tapped: Tapped) -> None:
        self.tapped = tapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if module is not self.tapped.model:
            raise FeedfastError(
                "student: expected one pass at a time of the network that was given, found a replica of it; "
                "nn.DataParallel is not supported, use DistributedDataParallel (torchrun) or one device"
            )
        self.tapped.begin()


class _End:
    """Hook after the network has run."""

    def __init__(self, tapped: Tapped, heard: _Heard) -> None:
        self.tapped, self.heard = tapped, heard

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            self.heard.value = self.tapped.end(output)


class Listener:
    """Listens to a network from construction to `remove`.

    Args:
        tapped: the network with its taps; its own `forward` is not for use meanwhile.
    """

    def __init__(self, tapped: Tapped) -> None:
        self.tapped = tapped
        self._heard = _Heard()
        self._handles = (
            tapped.model.register_forward_pre_hook(_Begin(tapped)),
            tapped.model.register_forward_hook(_End(tapped, self._heard)),
        )

    def take(self) -> tuple[Any, dict[str, Tensor]]:
        """Output (its logits, see `logits_of`) and maps of the network's last pass with gradient; once.

        Raises:
            FeedfastError: there was none since the last time.
        """
        heard, self._heard.value = self._heard.value, None
        if heard is None:
            raise FeedfastError(
                "student: expected one forward pass with gradient before each loss, found none since the last; call "
                "the network that was given (wrapped or compiled as you like), not a copy of it"
            )
        return heard

    def remove(self) -> None:
        """Take all hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self.tapped.remove()
        self._heard.value = None
