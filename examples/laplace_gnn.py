"""Laplace approximations of a graph network by laplace-torch, on K-FAC-expand and on K-FAC-reduce:
evidence, calibration, and detection of graphs that are no molecules.

    python examples/laplace_gnn.py

The graph network of ``graph_network.py`` counts the rings of molecules (none or one, two, three or
more). Test molecules have ring systems that do not occur in training; the graphs that are no
molecules have the same atoms and bonds, joined at random. Which graph a row of a layer belongs to
is read off the batch (``attach_segments``), so that laplace-torch's ASDL backend gets ragged
K-FAC-reduce (eq. 3.34) by the same line as for images. Its curvlinops backend takes every node and
every edge for an example, so there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _laplace
import _report
import asdl
from _training import nadamw
from graph_network import GraphNetwork
from molecule_data import Graph, Molecules
from molecules import REDUCE

import asdl_ws_plugin

BATCH_SIZE = 32
CLASSES = 3


class OfBatch(nn.Module):
    """The graph network, called with one batch of PyG's; ``(graphs, CLASSES)``."""

    def __init__(self, node_features: int, edge_features: int, width: int) -> None:
        super().__init__()
        self.network = GraphNetwork(node_features, edge_features, CLASSES, width, num_blocks=2)

    def forward(self, data: Any) -> Tensor:
        return self.network(data.x, data.edge_index, data.edge_attr, data.batch, data.num_graphs)


def num_rings(graph: Graph) -> int:
    """Independent cycles of a connected graph, whose bonds are there in both directions."""
    return graph.edge_index.shape[1] // 2 - len(graph.x) + 1


def to_data(graph: Graph, rewired: torch.Generator | None = None) -> Data:
    """As PyG has it, in double precision; with a generator, its bonds join other atoms."""
    edges, label = graph.edge_index, min(max(num_rings(graph) - 1, 0), CLASSES - 1)
    if rewired is not None:
        edges = torch.randperm(len(graph.x), generator=rewired)[edges].flip(0)
        edges[0] = edges[0][torch.randperm(edges.shape[1], generator=rewired)]
    return Data(
        x=graph.x.double(), edge_index=edges, edge_attr=graph.edge_attr.double(), label=label
    )


class Labelled:
    """Batches of graphs with their labels, and the ``dataset`` whose length laplace-torch asks
    for.
    """

    def __init__(self, graphs: list[Data], shuffle: bool = False) -> None:
        self.dataset = graphs
        self.loader = DataLoader(graphs, batch_size=BATCH_SIZE, shuffle=shuffle)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        for batch in self.loader:
            yield batch, batch.label

    def __len__(self) -> int:
        return len(self.loader)


def train(model: nn.Module, data: Labelled, epochs: int) -> None:
    """K-FAC-reduce on top of NAdamW, as ``molecules.py`` has it."""
    settings = replace(REDUCE, lr=5e-3)
    optimizer, schedule = nadamw(model, settings, epochs * len(data))
    config = asdl.PreconditioningConfig(
        damping=settings.damping,
        ema_decay=settings.ema_decay,
        preconditioner_upd_interval=settings.inverse_interval,
        ignore_modules=[nn.LayerNorm],
    )
    maker = asdl_ws_plugin.KfacGradientMaker(model, config, shared_dim="reduce")
    for _ in range(epochs):
        for batch, y in data:
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, batch), y)
            maker.forward_and_backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def main(arguments: list[str] | None = None) -> list[_laplace.Scores]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch, fewer molecules")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    limit, epochs, width = (150, 1, 8) if options.quick else (1000, options.epochs, 24)

    molecules = Molecules.load(limit=limit, min_positive=0)
    parts = (molecules.train, molecules.test)
    training, test = ([to_data(molecules.graphs[i]) for i in part] for part in parts)
    generator = torch.Generator().manual_seed(options.seed)
    others = [to_data(molecules.graphs[i], generator) for i in molecules.test]

    torch.manual_seed(options.seed)
    model = OfBatch(training[0].x.shape[1], training[0].edge_attr.shape[1], width).double()
    asdl_ws_plugin.attach_segments(model, "pyg")
    train(model, Labelled(training, shuffle=True), epochs)
    model.eval()
    _laplace.freeze_others(model)

    scores, data = [], Labelled(training)
    y = torch.tensor([graph.label for graph in test])
    for name, shared_dim in (("MAP", None), ("K-FAC-expand", "expand"), ("K-FAC-reduce", "reduce")):
        posterior = _laplace.fit(model, data, shared_dim) if shared_dim else None
        probs, shifted = (
            _laplace.predict(posterior or model, (batch for batch, _ in Labelled(graphs)))
            for graphs in (test, others)
        )
        score = _laplace.evaluate(name, probs, y, posterior)
        score.detection["rewired"] = _laplace.out_of_distribution(probs, shifted)
        scores.append(score)
    title = "Laplace approximations of a graph network on molecules"
    console = _report.console()
    console.print(_laplace.table(scores, title, ["rewired"]))
    path = options.out / "laplace_gnn"
    _laplace.figure(scores, path, title)
    console.print(f"Figure: {path}.png, .pdf")
    return scores


if __name__ == "__main__":
    main()
