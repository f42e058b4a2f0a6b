"""Tiers of the kernels' tests: what compiles for real architectures, and long runs in Triton's interpreter.

Of every test that runs in the interpreter one case stays in the plain tier for each value of the arguments that select
code in a kernel, so that a broken one is seen at once; the other cases are marked ``interpreter``. (A case itself goes
through the memory formats, and so needs no argument for them.)
"""

from __future__ import annotations

import pytest
import torch

SELECTS_CODE = ("codec", "kind", "average", "direction")


@pytest.fixture(autouse=True)
def _nothing_compiled(request: pytest.FixtureRequest) -> None:
    """Dynamo gives up on a function after eight ways of calling it: each test that compiles begins without others'."""
    if "compile" in request.node.name:
        torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[tuple[str, ...]] = set()
    for item in items:
        if "tests/kernels/" not in item.path.as_posix():
            continue
        if item.path.name == "test_compile.py":
            item.add_marker(pytest.mark.compile)
        elif item.path.name.endswith("_kernel.py") and not item.get_closest_marker("gpu"):
            arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            selected = [f"{name}={arguments[name]}" for name in SELECTS_CODE if name in arguments]
            case = (item.path.name, getattr(item, "originalname", item.name), *selected)
            if case in seen:
                item.add_marker(pytest.mark.interpreter)
            seen.add(case)
