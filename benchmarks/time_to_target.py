"""Seconds and steps until a network is as good as it should be: K-FAC beside the optimizers that a
PyTorch user can install.

    python benchmarks/time_to_target.py vit                # or molecules, translation, gpt
    python benchmarks/time_to_target.py vit --budget tiny  # seconds, to see whether it runs

Each command does all of it, and goes on where it was interrupted:

1. The search: every contender gets the same number of trials on seed 0. Four and fewer differ in
   the learning rate alone; more are points of a Sobol sequence over learning rate, weight decay,
   betas and warm-up (K-FAC: its damping in place of beta1).
2. The target is what NAdamW, at the trial that ended best, had reached after 75 % of its steps. It
   is written down once and never moves. Every contender then takes the trial that needed the fewest
   steps to it.
3. The final runs, on seeds that were not searched on.

Contenders alternate in slices of the steps between two evaluations, in an order that is reversed
every time: a machine that others use slows all of them. The times are those of training alone. Of
the two in the table, the ratio of processor seconds is the steadier on such a machine. JSON lines,
table and figure are in ``out/time_to_target``.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _contenders import BASELINE, CONTENDERS
from _race import Record, Store, milliseconds, race
from _workloads import WORKLOADS, Workload
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import _report

import asdl_ws_plugin

__all__ = ["compare", "experiment_of", "machine", "main", "show", "target_of"]

WHEN = 0.75  # share of NAdamW's steps after which it sets the target


@dataclass(frozen=True)
class Budget:
    """How much is run: trials for each contender, and how many seeds at the end."""

    trials: int
    seeds: int


NOTES = (
    "/ NAdamW: as a multiple of NAdamW's; CPU: processor seconds; ms: of a step, the median over "
    "the slices. *: at the lowest or highest learning rate tried. †: not run side by side with "
    "NAdamW."
)
BUDGETS = {
    "tiny": Budget(2, 1),
    "small": Budget(3, 1),
    "demo": Budget(3, 2),
    "full": Budget(20, 3),
}


def best_of(records: Sequence[Record], lower_is_better: bool) -> Record:
    """The run with the best last value, of those that came to their end."""
    return min(
        records,
        key=lambda r: (bool(r.failed), r.values[-1] if lower_is_better else -r.values[-1]),
    )


def target_of(search: Sequence[Record], workload: Workload) -> float:
    """What the tuned NAdamW reaches at 75 % of its budget: its best value until then."""
    baseline = best_of([r for r in search if r.contender == BASELINE], workload.lower_is_better)
    values = [
        value
        for step, value in zip(baseline.steps, baseline.values, strict=True)
        if step <= WHEN * workload.length.steps
    ]
    return min(values) if workload.lower_is_better else max(values)


def chosen(search: Sequence[Record], name: str, target: float, workload: Workload) -> Record:
    """The trial with the fewest steps to the target, of those that came to their end; among equals
    the one that ends best.
    """

    def rank(record: Record) -> tuple[bool, float, float]:
        reached = record.reached(target, workload.lower_is_better)
        last = record.values[-1] if workload.lower_is_better else -record.values[-1]
        steps = math.inf if reached is None else record.steps[reached]
        return bool(record.failed), steps, last

    return min((r for r in search if r.contender == name), key=rank)


def is_on_the_edge(search: Sequence[Record], record: Record) -> bool:
    """Whether a lower or higher learning rate than those tried might be better still."""
    rates = [r.settings["lr"] for r in search if r.contender == record.contender]
    return len(rates) > 1 and record.settings["lr"] in (min(rates), max(rates))


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):{form}}"
    several = len(values) > 1 and all(math.isfinite(value) for value in values)
    return f"{text} ± {statistics.stdev(values):{form}}" if several else text


HEADERS = ["lr", "reached", "steps", "/ NAdamW", "seconds", "/ NAdamW", "CPU / NAdamW", "final"]
HEADERS += ["ms", "CPU ms"]


def results(
    final: Sequence[Record], search: Sequence[Record], target: float, workload: Workload
) -> Table:
    """One row for each contender, the fewest steps first: steps and seconds to the target, and as
    multiples of NAdamW's.
    """
    by_name: dict[str, list[Record]] = {}
    for record in final:
        by_name.setdefault(record.contender, []).append(record)
    found = {name: measures(records, target, workload) for name, records in by_name.items()}
    base = found[BASELINE]
    table = Table(title=f"{workload.title}: {workload.metric} of {target:{workload.form}}")
    table.add_column("", no_wrap=True)
    for header in HEADERS:
        table.add_column(header, justify="right")

    def steps_of(name: str) -> tuple[bool, float]:
        steps = found[name]["steps"]
        return len(steps) < len(by_name[name]), statistics.fmean(steps or [math.inf])

    for name in sorted(by_name, key=steps_of):
        records, mine = by_name[name], found[name]
        edge = "*" if is_on_the_edge(search, records[0]) else ""
        late = "" if BASELINE in records[0].company else "†"
        failed = next((f" ({r.failed})" for r in records if r.failed), "")
        table.add_row(
            name,
            f"{records[0].settings['lr']:.2g}{edge}",
            f"{len(mine['steps'])} of {len(records)}",
            spread(mine["steps"], ".0f"),
            ratio(mine["steps"], base["steps"]),
            spread(mine["seconds"], ".1f"),
            ratio(mine["seconds"], base["seconds"]) + late,
            ratio(mine["processor"], base["processor"]),
            spread([r.values[-1] for r in records], workload.form) + failed,
            f"{milliseconds(records, 'seconds'):.0f}",
            f"{milliseconds(records, 'processor'):.0f}",
        )
    return table


def ratio(mine: Sequence[float], base: Sequence[float]) -> str:
    """Of the means; a dash where one has none, or the baseline's is zero."""
    if not mine or not any(base):
        return "-"
    return f"{statistics.fmean(mine) / statistics.fmean(base):.2f}"


def measures(
    records: Sequence[Record], target: float, workload: Workload
) -> dict[str, list[float]]:
    """Steps, wall-clock and processor seconds to the target, of the runs that reached it."""
    found: dict[str, list[float]] = {"steps": [], "seconds": [], "processor": []}
    for record in records:
        i = record.reached(target, workload.lower_is_better)
        if i is not None:
            for what in found:
                found[what].append(getattr(record, what)[i])
    return found


def draw(final: Sequence[Record], target: float, workload: Workload, path: Path) -> None:
    """The metric over steps and over seconds, means over the seeds: NAdamW, the peers, and of
    K-FAC's contenders the two that end best.
    """
    names = list(dict.fromkeys(r.contender for r in final if not r.failed))
    ours = [name for name in names if CONTENDERS[name].is_ours]
    ends = {n: statistics.fmean(r.values[-1] for r in final if r.contender == n) for n in names}
    ours.sort(key=lambda name: ends[name], reverse=not workload.lower_is_better)
    runs = []
    for name in [n for n in names if not CONTENDERS[n].is_ours] + ours[:2]:
        records = [r for r in final if r.contender == name and not r.failed]
        run = _report.Run(name, lower_is_better=workload.lower_is_better)
        run.steps = records[0].steps
        run.seconds = [statistics.fmean(t) for t in zip(*(r.seconds for r in records), strict=True)]
        run.values = [statistics.fmean(v) for v in zip(*(r.values for r in records), strict=True)]
        runs.append(run)
    reach = max(abs(run.values[-1] - target) for run in runs)
    span = max(2 * reach, 0.15 * abs(target))
    _report.figure(
        runs,
        path,
        workload.title,
        workload.metric,
        target,
        target - span,
        target + span if workload.lower_is_better else min(1.0, target + span),
        workload.form,
    )


def show(
    final: Sequence[Record],
    search: Sequence[Record],
    target: float,
    workload: Workload,
    store: Store,
    console: Console,
) -> None:
    """Print the table and draw the figure beside the records."""
    console.print(results(final, search, target, workload))
    console.print(NOTES)
    figure = store.path.with_suffix(".png")
    draw(final, target, workload, figure)
    console.print(f"Runs: {store.path}; figure: {figure}")


def experiment_of(workload: Workload) -> str:
    return f"{type(workload).__name__} {workload.size}, torch {torch.__version__}"


def machine(budget: str, threads: int) -> str:
    return (
        f"{platform.machine()}, {threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, asdl_ws_plugin {asdl_ws_plugin.__version__}, budget {budget}"
    )


def compare(
    workload: Workload, names: Sequence[str], budget: Budget, store: Store, console: Console
) -> tuple[list[Record], list[Record], float]:
    """Search, target, final runs: the final records, the search's, and the target."""
    with _report.progress_bars(console, workload.metric, workload.form) as progress:
        for i in range(budget.trials):
            trials = [
                Record(name, CONTENDERS[name].trials(workload, budget.trials)[i], 0, "search")
                for name in names
            ]
            race(workload, trials, store, progress)
        search = store.records("search")
        target = store.target()
        if target is None:
            target = target_of(search, workload)
            store.append({"target": target})
        best = {name: chosen(search, name, target, workload).settings for name in names}
        wanted = set()
        for seed in range(1, budget.seeds + 1):
            runs = [Record(name, best[name], seed, "final") for name in names]
            wanted |= {record.key for record in runs}
            race(workload, runs, store, progress)
    return [r for r in store.records("final") if r.key in wanted], search, target


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--budget", choices=list(BUDGETS), default="full")
    parser.add_argument(
        "--only", nargs="*", choices=list(CONTENDERS), help="these contenders, and NAdamW"
    )
    parser.add_argument("--seeds", type=int, help="seeds of the final runs")
    parser.add_argument("--trials", type=int, help="trials of the search for each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/time_to_target"))
    options = parser.parse_args(arguments)
    sizes = WORKLOADS[options.workload].sizes
    if options.budget not in sizes:
        parser.error(f"{options.workload} has no size {options.budget}; it has {', '.join(sizes)}")
    return options


def main(arguments: list[str] | None = None) -> list[Record]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    budget = BUDGETS[options.budget]
    budget = Budget(options.trials or budget.trials, options.seeds or budget.seeds)
    names = [n for n in CONTENDERS if n == BASELINE or options.only is None or n in options.only]
    workload: Workload = WORKLOADS[options.workload](options.budget)
    console = _report.console()
    console.print(machine(options.budget, options.threads))
    # Files of another budget, search or number of threads are files of another experiment.
    stem = f"{options.workload}-{options.budget}-{budget.trials}-{options.threads}"
    store = Store(options.out / f"{stem}.jsonl", experiment_of(workload))
    final, search, target = compare(workload, names, budget, store, console)
    show(final, search, target, workload, store, console)
    return final


if __name__ == "__main__":
    main()
