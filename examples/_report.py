"""What the examples share: progress bars, the table at the end, and the figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

__all__ = [
    "Run",
    "Stopwatch",
    "compare",
    "console",
    "figure",
    "progress_bars",
    "pyplot",
    "save",
    "table",
]


def console() -> Console:
    """A console that is wide enough for the table where the output is a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing into files whether or not there is a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(drawing: Any, path: Path, suffixes: Sequence[str] = (".png", ".pdf")) -> None:
    """Save a figure once for every suffix, make its folder if need be, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        drawing.savefig(path.with_suffix(suffix), dpi=150)
    pyplot().close(drawing)


def compare(
    results: dict[str, list[float]],
    x: Sequence[float],
    path: Path,
    title: str,
    labels: tuple[str, str],
    form: str = ".2%",
) -> Table:
    """A table and a figure of several curves: name -> a value for each of ``x``.

    ``labels`` are those of the axes. Returns the table; the figure is saved to ``path``.
    """
    result = Table(title=title, caption=f"{labels[1]}; figure: {path}.png, .pdf")
    for header in (labels[0], *results):
        result.add_column(header, justify="right")
    for value, row in zip(x, zip(*results.values(), strict=True), strict=True):
        result.add_row(f"{value:g}", *(f"{cell:{form}}" for cell in row))
    drawing, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for name, values in results.items():
        axes.plot(x, values, "o-", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title, xticks=x)
    axes.grid(alpha=0.3)
    axes.legend()
    save(drawing, path)
    return result


class Stopwatch:
    """Adds up the time between :meth:`start` and :meth:`stop`; evaluation is left out that way."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.laps: list[float] = []
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.laps.append(time.perf_counter() - self._since)
        self.seconds += self.laps[-1]


@dataclass
class Run:
    """How one optimizer did: a metric, evaluated after some of the steps.

    Attributes:
        name: of the optimizer.
        steps, seconds, values: one entry for each evaluation; seconds are those of training only.
        laps: seconds of every single step.
        final: further columns of the table, header -> text.
        lower_is_better: whether the metric should fall, as a loss, and not grow, as an accuracy.
    """

    name: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    laps: list[float] = field(default_factory=list)
    final: dict[str, str] = field(default_factory=dict)
    lower_is_better: bool = False

    def record(self, step: int, seconds: float, value: float) -> None:
        self.steps.append(step)
        self.seconds.append(seconds)
        self.values.append(value)

    def reached(self, target: float) -> tuple[int, float] | None:
        """Step and seconds of the first evaluation that reached the target; ``None`` if none
        did.
        """
        for step, seconds, value in zip(self.steps, self.seconds, self.values, strict=True):
            if value <= target if self.lower_is_better else value >= target:
                return step, seconds
        return None


def progress_bars(console: Console, metric: str, form: str = ".2%") -> Progress:
    """Progress bars with a column for the metric: ``add_task(name, total=steps, value=0.0)``,
    ``update(..., value=)``.

    ``form`` is the metric's format, here and below.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{metric} {{task.fields[value]:{form}}}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def table(runs: Sequence[Run], title: str, metric: str, target: float, form: str = ".2%") -> Table:
    """Steps and seconds to the target, the last value and milliseconds a step for every run."""
    result = Table(title=title)
    result.add_column("")
    goal = f"{target:{form}}"
    for header in (
        f"steps to {goal}",
        f"seconds to {goal}",
        f"final {metric}",
        *runs[0].final,
        "ms per step",
    ):
        result.add_column(header, justify="right")
    for run in runs:
        reached = run.reached(target)
        steps, seconds = (f"{reached[0]}", f"{reached[1]:.1f}") if reached else ("not reached", "")
        milliseconds = f"{1e3 * statistics.mean(run.laps):.1f}" if run.laps else ""
        result.add_row(
            run.name, steps, seconds, f"{run.values[-1]:{form}}", *run.final.values(), milliseconds
        )
    return result


def figure(
    runs: Sequence[Run],
    path: Path,
    title: str,
    metric: str,
    target: float,
    lowest: float = 0.0,
    highest: float = 1.005,
    form: str = ".2%",
) -> None:
    """Draw the metric over steps and over seconds, with the target, and save it to ``path``."""
    drawing, panels = pyplot().subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    labels = ("training step", "training time (s)")
    for panel, label, attribute in zip(panels, labels, ("steps", "seconds"), strict=True):
        for run in runs:
            (line,) = panel.plot(getattr(run, attribute), run.values, label=run.name)
            reached = run.reached(target)
            if reached:
                panel.plot(
                    reached[attribute == "seconds"], target, "o", color=line.get_color(), zorder=3
                )
        panel.axhline(
            target, color="0.5", linewidth=0.8, linestyle="--", label=f"target {target:{form}}"
        )
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(lowest, highest)
    panels[0].set_ylabel(metric)
    drawing.suptitle(title)
    panels[0].legend(loc="upper right" if runs[0].lower_is_better else "lower right")
    save(drawing, path, [path.suffix])
