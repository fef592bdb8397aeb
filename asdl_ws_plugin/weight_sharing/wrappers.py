"""Models in DistributedDataParallel, which averages gradients by itself: by a mean of the ranks'
means, in which a rank that fails leaves the others waiting.

Whether a backward pass averages is decided at the end of the wrapper's forward pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Held", "unsynchronized", "wrappers_of"]


@contextlib.contextmanager
def unsynchronized(model_fn: Any) -> Iterator[None]:
    """Keep the DistributedDataParallel that a function calls from averaging gradients itself.

    They are averaged here, once, with the weights of the ranks and by name; and a rank that fails
    in its backward pass leaves nobody waiting. Buffers are broadcast as ever.

    Raises a ValueError for one that cannot be kept from it.
    """
    held = Held()
    try:
        held.hold(wrappers_of(model_fn))
        yield
    finally:
        held.release()


class Held:
    """Wrappers that are kept from averaging gradients until they are released."""

    def __init__(self) -> None:
        self._before: dict[DistributedDataParallel, bool] = {}

    def hold(self, wrappers: Iterable[DistributedDataParallel]) -> bool:
        """Keep them from it in a forward pass that has not ended yet.

        Returns whether one of them would have averaged.

        Raises a ValueError for one that cannot be kept from it.
        """
        wrappers = list(wrappers)
        if any(wrapper.static_graph for wrapper in wrappers):
            raise ValueError(
                "DistributedDataParallel(static_graph=True) averages gradients without the weights "
                "of the ranks' batches. Make it without static_graph."
            )
        for wrapper in wrappers:
            self._before.setdefault(wrapper, wrapper.require_backward_grad_sync)
            wrapper.require_backward_grad_sync = False
        return any(self._before[wrapper] for wrapper in wrappers)

    def release(self) -> None:
        """Let them average as before. Their next forward pass broadcasts buffers."""
        for wrapper, sync in self._before.items():
            wrapper.require_backward_grad_sync = sync
            wrapper.require_forward_param_sync = True
        self._before.clear()


def wrappers_of(model_fn: Any) -> Iterator[DistributedDataParallel]:
    """Those that a function calls, as far as it can be told."""
    seen: set[DistributedDataParallel] = set()
    for wrapper in _wrappers(model_fn):
        if wrapper not in seen:
            seen.add(wrapper)
            yield wrapper


def _wrappers(model_fn: Any) -> Iterator[DistributedDataParallel]:
    if isinstance(model_fn, nn.Module):
        yield from (m for m in model_fn.modules() if isinstance(m, DistributedDataParallel))
    elif isinstance(model_fn, functools.partial):
        for part in (model_fn.func, *model_fn.args, *model_fn.keywords.values()):
            yield from _wrappers(part)
    elif inspect.ismethod(model_fn):
        yield from _wrappers(model_fn.__self__)
    elif inspect.isfunction(model_fn):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            names = inspect.getclosurevars(model_fn)
            for value in (*names.nonlocals.values(), *names.globals.values()):
                if isinstance(value, nn.Module):
                    yield from _wrappers(value)
