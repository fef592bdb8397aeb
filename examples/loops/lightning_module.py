"""A ``LightningModule`` with automatic optimization, and K-FAC in it.

    python examples/loops/lightning_module.py

Two lines are more than without. Lightning calls ``backward`` itself; the preconditioner sees it,
and its step comes between that and the optimizer's.
"""

from __future__ import annotations

import logging
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import asdl_ws_plugin

asdl_ws_plugin.mend_torchvision()  # lightning imports it; beside a CPU build it may lack operators

import lightning  # noqa: E402


class Classifier(lightning.LightningModule):
    """A convolutional network on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
        self.prec = asdl_ws_plugin.Preconditioner(self.model)  # +1
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # +2
        self.prec.step()  # +3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(steps: int = 100, seed: int = 0, accumulate: int = 1) -> list[float]:
    """Train on scikit-learn's digits; returns the loss of every micro-batch."""
    from sklearn.datasets import load_digits

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    loader = DataLoader(TensorDataset(x, torch.tensor(labels)), batch_size=64, shuffle=True)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and of how often to log
        trainer.fit(classifier, loader)
    return classifier.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
