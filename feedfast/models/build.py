"""From a name in a recipe to a network with its weights.

``zoo/…`` are the papers' CIFAR networks, ``torchvision/…`` that library's classifiers, ``timm/…`` timm's (an extra),
``package.module:factory`` any function of the user's that returns an `nn.Module`. Networks are built on the CPU in
fp32, in train mode as their libraries leave them; moving and freezing is the caller's business.

Two promises. A seed makes initialization reproducible and the process's random state is as it was afterwards: the
weights of teacher *b* cannot depend on whether teacher *a* was built first. And a weight file is data: only plain
tensors are unpickled (``weights_only=True``), and every key and shape is compared before anything is copied, so a
wrong file ends in one sentence that says what was expected and what was found.

Not here: downloading anything but the weights a library publishes for its own model, and replacing classifier heads
(published weights come with their own classes; asking for another number of classes is refused, not improvised).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.files import check_zip
from feedfast.models.zoo import ZOO_NAMES, build_zoo

__all__ = ["build_model", "load_weights", "weights_sha256"]

ZOO_CLASSES = 100  # CIFAR-100, what the zoo's networks were published on

# The two torchvision networks that return auxiliary logits with the real ones while training.
_AUXILIARY = ("googlenet", "inception_v3")


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a network.

    Args:
        name: ``zoo/…``, ``torchvision/…``, ``timm/…`` or ``package.module:factory``. A factory is called with the
            keyword ``num_classes`` when one is asked for, else with nothing; it is imported from the installed packages
            or else from the working directory.
        num_classes: rows of the classifier; None = the network's own default (100 for the zoo, else usually 1000).
        weights: None = random initialization; "" = the weights the library publishes for this model (fetched through
            the library, so its cache and its mirrors apply); a path = a state_dict, see `load_weights`;
            for torchvision also the name of one published set such as ``IMAGENET1K_V1``.
            A factory brings its own weights: None and "" both keep what it returned.
        seed: seeds the initialization. None draws from the global generator, unless a file replaces the weights anyway.
            Only torch's CPU generator is seeded, so a factory that draws from NumPy is not covered.

    Returns:
        The network, on the CPU.

    Raises:
        RequestError: unknown name (with close matches), missing extra, weights that cannot be fetched or do not fit.
    """
    fixed = seed is not None or weights is not None
    # devices=[]: building happens on the CPU, and looking at the other generators would start CUDA
    with torch.random.fork_rng(devices=[]) if fixed else contextlib.nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        family, slash, rest = name.partition("/")
        if slash and family == "zoo":
            model = _zoo(rest, num_classes, weights)
        elif slash and family == "torchvision":
            model, weights = _torchvision(rest, num_classes, weights)
        elif slash and family == "timm":
            model = _timm(rest, num_classes, weights)
        elif ":" in name:
            model = _factory(name, num_classes)
        else:
            raise RequestError(
                f"model {name!r} is not known: expected zoo/…, torchvision/…, timm/… or package.module:factory"
                + _guess(name)
            )
    if weights is not None and str(weights) != "":
        load_weights(model, weights, name=name)
    return model


def published_weights(name: str, weights: str) -> bool:
    """Whether ``weights`` of a model mean those that its library publishes, and no file."""
    family, _, rest = name.partition("/")
    if weights == "" or family != "torchvision":
        return weights == "" and family in ("torchvision", "timm")
    tv = importlib.import_module("torchvision.models")
    return rest in tv.list_models(module=tv) and weights in tv.get_model_weights(rest).__members__


def _zoo(rest: str, num_classes: int | None, weights: str | Path | None) -> nn.Module:
    if weights is not None and str(weights) == "":
        raise RequestError(
            f'model zoo/{rest}: weights = "" asks for published weights, and the zoo has none; '
            f"expected the path of a state_dict (feedfast train writes student.pt)"
        )
    return build_zoo(rest, ZOO_CLASSES if num_classes is None else num_classes)


def _torchvision(rest: str, num_classes: int | None, weights: str | Path | None) -> tuple[nn.Module, str | Path | None]:
    """The network and what is left to load into it (a file, or None)."""
    tv = importlib.import_module("torchvision.models")  # half a second of imports that zoo users need not pay

    known = tv.list_models(module=tv)
    if rest not in known:
        raise RequestError(f"model torchvision/{rest} is not known" + _close("torchvision/", rest, known))
    published = tv.get_model_weights(rest)
    chosen: Any = None
    if weights is not None and str(weights) == "":
        chosen = published.DEFAULT
    elif weights is not None and str(weights) in published.__members__:
        chosen = published[str(weights)]
    options: dict[str, Any] = {"aux_logits": False} if rest in _AUXILIARY else {}
    if chosen is None:
        if num_classes is not None:
            options["num_classes"] = num_classes
        if rest in _AUXILIARY:
            options["init_weights"] = True
        return tv.get_model(rest, weights=None, **options), weights
    _same_classes(f"torchvision/{rest}", len(chosen.meta["categories"]), num_classes)
    try:
        # Proves that the file holds plain tensors only; torchvision's own call below then reads the same cached file
        # (it renames keys of some old files, which is why its loader is used and not ours).
        chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        model: nn.Module = tv.get_model(rest, weights=chosen, **options)
    except Exception as error:
        raise _unfetched(f"torchvision/{rest}", chosen.url, error) from error
    return model, None


def _timm(rest: str, num_classes: int | None, weights: str | Path | None) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise RequestError(
            f"model timm/{rest} needs timm, which is not installed: pip install 'feedfast[timm]'"
        ) from error
    # is_model knows architecture names only, which also keeps hub addresses ("hf-hub:user/name") out
    if not timm.is_model(rest):
        raise RequestError(f"model timm/{rest} is not known" + _close("timm/", rest, timm.list_models()))
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if weights is None or str(weights) != "":
            model: nn.Module = timm.create_model(rest, pretrained=False, **options)
            return model
    except RuntimeError as error:  # timm's word for a pretrained tag it does not have
        raise RequestError(f"model timm/{rest} cannot be built: {_first_line(error)}") from error
    try:
        model = timm.create_model(rest, pretrained=True)
    except Exception as error:
        raise _unfetched(f"timm/{rest}", "the Hugging Face hub", error) from error
    _same_classes(f"timm/{rest}", int(getattr(model, "num_classes", 0)), num_classes)
    return model


def _factory(name: str, num_classes: int | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise RequestError(f"model {name!r}: expected package.module:factory, both dotted Python names")
    try:
        with _working_directory_importable():
            target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise RequestError(
            f"model {name}: cannot import {module_name}: {_first_line(error)} "
            f"(looked in the installed packages and in {Path.cwd()})"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n in dir(target) if not n.startswith("_")]
            raise RequestError(f"model {name}: {module_name} has no {attribute!r}" + _close("", part, names))
        target = getattr(target, part)
    if not callable(target):
        raise RequestError(f"model {name}: expected a callable that returns a network, found {type(target).__name__}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        call = "num_classes=…" if options else "no arguments"
        raise RequestError(f"model {name}: the factory must accept a call with {call}: {error}") from error
    except ValueError:
        pass  # a builtin without a signature; the call itself will tell
    model = target(**options)
    if not isinstance(model, nn.Module):
        raise RequestError(f"model {name}: expected the factory to return nn.Module, found {type(model).__name__}")
    return model


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Appends the working directory to the import path: a console script does not have it, and last cannot shadow."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _close(prefix: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(prefix + c for c in close)}?" if close else ""


def _guess(name: str) -> str:
    """For a name without its family: where a network of that name is."""
    tv = importlib.import_module("torchvision.models")

    families = {"zoo": ZOO_NAMES, "torchvision": tv.list_models(module=tv)}
    exact = [f"{family}/{name}" for family, names in families.items() if name in names]
    short = name.rpartition("/")[2]
    near = [
        f"{family}/{close}"
        for family, names in families.items()
        for close in difflib.get_close_matches(short, names, n=2, cutoff=0.6)
    ]
    return f"; did you mean {', '.join(exact or near)}?" if exact or near else ""


def _same_classes(name: str, published: int, asked: int | None) -> None:
    if asked is not None and asked != published:
        raise RequestError(
            f"model {name}: its published weights have {published} classes, expected {asked}; "
            f"train it on these data first (feedfast train, train.source=none) and give that file as weights"
        )


def _unfetched(name: str, where: str, error: Exception) -> RequestError:
    return RequestError(
        f"model {name}: its published weights could not be fetched from {where}: {_first_line(error)}; "
        f"give weights = a state_dict file instead, or run once on a machine with network access and copy its cache"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def load_weights(model: nn.Module, path: str | Path, *, name: str = "model") -> None:
    """Copy a state_dict file into a network, all of it or nothing.

    Accepts a bare state_dict, or one under the key ``state_dict`` or ``model``; the prefixes ``module.`` (data
    parallel) and ``_orig_mod.`` (torch.compile) are dropped when every key has them and the network's own keys do not.
    ``num_batches_tracked`` may be absent, as in files of early PyTorch: evaluation does not read it.

    Args:
        model: receives the weights, on its own device and in its own dtype.
        path: a file written by ``torch.save``; read with ``weights_only=True``.
        name: the model's name, for messages.

    Raises:
        RequestError: no such file, not a file of plain tensors, or keys or shapes that differ.
    """
    state = _strip(_read_state(Path(path), name), model.state_dict().keys())
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    kinds = [
        k for k in expected if k in state and state[k].is_floating_point() != expected[k].is_floating_point()
    ]  # fmt: skip
    if missing or unexpected or shapes or kinds:
        parts = []
        if missing:
            parts.append(_listing("missing", (f"{k} {list(expected[k].shape)}" for k in missing), len(missing)))
        if unexpected:
            parts.append(_listing("not expected", (f"{k} {list(state[k].shape)}" for k in unexpected), len(unexpected)))
        if shapes:
            lines = (f"{k} expected {list(expected[k].shape)}, found {list(state[k].shape)}" for k in shapes)
            parts.append(_listing("of another shape", lines, len(shapes)))
        if kinds:
            lines = (f"{k} expected {expected[k].dtype}, found {state[k].dtype}" for k in kinds)
            parts.append(_listing("of another type", lines, len(kinds)))
        raise RequestError(
            f"weights {path} do not fit model {name}: expected {len(expected)} tensors, found {len(state)}; "
            + "; ".join(parts)
        )
    model.load_state_dict(state, strict=False)


def _listing(what: str, items: Iterable[str], count: int, shown: int = 4) -> str:
    few = [item for item, _ in zip(items, range(shown), strict=False)]
    return f"{count} {what}: " + ", ".join(few) + (", …" if count > shown else "")


def _read_state(path: Path, name: str) -> dict[str, Tensor]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise RequestError(f"weights of model {name}: expected a state_dict file at {path}, found {found}")
    try:
        check_zip(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"weights {path} of model {name}: expected a whole file, found {error}") from error
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged or foreign file
        size = path.stat().st_size
        raise RequestError(
            f"weights {path} of model {name}: expected a state_dict of plain tensors written by torch.save "
            f"(read with weights_only=True), found {size} bytes that are not one ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        what = "an empty mapping" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise RequestError(f"weights {path} of model {name}: expected a mapping of names to tensors, found {what}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RequestError(
                f"weights {path} of model {name}: expected a mapping of names to tensors (bare, or under 'state_dict' "
                f"or 'model'), found {key!r}: {type(value).__name__}"
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise RequestError(
                f"weights {path} of model {name}: {key}: expected a plain tensor with values, "
                f"found {value.layout} on {value.device}, {value.dtype}"
            )
    return dict(loaded)


def _strip(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    names = set(own)
    while True:
        for prefix in ("module.", "_orig_mod."):
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
