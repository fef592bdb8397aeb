"""A batch of padded sequences that ranks have unequal parts of, and how gradients are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, R, D, C = 7, 6, 4, 3  # unequal parts for any number of ranks


def part_of(rank: int, world: int) -> slice:
    """The examples of a rank."""
    size = N // world
    cuts = [0, *(N - size * k for k in range(world - 1, -1, -1))]
    return slice(cuts[rank], cuts[rank + 1])


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded sequences: other numbers of tokens, and of labelled ones, for each rank."""
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(N, R, D, generator=g), torch.randint(0, C, (N, R), generator=g)
    mask = torch.arange(R) < torch.tensor([6, 5, 6, 1, 2, 3, 1])[:, None]
    return x, y.masked_fill(~mask | (torch.arange(R) % 3 == 1), -1), mask


def mean_loss(y: Tensor, target: Tensor) -> Tensor:
    """The mean over the tokens that have a label."""
    return F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=-1)


def sum_loss(y: Tensor, target: Tensor) -> Tensor:
    """The sum over the tokens that have a label."""
    return F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")


def whole(tensor: Any) -> Any:
    """A tensor that may be divided among ranks, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grads(model: nn.Module) -> list[Any]:
    """The whole gradients as lists, which processes can send to each other."""
    return [None if p.grad is None else whole(p.grad).tolist() for p in model.parameters()]


def distance(found: list[Any], expected: list[Any]) -> float:
    """The largest relative difference of two lists of gradients."""
    return max(
        float((torch.tensor(a) - torch.tensor(b)).norm() / (1e-12 + torch.tensor(b).norm()))
        for a, b in zip(found, expected, strict=True)
    )
