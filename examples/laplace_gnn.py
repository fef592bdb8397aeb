"""Laplace approximations of a graph network by laplace-torch, on K-FAC-expand and on K-FAC-reduce:
evidence, calibration, and detection of graphs that are no molecules.

    python examples/laplace_gnn.py

The graph network of ``graph_network.py`` counts the rings of molecules: none, one, two, three or
more. The graphs that are no molecules have the same atoms and bonds, joined at random. Which graph
a row of a layer belongs to is read off the batch (``attach_segments``), so that laplace-torch's
ASDL backend gets ragged K-FAC-reduce (eq. 3.34) by the same line as for images. Its curvlinops
backend takes every node and every edge for an example, so there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import random_split
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _laplace
import _report
from _training import train_classifier
from graph_network import GraphNetwork
from molecule_data import read_smiles, to_graph
from molecules import REDUCE

import asdl_ws_plugin

BATCH_SIZE = 32
PREDICTED_AT_ONCE = 8  # the time of Jacobians grows with the square of it
CLASSES = 4
SERIES = 1017  # the first molecules are one series, of four or five rings all


class OfBatch(nn.Module):
    """The graph network, called with one batch of PyG's; ``(graphs, CLASSES)``."""

    def __init__(self, node_features: int, edge_features: int, width: int) -> None:
        super().__init__()
        self.network = GraphNetwork(node_features, edge_features, CLASSES, width, num_blocks=2)

    def forward(self, data: Any) -> Tensor:
        return self.network(data.x, data.edge_index, data.edge_attr, data.batch, data.num_graphs)


def load(limit: int) -> list[Data]:
    """Molecules as graphs, in double precision, each with the label of its number of rings."""
    data = []
    for molecule in read_smiles(SERIES + limit)[SERIES:]:
        graph, rings = to_graph(molecule), molecule.GetRingInfo().NumRings()
        data.append(
            Data(
                x=graph.x.double(),
                edge_index=graph.edge_index,
                edge_attr=graph.edge_attr.double(),
                label=min(rings, CLASSES - 1),
            )
        )
    return data


def rewired(data: Data, generator: torch.Generator) -> Data:
    """The same atoms and bonds; each bond begins at a random one of the atoms that bonds had."""
    senders, receivers = data.edge_index
    order = torch.randperm(len(senders), generator=generator)
    return Data(
        x=data.x, edge_index=torch.stack([senders[order], receivers]), edge_attr=data.edge_attr
    )


class Labelled:
    """Batches of graphs with their labels, and the ``dataset`` whose length laplace-torch asks
    for.
    """

    def __init__(self, graphs: Any, batch_size: int = BATCH_SIZE, shuffle: bool = False) -> None:
        self.dataset = graphs
        self.loader = DataLoader(graphs, batch_size=batch_size, shuffle=shuffle)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        for batch in self.loader:
            yield batch, batch.label

    def __len__(self) -> int:
        return len(self.loader)


def main(arguments: list[str] | None = None) -> list[_laplace.Scores]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch, fewer molecules")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    limit, epochs, width = (60, 1, 8) if options.quick else (500, options.epochs, 16)

    generator = torch.Generator().manual_seed(options.seed)
    training, validation, test = random_split(load(limit), (0.6, 0.2, 0.2), generator)
    others = [rewired(graph, generator) for graph in test]
    torch.manual_seed(options.seed)
    model = OfBatch(training[0].x.shape[1], training[0].edge_attr.shape[1], width).double()
    asdl_ws_plugin.attach_segments(model, "pyg")
    train_classifier(model, Labelled(training, shuffle=True), epochs, REDUCE)
    model.eval()
    _laplace.freeze_others(model)

    scores = []
    y = torch.tensor([graph.label for graph in test])
    for name, shared_dim in (("MAP", None), ("K-FAC-expand", "expand"), ("K-FAC-reduce", "reduce")):
        predictor, evidence = model, float("nan")
        if shared_dim is not None:
            predictor, evidence = _laplace.fit(
                model, Labelled(training), shared_dim, Labelled(validation, PREDICTED_AT_ONCE)
            )
        probs, shifted = (
            _laplace.predict(predictor, DataLoader(graphs, PREDICTED_AT_ONCE))
            for graphs in (test, others)
        )
        score = _laplace.evaluate(name, probs, y, evidence)
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
