"""Every `>>>` example of every module runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import superb_probe

PARTS = (
    "superb_probe",
    "superb_probe.upstreams",
    "superb_probe.downstreams",
    "superb_probe.probes",
    "superb_probe.results",
)


def modules() -> Iterator[str]:
    for part in PARTS:
        package = importlib.import_module(part)
        yield part
        yield from (f"{part}.{found.name}" for found in pkgutil.iter_modules(package.__path__) if not found.ispkg)


@pytest.mark.parametrize("name", sorted(modules()))
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail"


def test_the_walk_finds_all_parts() -> None:
    found = set(modules())
    assert {"superb_probe.errors", "superb_probe.upstreams.base", "superb_probe.downstreams.manifest"} <= found
    assert {"superb_probe.probes.plan", "superb_probe.results.record"} <= found
    assert superb_probe.__name__ in found


def test_a_wrong_example_is_caught() -> None:
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module, report=False).failed == 1
