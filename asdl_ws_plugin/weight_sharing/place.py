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
from .output_grads import Part
from .ragged import Segments
from .rules import SEQUENCE_FIRST

__all__ = ["place_rows", "positions_of_part", "readings"]


def place_rows(
    captured: Captured,
    count: Count,
    layers: Sequence[Layer],
    arranged: Mapping[nn.Module, Arranged],
) -> tuple[Tensor, int]:
    """The position of every row of the logits within its example, ``(rows,)``, and the number of
    positions.

    Raises a ValueError if the logits do not hold so many examples.
    """
    logits = captured.logits
    found = readings(logits, count)
    if len(found) > 1:
        off = [_crosstalk(captured, example, count, layers, arranged) for example, _ in found]
        best = min(range(len(off)), key=lambda i: off[i] or 0.0)  # the first where nothing tells
        found = found[best:]
    example, position = found[0]
    of_examples = position[example.flatten() < count.num_examples]
    return position, 1 + int(of_examples.max()) if len(of_examples) else 1


def positions_of_part(part: Part, logits: Tensor, position: Tensor, num_positions: int) -> Tensor:
    """The position of every term of a part of the loss, given those of the rows of the logits.

    Raises a ValueError if the terms are not rows of the logits.
    """
    if num_positions == 1 and part.num_rows == len(position):
        return position  # a term of each example, whatever it is made of
    return part.positions(logits, position)


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
