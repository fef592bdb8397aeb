"""What a K-FAC step costs: the plugin beside the same arithmetic written by hand, stock ASDL, and
plain NAdam.

    python benchmarks/step_time.py            # takes minutes
    python benchmarks/step_time.py --quick    # a smaller model, to see whether it runs

A timm ViT (depth 6, width 192, 64 tokens, 100 classes, batches of 128) is trained by NAdam,
LayerNorms ignored, with the curvature updated on every step and the inverses on every tenth
("10/100": every 10th and every 100th). Every contender runs through ASDL with ``shared_dim``
("plugin") and as a hand-written loop ("bare", ``_bare_kfac.py``); that both compute the same
factors and gradients is checked first. Without ``shared_dim`` it runs through ASDL as it is
("stock": the same Fisher type and intervals, all positions flattened with the wrong scale).

A step is one of up to three kinds: with new curvature and new inverses, with new curvature only,
with neither. In every round each contender makes one step of each kind, so a slow spell of the
machine meets all of them; the order reverses from round to round. The time of an average step is
made of the kinds' medians, weighted with how often each occurs in the schedule: a median over a
schedule as it runs would leave out the inverse, which falls on every tenth step only. Peak memory
is how far a process of its own grows over some steps beyond what it held before the first.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import asdl
import torch
import torch.nn.functional as F
from _bare_kfac import BareKfac
from _timing import Parts, alternate, in_fresh_process, peak_memory_mib, weighted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable
from asdl_ws_plugin.weight_sharing.batch import Batch
from asdl_ws_plugin.weight_sharing.fisher_maker import WeightSharingFisherMaker
from asdl_ws_plugin.weight_sharing.grad_maker import WeightSharing

DAMPING, EMA_DECAY, LEARNING_RATE = 1e-3, 0.05, 1e-4


@dataclass(frozen=True)
class Contender:
    """One way of K-FAC, and the targets for its step: at most ``target`` times a plain NAdam
    step.
    """

    setting: str
    fisher_type: str
    curvature_interval: int
    inverse_interval: int
    target: float

    @property
    def kinds(self) -> dict[str, float]:
        """Kind of step -> how many of ``inverse_interval`` steps are of it."""
        updates = self.inverse_interval // self.curvature_interval
        kinds = {"inverse": 1, "curvature": updates - 1, "neither": self.inverse_interval - updates}
        return {kind: count for kind, count in kinds.items() if count}

    @property
    def stock(self) -> str:
        """What this is without ``shared_dim``: the same for both settings."""
        return f"stock {self.fisher_type} {self.curvature_interval}/{self.inverse_interval}"

    def step_of(self, kind: str) -> int:
        """A step of the schedule that is of this kind."""
        return {"inverse": 0, "curvature": self.curvature_interval, "neither": 1}[kind]


CONTENDERS = {
    "reduce, MC": Contender("reduce", "fisher_mc", 1, 10, 1.65),
    "expand, MC": Contender("expand", "fisher_mc", 1, 10, 2.35),
    "reduce, empirical": Contender("reduce", "fisher_emp", 1, 10, 1.17),
    "reduce, MC, 10/100": Contender("reduce", "fisher_mc", 10, 100, 1.15),
}
OVERHEAD_TARGET = 1.05


@dataclass(frozen=True)
class Size:
    """The workload."""

    depth: int = 6
    width: int = 192
    image: int = 32
    patch: int = 4
    batch: int = 128
    classes: int = 100
    threads: int = 2
    device: str = "cpu"


def configuration(contender: Contender, **options: Any) -> asdl.PreconditioningConfig:
    """ASDL's own configuration, with the contender's intervals."""
    return asdl.PreconditioningConfig(
        damping=DAMPING,
        ema_decay=EMA_DECAY,
        ignore_modules=[nn.LayerNorm],
        curvature_upd_interval=contender.curvature_interval,
        preconditioner_upd_interval=contender.inverse_interval,
        **options,
    )


class Workload:
    """A model, its optimizer and a batch, and the step functions of one contender."""

    def __init__(self, size: Size, parts: Parts | None = None) -> None:
        make_importable()
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        self.part = parts or Parts()
        self.model = VisionTransformer(
            img_size=size.image,
            patch_size=size.patch,
            num_classes=size.classes,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=3,
            global_pool="avg",
            class_token=False,
        ).to(size.device)
        self.optimizer = torch.optim.NAdam(self.model.parameters(), lr=LEARNING_RATE)
        self.x = torch.randn(size.batch, 3, size.image, size.image, device=size.device)
        self.y = torch.randint(size.classes, (size.batch,), device=size.device)

    def _update(self) -> None:
        with self.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def plain(self) -> None:
        with self.part("forward"):
            loss = F.cross_entropy(self.model(self.x), self.y)
        with self.part("backward"):
            loss.backward()
        self._update()

    def by_plugin(
        self, contender: Contender, stock: bool = False
    ) -> tuple[Any, Callable[[str], None]]:
        """The gradient maker, and a function that makes a step of a kind. ``stock``: as if there
        were no plugin.
        """
        config = configuration(contender, **({"data_size": len(self.x)} if stock else {}))
        maker = asdl.KfacGradientMaker(
            self.model,
            config,
            fisher_type=contender.fisher_type,
            shared_dim=None if stock else contender.setting,
        )

        def step(kind: str, update: bool = True) -> None:
            maker.load_state_dict({"step": contender.step_of(kind)})
            logits = maker.setup_model_call(self.model, self.x)
            maker.setup_loss_call(F.cross_entropy, logits, self.y)
            maker.forward_and_backward()
            if update:
                self._update()

        return maker, step

    def by_preconditioner(self, contender: Contender) -> Callable[[str], None]:
        """A function that makes a step of a kind in a loop that calls the model itself."""
        prec = asdl_ws_plugin.Preconditioner(
            self.model,
            configuration(contender),
            fisher_type=contender.fisher_type,
            shared_dim=contender.setting,
        )

        def step(kind: str) -> None:
            prec.load_state_dict({"step": contender.step_of(kind)})
            loss = F.cross_entropy(self.model(self.x), self.y)
            if contender.fisher_type == "fisher_emp":
                loss.backward()
                prec.step()
            else:
                prec.backward(loss)
            self._update()

        return step

    def by_hand(self, contender: Contender) -> tuple[BareKfac, Callable[[str], None]]:
        """The hand-written loop, and a function that makes a step of a kind."""
        bare = BareKfac(
            self.model,
            contender.setting,
            contender.fisher_type == "fisher_emp",
            DAMPING,
            EMA_DECAY,
            self.part,
        )

        def step(kind: str, update: bool = True) -> None:
            bare.step(self.x, self.y, curvature=kind != "neither", inverse=kind == "inverse")
            if update:
                self._update()

        return bare, step


def check_same(size: Size, contender: Contender) -> float:
    """Raise an AssertionError unless plugin and hand-written loop agree; return the gradients'
    relative difference.
    """
    by_plugin, by_hand = Workload(size), Workload(size)
    _, plugin_step = by_plugin.by_plugin(contender)
    bare, bare_step = by_hand.by_hand(contender)
    for kind in contender.kinds:
        torch.manual_seed(1)  # the same Monte-Carlo labels
        plugin_step(kind, update=False)
        torch.manual_seed(1)
        bare_step(kind, update=False)
        if kind != list(contender.kinds)[-1]:
            by_plugin.model.zero_grad()
            by_hand.model.zero_grad()
    modules = dict(by_plugin.model.named_modules())
    for name, module in by_hand.model.named_modules():
        if module in bare.A:
            kron = modules[name].fisher.kron
            for ours, theirs in ((kron.A, bare.A[module]), (kron.B, bare.B[module])):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())
                )
    difference = norm = torch.zeros(())
    for p, q in zip(by_plugin.model.parameters(), by_hand.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        difference, norm = (
            difference + (p.grad - q.grad).square().sum(),
            norm + q.grad.square().sum(),
        )
    relative = float((difference / norm).sqrt())
    assert relative < 1e-3, (
        f"the gradients of plugin and hand-written loop differ by {relative:.1e}"
    )
    return relative


@contextmanager
def plugin_parts(part: Parts) -> Iterator[None]:
    """Note where the plugin's time goes: the same parts as the hand-written loop's, and
    ``other``.
    """
    maker, batch = WeightSharingFisherMaker, Batch
    natural = asdl.NaturalGradientMaker
    places: list[tuple[Any, str, str]] = [
        (maker, "capture", "forward"),
        (natural, "forward", "forward"),
        (batch, "take_inputs", "A"),
        (batch, "take_output_grads", "second backward"),
        (batch, "take_grads_of", "B"),
        (Tensor, "backward", "backward"),
        (WeightSharing, "update_preconditioner", "inverse"),
        (natural, "precondition", "precondition"),
    ]
    patches = [
        mock.patch.object(owner, name, _method(part, label, owner, name))
        for owner, name, label in places
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _method(part: Parts, label: str, owner: Any, name: str) -> Callable[..., Any]:
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with part(label):
            return original(self, *args, **kwargs)

    return method


def prepare(size: Size, name: str, by: str) -> Callable[[], Callable[[], None]]:
    """For :func:`peak_memory_mib`: what to set up, and a step."""

    def ready() -> Callable[[], None]:
        workload = Workload(size)
        if by == "plain":
            return workload.plain
        contender = CONTENDERS[name]
        _, step = workload.by_plugin(contender) if by == "plugin" else workload.by_hand(contender)
        kinds = iter(list(contender.kinds) * 3)
        return lambda: step(next(kinds))

    return ready


def memory(size: Size, name: str, by: str) -> float:
    torch.set_num_threads(size.threads)
    return peak_memory_mib(prepare(size, name, by), steps=3)


PARTS = (
    "forward",
    "backward",
    "second backward",
    "A",
    "B",
    "inverse",
    "precondition",
    "optimizer",
    "other",
)


def measure_parts(size: Size, name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Who -> part -> seconds, on a step with new curvature and new inverses."""
    recorders = {"plugin": Parts(), "bare": Parts()}
    steps = {
        "plugin": Workload(size, recorders["plugin"]).by_plugin(CONTENDERS[name])[1],
        "bare": Workload(size, recorders["bare"]).by_hand(CONTENDERS[name])[1],
    }
    with plugin_parts(recorders["plugin"]):
        for i in range(rounds + 1):
            for who, step in steps.items():
                if i == 0:  # warm up
                    step("inverse")
                    continue
                with recorders[who].recording():
                    step("inverse")
    return {who: recorder.medians() for who, recorder in recorders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and few rounds")
    parser.add_argument(
        "--rounds", type=int, help="rounds of every contender and kind of step (default: 12)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="'cpu' or 'cuda'")
    parser.add_argument("--only", choices=list(CONTENDERS), nargs="*", default=list(CONTENDERS))
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    args = parser.parse_args()
    size = Size(threads=args.threads, device=args.device)
    if args.quick:
        size = Size(
            depth=2, width=48, batch=16, classes=10, threads=args.threads, device=args.device
        )
    rounds = args.rounds or (2 if args.quick else 12)
    torch.set_num_threads(size.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(
        f"ViT depth {size.depth}, width {size.width}, {(size.image // size.patch) ** 2} tokens, "
        f"batch {size.batch}, {size.classes} classes; {size.device}, {size.threads} threads; torch "
        f"{torch.__version__}, asdl_ws_plugin {asdl_ws_plugin.__version__}; {rounds} rounds"
    )
    for name in args.only:
        relative = check_same(size, CONTENDERS[name])
        console.print(f"{name}: plugin and hand-written loop agree, gradients to {relative:.0e}")

    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "plain": {"neither": Workload(size).plain}
    }
    for name in args.only:
        for who in ("plugin", "bare"):
            workload = Workload(size)
            _, step = (workload.by_plugin if who == "plugin" else workload.by_hand)(
                CONTENDERS[name]
            )
            contenders[f"{name}/{who}"] = {
                kind: functools.partial(step, kind) for kind in CONTENDERS[name].kinds
            }
        if CONTENDERS[name].stock not in contenders:
            _, step = Workload(size).by_plugin(CONTENDERS[name], stock=True)
            contenders[CONTENDERS[name].stock] = {
                kind: functools.partial(step, kind) for kind in CONTENDERS[name].kinds
            }
    with Progress(console=console, transient=True) as progress:
        alternate(contenders, 1)  # warm up
        task = progress.add_task(
            "timing", total=rounds * sum(len(kinds) for kinds in contenders.values())
        )
        times = alternate(contenders, rounds, lambda name: progress.advance(task))
    del contenders

    plain = statistics.median(times["plain"]["neither"])
    table = Table(title="A training step (medians; weighted by the schedule)")
    for column in (
        "",
        "plugin ms",
        "bare ms",
        "plugin / bare",
        "target",
        "plugin / NAdam",
        "target",
        "stock ms",
        "stock / plugin",
        "plugin MiB",
        "bare MiB",
    ):
        table.add_column(column, justify="right" if column else "left")

    def mib(name: str, by: str) -> str:
        return "-" if args.no_memory else f"{in_fresh_process(memory, size, name, by):.0f}"

    with console.status("peak memory"):
        table.add_row(
            "plain NAdam",
            "",
            f"{plain * 1e3:.0f}",
            "",
            "",
            "1.00",
            "",
            "",
            "",
            "",
            mib("", "plain"),
        )
        for name in args.only:
            contender = CONTENDERS[name]
            ours, theirs = (
                weighted(times[f"{name}/{who}"], contender.kinds) for who in ("plugin", "bare")
            )
            stock = weighted(times[contender.stock], contender.kinds)
            table.add_row(
                name,
                f"{ours * 1e3:.0f}",
                f"{theirs * 1e3:.0f}",
                _judged(ours / theirs, OVERHEAD_TARGET),
                f"{OVERHEAD_TARGET}",
                _judged(ours / plain, contender.target),
                f"{contender.target}",
                f"{stock * 1e3:.0f}",
                f"{stock / ours:.2f}",
                mib(name, "plugin"),
                mib(name, "bare"),
            )
    console.print(table)

    table = Table(title="Where the time of a step with new curvature and new inverses goes (ms)")
    for column in ("", "", *PARTS):
        table.add_column(column, justify="right" if column else "left")
    with console.status("parts"):
        for name in args.only:
            if CONTENDERS[name].curvature_interval > 1:
                continue  # its parts are those of the contender that has them on every step
            for who, medians in measure_parts(size, name, max(2, rounds // 2)).items():
                table.add_row(name, who, *(f"{medians.get(part, 0) * 1e3:.0f}" for part in PARTS))
    console.print(table)


def _judged(ratio: float, target: float) -> str:
    return f"[green]{ratio:.3f}[/]" if ratio <= target else f"[red]{ratio:.3f}[/]"


if __name__ == "__main__":
    main()
