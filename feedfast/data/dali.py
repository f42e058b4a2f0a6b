"""The one place that imports DALI, and what is wrong with an installation of it.

NVIDIA publishes DALI once per major version of CUDA, as packages of different names that install the same modules, so
no list of dependencies can hold "the right one": `feedfast[cuda13]` and `feedfast[cuda12]` choose. Only decoding
needs it. What reads recipes, networks and caches works without, so it is loaded where the first image is asked for,
and jobs that will ask for one look first (`require_dali`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any, Final

import torch

from feedfast.errors import RequestError

__all__ = ["EXTRAS", "dali_packages", "dali_version", "dali_warnings", "load_dali", "require_dali", "torch_plugin"]

EXTRAS: Final[dict[str, str]] = {"13": "nvidia-dali-cuda130", "12": "nvidia-dali-cuda120"}
"""Major version of CUDA → the package that the extra ``cuda`` and that number brings."""


def require_dali() -> None:
    """Raise a `RequestError` unless DALI can be imported: for jobs that decode, before they do anything else."""
    load_dali()


@functools.cache  # also tells DALI's autograph, which rewrites what a graph calls, to leave this alone
def load_dali() -> tuple[Any, Any, Any]:
    """DALI, its operators and its types; untyped, because its stubs are partial and wrong for per-sample arguments.

    Raises:
        RequestError: it is not installed, or a library that it needs is missing.
    """
    return _module("nvidia.dali"), _module("nvidia.dali.fn"), _module("nvidia.dali.types")


def torch_plugin() -> Any:
    """What copies DALI's GPU batches into tensors."""
    return _module("nvidia.dali.plugin.pytorch")


def dali_version() -> str:
    """Of the DALI that runs the graph."""
    return str(load_dali()[0].__version__)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        held = ", ".join(f"{package} {number}" for package, number in dali_packages().items())
        found = f"{held}, which cannot be imported ({error})" if held else "none"
        raise RequestError(
            f"NVIDIA DALI, which decodes and augments the images: expected to be installed, found {found}; "
            f"{_advice(torch.version.cuda)}"
        ) from error


def _advice(cuda: str | None) -> str:
    """Which extra to install: that of torch's CUDA, e.g. "13.0"; a torch without CUDA goes with both."""
    both = "pip install 'feedfast[cuda13]' or 'feedfast[cuda12]' (of a clone: '.[cuda13]' or '.[cuda12]')"
    rule = "the one with the major version of torch.version.cuda"
    here = f"cuda{cuda.partition('.')[0]}" if cuda else "it has none, so either"
    return f"{both}: {rule}, which is {cuda or 'None'} here: {here}"


def dali_packages() -> dict[str, str]:
    """Installed packages of DALI, by name in lower case → version; more than one overwrite each other's files."""
    names = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    return {name.lower(): number for name, number in names.items() if name and name.lower().startswith("nvidia-dali-")}


def dali_warnings(packages: Mapping[str, str] | None = None, cuda: str | None = torch.version.cuda) -> list[str]:
    """What is wrong with DALI as it is installed, one sentence each; without DALI that is said, too.

    Args:
        packages: as of `dali_packages`; None = this Python's.
        cuda: what torch is built with, e.g. "13.0"; None = without CUDA, which goes with any.
    """
    found = dali_packages() if packages is None else dict(packages)
    if not found:
        return [f"NVIDIA DALI: not installed, so no image can be decoded; {_advice(cuda)}"]
    names = " and ".join(found)
    if len(found) > 1:
        return [
            f"NVIDIA DALI: expected one package, found {names}, which overwrite each other's files; "
            f"pip uninstall {' '.join(found)}, then {_advice(cuda)}"
        ]
    major = (cuda or "").partition(".")[0]
    if major in EXTRAS and EXTRAS[major] not in found:
        return [
            f"NVIDIA DALI: expected {EXTRAS[major]} for torch's CUDA {cuda}, found {names}: two CUDA runtimes in one "
            f"process; pip uninstall {names}, then pip install 'feedfast[cuda{major}]'"
        ]
    return []
