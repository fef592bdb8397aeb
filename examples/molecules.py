"""Predict the functional groups of molecules with a graph network: NAdamW, and K-FAC on top of the
same NAdamW.

    python examples/molecules.py

The setting is *reduce*: one loss term for each graph and task, and layers that share their weights
over a graph's edges or nodes. K-FAC-reduce sums and averages over the rows of each graph,
K-FAC-expand takes every row for itself. Both precondition the gradient, and the result is handed to
the baseline optimizer.

K-FAC's settings are the preset's. After 3 epochs its K-FAC-reduce has a test mAP of 61.2 and 60.7 %
with the seeds 1 and 2. ASDL's own configuration (damping 1e-2, an average of weight 0.05, curvature
on every and inverses on every tenth step), with which the table was made, has 43.4 and 47.6 % then.

With the seeds 1, 2 and 3, which the default below does not use, in 10 epochs:

============  ==================  ================
optimizer     steps to 60 %       test mAP, %
============  ==================  ================
NAdamW        407, 407, 407       62.6, 64.5, 64.2
K-FAC-expand  222, 185, 185       77.8, 80.0, 80.3
K-FAC-reduce  185, 185, 185       80.6, 82.0, 82.6
============  ==================  ================
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import asdl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report
from _training import nadamw
from graph_network import GraphNetwork
from molecule_data import Molecules, mean_average_precision

import asdl_ws_plugin

BATCH_SIZE = 64
TARGET = 0.6


@dataclass(frozen=True)
class Settings:
    """An optimizer: NAdamW, and with ``shared_dim`` K-FAC in front of it."""

    name: str
    lr: float
    shared_dim: str | None = None
    weight_decay: float = 0.01
    beta2: float = 0.99
    warmup: float = 0.1


# By validation mAP after 3 epochs, four trials each: NAdamW with lr 0.001, 0.003, 0.005, 0.01;
# K-FAC-reduce, then with ASDL's configuration in the place of the preset, with lr and damping 0.01
# and 0.001, 0.03 and 0.001, 0.01 and 0.0001, 0.01 and 0.01. K-FAC-expand gets what was found for
# reduce, and the preset its learning rate: nothing was searched with it.
NADAMW = Settings("NAdamW", lr=5e-3)
EXPAND = Settings("K-FAC-expand", lr=1e-2, shared_dim="expand")
REDUCE = Settings("K-FAC-reduce", lr=1e-2, shared_dim="reduce")


class Data(Protocol):
    """Molecules in the form that a model takes them."""

    molecules: Molecules

    def batches(
        self, indices: Tensor, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Any]:
        """``(arguments of the model, labels)`` of one batch after the other."""


class ForGraphNetwork:
    def __init__(self, molecules: Molecules) -> None:
        self.molecules = molecules

    def batches(
        self, indices: Tensor, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Any]:
        for batch in self.molecules.batches(indices, size, generator):
            yield batch.arguments, batch.y


def graph_network(molecules: Molecules, width: int = 64, num_blocks: int = 2) -> nn.Module:
    first = molecules.graphs[0]
    return GraphNetwork(
        first.x.shape[1],
        first.edge_attr.shape[1],
        molecules.y.shape[1],
        width,
        num_blocks,
        dropout=0.1,
    )


def loss_of_known_labels(logits: Tensor, y: Tensor) -> Tensor:
    """The mean binary cross-entropy of the labels that there are."""
    known = ~y.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], y[known])


@torch.no_grad()
def score(model: nn.Module, data: Data, indices: Tensor) -> float:
    model.eval()
    parts = [(model(*arguments), y) for arguments, y in data.batches(indices, 512)]
    model.train()
    return mean_average_precision(
        torch.cat([logits for logits, _ in parts]), torch.cat([y for _, y in parts])
    )


def gradient_maker(model: nn.Module, settings: Settings) -> Any:
    if settings.shared_dim is None:
        return asdl.GradientMaker(model)
    # Which graph every row belongs to, from the arguments 'batch' and 'edge_index' of the model.
    asdl_ws_plugin.attach_segments(model, "pyg")
    config = asdl_ws_plugin.recommended(ignore_modules=[nn.LayerNorm, nn.BatchNorm1d])
    return asdl.KfacGradientMaker(
        model, config, loss_type="binary_cross_entropy", shared_dim=settings.shared_dim
    )


def train(
    settings: Settings,
    data: Data,
    make_model: Callable[[Molecules], nn.Module],
    epochs: int,
    seed: int,
    evaluations: int = 20,
    on_step: Callable[[int, float], None] | None = None,
) -> _report.Run:
    """Train from scratch; ``on_step(step, validation mAP)`` is called after each step."""
    torch.manual_seed(seed)
    molecules = data.molecules
    model = make_model(molecules)
    steps = epochs * (len(molecules.train) // BATCH_SIZE)
    optimizer, schedule = nadamw(model, settings, steps)
    maker = gradient_maker(model, settings)
    run, watch = _report.Run(settings.name), _report.Stopwatch()
    order = torch.Generator().manual_seed(seed)
    step, value = 0, score(model, data, molecules.validation)
    run.record(step, 0.0, value)
    interval = max(1, steps // evaluations)
    for _ in range(epochs):
        for arguments, y in data.batches(molecules.train, BATCH_SIZE, order):
            watch.start()
            logits = maker.setup_model_call(model, *arguments)
            maker.setup_loss_call(loss_of_known_labels, logits, y)
            maker.forward_and_backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            watch.stop()
            step += 1
            if step % interval == 0 or step == steps:
                value = score(model, data, molecules.validation)
                run.record(step, watch.seconds, value)
            if on_step is not None:
                on_step(step, value)
    run.laps = watch.laps
    run.final["test mAP"] = f"{score(model, data, molecules.test):.2%}"
    return run


def compare(
    data: Data,
    make_model: Callable[[Molecules], nn.Module],
    contenders: tuple[Settings, ...],
    title: str,
    path: Path,
    epochs: int,
    seed: int,
) -> list[_report.Run]:
    """Train with each contender, print the table and draw the figure."""
    console, runs = _report.console(), []
    molecules = data.molecules
    console.print(
        f"{len(molecules.graphs)} molecules ({len(molecules.train)} to train, "
        f"{len(molecules.validation)} to validate, {len(molecules.test)} to test, by scaffold), "
        f"{len(molecules.tasks)} tasks, {float(molecules.y.isnan().float().mean()):.0%} of the "
        "labels unknown"
    )
    with _report.progress_bars(console, "mAP") as progress:
        for settings in contenders:
            task = progress.add_task(
                settings.name, total=epochs * (len(molecules.train) // BATCH_SIZE), value=0.0
            )
            runs.append(
                train(
                    settings,
                    data,
                    make_model,
                    epochs,
                    seed,
                    on_step=lambda step, value, task=task: progress.update(
                        task, completed=step, value=value
                    ),
                )
            )
    console.print(_report.table(runs, title, "validation mAP", TARGET))
    _report.figure(runs, path, title, "validation mAP", TARGET)
    console.print(f"Figure: {path}")
    return runs


def parse(arguments: list[str] | None, description: str | None, epochs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="one epoch of a small model on few molecules"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 1
    return options


def load(quick: bool) -> Molecules:
    return Molecules.load(limit=400, min_positive=2) if quick else Molecules.load()


def main(arguments: list[str] | None = None) -> list[_report.Run]:
    options = parse(arguments, __doc__, epochs=10)
    data = ForGraphNetwork(load(options.quick))
    size = {"width": 16, "num_blocks": 2} if options.quick else {}
    return compare(
        data,
        lambda molecules: graph_network(molecules, **size),
        (NADAMW, EXPAND, REDUCE),
        "A graph network on molecules",
        options.out / "molecules.png",
        options.epochs,
        options.seed,
    )


if __name__ == "__main__":
    main()
