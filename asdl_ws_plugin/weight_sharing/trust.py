"""How much K-FAC trusts its curvature: damping by what the optimizer's own steps leave.

Of all steps as long as Δ, the one that lowers a quadratic model of the loss the most solves
``(F + λ) Δ = -g`` for some λ (Levenberg and Marquardt). The gradient after that step is
``g + F Δ = -λ Δ``, so ``λ = -g₊ᵀ Δ / ΔᵀΔ``: what slope is left along the step, by its length. It
can be read off every layer: Δ is how its weight moved, g₊ is its next gradient, whose noise has
nothing to do with Δ. Where steps are short, as at a small learning rate, λ is large and the
direction is the gradient's: short steps are not limited by curvature. Where they are long it is
K-FAC's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

__all__ = ["StepTrust", "mean_eigenvalue"]

# An average forgets with this weight of the new value, and is then as good as that of 19 values.
_WEIGHT, _NUM_VALUES = 0.1, 19
# Before so many values nothing is known of their noise.
_FEWEST = 3
# How many standard errors are added to the mean slope, for too little damping costs more than too
# much of it.
_ERRORS = 2.0
# A relative damping that leaves the gradient's direction as it is.
_LARGEST = 1e8


def mean_eigenvalue(matrix: SymMatrix) -> Tensor:
    """Of a layer's curvature, a scalar on its device; of Kronecker factors the product's."""
    factors = [data for data in (matrix.data, matrix.unit and matrix.unit.data) if data is not None]
    if matrix.kron is not None:
        factors += [data for data in matrix.kron.data if data is not None]
    if factors:
        return torch.stack([f.diagonal(dim1=-2, dim2=-1).mean() for f in factors]).prod()
    return torch.cat([d.flatten() for d in matrix.diag.data if d is not None]).mean()


class StepTrust:
    """Averages for every layer: the slope that steps leave, ``-g₊ᵀ Δ``, its square, and ``ΔᵀΔ``."""

    def __init__(self) -> None:
        self._averages: dict[nn.Module, Tensor] = {}  # the three of them
        self._counts: dict[nn.Module, int] = {}
        self._before: dict[nn.Module, Tensor] = {}

    def copy(self) -> StepTrust:
        """One that stays as this is now: tensors are replaced, never changed."""
        other = StepTrust()
        other._averages, other._counts = dict(self._averages), dict(self._counts)
        other._before = dict(self._before)
        return other

    @torch.no_grad()
    def note(self, modules: Iterable[Any]) -> None:
        """Before a step that :meth:`measure` will be about: where the weights are."""
        self._before = {m: m.weight.detach().clone() for m in modules if m.weight.grad is not None}

    @torch.no_grad()
    def measure(self) -> None:
        """After that step, with the raw gradients of the next one."""
        for module, before in self._before.items():
            weight: Any = module.weight
            if weight.grad is None:
                continue
            step = weight.detach() - before
            slope = -(step * weight.grad).sum()
            new = torch.stack([slope, slope.square(), step.square().sum()])
            count = self._counts[module] = self._counts.get(module, 0) + 1
            old = self._averages.get(module, new)
            self._averages[module] = old.lerp(new, max(_WEIGHT, 1 / count))
        self._before = {}

    @torch.no_grad()
    def damping(self, module: nn.Module, matrix: SymMatrix, least: float, trust: float) -> Tensor:
        """Of a layer, relative to its mean eigenvalue: ``λ / trust``, but at least ``least``."""
        mean = mean_eigenvalue(matrix)
        count = self._counts.get(module, 0)
        if count < _FEWEST:
            return torch.full_like(mean, _LARGEST)
        slope, square, length = self._averages[module]
        error = ((square - slope.square()).clamp(min=0) / min(count, _NUM_VALUES)).sqrt()
        relative = (slope + _ERRORS * error) / (trust * length * mean)
        # Nothing moved yet, as between micro-batches, or the curvature is zero.
        return relative.nan_to_num(_LARGEST, _LARGEST).clamp(least, _LARGEST)

    def state_dict(self, names: dict[nn.Module, str]) -> dict[str, dict[str, Any]]:
        """Tensors and counts by the names of the modules."""
        return {
            kind: {names[module]: value for module, value in getattr(self, f"_{kind}").items()}
            for kind in ("averages", "counts", "before")
        }

    def load_state_dict(
        self, state: dict[str, dict[str, Any]], modules: dict[str, nn.Module]
    ) -> None:
        """The inverse of :meth:`state_dict`; copies the tensors to where the modules are."""
        for kind, values in state.items():
            loaded = {}
            for name, value in values.items():
                module: Any = modules[name]
                if isinstance(value, Tensor):
                    value = value.detach().to(module.weight.device, copy=True)
                loaded[module] = value
            setattr(self, f"_{kind}", loaded)
