"""Ragged weight sharing: positions whose number differs by example (sections 3.3 and 3.4 of the
thesis).

Graphs batched by concatenation have *rows*, ``(ΣR_n, P)``, and an index that says which example
each belongs to (:class:`Segments`). Padded sequences are the same thing in a dense coat, ``(N, R,
P)`` with a mask (:class:`Mask`). Both offer the same operations; nothing here knows about modules
or ASDL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import accumulation_dtype

__all__ = ["Mask", "Ragged", "Segments", "set_backend"]


def _index_add(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, index, x)


def _torch_scatter(x: Tensor, index: Tensor, size: int) -> Tensor:
    from torch_scatter import scatter_add, segment_csr

    if x.is_cuda and bool(
        (index[1:] >= index[:-1]).all()
    ):  # deterministic on a GPU, where atomic additions are not
        counts = torch.bincount(index, minlength=size)
        return segment_csr(x, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    return scatter_add(x, index, dim=0, dim_size=size)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "torch": _index_add,
    "torch_scatter": _torch_scatter,
}
_backend = "torch"


def set_backend(name: str) -> str:
    """Choose what sums rows by segment: ``'torch'`` (the default) or ``'torch_scatter'``.

    Both give the same factors. On a CPU PyTorch's own functions are as fast for sorted rows and up
    to twice as fast for shuffled ones (``benchmarks/segments.py``). On a GPU ``torch_scatter`` adds
    the rows of sorted indices in a fixed order, where ``index_add_`` adds atomically, in an order
    that differs from run to run.

    Returns:
        The backend that was chosen before.

    Raises:
        ValueError: there is no such backend.
        ImportError: torch_scatter is not installed.
    """
    global _backend
    if name not in _BACKENDS:
        raise ValueError(
            f"The backend has to be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}."
        )
    if name == "torch_scatter":
        try:
            import torch_scatter  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "The backend 'torch_scatter' needs the extra 'scatter': pip install "
                "--no-build-isolation 'asdl-ws-plugin[scatter]'"
            ) from error
    previous, _backend = _backend, name
    return previous


class Ragged:
    """Which example each position belongs to. Subclasses differ in how positions are stored.

    Attributes:
        num_examples: N.
        num_positions: ``ΣR_n``, without the positions that are left out.
    """

    num_examples: int
    num_positions: int

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the positions of each example: ``(N, P)``; 0 for an example without
        positions.
        """
        raise NotImplementedError

    def counts(self) -> Tensor:
        """R_n, ``(N,)``."""
        raise NotImplementedError

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the positions of each example: ``(N, P)``; 0 for an example without
        positions.
        """
        total = self.sum(x)
        return total.div_(self.counts().clamp(min=1).to(total.dtype).unsqueeze(1))

    def rows(self, x: Tensor) -> Tensor:
        """The positions that are not left out, as rows: ``(ΣR_n, P)``."""
        raise NotImplementedError

    def pad(self, x: Tensor) -> Tensor:
        """``(N, max R_n, P)``, with zeros where an example has fewer positions."""
        raise NotImplementedError


class Segments(Ragged):
    """Rows ``(ΣR_n, P)`` and the example that each belongs to.

    Args:
        index: the example of each row, integers ``(rows,)`` in ``[0, num_examples)``, in any order.
        ptr: in place of ``index``, where the rows of each example begin and end, ``(num_examples +
            1,)``; rows are sorted by example.
        num_examples: N. Left out, ``index.max() + 1`` or ``len(ptr) - 1``.
        mask: ``(rows,)``, False for the rows to leave out (of padding graphs). Their index is not
            looked at.

    Raises:
        TypeError: index, ptr or mask are of the wrong dtype, or not exactly one of index and ptr is
            given.
        ValueError: wrong sizes, negative or out-of-range indices, a ptr that decreases.

    >>> from asdl_ws_plugin import Segments
    >>> segments = Segments(torch.tensor([0, 0, 1, 0]), num_examples=3)  # the third has no rows
    >>> segments.counts()
    tensor([3, 1, 0])
    """

    def __init__(
        self,
        index: Tensor | None = None,
        *,
        ptr: Tensor | None = None,
        num_examples: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if (index is None) == (ptr is None):
            raise TypeError("Give either index or ptr.")
        if ptr is not None:
            index, num_examples = _from_ptr(ptr, num_examples)
        assert index is not None
        if not _is_integer(index):
            raise TypeError(f"index has to be a tensor of integers, got {_describe(index)}.")
        if index.ndim != 1:
            raise ValueError(f"index has to be of one dimension, got sizes {tuple(index.shape)}.")
        index = index.long()
        if mask is not None:
            _check_row_mask(mask, index)
        if index.is_meta:
            raise ValueError("index is on the meta device, where it has no values.")
        kept = index if mask is None else index[mask]
        low, high = (int(v) for v in kept.aminmax()) if kept.numel() else (0, -1)
        if low < 0:
            raise ValueError(f"index has the negative entry {low}.")
        if num_examples is None:
            num_examples = high + 1
        if high >= num_examples:
            raise ValueError(f"index has the entry {high}, but there are {num_examples} examples.")
        self.num_examples = int(num_examples)
        self.num_positions = kept.numel()
        self.mask = mask
        # Rows that are left out are summed into an example of their own, which is dropped.
        self.index = index if mask is None else index.masked_fill(~mask, self.num_examples)
        self._counts: Tensor | None = None
        self._order: tuple[Tensor, Tensor] | None = None
        self._is_dense: bool | None = None

    @property
    def is_dense(self) -> bool:
        """Whether all examples have equally many rows, sorted: then ``(rows, P)`` is ``(N, R,
        P)``.
        """
        if self._is_dense is None:
            per_example, rest = (
                divmod(len(self), self.num_examples) if self.num_examples else (0, 1)
            )
            ids = torch.arange(self.num_examples, device=self.device)
            self._is_dense = (
                self.mask is None
                and rest == 0
                and per_example > 0
                and torch.equal(self.index, ids.repeat_interleave(per_example))
            )
        return self._is_dense

    def equals(self, other: Segments) -> bool:
        """Whether the same rows belong to the same examples."""
        return self.num_examples == other.num_examples and torch.equal(self.index, other.index)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Segments({self.num_positions} of {len(self)} rows, {self.num_examples} examples)"

    @property
    def device(self) -> torch.device:
        """Where the index lies."""
        return self.index.device

    def with_num_examples(self, num_examples: int) -> Segments:
        """The same rows, with further examples that have none."""
        index = self.index.where(
            self.index < self.num_examples, 0
        )  # what is masked may have any index
        return Segments(index, num_examples=num_examples, mask=self.mask)

    def repeated(self, times: int) -> Segments:
        """For rows with further weight-sharing dimensions, ``(rows, times, P) -> (rows·times,
        P)``.
        """
        if times == 1:
            return self
        mask = None if self.mask is None else self.mask.repeat_interleave(times)
        index = self.index.where(self.index < self.num_examples, 0).repeat_interleave(times)
        return Segments(index, num_examples=self.num_examples, mask=mask)

    @staticmethod
    def cat(parts: Sequence[Segments]) -> Segments:
        """The rows of several calls of a layer, one after the other."""
        if len(parts) == 1:
            return parts[0]
        masks = [
            part.mask if part.mask is not None else torch.ones_like(part.index, dtype=torch.bool)
            for part in parts
        ]
        has_mask = any(part.mask is not None for part in parts)
        return Segments(
            torch.cat([part.index.where(part.index < part.num_examples, 0) for part in parts]),
            num_examples=max(part.num_examples for part in parts),
            mask=torch.cat(masks) if has_mask else None,
        )

    def counts(self) -> Tensor:
        """Rows of each example, ``(N,)``."""
        if self._counts is None:
            self._counts = torch.bincount(self.index, minlength=self.num_examples + 1)[
                : self.num_examples
            ]
        return self._counts

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the rows of each example: ``(rows, P) -> (N, P)``."""
        x = x.to(accumulation_dtype(x.dtype))
        if x.shape[0] == 0:
            return x.new_zeros(self.num_examples, *x.shape[1:])
        size = self.num_examples + (self.mask is not None)
        if (
            _backend == "torch"
            and x.ndim == 2
            and x.dtype == torch.float32
            and x.device.type == "cpu"
        ):
            # Reads every row once and writes every sum once, in any order of the rows, where
            # index_add_ goes back and forth between the sums.
            order, starts = self._sorted()
            total = F.embedding_bag(order, x, starts[:size], mode="sum")
        else:
            total = _BACKENDS[_backend](x.contiguous(), self.index, size)
        return total[: self.num_examples]

    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The rows in the order of their examples, and where each example's begin; found once."""
        if self._order is None:
            if bool((self.index[1:] >= self.index[:-1]).all()):
                order = torch.arange(len(self), device=self.device)
            else:
                order = torch.argsort(self.index, stable=True)
            counts = torch.bincount(self.index, minlength=self.num_examples + 1)
            self._order = order, counts.cumsum(0) - counts
        return self._order

    def rows(self, x: Tensor) -> Tensor:
        """The rows that belong to an example."""
        return x if self.mask is None else x[self.mask]

    def rank(self) -> Tensor:
        """The position of each row within its example, ``(rows,)``, in the order of the rows."""
        order, starts = self._sorted()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - starts[self.index[order]]
        return rank

    def pad(self, x: Tensor) -> Tensor:
        """Dense, with zeros behind the rows of each example: ``(N, max R_n, P)``."""
        longest = max(1, int(self.counts().max()) if self.num_examples else 1)
        padded = x.new_zeros(self.num_examples, longest, *x.shape[1:])
        rank, index = self.rank(), self.index
        if self.mask is not None:
            rank, index, x = rank[self.mask], index[self.mask], x[self.mask]
        padded[index, rank] = x
        return padded


class Mask(Ragged):
    """Positions ``(N, R, P)`` of which some are padding.

    Args:
        mask: booleans ``(N, R)``, True for real positions.
    """

    def __init__(self, mask: Tensor) -> None:
        if _is_integer(mask) and bool(((mask == 0) | (mask == 1)).all()):  # as tokenizers return it
            mask = mask.bool()
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"A padding mask has to be booleans (True: a real token), got {_describe(mask)}. "
                "mask.bool() makes them of numbers 1 and 0, and mask == 0 of numbers that are "
                "added to attention's scores."
            )
        if mask.ndim != 2:
            raise ValueError(
                f"A padding mask has to be of sizes (N, R), got {tuple(mask.shape)}. Of one for "
                "attention, (N, 1, 1, R), take mask[:, 0, 0]."
            )
        self.mask = mask
        self.num_examples = mask.shape[0]
        self.num_positions = int(mask.sum())

    def __repr__(self) -> str:
        n, length = self.mask.shape
        return f"Mask({self.num_positions} of {n} x {length} positions)"

    @staticmethod
    def cat(parts: Sequence[Mask]) -> Mask:
        """Masks side by side: positions of one example one after the other."""
        return (
            parts[0] if len(parts) == 1 else Mask(torch.cat([part.mask for part in parts], dim=1))
        )

    def repeated(self, times: int) -> Mask:
        """Every position several times, one after the other."""
        return self if times == 1 else Mask(self.mask.repeat_interleave(times, dim=1))

    def counts(self) -> Tensor:
        """Real tokens of each example, ``(N,)``."""
        return self.mask.sum(1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the real tokens of each example: ``(N, R, P) -> (N, P)``."""
        x = x.to(accumulation_dtype(x.dtype))
        # A product with the mask instead of a sum of masked values: one pass, no copy. It takes NaN
        # from padding along, where there is any; a padded copy does not.
        total = (self.mask.unsqueeze(1).to(x.dtype) @ x).squeeze(1)
        return total if bool(torch.isfinite(total).all()) else self.pad(x).sum(1)

    def rows(self, x: Tensor) -> Tensor:
        """The real tokens alone, ``(rows, P)``."""
        return x[self.mask]

    def pad(self, x: Tensor) -> Tensor:
        """Zeros in place of the padding, ``(N, R, P)``."""
        return x.masked_fill(~self.mask.unsqueeze(-1), 0)


def _check_row_mask(mask: object, index: Tensor) -> None:
    """Raise a TypeError or ValueError unless it says of each row of ``index`` whether it counts."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask has to be a tensor of booleans, got {_describe(mask)}.")
    if mask.shape != index.shape:
        raise ValueError(f"mask has sizes {tuple(mask.shape)}, but there are {len(index)} rows.")
    if mask.device != index.device:
        raise ValueError(f"mask is on {mask.device}, but index on {index.device}.")


def _from_ptr(ptr: Tensor, num_examples: int | None) -> tuple[Tensor, int]:
    if not _is_integer(ptr):
        raise TypeError(f"ptr has to be a tensor of integers, got {_describe(ptr)}.")
    if ptr.ndim != 1 or len(ptr) < 2:
        raise ValueError(f"ptr has to be of sizes (num_examples + 1,), got {tuple(ptr.shape)}.")
    sizes = ptr.diff()
    if int(ptr[0]) != 0 or bool((sizes < 0).any()):
        raise ValueError("ptr has to begin with 0 and must not decrease.")
    if num_examples is not None and num_examples != len(sizes):
        raise ValueError(f"ptr is for {len(sizes)} examples, but num_examples is {num_examples}.")
    return torch.repeat_interleave(torch.arange(len(sizes), device=ptr.device), sizes), len(sizes)


def _is_integer(value: object) -> bool:
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def _describe(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
