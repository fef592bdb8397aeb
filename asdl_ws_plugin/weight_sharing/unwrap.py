"""The model inside of what others wrap around it."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, in
    whatever order they are.

    Its layers and Parameters are those of the wrapped model, under the names that checkpoints have.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod
        else:
            return model
