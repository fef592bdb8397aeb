"""Which example, and which position in it, each row of the logits and each term of the loss is of.

Sizes tell it, or what was said of the rows. Where several readings fit, the autograd graph decides:
rows of the logits are of the examples whose positions they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .arrange import Arranged
from .capture import Captured, Layer
from .count import Count, row_sizes
from .layout import fits
from .output_grads import positions_of_terms
from .ragged import Segments
from .read_loss import LossTerms
from .rules import SEQUENCE_FIRST

__all__ = ["place_terms", "readings"]


def place_terms(
    terms: LossTerms,
    captured: Captured,
    count: Count,
    layers: Sequence[Layer],
    arranged: Mapping[nn.Module, Arranged],
) -> tuple[Tensor, int]:
    """The position of every loss term within its example, ``(terms,)``, and the number of
    positions.

    Raises a ValueError if the logits do not hold so many examples, or the terms are not rows of
    them.
    """
    logits = captured.logits
    found = readings(logits, count)
    if len(found) > 1:
        off = [_crosstalk(captured, example, count, layers, arranged) for example, _ in found]
        best = min(range(len(off)), key=lambda i: off[i] or 0.0)  # the first where nothing tells
        found = found[best:]
    example, position = found[0]
    of_examples = position[example.flatten() < count.num_examples]
    num_positions = 1 + int(of_examples.max()) if len(of_examples) else 1
    if num_positions == 1 and terms.num_rows == len(position):
        return position, num_positions  # a term of each example, whatever it is made of
    return positions_of_terms(terms, logits, position), num_positions


def readings(logits: Tensor, count: Count) -> list[tuple[Tensor, Tensor]]:
    """The example of each row of the logits, and its position there, in the ways that fit; the
    likeliest first.

    Examples are of the sizes of the logits without classes, N for padding; positions are flat.
    """
    sizes, n = row_sizes(logits), count.num_examples
    rows = sizes.numel()
    ragged = count.segments_of(rows)
    if ragged:
        return [(part.index.view(sizes), part.rank()) for part in ragged]
    ids = torch.arange(rows, device=logits.device)
    inner = sizes[2:].numel()
    found = []
    if sizes[0] % n == 0:
        found.append((ids // (rows // n), ids % (rows // n)))
    if fits(SEQUENCE_FIRST, sizes, n) and rows > n:
        outer = ids // inner if len(sizes) > 1 else ids
        found.append((outer % n, outer // n * inner + ids % inner))
        if len(sizes) > 1 and sizes[0] != n:
            found.reverse()
    if not found:
        raise ValueError(f"Logits of sizes {tuple(logits.shape)} do not hold {n} examples.")
    return [(example.view(sizes), position) for example, position in found]


def _crosstalk(
    captured: Captured,
    example: Tensor,
    count: Count,
    layers: Sequence[Layer],
    arranged: Mapping[nn.Module, Arranged],
) -> float | None:
    """How much the rows of the logits, each being of this example, depend on other examples'
    positions.

    It is 0 if that is what they are of, where a batch does not mix its examples. Then weights of
    the examples that the logits are multiplied with reappear at the positions of those examples.
    Seen at a layer that is sequence first or ragged; ``None`` if there is none.

    Args:
        example: integers, of the sizes of the logits without classes.
    """
    logits, n = captured.logits, count.num_examples
    weights = torch.arange(1, n + 2, device=logits.device, dtype=torch.float32)
    weights = weights / len(weights)  # the last one is of rows that are left out
    weights = weights.to(logits.dtype)
    cotangent = torch.arange(1, logits.numel() + 1, device=logits.device).sin()
    cotangent = cotangent.to(logits.dtype).view_as(logits)
    weighted = cotangent.view(*example.shape, -1) * weights[example].unsqueeze(-1)
    for layer in reversed(layers):
        if layer.module not in arranged:
            continue
        calls = captured.record.calls[layer.module]
        for call, how in zip(calls, arranged[layer.module].calls, strict=True):
            ragged = how.ragged
            if not isinstance(ragged, Segments) and how.layout != SEQUENCE_FIRST:
                continue
            arrived = [
                torch.autograd.grad(
                    logits, [call.edge], grads, retain_graph=True, allow_unused=True
                )[0]
                for grads in (cotangent, weighted.view_as(logits))
            ]
            if arrived[0] is None or not arrived[0].any():
                continue
            plain, found = (
                how.apply(how.features_last(grad.reshape(call.out_shape))) for grad in arrived
            )
            of_rows = weights[:-1].view(-1, 1, 1)
            if isinstance(ragged, Segments):
                of_rows = weights[ragged.index].unsqueeze(1)
            return float((found - plain * of_rows).norm() / found.norm())
    return None
