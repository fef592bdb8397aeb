"""Ranks that agree: each says that all went well, or why it did not.

They do before they exchange tensors. So one that fails ends the step on all of them, with its
message, before any of them waits for it. While nothing is exchanged, what a rank says next is
always an agreement; that is why a failing rank can speak at any time.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Agreement", "RankFailure", "RankNotFinite", "signature"]

_OK, _FAILED, _NOT_FINITE = range(3)
_MESSAGE_SIZE = 8


class RankFailure(RuntimeError):
    """Another rank failed, so that this one cannot go on; the message is that rank's."""


class RankNotFinite(RankFailure, FloatingPointError):
    """The loss or the curvature of another rank is not finite."""


class Agreement:
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
    def alone(cls) -> Self:
        """This process, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.device, ranks.size, ranks.rank = None, None, 1, 0
        ranks._is_silent = False
        return ranks

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

    def end(self, what: str) -> None:
        """The last agreement of a step: all of it went well on all ranks. Until the next step,
        nobody waits for this one.

        Raises a RankFailure if it did not go well on another.
        """
        self.agree(what)
        self._is_silent = True

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
    def exchanging(self) -> Iterator[None]:
        """Tensors are exchanged: a rank that fails now cannot tell, for no other listens."""
        self._is_silent = True
        yield
        self._is_silent = False

    def gather(self, value: Any) -> list[Any]:
        """One object of each rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.exchanging():
            dist.all_gather_object(values, value, group=self.group)
        return values


def signature(value: Any) -> int:
    """A number that is the same for what prints the same."""
    return zlib.crc32(repr(value).encode())
