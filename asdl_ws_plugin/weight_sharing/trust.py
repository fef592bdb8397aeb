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

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

__all__ = ["StepTrust", "mean_eigenvalues"]

# An average forgets with this weight of the new value, and is then as good as that of 19 values.
_WEIGHT, _NUM_VALUES = 0.1, 19
# Before so many values nothing is known of their noise.
_FEWEST = 3
# How many standard errors are added to the mean slope, for too little damping costs more than too
# much of it.
_ERRORS = 2.0
# A relative damping that leaves the gradient's direction as it is.
_LARGEST = 1e8


def mean_eigenvalues(matrices: Sequence[SymMatrix]) -> Tensor:
    """Of layers' curvature on one device, ``(layers,)``; of Kronecker factors the product's."""
    same_size: dict[Any, list[Tensor]] = defaultdict(list)
    places: list[list[tuple[Any, int]]] = []  # where each matrix' diagonals are
    for matrix in matrices:
        places.append([])
        for diagonal in _diagonals(matrix):
            key = diagonal.shape, diagonal.dtype
            places[-1].append((key, len(same_size[key])))
            same_size[key].append(diagonal)
    means = {
        key: torch.stack(found).flatten(1).mean(1).unbind() for key, found in same_size.items()
    }
    one = next(iter(means.values()))[0].new_ones(())
    of_factors = [[means[key][i] for key, i in found] for found in places]
    # The first factors of all layers, then the second ones.
    columns = itertools.zip_longest(*of_factors, fillvalue=one)
    return functools.reduce(torch.mul, [torch.stack(column) for column in columns])


def _diagonals(matrix: SymMatrix) -> list[Tensor]:
    factors = [matrix.data, matrix.unit and matrix.unit.data]
    if matrix.kron is not None:
        factors += matrix.kron.data
    found = [data.diagonal(dim1=-2, dim2=-1) for data in factors if data is not None]
    return found or [torch.cat([d.flatten() for d in matrix.diag.data if d is not None])]


Reading = Callable[[nn.Module], AbstractContextManager[None]]


def _as_it_is(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


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
    def note(self, modules: Iterable[Any], reading: Reading = _as_it_is) -> None:
        """Before a step that :meth:`measure` will be about: where the weights are.

        Args:
            reading: a context in which a module has its whole weight and gradient.
        """
        self._before = {}
        for module in modules:
            with reading(module):
                if module.weight.grad is not None:
                    self._before[module] = module.weight.detach().clone()

    @torch.no_grad()
    def measure(self, reading: Reading = _as_it_is) -> None:
        """After that step, with the raw gradients of the next one."""
        by_device: dict[torch.device, dict[nn.Module, Any]] = defaultdict(dict)
        for module, before in self._before.items():
            with reading(module):
                weight: Any = module.weight
                if weight.grad is not None:
                    step = weight.detach() - before
                    products = (step * weight.grad).sum(), step.square().sum()
                    by_device[weight.device][module] = products
        for measured in by_device.values():
            self._add(measured)
        self._before = {}

    def _add(self, measured: dict[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """New values of layers on one device."""
        slopes, lengths = (torch.stack(column) for column in zip(*measured.values(), strict=True))
        new = torch.stack([-slopes, slopes.square(), lengths], dim=1)
        counts = [self._counts.get(module, 0) + 1 for module in measured]
        old = torch.stack(
            [self._averages.get(m, one) for m, one in zip(measured, new.unbind(), strict=True)]
        )
        weights = new.new_tensor([max(_WEIGHT, 1 / count) for count in counts])
        averages = old.lerp(new, weights.unsqueeze(1)).unbind()
        self._counts.update(zip(measured, counts, strict=True))
        self._averages.update(zip(measured, averages, strict=True))

    @torch.no_grad()
    def dampings(
        self, layers: Sequence[tuple[nn.Module, SymMatrix]], least: float, trust: float
    ) -> Tensor:
        """Of layers on one device, ``(layers,)``, relative to their mean eigenvalues:
        ``λ / trust``, but at least ``least``.
        """
        means = mean_eigenvalues([matrix for _, matrix in layers])
        counts = [self._counts.get(module, 0) for module, _ in layers]
        unknown = means.new_full((3,), torch.inf)
        slope, square, length = torch.stack(
            [
                self._averages[module] if count >= _FEWEST else unknown
                for (module, _), count in zip(layers, counts, strict=True)
            ],
            dim=1,
        )
        numbers = means.new_tensor([min(max(count, 1), _NUM_VALUES) for count in counts])
        error = ((square - slope.square()).clamp(min=0) / numbers).sqrt()
        relative = (slope + _ERRORS * error) / (trust * length * means)
        # Nothing is known, or moved yet, as between micro-batches, or the curvature is zero.
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
