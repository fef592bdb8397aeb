"""A padding mask that nobody gave: positions that the loss does not depend on, at any layer.

Where a mask is missing, padding counts in the factors A, and nothing else shows it: gradients are
right. The labels show it where positions have labels, as those of padding are left out. A label
that is left out is no proof, though: the tokens of a prompt have none, and later ones attend to
them. What makes padding of it is that no layer's output there has a gradient, in the shape that
padding has: at the end or at the start of examples, and not of all alike. Where examples have one
label each, as those of a classifier, an argument of the model that is false at just such positions
takes the labels' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._warn import warn
from .arrange import Arranged
from .arrangement import Arrangement
from .capture import Captured, Layer
from .count import Count, num_rows
from .evidence import Touched
from .layout import examples_first
from .nests import tensors_in
from .padded import sequences_of
from .place import readings
from .probe import touched_by_loss
from .read_loss import LossTerms
from .reading import Reading

__all__ = ["ForgottenPadding"]

_MOST_PASSES = 3  # backward passes that are spent on it beside those that are made anyway
_MOST_BATCHES = 100  # that are looked at
_FEWEST_LAYERS = 2  # a head alone says no more than the labels do


class ForgottenPadding:
    """Warns once. Looks until it has, or until enough batches have nothing of the kind."""

    def __init__(self) -> None:
        self._passes = self._batches = 0
        self._is_done = False

    def look(
        self,
        layers: Sequence[Layer],
        captured: Captured,
        reading: Reading,
        count: Count,
        arranged: Mapping[nn.Module, Arranged],
        evidence: Mapping[tuple[nn.Module, int], Touched],
    ) -> None:
        """Warn if positions are padding by all that the loss shows, and no mask was given."""
        if self._is_done or count.positions or count.num_examples == 1:
            return
        self._batches += 1
        self._is_done = self._batches >= _MOST_BATCHES
        unlabelled = _unlabelled(captured.logits, reading, count)
        if unlabelled:
            self._look_at(unlabelled, layers, captured, arranged, evidence, is_by_label=True)
        elif num_rows(captured.logits) == count.num_examples:
            masked_out = _masked_out(captured.inputs, count.num_examples)
            self._look_at(masked_out, layers, captured, arranged, evidence, is_by_label=False)

    def _look_at(
        self,
        candidates: Sequence[Tensor],
        layers: Sequence[Layer],
        captured: Captured,
        arranged: Mapping[nn.Module, Arranged],
        evidence: Mapping[tuple[nn.Module, int], Touched],
        is_by_label: bool,
    ) -> None:
        """Warn of the first of these positions ``(N, R)`` that are padding."""
        rows = {key: touched.by_any for key, touched in evidence.items()}
        for candidate in candidates:
            length = candidate.shape[1]
            calls = _calls_of_length(layers, captured, arranged, length)
            if len(calls) < _FEWEST_LAYERS:
                continue
            if not rows and self._passes < _MOST_PASSES:
                self._passes += 1
                self._is_done |= self._passes >= _MOST_PASSES
                rows = touched_by_loss(layers, captured, [(key, how) for key, _, how in calls])
            seen = [_seen(how, rows[key], length) for key, _, how in calls if key in rows]
            if len(seen) < _FEWEST_LAYERS:
                continue
            find = _padding_by_label if is_by_label else _padding_by_argument
            found = find(candidate, torch.stack(seen), captured.inputs)
            if found:
                self._is_done = True
                _warn_of(found, candidate.numel(), calls[0][1], is_by_label)
                return


def _padding_by_label(unlabelled: Tensor, seen: Tensor, inputs: object) -> int:
    """How many of the positions without a label are padding."""
    padding = _padding(unlabelled, seen)
    # The last token of a text has no next one to predict, and is none of its padding.
    for found in (padding, _behind_the_first(padding)):
        if bool(found.any()) and not _are_tokens(inputs, found):
            return int(found.sum())
    return 0


def _padding_by_argument(masked_out: Tensor, seen: Tensor, _: object) -> int:
    """How many positions are padding if an argument says so of these: all of them, or none."""
    found = _padding(masked_out, seen)
    return int(found.sum()) if not bool((masked_out & seen.any(0)).any()) else 0


def _masked_out(inputs: object, num_examples: int) -> list[Tensor]:
    """The positions ``(N, R)`` that each argument which may be a mask leaves out."""
    found = []
    for x in tensors_in(inputs):
        if x.ndim != 2 or len(x) != num_examples or x.shape[1] < 2:
            continue
        real = x != 0
        if bool((real.to(x.dtype) == x).all()) and not bool(real.all()):
            found.append(~real)
            if x.dtype == torch.bool:
                found.append(real)  # True may also say that it is padding
    return found


def _unlabelled(logits: Tensor, reading: Reading, count: Count) -> list[Tensor]:
    """Which positions ``(N, R)`` have no term in the loss, in each way that rows may be of
    examples; empty if all have one, or it is not known.
    """
    n, num = count.num_examples, num_rows(logits)
    if logits.ndim < 2 or num == n or num % n:
        return []
    has_term = [_has_term(terms, logits) for _, terms in reading.calls]
    known = [rows for rows in has_term if rows is not None]
    if not has_term or len(known) < len(has_term):
        return []
    rows = torch.stack(known).any(0)
    if bool(rows.all()):
        return []
    found = []
    for example, position in readings(logits, count):
        is_unlabelled = torch.zeros(n, len(rows) // n, dtype=torch.bool, device=rows.device)
        is_unlabelled[example.flatten(), position] = ~rows
        found.append(is_unlabelled)
    return found


def _has_term(terms: LossTerms, logits: Tensor) -> Tensor | None:
    """Which rows of the logits a call has a term of whose weight is not 0, ``(rows,)``; ``None`` if
    it is not of the logits.
    """
    x = terms.logits
    values = torch.ones_like(x) if terms.weight is None else (terms.weight != 0).to(x.dtype)
    values = values.expand_as(x)
    if x is not logits:
        if not x.requires_grad:
            return None
        # Random, as terms of one row may cancel out on the way back to it.
        values = values * torch.linspace(1, 2, x.numel(), device=x.device).view_as(x).to(x.dtype)
        (found,) = torch.autograd.grad(x, logits, values, retain_graph=True, allow_unused=True)
        if found is None:
            return None
        values = found
    return (values != 0).reshape(-1, logits.shape[-1]).any(-1)


_CallOfLength = tuple[tuple[nn.Module, int], str, Arrangement]


def _calls_of_length(
    layers: Sequence[Layer],
    captured: Captured,
    arranged: Mapping[nn.Module, Arranged],
    length: int,
) -> list[_CallOfLength]:
    """The calls with as many positions as the logits have, with the layer's name."""
    found = []
    for layer in layers:
        if layer.module not in arranged or isinstance(layer.module, nn.Conv2d):
            continue
        calls = captured.record.calls[layer.module]
        for call, how in zip(calls, arranged[layer.module].calls, strict=True):
            if how.ragged is None and sequences_of(how)[0] == length:
                found.append(((layer.module, call.index), layer.name, how))
    return found


def _seen(how: Arrangement, rows: Tensor, length: int) -> Tensor:
    """The positions ``(N, length)`` at which a layer's output has a gradient."""
    rows = examples_first(rows.unsqueeze(-1), how.num_examples, how.layout)
    return rows.reshape(how.num_examples, length, -1).any(-1)


def _padding(is_unlabelled: Tensor, seen: Tensor) -> Tensor:
    """Which positions ``(N, R)`` are padding by all that the gradients show.

    Args:
        is_unlabelled: the positions without a term ``(N, R)``.
        seen: those with a gradient, of each layer ``(layers, N, R)``.
    """
    nothing, seen_anywhere = torch.zeros_like(is_unlabelled), seen.any(0)
    if bool((~is_unlabelled & ~seen_anywhere).any()):  # the rows are of other examples than this
        return nothing
    # A zero-initialised head, or a block that is dropped for an example, hides what is attended to.
    is_known = seen.any(2).all(0).unsqueeze(1)
    unseen = is_unlabelled & ~seen_anywhere & is_known
    at_the_start = unseen.cumprod(1).bool()
    at_the_end = unseen.flip(1).cumprod(1).flip(1).bool()
    if not torch.equal(unseen, at_the_start | at_the_end):  # labels are missing here and there
        return nothing
    of_all = (unseen | ~is_known).all(0)  # then it is the model's way, and not that of a batch
    return unseen & ~of_all


def _behind_the_first(padding: Tensor) -> Tensor:
    """Without the first position of padding ``(N, R)`` at the end of each example."""
    return padding & F.pad(padding[:, :-1], (1, 0))


def _are_tokens(inputs: object, padding: Tensor) -> bool:
    """Whether the model's arguments show something else than padding there: tokens, as they are
    after the last label of a text, that are not all one and the same.
    """
    whole = [x for x in tensors_in(inputs) if x.ndim == 2 and not x.is_floating_point()]
    for x in (*whole, *(x.T for x in whole)):
        # Of what is the same for every example, as positions are, nothing follows.
        if x.shape == padding.shape and bool((x != x[:1]).any()):
            values = x[padding]
            if len(values) == 1 or bool((values != values[0]).any()):
                return True
    return False


def _warn_of(num_positions: int, num_all: int, name: str, is_by_label: bool) -> None:
    reason = "they have no label" if is_by_label else "an argument of the model leaves them out"
    warn(
        f"The loss depends on {num_positions} of the batch's {num_all} positions at no layer (the "
        f"first is '{name}'), and {reason}: they are padding, or of no more use than "
        "that, but count in the factors A, since no mask says so. Say it with attach_padding(model,"
        " 'attention_mask'), by the name of the model's argument, or with padding(model, mask) "
        "around the step, True for a real token."
    )
