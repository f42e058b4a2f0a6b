"""The recipe's local tier: the folder in which objects of a cache in a bucket are kept as they are read."""

from __future__ import annotations

from feedfast.recipe import Recipe
from feedfast.storage.tier import Tier


def tier_of(recipe: Recipe) -> Tier | None:
    """What ``cache.local`` and ``cache.local_gb`` say; None without them. A cache in a folder makes no use of it.

    Raises:
        RequestError: the folder cannot be made, or not be written to.
    """
    return make_tier(recipe.cache.local, recipe.cache.local_gb)


def make_tier(folder: str, gib: float) -> Tier | None:
    """A tier of ``gib`` GiB; None without a folder."""
    return Tier(folder, int(gib * 2**30)) if folder else None
