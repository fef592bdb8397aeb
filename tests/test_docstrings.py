"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable

# Where a user constructs a class, its docstring shows how.
CONSTRUCTED = [
    "FisherConfig",
    "KfacGradientMaker",
    "MultiheadAttention",
    "NaturalGradientMaker",
    "Segments",
    "WeightSharingLinear",
]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(asdl_ws_plugin.__path__, "asdl_ws_plugin.")
    if not name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run_as_printed(name: str) -> None:
    if name.endswith(".laplace"):
        make_importable()  # torchmetrics, which laplace-torch needs, looks for torchvision
        pytest.importorskip("laplace")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_class_that_users_construct_has_an_example(name: str) -> None:
    doc = getattr(asdl_ws_plugin, name).__doc__
    assert doctest.DocTestParser().get_examples(doc), f"{name}: no example"
