"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asdl_ws_plugin.weight_sharing import registry, torch_private


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same generator state and leaves no other dtype, whatever ran
    before it.
    """
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def registered_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is not there for the others."""
    monkeypatch.setattr(registry, "_operations", dict(registry._operations))


@pytest.fixture(autouse=True)
def function_modes() -> Iterator[None]:
    """Modes that a test leaves, as one that ends within a step does, are not the next one's."""
    modes = torch_private.function_modes()
    yield
    torch_private.set_function_modes(modes)


@pytest.fixture
def double() -> Iterator[None]:
    """Double precision by default, in which the tests of the mathematics compare."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
