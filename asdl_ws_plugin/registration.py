"""Everything this package touches in upstream, in one place.

===========================================  ======================================================================
``asdl.FisherConfig``                        gets a field ``shared_dim``
``asdl.fisher.get_fisher_maker``             knows that field; its code is replaced in place, so that names bound by an
                                             earlier ``from asdl.fisher import get_fisher_maker`` see it too
``NaturalGradientMaker.__init__``,           accept ``shared_dim``; with it, the instance's class gets
``KfacGradientMaker.__init__``               :class:`~asdl_ws_plugin.grad_maker.WeightSharing` mixed in
``asdl.precondition.natural_gradient.nvtx``  a range that does nothing where this build of torch has no NVTX
===========================================  ======================================================================

Without ``shared_dim`` upstream's own code runs, unchanged.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

__all__ = ["register", "require_asdl", "unregister"]

KNOWN_VERSIONS = ("0.1a4", "0.1a5")

_undo: list[Callable[[], None]] = []
_shared_dim: contextvars.ContextVar[Any] = contextvars.ContextVar("shared_dim", default=None)


def require_asdl() -> None:
    """Raise an ImportError unless the ``asdl`` that Python finds is the library this package extends."""
    try:
        import asdl
    except ImportError as error:
        raise ImportError("asdl_ws_plugin extends ASDL, which is not installed: pip install asdfghjkl") from error
    if not hasattr(asdl, "KfacGradientMaker"):
        raise ImportError(
            f"The module 'asdl' at {getattr(asdl, '__file__', '?')} is not the deep-learning library ASDL but an "
            "unrelated package of that name. Uninstall it, and: pip install asdfghjkl"
        )
    try:
        version = metadata.version("asdfghjkl")
    except metadata.PackageNotFoundError:
        version = getattr(asdl, "__version__", "unknown")
    if version not in KNOWN_VERSIONS:
        raise ImportError(
            f"asdl_ws_plugin knows ASDL (asdfghjkl) {' and '.join(KNOWN_VERSIONS)}, but found {version}. "
            "Install a version it knows, or a newer asdl_ws_plugin."
        )


def register() -> None:
    """Let ASDL's gradient makers and configurations accept ``shared_dim``. Run by the import; idempotent."""
    if _undo:
        return
    from asdl import fisher
    from asdl.precondition import natural_gradient

    _extend_config(fisher.FisherConfig)
    _replace_code(fisher.get_fisher_maker, _get_fisher_maker)
    for maker_class in (natural_gradient.NaturalGradientMaker, natural_gradient.KfacGradientMaker):
        _set(maker_class, "__init__", _accept_shared_dim(maker_class.__init__))
    if not _has_nvtx():
        _set(natural_gradient, "nvtx", types.SimpleNamespace(range=_no_range))


def unregister() -> None:
    """Undo :func:`register`. Gradient makers that already exist keep working."""
    while _undo:
        _undo.pop()()


def make_fisher_maker(model: nn.Module, config: Any) -> Any:
    """What ``asdl.get_fisher_maker`` does while this package is registered."""
    from .fisher_maker import FISHER_FORWARD_ONLY, WeightSharingFisherMaker
    from .loss import LOSS_BINARY_CROSS_ENTROPY

    if config.shared_dim is not None:
        return WeightSharingFisherMaker(model, config)
    for value in (config.fisher_type, config.loss_type):
        if value in (FISHER_FORWARD_ONLY, LOSS_BINARY_CROSS_ENTROPY):
            raise ValueError(
                f"'{value}' needs shared_dim; without weight sharing 'reduce' and 'expand' are the same, choose either."
            )
    return _original_get_fisher_maker(model, config)


# ------------------------------------------------------------------------------------------------------ the places

_original_get_fisher_maker: Callable[..., Any]


def _get_fisher_maker(model, config):  # type: ignore[no-untyped-def]  # its code runs with upstream's globals
    from asdl_ws_plugin.registration import make_fisher_maker

    return make_fisher_maker(model, config)


def _replace_code(function: Any, replacement: Any) -> None:
    global _original_get_fisher_maker
    code = function.__code__
    _original_get_fisher_maker = types.FunctionType(code, function.__globals__, function.__name__)
    function.__code__ = replacement.__code__
    _undo.append(lambda: setattr(function, "__code__", code))


def _set(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original))


def _extend_config(config_class: type) -> None:
    """Give a dataclass another field, in place."""
    extended = dataclasses.make_dataclass(
        config_class.__name__, [("shared_dim", Any, dataclasses.field(default=None))], bases=(config_class,)
    )
    init = extended.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.shared_dim is None:  # a gradient maker with shared_dim is creating it
            self.shared_dim = _shared_dim.get()

    __init__.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    _set(config_class, "__init__", __init__)
    for name in ("__repr__", "__eq__", "__dataclass_fields__", "__match_args__"):
        _set(config_class, name, getattr(extended, name))
    config_class.shared_dim = None  # type: ignore[attr-defined]  # for configurations made before
    _undo.append(lambda: delattr(config_class, "shared_dim"))


def _accept_shared_dim(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, shared_dim: Any = None, **kwargs: Any) -> None:
        if shared_dim is None:
            init(self, *args, **kwargs)
            return
        from .grad_maker import check, weight_sharing_class

        maker_class: Any = type(self)
        self.__class__ = weight_sharing_class(maker_class)
        token = _shared_dim.set(shared_dim)
        try:
            init(self, *args, **kwargs)
        finally:
            _shared_dim.reset(token)
        check(self)

    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    option = inspect.Parameter("shared_dim", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], option, *parameters[at:]]
    )
    return __init__


def _has_nvtx() -> bool:
    try:
        with torch.cuda.nvtx.range("asdl_ws_plugin"):
            return True
    except RuntimeError:  # "NVTX functions not installed": a CPU-only build
        return False


@contextlib.contextmanager
def _no_range(*args: Any, **kwargs: Any) -> Any:
    yield
