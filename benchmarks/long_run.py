"""Whether a long training leaves anything behind: hooks, live tensors, bytes, time a step.

    python benchmarks/long_run.py --steps 10000

A small ViT with the preset, in the loop that users have. All numbers are to stay flat; those of a
tensor's bytes are counted from the storages that Python reaches. Time is the processor's: what
other programs take of a shared machine grows and shrinks with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin


class ViT(nn.Module):
    """Patches of 8 x 8 images, one block of attention, ``(N, 1, 8, 8)`` to ``(N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x).flatten(2).mT).mean(1))


@dataclasses.dataclass
class Row:
    """What there is after a step."""

    step: int
    hooks: int
    modes: int
    tensors: int
    megabytes: float
    resident_megabytes: float
    milliseconds: float


def counts(num_steps: int, every: int, start: int = 0) -> Iterator[Row]:
    """Train, and count after each ``every`` steps from ``start`` on."""
    torch.manual_seed(0)
    model = asdl_ws_plugin.convert(ViT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prec = asdl_ws_plugin.Preconditioner(model)
    begin, last = time.process_time(), 0
    for step in range(1, num_steps + 1):
        x = torch.randn(16, 1, 8, 8)
        y = x.mean(2).squeeze(1).unflatten(-1, (4, 2)).sum(-1).argmax(-1)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        prec.backward(loss)
        optimizer.step()
        if step % every == 0 and step >= start:
            # Hooks wait on the model for a step with curvature, and are not there before others.
            spent = time.process_time() - begin
            del loss, x, y
            yield _row(step, model, 1e3 * spent / (step - last))
            begin, last = time.process_time(), step


def rows(num_steps: int, every: int, start: int = 0) -> list[Row]:
    """All of :func:`counts`, for a process of its own."""
    return list(counts(num_steps, every, start))


def _row(step: int, model: nn.Module, milliseconds: float) -> Row:
    gc.collect()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    tensors = [entry for entry in gc.get_objects() if issubclass(type(entry), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    modes = torch.overrides._len_torch_function_stack()
    size = sum(storages.values()) / 2**20
    return Row(step, hooks, modes, len(tensors), size, resident, milliseconds)


def main(arguments: list[str] | None = None) -> None:
    """Print a row of counts for each tenth of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--every", type=int, help="steps between two rows; by default a tenth")
    options = parser.parse_args(arguments)
    print("    step  hooks  modes  tensors      MiB  most resident MiB  CPU ms a step")
    for row in counts(options.steps, options.every or max(1, options.steps // 10)):
        print(
            f"{row.step:8d} {row.hooks:6d} {row.modes:6d} {row.tensors:8d} {row.megabytes:8.3f} "
            f"{row.resident_megabytes:18.1f} {row.milliseconds:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
