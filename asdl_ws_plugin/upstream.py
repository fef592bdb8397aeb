"""Everything this package touches in upstream, in one place.

===============================  ===================================================================
``asdl.FisherConfig``            gets a field ``shared_dim``
``asdl.fisher.get_fisher_maker`` knows that field; its code is replaced in place, so that names
                                 bound by an earlier ``from asdl.fisher import get_fisher_maker``
                                 see it too
``NaturalGradientMaker``,        accept ``shared_dim`` in ``__init__``; with it, the instance's
``KfacGradientMaker``            class gets weight sharing mixed in (:mod:`~asdl_ws_plugin.makers`)
``natural_gradient.nvtx``        a range that does nothing where this build of torch has no NVTX
===============================  ===================================================================

Without ``shared_dim`` upstream's own code runs, unchanged. The classes of
:mod:`~asdl_ws_plugin.makers` need none of this: with ``ASDL_WS_PLUGIN_REGISTER=0`` in the
environment, the import leaves upstream as it is.

An ASDL that carries the patches in ``patches/`` has the core of this package as
``asdl.weight_sharing``. There nothing is touched: the modules of that name here *are* those
(:func:`adopt_native_modules`), with one registry and one set of classes.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

from torch import nn

from .weight_sharing._version import __version__

__all__ = [
    "adopt_native_modules",
    "is_native",
    "register",
    "require_asdl",
    "unregister",
    "wants_registration",
]

KNOWN_VERSIONS = ("0.1a4", "0.1a5")

_undo: list[Callable[[], None]] = []


def require_asdl() -> None:
    """Raise an ImportError unless the ``asdl`` that Python finds is the library this package
    extends.
    """
    try:
        import asdl
    except ImportError as error:
        raise ImportError(
            "asdl_ws_plugin extends ASDL, which is not installed: pip install asdfghjkl"
        ) from error
    if not hasattr(asdl, "KfacGradientMaker"):
        raise ImportError(
            f"The module 'asdl' at {getattr(asdl, '__file__', '?')} is not the deep-learning "
            "library ASDL but an unrelated package of that name. Uninstall it, and: pip install "
            "asdfghjkl"
        )
    try:
        version = metadata.version("asdfghjkl")
    except metadata.PackageNotFoundError:
        version = getattr(asdl, "__version__", "unknown")
    if version not in KNOWN_VERSIONS and not is_native():
        raise ImportError(
            f"asdl_ws_plugin knows ASDL (asdfghjkl) {' and '.join(KNOWN_VERSIONS)}, but found "
            f"{version}. Install a version it knows, or a newer asdl_ws_plugin."
        )


def is_native() -> bool:
    """Whether ASDL itself has weight sharing: it carries the patches."""
    return importlib.util.find_spec("asdl.weight_sharing") is not None


def adopt_native_modules() -> None:
    """Let ``asdl.weight_sharing`` be ``asdl_ws_plugin.weight_sharing``; to be called before any of
    it is used.

    Raises an ImportError if ASDL carries another version of them.
    """
    import asdl.weight_sharing as native

    names = [module.name for module in pkgutil.iter_modules(native.__path__)]
    version = (
        importlib.import_module("asdl.weight_sharing._version").__version__
        if "_version" in names
        else "a part"
    )
    if version != __version__:
        raise ImportError(
            f"This ASDL carries {version} of asdl_ws_plugin, which is {__version__}. Install the "
            "version that it carries, or apply the patches of this one."
        )
    ours = f"{__package__}.weight_sharing"
    sys.modules[ours] = native
    package: Any = sys.modules[__package__]
    package.weight_sharing = native
    for name in names:
        sys.modules[f"{ours}.{name}"] = importlib.import_module(f"asdl.weight_sharing.{name}")


def wants_registration() -> bool:
    """Whether the import shall register: unless ``ASDL_WS_PLUGIN_REGISTER`` is 0.

    Raises an ImportError if that is neither 0 nor 1.
    """
    value = os.environ.get("ASDL_WS_PLUGIN_REGISTER", "1")
    if value not in ("0", "1"):
        raise ImportError(
            "ASDL_WS_PLUGIN_REGISTER has to be 0 (leave ASDL as it is) or 1 (the default), got "
            f"{value!r}."
        )
    return value == "1"


def register() -> None:
    """Let ASDL's gradient makers and configurations accept ``shared_dim``. Run by the import;
    idempotent.
    """
    if _undo or is_native():
        return
    from asdl import fisher
    from asdl.precondition import natural_gradient

    from .makers import FisherConfig, Upstream
    from .weight_sharing import nvtx

    _extend_config(fisher.FisherConfig, FisherConfig)
    _replace_code(fisher.get_fisher_maker, _get_fisher_maker)
    base, kfac = natural_gradient.NaturalGradientMaker, natural_gradient.KfacGradientMaker
    _set(base, "__init__", _accept_shared_dim(base.__init__, Upstream.__init__))
    _set(kfac, "__init__", _accept_shared_dim(kfac.__init__, kfac.__init__))
    if not nvtx.has_nvtx():
        _set(natural_gradient, "nvtx", nvtx)


def unregister() -> None:
    """Undo :func:`register`. Gradient makers that already exist keep working."""
    while _undo:
        _undo.pop()()


def make_fisher_maker(model: nn.Module, config: Any) -> Any:
    """What ``asdl.get_fisher_maker`` does while this package is registered."""
    from .weight_sharing.fisher_maker import find_fisher_maker

    return find_fisher_maker(model, config) or _original_get_fisher_maker(model, config)


_HELP = """
        With asdl_ws_plugin:

        shared_dim (str or list, optional): how layers that share their weight over positions are
            treated: 'expand', 'reduce', 'auto', a strategy registered with register_operation, or a
            list of assignment rules such as
            ['reduce', (nn.Conv2d, 'expand'), ('decoder', 'expand', 'sequence_first')]. None:
            upstream's behaviour.
        fisher_type may also be 'fisher_forward_only' (B is the identity), and loss_type
            'binary_cross_entropy'; var may be a covariance, a tensor (C,) or (C, C). Without
            data_size in the configuration, the curvature is that of the loss that is passed.
"""

# --------------------------------------------------------------------------------------- the places

_original_get_fisher_maker: Callable[..., Any]


# Its code runs with upstream's globals.
def _get_fisher_maker(model, config):  # type: ignore[no-untyped-def]
    from asdl_ws_plugin.upstream import make_fisher_maker

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


def _extend_config(config_class: Any, extended: Any) -> None:
    """Give a dataclass the fields of a class that extends it, in place."""
    for name in ("__init__", "__repr__", "__eq__", "__dataclass_fields__", "__match_args__"):
        _set(config_class, name, getattr(extended, name))
    config_class.shared_dim = None  # for configurations made before
    _undo.append(lambda: delattr(config_class, "shared_dim"))


def _accept_shared_dim(init: Callable[..., None], with_it: Callable[..., None]) -> Any:
    """A constructor that runs ``with_it`` where ``shared_dim`` is given, and ``init`` otherwise."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, shared_dim: Any = None, **kwargs: Any) -> None:
        if shared_dim is None:
            init(self, *args, **kwargs)
            return
        from .makers import construct, mixed_in

        maker_class: Any = type(self)
        self.__class__ = mixed_in(maker_class)
        construct(self, functools.partial(with_it, self, *args, **kwargs), shared_dim)

    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    option = inspect.Parameter("shared_dim", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], option, *parameters[at:]]
    )
    __init__.__doc__ = f"{init.__doc__ or ''}{_HELP}"
    return __init__
