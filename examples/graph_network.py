"""The graph network of Battaglia et al. (2018) for graph classification, as in section 2.1.1.2 of
the K-FAC thesis.

Graphs are batched by concatenation: all nodes of a batch are the rows of one matrix, all edges
those of another. The layers of the update functions share their weights over a graph's edges and
nodes, so each carries the *role* of its rows; which graph a row belongs to is told once for a batch
(``asdl_ws_plugin.segments`` or ``attach_segments``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asdl_ws_plugin import WeightSharingLinear

__all__ = ["Block", "GraphNetwork", "mlp"]


def mlp(
    in_features: int, out_features: int, role: str, dropout: float = 0.0, norm: bool = True
) -> nn.Sequential:
    """An update function: a linear layer, layer norm, ReLU and dropout, on rows of that role."""
    layers: list[nn.Module] = [WeightSharingLinear(in_features, out_features, role=role)]
    if norm:
        layers.append(nn.LayerNorm(out_features))
        layers[-1].role = role  # type: ignore[assignment]  # any layer may have one
    layers += [nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """One update of edges, nodes and globals (eq. 2.9), with sums as aggregation (eq. 2.10)."""

    def __init__(
        self, edge: int, node: int, glob: int, width: int, dropout: float = 0.0, norm: bool = True
    ) -> None:
        super().__init__()
        self.edge = mlp(edge + 2 * node + glob, width, "edge", dropout, norm)
        self.node = mlp(node + width + glob, width, "node", dropout, norm)
        self.glob = mlp(glob + 2 * width, width, "graph", dropout, norm)

    def forward(
        self, edges: Tensor, nodes: Tensor, globs: Tensor, edge_index: Tensor, batch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        senders, receivers = edge_index
        batch_of_edges = batch[senders]
        edges = self.edge(
            torch.cat([edges, nodes[receivers], nodes[senders], globs[batch_of_edges]], dim=1)
        )
        received = sum_rows(edges, receivers, len(nodes))
        nodes = self.node(torch.cat([nodes, received, globs[batch]], dim=1))
        edges_of_graph, nodes_of_graph = (
            sum_rows(edges, batch_of_edges, len(globs)),
            sum_rows(nodes, batch, len(globs)),
        )
        globs = self.glob(torch.cat([globs, nodes_of_graph, edges_of_graph], dim=1))
        return edges, nodes, globs


class GraphNetwork(nn.Module):
    """Graph classification: several blocks, and an MLP on the globals.

    Args:
        node_features, edge_features: of the input.
        num_outputs: C.
        width: features of nodes, edges and globals inside of the network.
        num_blocks: how often edges, nodes and globals are updated.
        dropout: probability, in the update functions.
        norm: whether the update functions have a layer norm.

    Shapes:
        - x: ``(ΣV_n, node_features)``
        - edge_index: ``(2, ΣE_n)``, senders and receivers
        - edge_attr: ``(ΣE_n, edge_features)``
        - batch: ``(ΣV_n,)``, the graph of each node
        - output: ``(num_graphs, num_outputs)``, logits
    """

    def __init__(
        self,
        node_features: int,
        edge_features: int,
        num_outputs: int,
        width: int = 64,
        num_blocks: int = 3,
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.embed_edge = WeightSharingLinear(edge_features, width, role="edge")
        self.embed_node = WeightSharingLinear(node_features, width, role="node")
        # The globals of the input are empty, so the first block has none.
        self.blocks = nn.ModuleList(
            Block(width, width, width if i else 0, width, dropout, norm) for i in range(num_blocks)
        )
        self.head = nn.Sequential(
            WeightSharingLinear(width, width, role="graph"),
            nn.ReLU(),
            WeightSharingLinear(width, num_outputs, role="graph"),
        )

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
    ) -> Tensor:
        edges, nodes, globs = (
            self.embed_edge(edge_attr),
            self.embed_node(x),
            x.new_zeros(num_graphs, 0),
        )
        for block in self.blocks:
            edges, nodes, globs = block(edges, nodes, globs, edge_index, batch)
        return self.head(globs)


def sum_rows(x: Tensor, index: Tensor, size: int) -> Tensor:
    """``out[i]`` is the sum of the rows of ``x`` whose index is ``i``: ``(rows, P) -> (size,
    P)``.
    """
    return x.new_zeros(size, x.shape[1]).index_add_(0, index, x)
