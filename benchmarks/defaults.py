"""Does the preset train better than the optimizer alone, on whatever a newcomer has?

A dozen ordinary models, three learning rates that people use, three seeds, nothing else tuned:
each optimizer alone, and behind ``asdl.KfacGradientMaker(model, asdl_ws_plugin.recommended(),
shared_dim="auto")``. A run's result is its mean training loss over the last tenth of its steps, on
batches that are new (or, for graphs of one batch, the same) on every step.

    python benchmarks/defaults.py            # all; resumes where it stopped
    python benchmarks/defaults.py --quick    # a few steps of each, to see that all works
    python benchmarks/defaults.py --peers    # instead: SOAP and Muon beside NAdamW and the preset

With ``--peers`` every contender has the same three learning rates, one of them higher than
above, and the table shows the best of them. torch's Muon is for matrices alone, so models of
convolutions are left out there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import asdl
import torch
from _ordinary_models import TASKS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import asdl_ws_plugin

Optimizers = list[torch.optim.Optimizer]
_NADAMW = functools.partial(torch.optim.NAdam, weight_decay=0.01, decoupled_weight_decay=True)


def soap(model: nn.Module, lr: float) -> Optimizers:
    """pytorch_optimizer's, with the settings of its authors but for the learning rate."""
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.01, precondition_frequency=10)]


def muon(model: nn.Module, lr: float) -> Optimizers:
    """torch's Muon for the matrices inside of the network; NAdamW, at the same rate (the updates'
    sizes are matched), for embeddings, the last layer and vectors.
    """
    matrices = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    outer = [m for m in matrices if isinstance(m, nn.Embedding)] + matrices[-1:]
    excluded = {module.weight for module in outer}
    inner = [p for p in model.parameters() if p.ndim == 2 and p not in excluded]
    rest = [p for p in model.parameters() if not any(p is q for q in inner)]
    matched = torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [matched, _NADAMW(rest, lr=lr)]


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizers]] = {
    "NAdamW": lambda model, lr: [_NADAMW(model.parameters(), lr=lr)],
    "AdamW": lambda model, lr: [torch.optim.AdamW(model.parameters(), lr=lr)],
    "SGD": lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)],
    "SOAP": soap,
    "Muon": muon,
}
RATES = {"NAdamW": (3e-4, 1e-3, 3e-3), "AdamW": (3e-4, 1e-3, 3e-3), "SGD": (1e-2, 3e-2, 1e-1)}
# With --peers: an optimizer, and what is in front of it.
PEERS = {
    "NAdamW": ("NAdamW", "plain"),
    "SOAP": ("SOAP", "plain"),
    "Muon": ("Muon", "plain"),
    "preset, NAdamW": ("NAdamW", "recommended"),
    "preset, second moment": ("NAdamW", '{"second_moment": 0.95}'),
}
PEERS_RATES = (1e-3, 3e-3, 1e-2)
# A loss that is not finite, or that a failed step ends, is this one.
DIVERGED = 1e3

Key = tuple[str, str, float, int, str]


def train(
    name: str, optimizer_name: str, rate: float, seed: int, preset: str, steps: int | None
) -> dict[str, Any]:
    """One run: losses of all steps, and seconds."""
    torch.manual_seed(seed)
    task = TASKS[name]()
    optimizers = OPTIMIZERS[optimizer_name](task.model, rate)
    maker: Any = asdl.GradientMaker(task.model)
    if preset != "plain":
        options = json.loads(preset) if preset.startswith("{") else {}
        config = asdl_ws_plugin.recommended(**options)
        maker = asdl.KfacGradientMaker(task.model, config, shared_dim="auto", seed=seed)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps or task.steps):
        args, kwargs, loss_of = task.batch(torch.Generator().manual_seed(1000 * seed + step))
        task.model.zero_grad()
        output = maker.setup_model_call(task.model, *args, **kwargs)
        maker.setup_logits_repr(task.logits(output))
        maker.setup_loss_call(loss_of, task.logits(output))
        try:
            _, loss = maker.forward_and_backward()
        except (FloatingPointError, torch.linalg.LinAlgError):
            losses.append(DIVERGED)
            break
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            losses[-1] = DIVERGED
            break
        for optimizer in optimizers:
            optimizer.step()
    return {"losses": losses, "seconds": time.perf_counter() - start}


def keys(options: argparse.Namespace) -> Iterable[Key]:
    """Contenders alternate, so that a look at an unfinished file compares like with like."""
    if options.peers:
        for seed, name, rate in itertools.product(
            range(options.seeds), options.models, PEERS_RATES
        ):
            for optimizer, preset in PEERS.values():
                yield name, optimizer, rate, seed, preset
        return
    for optimizer in options.optimizers:
        for seed in range(options.seeds):
            for name in options.models:
                for rate in RATES[optimizer]:
                    for preset in ("plain", options.preset):
                        yield name, optimizer, rate, seed, preset


def final(losses: list[float]) -> float:
    """The mean loss over the last tenth of the steps."""
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def tables(runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> tuple[list[Table], int]:
    """One table an optimizer, and how many of the promises are not kept."""
    broken = 0
    found = []
    for optimizer in options.optimizers:
        table = Table(title=f"{optimizer}: final training loss, alone / with the preset")
        table.add_column("")
        for rate in RATES[optimizer]:
            table.add_column(f"lr {rate:g}", justify="right")
        table.add_column("best rate", justify="right")
        table.add_column("time", justify="right")
        for name in options.models:
            means: dict[tuple[float, str], float] = {}
            seconds = dict.fromkeys(("plain", options.preset), 0.0)
            for rate, preset in itertools.product(RATES[optimizer], seconds):
                group = [
                    runs[_text((name, optimizer, rate, seed, preset))]
                    for seed in range(options.seeds)
                    if _text((name, optimizer, rate, seed, preset)) in runs
                ]
                if group:
                    means[rate, preset] = statistics.mean(final(run["losses"]) for run in group)
                    seconds[preset] += sum(run["seconds"] for run in group)
            cells = []
            pairs = [
                (means.get((rate, "plain")), means.get((rate, options.preset)))
                for rate in RATES[optimizer]
            ]
            done = [(a, b) for a, b in pairs if a is not None and b is not None]
            for a, b in pairs:
                cells.append(_cell(a, b))
                broken += a is not None and b is not None and b > a
            best = (min(a for a, _ in done), min(b for _, b in done)) if done else (None, None)
            broken += bool(done) and best[1] >= best[0]
            ratio = seconds[options.preset] / seconds["plain"] if seconds["plain"] else math.nan
            table.add_row(name, *cells, _cell(*best), f"{ratio:.2f}x")
        found.append(table)
    return found, broken


def peers_table(runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> Table:
    """Each contender's loss at the best of its rates, the mean of the seeds that all have."""
    table = Table(title=f"Final training loss at the best of lr {PEERS_RATES}")
    for column in ("", *PEERS):
        table.add_column(column, justify="right" if column else "left")
    for name in options.models:
        seeds = [
            seed
            for seed in range(options.seeds)
            if all(
                _text((name, peer[0], rate, seed, peer[1])) in runs
                for peer, rate in itertools.product(PEERS.values(), PEERS_RATES)
            )
        ]
        if not seeds:
            table.add_row(name, *("-" for _ in PEERS))
            continue
        losses = [
            min(
                statistics.mean(
                    final(runs[_text((name, optimizer, rate, seed, preset))]["losses"])
                    for seed in seeds
                )
                for rate in PEERS_RATES
            )
            for optimizer, preset in PEERS.values()
        ]
        cells = [f"{_number(x)}" if x > min(losses) else f"[green]{_number(x)}[/]" for x in losses]
        table.add_row(name, *cells)
    return table


def _cell(plain: float | None, preset: float | None) -> str:
    if plain is None or preset is None:
        return "-"
    colour = "green" if preset <= plain else "red"
    return f"{_number(plain)} / [{colour}]{_number(preset)}[/]"


def _number(loss: float) -> str:
    return "diverged" if loss >= DIVERGED / 100 else f"{loss:.3g}"


def _text(key: Key) -> str:
    return "|".join(map(str, key))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--preset", default="recommended", help="options in the place of its own, as JSON"
    )
    parser.add_argument("--out", type=Path, default=Path("out/defaults.json"))
    parser.add_argument("--peers", action="store_true", help="SOAP, Muon, NAdamW and the preset")
    parser.add_argument("--quick", action="store_true", help="3 steps of each, one seed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = 1
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="asdl")
    if options.peers:
        options.models = [name for name in options.models if name != "ResNet-18"]
    runs: dict[str, dict[str, Any]] = {}
    if options.out.exists() and not options.quick:
        runs = json.loads(options.out.read_text())
    todo = [key for key in keys(options) if _text(key) not in runs]
    console = Console(width=None if sys.stdout.isatty() else 140)
    for key in track(todo, "Training", console=console):
        runs[_text(key)] = train(*key, steps=3 if options.quick else None)
        if not options.quick:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps(runs))
            os.replace(part, options.out)
    if options.peers:
        console.print(peers_table(runs, options))
        return 0
    found, broken = tables(runs, options)
    for table in found:
        console.print(table)
    console.print(
        "With the preset every loss is at most, and at its best rate below, the optimizer's alone."
        if not broken
        else f"{broken} of the comparisons above are lost."
    )
    return broken


if __name__ == "__main__":
    main()
