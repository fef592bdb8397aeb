"""Train a small Vision Transformer on scikit-learn's digits: NAdamW against K-FAC-reduce on top of
the same NAdamW.

    python examples/vit_digits.py

As in section 4.2 of Eschenhagen (2023), K-FAC preconditions the gradient and hands the result to
the baseline optimizer. Images are averaged over their tokens inside of the model, so the loss has
one term for every image and the setting is 'reduce'.

K-FAC is on top of the very same NAdamW. Steps to 95 % / to 97 % of the validation images, of 475,
for the seeds 1, 2 and 3, which the default below does not use ("-": not reached):

============  =======================  =============================  =========================
optimizer     lr 2e-3                  lr 4e-3                        lr 8e-3
============  =======================  =============================  =========================
NAdamW        260, 320, 320 / -, -, -  220, 360, 420 / 450, -, -      410, 320, - / -, -, -
K-FAC-reduce  270, 170, 260 / -, -, -  200, 250, 150 / 340, 420, 310  270, 280, 220 / -, -, 300
============  =======================  =============================  =========================

4e-3 is what an earlier search on seed 1 alone chose for both, over the learning rates {1, 2, 4,
8}e-3 and the weight decays 0.03 and 0.3 (eight trials for NAdamW, six for K-FAC); the target was
set after it. K-FAC's damping (1e-3), moving average and intervals were not tuned. One image of the
validation set is 0.4 %, so neighbouring numbers are the same within the noise. In seconds NAdamW is
ahead on a model this small.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _report
import asdl
import torch
import torch.nn.functional as F
from _training import nadamw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable

BATCH_SIZE = 64
TARGET = 0.95
QUICK_EPOCHS = 3


@dataclass(frozen=True)
class Settings:
    """An optimizer: NAdamW, and with ``damping`` or ``preset`` K-FAC-reduce in front of it."""

    name: str
    lr: float
    weight_decay: float
    beta2: float = 0.99
    damping: float | None = None
    ema_decay: float = 0.05
    curvature_interval: int = 1
    inverse_interval: int = 10
    warmup: float = 0.1
    preset: bool = False


NADAMW = Settings("NAdamW", lr=4e-3, weight_decay=0.03)
KFAC = Settings("K-FAC-reduce", lr=4e-3, weight_decay=0.03, damping=1e-3)
PRESET = replace(NADAMW, name="K-FAC-reduce, the preset", preset=True)  # what pruning.py prunes


@dataclass(frozen=True)
class Digits:
    """8x8 images of handwritten digits, standardized, in three parts of equal class proportions."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Digits:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
        y = torch.tensor(labels)
        rest, test = train_test_split(range(len(y)), test_size=270, stratify=labels, random_state=0)
        train, validation = train_test_split(
            rest, test_size=270, stratify=labels[rest], random_state=0
        )
        x = (x - x[train].mean()) / x[train].std()
        return cls((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]))


def vision_transformer(depth: int = 3, width: int = 64) -> nn.Module:
    """A ViT with 16 tokens whose last block is averaged over the tokens, so the setting is
    'reduce'.
    """
    make_importable()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=4,
        mlp_ratio=2,
        global_pool="avg",
        class_token=False,
        weight_init="moco",
    )
    # A patch of four pixels says little without its place, and timm's 0.02 would take long to grow.
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by at most one pixel in each direction, filled up with its border: ``(N, 1,
    8, 8)``.
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    down, right = torch.randint(3, (2, len(x), 1), generator=generator)
    rows = down + torch.arange(x.shape[2])
    columns = right + torch.arange(x.shape[3])
    return padded[
        torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].movedim(-1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    x, y = data
    correct = (model(x).argmax(1) == y).float().mean()
    model.train()
    return float(correct)


def gradient_maker(model: nn.Module, settings: Settings) -> asdl.GradientMaker:
    """What computes the gradients."""
    ignored: list[Any] = [nn.LayerNorm]
    if settings.preset:
        config = asdl_ws_plugin.recommended(ignore_modules=ignored)
    elif settings.damping is None:
        return asdl.GradientMaker(model)
    else:
        # Not the preset, which is for whoever tunes nothing: with curvature on every step, 97 % of
        # the validation images comes sooner (340 and 420 steps with the seeds 1 and 2, with the
        # preset 380 and never; 95 % takes 200 and 250, with the preset 210 and 210).
        config = asdl.PreconditioningConfig(
            damping=settings.damping,
            ema_decay=settings.ema_decay,
            curvature_upd_interval=settings.curvature_interval,
            preconditioner_upd_interval=settings.inverse_interval,
            ignore_modules=ignored,
        )
    return asdl.KfacGradientMaker(model, config, shared_dim="reduce")


def train(
    settings: Settings,
    data: Digits,
    epochs: int,
    seed: int,
    depth: int = 3,
    on_step: Callable[[int, float], None] | None = None,
    model: nn.Module | None = None,
) -> _report.Run:
    """Train from scratch, or a given model in place; ``on_step(step, validation accuracy)`` is
    called after each step.
    """
    torch.manual_seed(seed)
    model = vision_transformer(depth) if model is None else model
    x, y = data.train
    steps_per_epoch = len(y) // BATCH_SIZE
    steps = epochs * steps_per_epoch
    optimizer, schedule = nadamw(model, settings, steps)
    maker = gradient_maker(model, settings)

    run, watch = _report.Run(settings.name), _report.Stopwatch()
    order = torch.Generator().manual_seed(seed)
    step, value = 0, accuracy(model, data.validation)
    run.record(step, 0.0, value)
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=order)[: steps_per_epoch * BATCH_SIZE].split(
            BATCH_SIZE
        ):
            images = shifted(x[batch], order)
            watch.start()
            logits = maker.setup_model_call(model, images)
            maker.setup_loss_call(F.cross_entropy, logits, y[batch])
            maker.forward_and_backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            watch.stop()
            step += 1
            if step % 10 == 0 or step == steps:
                value = accuracy(model, data.validation)
                run.record(step, watch.seconds, value)
            if on_step is not None:
                on_step(step, value)
    run.laps = watch.laps
    run.final["test accuracy"] = f"{accuracy(model, data.test):.2%}"
    return run


def main(arguments: list[str] | None = None) -> list[_report.Run]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few epochs of a smaller model")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    epochs, depth = (QUICK_EPOCHS, 1) if options.quick else (options.epochs, 3)

    data, console, runs = Digits.load(), _report.console(), []
    with _report.progress_bars(console, "accuracy") as progress:
        for settings in (NADAMW, KFAC):
            steps = epochs * (len(data.train[1]) // BATCH_SIZE)
            task = progress.add_task(settings.name, total=steps, value=0.0)
            runs.append(
                train(
                    settings,
                    data,
                    epochs,
                    options.seed,
                    depth,
                    lambda step, value, task=task: progress.update(
                        task, completed=step, value=value
                    ),
                )
            )
    title = "A ViT on handwritten digits"
    console.print(_report.table(runs, title, "validation accuracy", TARGET))
    console.print(
        "This is one seed: with seeds 1, 2 and 3 NAdamW takes 220, 360 and 420 steps to 95 %, "
        "K-FAC-reduce 200, 250 and 150. In seconds NAdamW is ahead on a model this small."
    )
    path = options.out / "vit_digits.png"
    _report.figure(runs, path, title, "validation accuracy", TARGET, lowest=0.5)
    console.print(f"Figure: {path}")
    return runs


if __name__ == "__main__":
    main()
