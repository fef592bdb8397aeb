"""A PyTorch Geometric loop, and K-FAC in it.

    python examples/loops/pyg_loop.py

Four lines are more than without: PyG's layers are converted, and the preconditioner is told that
rows are nodes of graphs and steps before the optimizer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINConv, global_mean_pool

import asdl_ws_plugin


class GIN(nn.Module):
    """Two layers of message passing, and a class for each graph."""

    def __init__(self, features: int = 6, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.first = GINConv(
            nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))
        )
        self.second = GINConv(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        x = self.first(x, edge_index).relu()
        x = self.second(x, edge_index).relu()
        return self.head(global_mean_pool(x, batch, num_graphs))


def random_graph(generator: torch.Generator) -> Data:
    """A ring, a star or a random graph of 5 to 12 nodes, with random features."""
    n = int(torch.randint(5, 13, (), generator=generator))
    kind = int(torch.randint(3, (), generator=generator))
    nodes = torch.arange(n)
    if kind == 0:
        source, target = nodes, (nodes + 1) % n
    elif kind == 1:
        source, target = torch.zeros_like(nodes[1:]), nodes[1:]
    else:
        source, target = torch.randint(n, (2, n), generator=generator)
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    return Data(x=torch.rand(n, 6, generator=generator), edge_index=edges, y=torch.tensor([kind]))


def main(epochs: int = 4, seed: int = 0) -> list[float]:
    """Train on random graphs; returns the loss of every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader([random_graph(generator) for _ in range(512)], batch_size=32, shuffle=True)
    model = asdl_ws_plugin.convert(GIN())  # +1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prec = asdl_ws_plugin.Preconditioner(model)  # +2
    prec.step_before(optimizer)  # +3
    asdl_ws_plugin.attach_segments(model, "pyg")  # +4
    losses = []
    for _ in range(epochs):
        for data in loader:
            logits = model(data.x, data.edge_index, data.batch, data.num_graphs)
            loss = F.cross_entropy(logits, data.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
