"""Calls of ``F.linear`` with a child's weight, turned into calls of the child.

Some attention modules compute ``F.linear(x, self.qkv.weight, a_bias_made_of_parts)`` and so never
call ``self.qkv``: torchvision's Swin, timm's BEiT, EVA and Swin V2. :class:`RoutedForward` runs
such a module's own forward and calls the child instead, with the bias that was computed, so that
hooks on it fire.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..weight_sharing.blocks import BlocksForward

__all__ = ["LinearForward", "RoutedForward"]

_OWN: Any = object()


class LinearForward:
    """An ``nn.Linear``'s ``forward`` that takes another bias. Set as an attribute of the layer's
    instance.
    """

    def __init__(self, owner: nn.Linear) -> None:
        self.owner = owner
        self.running = False

    def __call__(self, input: Tensor, bias: Tensor | None = _OWN) -> Tensor:
        """The layer called by code that used its weight without a call."""
        self.running = True
        try:
            return F.linear(input, self.owner.weight, self.owner.bias if bias is _OWN else bias)
        finally:
            self.running = False


class RoutedForward:
    """A module's own ``forward``, with its children called where their weights are used. Set on the
    instance.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, with its functional calls routed to layers."""
        owner = self.owner
        with _Router(owner):
            return type(owner).forward(owner, *args, **kwargs)


class _Router(TorchFunctionMode):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.children = {
            id(child.weight): child
            for child in owner.children()
            if isinstance(child.__dict__.get("forward"), (LinearForward, BlocksForward))
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        child: Any = self.children.get(id(weight))
        if child is None or child.forward.running:  # somebody's weight, or the child's own call
            return F.linear(input, weight, bias)
        return child(input) if bias is child.bias else child(input, bias=bias)
