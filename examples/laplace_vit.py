"""Laplace approximations of a Vision Transformer by laplace-torch, on K-FAC-expand and on
K-FAC-reduce: evidence, calibration, and detection of rotated images.

    python examples/laplace_vit.py

``pip install --no-deps laplace-torch`` beside the extra ``examples`` (it pins an older ASDL). Its
ASDL backend hands ``shared_dim`` on to ASDL, and one line, in ``_laplace.fit``, switches between
the two. The factors are compared with those of its curvlinops backend, in double precision. The
images are averaged over their tokens, so this is the reduce setting; for a linear network the
posterior with K-FAC-reduce would have the exact blocks.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _laplace
import _report
from _training import train_classifier
from vit_digits import KFAC, Digits, vision_transformer

ANGLES = (30, 60, 90)
LIKE_CURVLINOPS = 1e-10  # the largest relative difference of a factor


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Images turned around their centre, ``(N, 1, 8, 8)``, with the border for what was outside."""
    angle = math.radians(degrees)
    turn = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    grid = F.affine_grid(x.new_tensor(turn).expand(len(x), 2, 3), list(x.shape), False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def main(arguments: list[str] | None = None) -> list[_laplace.Scores]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few epochs, fewer images")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    epochs, width, limit = (2, 8, 60) if options.quick else (options.epochs, 16, None)
    console, data = _report.console(), Digits.load()
    # Batches of 50: of 16 images, 16 tokens, either dimension could be the batch.
    training, validation, test = (
        TensorDataset(images[:limit].double(), labels[:limit])
        for images, labels in (data.train, data.validation, data.test)
    )
    x, y = test.tensors
    loader = DataLoader(training, batch_size=50)
    shifted = {f"{angle}°": rotated(x, angle).split(50) for angle in ANGLES}

    torch.manual_seed(options.seed)
    model = vision_transformer(depth=2, width=width).double()
    batches = DataLoader(training, batch_size=50, shuffle=True)
    train_classifier(model, batches, epochs, KFAC)
    model.eval()
    _laplace.freeze_others(model)
    for block in model.blocks:
        block.attn.fused_attn = False  # the fused kernel knows no Jacobians of many examples

    scores = []
    for name, shared_dim in (("MAP", None), ("K-FAC-expand", "expand"), ("K-FAC-reduce", "reduce")):
        predictor, evidence = model, float("nan")
        if shared_dim is not None:
            predictor, evidence = _laplace.fit(
                model, loader, shared_dim, DataLoader(validation, batch_size=50)
            )
            difference = _laplace.largest_difference_from_curvlinops(predictor, loader, shared_dim)
            console.print(f"{name}: factors as curvlinops', to {difference:.1e} relative")
            assert difference < LIKE_CURVLINOPS
        probs = _laplace.predict(predictor, x.split(50))
        score = _laplace.evaluate(name, probs, y, evidence)
        for shift, batches in shifted.items():
            turned = _laplace.predict(predictor, batches)
            score.detection[shift] = _laplace.out_of_distribution(probs, turned)
        scores.append(score)
    title = "Laplace approximations of a ViT on digits"
    console.print(_laplace.table(scores, title, ["30°", "90°"]))
    path = options.out / "laplace_vit"
    _laplace.figure(scores, path, title)
    console.print(f"Figure: {path}.png, .pdf")
    return scores


if __name__ == "__main__":
    main()
