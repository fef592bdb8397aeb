"""W ranks with the parts of a batch end every step with the gradients of one process that has the
whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asdl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from asdl.precondition.natural_gradient import NaturalGradientMaker
from oracles.processes import on_ranks
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import padding, segments

pytestmark = pytest.mark.slow
N, D, C = 7, 4, 3  # not a multiple of any number of ranks here: the last batch is smaller
STEPS = 6


class Dense(nn.Module):
    """Shared layers of several kinds, a layer norm, and a raw parameter that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, D))
        self.first, self.norm, self.head = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, C)
        self.conv = nn.Conv2d(1, 2, 2)
        self.mix = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x + self.position)))
        y = torch.tanh(self.conv(x.unsqueeze(1))).mean((2, 3))
        return self.head(x.mean(1) + self.mix(y))


class Tokens(nn.Module):
    """A label for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


class Graph(nn.Module):
    """Rows of all examples one after the other, pooled by graph."""

    def __init__(self) -> None:
        super().__init__()
        # A part may have as many nodes as graphs.
        self.node = asdl_ws_plugin.WeightSharingLinear(D, 5, role="node")
        self.head = asdl_ws_plugin.WeightSharingLinear(5, C, role="graph")

    def forward(self, x: Tensor, index: Tensor, n: int) -> Tensor:
        h = torch.tanh(self.node(x))
        return self.head(h.new_zeros(n, h.shape[1]).index_add_(0, index, h))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def split(rank: int, world_size: int) -> slice:
    """Unequal parts: the first rank has the remainder."""
    size = N // world_size
    cuts = [0, *(N - size * k for k in range(world_size - 1, -1, -1))]
    return slice(cuts[rank], cuts[rank + 1])


def token_loss(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=-1)


def dense(maker: Any, part: slice, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
    x, y = torch.randn(N, 3, D), torch.randint(0, C, (N,))
    maker.setup_loss_call(loss, maker.setup_model_call(maker.model, x[part]), y[part])
    maker.forward_and_backward()


def summed(maker: Any, part: slice) -> None:
    dense(maker, part, lambda y, target: F.cross_entropy(y, target, reduction="sum"))


def tokens(maker: Any, part: slice) -> None:
    """Padded sequences: other numbers of tokens, and of labelled ones, on each rank."""
    x, y = torch.randn(N, 6, D), torch.randint(0, C, (N, 6))
    lengths = torch.tensor([6, 5, 6, 1, 2, 3, 1])
    mask = torch.arange(6) < lengths[:, None]
    y = y.masked_fill(~mask | (torch.arange(6) % 3 == 1), -1)
    with padding(maker.model, mask[part]):
        maker.setup_loss_call(token_loss, maker.setup_model_call(maker.model, x[part]), y[part])
        maker.forward_and_backward()


def graphs(maker: Any, part: slice) -> None:
    index = torch.arange(N).repeat_interleave(torch.tensor([5, 1, 3, 2, 0, 4, 1]))
    x, y = torch.randn(len(index), D), torch.randint(0, C, (N,))
    kept = (index >= part.start) & (index < part.stop)
    index, n = index[kept] - part.start, part.stop - part.start
    with segments(maker.model, node=index, num_examples=n):
        dummy = maker.setup_model_call(maker.model, x[kept], index, n)
        maker.setup_loss_call(F.cross_entropy, dummy, y[part])
        maker.forward_and_backward()


CASES: dict[str, tuple[type[nn.Module], Callable[..., None], Any]] = {
    "dense": (Dense, dense, "reduce"),
    "dense, expand": (Dense, dense, "expand"),
    "dense, a sum": (Dense, summed, "reduce"),
    "converted": (Attention, dense, "reduce"),
    "tokens": (Tokens, tokens, "expand"),
    "tokens, reduce": (Tokens, tokens, "reduce"),
    "tokens, auto": (Tokens, tokens, "auto"),
    "graphs": (Graph, graphs, "reduce"),
    "graphs, expand": (Graph, graphs, "expand"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "average": {"ema_decay": 0.3},
    "average, 1 and 5": {
        "ema_decay": 0.3,
        "curvature_upd_interval": 1,
        "preconditioner_upd_interval": 5,
    },
    "no average": {},
    "no average, 5": {"preconditioner_upd_interval": 5},
}


def gradients(
    rank: int, world_size: int, case: str, options: dict[str, Any], shape: Any = None
) -> list[list[np.ndarray]]:
    """Every step's gradients."""
    # A layer that another rank inverts has an inverse here, too.
    warnings.filterwarnings("error", ".*exactly zero")
    model_class, step, shared_dim = CASES[case]
    torch.manual_seed(0)
    model = asdl_ws_plugin.convert(model_class())
    config = asdl.PreconditioningConfig(damping=1e-2, **options)
    keywords = {"fisher_type": "fisher_emp", "shared_dim": shared_dim}
    if shape is None:
        maker = asdl.KfacGradientMaker(model, config, **keywords)
    else:
        maker = NaturalGradientMaker(model, config, fisher_shape=shape, **keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(maker, split(rank, world_size))
        history.append([p.grad.numpy().copy() for p in model.parameters()])
        optimizer.step()
    return history


def many(rank: int, world_size: int, calls: list[tuple[Any, ...]]) -> list[Any]:
    return [gradients(rank, world_size, *call) for call in calls]


@pytest.fixture(autouse=True)
def double(double: None) -> Iterator[None]:
    yield


ALL = [(case, options) for case in CASES for options in OPTIONS]
FEWER = [(case, options) for case, options in ALL if "," in options or case == "tokens"]
SHAPES = ["full", "layer_wise", "unit_wise", "diag"]


@pytest.mark.filterwarnings("ignore:.*no Kronecker factors")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_end_every_step_with_the_gradients_of_one_process(
    world_size: int, tmp_path: Path
) -> None:
    """Dense, token, graph and converted models; with and without a moving average; intervals of 1
    and 5. Four ranks are more than most of these models have layers.
    """
    cases = ALL if world_size == 2 else FEWER
    calls: list[tuple[Any, ...]] = [(case, OPTIONS[options]) for case, options in cases]
    calls += [("tokens", OPTIONS["average"], shape) for shape in SHAPES]
    calls += [("tokens", OPTIONS["no average"], shape) for shape in SHAPES]
    names = [*cases, *(("tokens", shape) for shape in [*SHAPES, *SHAPES])]
    ranks = on_ranks(world_size, tmp_path, many, calls)
    joint = many(0, 1, calls)
    for name, expected, *found in zip(names, joint, *ranks, strict=True):
        for step, steps in enumerate(zip(expected, *found, strict=True)):
            for wanted, first, *others in zip(*steps, strict=True):
                error = np.abs(first - wanted).max() / max(1e-3, np.abs(wanted).max())
                assert error < 1e-10, (name, step, error)
                assert all(np.array_equal(first, other) for other in others), (name, step)


def in_a_group(rank: int, world_size: int) -> Any:
    """Ranks 1 and 2 train by themselves while rank 0 does something else."""
    group = None
    if world_size > 1:
        group = torch.distributed.new_group([1, 2])
        if rank == 0:
            return None
    model = Dense()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3)
    maker = NaturalGradientMaker(
        model,
        config,
        fisher_type="fisher_emp",
        fisher_shape="kron",
        shared_dim="reduce",
        sync_group=group,
        sync_group_ranks=None if group is None else [1, 2],
    )
    for _ in range(2):
        model.zero_grad()
        dense(maker, slice(0, N) if group is None else split(rank - 1, 2))
    return [p.grad.numpy().copy() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*no Kronecker factors")
def test_a_sync_group_over_a_part_of_the_ranks(tmp_path: Path) -> None:
    _, first, second = on_ranks(3, tmp_path, in_a_group)
    for wanted, one, other in zip(in_a_group(0, 1), first, second, strict=True):
        assert np.array_equal(one, other)
        assert np.abs(one - wanted).max() < 1e-10 * max(1e-3, np.abs(wanted).max())
