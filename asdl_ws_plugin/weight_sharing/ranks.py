"""Several processes that train one model, each on its part of the batch.

A step ends on every rank with the gradients of one process that has the joint batch. Every rank
holds the whole curvature and its inverses, and so has the whole state: ranks may come and go
between runs. What is divided is the work of inverting.

Before ranks exchange tensors they *agree*: each says that all went well, or why it did not. So one
that fails ends the step on all of them, with its message, before any of them waits for it. While
nothing is exchanged, what a rank says next is always an agreement; that is why a failing rank can
speak at any time.

What is exchanged is packed by name, not by position: ranks may have called different layers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .factors import accumulation_dtype

__all__ = ["RankFailure", "RankNotFinite", "Ranks", "Share", "signature", "unsynchronized"]

_OK, _FAILED, _NOT_FINITE = range(3)
_MESSAGE_SIZE = 8
_BUCKET_NUMEL = 2**25  # elements that are sent at once


class RankFailure(RuntimeError):
    """Another rank failed, so that this one cannot go on; the message is that rank's."""


class RankNotFinite(RankFailure, FloatingPointError):
    """The loss or the curvature of another rank is not finite."""


@dataclass(frozen=True)
class Share:
    """What a rank's batch is of the joint one.

    Attributes:
        sum_factor: the gradient of the summed loss over that of the loss: T for a mean over T
            terms, 1 for a sum.
        num_terms: T, the number of terms that the loss averages over; 1 for a sum.
        num_rows: the number of terms that count.
        num_examples: N.
    """

    sum_factor: float = 1.0
    num_terms: float = 1.0
    num_rows: float = 0.0
    num_examples: float = 0.0


@dataclass(frozen=True)
class Shares:
    """The shares of all ranks, and which of them is one's own."""

    all: list[Share]
    rank: int

    @property
    def is_sum(self) -> bool:
        """Whether the loss is the sum of its terms, so that the joint loss is the sum over the
        ranks. A mean over a single term on every rank is a mean.
        """
        return all(share.sum_factor == 1 for share in self.all) and any(
            share.num_rows > 1 for share in self.all
        )

    def _part(self, amounts: Sequence[float]) -> float:
        return amounts[self.rank] / sum(amounts)

    @property
    def of_gradient(self) -> float:
        """What this rank's gradient is multiplied with in the sum that is the joint gradient."""
        return 1.0 if self.is_sum else self._part([share.sum_factor for share in self.all])

    @property
    def of_terms(self) -> float:
        """The same for what is divided by T, as B is."""
        return 1.0 if self.is_sum else self._part([share.num_terms for share in self.all])

    @property
    def of_examples(self) -> float:
        """The same for what is divided by N, as A is."""
        return self._part([share.num_examples for share in self.all])

    @property
    def of_ranks(self) -> float:
        """The same for what is divided by a ``data_size`` that was given: of one rank's batch."""
        return 1 / len(self.all)

    def of_positions(self, positions: Sequence[float | None]) -> float:
        """What A of K-FAC-expand is multiplied with, besides.

        It is divided by the mean number of positions of an example; in the joint batch, by that of
        the joint batch.

        Args:
            positions: of a layer, that number on each rank; ``None`` where it was not called.
        """
        own = positions[self.rank]
        called = [
            (share.num_examples, count)
            for share, count in zip(self.all, positions, strict=True)
            if count is not None
        ]
        total = sum(n * count for n, count in called)
        return own * sum(n for n, _ in called) / total if own and total else 1.0


class Ranks:
    """The processes of a group, one of which is this one. Without ``torch.distributed``, one.

    Args:
        group: the process group; ``None``: all processes.
        device: where what is sent has to be.

    Attributes:
        size: how many ranks there are.
        rank: which of them this is, counted within the group.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None
    ) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group, self.device = group, device
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0
        if self.rank < 0:
            raise ValueError(
                "sync_group does not have this process. Make the gradient maker on the ranks of "
                "the group alone."
            )
        self._is_silent = False  # nobody waits for an agreement

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.device, ranks.size, ranks.rank = None, None, 1, 0
        return ranks

    # ------------------------------------------------------------------------------------- agreeing

    def begin(self) -> None:
        """A step begins: what the ranks say next is an agreement."""
        self._is_silent = False

    def agree(self, what: str, values: Sequence[float] = ()) -> list[list[float]]:
        """Tell the other ranks that all went well here, with a few numbers; returns those of all.

        Args:
            what: what the numbers are for, the same on all ranks that are at the same place.

        Raises:
            RankFailure: another rank failed, or is at another place of its training.
        """
        if self.size == 1:
            return [list(values)]
        try:
            found = self._exchange(_OK, [signature(what), *values])
        except RuntimeError as error:
            raise RankFailure(
                "A rank does not answer. It has ended, and its own message says why, or the "
                "connection is lost."
            ) from error
        self._raise_of_others([int(row[0]) for row in found], "")
        if len({row[1] for row in found}) > 1:
            places = [""] * self.size
            dist.all_gather_object(places, what, group=self.group)
            raise RankFailure(
                "The ranks are not at the same place of their training: "
                + "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
                + ". Every rank has to make the same steps, with the same options."
            )
        self._is_silent = False
        return [row[2 : 2 + len(values)] for row in found]

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks that this one failed. They raise at their next agreement."""
        if self.size == 1 or self._is_silent:
            return
        status = _NOT_FINITE if isinstance(error, FloatingPointError) else _FAILED
        # Another rank may be gone by now; the error that is to be raised here is this rank's own.
        with contextlib.suppress(RuntimeError):
            found = self._exchange(status, [])
            self._raise_of_others(
                [int(row[0]) for row in found], f"{type(error).__name__}: {error}"
            )

    def _exchange(self, status: int, values: list[float]) -> list[list[float]]:
        self._is_silent = True
        message = torch.zeros(_MESSAGE_SIZE, dtype=torch.float64)
        message[: len(values) + 1] = torch.tensor([status, *values], dtype=torch.float64)
        message = message.to(self.device)
        found = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(found, message, group=self.group)
        return torch.stack(found).tolist()

    def _raise_of_others(self, statuses: list[int], own: str) -> None:
        if not any(statuses):
            return
        messages = [""] * self.size
        dist.all_gather_object(messages, own, group=self.group)
        failed = [f"Rank {i}: {message}" for i, message in enumerate(messages) if message]
        all_not_finite = all(status in (_OK, _NOT_FINITE) for status in statuses)
        raise (RankNotFinite if all_not_finite else RankFailure)("\n".join(failed))

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Tensors are exchanged: a rank that fails now cannot tell, for no other listens."""
        self._is_silent = True
        yield
        self._is_silent = False

    def gather(self, value: Any) -> list[Any]:
        """One object of each rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._exchanging():
            dist.all_gather_object(values, value, group=self.group)
        return values

    # ------------------------------------------------------------------------------------- exchange

    def sum_(
        self,
        tensors: list[Tensor | None],
        weights: Callable[[int], float],
        are_same: bool,
    ) -> list[Tensor | None]:
        """Weighted sums over the ranks, in place.

        Args:
            tensors: in the same order on all ranks; ``None`` where a rank does not have one, which
                is zero there. Half precision is added up in float32.
            weights: of the tensor at an index.
            are_same: whether all ranks have the same ones of them.

        Returns:
            The tensors; those that only other ranks had are new.
        """
        if not are_same:
            tensors = self._completed(tensors)
        # A tensor that is there several times is sent once.
        unique = {id(t): (i, t) for i, t in reversed([*enumerate(tensors)]) if t is not None}
        entries = sorted(unique.values(), key=lambda entry: entry[0])
        with self._exchanging(), torch.no_grad():
            for bucket in _buckets(entries):
                vector = torch.cat(
                    [
                        _dense(tensor).flatten().to(accumulation_dtype(tensor.dtype)) * weights(i)
                        for i, tensor in bucket
                    ]
                )
                dist.all_reduce(vector, group=self.group)
                _unpack(vector, [tensor for _, tensor in bucket])
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

    def broadcast_(self, tensors: list[Tensor], owner: int) -> None:
        """Give all ranks the values that ``owner`` has, in place."""
        source = owner if self.group is None else dist.get_global_rank(self.group, owner)
        with self._exchanging(), torch.no_grad():
            for bucket in _buckets(list(enumerate(tensors))):
                vector = torch.cat([tensor.flatten() for _, tensor in bucket])
                dist.broadcast(vector, source, group=self.group)
                if owner != self.rank:
                    _unpack(vector, [tensor for _, tensor in bucket])

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
        self._is_silent = True  # until the next step, nobody waits for this rank

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who does which of several tasks of these costs: the costliest first, to whoever has least
        to do.
        """
        load, owner = [0.0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner[task] = min(range(self.size), key=load.__getitem__)
            load[owner[task]] += costs[task]
        return owner


def signature(value: Any) -> int:
    """A number that is the same for what prints the same."""
    return zlib.crc32(repr(value).encode())


def _buckets(entries: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Tensors of one dtype, in order, in lists of not too many elements."""
    bucket: list[tuple[int, Tensor]] = []
    numel = 0
    for entry in entries:
        tensor = entry[1]
        if bucket and (
            tensor.dtype != bucket[0][1].dtype or numel + tensor.numel() > _BUCKET_NUMEL
        ):
            yield bucket
            bucket, numel = [], 0
        bucket.append(entry)
        numel += tensor.numel()
    if bucket:
        yield bucket


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _unpack(vector: Tensor, tensors: list[Tensor]) -> None:
    """Copied, never exchanged: a gradient may be a part of a buffer that others know."""
    for tensor, values in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
        values = values.view(tensor.shape).to(tensor.dtype)
        tensor.copy_(values.to_sparse(tensor.sparse_dim()) if tensor.is_sparse else values)


# --------------------------------------------------------------------------- data-parallel wrappers


@contextlib.contextmanager
def unsynchronized(model_fn: Any) -> Iterator[None]:
    """Keep the DistributedDataParallel that a function calls from averaging gradients itself.

    They are averaged here, once, with the weights of the ranks and by name; and a rank that fails
    in its backward pass leaves nobody waiting. Buffers are broadcast as ever.

    Raises a ValueError for one that cannot be kept from it.
    """
    wrappers = list(_wrappers(model_fn))
    if any(wrapper.static_graph for wrapper in wrappers):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) averages gradients without the weights of "
            "the ranks' batches. Make it without static_graph."
        )
    before = [wrapper.require_backward_grad_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = False
        yield
    finally:
        for wrapper, sync in zip(wrappers, before, strict=True):
            wrapper.require_backward_grad_sync = sync
            wrapper.require_forward_param_sync = True


def _wrappers(model_fn: Any) -> Iterator[DistributedDataParallel]:
    if isinstance(model_fn, nn.Module):
        yield from (m for m in model_fn.modules() if isinstance(m, DistributedDataParallel))
    elif isinstance(model_fn, functools.partial):
        for part in (model_fn.func, *model_fn.args, *model_fn.keywords.values()):
            yield from _wrappers(part)
    elif inspect.ismethod(model_fn):
        yield from _wrappers(model_fn.__self__)
    elif inspect.isfunction(model_fn):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            names = inspect.getclosurevars(model_fn)
            for value in (*names.nonlocals.values(), *names.globals.values()):
                if isinstance(value, nn.Module):
                    yield from _wrappers(value)
