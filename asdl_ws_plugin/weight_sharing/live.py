"""Which calls take part in a step: those that a gradient reaches and that have rows of examples."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from torch import Tensor, nn

from .capture import Call, Layer, Record, reached_nodes

__all__ = ["NO_BATCH", "live_record"]

NO_BATCH = "its input is the same for every example, so there are no examples to average over"
_NO_ROWS = "got no rows"


def live_record(
    record: Record,
    layers: Sequence[Layer],
    outputs: Tensor,
    without_batch: Container[tuple[nn.Module, int]],
) -> Record:
    """The record with the calls that take part alone.

    A call that no gradient reaches, as a detached teacher's is, adds nothing to A. Of a layer whose
    only call is of that kind the call stays, and the layer is reported.

    Args:
        outputs: what gradients are sent back from.
        without_batch: layers' modules with the numbers of the calls whose input is no batch.
    """
    several = [calls for calls in record.calls.values() if len(calls) > 1]
    nodes = {call.edge.node for calls in several for call in calls}
    reached = reached_nodes(outputs, nodes)[0] if nodes and outputs.requires_grad else nodes
    found: dict[nn.Module, list[Call]] = {}
    absent = dict(record.absent)
    for layer in layers:
        calls = record.calls.get(layer.module)
        if calls is None:
            continue
        of_examples = [call for call in calls if (layer.module, call.index) not in without_batch]
        # Segments say it themselves where no example has a row.
        with_rows = [
            call
            for call in of_examples
            if call.module in record.positions or call.in_data is None or call.in_data.numel()
        ]
        if not with_rows:
            absent[layer.module] = _NO_ROWS if of_examples else NO_BATCH
            continue
        live = [call for call in with_rows if call.edge.node in reached]
        found[layer.module] = live if len(calls) > 1 and live else with_rows
    return replace(record, calls=found, absent=absent)
