"""Every command as a function: the same words, the same document, as a frozen dataclass of `feedfast.documents`.

    made = feedfast.cache("recipe.toml", {"cache.views": 2})
    trained = feedfast.fit("recipe.toml", student=network)

The command line calls these functions and prints what they return. A request that is wrong raises a `RequestError`, a
job that breaks off another `FeedfastError`; a check that is not passed, or a sweep with runs that failed, is no error
here: the document says it.
"""

from feedfast.api.jobs import cache, chain, copy, demo, factors, fit, plan, sweep, train
from feedfast.api.looks import (
    analyze_reconstruction,
    compare,
    doctor,
    export,
    inspect,
    list_methods,
    list_recipes,
    taps,
    verify,
)

__all__ = [
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
]
