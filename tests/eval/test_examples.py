"""The examples in the docstrings of eval/. Collected by path, its files would be imported a second time under another
name, and their data sets registered a second time."""

import doctest
import importlib
import pkgutil

import pytest

import mls.eval
from mls.frameworks import installed as frameworks

NEEDS = {"with_mmseg": "mmseg", "mmseg_parts": "mmseg"}  # files that import a framework
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mls.eval.__path__, "mls.eval.")
    if not (needed := NEEDS.get(module.name.rpartition(".")[2])) or not frameworks.missing(needed)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 10
