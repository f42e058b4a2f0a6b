"""feedfast: distil from an ensemble of teachers at feature level for the price of plain training.

The names below load on first use, so that `import feedfast` costs nothing. Methods live in `feedfast.methods`,
losses in `feedfast_kernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, RequestError
    from feedfast.recipe import Recipe, load_recipe
    from feedfast.stages.offline import run_cache
    from feedfast.stages.open_cache import open_cache
    from feedfast.stages.student import run_train

__all__ = [
    "CacheDamageError",
    "CacheMismatchError",
    "FeedfastError",
    "Recipe",
    "RequestError",
    "__version__",
    "load_recipe",
    "open_cache",
    "run_cache",
    "run_train",
]

_HOMES = {
    "CacheDamageError": "feedfast.errors",
    "CacheMismatchError": "feedfast.errors",
    "FeedfastError": "feedfast.errors",
    "RequestError": "feedfast.errors",
    "Recipe": "feedfast.recipe",
    "load_recipe": "feedfast.recipe",
    "run_cache": "feedfast.stages.offline",
    "open_cache": "feedfast.stages.open_cache",
    "run_train": "feedfast.stages.student",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'feedfast' has no attribute {name!r}")
