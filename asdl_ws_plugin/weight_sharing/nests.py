"""The tensors in what a model is called with or returns: containers, and objects that hold them as
attributes, as a ``Data`` of PyG or a dataclass does.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

__all__ = ["holds_tensors_in_sight", "tensors_in"]

# What may hold tensors where they cannot be seen.
_OPAQUE = (
    nn.Module,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    Node,  # what a function of the autograd graph saved is no part of a nest
)
# What holds no tensor. A weak reference holds nothing: PyG's point back at what they are a part of.
_NUMBERS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, weakref.ref)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of containers and objects, in their order. Modules hold none here."""
    for leaf in _leaves(value, set()):
        if isinstance(leaf, Tensor):
            yield leaf


def holds_tensors_in_sight(value: Any) -> bool:
    """Whether there is nothing in a nest that may hold tensors unseen, as functions, modules and
    arrays may.
    """
    return all(
        leaf is None or isinstance(leaf, (Tensor, *_NUMBERS)) for leaf in _leaves(value, set())
    )


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """What is in no container, each thing once. What is seen has to stay alive meanwhile."""
    inner = None if isinstance(value, (Tensor, *_NUMBERS)) else _items(value)
    if inner is None:
        yield value
    elif id(value) not in seen:  # what holds itself ends here
        seen.add(id(value))
        for item in inner:
            yield from _leaves(item, seen)


def _items(value: Any) -> list[Any] | None:
    """What a container or an object holds; ``None`` for what cannot be looked into."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, _OPAQUE):
        return None
    if is_dataclass(value):  # also one that has slots
        return [getattr(value, field.name, None) for field in fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else None
