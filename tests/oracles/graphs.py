"""Small batches of graphs, and the ground truth for ragged factors: a loop over single graphs.

A graph on its own has a dense weight-sharing dimension, so that none of this needs to know about
segments. Jacobians are autograd's; nothing here uses the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oracles.autograd import Factors, factor_A, loss_hessians
from oracles.layers import Example, seen_by


@dataclass
class Graphs:
    """Graphs batched by concatenation."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    batch: Tensor
    num_graphs: int

    @property
    def edge_batch(self) -> Tensor:
        return self.batch[self.edge_index[0]]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a graph network is called with."""
        return self.x, self.edge_index, self.edge_attr, self.batch, self.num_graphs

    def single(self, n: int) -> Graphs:
        """The n-th graph on its own."""
        nodes, edges = self.batch == n, self.edge_batch == n
        number = torch.cumsum(nodes, 0) - 1
        zeros = torch.zeros(int(nodes.sum()), dtype=torch.long)
        return Graphs(
            self.x[nodes], number[self.edge_index[:, edges]], self.edge_attr[edges], zeros, 1
        )

    def permuted(self) -> Graphs:
        """The same graphs with their nodes and their edges in another order, those of a graph not
        together any more.
        """
        nodes, edges = torch.randperm(len(self.x)), torch.randperm(len(self.edge_attr))
        return Graphs(
            self.x[nodes],
            torch.argsort(nodes)[self.edge_index[:, edges]],
            self.edge_attr[edges],
            self.batch[nodes],
            self.num_graphs,
        )


def random_graphs(
    sizes: Sequence[tuple[int, int]], node_features: int = 3, edge_features: int = 2
) -> Graphs:
    """Graphs of these numbers of nodes and edges."""
    ends, offset = [], 0
    for nodes, edges in sizes:
        if edges:
            ends.append(torch.randint(nodes, (2, edges)) + offset)
        offset += nodes
    counts = torch.tensor([nodes for nodes, _ in sizes])
    return Graphs(
        torch.randn(offset, node_features),
        torch.cat(ends, dim=1) if ends else torch.zeros(2, 0, dtype=torch.long),
        torch.randn(sum(edges for _, edges in sizes), edge_features),
        torch.arange(len(sizes)).repeat_interleave(counts),
        len(sizes),
    )


def graph_examples(model: nn.Module, graphs: Graphs) -> Example:
    """Logits ``(1, C)`` of the n-th graph on its own."""
    return lambda n: model(*graphs.single(n).arguments)


def ragged_factors(
    module: nn.Module,
    example: Example,
    num_examples: int,
    strategy: str,
    loss_type: str,
    var: Any = 1.0,
    weight: Tensor | None = None,
) -> Factors:
    """The two last lines of the table of the factors, summed over the examples (D = 1).

    Args:
        example: the logits of the n-th example on its own, ``(1, C)`` or, with a loss term for
            every position, ``(1, R', C)``.
        weight: of the elements of the loss, ``(N, C)``.
    """
    inputs, jacobians = seen_by(module, example, num_examples)
    A = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
    B = torch.zeros(jacobians[0].shape[2], jacobians[0].shape[2])
    for n, (a, b) in enumerate(zip(inputs, jacobians, strict=True)):
        if len(a) == 0:
            continue
        with torch.no_grad():
            logits = example(n)[0]
        logits = logits.reshape(-1, logits.shape[-1])  # R' C
        hessians = loss_hessians(logits.unsqueeze(0), loss_type, var)[0]
        if weight is not None:
            hessians = hessians * weight[n].reshape(1, -1, 1)  # of elements: for diagonal Hessians
        b = b.unflatten(0, logits.shape)
        if strategy == "reduce":
            A, b = A + factor_A(a.unsqueeze(0), "reduce"), b.sum(2, keepdim=True)
        else:
            A = A + a.T @ a * num_examples / sum(len(rows) for rows in inputs)
        B = B + torch.einsum("tcrp,tcd,tdrq->pq", b, hessians, b)
    return Factors(A, B)


def exact_ragged_block(
    model: nn.Module,
    parameter: str,
    example: Example,
    num_examples: int,
    loss_type: str,
    var: Any = 1.0,
) -> Tensor:
    """``Σ_n Jᵀ Λ J`` of one parameter, by autograd: ``(numel, numel)``."""
    blocks = []
    for n in range(num_examples):
        value = model.get_parameter(parameter)
        logits = example(n).flatten()
        jacobian = torch.stack(
            [torch.autograd.grad(logit, value, retain_graph=True)[0].flatten() for logit in logits]
        )
        hessian = loss_hessians(logits.detach().view(1, 1, -1), loss_type, var)[0, 0]
        blocks.append(jacobian.T @ hessian @ jacobian)
    return torch.stack(blocks).sum(0)
