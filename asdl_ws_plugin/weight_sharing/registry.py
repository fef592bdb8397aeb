"""Which ASDL operation computes the curvature of which layer type under which strategy."""

from __future__ import annotations

from asdl.operations import Operation
from torch import nn

from .blocks import has_blocks

__all__ = [
    "ANY_STRATEGY",
    "NO_STRATEGY",
    "find_operation",
    "is_supported",
    "register_operation",
    "strategies",
    "supported_classes",
]

# Entries that are no strategies. ASDL's own operations, which make rows of all positions, are for
# layers without a strategy only; the layers that are treated the same under every strategy are not
# for those.
NO_STRATEGY, ANY_STRATEGY = "<none>", "<any>"

_operations: dict[tuple[type[nn.Module], str | None], type[Operation]] = {}


def register_operation(
    module_class: type[nn.Module], operation: type[Operation], shared_dim: str | None = None
) -> None:
    """Let ``operation`` compute the curvature of layers of ``module_class`` (and its subclasses).

    After ``register_operation(nn.Linear, MyOperation, shared_dim='mine')`` the value ``'mine'`` is
    accepted wherever ``'reduce'`` is. The operation's ``cov_kron_A``, ``cov_kron_B``, ... receive
    ``in_data`` of shape ``(N, R, features)`` and ``out_grads`` of shape ``(N, R, features)``: N
    examples, R positions that share the weight.

    Args:
        module_class: a subclass of ``torch.nn.Module``.
        operation: a subclass of ``asdl.Operation``; :class:`~.operations.LinearReduce` and its
            siblings are meant to be subclassed.
        shared_dim: the name of the strategy. ``None``: whatever the strategy, unless one is
            registered by name, and where ASDL itself has this registry, without a strategy, too.

    Raises:
        TypeError: an argument is not of that type.
        ValueError: the name is one that ``shared_dim`` gives another meaning.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(
            f"module_class has to be a subclass of torch.nn.Module, got {module_class!r}."
        )
    if not (isinstance(operation, type) and issubclass(operation, Operation)):
        raise TypeError(f"operation has to be a subclass of asdl.Operation, got {operation!r}.")
    if shared_dim is not None and not isinstance(shared_dim, str):
        raise TypeError(f"shared_dim has to be the name of a strategy or None, got {shared_dim!r}.")
    if shared_dim in ("auto", "batch_first", "sequence_first"):
        raise ValueError(
            f"shared_dim={shared_dim!r} has a meaning of its own; choose another name."
        )
    _operations[module_class, shared_dim] = operation


def find_operation(module: nn.Module, strategy: str | None) -> type[Operation] | None:
    """The operation for this module: the nearest class in its hierarchy wins, a strategy's own over
    a general one.
    """
    names = (None, NO_STRATEGY) if strategy is None else (strategy, None, ANY_STRATEGY)
    for cls in type(module).__mro__:
        for name in names:
            if (cls, name) in _operations:
                return _operations[cls, name]
    return None


def is_supported(module: nn.Module) -> bool:
    """Whether any strategy has an operation for this module. A layer that was cut into blocks is
    none itself.
    """
    return isinstance(module, supported_classes()) and not has_blocks(module)


def supported_classes(with_strategy: bool = True) -> tuple[type[nn.Module], ...]:
    """The layer types that some strategy has an operation for, or those that have one without a
    strategy.
    """
    return tuple(
        dict.fromkeys(
            cls
            for cls, name in _operations
            if (name != NO_STRATEGY if with_strategy else name in (None, NO_STRATEGY))
        )
    )


def strategies() -> list[str]:
    """The names that ``shared_dim`` accepts as strategies."""
    return list(
        dict.fromkeys(
            name for _, name in _operations if name not in (None, NO_STRATEGY, ANY_STRATEGY)
        )
    )
