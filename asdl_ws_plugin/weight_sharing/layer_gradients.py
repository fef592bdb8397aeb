"""The gradients of the layers that are preconditioned, and how long they become.

Those of a model that ``fully_shard`` has divided are put together one layer at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from asdl.precondition.natural_gradient import NaturalGradientMaker
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

from .blocks import parameters_of
from .step_length import clipped, clipping_factor, grafted, noting_change

__all__ = ["LayerGradients"]


class LayerGradients(NaturalGradientMaker):
    """The part of :class:`~.grad_maker.WeightSharing` that knows where gradients are."""

    plan: Any
    fisher_maker: Any
    ranks: Any
    #: What there is to know of a model that ``fully_shard`` was called on, a
    #: :class:`~.sharded.ShardedModel`; ``None`` for any other.
    sharded: Any = None
    #: ``gᵀp`` of the layers of a sharded model that were preconditioned, for clipping.
    _products: list[Tensor]

    def parameters(self) -> list[nn.Parameter]:
        """The model's, the divided ones of a sharded model."""
        return list(self.model.parameters()) if self.sharded is None else self.sharded.parameters()

    def backward(self) -> None:
        """Of a step without curvature."""
        if self.sharded is None:
            super().backward()
            return
        what = f"{self.fisher_maker.place}, gradients"
        weight = self.sharded.weight(self.ranks, what, self.fisher_maker.share)
        self.sharded.send_back(self.ranks, what, self._loss, weight)

    @contextlib.contextmanager
    def reading(self, module: nn.Module) -> Iterator[None]:
        """Let a module have its whole weight and gradient, to be read."""
        with contextlib.ExitStack() as stack:
            if self.sharded is not None:
                stack.enter_context(self.sharded.whole([module], with_values=True))
            yield

    def weight_gradients(
        self, found: Sequence[tuple[str, nn.Module, SymMatrix]]
    ) -> list[tuple[str, Tensor, SymMatrix]]:
        """Names and matrices of layers with Kronecker factors, with the gradients of their whole
        weights, if they have any.

        Raises a RankFailure if another rank of a sharded model has failed.
        """
        wanted = {
            module: (name, matrix) for name, module, matrix in found if matrix.kron is not None
        }
        modules: list[Any] = list(wanted)
        entries = []
        with contextlib.ExitStack() as stack:
            if self.sharded is not None:  # all ranks take part in putting each together
                modules = [layer.module for layer in self.plan.layers]
                self.ranks.agree(f"{self.fisher_maker.place}, inverses")
                stack.enter_context(self.ranks.exchanging())
            for module in modules:
                with self.reading(module):
                    grad = module.weight.grad
                if grad is not None and module in wanted:
                    name, matrix = wanted[module]
                    entries.append((name, grad, matrix))
        return entries

    @contextlib.contextmanager
    def as_long_as(self, config: Any) -> Iterator[None]:
        """Around the preconditioning of all layers: let their gradients be as long as a
        :class:`~.training_config.TrainingConfig` has it.
        """

        def grads() -> list[Tensor]:
            return _grads_of(self.plan.layers)

        self._products = []
        with contextlib.ExitStack() as stack:
            if self.sharded is None and config.graft:
                stack.enter_context(grafted(grads))
            elif self.sharded is None and config.kl_clip is not None:
                stack.enter_context(clipped(grads, config.kl_clip, config.learning_rate))
            yield
        if self._products:
            factor = clipping_factor(self._products, config.kl_clip, config.learning_rate)
            modules = [module for layer in self.plan.layers for module in layer.modules]
            self.sharded.scale(modules, factor)

    @contextlib.contextmanager
    def whole_layer(self, layer: Any, config: Any) -> Iterator[None]:
        """Around the preconditioning of a layer of a sharded model: let it have its whole
        gradients, and what depends on their length be done or noted.
        """

        def grads() -> list[Tensor]:
            return _grads_of([layer])

        with self.sharded.whole(layer.modules), contextlib.ExitStack() as stack:
            if config is not None and config.graft:
                stack.enter_context(grafted(grads))
            elif config is not None and config.kl_clip is not None:
                stack.enter_context(noting_change(grads, self._products))
            yield


def _grads_of(layers: Sequence[Any]) -> list[Tensor]:
    modules = dict.fromkeys(module for layer in layers for module in layer.modules)
    parameters = dict.fromkeys(p for module in modules for p in parameters_of(module))
    return [p.grad for p in parameters if p.grad is not None]
