"""A loop with Hugging Face's Accelerate, gradient accumulation and clipping, and K-FAC in it.

    python examples/loops/accelerate_loop.py

Two lines are more than without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import asdl_ws_plugin


def main(epochs: int = 4, seed: int = 0) -> list[float]:
    """Train on scikit-learn's digits; returns the loss of every micro-batch."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 8 - 1
    loader = DataLoader(TensorDataset(x, torch.tensor(labels)), batch_size=32, shuffle=True)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prec = asdl_ws_plugin.Preconditioner(model)  # +1
    losses = []
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    prec.step()  # +2
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} micro-batches")
