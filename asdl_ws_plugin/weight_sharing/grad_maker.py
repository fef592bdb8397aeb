"""ASDL's natural-gradient makers for weight sharing: what has to differ from upstream, and nothing
else.

Schedules, the moving average, inverses and preconditioning are upstream's methods, inherited. What
differs is in one file each: a step is a transaction (:mod:`~.steps`), inverses leave the factors as
they were (:mod:`~.inversion`), and a maker can go on elsewhere (:mod:`~.resuming`). The overrides
below hand curvature to :class:`~.fisher_maker.WeightSharingFisherMaker`, and leave alone the layers
that took no part in it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from asdl.matrices import SHAPE_FULL, SHAPE_KFE
from asdl.precondition.natural_gradient import NaturalGradientMaker
from asdl.symmatrix import SymMatrix
from asdl.vector import ParamVector
from torch import Tensor, nn

from .blocks import has_blocks, parameters_of
from .factors import full_precision
from .fisher_maker import WeightSharingFisherMaker, check_data_size
from .inversion import Inversion
from .matrices import dtype_of, is_of, precondition_bias
from .registry import supported_classes
from .resuming import Resuming
from .rules import matches_any
from .shapes import KRONECKER
from .sharded import sharded_model
from .steps import TransactionalSteps
from .training_config import check_training_config

__all__ = ["WeightSharing", "weight_sharing_class"]


class WeightSharing(TransactionalSteps, Inversion, Resuming):
    """Mixed into a natural-gradient maker that was given ``shared_dim``."""

    fisher_maker: WeightSharingFisherMaker
    _supported_classes = property(lambda self: supported_classes())

    # --------------------------------------------------------------------------------- what is read

    @property
    def plan(self) -> Any:
        """The layers and what is done with them (:class:`~.plan.Plan`)."""
        return self.fisher_maker.plan

    @property
    def setting(self) -> str | None:
        """``'expand'`` or ``'reduce'``, what ``shared_dim='auto'`` decided; ``None`` if it has
        not.
        """
        return self.plan.setting

    @property
    def shared_dim_for(self) -> dict[str, str | None]:
        """Layer name -> strategy, for every layer that is preconditioned."""
        return {layer.name: self.plan.strategy_of(layer) for layer in self.plan.layers}

    # --------------------------------------------------------------------------------- which layers

    def named_modules_for(self, shape: str) -> list[tuple[str, nn.Module]]:
        """Names and modules of the layers of a shape, as the plan has them."""
        return [(layer.name, layer.module) for layer in self.plan.layers_of(shape)]

    def _is_supported(self, module_name: str, module: nn.Module) -> bool:
        # Upstream takes the model's device from the parameters of supported layers, and blocks have
        # none of their own.
        if has_blocks(module):
            supported = not matches_any(module_name, module, self.config.ignore_modules or ())
        else:
            supported = super()._is_supported(module_name, module)
        if supported and (not module_name or hasattr(nn.ModuleDict, module_name)):
            # upstream keeps layers by name in an nn.ModuleDict
            what = f"has a layer called '{module_name}'" if module_name else "is itself a layer"
            raise ValueError(
                f"The model {what}, which ASDL's gradient makers cannot hold. Train "
                "nn.Sequential(model) instead."
            )
        return supported

    def parameters_for(self, shape: str) -> Iterator[nn.Parameter]:
        """Upstream's, with the views of layers whose weight is a part of a Parameter."""
        for module in self.modules_for(shape):
            yield from (p for p in parameters_of(module) if p.requires_grad)

    def is_module_for_inv_and_precondition(self, module: nn.Module) -> bool:
        """Whether the plan holds this module: nothing else has curvature."""
        return module in self.plan

    def _precondition_module(
        self,
        module: nn.Module,
        shape: str | None = None,
        vectors: ParamVector | None = None,
        vec_weight: Tensor | None = None,
        vec_bias: Tensor | None = None,
        grad_scale: float | None = None,
        use_inv: bool = True,
    ) -> None:
        """Upstream's, for a layer that took part in the last curvature update and has a
        gradient.
        """
        given = vectors is not None or vec_weight is not None
        if self.sharded is not None:
            if given:
                raise NotImplementedError(
                    "In a model that is sharded by fully_shard, gradients in .grad are "
                    "preconditioned alone. Multiply other vectors in a whole copy of it."
                )
            with self.whole_layer(self.plan.layer_of(module), self.training):
                self._precondition_layer(module, shape, grad_scale, use_inv)
            return
        self._precondition_layer(module, shape, grad_scale, use_inv, vectors, vec_weight, vec_bias)

    def _precondition_layer(
        self,
        module: nn.Module,
        shape: str | None,
        grad_scale: float | None,
        use_inv: bool,
        vectors: ParamVector | None = None,
        vec_weight: Tensor | None = None,
        vec_bias: Tensor | None = None,
    ) -> None:
        given = vectors is not None or vec_weight is not None
        if shape in KRONECKER and getattr(self.config, "second_moment", None) is not None:
            scale = self.grad_scale if grad_scale is None else grad_scale
            self.divide_by_second_moments(self.plan.layer_of(module), scale, given)
            return
        matrix = self._get_module_fisher(module)
        if module in self.fisher_maker.unseen or matrix is None or not is_of(matrix, module):
            return
        # An eigenbasis is inverted as it is multiplied with.
        how: tuple[Any, Any] = (grad_scale, use_inv and shape != SHAPE_KFE)
        if given:
            super()._precondition_module(module, shape, vectors, vec_weight, vec_bias, *how)
            return
        trainable = _trainable(module)
        if any(p.grad is None for p in trainable):
            return
        if module.weight.requires_grad:
            exact = _exact_gradients(trainable, matrix)
            vec_weight, vec_bias = [*exact, None, None][:2]
            super()._precondition_module(module, shape, None, vec_weight, vec_bias, *how)
            for p, vec in zip(trainable, exact, strict=False):
                p.grad.copy_(vec)
        for p in self._biases_alone(module):
            p.grad.mul_(self.grad_scale if grad_scale is None else grad_scale)
            precondition_bias(matrix, p.grad, self.config.damping)

    def _biases_alone(self, module: nn.Module) -> list[Any]:
        """The trained biases of a layer, with a gradient, that have no trained weight of their
        own.
        """
        bias: Any = getattr(module, "bias", None)
        biases = [bias]
        if module.weight.requires_grad:
            tied = [m.bias for _, m in self.plan.layer_of(module).tied]
            biases = [other for other in tied if other is not bias]
        return [p for p in biases if p is not None and p.requires_grad and p.grad is not None]

    @full_precision()
    def precondition(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, of the joint gradient. It ends on all ranks, or on none."""
        given = bool(args or kwargs.get("vectors"))
        is_together = self.ranks.size > 1 and not given
        if is_together and not self._grads_are_joint:
            self._average(self.fisher_maker.share)
        with contextlib.ExitStack() as stack:
            if self.sharded is not None:
                self.ranks.agree(f"{self.fisher_maker.place}, preconditioning")
                stack.enter_context(self.ranks.exchanging())
            if not given:
                stack.enter_context(self._step())
            super().precondition(*args, **kwargs)
        if is_together:
            self.ranks.end(f"{self.fisher_maker.place}, preconditioned")


def _trainable(module: Any) -> list[Any]:
    """A layer's weight and bias, as far as they are trained."""
    bias = getattr(module, "bias", None)
    return [p for p in (module.weight, bias) if p is not None and p.requires_grad]


def _exact_gradients(trainable: list[Any], matrix: SymMatrix) -> list[Tensor]:
    """The gradients as the curvature can be multiplied with them, where they are not: in half
    precision beside curvature in float32, or channels last. Empty where they are.
    """
    dtype = dtype_of(matrix)
    if all(p.grad.dtype == dtype and p.grad.is_contiguous() for p in trainable):
        return []
    return [p.grad.to(dtype, memory_format=torch.contiguous_format) for p in trainable]


@functools.cache
def weight_sharing_class(maker_class: type[NaturalGradientMaker]) -> type[WeightSharing]:
    """The same gradient maker with :class:`WeightSharing` mixed in; an instance of it is an
    instance of both.
    """
    if issubclass(maker_class, WeightSharing):
        return maker_class
    return type(
        maker_class.__name__,
        (WeightSharing, maker_class),
        {
            "__doc__": maker_class.__doc__,
            "__module__": maker_class.__module__,
            "_made_by": (weight_sharing_class, maker_class),
        },
    )


# Upstream's schedule never meets a step that is no multiple of a fraction, and says nothing.
_WHOLE_NUMBERS = {
    "curvature_upd_interval": 1,
    "preconditioner_upd_interval": 1,
    "curvature_warmup_steps": 0,
    "preconditioner_warmup_steps": 0,
}


def check(maker: WeightSharing) -> None:
    """Refuse what upstream computes wrongly and this package does not mend, and options that make
    no sense.
    """
    config = maker.config
    if not (math.isfinite(config.damping) and config.damping >= 0):
        raise ValueError(f"damping has to be a finite number, at least 0, got {config.damping}.")
    if not (math.isfinite(maker.scale) and maker.scale > 0):
        raise ValueError(f"scale has to be a finite number above 0, got {maker.scale}.")
    check_data_size(config.data_size)
    if maker.training is not None:
        check_training_config(config)
    if maker.do_accumulate and not 0 < config.ema_decay <= 1:
        raise ValueError(f"ema_decay weighs the new curvature, in (0, 1]; got {config.ema_decay}.")
    for name, least in _WHOLE_NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not (value >= least and float(value).is_integer()):
            raise ValueError(f"{name} has to be a whole number, at least {least}, got {value}.")
    if maker.ranks.size > 1 and maker.plan.layers_of(SHAPE_KFE):
        raise NotImplementedError(
            "The shape 'kfe' is for one process: an average of eigenbases is none. Use 'kron'."
        )
    maker.fisher_maker.ranks, maker.fisher_maker.belongs_to_maker = maker.ranks, True
    maker.sharded = maker.fisher_maker.sharded = sharded_model(maker.model)
    if maker.sharded is not None:
        maker.sharded.check_ranks(maker.ranks)
        if maker.plan.layers_of(SHAPE_FULL):
            raise ValueError(
                "The shape 'full' is of all parameters together, which fully_shard has divided. "
                "Use a shape of single layers, as 'kron'."
            )
    if maker.do_accumulate and maker.plan.layers_of(SHAPE_KFE):
        raise ValueError(
            "The shape 'kfe' has no moving average; leave ema_decay out of the "
            "PreconditioningConfig."
        )
