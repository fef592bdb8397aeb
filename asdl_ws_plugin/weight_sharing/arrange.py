"""Stage 4, *arrange*: how the tensors of each call become ``(N, R, P)``, or rows of segments.

An :class:`Arrangement` is found from sizes and from what was said of the rows alone; nothing is
moved or copied for it. The tensors follow one at a time, when the layer's operation takes them: all
of them at once would not fit beside the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .capture import Call, Layer, Record
from .count import Count
from .errors import LayerError
from .layout import Finding, examples_first, find_layout, find_role
from .plan import Plan
from .positions import GRAPH, Positions, WeightSharingLinear
from .ragged import Mask, Ragged, Segments
from .rules import BATCH_FIRST, SEQUENCE_FIRST

__all__ = ["Arranged", "Arrangement", "arrange", "arrange_layer", "arranged_input"]


@dataclass(frozen=True)
class Arrangement:
    """How one call's tensors become ``(N, R, P)``, or rows that belong to segments.

    Attributes:
        finding: their layout, and how it was found.
        num_examples: N.
        sizes: their leading sizes, features left out.
        dims: trailing dimensions that are features.
        channel_dims: of a layer whose features are dimension 1, how many dimensions a single
            example has; 0 for all others.
        ragged: which example each position belongs to, where that differs by example.
        masks: the names of the padding masks that fit.
        length: of the sequences that a mask was looked for.
    """

    finding: Finding
    num_examples: int
    sizes: torch.Size
    dims: int = 1
    channel_dims: int = 0
    ragged: Ragged | None = None
    masks: tuple[str, ...] = ()
    length: int | None = None

    @property
    def layout(self) -> str:
        """``'batch_first'`` or ``'sequence_first'``."""
        return self.finding.layout

    @property
    def R(self) -> float:
        """Positions of an example; of ragged ones the mean."""
        if self.ragged is not None:
            return self.ragged.num_positions / max(1, self.num_examples)
        return self.sizes.numel() / self.num_examples

    def features_last(self, x: Tensor) -> Tensor:
        """The layer's input or output with a dimension for the batch, and one for the features: the
        last.
        """
        if self.channel_dims:
            x = _batched(x, self.channel_dims).movedim(1, -1)
        elif x.ndim == self.dims:
            x = x.unsqueeze(0)
        return x.flatten(-self.dims) if self.dims > 1 else x

    def apply(self, x: Tensor) -> Tensor:
        """``(*sizes, P)`` to ``(N, R, P)``, or to rows ``(ΣR_n, P)`` of segments."""
        if isinstance(self.ragged, Segments):
            return x.reshape(-1, x.shape[-1])
        return examples_first(x, self.num_examples, self.layout)


@dataclass(frozen=True)
class Arranged:
    """The calls of a layer, as further positions of one.

    Attributes:
        calls: one for each.
        ragged: the positions of all calls, if they are ragged.
    """

    calls: tuple[Arrangement, ...]
    ragged: Ragged | None = None

    @property
    def layout(self) -> str:
        """``'ragged'``, or the first call's layout."""
        is_ragged = any(call.ragged is not None for call in self.calls)
        return "ragged" if is_ragged else self.calls[0].layout

    @property
    def R(self) -> float:
        """Positions of an example, those of all calls together."""
        return sum(call.R for call in self.calls)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The arranged tensors of the calls as one."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(list(parts), dim=0 if isinstance(self.ragged, Segments) else 1)


def arrange(
    plan: Plan, layers: Sequence[Layer], record: Record, count: Count
) -> dict[nn.Module, Arranged]:
    """How the tensors of all layers that were called are arranged; what was found of their layouts
    is kept in the plan.

    Raises a LayerError for tensors that fit no layout, or not what was said of them; a ValueError
    if a padding mask is of no layer.
    """
    arranged = {
        layer.module: arrange_layer(plan, layer, record.calls[layer.module], count)
        for layer in layers
        if layer.module in record.calls
    }
    plan.layouts.report(count.num_examples)
    _check_masks([call for one in arranged.values() for call in one.calls], count)
    return arranged


def arrange_layer(plan: Plan, layer: Layer, calls: Sequence[Call], count: Count) -> Arranged:
    """How the tensors of one layer's calls are arranged; what was found is kept in the plan."""
    found: list[Arrangement] = []
    for i, call in enumerate(calls):
        arrangement = _arrange_call(plan, layer, i, call, count)
        plan.layouts.note(layer.name, call.module, i, arrangement.sizes, arrangement.finding)
        found.append(arrangement)
    return _agreed(found, [call.unmodified_input(layer.name).device for call in calls])


def arranged_input(layer: Layer, call: Call, how: Arrangement, operation: Any, alone: bool) -> Any:
    """One call's input: ``(N, R, P)``, rows ``(ΣR_n, P)``, or one image for each example.

    Args:
        operation: the layer's.
        alone: it is the layer's only call.
    """
    module, n = call.module, how.num_examples
    x = call.unmodified_input(layer.name)
    if isinstance(module, nn.Conv2d):
        x = _batched(x, how.channel_dims)
        # A tied module may be of another stride or dilation than the operation's.
        if not alone or module is not layer.module:
            return how.apply(factors.patches(x, module))
        if x.shape[0] == n:
            return x
        # Images merged into the batch are further positions.
        return how.apply(operation.preprocess_in_data(module, x, None))
    x = how.features_last(x.unsqueeze(-1) if isinstance(module, nn.Embedding) else x)
    return how.apply(operation.prepare_in_data(module, x))


def _batched(x: Tensor, single: int) -> Tensor:
    return x.unsqueeze(0) if x.ndim == single else x


# ----------------------------------------------------------------------------------------- one call


def _arrange_call(plan: Plan, layer: Layer, i: int, call: Call, count: Count) -> Arrangement:
    """How one call's tensors are arranged. Changes nothing."""
    module, n = call.module, count.num_examples
    x = call.unmodified_input(layer.name)
    if isinstance(module, nn.Conv2d):
        return _arrange_images(layer, call, n)
    how = Arrangement(Finding(), n, x.shape, plan.num_feature_dims(layer, module))
    if plan.has_channels_first(module):
        how = replace(how, channel_dims=3 if isinstance(layer.module, nn.BatchNorm2d) else 1)
    sizes = _leading(x.shape, module, how)
    how = replace(how, sizes=sizes)
    said = count.positions.get(module)
    if said is not None and said.roles:
        return _arrange_rows(plan, layer, i, call, how, said)
    _check_rows_are_known(layer, module, sizes, said, n)
    # Images are batch first, of whatever height.
    if not (how.channel_dims and sizes[0] % n == 0):
        how = replace(how, finding=find_layout(layer.name, module, sizes, n, plan.layouts))
    return _masked(layer, module, how, said) if said is not None and said.masks else how


def _leading(shape: torch.Size, module: nn.Module, how: Arrangement) -> torch.Size:
    """The sizes of a layer's input without its features."""
    if isinstance(module, nn.Embedding):  # its input are numbers, which have no dimension
        return shape if len(shape) else torch.Size((1,))
    if how.channel_dims:
        shape = shape if len(shape) != how.channel_dims else torch.Size((1, *shape))
        shape = torch.Size((shape[0], *shape[2:], shape[1]))
    elif len(shape) == how.dims:
        shape = torch.Size((1, *shape))
    return shape[: -how.dims]


def _arrange_images(layer: Layer, call: Call, num_examples: int) -> Arrangement:
    x = call.unmodified_input(layer.name)
    sizes = x.shape if x.ndim > 3 else torch.Size((1, *x.shape))
    if sizes[0] % num_examples:
        raise LayerError(
            layer.name,
            f"the first of its input's sizes {tuple(sizes)} does not match the {num_examples} "
            "examples of the batch",
        )
    positions = torch.Size((sizes[0], *call.out_shape[-2:]))
    return Arrangement(Finding(leading=sizes[0]), num_examples, positions, 1, 3)


def _arrange_rows(
    plan: Plan, layer: Layer, i: int, call: Call, how: Arrangement, said: Positions
) -> Arrangement:
    """Rows of segments."""
    assert call.in_data is not None
    rows, role = find_role(
        layer.name,
        call.module,
        i,
        how.sizes[0],
        said.roles,
        plan.layouts,
        call.in_data.device,
    )
    finding = Finding(role=role)
    if rows.is_dense:  # the same as without segments, to the last bit
        return replace(how, finding=finding)
    return replace(how, finding=finding, ragged=rows.repeated(how.sizes[1:].numel()))


def _check_rows_are_known(
    layer: Layer, module: nn.Module, sizes: torch.Size, said: Positions | None, n: int
) -> None:
    """Refuse rows of a layer for ragged ones of which nothing was said."""
    if not isinstance(module, WeightSharingLinear) or said is not None or len(sizes) > 1:
        return
    if sizes[0] == n and module.role in (None, GRAPH):  # one row each, as in node classification
        return
    raise LayerError(
        layer.name,
        f"it is not known which example each of its {sizes[0]} rows belongs to",
        "Say it with segments(model, ...), attach_segments, or the layer's set_segments.",
    )


# ------------------------------------------------------------------------------------------ padding


def _masked(layer: Layer, module: nn.Module, how: Arrangement, said: Positions) -> Arrangement:
    """With the padding mask of sequences of this length, repeated for further positions of each
    token.
    """
    sizes, n = how.sizes, how.num_examples
    if how.layout == SEQUENCE_FIRST and len(sizes) > 1:
        length, times = sizes[0], sizes[2:].numel()
    elif sizes[0] == n and len(sizes) > 1:
        length, times = sizes[1], sizes[2:].numel()
    else:
        length, times = sizes[0] // n, sizes[1:].numel()
    found = {name: mask for name, mask in said.masks.items() if mask.mask.shape[1] == length}
    role = getattr(module, "role", None)
    if role in found:
        found = {role: found[role]}
    if not found:
        _check_not_merged(layer, how, said)
        return replace(how, length=length)
    mask = next(iter(found.values()))
    if any(not torch.equal(mask.mask, other.mask) for other in found.values()):
        raise LayerError(
            layer.name,
            f"the padding masks {', '.join(map(repr, found))} all have its length {length}",
            "Pad them to different lengths, or give the layer a role of that name with "
            "convert(model, roles=...).",
        )
    return replace(how, ragged=mask.repeated(times), masks=tuple(found), length=length)


def _check_not_merged(layer: Layer, how: Arrangement, said: Positions) -> None:
    """Refuse positions that may be those of a mask, in the batch's dimension."""
    sizes, n = how.sizes, how.num_examples
    if how.layout != BATCH_FIRST or sizes[0] == n:
        return
    total = sizes.numel() // n
    for name, mask in said.masks.items():
        expected = mask.mask.shape[1]
        if expected > 1 and total % expected == 0:
            raise LayerError(
                layer.name,
                f"its input merges {total} positions of each example into the batch, and it is not "
                f"clear which of them are padding by the mask '{name}' of sizes ({n}, {expected})",
                f"Is the mask that of this batch? Call the layer with (N, {expected}, ...), or "
                f"leave it out with ignore_modules=['{layer.name}'].",
            )


def _check_masks(calls: Sequence[Arrangement], count: Count) -> None:
    """Raise a ValueError if a mask was given that is of no layer."""
    used = {name for call in calls for name in call.masks}
    unused = {
        name: mask.mask.shape[1]
        for said in count.positions.values()
        for name, mask in said.masks.items()
        if name not in used
    }
    if unused:
        name, length = next(iter(unused.items()))
        seen = sorted({call.length for call in calls if call.length is not None})
        raise ValueError(
            f"padding: no layer has sequences of the length {length} of the mask '{name}', but "
            f"{', '.join(map(str, seen))}."
        )


# -------------------------------------------------------------------------------------- all of them


def _agreed(calls: list[Arrangement], devices: Sequence[torch.device]) -> Arranged:
    """The calls with what they have to have in common to be joined."""
    if all(call.ragged is None for call in calls):
        return Arranged(tuple(calls))
    parts: list[Any] = []
    if any(isinstance(call.ragged, Segments) for call in calls):
        for k, (call, device) in enumerate(zip(calls, devices, strict=True)):
            if call.ragged is None:  # dense after all
                index = torch.arange(call.num_examples, device=device)
                index = index.repeat_interleave(call.sizes.numel() // call.num_examples)
                calls[k] = replace(call, ragged=Segments(index, num_examples=call.num_examples))
            parts.append(calls[k].ragged)
        return Arranged(tuple(calls), Segments.cat(parts))
    for call, device in zip(calls, devices, strict=True):
        if call.ragged is None:
            sizes = call.num_examples, call.sizes.numel() // call.num_examples
            parts.append(Mask(torch.ones(sizes, dtype=torch.bool, device=device)))
        else:
            parts.append(call.ragged)
    return Arranged(tuple(calls), Mask.cat(parts))
