"""Which tensors were computed from the model's arguments, and which from constants alone.

Looked at in one forward pass, the first of a training: a positional encoding that goes through a
layer has no example to average over, however many rows it has.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nests import holds_tensors_in_sight, tensors_in

__all__ = ["Lineage", "tracing"]


class Lineage(TorchFunctionMode):
    """Marks what functions of marked tensors return.

    Attributes:
        is_complete: whether the model was called, with arguments whose tensors could all be found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_complete = False
        self._marked: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.knows((args, kwargs)):
            self.mark(output)
            name = getattr(func, "__name__", "")
            if args and (name == "__setitem__" or name.rstrip("_") + "_" == name):  # in place
                self.mark(args[0])
        return output

    def mark(self, value: Any) -> None:
        """Take the tensors in a nest for computed from the model's arguments."""
        for tensor in tensors_in(value):
            self._marked[id(tensor)] = weakref.ref(tensor)

    def knows(self, value: Any) -> bool:
        """Whether one of the tensors in a nest is marked."""
        return any(
            (mark := self._marked.get(id(tensor))) is not None and mark() is tensor
            for tensor in tensors_in(value)
        )

    def from_input(self, tensor: Tensor) -> bool | None:
        """Whether a tensor depends on the model's arguments; ``None`` if that is not known."""
        return self.knows(tensor) if self.is_complete else None

    def start(self, args: Any, kwargs: Any) -> None:
        """Mark the model's arguments."""
        has_tensors = any(True for _ in tensors_in((args, kwargs)))
        self.is_complete = has_tensors and holds_tensors_in_sight((args, kwargs))
        self.mark((args, kwargs))


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[Lineage]:
    """Follow the model's arguments through its functions and modules while the context is open."""
    lineage = Lineage()

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        lineage.start(args, kwargs)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Whatever it does: autograd functions of its own are not seen otherwise.
        if lineage.knows((args, kwargs)):
            lineage.mark(output)

    handles = [model.register_forward_pre_hook(before, prepend=True, with_kwargs=True)]
    # Not a hook for all modules at once, which torch.compile warns of.
    handles += [
        module.register_forward_hook(after, prepend=True, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with lineage:
            yield lineage
    finally:
        for handle in handles:
            handle.remove()
