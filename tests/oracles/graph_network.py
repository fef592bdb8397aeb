"""A graph network to try ragged weight sharing on, and a batch's curvature of it."""

from __future__ import annotations

from typing import Any

import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn

import asdl_ws_plugin
from oracles.autograd import BCE
from oracles.graphs import Graphs


def sum_rows(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, x.shape[1]).index_add(0, index, x)


class GraphNet(nn.Module):
    """A block of eq. 2.9 with sums as aggregation, smooth so that nothing hides behind a ReLU."""

    def __init__(self, num_outputs: int = 3, width: int = 4, norm: bool = False) -> None:
        super().__init__()
        self.edge, self.node, self.glob = (
            nn.Linear(2 + 6, width),
            nn.Linear(3 + width, width),
            nn.Linear(2 * width, 5),
        )
        self.norm: nn.Module = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(5, num_outputs)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
    ) -> Tensor:
        senders, receivers = edge_index
        edges = torch.tanh(self.edge(torch.cat([edge_attr, x[receivers], x[senders]], 1)))
        nodes = torch.tanh(
            self.norm(self.node(torch.cat([x, sum_rows(edges, receivers, len(x))], 1)))
        )
        pooled = [sum_rows(nodes, batch, num_graphs), sum_rows(edges, batch[senders], num_graphs)]
        return self.head(torch.tanh(self.glob(torch.cat(pooled, 1))))


def compute(
    model: nn.Module,
    graphs: Graphs,
    shared_dim: Any,
    loss: tuple[Any, ...] | None = None,
    shapes: Any = "kron",
    roles: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """The Fisher maker after one batch of graphs."""
    config = {
        "fisher_type": "fisher_exact",
        "loss_type": BCE,
        "data_size": graphs.num_graphs,
        **config,
    }
    maker = get_fisher_maker(
        model, FisherConfig(fisher_shapes=shapes, shared_dim=shared_dim, **config)
    )
    logits = maker.setup_model_call(model, *graphs.arguments)
    if loss is not None:
        maker.setup_loss_call(loss[0], logits, *loss[1:])
    roles = {"node": graphs.batch, "edge": graphs.edge_batch} if roles is None else roles
    with asdl_ws_plugin.segments(model, num_examples=graphs.num_graphs, **roles):
        maker.forward_and_backward()
    return maker
