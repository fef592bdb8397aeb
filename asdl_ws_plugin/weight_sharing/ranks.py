"""Several processes that train one model, each on its part of the batch.

A step ends on every rank with the gradients of one process that has the joint batch. Every rank
holds the whole curvature and its inverses, and so has the whole state: ranks may come and go
between runs. What is divided is the work of inverting.

Before ranks exchange tensors they agree (:mod:`~.agreement`). What is exchanged is packed by name,
not by position: ranks may have called different layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .agreement import Agreement, signature
from .packing import Packed, buckets, unpack
from .shares import Share, Shares

__all__ = ["Ranks"]


class Ranks(Agreement):
    """What ranks that agree exchange: sums, values of one of them, shares, gradients."""

    def sum_(
        self,
        tensors: list[Tensor | None],
        weights: Callable[[int], float],
        are_same: bool,
        is_symmetric: Callable[[int], bool] = lambda _: False,
    ) -> list[Tensor | None]:
        """Weighted sums over the ranks, in place.

        Args:
            tensors: in the same order on all ranks; ``None`` where a rank does not have one, which
                is zero there. Half precision is added up in float32.
            weights: of the tensor at an index.
            are_same: whether all ranks have the same ones of them.
            is_symmetric: whether the tensor at an index is a symmetric matrix, or several: of these
                half is sent.

        Returns:
            The tensors; those that only other ranks had are new.
        """
        if not are_same:
            tensors = self._completed(tensors)
        # A tensor that is there several times is sent once.
        unique = {id(t): (i, t) for i, t in reversed([*enumerate(tensors)]) if t is not None}
        entries = sorted(unique.values(), key=lambda entry: entry[0])
        with self.exchanging(), torch.no_grad():
            for bucket in buckets([Packed(t, is_symmetric(i), weights(i)) for i, t in entries]):
                vector = torch.cat([entry.values() for entry in bucket])
                dist.all_reduce(vector, group=self.group)
                unpack(vector, bucket)
        return tensors

    def _completed(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """With zeros in the place of tensors that only other ranks have, and none shared."""
        specs = self.gather([None if t is None else (tuple(t.shape), t.dtype) for t in tensors])
        completed, seen = list(tensors), set[int]()
        for i, candidates in enumerate(zip(*specs, strict=True)):
            tensor = completed[i]
            spec = next((spec for spec in candidates if spec is not None), None)
            if tensor is None and spec is not None:
                completed[i] = torch.zeros(spec[0], dtype=spec[1], device=self.device)
            elif tensor is not None and id(tensor) in seen:
                completed[i] = tensor.clone()
            seen.add(id(tensor))
        return completed

    def broadcast_(self, tensors: list[tuple[Tensor, bool]], owner: int) -> None:
        """Give all ranks the values that ``owner`` has, in place.

        Args:
            tensors: with whether each is symmetric; ``owner``'s own are made exactly symmetric.
            owner: a rank.
        """
        source = owner if self.group is None else dist.get_global_rank(self.group, owner)
        with self.exchanging(), torch.no_grad():
            for bucket in buckets([Packed(*entry) for entry in tensors]):
                vector = torch.cat([entry.values() for entry in bucket])
                dist.broadcast(vector, source, group=self.group)
                unpack(vector, bucket)

    def exchange_shares(
        self, what: str, share: Share, *signatures: int
    ) -> tuple[Shares, list[bool]]:
        """What each rank's batch is of the joint one, and whether signatures are the same on all
        ranks.
        """
        rows = self.agree(what, [*astuple(share), *signatures])
        size = len(astuple(share))
        shares = Shares([Share(*row[:size]) for row in rows], self.rank)
        return shares, [len(set(column)) == 1 for column in list(zip(*rows, strict=True))[size:]]

    def average_gradients(
        self, what: str, parameters: Sequence[nn.Parameter], share: Share
    ) -> None:
        """Let ``.grad`` be the gradient of the joint loss, in the tensor that it is.

        A parameter that only other ranks have used gets their gradient.
        """
        grads = [p.grad for p in parameters]
        shares, (are_same,) = self.exchange_shares(
            what, share, signature([grad is not None for grad in grads])
        )
        summed = self.sum_(grads, lambda _: shares.of_gradient, are_same)
        for p, grad in zip(parameters, summed, strict=True):
            if p.grad is None and grad is not None:
                p.grad = grad

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who does which of several tasks of these costs: the costliest first, to whoever has least
        to do.
        """
        load, owner = [0.0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner[task] = min(range(self.size), key=load.__getitem__)
            load[owner[task]] += costs[task]
        return owner
