"""Which positions of a layer are padding: of sequences with a mask, and of rows of graphs that were
brought into a dense coat.

A mask of the layer's length is its mask. Where lengths leave it open, the autograd graph decides:
the loss does not depend on padding, so a mask with a position of padding that the loss depends on
is not the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrangement import Arrangement
from .capture import Call
from .errors import LayerError
from .evidence import Touched
from .layout import LayoutBook, MaskOf, examples_first
from .positions import GRAPH, Positions
from .ragged import Mask
from .rules import BATCH_FIRST, SEQUENCE_FIRST

__all__ = ["dense_coat", "masked", "sequences_of"]

_MOST_EXTRA = 8  # positions that a layer may have beside those of a mask, as class tokens


def masked(
    name: str,
    call: Call,
    how: Arrangement,
    said: Positions,
    touched: Touched | None,
    book: LayoutBook,
) -> Arrangement:
    """With the padding mask of the layer's sequences, repeated for further positions of each token.

    Raises a LayerError if it is not known which mask that is.
    """
    length, times = sequences_of(how)
    how = replace(how, length=length)
    loss_sees = _seen_positions(how, touched, length)
    key = call.module, call.index
    if key in book.masks:
        settled = book.masks[key]
        if settled is None:
            return how
        if settled.name in said.masks:
            mask = _aligned(said.masks[settled.name], settled)
            if mask.shape[1] == length:
                return replace(how, ragged=Mask(mask).repeated(times), masks=(settled.name,))
    equal = {name: mask for name, mask in said.masks.items() if mask.mask.shape[1] == length}
    if said.is_guessed:
        return _guessed(how, equal, times, loss_sees)
    role = getattr(call.module, "role", None)
    if role in equal:
        equal = {role: equal[role]}
    if equal:
        return _of_equal_length(name, how, equal, times, loss_sees)
    _check_not_merged(name, how, said)
    return _of_other_length(name, how, said, length, times, loss_sees)


def sequences_of(how: Arrangement) -> tuple[int, int]:
    """The length of the layer's sequences, and how many further positions each token has."""
    sizes, n = how.sizes, how.num_examples
    if how.layout == SEQUENCE_FIRST and len(sizes) > 1:
        return sizes[0], sizes[2:].numel()
    if sizes[0] == n and len(sizes) > 1:
        return sizes[1], sizes[2:].numel()
    return sizes[0] // n, sizes[1:].numel()


def _seen_positions(how: Arrangement, touched: Touched | None, length: int) -> Tensor | None:
    """Which positions ``(N, length)`` the loss depends on; ``None``: not known."""
    if touched is None or not bool(touched.by_any.any()):
        return None
    rows = examples_first(touched.by_any.unsqueeze(-1), how.num_examples, how.layout)
    return rows.reshape(how.num_examples, length, -1).any(-1)


def _of_equal_length(
    name: str, how: Arrangement, masks: dict[str, Mask], times: int, loss_sees: Tensor | None
) -> Arrangement:
    """With that of the masks of the layer's length which the loss respects."""
    candidates, settles = masks, False
    if _differ([mask.mask for mask in masks.values()]) and loss_sees is not None:
        respected = {
            other: mask for other, mask in masks.items() if not (loss_sees & ~mask.mask).any()
        }
        if respected and not _differ([mask.mask for mask in respected.values()]):
            candidates, settles = respected, True
    if _differ([mask.mask for mask in candidates.values()]):
        raise LayerError(
            name,
            f"the padding masks {', '.join(map(repr, candidates))} all have its length "
            f"{how.length}, and the loss does not tell which is its",
            "Pad them to different lengths, or give the layer a role of that name with "
            "convert(model, roles=...).",
        )
    first = next(iter(candidates))
    _check_right_way_round(name, first, candidates[first].mask, loss_sees)
    finding = replace(how.finding, mask=MaskOf(first), settles_mask=settles)
    ragged = candidates[first].repeated(times)
    return replace(how, finding=finding, ragged=ragged, masks=tuple(candidates))


def _guessed(
    how: Arrangement, masks: dict[str, Mask], times: int, loss_sees: Tensor | None
) -> Arrangement:
    """With that of the model's arguments which leaves out most, and nothing that the loss sees.

    Nothing is padding until a batch with padding was looked at.
    """
    padded = {name: mask for name, mask in masks.items() if not bool(mask.mask.all())}
    if loss_sees is None or not padded:
        return how
    respected = {name: mask for name, mask in padded.items() if not (loss_sees & ~mask.mask).any()}
    if not respected:  # these are no masks of this layer; it may have one in a later batch
        return how
    fewest = min(mask.num_positions for mask in respected.values())
    best = {name: mask for name, mask in respected.items() if mask.num_positions == fewest}
    if _differ([mask.mask for mask in best.values()]):
        return replace(how, finding=replace(how.finding, undecided=tuple(best)))
    first = next(iter(best))
    finding = replace(how.finding, mask=MaskOf(first), settles_mask=True)
    return replace(how, finding=finding, ragged=best[first].repeated(times), masks=(first,))


def _of_other_length(
    name: str,
    how: Arrangement,
    said: Positions,
    length: int,
    times: int,
    loss_sees: Tensor | None,
) -> Arrangement:
    """With a mask that the layer has further positions beside, in front of it as class tokens are,
    or behind.
    """
    found: list[tuple[MaskOf, Tensor]] = []
    for other, mask in said.masks.items():
        extra = length - mask.mask.shape[1]
        if 0 < extra <= _MOST_EXTRA:
            for of in (MaskOf(other, before=extra), MaskOf(other, after=extra)):
                found.append((of, _aligned(mask, of)))
    if loss_sees is not None:
        if bool(loss_sees.all()) and not all(bool(mask.mask.all()) for mask in said.masks.values()):
            return replace(how, finding=replace(how.finding, mask=None, settles_mask=True))
        found = [(of, mask) for of, mask in found if not (loss_sees & ~mask).any()]
        if not found and bool((loss_sees != loss_sees[:1]).any()):
            lengths = ", ".join(str(mask.mask.shape[1]) for mask in said.masks.values())
            raise LayerError(
                name,
                f"some of its {length} positions are padding, as the loss does not depend on them "
                f"in some examples, but there is no mask of that length (there are {lengths})",
                "Give it as a further mask, as in padding(model, {'a': ..., 'b': ...}), or "
                f"leave the layer out with ignore_modules=['{name}']. In a mask, True or 1 is a "
                "real token.",
            )
    if not found:
        return how
    of, aligned = found[0]  # class tokens are in front, where nothing tells
    finding = replace(how.finding, mask=of, settles_mask=loss_sees is not None)
    return replace(how, finding=finding, ragged=Mask(aligned).repeated(times), masks=(of.name,))


def _check_right_way_round(name: str, of: str, is_real: Tensor, loss_sees: Tensor | None) -> None:
    """Refuse a mask ``(N, length)`` that counts just what the loss does not depend on."""
    if loss_sees is not None and not bool((loss_sees & is_real).any()):
        raise LayerError(
            name,
            f"the loss depends on none of the positions that the padding mask '{of}' counts, and "
            f"on {int(loss_sees.sum())} of those that it leaves out",
            "Is the mask the other way round? True, or 1, is a real token: give ~mask, as "
            "attach_padding(model, lambda x, mask: ~mask) does, a function of the model's "
            "arguments.",
        )


def _aligned(mask: Mask, of: MaskOf) -> Tensor:
    """The mask with the layer's further positions."""
    if not (of.before or of.after):
        return mask.mask
    return F.pad(mask.mask, (of.before, of.after), value=True)


def _differ(masks: Sequence[Tensor]) -> bool:
    return any(not torch.equal(masks[0], other) for other in masks[1:])


def _check_not_merged(name: str, how: Arrangement, said: Positions) -> None:
    """Refuse positions that may be those of a mask, in the batch's dimension."""
    sizes, n = how.sizes, how.num_examples
    if how.layout != BATCH_FIRST or sizes[0] == n:
        return
    total = sizes.numel() // n
    for mask_name, mask in said.masks.items():
        expected = mask.mask.shape[1]
        if expected > 1 and total % expected == 0:
            raise LayerError(
                name,
                f"its input merges {total} positions of each example into the batch, and it is not "
                f"clear which of them are padding by the mask '{mask_name}' of sizes ({n}, "
                f"{expected})",
                f"Is the mask that of this batch? Call the layer with (N, {expected}, ...), or "
                f"leave it out with ignore_modules=['{name}'].",
            )


# ------------------------------------------------------------------------------------------- graphs


def dense_coat(
    call: Call, how: Arrangement, said: Positions, touched: Touched | None, book: LayoutBook
) -> Arrangement | None:
    """``(N, R, *)`` with the rows of each example first and padding behind them, as PyG's
    ``to_dense_batch`` makes it of the rows of a role; ``None`` for anything else.
    """
    sizes, n, key = how.sizes, how.num_examples, (call.module, call.index)
    if len(sizes) < 2 or sizes[0] != n or getattr(call.module, "role", None) is not None:
        return None
    if key in book.masks and book.masks[key] is None:
        return None
    known = book.masks.get(key)
    for role, rows in said.roles.items():
        if role == GRAPH or (known is not None and known.name != role):
            continue
        counts = rows.counts()
        longest = int(counts.max()) if len(counts) else 0
        mask = torch.arange(sizes[1], device=counts.device) < counts.unsqueeze(1)
        if longest > sizes[1] or bool(mask.all()):
            continue
        loss_sees = _seen_positions(how, touched, sizes[1])
        if loss_sees is not None and bool((loss_sees & ~mask).any()):
            continue
        if loss_sees is None and known is None and longest != sizes[1]:
            continue
        finding = replace(how.finding, mask=MaskOf(role), settles_mask=loss_sees is not None)
        ragged = Mask(mask).repeated(sizes[2:].numel())
        return replace(how, finding=finding, ragged=ragged)
    return None
