"""Tiers of the kernels' tests: what compiles for real architectures, and long runs in Triton's interpreter.

Of every test that runs in the interpreter its first case stays in the plain tier, so that a broken kernel is seen at
once; the other cases are marked ``interpreter``.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if "tests/kernels/" not in item.path.as_posix():
            continue
        if item.path.name == "test_compile.py":
            item.add_marker(pytest.mark.compile)
        elif item.path.name.endswith("_kernel.py") and not item.get_closest_marker("gpu"):
            name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
            if name in seen:
                item.add_marker(pytest.mark.interpreter)
            seen.add(name)
