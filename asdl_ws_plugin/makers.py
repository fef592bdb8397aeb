"""ASDL's natural-gradient makers with ``shared_dim``, as classes of their own.

They change nothing in ASDL. The keyword ``shared_dim`` of ASDL's own classes
(:mod:`~asdl_ws_plugin.upstream`) is a shorter way to the same; who does not want a library changed
by an import sets ``ASDL_WS_PLUGIN_REGISTER=0`` and constructs these.

Each class is ASDL's with :class:`~.weight_sharing.grad_maker.WeightSharing` in front and
:class:`Upstream` behind, so that ASDL's own constructors run in between, unchanged.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asdl
from asdl.precondition import natural_gradient
from torch import nn

from .upstream import is_native
from .weight_sharing import nvtx
from .weight_sharing.fisher_maker import NO_LAYERS, find_fisher_maker
from .weight_sharing.grad_maker import WeightSharing, check, weight_sharing_class
from .weight_sharing.reading import LOSS_AUTO
from .weight_sharing.torch_private import unwrapped

__all__ = [
    "DiagNaturalGradientMaker",
    "EkfacGradientMaker",
    "EmpNaturalGradientMaker",
    "FisherConfig",
    "FullNaturalGradientMaker",
    "KfacGradientMaker",
    "LayerWiseNaturalGradientMaker",
    "NaturalGradientMaker",
    "UnitWiseNaturalGradientMaker",
    "get_fisher_maker",
]

# ------------------------------------------------------------------------------- Fisher matrices


@dataclass
class FisherConfig(asdl.FisherConfig):
    """ASDL's configuration of a Fisher matrix, with one more field.

    Args:
        shared_dim: as of :class:`KfacGradientMaker`; ``None`` is ASDL's own Fisher matrix.

    All others are ASDL's, in its order.

    >>> import asdl_ws_plugin, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    >>> config = asdl_ws_plugin.FisherConfig(
    ...     "fisher_exact", ["kron"], loss_type="cross_entropy", data_size=16, shared_dim="expand"
    ... )
    >>> maker = asdl_ws_plugin.get_fisher_maker(model, config)
    >>> logits = maker.setup_model_call(model, torch.randn(16, 5, 6))
    >>> _ = maker.forward_and_backward()
    >>> model[0].fisher.kron.A.shape, model[0].fisher.kron.B.shape
    (torch.Size([6, 6]), torch.Size([8, 8]))
    """

    shared_dim: Any = None


def get_fisher_maker(model: nn.Module, config: Any) -> Any:
    """The maker of the Fisher matrix that a :class:`FisherConfig` describes.

    Raises a ValueError for a configuration without ``shared_dim`` of a type that needs it.
    """
    # A configuration of ASDL's own class has no such field where nothing is registered.
    maker = find_fisher_maker(model, config) if hasattr(config, "shared_dim") else None
    return maker or asdl.get_fisher_maker(model, config)


# ------------------------------------------------------------------------------- how they are built


def _with_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of a function that finds these names instead of its module's; the original stays."""
    function = inspect.unwrap(function)
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)


class Upstream(natural_gradient.NaturalGradientMaker):
    """ASDL's base class with the few names that its code looks up replaced by this package's."""

    _shared_dim: Any

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        model = unwrapped(model)
        if is_native():  # its constructor knows the keyword
            super().__init__(model, *args, **{**kwargs, "shared_dim": self._shared_dim})
            return
        init = _with_globals(
            natural_gradient.NaturalGradientMaker.__init__,
            FisherConfig=functools.partial(FisherConfig, shared_dim=self._shared_dim),
            get_fisher_maker=get_fisher_maker,
        )
        init(self, model, *args, **kwargs)

    # A build of torch without NVTX cannot enter the ranges that this method names.
    update_preconditioner = _with_globals(
        natural_gradient.NaturalGradientMaker.update_preconditioner, nvtx=nvtx
    )


def _is_given(name: str, call: functools.partial[None]) -> bool:
    """Whether a call passes an argument, by its name or by its place."""
    bound = inspect.signature(call.func).bind_partial(*call.args, **call.keywords)
    return name in call.keywords or name in bound.arguments


def construct(maker: Any, init: functools.partial[None], shared_dim: Any) -> None:
    """Run a constructor of ASDL's on a gradient maker whose class has :class:`Upstream` in it.

    A ``loss_type`` that is left out is read from the loss; ASDL's default is its own affair.

    Raises a ValueError if there is no layer to precondition, or an option makes no sense.
    """
    maker._shared_dim = shared_dim
    try:
        (init if _is_given("loss_type", init) else functools.partial(init, loss_type=LOSS_AUTO))()
    except StopIteration as error:  # ASDL takes the device from a supported layer's Parameter
        raise ValueError(NO_LAYERS) from error
    check(maker)


@functools.cache
def mixed_in(maker_class: Any) -> Any:
    """A gradient maker's class, a user's own included, with weight sharing mixed in."""
    if issubclass(maker_class, WeightSharing):
        return maker_class
    base = weight_sharing_class(maker_class)
    return type(
        maker_class.__name__,
        (base, Upstream),
        {"__doc__": maker_class.__doc__, "__module__": maker_class.__module__},
    )


class _WithSharedDim(WeightSharing):
    """What the classes below have in common: the keyword ``shared_dim``."""

    def __init__(
        self,
        model: nn.Module,
        config: asdl.PreconditioningConfig,
        *args: Any,
        shared_dim: Any = "auto",
        **kwargs: Any,
    ) -> None:
        if shared_dim is None:
            raise ValueError(
                "shared_dim=None is ASDL's own behaviour: construct "
                f"asdl.{type(self).__name__}, or choose 'expand', 'reduce' or 'auto'."
            )
        construct(
            self, functools.partial(super().__init__, model, config, *args, **kwargs), shared_dim
        )


# ------------------------------------------------------------------------------------- the classes


class NaturalGradientMaker(_WithSharedDim, Upstream):
    """:class:`asdl.NaturalGradientMaker` with weight sharing: any shape for any layer.

    Args:
        fisher_shape: the shape of the curvature, or a list of rules, as of ASDL.
        shared_dim: as of :class:`KfacGradientMaker`.

    >>> import asdl, asdl_ws_plugin
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    >>> gm = asdl_ws_plugin.NaturalGradientMaker(
    ...     model,
    ...     asdl.PreconditioningConfig(damping=1e-3),
    ...     fisher_shape=["kron", (nn.LayerNorm, "unit_wise")],
    ...     shared_dim="reduce",
    ... )
    >>> gm.shared_dim_for
    {'0': 'reduce', '1': 'reduce', '2': 'reduce'}
    """


class FullNaturalGradientMaker(_WithSharedDim, asdl.FullNaturalGradientMaker, Upstream):
    """:class:`asdl.FullNaturalGradientMaker` with weight sharing: one block for all layers."""


class LayerWiseNaturalGradientMaker(_WithSharedDim, asdl.LayerWiseNaturalGradientMaker, Upstream):
    """:class:`asdl.LayerWiseNaturalGradientMaker` with weight sharing: a full block a layer."""


class KfacGradientMaker(_WithSharedDim, asdl.KfacGradientMaker, Upstream):
    """K-FAC-expand and K-FAC-reduce: :class:`asdl.KfacGradientMaker` with weight sharing.

    Args:
        model: the model, whose attention :func:`~asdl_ws_plugin.convert` has made visible.
        config: an :class:`asdl.PreconditioningConfig`.
        shared_dim: how layers that share their weight over positions are treated: ``'expand'``
            (eq. 3.7), ``'reduce'`` (eq. 3.19), ``'auto'`` (what the first step's loss asks for), a
            strategy of your own, or a list of rules, the most specific first, such as
            ``['reduce', (nn.Conv2d, 'expand'), ('decoder', 'expand', 'sequence_first')]``.
        **kwargs: ``fisher_type``, ``loss_type``, ``scale`` and all others of ASDL's.

    Raises:
        ValueError: an option is out of its range, or there is no layer to precondition.

    >>> import asdl, asdl_ws_plugin, torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    >>> config = asdl.PreconditioningConfig(damping=1e-3)
    >>> gm = asdl_ws_plugin.KfacGradientMaker(model, config)
    >>> x, y = torch.randn(16, 5, 6), torch.randint(0, 4, (16, 5))  # a label for each position
    >>> logits = gm.setup_model_call(model, x)
    >>> gm.setup_loss_call(lambda p, t: F.cross_entropy(p.mT, t), logits, y)
    >>> _ = gm.forward_and_backward()  # .grad is now the preconditioned gradient
    >>> gm.setting
    'expand'
    """


class EkfacGradientMaker(_WithSharedDim, asdl.EkfacGradientMaker, Upstream):
    """:class:`asdl.EkfacGradientMaker` with weight sharing: the Kronecker factors' eigenbasis."""


class UnitWiseNaturalGradientMaker(_WithSharedDim, asdl.UnitWiseNaturalGradientMaker, Upstream):
    """:class:`asdl.UnitWiseNaturalGradientMaker` with weight sharing: a block for each output."""


class DiagNaturalGradientMaker(_WithSharedDim, asdl.DiagNaturalGradientMaker, Upstream):
    """:class:`asdl.DiagNaturalGradientMaker` with weight sharing: the diagonal alone."""


class EmpNaturalGradientMaker(_WithSharedDim, asdl.EmpNaturalGradientMaker, Upstream):
    """:class:`asdl.EmpNaturalGradientMaker` with weight sharing: the empirical Fisher."""
