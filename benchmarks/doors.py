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
import time
from collections.abc import Callable
from typing import Any

import asdl
import torch
import torch.nn.functional as F
from _timing import alternate, weighted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step_time import DAMPING, EMA_DECAY, Contender, Size, Workload
from torch import nn

import asdl_ws_plugin

INTERVALS = ((1, 10), (5, 20), (10, 100))
KINDS = {
    "reduce, Monte Carlo": ("reduce", "fisher_mc"),
    "reduce, empirical": ("reduce", "fisher_emp"),
    "expand, Monte Carlo": ("expand", "fisher_mc"),
}


def by_preconditioner(workload: Workload, contender: Contender) -> Callable[[str], None]:
    """A function that makes a step of a kind through the front door."""
    config = asdl.PreconditioningConfig(
        damping=DAMPING,
        ema_decay=EMA_DECAY,
        ignore_modules=[nn.LayerNorm],
        curvature_upd_interval=contender.curvature_interval,
        preconditioner_upd_interval=contender.inverse_interval,
    )
    prec = asdl_ws_plugin.Preconditioner(
        workload.model,
        config,
        fisher_type=contender.fisher_type,
        shared_dim=contender.setting,
    )

    def step(kind: str) -> None:
        prec.load_state_dict({"step": contender.step_of(kind)})
        loss = F.cross_entropy(workload.model(workload.x), workload.y)
        if contender.fisher_type == "fisher_emp":
            loss.backward()
            prec.step()
        else:
            prec.backward(loss)
        workload.optimizer.step()
        workload.optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and few rounds")
    parser.add_argument("--rounds", type=int, help="of every kind of step (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("processor", "wall"),
        default="processor",
        help="processor time leaves out what other programs took; right with one thread only",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(threads=options.threads)
    if options.quick:
        size = Size(depth=2, width=48, batch=16, classes=10, threads=options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    clock = time.process_time if options.clock == "processor" else time.perf_counter

    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "plain": {"neither": Workload(size).plain}
    }
    schedules: dict[str, Contender] = {}
    for name, (setting, fisher_type) in KINDS.items():
        for curvature, inverse in INTERVALS:
            contender = Contender(setting, fisher_type, curvature, inverse, target=0.0)
            maker_step = Workload(size).by_plugin(contender)[1]
            door_step = by_preconditioner(Workload(size), contender)
            for door, step in (("maker", maker_step), ("preconditioner", door_step)):
                key = f"{name} {curvature}/{inverse} {door}"
                schedules[key] = contender
                contenders[key] = {kind: functools.partial(step, kind) for kind in contender.kinds}

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
        times = alternate(contenders, rounds, lambda _: progress.advance(task), clock)

    plain = statistics.median(times["plain"]["neither"])
    table = Table(
        title=f"A step, in plain steps of NAdam ({plain * 1e3:.0f} ms): maker / front door"
    )
    table.add_column("")
    for curvature, inverse in INTERVALS:
        table.add_column(f"{curvature}/{inverse}", justify="right")
    for name in KINDS:
        cells = []
        for curvature, inverse in INTERVALS:
            keys = [f"{name} {curvature}/{inverse} {d}" for d in ("maker", "preconditioner")]
            ratios = [weighted(times[key], schedules[key].kinds) / plain for key in keys]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
