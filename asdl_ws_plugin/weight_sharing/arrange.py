"""Stage 4, *arrange*: how the tensors of each call become ``(N, R, P)``, or rows of segments.

An :class:`Arrangement` is found from sizes and from what was said of the rows alone; nothing is
moved or copied for it. The tensors follow one at a time, when the layer's operation takes them: all
of them at once would not fit beside the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .arrangement import Arrangement, batched
from .capture import Call, Layer, Record
from .count import Count
from .errors import LayerError
from .evidence import Touched, checked_by_graph
from .layout import Finding, find_layout, find_role
from .operations import EXPAND
from .owners import by_index
from .padded import dense_coat, masked
from .plan import Plan
from .positions import GRAPH, Positions, WeightSharingLinear
from .ragged import Mask, Ragged, Segments
from .rules import SEQUENCE_FIRST

__all__ = ["Arranged", "arrange", "arrange_layer", "arranged_input", "frame"]


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
    plan: Plan,
    layers: Sequence[Layer],
    record: Record,
    count: Count,
    evidence: Mapping[tuple[nn.Module, int], Touched] | None = None,
) -> dict[nn.Module, Arranged]:
    """How the tensors of all layers that were called are arranged; what was found of their layouts
    is kept in the plan.

    Args:
        evidence: what a probe of the autograd graph saw of the calls.

    Raises a LayerError for tensors that fit no layout, or not what was said of them; a ValueError
    if a padding mask is of no layer.
    """
    arranged = {
        layer.module: arrange_layer(plan, layer, record.calls[layer.module], count, evidence)
        for layer in layers
        if layer.module in record.calls
    }
    plan.layouts.report(count.num_examples)
    _check_masks([call for one in arranged.values() for call in one.calls], count)
    return arranged


def arrange_layer(
    plan: Plan,
    layer: Layer,
    calls: Sequence[Call],
    count: Count,
    evidence: Mapping[tuple[nn.Module, int], Touched] | None = None,
) -> Arranged:
    """How the tensors of one layer's calls are arranged; what was found is kept in the plan."""
    found: list[Arrangement] = []
    for call in calls:
        touched = (evidence or {}).get((layer.module, call.index))
        how = _arrange_call(plan, layer, call, count, touched)
        plan.layouts.note(layer.name, call.module, call.index, how.sizes, how.finding)
        found.append(how)
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
        x = batched(x, how.channel_dims)
        # A tied module may be of another stride or dilation than the operation's.
        if not alone or module is not layer.module:
            return how.apply(factors.patches(x, module))
        if x.shape[0] == n:
            return x
        # Images merged into the batch are further positions.
        return how.apply(operation.preprocess_in_data(module, x, None))
    x = how.features_last(x.unsqueeze(-1) if isinstance(module, nn.Embedding) else x)
    return how.apply(operation.prepare_in_data(module, x))


# ----------------------------------------------------------------------------------------- one call


def _arrange_call(
    plan: Plan, layer: Layer, call: Call, count: Count, touched: Touched | None
) -> Arrangement:
    """How one call's tensors are arranged. Changes nothing."""
    module, n = call.module, count.num_examples
    if isinstance(module, nn.Conv2d):
        return _arrange_images(plan, layer, call, n, touched)
    how = frame(plan, layer, call, n)
    sizes = how.sizes
    said = count.positions.get(module)
    if said is not None and said.roles and not _has_mask(how, said):
        return _arrange_rows(plan, layer, call, how, said, touched)
    chosen = by_index(layer.name, call, how, count, plan.layouts)
    if chosen is not None:
        return chosen
    _check_rows_are_known(layer, module, sizes, said, n)
    # Images are batch first, of whatever height.
    if not (how.channel_dims and sizes[0] % n == 0):
        finding = find_layout(layer.name, module, sizes, n, plan.layouts)
        if finding.is_assumed and tuple(sizes) in count.time_major and sizes[0] != sizes[1]:
            finding = replace(finding, layout=SEQUENCE_FIRST, is_assumed=False)
        is_padded = said is not None and bool(said.masks)
        needs_examples = is_padded or plan.strategy_of(layer) != EXPAND
        finding = checked_by_graph(
            layer.name, module, finding, sizes, n, touched, plan.layouts, needs_examples
        )
        how = replace(how, finding=finding)
        _check_no_guess(plan, layer, module, how, count)
    if said is None or not said.masks:
        return how
    return masked(layer.name, call, how, said, touched, plan.layouts)


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


def frame(plan: Plan, layer: Layer, call: Call, num_examples: int) -> Arrangement:
    """A call's leading sizes and what of its tensors are features; the layout is left open."""
    module, x = call.module, call.unmodified_input(layer.name)
    if isinstance(module, nn.Conv2d):
        count = x.shape[0] if x.ndim > 3 else 1
        sizes = torch.Size((count, *call.out_shape[-2:]))
        return Arrangement(Finding(leading=count), num_examples, sizes, 1, 3)
    how = Arrangement(Finding(), num_examples, x.shape, plan.num_feature_dims(layer, module))
    if plan.has_channels_first(module):
        how = replace(how, channel_dims=3 if isinstance(layer.module, nn.BatchNorm2d) else 1)
    return replace(how, sizes=_leading(x.shape, module, how))


def _arrange_images(
    plan: Plan, layer: Layer, call: Call, num_examples: int, touched: Touched | None
) -> Arrangement:
    x, how = call.unmodified_input(layer.name), frame(plan, layer, call, num_examples)
    sizes = x.shape if x.ndim > 3 else torch.Size((1, *x.shape))
    if sizes[0] % num_examples:
        raise LayerError(
            layer.name,
            f"the first of its input's sizes {tuple(sizes)} does not match the {num_examples} "
            "examples of the batch",
        )
    if sizes[0] != num_examples:
        checked_by_graph(
            layer.name,
            call.module,
            how.finding,
            how.sizes[:1],
            num_examples,
            None if touched is None else touched.of_images(),
            plan.layouts,
        )
    return how


def _check_no_guess(
    plan: Plan, layer: Layer, module: nn.Module, how: Arrangement, count: Count
) -> None:
    """Refuse rows of a guessed number of examples where it matters which rows are one example's."""
    rows, n = how.sizes[0], count.num_examples
    if not count.is_guess or len(how.sizes) > 1 or rows == n:
        return
    if plan.strategy_of(layer) == EXPAND or plan.layouts.given(module) is not None:
        return
    raise LayerError(
        layer.name,
        f"it is not known how its {rows} rows and the {rows} logits belong to the {n} examples of "
        "the model's first input",
        f"Say it by a rule in shared_dim: ('{layer.name}', 'batch_first') for {rows // n} "
        f"consecutive rows of each example, ('{layer.name}', 'sequence_first') for {rows // n} "
        "times all examples, as torch.cat makes them of two views of a batch.",
    )


def _has_mask(how: Arrangement, said: Positions) -> bool:
    """Whether a layer of a graph model sees sequences that have a padding mask."""
    sizes = how.sizes
    lengths = {mask.mask.shape[1] for mask in said.masks.values()}
    return len(sizes) > 1 and sizes[0] == how.num_examples and sizes[1] in lengths


def _arrange_rows(
    plan: Plan,
    layer: Layer,
    call: Call,
    how: Arrangement,
    said: Positions,
    touched: Touched | None,
) -> Arrangement:
    """Rows of segments, or such rows in a dense coat."""
    assert call.in_data is not None
    padded = dense_coat(call, how, said, touched, plan.layouts)
    if padded is not None:
        return padded
    rows, role = find_role(
        layer.name,
        call.module,
        call.index,
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


def _check_masks(calls: Sequence[Arrangement], count: Count) -> None:
    """Raise a ValueError if a mask was given that is of no layer."""
    used = {name for call in calls for name in call.masks}
    unused = {
        name: mask.mask.shape[1]
        for said in count.positions.values()
        for name, mask in said.masks.items()
        if name not in used and not said.is_guessed
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
            if not isinstance(call.ragged, Segments):  # dense after all, or in a dense coat
                n = call.num_examples
                index = torch.arange(n, device=device)
                index = index.repeat_interleave(call.sizes.numel() // n)
                mask = call.ragged.mask.flatten() if isinstance(call.ragged, Mask) else None
                calls[k] = replace(call, ragged=Segments(index, num_examples=n, mask=mask))
            parts.append(calls[k].ragged)
        return Arranged(tuple(calls), Segments.cat(parts))
    for call, device in zip(calls, devices, strict=True):
        if call.ragged is None:
            sizes = call.num_examples, call.sizes.numel() // call.num_examples
            parts.append(Mask(torch.ones(sizes, dtype=torch.bool, device=device)))
        else:
            parts.append(call.ragged)
    return Arranged(tuple(calls), Mask.cat(parts))
