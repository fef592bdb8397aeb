"""The loop that every PyTorch script has, with K-FAC in it.

    python examples/loops/plain.py

Three lines are more than without: attention becomes visible, the preconditioner is created and told
which optimizer it belongs to. The loop itself is as it was.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import asdl_ws_plugin


def main(steps: int = 100, seed: int = 0) -> list[float]:
    """Train a small Transformer on synthetic sequences; returns the loss of every step."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0, batch_first=True)
    model = nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 6))
    asdl_ws_plugin.convert(model)  # +1: attention's projections become layers that hooks see
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    prec = asdl_ws_plugin.Preconditioner(model)  # +2
    prec.step_before(optimizer)  # +3
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 10, 12)
        y = x[..., :6].cumsum(1).argmax(-1)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
