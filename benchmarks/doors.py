"""What a step costs by each of the two doors, at three schedules, beside a plain step of NAdam.

    python benchmarks/doors.py            # the ViT of step_time.py; takes minutes
    python benchmarks/doors.py --quick    # a smaller model, to see whether it runs

The gradient maker is called as ASDL's users do (``setup_model_call``, ``setup_loss_call``,
``forward_and_backward``), the ``Preconditioner`` from a loop that calls the model and ``backward``
itself. Kinds of steps alternate between all contenders, and their medians are weighted with how
often the schedule has them, as in ``step_time.py``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _timing import CLOCKS, alternate, weighted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step_time import Contender, Size, Workload

import asdl_ws_plugin

INTERVALS = ((1, 10), (5, 20), (10, 100))
KINDS = {
    "reduce, Monte Carlo": ("reduce", "fisher_mc"),
    "reduce, empirical": ("reduce", "fisher_emp"),
    "expand, Monte Carlo": ("expand", "fisher_mc"),
}
SCHEDULES = {
    (name, intervals): Contender(setting, fisher_type, *intervals, target=0.0)
    for name, (setting, fisher_type) in KINDS.items()
    for intervals in INTERVALS
}
DOORS: dict[str, Callable[[Workload, Contender], Callable[[str], None]]] = {
    "maker": lambda workload, contender: workload.by_plugin(contender)[1],
    "front door": Workload.by_preconditioner,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and few rounds")
    parser.add_argument("--rounds", type=int, help="of every kind of step (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="processor",
        help="'processor', with one thread, for a machine that others use",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(threads=options.threads)
    if options.quick:
        size = Size(depth=2, width=48, batch=16, classes=10, threads=options.threads)
    rounds = options.rounds or (2 if options.quick else 5)

    contenders: dict[Any, dict[str, Callable[[], Any]]] = {
        "plain": {"neither": Workload(size).plain}
    }
    for schedule, contender in SCHEDULES.items():
        for door, step_of in DOORS.items():
            step = step_of(Workload(size), contender)
            contenders[schedule, door] = {
                kind: functools.partial(step, kind) for kind in contender.kinds
            }

    console = Console()
    console.print(
        f"ViT depth {size.depth}, width {size.width}, batch {size.batch}; {size.threads} threads, "
        f"{options.clock} time; torch {torch.__version__}, asdl_ws_plugin "
        f"{asdl_ws_plugin.__version__}; {rounds} rounds"
    )
    with Progress(console=console, transient=True) as progress:
        alternate(contenders, 1)  # warm up
        total = rounds * sum(len(kinds) for kinds in contenders.values())
        task = progress.add_task("timing", total=total)
        times = alternate(
            contenders, rounds, lambda _: progress.advance(task), CLOCKS[options.clock]
        )

    plain = statistics.median(times["plain"]["neither"])
    table = Table(
        title=f"A step, in plain steps of NAdam ({plain * 1e3:.0f} ms): {' / '.join(DOORS)}"
    )
    table.add_column("")
    for curvature, inverse in INTERVALS:
        table.add_column(f"{curvature}/{inverse}", justify="right")
    for name in KINDS:
        cells = []
        for intervals in INTERVALS:
            schedule = name, intervals
            seconds = [weighted(times[schedule, d], SCHEDULES[schedule].kinds) for d in DOORS]
            cells.append(" / ".join(f"{value / plain:.2f}" for value in seconds))
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
