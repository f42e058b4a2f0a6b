from __future__ import annotations

import pytest
from small import digits_recipe

import feedfast
from feedfast.recipe import Recipe
from feedfast.stages.offline import run_cache
from feedfast.stages.open_cache import OpenedCache


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = digits_recipe(tmp_path_factory.mktemp("integrations"))
    run_cache(made)
    return made


@pytest.fixture(scope="session")
def cache(recipe: Recipe) -> OpenedCache:
    return feedfast.open_cache(recipe.cache.path, replay=0)
