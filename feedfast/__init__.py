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
    from feedfast.api import cache as cache
    from feedfast.api import fit as fit
    from feedfast.api import train as train
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

_HOMES = {
    **dict.fromkeys(("cache", "fit", "train"), "feedfast.api"),
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
