"""The Kronecker factors of one linear layer: time and peak memory over the number of positions and
over the width, here and in the peers, on the same tensors.

    python benchmarks/factors.py            # takes minutes
    python benchmarks/factors.py --quick    # small sizes, to see whether it runs

A layer without a bias sees ``a`` of shape ``(N, R, P)`` and the gradient ``b`` of the summed loss
with respect to its output, of the same shape. Every contender makes A and B of these two tensors by
its own code, for K-FAC-expand and for K-FAC-reduce; that they are the same is checked first. ASDL
itself has neither: it flattens the positions, which is the work of K-FAC-expand with the wrong
scale. SINGD keeps no factors but their products with its preconditioner's, one matrix product more.

Two floors stand beside them. *Read* adds up both tensors: nothing that looks at each number once
can be faster. *Product* is ``xᵀ x`` of both, of all rows for expand, and for reduce of rows that
were averaged beforehand. The exponent is that of the power law fitted to the larger half of the
sizes; "/ read" and "/ product" are of the largest.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _timing import CLOCKS, alternate, in_fresh_process, resident
from asdl import operations as upstream
from curvlinops import KFACLinearOperator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from singd.optim.utils import process_grad_output, process_input
from singd.structures.dense import DenseMatrix
from torch import Tensor, nn

from asdl_ws_plugin.operations import LinearExpand, LinearReduce

__all__ = ["CONTENDERS", "SERIES", "Series", "check_same", "exponent", "main"]

Factors = tuple[Tensor, Tensor]
Make = Callable[[nn.Linear, Tensor, Tensor, str], Callable[[], Factors]]
STRATEGIES = ("expand", "reduce")
FLOORS = ("read", "product")


def by_plugin(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    """Sums over the examples: A of eq. 3.7 or 3.19 and B, times N."""
    operation = {"expand": LinearExpand, "reduce": LinearReduce}[strategy]

    def run() -> Factors:
        in_data = operation.preprocess_in_data(layer, a, b)
        out_grads = operation.preprocess_out_grads(layer, b)
        return operation.cov_kron_A(layer, in_data), operation.cov_kron_B(layer, out_grads)

    return run


def by_upstream(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    """As stock ASDL: every position an example. A lacks 1/R."""
    operation = upstream.Linear

    def run() -> Factors:
        in_data = operation.preprocess_in_data(layer, a, b)
        out_grads = operation.preprocess_out_grads(layer, b)
        return operation.cov_kron_A(layer, in_data), operation.cov_kron_B(layer, out_grads)

    return run


def by_curvlinops(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    """What its hooks compute in the passes, with A divided by N."""
    operator = KFACLinearOperator(
        layer,
        nn.MSELoss(reduction="sum"),
        list(layer.parameters()),
        [(a[:, 0], b[:, 0])],
        kfac_approx=strategy,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    name = next(iter(operator._mapping))

    def run() -> Factors:
        operator._input_covariances, operator._gradient_covariances = {}, {}  # it would add to them
        operator._hook_accumulate_input_covariance(layer, (a,), name)
        operator._accumulate_gradient_covariance(b, layer, name)
        return operator._input_covariances[name], operator._gradient_covariances[name]

    return run


def by_singd(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    """What its hooks compute in the passes, at the start, when its preconditioner is the
    identity.
    """
    K, C = (DenseMatrix.eye(size, dtype=a.dtype) for size in (a.shape[-1], b.shape[-1]))

    def run() -> Factors:
        in_data = process_input(a, layer, strategy)
        out_grads = process_grad_output(b, layer, None, strategy)
        return (
            K.from_inner(X=in_data.T).to_dense(),
            C.from_inner(X=out_grads.T).to_dense(),
        )

    return run


def by_read(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    return lambda: (a.sum(), b.sum())


def by_product(layer: nn.Linear, a: Tensor, b: Tensor, strategy: str) -> Callable[[], Factors]:
    x, y = (a.flatten(0, 1), b.flatten(0, 1)) if strategy == "expand" else (a.mean(1), b.sum(1))
    return lambda: (x.mT @ x, y.mT @ y)


CONTENDERS: dict[str, Make] = {
    "here": by_plugin,
    "curvlinops": by_curvlinops,
    "singd": by_singd,
    "stock ASDL": by_upstream,
    "read": by_read,
    "product": by_product,
}


def names_of(strategy: str) -> list[str]:
    """Stock ASDL does the work of expand alone."""
    return [name for name in CONTENDERS if strategy == "expand" or name != "stock ASDL"]


@dataclass(frozen=True)
class Series:
    """Sizes of which one varies.

    Attributes:
        name: of what varies, ``'R'`` or ``'width'``.
        examples: N.
        positions: R of each size.
        widths: P of each size.
    """

    name: str
    examples: int
    positions: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def varying(self) -> tuple[int, ...]:
        return self.positions if self.name == "R" else self.widths

    def tensors(self, i: int) -> tuple[nn.Linear, Tensor, Tensor]:
        """The layer, its input and its output's gradient, of the i-th size."""
        generator = torch.Generator().manual_seed(i)
        shape = (self.examples, self.positions[i], self.widths[i])
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        return nn.Linear(shape[-1], shape[-1], bias=False), a, b


def over_positions(examples: int, width: int, positions: Sequence[int]) -> Series:
    return Series("R", examples, tuple(positions), (width,) * len(positions))


def over_widths(examples: int, positions: int, widths: Sequence[int]) -> Series:
    return Series("width", examples, (positions,) * len(widths), tuple(widths))


SERIES = (
    over_positions(16, 256, [4**k for k in range(7)]),  # 1 ... 4096
    over_widths(16, 256, [2**k for k in range(6, 11)]),  # 64 ... 1024
)
QUICK = (over_positions(2, 8, [1, 4, 16]), over_widths(2, 4, [8, 16, 32]))


def check_same(series: Series, strategy: str) -> float:
    """Raise an AssertionError unless all contenders' factors are proportional as they should be;
    return the largest relative difference.
    """
    difference = 0.0
    for i, positions in enumerate(series.positions):
        layer, a, b = series.tensors(i)
        A, B = by_plugin(layer, a, b, strategy)()
        for name in names_of(strategy):
            if name in FLOORS:
                continue
            theirs = CONTENDERS[name](layer, a, b, strategy)()
            scale = positions if name == "stock ASDL" else 1 if name == "here" else 1 / len(a)
            for mine, peer in zip((A * scale, B), theirs, strict=True):
                relative = float((mine - peer).norm() / peer.norm())
                assert relative < 1e-4, (
                    f"{name}'s factors differ by {relative:.1e} at R = {positions}, {strategy}"
                )
                difference = max(difference, relative)
    return difference


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the power law through the larger half of the sizes, by least squares of the
    logarithms.
    """
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def measure(
    series: Series,
    strategy: str,
    rounds: int,
    on_step: Callable[[str], None],
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Contender -> seconds, the median at each size."""
    found: dict[str, list[float]] = {name: [] for name in names_of(strategy)}
    for i in range(len(series.positions)):
        layer, a, b = series.tensors(i)
        runs = {name: {"": CONTENDERS[name](layer, a, b, strategy)} for name in found}
        alternate(runs, 1)  # warm up
        for name, times in alternate(runs, rounds, on_step, clock).items():
            found[name].append(statistics.median(times[""]))
    return found


def memory(series: Series, strategy: str, name: str, threads: int) -> list[float]:
    """MiB above what the process held, at each size. To be called in a fresh process: sizes grow,
    so that no earlier peak is above a later one.
    """
    torch.set_num_threads(threads)
    found = []
    CONTENDERS[name](*series.tensors(0), strategy)()  # what is allocated once
    for i in range(len(series.positions)):
        layer, a, b = series.tensors(i)
        run = CONTENDERS[name](layer, a, b, strategy)
        before = resident("VmRSS")
        run()
        found.append((resident("VmHWM") - before) / 2**20)
    return found


def time_table(series: Series, strategy: str, times: dict[str, list[float]]) -> Table:
    fixed = f"P = {series.widths[0]}" if series.name == "R" else f"R = {series.positions[0]}"
    table = Table(title=f"{strategy}: milliseconds, N = {series.examples}, {fixed}")
    table.add_column(series.name)
    for size in series.varying:
        table.add_column(f"{size}", justify="right")
    for header in ("exponent", "/ read", "/ product"):
        table.add_column(header, justify="right")
    for name, values in times.items():
        table.add_row(
            name,
            *(f"{1e3 * value:.3g}" for value in values),
            f"{exponent(series.varying, values):.2f}",
            *(f"{values[-1] / times[floor][-1]:.2f}" for floor in FLOORS),
        )
    return table


def memory_table(series: Series, strategy: str, peaks: dict[str, list[float]]) -> Table:
    """Above the two tensors, of which one has N·R·P numbers."""
    table = Table(title=f"{strategy}: MiB above the two tensors themselves")
    table.add_column(series.name)
    for size in series.varying:
        table.add_column(f"{size}", justify="right")
    one = [4 * series.examples * r * p / 2**20 for r, p in _shapes(series)]
    table.add_row("one tensor", *(f"{value:.1f}" for value in one))
    for name, values in peaks.items():
        table.add_row(name, *(f"{value:.1f}" for value in values))
    return table


def _shapes(series: Series) -> list[tuple[int, int]]:
    return list(zip(series.positions, series.widths, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--rounds", type=int, help="of every contender and size (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="'processor', with one thread, for a machine that others use",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # singd says of its dense structure that products with it are not specialised.
    warnings.filterwarnings("ignore", message=".*naive.*")
    rounds = options.rounds or (2 if options.quick else 7)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(
        f"torch {torch.__version__}, {options.threads} threads, {rounds} rounds, medians of "
        f"{options.clock} time"
    )
    for series in QUICK if options.quick else SERIES:
        for strategy in STRATEGIES:
            names = names_of(strategy)
            console.print(f"{strategy}: the same factors, to {check_same(series, strategy):.0e}")
            with Progress(console=console, transient=True) as progress:
                total = rounds * len(names) * len(series.positions)
                task = progress.add_task(f"{strategy} over {series.name}", total=total)
                times = measure(
                    series,
                    strategy,
                    rounds,
                    lambda _, task=task: progress.advance(task),
                    CLOCKS[options.clock],
                )
            console.print(time_table(series, strategy, times))
            if options.no_memory:
                continue
            with console.status("peak memory"):
                peaks = {
                    name: in_fresh_process(memory, series, strategy, name, options.threads)
                    for name in names
                    if name not in FLOORS
                }
            console.print(memory_table(series, strategy, peaks))


if __name__ == "__main__":
    main()
