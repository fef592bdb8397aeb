"""Prune a Vision Transformer without training it again: the optimal brain surgeon with
K-FAC-reduce, against the smallest weights. It was trained with K-FAC-reduce, too.

    python examples/pruning.py

The surgeon removes the weights that the second-order model of the loss minds least, ``w² /
[F⁻¹]_ii`` (all layers compete), and moves the others to where that model is smallest given the
zeros: with the block F = B ⊗ A of a layer, removed weights S and the others T, ``F_TT δ_T = F_TS
w_S``. Neither F nor its inverse is formed: conjugate gradients multiply by the factors
(``asdl_ws_plugin.kronecker.product``). Factors are computed anew at every sparsity.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report
from _training import exact_fisher, linear_layers
from vit_digits import PRESET, QUICK_EPOCHS, Digits, accuracy, train, vision_transformer

from asdl_ws_plugin import kronecker

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
DAMPING = 1e-5


def inverse_diagonal(basis: kronecker.Eigenbasis, damping: float) -> Tensor:
    """Of ``(B ⊗ A + damping I)⁻¹``, as a weight ``(Q, P)``."""
    inverse = 1 / basis.values(damping)
    return basis.B_vectors.square() @ inverse @ basis.A_vectors.square().mT


def surgery(weight: Tensor, removed: Tensor, basis: kronecker.Eigenbasis, damping: float) -> Tensor:
    """The weight ``(Q, P)`` with zeros where ``removed``, the others moved to make up for it."""

    def masked_product(v: Tensor) -> Tensor:
        return kronecker.product(basis, v, damping=damping).masked_fill(removed, 0)

    # Conjugate gradients on F_TT δ = F_TS w_S, where all vectors are zero outside of T.
    residual = masked_product(weight * removed)
    delta, direction, square = torch.zeros_like(weight), residual, residual.square().sum()
    first = square
    for _ in range(200):
        if square <= 1e-8 * first:
            break
        image = masked_product(direction)
        step = square / (direction * image).sum()
        delta, residual = delta + step * direction, residual - step * image
        square, before = residual.square().sum(), square
        direction = residual + square / before * direction
    return (weight + delta).masked_fill(removed, 0)


@torch.no_grad()
def remove(layers: list[Any], saliency: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the least salient weights of all layers; those that are zero come first."""
    scores = [s.masked_fill(m.weight == 0, -1) for s, m in zip(saliency, layers, strict=True)]
    everything = torch.cat([score.flatten() for score in scores])
    threshold = everything.kthvalue(round(sparsity * len(everything))).values
    return [score <= threshold for score in scores]


@torch.no_grad()
def by_magnitude(model: nn.Module, x: Tensor, sparsity: float) -> None:
    layers = linear_layers(model)
    masks = remove(layers, [layer.weight.abs() for layer in layers], sparsity)
    for layer, mask in zip(layers, masks, strict=True):
        layer.weight[mask] = 0


def by_surgeon(model: nn.Module, x: Tensor, sparsity: float) -> None:
    exact_fisher(model, x)
    layers = linear_layers(model)
    bases = [kronecker.decompose(layer.fisher) for layer in layers]
    with torch.no_grad():
        saliency = [
            layer.weight.square() / inverse_diagonal(basis, DAMPING)
            for layer, basis in zip(layers, bases, strict=True)
        ]
        masks = remove(layers, saliency, sparsity)
        for layer, mask, basis in zip(layers, masks, bases, strict=True):
            layer.weight.copy_(surgery(layer.weight, mask, basis, DAMPING))


METHODS = {"magnitude": by_magnitude, "optimal brain surgeon, K-FAC-reduce": by_surgeon}


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few epochs of a smaller model")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    epochs, depth = (QUICK_EPOCHS, 1) if options.quick else (options.epochs, 3)

    data = Digits.load()
    torch.manual_seed(options.seed)
    trained = vision_transformer(depth)
    train(PRESET, data, epochs, options.seed, model=trained)
    results: dict[str, list[float]] = {}
    for name, prune in METHODS.items():
        model = copy.deepcopy(trained).eval()
        results[name] = [accuracy(model, data.test)]
        for sparsity in SPARSITIES:
            prune(model.eval(), data.train[0], sparsity)
            results[name].append(accuracy(model, data.test))

    title = "A pruned ViT on digits, not trained again"
    percent = [100 * sparsity for sparsity in (0, *SPARSITIES)]
    labels = ("weights removed (%)", "test accuracy")
    path = options.out / "pruning"
    _report.console().print(_report.compare(results, percent, path, title, labels))
    return results


if __name__ == "__main__":
    main()
