"""From a name in a recipe to a network with its weights.

``zoo/…`` are the papers' networks, ``torchvision/…`` that library's (classifiers, and `dense.DENSE_NAMES`),
``timm/…`` timm's (an extra), ``package.module:factory`` any function of the user's that returns an `nn.Module`.
Networks are built on the CPU in fp32, in train mode as their libraries leave them; moving and freezing is the caller's
business.

Two promises. A seed makes initialization reproducible and the process's random state is as it was afterwards: the
weights of teacher *b* cannot depend on whether teacher *a* was built first. And a weight file is data
(`feedfast.models.weights`), so a wrong one ends in one sentence that says what was expected and what was found.

Not here: downloading anything but the weights a library publishes for its own model. A classifier of another number of
classes is replaced only where it is asked for (a student's start); a teacher with a random head would teach noise.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedfast.errors import RequestError
from feedfast.models.given import bare, is_given, missing
from feedfast.models.weights import load_backbone, load_state, load_weights, weights_sha256
from feedfast.models.zoo import ZOO_NAMES, build_zoo

__all__ = ["build_model", "load_weights", "weights_sha256"]

log = logging.getLogger(__name__)

# What the zoo's networks were published on: CIFAR-100, and Pascal VOC with and without background.
ZOO_CLASSES = 100
DENSE_CLASSES = {"deeplabv3plus": 21, "ssd300": 20}

# The two torchvision networks that return auxiliary logits with the real ones while training.
_AUXILIARY = ("googlenet", "inception_v3")


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    seed: int | None = None,
    key: str = "",
    prefix: str = "",
    new_head: bool = False,
    backbone: str | Path | None = None,
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
        key: of a weights file, see `load_weights`.
        prefix: likewise.
        new_head: whether weights of another number of classes are taken without their classifier, which then stays
            as it was initialized and is reported; of files and published weights.
        backbone: of a network of segmentation or detection, the weights of the classifier its backbone comes from, in
            place of ``weights``: "" or a name = published by torchvision, a path = its state_dict (``key`` and
            ``prefix`` are of it). None = none.

    Returns:
        The network, on the CPU.

    Raises:
        RequestError: unknown name (with close matches), missing extra, weights that cannot be fetched or do not fit.
    """
    if backbone is not None and weights is not None:
        raise RequestError(
            f"model {name}: backbone: expected none where weights are given, which include the backbone's"
        )
    fixed = seed is not None or weights is not None
    # devices=[]: building happens on the CPU, and looking at the other generators would start CUDA
    with torch.random.fork_rng(devices=[]) if fixed else contextlib.nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        family, slash, rest = name.partition("/")
        if slash and family == "zoo":
            model = _zoo(rest, num_classes, weights)
        elif slash and family == "torchvision":
            model, weights = _torchvision(rest, num_classes, weights, new_head)
        elif slash and family == "timm":
            model = _timm(rest, num_classes, weights, new_head)
        elif is_given(name):
            raise missing(name)
        elif ":" in name:
            model = _factory(name, num_classes)
        else:
            raise RequestError(
                f"model {name!r} is not known: expected zoo/…, torchvision/…, timm/… or package.module:factory"
                + _guess(name)
            )
    if weights is not None and str(weights) != "":
        load_weights(model, weights, name=name, key=key, prefix=prefix, new_head=new_head)
    if backbone is not None:
        _backbone(model, backbone, name, key, prefix)
    return model


def refuse_misnamed(network: nn.Module, name: str, classes: Sequence[int | None], where: str) -> None:
    """Raise unless a network that was passed has the weights, by name and shape, of the one that a recipe names.

    Args:
        network: that was passed.
        name: of the model, which is built for comparison, without weights.
        classes: that it may tell apart; None = the network's own default.
        where: the recipe's table; begins the message.

    Raises:
        RequestError: it has others; the first one is named. Or ``name`` cannot be built.
    """
    found = {key: list(value.shape) for key, value in bare(network).state_dict().items()}
    differing = []
    for count in classes:
        # a factory's code is somebody else's, and may read the values it makes
        with torch.device("meta") if ":" not in name else contextlib.nullcontext():
            named = build_model(name, num_classes=count, weights=None, seed=0)
        expected = {key: list(value.shape) for key, value in named.state_dict().items()}
        other = next((key for key in [*expected, *found] if expected.get(key) != found.get(key)), None)
        if other is None:
            return
        differing.append(f"{other} {expected.get(other, 'not there')}, found {found.get(other, 'none')}")
    raise RequestError(
        f"{where}.model: expected the network passed to be {name}, as the recipe names it: {differing[0]} in "
        f'{type(bare(network)).__name__}; leave the name out of the recipe, or pass {{"model": network}}, which takes '
        "its place"
    )


def published_weights(name: str, weights: str) -> bool:
    """Whether ``weights`` of a model mean those that its library publishes, and no file."""
    family, _, rest = name.partition("/")
    if weights == "" or family != "torchvision":
        return weights == "" and family in ("torchvision", "timm")
    tv = importlib.import_module("torchvision.models")
    return rest in _torchvisions() and weights in tv.get_model_weights(rest).__members__


def _torchvisions() -> list[str]:
    """The networks of torchvision that can be asked for by name."""
    tv = importlib.import_module("torchvision.models")
    return [*tv.list_models(module=tv), *importlib.import_module("feedfast.models.dense").DENSE_NAMES]


def _zoo(rest: str, num_classes: int | None, weights: str | Path | None) -> nn.Module:
    if weights is not None and str(weights) == "":
        raise RequestError(
            f'model zoo/{rest}: weights = "" asks for published weights, and the zoo has none; '
            f"expected the path of a state_dict (feedfast train writes student.pt)"
        )
    if num_classes is None:
        num_classes = DENSE_CLASSES.get(rest.partition("-")[0], ZOO_CLASSES)
    return build_zoo(rest, num_classes)


def _torchvision(
    rest: str, num_classes: int | None, weights: str | Path | None, new_head: bool
) -> tuple[nn.Module, str | Path | None]:
    """The network and what is left to load into it (a file, or None)."""
    tv = importlib.import_module("torchvision.models")  # half a second of imports that zoo users need not pay

    known = _torchvisions()
    if rest not in known:
        raise RequestError(f"model torchvision/{rest} is not known" + _close("torchvision/", rest, known))
    chosen = named_weights(rest, weights)
    dense = importlib.import_module("feedfast.models.dense")
    if chosen is None and rest in dense.DENSE_NAMES:
        return dense.build_dense(rest, num_classes), weights
    options: dict[str, Any] = {"aux_logits": False} if rest in _AUXILIARY else {}
    if chosen is None:
        if num_classes is not None:
            options["num_classes"] = num_classes
        if rest in _AUXILIARY:
            options["init_weights"] = True
            # these two files expect a further normalization inside, which torchvision adds for published weights
            options["transform_input"] = published_file(rest, weights) is not None
        return tv.get_model(rest, weights=None, **options), weights
    published_classes = dense.data_classes(rest, len(chosen.meta["categories"]))
    make = dense.build_dense if rest in dense.DENSE_NAMES else tv.get_model
    if not new_head:
        _same_classes(f"torchvision/{rest}", published_classes, num_classes)
    try:
        # Proves that the file holds plain tensors only; torchvision's own call below then reads the same cached file
        # (it renames keys of some old files, which is why its loader is used and not ours).
        chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        model: nn.Module = make(rest, weights=chosen, **options)
        if num_classes not in (None, published_classes):
            whole, model = model, make(rest, weights=None, num_classes=num_classes, **options)
            load_state(model, whole.state_dict(), "published weights", f"torchvision/{rest}", new_head=True)
    except Exception as error:
        raise _unfetched(f"torchvision/{rest}", chosen.url, error) from error
    return model, None


def _backbone(model: nn.Module, backbone: str | Path, name: str, key: str, prefix: str) -> None:
    published = getattr(model, "published", "")
    if not published:
        raise RequestError(
            f"model {name}: backbone: expected a network with a backbone of torchvision's (zoo/deeplabv3plus-…, "
            f"zoo/ssd300-…, torchvision/deeplabv3_…), found {type(model).__name__}; weights fills a whole network"
        )
    source: Any = backbone
    chosen = named_weights(published, backbone)
    if chosen is not None:
        try:
            source = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except Exception as error:
            raise _unfetched(f"torchvision/{published}", chosen.url, error) from error
    with torch.device("meta"):
        classifier = importlib.import_module("torchvision.models").get_model(published, weights=None)
    load_backbone(model, source, classifier=classifier, name=name, key=key, prefix=prefix)


def named_weights(rest: str, weights: str | Path | None) -> Any:
    """The set of torchvision's published weights that is asked for: "" its default, or one's name; None otherwise."""
    published = importlib.import_module("torchvision.models").get_model_weights(rest)
    if weights is not None and str(weights) == "":
        return published.DEFAULT
    return None if weights is None else published.__members__.get(str(weights))


def published_file(rest: str, weights: str | Path | None) -> Any:
    """The set of torchvision's published weights whose file this is by its name (resnet18-f37072fd.pth), or None."""
    tv = importlib.import_module("torchvision.models")
    name = Path(weights).name if weights is not None else ""
    return next((entry for entry in tv.get_model_weights(rest) if entry.url.rpartition("/")[2] == name), None)


def _timm(rest: str, num_classes: int | None, weights: str | Path | None, new_head: bool) -> nn.Module:
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
        # timm leaves a head of another number of classes at random by itself
        model = timm.create_model(rest, pretrained=True, **(options if new_head else {}))
    except Exception as error:
        raise _unfetched(f"timm/{rest}", "the Hugging Face hub", error) from error
    published_classes = int((getattr(model, "pretrained_cfg", None) or {}).get("num_classes", 0))
    if new_head and num_classes not in (None, published_classes):
        log.warning(
            "published weights of timm/%s: %d classes and not %d: the new classifier starts at random",
            *(rest, published_classes, num_classes),
        )
        return model
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
    families = {"zoo": ZOO_NAMES, "torchvision": _torchvisions()}
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
