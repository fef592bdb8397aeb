"""The ragged reduction: how long summing, and averaging, the rows of each graph takes.

    python benchmarks/segments.py

A batch of 100,000 rows of width 256 (102 MB in float32) that belong to graphs of 5 to 45 rows each,
sorted by graph as PyTorch Geometric has them or shuffled, beside one pass over the same data,
``x.sum(0)``. Both backends, and the growth in the number of rows. Contenders are alternated; the
fastest of several runs counts, as a busy machine only adds time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import seconds

import asdl_ws_plugin
from asdl_ws_plugin import Segments

LIMIT = 1.5  # of one pass over the data
BACKENDS = ["torch"] + ["torch_scatter"] * (importlib.util.find_spec("torch_scatter") is not None)


def rows_of_graphs(num_rows: int, is_sorted: bool, device: torch.device) -> Segments:
    """Graphs of 5 to 45 rows, 25 on average, as molecules have atoms or bonds."""
    sizes = torch.randint(5, 46, (num_rows // 25 + 1000,))
    index = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[:num_rows]
    if not is_sorted:
        index = index[torch.randperm(num_rows)]
    return Segments(index.to(device))


def fastest(contenders: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Milliseconds of each, alternated."""
    samples: dict[Any, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            samples[name].append(1e3 * seconds(contender))
    return {name: min(values) for name, values in samples.items()}


def contenders(x: Tensor) -> dict[Any, Callable[[], Any]]:
    """The pass over the data, and (backend, order, reduction) -> the reduction."""
    found: dict[Any, Callable[[], Any]] = {"one pass": lambda: x.sum(0)}
    for is_sorted in (True, False):
        rows = rows_of_graphs(len(x), is_sorted, x.device)
        for backend in BACKENDS:
            for reduction in ("sum", "mean"):

                def run(
                    rows: Segments = rows, backend: str = backend, reduction: str = reduction
                ) -> Tensor:
                    previous = asdl_ws_plugin.set_backend(backend)
                    try:
                        return getattr(rows, reduction)(x)
                    finally:
                        asdl_ws_plugin.set_backend(previous)

                found[backend, "sorted" if is_sorted else "shuffled", reduction] = run
    return found


def main(arguments: list[str] | None = None) -> dict[Any, float]:
    """Print the tables; returns the ratios to one pass over the data of the first size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    sizes = [options.rows, 2 * options.rows, 4 * options.rows]
    results = {}
    for num_rows in sizes:
        x = torch.randn(num_rows, options.width, device=options.device)
        results[num_rows] = fastest(contenders(x), options.repeats)
    table = Table(
        title=f"Milliseconds, width {options.width}, {options.threads} threads, {options.device}"
    )
    for header in (
        "backend",
        "rows are",
        "reduction",
        *(f"{n:,} rows" for n in sizes),
        "to one pass",
        "growth",
    ):
        table.add_column(
            header, justify="left" if header in ("backend", "rows are", "reduction") else "right"
        )
    first, ratios = results[sizes[0]], {}
    for name, value in first.items():
        labels = (name, "", "") if isinstance(name, str) else name
        ratios[name] = value / first["one pass"]
        growth = results[sizes[-1]][name] / value / (sizes[-1] / sizes[0])
        color = "" if isinstance(name, str) else "[green]" if ratios[name] <= LIMIT else "[red]"
        times = (f"{results[n][name]:.2f}" for n in sizes)
        table.add_row(*labels, *times, f"{color}{ratios[name]:.2f}", f"{growth:.2f}")
    console.print(table)
    console.print(
        f"Allowed: {LIMIT} of one pass. Growth is that of the time over that of the rows: 1 is "
        "linear. The order of shuffled rows is found once for a batch, and is not measured here."
    )
    return ratios


if __name__ == "__main__":
    main()
