"""Stage 5, *operate*: the factors of every layer, from one backward pass or several.

Which output gradients are sent back is the Fisher type's: the loss's own, those of labels that are
drawn, or the columns of the loss Hessian's root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from asdl.matrices import FISHER_EMP, FISHER_EXACT, FISHER_MC
from torch import Tensor

from .batch import Batch
from .capture import Captured
from .count import Count
from .factors import full_precision
from .output_grads import sample_of
from .place import place_rows, positions_of_part
from .reading import Reading

__all__ = ["FISHER_FORWARD_ONLY", "FISHER_TYPES", "Estimate", "exact_passes", "operate"]

FISHER_FORWARD_ONLY = "fisher_forward_only"
FISHER_TYPES = (FISHER_EXACT, FISHER_MC, FISHER_EMP, FISHER_FORWARD_ONLY)

# Between the seeds of consecutive batches: 2**64 over the golden ratio, far apart.
_STRIDE = 0x9E3779B97F4A7C15
_RANK_STRIDE = 0xBF58476D1CE4E5B9  # and of the ranks: odd, so that no two are the same


@dataclass(frozen=True)
class Estimate:
    """Which estimate of the Fisher is computed.

    Attributes:
        fisher_type: one of :data:`FISHER_TYPES`.
        num_samples: how many labels ``fisher_mc`` draws for each term.
        seed: of those; ``None``: PyTorch's own generator.
        draws: how many batches labels were drawn for before.
        rank: of several processes that train together, which this one is; ``None``: it is the only
            one.
    """

    fisher_type: str
    num_samples: int = 1
    seed: int | None = None
    draws: int = 0
    rank: int | None = None

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Of the labels of this batch. Each batch gets others, and each rank, also where all ranks
        have one seed.
        """
        if self.seed is None and self.rank is None:
            return None
        # without a seed, every rank's default generator goes on alike
        start = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        draws = 0 if self.seed is None else self.draws
        seed = start + draws * _STRIDE + (self.rank or 0) * _RANK_STRIDE
        return torch.Generator(device).manual_seed(seed % 2**63)


@full_precision()
def operate(
    batch: Batch,
    captured: Captured,
    reading: Reading,
    count: Count,
    estimate: Estimate,
    scale_B: Any,
    backward: Callable[[], None] | None = None,
) -> None:
    """Let the batch's operations take the inputs and the output gradients.

    Args:
        scale_B: multiplies B.
        backward: accumulates the gradient of the loss into ``.grad``, where that is wanted, too.
    """
    batch.take_inputs()
    if estimate.fisher_type == FISHER_EMP:
        assert captured.loss is not None
        _empirical_pass(batch, captured.loss, scale_B * reading.sum_factor**2, backward)
        return
    batch.scale = scale_B
    if estimate.fisher_type == FISHER_FORWARD_ONLY:
        batch.take_identity()
    elif estimate.fisher_type == FISHER_MC:
        _sampled_passes(batch, reading, estimate, keep_graph=backward is not None)
    else:
        exact_passes(batch, captured, reading, count)
    if backward is not None:
        backward()


def _empirical_pass(
    batch: Batch, loss: Tensor, scale: Any, backward: Callable[[], None] | None
) -> None:
    """The gradient of the loss itself, in one pass with that of the weights where it is wanted."""
    batch.scale = scale
    if backward is not None:
        with batch.taking_output_grads():
            backward()
    else:
        batch.take_output_grads(loss, None, retain_graph=False)
    batch.end_of_pass()


def _sampled_passes(batch: Batch, reading: Reading, estimate: Estimate, keep_graph: bool) -> None:
    """One pass for each sample of labels."""
    generator = estimate.generator(reading.logits.device)
    batch.scale = batch.scale / estimate.num_samples
    for i in range(estimate.num_samples):
        outputs, grads = sample_of(reading.parts, generator)
        is_last = i == estimate.num_samples - 1
        batch.take_output_grads(outputs, grads, retain_graph=keep_graph or not is_last)
        batch.end_of_pass()


def exact_passes(batch: Batch, captured: Captured, reading: Reading, count: Count) -> None:
    """One pass for each class and position; the graph is left as it is."""
    rows, num_positions = place_rows(captured, count, batch.layers, batch.arranged)
    for part in reading.parts:
        position = positions_of_part(part, captured.logits, rows, num_positions)
        for grads in part.columns_by_position(position, num_positions):
            batch.take_output_grads(part.outputs, grads, retain_graph=True)
            batch.end_of_pass()
