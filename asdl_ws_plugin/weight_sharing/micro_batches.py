"""The curvature of several micro-batches of one step, added up to that of the joint batch.

What is divided by the number of loss terms, as B is, adds up by itself: the user divides the loss
by the number of micro-batches, or passes its sum. A is a mean over examples, and under
K-FAC-expand over positions, so it is weighted by how many there were of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asdl.symmatrix import SymMatrix
from torch import nn

from .matrices import merge, shared_tensors

__all__ = ["MicroBatches"]


@dataclass
class MicroBatches:
    """A sum of curvatures, module by module.

    Attributes:
        count: how many micro-batches there were.
        matrices: the sums. A is multiplied with its weight while there are several.
        weights: by module, what A is divided by in the end.
        unseen: the modules that no micro-batch has reached, and why the last one did not.
    """

    count: int = 0
    matrices: dict[nn.Module, SymMatrix] = field(default_factory=dict)
    weights: dict[nn.Module, float] = field(default_factory=dict)
    unseen: dict[nn.Module, str] = field(default_factory=dict)

    def added(
        self,
        results: Sequence[tuple[nn.Module, SymMatrix]],
        weights: Mapping[nn.Module, float],
        unseen: Mapping[nn.Module, str],
        with_B: bool = False,
    ) -> MicroBatches:
        """The sum with one more micro-batch; this one stays as it is.

        Args:
            results: the curvature of the micro-batch, which is used up.
            weights: by module, of A: the number of examples, times positions where A is a mean over
                them. Of a module that is not there, A adds up by itself.
            unseen: the modules that the micro-batch has not reached.
            with_B: B is such a mean, too.
        """
        total = MicroBatches(self.count + 1, dict(self.matrices), dict(self.weights))
        reached = total.matrices.keys() | {module for module, _ in results}
        before = self.unseen if self.count else unseen
        total.unseen = {m: why for m, why in {**before, **unseen}.items() if m not in reached}
        if self.count:
            _scale(results, weights, with_B)
        if self.count == 1:  # a single one is not scaled, so that nothing is rounded
            total.matrices = _copies(self.matrices)
            _scale(list(total.matrices.items()), self.weights, with_B)
        shared = shared_tensors(new for _, new in results)
        for module, new in results:
            old = total.matrices.get(module)
            total.matrices[module] = new if old is None else merge(new, old, 1.0, shared)
        for module, weight in weights.items():
            total.weights[module] = total.weights.get(module, 0.0) + weight
        return total

    def joined(self, with_B: bool = False) -> list[tuple[nn.Module, SymMatrix]]:
        """The curvature of the joint batch."""
        results = list(self.matrices.items())
        if self.count > 1:
            _scale(results, {module: 1 / weight for module, weight in self.weights.items()}, with_B)
        return results


def _scale(
    results: Sequence[tuple[nn.Module, SymMatrix]], weights: Mapping[nn.Module, float], with_B: bool
) -> None:
    """Multiply A, in place, with its weight; once where several modules have one tensor."""
    done: set[int] = set()
    for module, matrix in results:
        if matrix.kron is None or module not in weights:
            continue
        for factor in (matrix.kron.A, matrix.kron.B) if with_B else (matrix.kron.A,):
            if id(factor) not in done:
                done.add(id(factor))
                factor.mul_(weights[module])


def _copies(matrices: Mapping[nn.Module, SymMatrix]) -> dict[nn.Module, SymMatrix]:
    """The Kronecker factors copied, shared ones once; everything else as it is."""
    copies: dict[int, object] = {}
    found = {}
    for module, matrix in matrices.items():
        if matrix.kron is not None:
            for name in ("A", "B"):
                factor = getattr(matrix.kron, name)
                copies.setdefault(id(factor), factor.clone())
            kron = type(matrix.kron)(copies[id(matrix.kron.A)], copies[id(matrix.kron.B)])
            copy = SymMatrix(kron=kron)
            copy.trained = matrix.trained
            matrix = copy
        found[module] = matrix
    return found
