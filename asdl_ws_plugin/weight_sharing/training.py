"""What a gradient maker does otherwise with a :class:`~.training_config.TrainingConfig`.

When curvature and inverses are updated, the average without bias, relative damping, and how long a
preconditioned step is. With ASDL's own configuration, upstream's methods run.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from asdl.precondition.natural_gradient import _module_level_shapes
from asdl.precondition.prec_grad_maker import PreconditioningConfig
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

from ._warn import warn
from .inverses import update_inverses
from .layer_gradients import LayerGradients
from .matrices import tensors
from .rounding import rounding_noise
from .schedule import is_due
from .second_moments import SecondMoments, eigenvectors
from .training_config import TrainingConfig, at_step
from .trust import StepTrust

__all__ = ["TrainingOptions"]

# The name and the module of a layer, or of the model, and its curvature.
_Found = tuple[str, nn.Module, SymMatrix]


class TrainingOptions(LayerGradients):
    """The part of :class:`~.grad_maker.WeightSharing` that reads a ``TrainingConfig``."""

    _failure_reported = False
    _own_config: PreconditioningConfig

    @functools.cached_property
    def step_trust(self) -> StepTrust:
        """Each layer's damping, as the optimizer's last step tells it."""
        return StepTrust()

    @functools.cached_property
    def second_moments(self) -> SecondMoments:
        """Those of the layers' gradients, in the eigenbases of their factors."""
        return SecondMoments()

    @functools.cached_property
    def last_update(self) -> dict[str, int]:
        """The steps of the last updates of curvature and inverses."""
        return {}

    @property
    def config(self) -> Any:
        """The configuration as it is at this step: functions of the step are numbers here."""
        return at_step(self._own_config, self.state["step"] if "state" in self.__dict__ else 0)

    @config.setter
    def config(self, config: PreconditioningConfig) -> None:
        self._own_config = config

    @property
    def training(self) -> TrainingConfig | None:
        """The configuration, if it has more options than ASDL's."""
        return self.config if isinstance(self._own_config, TrainingConfig) else None

    def do_update_curvature(self, step: int | None = None) -> bool:
        """Whether a step, by default the next one, computes curvature."""
        config = self.training
        if config is None or config.num_total_steps is not None:
            return super().do_update_curvature(step)
        if config.curvature_upd_interval is None:
            return self.do_update_preconditioner(step)
        return self._is_due("curvature", config.curvature_upd_interval, step)

    def do_update_preconditioner(self, step: int | None = None) -> bool:
        """Whether a step, by default the next one, computes inverses."""
        config = self.training
        if config is None or config.num_total_steps is not None:
            return super().do_update_preconditioner(step)
        return self._is_due("preconditioner", config.preconditioner_upd_interval, step)

    def _is_due(self, what: str, interval: int, step: int | None) -> bool:
        step = self.state["step"] if step is None else step
        if step < getattr(self.config, f"{what}_warmup_steps"):
            return True
        return is_due(step, self.last_update.get(what), interval, self.config.early_updates)

    @contextlib.contextmanager
    def _noting_updates(self) -> Iterator[None]:
        """Around a step: it is the last one that made the updates it makes, if it does not fail.
        If it does, what it has seen of gradients is forgotten, too.
        """
        step, last = self.state["step"], dict(self.last_update)
        trust, moments = self.step_trust.copy(), self.second_moments.copy()
        due = {
            "curvature": self.do_update_curvature(step),
            "preconditioner": self.do_update_preconditioner(step),
        }
        self.last_update.update({what: step for what, is_due in due.items() if is_due})
        try:
            yield
        except BaseException:
            self.last_update, self.step_trust, self.second_moments = last, trust, moments
            raise

    # ------------------------------------------------------------------------------------ curvature

    def update_curvature(self) -> None:
        """Upstream's, with an average and factors as the configuration has them."""
        config, maker = self.training, self.fisher_maker
        maker.least_weight = config.ema_decay if config is not None and config.unbiased else None
        maker.plan.max_side = None if config is None else config.max_side
        maker.plan.damps_in_place = config is None or not config.relative_damping
        super().update_curvature()

    def delegate_forward_and_backward(self, other: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's."""
        # Upstream has weighed the new curvature by its scale; an average without bias weighs both
        # when the new one is there.
        if getattr(other, "least_weight", None) is not None:
            kwargs["scale"] = self.scale
        return super().delegate_forward_and_backward(other, *args, **kwargs)

    def update_relative_inverses(self) -> list[str]:
        """The inverses of all layers that are this rank's; returns the names of those whose
        curvature is exactly zero.
        """
        config = self.config
        owned = [
            layer
            for shape, ranks in zip(_module_level_shapes, self.partitions, strict=True)
            for layer, rank in zip(self.plan.layers_of(shape), ranks, strict=False)
            if rank == self.world_rank
        ]
        found = [
            (name, module, matrix)
            for name, module in [
                *((layer.name, layer.module) for layer in owned),
                ("the model", self.model),
            ]
            if (matrix := self._get_module_fisher(module)) is not None
        ]
        if config.second_moment is not None:
            self._update_bases()
            found = [entry for entry in found if entry[2].kron is None]
        with_dampings = _with_dampings(config, self.step_trust, self.model, found)
        updated = update_inverses(with_dampings, rounding_noise(self.weight_gradients(found)))
        kept = updated.kept
        if kept and not self._failure_reported:
            self._failure_reported = True
            warn(
                f"Layer '{kept[0]}': its curvature plus damping is not positive definite, in "
                f"float64 either ({len(kept)} matrices). The last inverse that there was stays; "
                "more damping avoids this."
            )
        return updated.zero

    def _update_bases(self) -> None:
        found: dict[int, Tensor] = {}  # blocks of one layer have one A

        def basis(factor: Tensor, side: int) -> Tensor:
            if id(factor) not in found:
                found[id(factor)] = eigenvectors(factor, side)
            return found[id(factor)]

        for layer in self.plan.layers:
            matrix = self._get_module_fisher(layer.module)
            if matrix is not None and matrix.kron is not None:
                weight: Any = layer.module.weight
                sides = weight[0].numel(), weight.shape[0]
                A, B = map(basis, matrix.kron.data, sides)
                self.second_moments.set_bases(layer.name, (A, B))

    # --------------------------------------------------------------------------------- the gradient

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Around the preconditioning of a step's gradients, of which all ranks have the same."""
        config = self.training
        if config is None:
            yield
            return
        self.step_trust.measure(self.reading)
        with self.as_long_as(config):
            yield
        # Weights are kept for a step from time to time.
        step = self.state["step"] + 1
        if config.trust is not None and (
            self.do_update_preconditioner(step) or self.do_update_curvature(step)
        ):
            self.step_trust.note((layer.module for layer in self.plan.layers), self.reading)

    def divide_by_second_moments(self, layer: Any, scale: float, given: bool) -> None:
        """Precondition the gradients of a layer with Kronecker factors, in place.

        Raises a NotImplementedError if other vectors are ``given``: there is no matrix to multiply
        them with.
        """
        if given:
            raise NotImplementedError(
                "With second_moment there are no inverses to multiply vectors with; it is for the "
                "gradients in .grad alone."
            )
        self.second_moments.precondition(layer, self.config.second_moment, scale)


def _with_dampings(
    config: Any, step_trust: StepTrust, model: nn.Module, found: list[_Found]
) -> Iterator[tuple[str, SymMatrix, Tensor]]:
    """Names and matrices with their relative dampings.

    That of the model, with the full Fisher, is ``damping``: it has no step of a layer.
    """
    groups: dict[Any, list[_Found]] = defaultdict(list)
    for entry in found:
        _, module, matrix = entry
        like = tensors(matrix)[0]
        follows = config.trust is not None and module is not model
        groups[like.device, like.dtype, follows].append(entry)
    for (device, dtype, follows), group in groups.items():
        if follows:
            layers = [(module, matrix) for _, module, matrix in group]
            dampings = step_trust.dampings(layers, config.damping, config.trust).unbind()
        else:  # one tensor, so that layers with one A have one inverse of it
            one = torch.full((), config.damping, dtype=dtype, device=device)
            dampings = (one,) * len(group)
        for (name, _, matrix), damping in zip(group, dampings, strict=True):
            yield name, matrix, damping
