"""Learn permuted digits one task after the other: elastic weight consolidation with Kronecker
factors, against a diagonal and against nothing.

    python examples/continual_learning.py

Every task is to read the digits with their pixels in another order. After a task the Fisher matrix
F_t at its weights θ_t is kept, and later tasks pay ``λ/2 Σ_t (θ - θ_t)ᵀ F_t (θ - θ_t)`` for leaving
them. With Kronecker factors the quadratic of a layer is ``tr(ΔWᵀ B ΔW A)``, that of its bias ``Δbᵀ
B Δb``. λ is each method's best by the mean accuracy over the validation images of all tasks.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report
from _training import exact_fisher, linear_layers
from vit_digits import BATCH_SIZE, Digits, accuracy

from asdl_ws_plugin import Preconditioner, kronecker

STRENGTHS = (1.0, 10.0, 100.0)  # the λ that are tried
Penalty = Callable[[nn.Module], Tensor]


def network(width: int = 64) -> nn.Module:
    first, second = (nn.Sequential(nn.Linear(p, width), nn.ReLU()) for p in (64, width))
    return nn.Sequential(nn.Flatten(), first, second, nn.Linear(width, 10))


def kronecker_penalty(model: nn.Module, x: Tensor) -> Penalty:
    """The quadratic around a model's weights, of the Kronecker factors of its curvature there."""
    exact_fisher(model, x)
    kept = [
        (layer.fisher.kron, layer.weight.detach().clone(), layer.bias.detach().clone())
        for layer in linear_layers(model)
    ]

    def penalty(model: nn.Module) -> Tensor:
        total = torch.zeros(())
        for layer, (kron, weight, bias) in zip(linear_layers(model), kept, strict=True):
            moved = layer.weight - weight, layer.bias - bias
            total = total + sum(
                (m * image).sum()
                for m, image in zip(moved, kronecker.product(kron, *moved), strict=True)
            )
        return total / 2

    return penalty


def diagonal_penalty(model: nn.Module, x: Tensor) -> Penalty:
    """The same of the exact diagonal."""
    exact_fisher(model, x, shape="diag")
    kept = [
        (p.detach().clone(), getattr(layer.fisher.diag, name))
        for layer in linear_layers(model)
        for name, p in layer.named_parameters()
    ]

    def penalty(model: nn.Module) -> Tensor:
        parameters = [p for layer in linear_layers(model) for p in layer.parameters()]
        pairs = zip(parameters, kept, strict=True)
        return sum((diagonal * (p - start).square()).sum() for p, (start, diagonal) in pairs) / 2

    return penalty


METHODS = {"none": None, "diagonal": diagonal_penalty, "Kronecker": kronecker_penalty}


def learn(name: str, strength: float, tasks: list[Digits], epochs: int, seed: int) -> list[Any]:
    """Models after each of the tasks."""
    torch.manual_seed(seed)
    model, penalties, models = network(), [], []
    for task in tasks:
        x, y = task.train
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        prec = Preconditioner(model)
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(BATCH_SIZE):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                for penalty in penalties:
                    loss = loss + strength * penalty(model)
                optimizer.zero_grad()
                prec.backward(loss)
                optimizer.step()
        prec.close()
        if METHODS[name] is not None:
            penalties.append(METHODS[name](model, x))
        models.append(copy.deepcopy(model))
    return models


def mean_accuracy(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> float:
    return sum(accuracy(model, part) for part in parts) / len(parts)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two tasks, one strength")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    num_tasks, strengths = (2, (100.0,)) if options.quick else (options.tasks, STRENGTHS)

    data = Digits.load()
    generator = torch.Generator().manual_seed(options.seed)
    orders = [torch.randperm(64, generator=generator) for _ in range(num_tasks)]
    tasks = [
        Digits(*((x.flatten(1)[:, order], y) for x, y in (data.train, data.validation, data.test)))
        for order in orders
    ]
    results = {}
    for name in METHODS:
        runs = {
            strength: learn(name, strength, tasks, options.epochs, options.seed)
            for strength in (strengths if METHODS[name] else (0.0,))
        }
        validation = [task.validation for task in tasks]
        best = max(runs, key=lambda s: mean_accuracy(runs[s][-1], validation))
        results[f"{name}, λ = {best:g}" if best else name] = [
            mean_accuracy(model, [task.test for task in tasks[: i + 1]])
            for i, model in enumerate(runs[best])
        ]

    title, counts = "Permuted digits, one task after the other", range(1, num_tasks + 1)
    path, labels = options.out / "continual_learning", ("tasks learned", "mean test accuracy")
    _report.console().print(_report.compare(results, counts, path, title, labels))
    return results


if __name__ == "__main__":
    main()
