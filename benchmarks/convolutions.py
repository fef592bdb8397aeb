"""What the preset costs on a convolutional network whose factors are wide: ResNet-18, by the size
of its batch.

    python benchmarks/convolutions.py            # takes minutes
    python benchmarks/convolutions.py --quick    # tiny images, to see whether it runs

Products of the gradient with the inverses of A and B cost the same whatever the batch is, so the
fewer positions a batch has, the more they weigh. Kinds of steps alternate between the contenders,
and their medians are weighted with how often the schedule has them, as in ``step_time.py``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _timing import CLOCKS, alternate, weighted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step_time import Contender

import asdl_ws_plugin

asdl_ws_plugin.mend_torchvision()

# images of a batch, and pixels of a side
BATCHES = ((16, 24), (32, 32), (128, 32), (16, 96))
SCHEDULES = tuple(
    Contender("auto", "fisher_mc", *pair, target=1.5) for pair in ((5, 20), (10, 100))
)


class ResNet:
    """The model, its optimizer and a batch of it, and the step functions of the contenders."""

    def __init__(self, images: int, pixels: int) -> None:
        from torchvision.models import resnet18

        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x = torch.randn(images, 3, pixels, pixels)
        self.y = torch.randint(10, (images,))

    def plain(self) -> None:
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def by_preset(self, schedule: Contender) -> Callable[[str], None]:
        """A function that makes a step of a kind with the preset at the schedule's intervals."""
        config = asdl_ws_plugin.recommended(
            curvature_upd_interval=schedule.curvature_interval,
            preconditioner_upd_interval=schedule.inverse_interval,
            early_updates=0,  # the schedule holds from the first step on
        )
        prec = asdl_ws_plugin.Preconditioner(self.model, config)

        def step(kind: str) -> None:
            prec.load_state_dict({"step": schedule.step_of(kind)})
            prec.backward(F.cross_entropy(self.model(self.x), self.y))
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny images, two rounds")
    parser.add_argument("--rounds", type=int, help="of every kind of step (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    console = Console()
    table = Table(
        title=f"ResNet-18: a step with the preset, in plain steps of AdamW (threads: "
        f"{options.threads}, {options.clock} time, torch {torch.__version__}, {rounds} rounds)"
    )
    for column in ("images", "pixels", "plain, ms", "new inverses", "new curvature", "neither"):
        table.add_column(column, justify="right")
    for schedule in SCHEDULES:
        table.add_column(
            f"{schedule.curvature_interval}/{schedule.inverse_interval}", justify="right"
        )
    for images, pixels in ((2, 24),) if options.quick else BATCHES:
        table.add_row(
            str(images), f"{pixels} x {pixels}", *measure(images, pixels, rounds, options)
        )
    console.print(table)


def measure(images: int, pixels: int, rounds: int, options: argparse.Namespace) -> list[str]:
    """The row of a batch: milliseconds of a plain step, the kinds of steps, and the schedules."""
    contenders: dict[Any, dict[str, Callable[[], Any]]] = {
        "plain": {"neither": ResNet(images, pixels).plain}
    }
    for schedule in SCHEDULES:
        step = ResNet(images, pixels).by_preset(schedule)
        contenders[schedule] = {kind: functools.partial(step, kind) for kind in schedule.kinds}
    with Progress(transient=True) as progress:
        alternate(contenders, 1)  # warm up
        total = rounds * sum(len(kinds) for kinds in contenders.values())
        task = progress.add_task(f"{images} images of {pixels} pixels", total=total)
        times = alternate(
            contenders, rounds, lambda _: progress.advance(task), CLOCKS[options.clock]
        )
    plain = statistics.median(times["plain"]["neither"])
    kinds = [
        statistics.median(times[SCHEDULES[0]][kind]) / plain
        for kind in ("inverse", "curvature", "neither")
    ]
    steps = [weighted(times[schedule], schedule.kinds) / plain for schedule in SCHEDULES]
    return [f"{plain * 1e3:.0f}", *(f"{ratio:.2f}" for ratio in (*kinds, *steps))]


if __name__ == "__main__":
    main()
