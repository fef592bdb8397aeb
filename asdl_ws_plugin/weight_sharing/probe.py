"""What the autograd graph says of a batch: which rows of each layer's output the logits of single
examples depend on.

Sizes alone cannot tell ``(R, N)`` from ``(N, R)``, flattened rows of one kind from those of
another, or a batch from constants. A backward pass from the logits of one example can: it touches
the rows of that example, in every layer's output. Three such passes, on the first batch, check what
the sizes said: from all terms of the loss, from the first row of the logits, and from the last.
These two are of the first and the last example in every layout.

Where examples mix, as by batch normalization, every example touches all rows. Sizes decide then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arrange import frame
from .arrangement import Arrangement
from .capture import Call, Captured, Layer, last_nodes
from .count import Count, count_examples
from .evidence import Key, Touched
from .layout import fits
from .owners import learn_owners, open_calls
from .plan import Plan
from .rules import BATCH_FIRST, LAYOUTS
from .send_back import send_back

__all__ = ["counted", "probe", "touched_by_loss"]

_MOST_PROBES = 3  # a model's head may be initialised with zeros, through which nothing is seen


def probe(
    plan: Plan,
    layers: Sequence[Layer],
    captured: Captured,
    layout: str | None = None,
    num_examples: int | None = None,
) -> dict[Key, Touched]:
    """What the logits of examples touch, for each call of each layer that they do.

    Args:
        num_examples: N, to be told the owner of each row, too.
        layout: of the logits. ``None``: not known; single rows of them are looked at, which are of
            the first and of the last example in any layout.
    """
    logits = captured.logits
    by_call = {
        (layer.module, call.index): (call, frame(plan, layer, call, 1))
        for layer in layers
        for call in captured.record.calls.get(layer.module, ())
    }
    passes = _passes(
        by_call,
        [
            (logits, _of_loss(logits, captured.loss)),
            (logits, _of_example(logits, 0, layout)),
            (logits, _of_example(logits, -1, layout)),
        ],
    )
    owners = _owners(by_call, logits, num_examples, layout) if passes else {}
    return {
        key: Touched(passes[0][key], passes[1][key], passes[2][key], owners.get(key))
        for key in by_call
        if passes and all(key in found for found in passes)
    }


def touched_by_loss(
    layers: Sequence[Layer], captured: Captured, frames: Sequence[tuple[Key, Arrangement]]
) -> dict[Key, Tensor]:
    """The rows of these calls that the terms of the loss touch, booleans of their leading sizes."""
    by_call = {
        (layer.module, call.index): call
        for layer in layers
        for call in captured.record.calls.get(layer.module, ())
    }
    logits = captured.logits
    passes = _passes(
        {key: (by_call[key], how) for key, how in frames},
        [(logits, _of_loss(logits, captured.loss))],
    )
    return passes[0] if passes else {}


def counted(
    plan: Plan, layers: Sequence[Layer], captured: Captured
) -> tuple[Count, dict[Key, Touched]]:
    """Stage 3 with the graph's help: N and whose row is whose; and what a probe saw, if this batch
    is probed. What holds for later batches is kept in the plan.
    """
    book = plan.layouts
    count = count_examples(list(layers), book, captured)
    guesses = _padded_guesses(count)
    n = count.num_examples
    is_known = book.is_probed and guesses <= book.looked_at
    if n == 1 or (is_known and not open_calls(captured.record, book, n)):
        return count, {}
    evidence = probe(plan, layers, captured, None, n)
    layout = _layout_of_logits(captured.logits, evidence, n)
    if layout is not None:
        evidence = probe(plan, layers, captured, layout, n)
    count = _checked_count(plan, layers, captured, evidence, count)
    book.without_batch |= _without_batch(plan, layers, captured, evidence, count.num_examples)
    learn_owners(captured.record, evidence, book, count.num_examples)
    book.looked_at |= guesses if evidence else set()
    book.num_probes += 1
    is_open = not evidence or any(touched.is_empty for touched in evidence.values())
    book.is_probed = not is_open or book.num_probes >= _MOST_PROBES
    return count, evidence


def _padded_guesses(count: Count) -> set[str]:
    """The names of arguments that may be masks, as far as something is padding by them."""
    guessed = {id(said): said for said in count.positions.values() if said.is_guessed}
    return {
        name
        for said in guessed.values()
        for name, mask in said.masks.items()
        if not bool(mask.mask.all())
    }


def _layout_of_logits(
    logits: Tensor, evidence: Mapping[Key, Touched], num_examples: int
) -> str | None:
    """Which dimension of the logits is the batch where it may be either of two, as layers tell that
    mix the positions of an example; ``None`` where nothing tells, or there is no question.
    """
    if logits.ndim < 3 or not logits.shape[0] == logits.shape[1] == num_examples:
        return None
    told = {
        tuple(layout for layout in LAYOUTS if touched.agrees(layout, num_examples))
        for touched in evidence.values()
        if touched.by_last.shape[:2] == logits.shape[:2]
        and not (touched.is_empty or touched.is_mixed)
    }
    certain = {layouts[0] for layouts in told if len(layouts) == 1}
    return certain.pop() if len(certain) == 1 else None


def _checked_count(
    plan: Plan,
    layers: Sequence[Layer],
    captured: Captured,
    evidence: Mapping[Key, Touched],
    count: Count,
) -> Count:
    """N, or the second size of the logits, if rows are of examples in that reading alone."""
    logits = captured.logits
    if count.positions or logits.ndim < 3 or logits.shape[1] == count.num_examples:
        return count
    tensors = [
        (frame(plan, layer, call, 1).sizes, touched)
        for layer in layers
        for call in captured.record.calls.get(layer.module, ())
        if (touched := evidence.get((layer.module, call.index))) is not None
        and not touched.is_empty
        and not touched.is_mixed
    ]

    def fits_all(num_examples: int) -> bool:
        return num_examples > 1 and all(
            any(
                fits(layout, sizes, num_examples) and touched.agrees(layout, num_examples)
                for layout in LAYOUTS
            )
            for sizes, touched in tensors
        )

    # Rows that are each of one example hold N examples, if in an order that no layout has.
    owned = [touched for _, touched in tensors if touched.owner is not None]
    has_owners = bool(owned) and all(touched.has_owners for touched in owned)
    if tensors and not has_owners and not fits_all(count.num_examples):
        n = logits.shape[1]
        return replace(count, num_examples=n) if fits_all(n) else count
    return count


def _without_batch(
    plan: Plan,
    layers: Sequence[Layer],
    captured: Captured,
    evidence: Mapping[Key, Touched],
    num_examples: int,
) -> set[Key]:
    """The calls whose input does not depend on the model's, and is shared by the examples.

    Constants that were repeated for each example are none of them: they have rows of their own.
    """
    found = set()
    for layer in layers:
        for call in captured.record.calls.get(layer.module, ()):
            key = layer.module, call.index
            if call.from_input is not False or num_examples == 1:
                continue
            touched = evidence.get(key)
            sizes = frame(plan, layer, call, num_examples).sizes
            holds_batch = num_examples in sizes[:2] or sizes[0] % num_examples == 0
            if not holds_batch or (touched is not None and touched.is_mixed):
                found.add(key)
    return found


def _of_loss(logits: Tensor, loss: Tensor | None) -> Tensor:
    """Noise in the rows of the logits that the loss depends on.

    Not the gradient of the loss itself, some of which may cancel out on the way.
    """
    weights = _noise(logits)
    if loss is None or not loss.requires_grad:
        return weights
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if grad is None:  # the loss was given something else
        return weights
    depends = grad != 0
    return weights * (depends.any(-1, keepdim=True) if logits.ndim > 1 else depends)


def _noise(like: Tensor) -> Tensor:
    """Numbers without a pattern that could cancel out."""
    return torch.arange(1, like.numel() + 1, device=like.device).sin().to(like.dtype).view_as(like)


def _of_example(logits: Tensor, which: int, layout: str | None) -> Tensor:
    """Noise in the logits of the first or the last example, or in one row of them."""
    found = logits.new_zeros(logits.shape)
    if layout is not None:
        part = found.select(0 if layout == BATCH_FIRST else 1, which)
    else:
        part = found.view(-1, logits.shape[-1])[which] if logits.ndim > 1 else found[which]
    part.copy_(_noise(part))
    return found


def _passes(
    calls: Mapping[Key, tuple[Call, Arrangement]], sent: Sequence[tuple[Tensor, Tensor]]
) -> list[dict[Key, Tensor]]:
    """Which rows of each call's output get a gradient, for each pair of outputs and cotangents;
    nothing if no graph can be asked.
    """
    if not (calls and all(outputs.requires_grad for outputs, _ in sent)):
        return []
    try:
        return [_touched(outputs, cotangent, calls) for outputs, cotangent in sent]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return []  # reentrant checkpoints have a graph for a whole backward pass only


def _touched(
    outputs: Tensor, cotangent: Tensor, calls: Mapping[Key, tuple[Call, Arrangement]]
) -> dict[Key, Tensor]:
    """Which rows of each call's output get a gradient, ``sizes``, by call."""
    return _of_rows(outputs, cotangent, calls, lambda rows: (rows != 0).any(-1))


def _of_rows(
    outputs: Tensor,
    cotangent: Tensor,
    calls: Mapping[Key, tuple[Call, Arrangement]],
    function: Callable[[Tensor], Tensor],
) -> dict[Key, Tensor]:
    """A function of the gradients ``(*sizes, P)`` of each call's output, by call."""
    found: dict[Key, Tensor] = {}

    def receive(key: Any, grad: Tensor | None) -> None:
        if grad is not None:
            call, how = calls[key]
            found[key] = function(how.features_last(grad.detach().reshape(call.out_shape)))

    stops = [(key, call) for key, (call, _) in calls.items()]
    last = last_nodes(outputs, {call.edge.node for _, call in stops})
    send_back(outputs, cotangent, stops, receive, last, retain_graph=True)
    return found


# ------------------------------------------------------------------------------------------- owners

_PROJECTIONS = 4  # of a row's gradient; a row of several examples is in proportion in none
_FEWEST_FEATURES = 3
_TOLERANCE = 1e-3
# Gradients that cancel out leave rounding errors, as those of a query with a single key. Errors are
# in proportion to whole numbers, and not to what is a whole number and the golden ratio.
_OFFSET = (5**0.5 - 1) / 2
_NOISE = 100  # times the precision of the largest gradient is nothing but rounding errors


def _owners(
    calls: Mapping[Key, tuple[Call, Arrangement]],
    logits: Tensor,
    num_examples: int | None,
    layout: str | None,
) -> dict[Key, Tensor]:
    """The example of each row whose logits alone it reaches, ``sizes``, by call; -1: not certain.

    A backward pass is linear: what the logits of an example are weighed with, the gradients of its
    rows are. Two passes tell the owners of all rows, -2 where there is nothing but noise.
    """
    dim = _batch_dim(logits, num_examples, layout)
    if dim is None or num_examples is None or logits.dtype not in (torch.float32, torch.float64):
        return {}
    weights = torch.arange(1, num_examples + 1, device=logits.device).to(logits.dtype) + _OFFSET
    weights = weights.view([-1 if d == dim else 1 for d in range(logits.ndim)])
    cotangent = _noise(logits)
    plain = _of_rows(logits, cotangent, calls, _projected)
    weighted = _of_rows(logits, cotangent * weights, calls, _projected)
    return {
        key: _owner(plain[key], weighted[key], num_examples)
        for key in plain
        if plain[key].shape[-1]
    }


def _batch_dim(logits: Tensor, num_examples: int | None, layout: str | None) -> int | None:
    """Which dimension of the logits is the batch; ``None`` if that is not known."""
    fitting = [d for d in range(max(1, logits.ndim - 1))[:2] if logits.shape[d] == num_examples]
    if len(fitting) > 1:
        return None if layout is None else LAYOUTS.index(layout)
    return fitting[0] if fitting else None


def _projected(rows: Tensor) -> Tensor:
    """``(*sizes, P)`` to as many numbers of each row as there are projections; to none where there
    are too few features to be certain.
    """
    size = rows.shape[-1]
    if size < _FEWEST_FEATURES:
        return rows[..., :0]
    angles = torch.arange(1, size * _PROJECTIONS + 1, device=rows.device, dtype=torch.float64)
    return rows @ angles.sin().to(rows.dtype).view(size, _PROJECTIONS)


def _owner(plain: Tensor, weighted: Tensor, num_examples: int) -> Tensor:
    """The example whose weight all projections of a row have in common, -1 where there is none, -2
    where there is no gradient to speak of.
    """
    ratios = weighted.double() / plain.double() - _OFFSET  # not a number where there is no gradient
    weight = ratios[..., 0].round()
    is_one = ((ratios - weight.unsqueeze(-1)).abs() < _TOLERANCE).all(-1)
    is_one &= (weight >= 1) & (weight <= num_examples)
    size = plain.abs().amax(-1)
    largest = size.max() if size.numel() else 0.0
    is_noise = size <= _NOISE * torch.finfo(plain.dtype).eps * largest
    owner = torch.where(is_one, weight - 1, -1).nan_to_num(-1).long()
    return owner.masked_fill(is_noise, -2)
