"""The submission, loaded from its file as the benchmark does it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from algoperf.runner import EXAMPLE


@pytest.fixture(scope="session")
def submission() -> ModuleType:
    description = importlib.util.spec_from_file_location("submission", EXAMPLE / "submission.py")
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module
