"""The curvature of several micro-batches of one step, added up to that of the joint batch.

What is divided by the number of loss terms, as B is, adds up by itself: the user divides the loss
by the number of micro-batches, or passes its sum. A is a mean over examples, and under
K-FAC-expand over positions, so it is weighted by how many there were of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from asdl.symmatrix import SymMatrix
from torch import nn

from .matrices import merge, shared_tensors
from .shares import Part, Share

__all__ = ["MicroBatches"]


@dataclass(frozen=True)
class MicroBatches:
    """A sum of curvatures, module by module.

    Attributes:
        count: how many micro-batches there were.
        matrices: the sums. A is multiplied with its weight while there are several.
        shares: what each micro-batch is of the joint batch.
        means: mean positions of an example in each, of layers whose A is divided by that.
        unseen: the modules that no micro-batch has reached, and why the last one did not.
        step: what is wanted of the curvature.
        is_joint: whether ``.grad`` has the gradients of all ranks already.
        weigh_A, weigh_B: whether the factor is a mean over examples, and not divided by a
            ``data_size`` that was given.
    """

    count: int = 0
    matrices: dict[nn.Module, SymMatrix] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()
    means: tuple[dict[nn.Module, float], ...] = ()
    unseen: dict[nn.Module, str] = field(default_factory=dict)
    step: Any = None
    weigh_A: bool = True
    weigh_B: bool = False
    is_joint: bool = False

    def added(
        self,
        new: Part,
        has_B_of_examples: bool,
    ) -> MicroBatches:
        """The sum with one more micro-batch, whose curvature is used up; this stays as it is.

        Args:
            has_B_of_examples: B is a mean over examples, as A is.
        """
        matrices, before = dict(self.matrices), self.unseen if self.count else new.unseen
        is_mean = not new.step.has_data_size
        if self.count == 1:  # a single one is not scaled, so that nothing is rounded
            matrices = _copies(matrices)
            self._scale(list(matrices.items()), partial(self._weight, 0))
        total = MicroBatches(
            self.count + 1,
            matrices,
            (*self.shares, new.share),
            (*self.means, new.positions),
            {},
            new.step,
            is_mean,
            is_mean and has_B_of_examples,
            self.is_joint,
        )
        if self.count:
            total._scale(new.results, partial(total._weight, self.count))
        shared = shared_tensors(matrix for _, matrix in new.results)
        for module, matrix in new.results:
            old = matrices.get(module)
            matrices[module] = matrix if old is None else merge(matrix, old, 1.0, shared)
        missing = {m: why for m, why in {**before, **new.unseen}.items() if m not in matrices}
        return replace(total, unseen=missing)

    def with_share(self, share: Share) -> MicroBatches:
        """The sum with a micro-batch of a step without curvature."""
        return replace(self, shares=(*self.shares, share))

    def joined(self) -> Part:
        """The joint batch."""
        results = list(self.matrices.items())
        if self.count > 1:
            self._scale(
                results, lambda module: 1 / sum(self._weight(i, module) for i in range(self.count))
            )
        return Part(results, self.unseen, self.share, self._positions(), self.step)

    @property
    def share(self) -> Share:
        """What the joint batch of the micro-batches is of that of all ranks."""
        count = max(1, len(self.shares))
        return Share(
            sum(share.sum_factor for share in self.shares) / count,
            sum(share.num_terms for share in self.shares) / count,
            sum(share.num_rows for share in self.shares),
            sum(share.num_examples for share in self.shares),
        )

    def _positions(self) -> dict[nn.Module, float]:
        """The mean number of positions of an example of the joint batch."""
        found = {}
        for module in {module for mean in self.means for module in mean}:
            called = [
                (share.num_examples, mean[module])
                for share, mean in zip(self.shares, self.means, strict=True)
                if module in mean
            ]
            found[module] = sum(n * r for n, r in called) / sum(n for n, _ in called)
        return found

    def _weight(self, i: int, module: nn.Module) -> float:
        """Of A in a micro-batch: its examples, times their positions where A is a mean over
        them.
        """
        is_mean = any(module in mean for mean in self.means)
        positions = self.means[i].get(module, 0.0) if is_mean else 1.0
        return self.shares[i].num_examples * positions

    def _scale(
        self,
        results: Sequence[tuple[nn.Module, SymMatrix]],
        weight: Callable[[nn.Module], float],
    ) -> None:
        """Multiply what is a mean, in place, with its weight; once where modules share it."""
        done: set[int] = set()
        for module, matrix in results:
            if matrix.kron is None:
                continue
            wanted = [matrix.kron.A] * self.weigh_A + [matrix.kron.B] * self.weigh_B
            for factor in wanted:
                if id(factor) not in done:
                    done.add(id(factor))
                    factor.mul_(weight(module))


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
            copy.trained, copy.updates = matrix.trained, matrix.updates
            matrix = copy
        found[module] = matrix
    return found
