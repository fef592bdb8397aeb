"""Molecules as graphs: about 6,000 compounds that come with RDKit, and what functional groups they
have.

The compounds are those of the ``.smi`` files of RDKit's own package: 1,017 from ChEMBL
(``Contrib/FreeWilson/data``),
about 4,900 from the NCI, and a few smaller sets. The tasks are binary: whether RDKit counts a
fragment (``fr_ester``,
``fr_nitro``, ...) at least once. Some labels are unknown (NaN), as in data that was measured. The
split is by scaffold, so that the ring systems of the validation and test molecules do not occur in
training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

__all__ = ["Graph", "GraphBatch", "Molecules", "mean_average_precision"]

ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P")


@dataclass(frozen=True)
class Graph:
    """Atoms and bonds, each bond in both directions.

    x: ``(atoms, features)``; edge_index: ``(2, 2 bonds)``; edge_attr: ``(2 bonds, features)``.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor


@dataclass(frozen=True)
class GraphBatch:
    """Graphs batched by concatenation. ``arguments`` is what :class:`graph_network.GraphNetwork` is
    called with.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    batch: Tensor
    y: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.edge_index, self.edge_attr, self.batch, len(self.y)


def one_hot(value: int, size: int) -> list[float]:
    """The last place is for everything that is larger."""
    return [float(min(value, size - 1) == i) for i in range(size)]


def to_graph(molecule: Any) -> Graph:
    from rdkit import Chem

    atoms = [
        [
            *one_hot(
                ELEMENTS.index(atom.GetSymbol()) if atom.GetSymbol() in ELEMENTS else len(ELEMENTS),
                10,
            ),
            *one_hot(atom.GetDegree(), 6),
            *one_hot(atom.GetTotalNumHs(), 5),
            *one_hot(min(max(atom.GetFormalCharge(), -1), 1) + 1, 3),
            float(atom.GetIsAromatic()),
        ]
        for atom in molecule.GetAtoms()
    ]
    types = (
        Chem.BondType.SINGLE,
        Chem.BondType.DOUBLE,
        Chem.BondType.TRIPLE,
        Chem.BondType.AROMATIC,
    )
    ends, bonds = [], []
    for bond in molecule.GetBonds():
        features = [*(float(bond.GetBondType() == kind) for kind in types), float(bond.IsInRing())]
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        ends += [(a, b), (b, a)]
        bonds += [features, features]
    edge_index = torch.tensor(ends, dtype=torch.long).view(-1, 2).T.contiguous()
    return Graph(torch.tensor(atoms), edge_index, torch.tensor(bonds).view(-1, len(types) + 1))


@dataclass(frozen=True)
class Molecules:
    """Graphs, labels ``(molecules, tasks)`` with NaN where unknown, and the indices of the three
    parts.
    """

    graphs: list[Graph]
    y: Tensor
    tasks: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def load(
        cls, limit: int | None = None, unknown: float = 0.1, min_positive: int = 8, seed: int = 0
    ) -> Molecules:
        """Read the molecules, or only the first ``limit`` of them.

        Args:
            unknown: the share of labels that are made NaN.
            min_positive: a task is kept if each part has that many molecules of both classes.
        """
        from rdkit.Chem import Fragments
        from rdkit.Chem.Scaffolds import MurckoScaffold

        molecules = read_smiles(limit)
        scaffolds = [MurckoScaffold.MurckoScaffoldSmiles(mol=molecule) for molecule in molecules]
        parts = scaffold_split(scaffolds, (0.8, 0.1))
        names = sorted(name for name in dir(Fragments) if name.startswith("fr_"))
        counts = np.array(
            [[getattr(Fragments, name)(molecule) > 0 for name in names] for molecule in molecules]
        )
        frequent = [
            t
            for t in range(len(names))
            if all(
                min(counts[part, t].sum(), (~counts[part, t]).sum()) >= min_positive
                for part in parts
            )
        ]
        y = torch.tensor(counts[:, frequent], dtype=torch.float32)
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < unknown] = torch.nan
        train, validation, test = (torch.tensor(part) for part in parts)
        return cls(
            [to_graph(m) for m in molecules],
            y,
            [names[t] for t in frequent],
            train,
            validation,
            test,
        )

    def collate(self, indices: Tensor) -> GraphBatch:
        graphs = [self.graphs[i] for i in indices.tolist()]
        sizes = torch.tensor([len(graph.x) for graph in graphs])
        offsets = (sizes.cumsum(0) - sizes).tolist()
        return GraphBatch(
            torch.cat([graph.x for graph in graphs]),
            torch.cat(
                [graph.edge_index + offset for graph, offset in zip(graphs, offsets, strict=True)],
                dim=1,
            ),
            torch.cat([graph.edge_attr for graph in graphs]),
            torch.arange(len(graphs)).repeat_interleave(sizes),
            self.y[indices],
        )

    def batches(
        self, indices: Tensor, size: int, generator: torch.Generator | None = None
    ) -> Iterator[GraphBatch]:
        """Batches of these molecules; with a generator shuffled, and without the rest that fills no
        batch.
        """
        if generator is not None:
            indices = indices[torch.randperm(len(indices), generator=generator)]
            indices = indices[: len(indices) // size * size]
        for part in indices.split(size):
            yield self.collate(part)


def read_smiles(limit: int | None = None) -> list[Any]:
    """All molecules in RDKit's package, each once, those from ChEMBL first."""
    import rdkit
    from rdkit import Chem, RDLogger

    # Of a few lines that are no SMILES.
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    root = Path(rdkit.__file__).parent
    files = sorted(
        root.rglob("*.smi"), key=lambda path: (path.parent.parent.name != "FreeWilson", str(path))
    )
    if not files:
        raise FileNotFoundError(
            f"There are no .smi files in {root}; install RDKit's wheel: pip install rdkit"
        )
    molecules: dict[str, Any] = {}
    for path in files:
        for line in path.read_text().splitlines():
            words = line.replace(",", " ").split()
            molecule = Chem.MolFromSmiles(words[0]) if words else None
            if molecule is not None and molecule.GetNumAtoms() > 0:
                molecules.setdefault(Chem.MolToSmiles(molecule), molecule)
            if limit is not None and len(molecules) >= limit:
                return list(molecules.values())
    return list(molecules.values())


def scaffold_split(scaffolds: Sequence[str], shares: tuple[float, float]) -> list[list[int]]:
    """Indices of train, validation and test: a scaffold's molecules are in one part, frequent ones'
    in train.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        groups[scaffold].append(i)
    bounds = np.cumsum(shares) * len(scaffolds)
    parts: list[list[int]] = [[], [], []]
    for group in sorted(groups.values(), key=lambda group: (-len(group), group)):
        done = sum(map(len, parts)) + len(group)
        parts[int(np.searchsorted(bounds, done))] += group
    return parts


def mean_average_precision(scores: Tensor, y: Tensor) -> float:
    """Average precision of each task's known labels, averaged over the tasks. ``(molecules,
    tasks)`` both.
    """
    values = []
    for score, label in zip(scores.T, y.T, strict=True):
        known = ~label.isnan()
        if 0 < label[known].sum() < known.sum():
            values.append(average_precision_score(label[known].numpy(), score[known].numpy()))
    return float(np.mean(values))
