"""feedfast: distil from an ensemble of teachers at feature level for the price of plain training.

The names below load on first use, so that `import feedfast` costs nothing. Methods live in `feedfast.methods`,
losses in `feedfast_kernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    # type checkers cannot run `__getattr__`; the aliases say that these are exported
    from feedfast.api import analyze_reconstruction as analyze_reconstruction
    from feedfast.api import cache as cache
    from feedfast.api import chain as chain
    from feedfast.api import compare as compare
    from feedfast.api import copy as copy
    from feedfast.api import demo as demo
    from feedfast.api import doctor as doctor
    from feedfast.api import export as export
    from feedfast.api import factors as factors
    from feedfast.api import fit as fit
    from feedfast.api import inspect as inspect
    from feedfast.api import list_methods as list_methods
    from feedfast.api import list_recipes as list_recipes
    from feedfast.api import plan as plan
    from feedfast.api import sweep as sweep
    from feedfast.api import taps as taps
    from feedfast.api import train as train
    from feedfast.api import verify as verify
    from feedfast.errors import CacheDamageError as CacheDamageError
    from feedfast.errors import CacheMismatchError as CacheMismatchError
    from feedfast.errors import FeedfastError as FeedfastError
    from feedfast.errors import RequestError as RequestError
    from feedfast.recipe import Recipe as Recipe
    from feedfast.recipe import load_recipe as load_recipe
    from feedfast.stages.compare import compare_runs as compare_runs
    from feedfast.stages.distill import distiller as distiller
    from feedfast.stages.offline import run_cache as run_cache
    from feedfast.stages.open_cache import open_cache as open_cache
    from feedfast.stages.student import run_train as run_train

_COMMANDS = (
    "analyze_reconstruction",
    "cache",
    "chain",
    "compare",
    "copy",
    "demo",
    "doctor",
    "export",
    "factors",
    "fit",
    "inspect",
    "list_methods",
    "list_recipes",
    "plan",
    "sweep",
    "taps",
    "train",
    "verify",
)
_HOMES = {
    **dict.fromkeys(_COMMANDS, "feedfast.api"),
    "CacheDamageError": "feedfast.errors",
    "CacheMismatchError": "feedfast.errors",
    "FeedfastError": "feedfast.errors",
    "Recipe": "feedfast.recipe",
    "RequestError": "feedfast.errors",
    "compare_runs": "feedfast.stages.compare",
    "distiller": "feedfast.stages.distill",
    "load_recipe": "feedfast.recipe",
    "open_cache": "feedfast.stages.open_cache",
    "run_cache": "feedfast.stages.offline",
    "run_train": "feedfast.stages.student",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'feedfast' has no attribute {name!r}")
