"""Ground truth for whole models: A and B of every layer at once, from a loop over single examples.

As :mod:`~.by_example`, for models whose layers are too many to be done one after the other. An
example may have padding: its rows that are not real positions are named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oracles.by_example import output_rows_of, perturbed, rows_of

Calls = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass
class Sums:
    """What the examples of one layer add up to, and the largest term that entered.

    Attributes:
        A, B: strategy -> the factor for ``fisher_emp`` with D = N.
        scale_A, scale_B: the size of what was summed, where sums may cancel.
    """

    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale_A(self) -> float:
        return max(float(matrix.abs().max()) for matrix in self.A.values())

    @property
    def scale_B(self) -> float:
        return max(float(matrix.abs().max()) for matrix in self.B.values())


def calls_per_example(
    layers: Mapping[str, Sequence[nn.Module]], summed_loss: Callable[[int], Tensor], n: int
) -> Calls:
    """Layer name -> ``(R_n, P)`` and ``(R_n, Q)`` of each of its calls for example n alone; calls
    without a gradient are left out.

    Args:
        layers: name -> the modules that have the layer's weight.
        summed_loss: the summed loss of example n, computed from it alone.
    """
    modules = {module: name for name, tied in layers.items() for module in tied}
    with perturbed(list(modules)) as seen:
        loss = summed_loss(n)
    grads = torch.autograd.grad(loss, [zero for *_, zero in seen], allow_unused=True)
    found: Calls = {}
    for (module, x, _), grad in zip(seen, grads, strict=True):
        if grad is None:  # a call that does not reach the loss is no position
            continue
        rows = rows_of(module, x).double(), output_rows_of(module, grad).double()
        found.setdefault(modules[module], []).append(rows)
    return found


def without_constants(examples: Sequence[Calls]) -> list[Calls]:
    """The calls whose input is the same for every example are no batch, and add nothing."""

    def is_constant(name: str, k: int) -> bool:
        inputs = [calls[name][k][0] for calls in examples]
        return all(torch.equal(inputs[0], x) for x in inputs[1:])

    kept: list[Calls] = [{} for _ in examples]
    for name in {name: None for calls in examples for name in calls}:
        counts = {len(calls.get(name, ())) for calls in examples}
        drop = {k for k in range(max(counts)) if len(counts) == 1 and is_constant(name, k)}
        for left, other in zip(kept, examples, strict=True):
            rest = [rows for k, rows in enumerate(other.get(name, ())) if k not in drop]
            if rest:
                left[name] = rest
    return kept


def joined(calls: Calls) -> dict[str, tuple[Tensor, Tensor]]:
    """A layer's calls as further positions of one."""
    return {
        name: (torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows]))
        for name, rows in calls.items()
    }


def every_layers_factors(
    layers: Mapping[str, Sequence[nn.Module]],
    summed_loss: Callable[[int], Tensor],
    num_examples: int,
    ragged: bool = False,
) -> dict[str, Sums]:
    """A and B of every layer for ``fisher_emp`` with D = N, under both strategies."""
    examples = [calls_per_example(layers, summed_loss, n) for n in range(num_examples)]
    return factors_of_rows([joined(calls) for calls in without_constants(examples)], ragged)


def joint_factors(
    layers: Mapping[str, Sequence[nn.Module]], summed_loss: Callable[[], Tensor], num_examples: int
) -> dict[str, Sums]:
    """Of examples that depend on each other, as BatchNorm makes them: one pass of the whole batch,
    whose rows lie batch first.
    """
    rows = joined(calls_per_example(layers, lambda _: summed_loss(), 0))
    split = {name: [part.chunk(num_examples) for part in parts] for name, parts in rows.items()}
    examples = [{name: (a[n], b[n]) for name, (a, b) in split.items()} for n in range(num_examples)]
    return factors_of_rows(examples)


def factors_of_rows(
    examples: Sequence[Mapping[str, tuple[Tensor, Tensor]]], ragged: bool = False
) -> dict[str, Sums]:
    """The table of the factors, from every example's inputs and output gradients of every layer.

    Args:
        ragged: A of expand is normalised by the mean R_n of the batch (section 3.4 of the thesis),
            not example by example. The same where all R_n are equal.
    """
    sums, num_examples = {}, len(examples)
    for name in {name: None for rows in examples for name in rows}:
        parts = [rows[name] for rows in examples if name in rows]
        if ragged:
            mean_R = sum(len(a) for a, _ in parts) / num_examples
            A = [a.mT @ a / mean_R for a, _ in parts]
        else:
            A = [a.mT @ a / len(a) for a, _ in parts]
        sums[name] = Sums(
            A={
                "expand": _mean(A, num_examples),
                "reduce": _mean([_square(a.mean(0)) for a, _ in parts if len(a)], num_examples),
            },
            B={
                "expand": _mean([b.mT @ b for _, b in parts], num_examples),
                "reduce": _mean([_square(b.sum(0)) for _, b in parts], num_examples),
            },
        )
    return sums


def _mean(matrices: Sequence[Tensor], num_examples: int) -> Tensor:
    """Over all examples: some may have no rows."""
    return torch.stack(list(matrices)).sum(0) / num_examples


def _square(vector: Tensor) -> Tensor:
    return torch.outer(vector, vector)


def worst_layer(
    maker_layers: Mapping[str, nn.Module],
    expected: Mapping[str, Sums],
    strategy: str,
    scale_B: float = 1.0,
) -> tuple[float, str]:
    """The largest error of a factor, of the size of what it is a sum of, and where it is.

    Args:
        scale_B: D/T, where B is of a loss that averages over T terms.
    """
    worst = (0.0, "")
    for name, module in maker_layers.items():
        want = expected[name]
        for which, found, matrix, scale in (
            ("A", module.fisher.kron.A, want.A[strategy], want.scale_A),
            ("B", module.fisher.kron.B / scale_B, want.B[strategy], want.scale_B),
        ):
            assert scale > 0, f"{which} of '{name}' is zero, which tests nothing"
            error = float((found.double() - matrix).abs().max()) / scale
            worst = max(worst, (error, f"{which} of '{name}'"))
    return worst
