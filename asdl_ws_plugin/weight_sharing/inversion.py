"""Inverses: upstream's, with the factors as they were before, and each rank's share of the work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from asdl.precondition.natural_gradient import _module_level_shapes
from asdl.symmatrix import SymMatrix

from ._warn import warn
from .factors import full_precision
from .joint import owners, share_inverses
from .matrices import copy_inverses, diagonals, pairs
from .matrices import share_inverses as share_inverses_of_blocks
from .ranks import Ranks
from .training import TrainingOptions

__all__ = ["Inversion"]


class Inversion(TrainingOptions):
    """The part of :class:`~.grad_maker.WeightSharing` that updates curvature and inverses."""

    partitions: list[list[int]]
    _zero_reported = False

    def _scale_fisher(self, scale: float) -> None:
        # Upstream decays the average before the forward pass; a batch that fails would have decayed
        # it. The Fisher maker does it when the new curvature is there.
        self.fisher_maker.decay = scale

    def update_curvature(self) -> None:
        """Upstream's; without a moving average the new curvature replaces the old."""
        self.fisher_maker.decay = 1.0
        super().update_curvature()

    @full_precision()
    def update_preconditioner(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, with the factors restored to the last bit after damping was added and taken
        away again.
        """
        config = self.training
        if config is not None and config.relative_damping and not args and not kwargs:
            self._report_zero(self.update_relative_inverses())
            return
        matrices = self._named_matrices()
        share_inverses_of_blocks(
            (layer.module, matrix)
            for layer in self.plan.layers
            if (matrix := self._get_module_fisher(layer.module)) is not None
        )
        if self.do_accumulate and not args and not kwargs:
            _drop_inverses(matrices)
        with self._restoring_factors(matrices), self._inverting_own():
            super().update_preconditioner(*args, **kwargs)
        if not self._zero_reported:  # looking for them reads values back from the device
            self._report_zero(_zero(matrices))

    def _named_matrices(self) -> list[tuple[str, SymMatrix]]:
        """The curvature of every layer and of the model, as far as there is any."""
        named = [(layer.name, layer.module) for layer in self.plan.layers]
        return [
            (name, matrix)
            for name, module in [*named, ("the model", self.model)]
            if (matrix := self._get_module_fisher(module)) is not None
        ]

    @contextlib.contextmanager
    def _restoring_factors(self, matrices: list[tuple[str, SymMatrix]]) -> Iterator[None]:
        """Put the factors' diagonals back, and name the layer that cannot be inverted."""
        saved = [(name, *pair) for name, matrix in matrices for pair in diagonals(matrix)]
        try:
            yield
        except torch.linalg.LinAlgError as error:
            damped = [name for name, view, copy in saved if not torch.equal(view, copy)]
            # damping may be too small to be seen
            name = next(iter(damped or self._without_inverse()), "?")
            raise torch.linalg.LinAlgError(
                f"Layer '{name}': its curvature plus damping {self.config.damping} is not positive "
                f"definite; increase damping. ({error})"
            ) from error
        finally:
            for _, view, copy in saved:
                view.copy_(copy)

    def _without_inverse(self) -> list[str]:
        """Names of the layers whose inverse is missing, in the order of inversion."""
        layers = [
            (layer.name, layer.module)
            for shape in _module_level_shapes
            for layer in self.plan.layers_of(shape)
        ]
        return [
            name
            for name, module in [*layers, ("the model", self.model)]
            if (matrix := self._get_module_fisher(module)) is not None
            and any(inverse is None and data.any() for data, inverse in pairs(matrix))
        ]

    def _report_zero(self, zero: list[str]) -> None:
        if zero and not self._zero_reported:
            self._zero_reported = True
            warn(
                f"The curvature of {len(zero)} layers (the first is '{zero[0]}') is exactly zero: "
                "they are behind a zero-initialised head, or nothing but zeros or padding came "
                "in (a padding mask may be the wrong way round: True or 1 is for real tokens). "
                "Their gradients are not preconditioned until it is not."
            )

    # --------------------------------------------------------------------------------- distribution
    #
    # Upstream (0.1a5) averages by position, only layers that it knows, on curvature steps only, and
    # lets each rank keep a history of its own. It sees one process here, which has everything;
    # :mod:`~.ranks` and :mod:`~.joint` see to it that every rank's is that of the joint batch.

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The processes that train together: those of ``sync_group``, or all."""
        return Ranks(self.sync_group, self.device)

    def get_distr_prec_partition(self) -> list[list[int]]:
        """One process has everything, as far as upstream knows."""
        self.world_rank, self.world_size = 0, 1
        # Layers may be frozen and unfrozen later, so there is room for all of them.
        room = sum(1 for _ in self.model.modules())
        return [[0] * room for _ in _module_level_shapes]

    @contextlib.contextmanager
    def _inverting_own(self) -> Iterator[None]:
        """Let upstream invert the layers that are this rank's, and give every rank all inverses."""
        if self.ranks.size == 1:
            yield
            return
        pairs = [
            (layer.module, matrix)
            for layer in self.plan.layers
            if (matrix := self._get_module_fisher(layer.module)) is not None
        ]
        owner = owners(self.ranks, pairs)
        others = {
            module
            for (module, _), rank in zip(pairs, owner, strict=True)
            if rank != self.ranks.rank
        }
        everything = self.partitions
        self.partitions = [
            [int(module in others) for module in self.modules_for(shape)]
            for shape in _module_level_shapes
        ]
        try:
            yield
        finally:
            self.partitions = everything
        what = f"{self.fisher_maker.place}, inverses"
        share_inverses(self.ranks, what, [matrix for _, matrix in pairs], owner)


def _zero(matrices: list[tuple[str, SymMatrix]]) -> list[str]:
    """Names of layers with a Kronecker factor that is exactly zero."""
    return [
        name
        for name, matrix in matrices
        if matrix.kron is not None
        and any(inverse is None and not bool(data.any()) for data, inverse in pairs(matrix))
    ]


def _drop_inverses(matrices: list[tuple[str, SymMatrix]]) -> None:
    """Upstream leaves the inverse of a factor that became zero as it was."""
    for _, matrix in matrices:
        for holder, name, _ in copy_inverses(matrix):
            setattr(holder, name, None)
