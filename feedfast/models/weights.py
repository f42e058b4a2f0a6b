"""Weight files as people have them, into a network: all of it or nothing, and nothing of a file is ever executed.

A file is data. ``torch.load`` runs with ``weights_only=True``, and every further class that a pickle names (the
command line timm's trainer keeps, NumPy's scalars, Lightning's hyperparameters) is read as an inert stand-in: the real
one is never looked up. safetensors files hold nothing but tensors.

From what was read exactly one mapping of names to tensors is taken (bare, or under a key such as ``state_dict``), one
common prefix is dropped where every key then fits, and every key and shape is compared before anything is copied.
What was chosen is logged; what is not clear ends in one sentence that says which ``key`` or ``prefix`` would help.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.files import check_zip

__all__ = ["load_backbone", "load_state", "load_weights", "weights_sha256"]

log = logging.getLogger(__name__)

State = dict[str, Tensor]
_SAVE = "torch.save(model.state_dict(), 'weights.pt')"
_WRAPPERS = ("module.", "_orig_mod.")  # data parallel, torch.compile
_DEPTH = 3  # of mappings in mappings
_MAX_CLASSES = 1000
# In pickles older than torch 1.6's zip files names cannot be listed beforehand; these are what trainers leave there.
_USUAL = (
    "argparse.Namespace",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.WindowsPath", "collections.defaultdict"),
)
# DenseNet's file names from before torchvision 0.2, which torchvision's own loader mends: norm.1 → norm1.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_AUXILIARY = (
    "AuxLogits.",
    "aux1.",
    "aux2.",
)  # torchvision's Inception and GoogLeNet, whose auxiliary heads are left out


def load_weights(
    model: nn.Module, path: str | Path, *, name: str = "model", key: str = "", prefix: str = "", new_head: bool = False
) -> None:
    """Copy a weights file into a network, all of it or nothing.

    Accepts what ``torch.save`` wrote (a state_dict, or a mapping that holds one: timm's and Lightning's checkpoints,
    ``{net, acc}``, …) and safetensors. ``num_batches_tracked`` may be absent, as in files of early PyTorch: evaluation
    does not read it. torchvision's own files load into torchvision's networks.

    Args:
        model: receives the weights, on its own device and in its own dtype.
        path: the file.
        name: the model's name, for messages.
        key: which mapping to take, dotted where it lies deeper; "" = the one there is.
        prefix: only the entries that begin with it are taken, without it; "" = one that all have, if all fit then.
        new_head: whether a classifier of another number of classes stays as it was initialized, with a warning.

    Raises:
        RequestError: no such file, not a file of plain tensors, or keys or shapes that differ.
    """
    path = Path(path)
    where = f"weights {path} of model {name}"
    state = _chosen(_read(path, where), key, prefix, model, _own(model), where)
    load_state(model, state, f"weights {path}", name, new_head=new_head)


def load_state(model: nn.Module, state: State, what: str, name: str, *, new_head: bool = False) -> None:
    """Copy a state_dict into the network ``name``; ``what`` it is begins the message. See `load_weights`."""
    own = _own(model)
    if new_head:
        state = _without_head(state, own, model, f"{what} of model {name}")
    _refuse_misfit(state, own, f"{what} do not fit model {name}")
    model.load_state_dict(state, strict=False)


def load_backbone(
    model: nn.Module, source: State | str | Path, *, classifier: nn.Module, name: str, key: str = "", prefix: str = ""
) -> None:
    """Copy a classifier's weights into the backbone of a network of segmentation or detection.

    Args:
        model: has ``backbone``; the rest stays as it is.
        source: the classifier's state_dict, or a file of it as `load_weights` takes it.
        classifier: the network it is of; only its names and shapes are read, so it may be on the meta device.
        name: of the model, for messages.
        key: of a file, see `load_weights`.
        prefix: likewise.

    Raises:
        RequestError: as `load_weights`; that a file has a classifier of its own, or none, is no fault.
    """
    theirs = _own(classifier)
    own = {_published_name(k, model): v for k, v in model.get_submodule("backbone").state_dict().items()}
    own = {k: v for k, v in own.items() if k in theirs}
    if isinstance(source, Mapping):
        state, what = source, "published backbone weights"
    else:
        what = f"backbone weights {source}"
        where = f"{what} of model {name}"
        state = _chosen(_read(Path(source), where), key, prefix, classifier, theirs, where)
    left_out = sorted({k.rpartition(".")[0] for k in state if k in theirs and k not in own})
    state = {k: v for k, v in state.items() if k not in theirs or k in own}
    _refuse_misfit(state, own, f"{what} do not fit the backbone of model {name}", theirs)
    if left_out:
        log.info("%s of model %s: not the backbone's and left out: %s", what, name, ", ".join(_heads(left_out)))
    with torch.no_grad():
        for k, value in state.items():
            own[k].copy_(value)


def _heads(names: Iterable[str]) -> list[str]:
    """Modules in few words: fc, layer4, features.18."""
    short = {".".join(name.split(".")[: 2 if name.startswith(("features.", "classifier.")) else 1]) for name in names}
    return sorted(short)


def _published_name(key: str, model: nn.Module) -> str:
    """What torchvision's classifier calls a tensor of the backbone."""
    kind = getattr(model, "published", "")
    if kind == "vgg16":  # the detector's second part begins with the pooling after conv4_3
        found = re.fullmatch(r"extra\.0\.(\d+)\.(\w+)", key)
        return f"features.{int(found[1]) + 23}.{found[2]}" if found else key
    return f"features.{key}" if kind == "mobilenet_v3_large" else key


def _own(model: nn.Module) -> State:
    return {k: value for k, value in model.state_dict().items() if isinstance(value, Tensor)}


def _read(path: Path, where: str) -> object:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise RequestError(f"{where}: expected a state_dict file, found {found} there")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, where)
    try:
        check_zip(path)
    except (OSError, ValueError) as damage:
        raise RequestError(f"{where}: expected a whole file, found {damage}") from damage
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file, or a damaged one: the next read tells
        names = list(_USUAL)
    while True:
        try:
            with torch.serialization.safe_globals([(_stand_in(name), name) for name in names[:_MAX_CLASSES]]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as failed:  # torch.load raises half a dozen types for a damaged or foreign file
            error = failed
        further = _blocking(error)
        if not further or len(names) >= _MAX_CLASSES or further[0] in names:
            raise RequestError(
                f"{where}: expected a state_dict of plain tensors written by torch.save (read with weights_only=True), "
                f"found {path.stat().st_size} bytes that are not one ({type(error).__name__}{_blocked(error)}); "
                f"if it loads where it was made, save it there with {_SAVE}"
            ) from error
        names += further


def _read_safetensors(path: Path, where: str) -> object:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise RequestError(f"{where}: needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # its own exception type, and OSError
        raise RequestError(f"{where}: expected a whole safetensors file: {str(error)[:200]}") from error


class _Pickled:
    """Stands for an object of a class that is never looked up; its state is dropped but for what it was."""

    path = ""
    network = False  # a class attribute: what is unpickled is made without __init__

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """A mapping's entries follow its making, and torch's reader fills plain ones only."""
        return OrderedDict() if cls.path.lower().endswith("dict") else super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything: a pickle may call what it names."""

    def __setstate__(self, state: Any) -> None:
        self.network = isinstance(state, Mapping) and "_modules" in state and "_parameters" in state


def _stand_in(name: str) -> type[_Pickled]:
    return type("Pickled", (_Pickled,), {"path": name})


def _blocking(error: Exception) -> list[str]:
    """The class that torch's reader would not look up, as a pickle may name it; [] where something else was wrong."""
    found = re.search(r"Unsupported global: GLOBAL (\S+) was", str(error))
    if not found:
        return []
    # of a builtin the message leaves its module out, which Python 2 called otherwise
    return [found[1]] if "." in found[1] else [f"builtins.{found[1]}", f"__builtin__.{found[1]}"]


def _blocked(error: Exception) -> str:
    """What torch's reader says it was stopped by, in a few words."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if "TorchScript" in str(error):
        return ": a TorchScript archive"
    return f": it names {found[1]}" if found else ""


def _tensors(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _mappings(tree: object, key: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every mapping of names to tensors in what was read, with its dotted key; "" = the file itself."""
    if _tensors(tree):
        yield key, dict(tree)  # type: ignore[call-overload]
    elif isinstance(tree, Mapping) and depth < _DEPTH:
        for name, value in tree.items():
            if isinstance(name, str) and name not in ("optimizer", "optimizer_states", "optim"):
                yield from _mappings(value, f"{key}.{name}" if key else name, depth + 1)


def _is_average(key: str) -> bool:
    return "ema" in re.split(r"[._-]", key.lower()) or "averaged" in key.lower()


def _chosen(loaded: object, key: str, prefix: str, model: nn.Module, own: Mapping[str, Tensor], where: str) -> State:
    """The one mapping meant, with the network's own names."""
    network = next(_networks(loaded), None)
    found = dict(_mappings(loaded))
    if not found and network is not None:
        raise RequestError(
            f"{where}: holds a whole pickled network, {network.path}, which is never unpickled; where it was made, "
            f"save its weights alone: {_SAVE}"
        )
    if not found:
        raise RequestError(
            f"{where}: expected a mapping of names to tensors (read with weights_only=True), found {_described(loaded)}"
        )
    if key:
        if key not in found:
            raise RequestError(f"{where}: key: expected {' | '.join(map(repr, found))}, found {key!r}")
        return _named_as(found[key], prefix, model, own, where)
    plain = {k: state for k, state in found.items() if not _is_average(k)} or found
    if len(plain) > 1:
        fitting = {
            k: state
            for k, state in plain.items()
            if _fits(_named_as(state, prefix, model, own, where, quiet=True), own)
        }
        if len(fitting) != 1:
            raise RequestError(
                f"{where}: expected one mapping of names to tensors, found {len(plain)}, of which {len(fitting)} fit; "
                f"key says which: {' | '.join(map(repr, found))}"
            )
        plain = fitting
    ((taken, state),) = plain.items()
    if taken:
        log.info("%s: taken from its key %r", where, taken)
    averages = [k for k in found if _is_average(k) and k != taken]
    if averages:
        log.warning(
            "%s: %r is taken, and averaged weights (EMA) lie there too: key = %r takes them", where, taken, averages[0]
        )
    return _named_as(state, prefix, model, own, where)


def _networks(tree: object, depth: int = 0) -> Iterator[_Pickled]:
    if isinstance(tree, _Pickled) and tree.network:
        yield tree
    elif isinstance(tree, Mapping) and depth < _DEPTH:
        for value in tree.values():
            yield from _networks(value, depth + 1)


def _described(loaded: object) -> str:
    if not isinstance(loaded, Mapping):
        return f"a pickled {loaded.path}" if isinstance(loaded, _Pickled) else type(loaded).__name__
    if not loaded:
        return "an empty mapping"
    inner = next((value for value in loaded.values() if isinstance(value, Mapping) and value), loaded)
    k, value = next((item for item in inner.items() if not isinstance(item[1], Tensor)), next(iter(inner.items())))
    return f"{str(k)[:80]!r}: {_described(value) if isinstance(value, _Pickled) else type(value).__name__}"


def _named_as(
    state: State, prefix: str, model: nn.Module, own: Mapping[str, Tensor], where: str, *, quiet: bool = False
) -> State:
    """The state under the network's own names: without its prefix, and without what torchvision has given up."""
    if prefix:
        dotted = prefix if prefix.endswith(".") else f"{prefix}."
        kept = {k.removeprefix(dotted): v for k, v in state.items() if k.startswith(dotted)}
        if not kept:
            heads = sorted({k.partition(".")[0] + "." for k in state})
            raise RequestError(f"{where}: prefix: expected one of {heads[:8]}, found {prefix!r}")
        if len(kept) < len(state) and not quiet:
            log.info("%s: %d entries without the prefix %r are left out", where, len(state) - len(kept), dotted)
        return _torchvisions(kept, model, own)
    state = _torchvisions(_strip(state, own), model, own)
    shared = _shared_prefix(state)
    while shared and not _fits(state, own):
        renamed = _torchvisions({k.removeprefix(shared): v for k, v in state.items()}, model, own)
        if _names_fit(renamed, own):
            if not quiet:
                log.info("%s: the prefix %r of every key is dropped", where, shared)
            return renamed
        shared = shared[: shared.rstrip(".").rfind(".") + 1]
    return state


def _shared_prefix(state: State) -> str:
    """The longest run of whole path parts that every key begins with."""
    first, last = min(state), max(state)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first[:same].rfind(".") + 1]


def _torchvisions(state: State, model: nn.Module, own: Mapping[str, Tensor]) -> State:
    """torchvision's own files in torchvision's networks: old names of DenseNet, heads that are not built."""
    kind = type(model).__name__
    if kind == "DenseNet":
        renamed = {k: _OLD_DENSENET.sub(r"\1\2", k) for k in state}
        return {renamed[k] if renamed[k] in own else k: v for k, v in state.items()}
    auxiliary = _AUXILIARY if kind in ("Inception3", "GoogLeNet") else getattr(model, "AUXILIARY", ())
    if auxiliary and not any(k.startswith(auxiliary) for k in own):
        return {k: v for k, v in state.items() if not k.startswith(auxiliary)}
    return state


def _required(own: Mapping[str, Tensor]) -> set[str]:
    return {k for k in own if not k.endswith("num_batches_tracked")}


def _names_fit(state: State, own: Mapping[str, Tensor]) -> bool:
    return state.keys() <= own.keys() and _required(own) <= state.keys()


def _fits(state: State, own: Mapping[str, Tensor]) -> bool:
    return _names_fit(state, own) and all(v.shape == own[k].shape for k, v in state.items())


def _without_head(state: State, own: Mapping[str, Tensor], model: nn.Module, where: str) -> State:
    """The state without a classifier of another number of classes; whatever else differs is left to be refused."""
    other = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    heads = {k.rpartition(".")[0] for k in other}
    names = list(own)
    last = bool(other) and set(names[min(names.index(k) for k in other) :]) == set(other)
    # a detector's is not its last module, and has a row per default box and class, background counted
    detector: str = getattr(model, "HEAD", "")
    last = last or bool(other and detector and all(k.startswith(detector) for k in other))
    linear = last and all(
        own[k].dim() in (1, 2, 4) and state[k].shape[1:] == own[k].shape[1:] and k.endswith(("weight", "bias"))
        for k in other
    )
    ratios = {Fraction(state[k].shape[0], own[k].shape[0]) for k in other} if linear else set()
    if len(ratios) != 1:
        return state
    here = int(
        cast("Any", model.get_submodule(detector.rstrip("."))).num_columns if detector else own[other[0]].shape[0]
    )
    background = 1 if detector else 0
    log.warning(
        "%s: its classifier %s has %s classes and not %d: the new one starts at random, all else is taken",
        *(where, ", ".join(sorted(heads)), ratios.pop() * here - background, here - background),
    )
    return {k: own[k] if k in other else v for k, v in state.items()}


def _refuse_misfit(state: State, own: Mapping[str, Tensor], where: str, spare: Iterable[str] = ()) -> None:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and state[k].shape != own[k].shape]
    kinds = [k for k in own if k in state and state[k].is_floating_point() != own[k].is_floating_point()]
    odd = [k for k, v in state.items() if v.layout != torch.strided or v.is_meta or v.is_quantized or v.is_nested]
    if not (missing or unexpected or shapes or kinds or odd):
        return
    parts = []
    if missing:
        parts.append(_listing("missing", (f"{k} {list(own[k].shape)}" for k in missing), len(missing)))
    if unexpected:
        parts.append(_listing("not expected", (f"{k} {list(state[k].shape)}" for k in unexpected), len(unexpected)))
    if shapes:
        lines = (f"{k} expected {list(own[k].shape)}, found {list(state[k].shape)}" for k in shapes)
        parts.append(_listing("of another shape", lines, len(shapes)))
    if kinds:
        lines = (f"{k} expected {own[k].dtype}, found {state[k].dtype}" for k in kinds)
        parts.append(_listing("of another type", lines, len(kinds)))
    if odd:
        lines = (f"{k} {state[k].layout} on {state[k].device}" for k in odd)
        parts.append(_listing("not plain tensors with values", lines, len(odd)))
    raise RequestError(
        f"{where}: expected {len(own)} tensors, found {len(state)}; " + "; ".join(parts) + _hint(state, own, spare)
    )


def _hint(state: State, own: Mapping[str, Tensor], spare: Iterable[str] = ()) -> str:
    """The prefix under which all of the network lies, if there is one; what ``spare`` names may lie there, too."""
    required = _required(own)
    example = next((k for k in own if k in required), "")
    for head in [k.removesuffix(example) for k in state if example and k.endswith(f".{example}")]:
        inner = {n.removeprefix(head) for n in state if n.startswith(head)}
        if required <= inner <= own.keys() | set(spare):
            return f"; prefix = {head!r} takes the {len(inner)} of them that are this network's"
    return ""


def _listing(what: str, items: Iterable[str], count: int, shown: int = 4) -> str:
    few = [item for item, _ in zip(items, range(shown), strict=False)]
    return f"{count} {what}: " + ", ".join(few) + (", …" if count > shown else "")


def _strip(state: State, own: Iterable[str]) -> State:
    names = set(own)
    while True:
        for prefix in _WRAPPERS:
            wrapped = all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in names)
            if state and wrapped:
                state = {k.removeprefix(prefix): v for k, v in state.items()}
                break
        else:
            return state


def weights_sha256(model: nn.Module) -> str:
    """Identity of a network's weights: sha256 over name, dtype, shape and bytes of each entry of the sorted state_dict.

    The same for any device, memory format and `torch.compile` or data-parallel wrapper; different when one bit differs,
    buffers (batch norm statistics) included.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name, tensor in sorted(_strip(tensors, ()).items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
