"""Taps: keeping named feature maps of a forward pass, exactly as the network computed them.

A tap is a module path and a side: ``post`` is what the module returns, ``pre`` what its last activation receives,
``end`` what functions in place have made of the output when the pass ends (DenseNet's last ReLU). Three things make
that harder than a forward hook, and each has cost published code its correctness:

* an in-place ReLU overwrites what a hook was given, so the "pre-activation" map silently becomes the activated one;
* one ReLU module may run several times in a block (torchvision's Bottleneck: three), so a hook must know which call;
* a map may be written to after it was captured, by a sum, a dropout, or the next block's first activation.

`Tapped` therefore watches the network once on an example (`trace`) and resolves each tap to one call of one module.
What is overwritten later is copied at that call; everything else is handed on as produced: no detach, no cast, no
change of memory; axes are viewed channels first (see `layout`). A pass that goes another way than the example's raises.

Not here: networks already compiled or scripted, several forward passes of one `Tapped` at once (use one each), and
activations that are called as functions, which no hook sees: asking for such a pre-activation map is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feedfast.errors import FeedfastError, RequestError
from feedfast.models.layout import Layout, layout_of
from feedfast.models.trace import Call, Trace, is_batch_norm, trace, undisturbed

__all__ = [
    "Outputs",
    "Tap",
    "Tapped",
    "bn_parameters",
    "find_module",
    "logits_of",
    "parse_tap",
    "refuse_lone_norms",
    "tap_layout",
]

# A block's own activation runs up to three times (Bottleneck); one that serves a whole network stays in place, for the
# memory it saves everywhere else.
_FEW_CALLS = 3

_NAME = re.compile(r"[A-Za-z0-9._-]+")
Outputs = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
# What methods read is a map; tokens under such a name become one.
_MAP_NAME = re.compile(r"final|(ofd|stage)\d+")


@dataclass(frozen=True)
class Tap:
    """A named place in a network.

    Attributes:
        name: what recipe, cache and methods call its map: letters, digits, ``.``, ``_``, ``-``.
        path: dotted module path as in ``model.named_modules()``.
        position: "post": the output of the module at ``path``; "pre": the input of the last activation called inside it
            (of the module itself if it is an activation); "end": as "post", after functions have worked on it in place.
            Of a module called several times, the last call is meant.
        bn: path of the batch norm whose gamma and beta describe the map before its activation; None if there is none.
        form: of tokens: "map" = [C, h, w] without the prefix tokens, "tokens" = [C, N] with them; None = a map under a
            name that methods read (final, ofd1, stage1, …), else tokens. What is no tokens stays as it is.
    """

    name: str
    path: str
    position: Literal["post", "pre", "end"] = "post"
    bn: str | None = None
    form: Literal["map", "tokens"] | None = None

    @property
    def wants_map(self) -> bool:
        """Whether tokens are to leave as a map without prefix tokens."""
        return self.form == "map" or (self.form is None and _MAP_NAME.fullmatch(self.name) is not None)


def parse_tap(text: str) -> Tap:
    """Read ``name=module.path``, with ``:pre``, ``:post`` or ``:end`` and with ``:map`` or ``:tokens`` after it.

    Raises:
        RequestError: another form; the message quotes it.
    """
    name, equals, place = text.partition("=")
    path, *words = place.split(":")
    if not equals or not _NAME.fullmatch(name) or name in {".", ".."} or not path:
        raise RequestError(f"tap {text!r}: expected name=module.path or name=module.path:pre")
    position = [word for word in words if word in ("pre", "post", "end")]
    form = [word for word in words if word in ("map", "tokens")]
    if len(position) > 1 or len(form) > 1 or len(position) + len(form) != len(words):
        raise RequestError(
            f"tap {text!r}: expected :pre, :post or :end and, of tokens, :map or :tokens after the path, "
            f"found {':' + ':'.join(words)!r}"
        )
    return Tap(
        name,
        path,
        position=position[0] if position else "post",  # type: ignore[arg-type]
        form=form[0] if form else None,  # type: ignore[arg-type]
    )


def find_module(model: nn.Module, path: str, what: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        RequestError: there is none; close matches are listed. ``what`` begins the message.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        close = difflib.get_close_matches(path, known, n=4, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; it begins with {', '.join(known[:6])}"
        raise RequestError(f"{what}: {type(model).__name__} has no module at {path!r}{hint}") from None


def bn_parameters(model: nn.Module, tap: Tap) -> tuple[Tensor, Tensor] | None:
    """Gamma and beta of the batch norm behind a tap.

    Args:
        model: the bare network.
        tap: as `preset_taps` gives it, or as `Tapped.taps` has it after finding the norm of a tap written by hand.

    Returns:
        ``(gamma, beta)``, copies in float32 ``[C]`` on the model's device, without gradient (1 and 0 for a norm without
        affine parameters); None when the tap has no batch norm.

    Raises:
        RequestError: no such module, or it is no batch norm.
    """
    if tap.bn is None:
        return None
    norm = find_module(model, tap.bn, f"tap {tap.name}, batch norm")
    if not is_batch_norm(norm):
        raise RequestError(f"tap {tap.name}: expected a batch norm at {tap.bn}, found {type(norm).__name__}")
    gamma, beta = norm.weight, norm.bias
    if not isinstance(gamma, Tensor) or not isinstance(beta, Tensor):
        statistics = norm.running_mean
        if not isinstance(statistics, Tensor):
            return None
        return torch.ones_like(statistics, dtype=torch.float32), torch.zeros_like(statistics, dtype=torch.float32)
    return gamma.detach().to(torch.float32, copy=True), beta.detach().to(torch.float32, copy=True)


class _Recorder:
    """What the hooks of one `Tapped` share: whether it is running, and what they caught."""

    def __init__(self, places: int) -> None:
        self.active = False
        self.places = places
        self.copies: tuple[bool, ...] = ()
        self._clear()

    def _clear(self) -> None:
        self.counts = [0] * self.places
        self.maps: list[Any] = [None] * self.places
        self.originals: list[Any] = [None] * self.places
        self.versions: list[int | None] = [None] * self.places

    def start(self, copies: tuple[bool, ...]) -> None:
        self.copies = copies
        self._clear()
        self.active = True

    def stop(self) -> tuple[list[int], list[Any], list[Any], list[int | None]]:
        """Counts, maps, the tensors as caught and their versions then; nothing of a step outlives the step here."""
        caught = self.counts, self.maps, self.originals, self.versions
        self.active = False
        self._clear()
        return caught


class _Hook:
    """One hook for one tap. An object, not a closure: a deep copy of the network carries hooks of its own."""

    def __init__(self, recorder: _Recorder, slot: int, call: int) -> None:
        self.recorder, self.slot, self.call = recorder, slot, call

    def catch(self, value: Any) -> None:
        recorder, slot = self.recorder, self.slot
        if not recorder.active:
            return
        index = recorder.counts[slot]
        recorder.counts[slot] = index + 1
        if index != self.call:
            return
        # version counters are not part of a compiled graph, and inference tensors have none
        if not torch.compiler.is_compiling() and isinstance(value, Tensor) and not value.is_inference():
            recorder.originals[slot] = value
            recorder.versions[slot] = value._version
        recorder.maps[slot] = value.clone() if recorder.copies[slot] else value


class _InputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.catch(args[0] if args else None)


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.catch(output)


class Tapped(nn.Module):
    """A network that also returns the maps at its taps.

    The network's outputs are the same bit for bit, its state_dict has no further keys, and `model` is the object that
    was given. The hooks are there from construction, so that `torch.compile` traces them, also with ``fullgraph=True``,
    and do nothing outside `forward`; `remove` takes them off.

    Args:
        model: the bare network, not compiled; kept, not copied.
        taps: places to keep; names must differ, "logits" is reserved. May be empty.
        example: normalized images ``[B, 3, H, W]`` on the model's device, one or two are enough. The network is run on
            it twice, in evaluation mode; running statistics, train/eval flags and random generators are left as found.

    Attributes:
        model: the bare network; save and evaluate this one.
        taps: the taps in the order given, with the batch norm of each hand-written ``pre`` tap filled in where the
            example's pass showed one directly before the activation (or before the residual sum).
        shapes: of each tap's map without the batch: (channel, height, width), (channel, token) or (channel,).
        layouts: of each tap's tensor inside the network.
        outputs: shape of the network's own output without its first axis; of a mapping of tensors, such as a
            detector's, name → shape; None if it is neither.

    Raises:
        RequestError: a path that is not in the network or never called, an output that is no tensor or whose layout
            cannot be told, a pre-activation map that only a function call sees, a network that cannot run on the
            example.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], example: Tensor) -> None:
        super().__init__()
        if hasattr(model, "_orig_mod"):
            raise RequestError("Tapped takes the bare network: compile the Tapped one, torch.compile(Tapped(model, …))")
        names = [tap.name for tap in taps]
        for name in names:
            if not _NAME.fullmatch(name) or name == "logits" or names.count(name) > 1:
                raise RequestError(
                    f"tap {name!r}: expected different names of letters, digits, '.', '_', '-', other than 'logits'; "
                    f"found {', '.join(map(repr, names))}"
                )
        self.model = model
        self.taps: tuple[Tap, ...] = tuple(taps)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.layouts: dict[str, Layout] = {}
        self._as_map = tuple(tap.wants_map for tap in self.taps)
        self.outputs: Outputs
        self._expected: tuple[int, ...] = ()
        self._recorder = _Recorder(len(self.taps))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._copies: tuple[bool, ...] = ()
        self._copies_training: tuple[bool, ...] = ()
        self._writes: tuple[int, ...] = ()
        seen = trace(model, example)
        self.outputs = _outputs(logits_of(seen.output))
        if self.taps:
            self._install(seen)
            try:
                self._learn(example)
            except BaseException:
                self.remove()
                raise

    def _install(self, seen: Trace) -> None:
        resolved, expected = [], []
        for slot, tap in enumerate(self.taps):
            call, bn = _resolve(self.model, tap, seen)
            resolved.append(replace(tap, bn=tap.bn or bn))
            tensor = call.input if tap.position == "pre" else call.output
            assert isinstance(tensor, Tensor)  # `_resolve` has looked
            self.layouts[tap.name] = tap_layout(self.model, tap, seen, tensor)
            expected.append(len(seen.of(call.module)))
            if tap.position == "pre":
                # out of place: the same numbers, and one pass over memory less than copying the input
                if len(seen.of(call.module)) <= _FEW_CALLS and getattr(call.module, "inplace", None) is True:
                    call.module.inplace = False  # type: ignore[assignment]
                hook = _InputHook(self._recorder, slot, call.index)
                self._handles.append(call.module.register_forward_pre_hook(hook))
            else:
                self._handles.append(call.module.register_forward_hook(_OutputHook(self._recorder, slot, call.index)))
        self.taps, self._expected = tuple(resolved), tuple(expected)

    def _learn(self, example: Tensor) -> None:
        """Run the example with every map copied, and keep copying those that were overwritten."""
        recorder = self._recorder
        with undisturbed(self.model, example):
            everything = (True,) * len(self.taps)
            recorder.start(everything)
            try:
                self.model(example)
            finally:
                _, copies, originals, versions = recorder.stop()
            # Content as well as version: writing through .data or a foreign kernel leaves no version behind.
            self._copies = tuple(
                tap.position != "end" and (original._version != version or not torch.equal(original, copy))
                for tap, original, version, copy in zip(self.taps, originals, versions, copies, strict=True)
            )
            self._writes = tuple(
                original._version - (version or 0) if tap.position == "end" else 0
                for tap, original, version in zip(self.taps, originals, versions, strict=True)
            )
        # An in-place dropout writes only while training, which the example's pass does not see.
        drops = any(getattr(m, "inplace", False) and "drop" in type(m).__name__.lower() for m in self.model.modules())
        training = tuple(tap.position != "end" for tap in self.taps) if drops else self._copies
        self._copies_training = training
        self.shapes = {name: tuple(value.shape[1:]) for name, value in self._arranged(copies).items()}

    def _arranged(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            tap.name: self.layouts[tap.name].arranged(value, as_map=as_map)
            for tap, value, as_map in zip(self.taps, maps, self._as_map, strict=True)
        }

    def forward(self, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run the network.

        Args:
            x: normalized images ``[B, 3, H, W]``.

        Returns:
            The network's own output (its logits, where they come in a tuple or an object, see `logits_of`), and the map
            of each tap by name, ``[B, C, H, W]``, ``[B, C, N]`` or ``[B, C]``, a view with the dtype, memory and
            autograd graph that the network gave it.

        Raises:
            FeedfastError: the network behaved differently from the example's pass, so a map cannot be trusted.
        """
        self.begin()
        try:
            output = self.model(x)
        except BaseException:
            self._recorder.stop()
            raise
        return self.end(output)

    def begin(self) -> None:
        """Before a pass of the network that somebody else calls: keep its maps; see `feedfast.models.listen`."""
        self._recorder.start(self._copies_training if self.model.training else self._copies)

    def end(self, output: Any) -> tuple[Any, dict[str, Tensor]]:
        """After that pass: what `forward` returns, of what the network has returned; raises as `forward` does."""
        recorder = self._recorder
        counts, maps, originals, versions = recorder.stop()
        for slot, tap in enumerate(self.taps):
            if counts[slot] != self._expected[slot]:
                raise FeedfastError(
                    f"tap {tap.name} ({tap.path}:{tap.position}): its module was called {counts[slot]} times, expected "
                    f"{self._expected[slot]} as on the example; the map would be of another place"
                )
            version = versions[slot]
            written = version is not None and originals[slot]._version != version + self._writes[slot]
            if written and not recorder.copies[slot]:
                raise FeedfastError(
                    f"tap {tap.name} ({tap.path}:{tap.position}): its map was overwritten after it was captured, which "
                    f"did not happen on the example; make the operation that follows it out of place"
                )
        return logits_of(output), self._arranged(maps)

    def remove(self) -> None:
        """Take the hooks off the network; this `Tapped` cannot run afterwards. Activations stay out of place."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _resolve(model: nn.Module, tap: Tap, seen: Trace) -> tuple[Call, str | None]:
    """The call whose output (post) or input (pre) is the tap's map, and the batch norm before that activation."""
    what = f"tap {tap.name}"
    calls = seen.of(find_module(model, tap.path, what))
    if not calls:
        raise RequestError(
            f"{what}: the module at {tap.path!r} is never called in a forward pass; name one inside or around it"
        )
    scope = calls[-1]
    if tap.position != "pre":
        if not isinstance(scope.output, Tensor):
            raise RequestError(
                f"{what}: expected {tap.path!r} to return a tensor, found {type(scope.output).__name__}; "
                f"name a module inside it"
            )
        return scope, None
    last = seen.last_activation(scope)
    if last is None:
        raise RequestError(f"{what}: no activation is called inside {tap.path!r}; use {tap.path}:post, its output")
    if not isinstance(last, Call):
        raise RequestError(
            f"{what}: the last activation inside {tap.path!r} is a function call ({last.name}), which cannot be "
            f"tapped; make it a module (nn.ReLU()), or tap the module that produces its input, with :post"
        )
    if last.input is None:
        raise RequestError(f"{what}: the activation {last.path} is not called with a tensor as first argument")
    return last, seen.batch_norm_before(last)


def tap_layout(model: nn.Module, tap: Tap, seen: Trace, tensor: Tensor) -> Layout:
    """The layout of a tap's tensor, which must be what the tap wants of it.

    Raises:
        RequestError: it cannot be told, or a map is wanted of tokens that form no known grid.
    """
    where = f"tap {tap.name} ({tap.path}:{tap.position})"
    assert isinstance(seen.input, Tensor)
    try:
        found = layout_of(model, seen, tensor, seen.input.shape[0])
    except RequestError as error:
        raise RequestError(f"{where}: {error}; name another module (feedfast taps lists them)") from None
    if found.is_tokens and tap.wants_map and found.grid is None:
        raise RequestError(
            f"{where}: expected tokens that form a grid, found {list(tensor.shape[1:])} per sample, which no "
            f"convolution's grid explains; another tap name, or :tokens after the path, keeps them as tokens"
        )
    return found


def refuse_lone_norms(model: nn.Module, example: Tensor, where: str) -> None:
    """Raise if a batch norm has one value per image and channel: of a single image it could not learn anything.

    Args:
        model: the bare network.
        example: normalized images ``[B, 3, H, W]``.
        where: begins the message.

    Raises:
        RequestError: with the norm's place.
    """
    for call in trace(model, example).calls:
        if is_batch_norm(call.module) and isinstance(call.output, Tensor) and call.output[0, 0].numel() == 1:
            raise RequestError(f"{where}, found 1: the batch norm at {call.path} has one value per image and channel")


def logits_of(output: Any) -> Any:
    """The logits in what a network returns, ``[B, K]`` or per pixel ``[B, K, h, w]``; else the output as it is.

    They are the output itself, ``.logits``, ``["logits"]``, ``["out"]`` (torchvision's segmentation), or a tuple's
    first. Another mapping, such as a detector's, stays what it is.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits", output.get("out"))
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() in (2, 4) else output


def _outputs(output: Any) -> Outputs:
    if isinstance(output, Tensor):
        return tuple(output.shape[1:])
    if isinstance(output, Mapping) and output and all(isinstance(value, Tensor) for value in output.values()):
        return {str(name): tuple(value.shape[1:]) for name, value in output.items()}
    return None
