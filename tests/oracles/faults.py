"""Faults for ranks to meet: a backward pass, an inverse or a preconditioned gradient that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from asdl import symmatrix
from torch import Tensor, nn

__all__ = ["FailingBackward", "failing_at"]


class FailingBackward(nn.Module):
    """The identity, whose backward pass can be made to fail."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and self.fails:
            x.register_hook(self._fail)
        return x

    def _fail(self, grad: Tensor) -> None:
        raise ZeroDivisionError("the backward pass failed")


@contextlib.contextmanager
def failing_at(kind: str) -> Iterator[None]:
    """``'inverse'`` or ``'precondition'`` fails in ASDL; anything else does not."""
    holders: dict[str, tuple[Any, str]] = {
        "inverse": (symmatrix, "cholesky_inv"),
        "precondition": (symmatrix.Kron, "mvp"),
    }
    if kind not in holders:
        yield
        return
    holder, name = holders[kind]
    original = getattr(holder, name)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.linalg.LinAlgError(f"the {kind} failed")

    setattr(holder, name, fail)
    try:
        yield
    finally:
        setattr(holder, name, original)
