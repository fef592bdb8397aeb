"""What a K-FAC step costs on a GPU: all of it by one command, in under nine minutes.

    python benchmarks/gpu.py                  # ViT-S/16 at 224 on the GPU
    python benchmarks/gpu.py --device cpu     # a small model, to see whether it runs

timm's ViT-S/16 on images of 224x224, 1,000 classes, in float32 and under bfloat16 autocast, with
the largest batch that leaves a third of the memory free. In order:

1. The factors in float32 on the device against those in float64 on the CPU.
2. Milliseconds a step for NAdamW, K-FAC-expand, K-FAC-reduce and forward-only, at the thesis'
   intervals (curvature every step, inverses every 10) and at 10/100, as multiples of NAdamW's,
   beside the thesis' own 2.55 (expand) and 1.88 (reduce) and the goals. As in ``step_time.py``, the
   kinds of steps alternate between the contenders, and their medians are weighted. TensorFloat-32
   is off.
3. Where the time of a step with new curvature and new inverses goes.
4. The top rows of a profile of such a step, without the optimizer's part, and for each kind of step
   how often a value is read back to the CPU, which waits for the GPU, and how many kernels are
   started.

Everything is also written to ``out/gpu.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import asdl
import torch
import torch.nn.functional as F
from _timing import Parts, alternate, weighted
from rich.console import Console
from rich.table import Table
from step_time import PARTS, Contender, plugin_parts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable

__all__ = ["CONTENDERS", "Size", "Workload", "main"]

# The last number is the goal, as a multiple of NAdamW's step.
CONTENDERS = {
    "expand 1/10": Contender("expand", "fisher_mc", 1, 10, 2.0),
    "reduce 1/10": Contender("reduce", "fisher_mc", 1, 10, 1.45),
    "forward-only 1/10": Contender("reduce", "fisher_forward_only", 1, 10, 1.2),
    "expand 10/100": Contender("expand", "fisher_mc", 10, 100, 1.1),
    "reduce 10/100": Contender("reduce", "fisher_mc", 10, 100, 1.05),
    "forward-only 10/100": Contender("reduce", "fisher_forward_only", 10, 100, 1.05),
}
THESIS = {"expand 1/10": 2.55, "reduce 1/10": 1.88}
# Reading a value back makes the CPU wait for the GPU.
READS = ("aten::_local_scalar_dense", "aten::nonzero")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
FULL_SIZE_BATCHES = (512, 256, 128, 64, 32)


@dataclass(frozen=True)
class Size:
    """The workload; the default is ViT-S/16."""

    device: str = "cuda"
    batch: int = 128
    depth: int = 12
    width: int = 384
    heads: int = 6
    image: int = 224
    patch: int = 16
    classes: int = 1000


SMALL = Size("cpu", batch=4, depth=1, width=12, heads=3, image=12, patch=4, classes=5)


class Workload:
    """A model, its optimizer and a batch; ``bfloat16`` is under autocast."""

    def __init__(
        self, size: Size, bfloat16: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        make_importable()
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=size.image,
            patch_size=size.patch,
            num_classes=size.classes,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            global_pool="avg",
            class_token=False,
        )
        shape = (size.batch, 3, size.image, size.image)
        x, y = torch.randn(shape), torch.randint(size.classes, (size.batch,))
        self.model = model.to(size.device, dtype)
        self.x, self.y = x.to(size.device, dtype), y.to(size.device)
        self.optimizer = torch.optim.NAdam(
            self.model.parameters(), lr=1e-4, decoupled_weight_decay=True
        )
        self._autocast = functools.partial(
            torch.autocast, size.device, dtype=torch.bfloat16, enabled=bfloat16
        )
        self.part: Any = contextlib.nullcontext

    def _update(self) -> None:
        with self.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def plain(self) -> None:
        """A step of NAdamW."""
        with self._autocast():
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self._update()

    def kfac(self, contender: Contender, decay: float = 0.05) -> Callable[..., None]:
        """A function that makes a step of a kind."""
        config = asdl.PreconditioningConfig(
            damping=1e-3,
            ema_decay=decay,
            ignore_modules=[nn.LayerNorm],
            curvature_upd_interval=contender.curvature_interval,
            preconditioner_upd_interval=contender.inverse_interval,
        )
        maker = asdl.KfacGradientMaker(
            self.model, config, fisher_type=contender.fisher_type, shared_dim=contender.setting
        )

        def step(kind: str, update: bool = True) -> None:
            maker.load_state_dict({"step": contender.step_of(kind)})
            with self._autocast():
                logits = maker.setup_model_call(self.model, self.x)
                maker.setup_loss_call(F.cross_entropy, logits, self.y)
                maker.forward_and_backward()
            if update:
                self._update()

        return step

    def factors(self, setting: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A and B of the empirical Fisher, in float64 on the CPU."""
        self.kfac(Contender(setting, "fisher_emp", 1, 10, 0.0), decay=1.0)("inverse")
        return {
            name: (module.fisher.kron.A.double().cpu(), module.fisher.kron.B.double().cpu())
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }


def check_same(size: Size, setting: str) -> float:
    """Raise an AssertionError unless the device's float32 factors are the CPU's float64 ones, on a
    batch of four; return the largest relative difference.
    """
    few = replace(size, batch=4)
    ours = Workload(few).factors(setting)
    theirs = Workload(replace(few, device="cpu"), dtype=torch.float64).factors(setting)
    difference = 0.0
    for name, factors in ours.items():
        for mine, exact in zip(factors, theirs[name], strict=True):
            relative = float((mine - exact).norm() / exact.norm())
            assert relative < 1e-3, f"the factors of '{name}' differ by {relative:.1e}"
            difference = max(difference, relative)
    return difference


def largest_batch(size: Size) -> int:
    """The largest batch whose expand step with new inverses leaves a third of the GPU's memory
    free.

    Raises:
        RuntimeError: if not even the smallest does.
    """
    total = torch.cuda.get_device_properties(size.device).total_memory
    for batch in FULL_SIZE_BATCHES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            Workload(replace(size, batch=batch)).kfac(CONTENDERS["expand 1/10"])("inverse")
            if torch.cuda.max_memory_allocated() < total * 2 / 3:
                return batch
    raise RuntimeError(f"a batch of {FULL_SIZE_BATCHES[-1]} needs more than this GPU has")


def step_times(
    size: Size, bfloat16: bool, seconds: float, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Contender -> kind of step -> seconds, of as many rounds as there is time for."""
    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "NAdamW": {"neither": Workload(size, bfloat16).plain}
    }
    for name, contender in CONTENDERS.items():
        step = Workload(size, bfloat16).kfac(contender)
        contenders[name] = {kind: functools.partial(step, kind) for kind in contender.kinds}
    alternate(contenders, 1)  # warm up
    end = time.monotonic() + seconds
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, kinds in alternate(contenders, 1).items():
            for kind, found in kinds.items():
                times.setdefault(name, {}).setdefault(kind, []).extend(found)
        if time.monotonic() > end:
            break
    return times


def parts_of(size: Size, bfloat16: bool, name: str, rounds: int) -> dict[str, float]:
    """Part -> seconds, on a step with new curvature and new inverses."""
    workload, parts = Workload(size, bfloat16), Parts()
    workload.part = parts
    step = workload.kfac(CONTENDERS[name])
    with plugin_parts(parts):
        step("inverse")  # warm up
        for _ in range(rounds):
            with parts.recording():
                step("inverse")
    return parts.medians()


@contextlib.contextmanager
def profiled(device: str) -> Iterator[Any]:
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as found:
        yield found


def counts_of(size: Size, bfloat16: bool, name: str) -> tuple[dict[str, tuple[int, int]], str]:
    """Kind of step -> values read back and kernels started; and the top rows of the profile of a
    step with new inverses.
    """
    step, found, rows = Workload(size, bfloat16).kfac(CONTENDERS[name]), {}, ""
    for kind in CONTENDERS[name].kinds:
        step(kind)  # warm up
    for kind in CONTENDERS[name].kinds:
        with profiled(size.device) as result:
            step(kind, update=False)
        averages = result.key_averages()
        count = {row.key: row.count for row in averages}
        found[kind] = (
            sum(count.get(key, 0) for key in READS),
            sum(count.get(key, 0) for key in LAUNCHES),
        )
        if kind == "inverse":
            where = "cpu" if size.device == "cpu" else "device"
            rows = averages.table(sort_by=f"self_{where}_time_total", row_limit=15)
    return found, rows


def times_table(
    times: Mapping[str, Mapping[str, list[float]]], precision: str
) -> tuple[Table, dict[str, float]]:
    """The table, and contender -> multiple of NAdamW's step."""
    rounds = len(times["NAdamW"]["neither"])
    table = Table(title=f"{precision}: a training step, medians of {rounds} rounds, weighted")
    for header in ("", "ms", "/ NAdamW", "goal", "thesis"):
        table.add_column(header, justify="right" if header else "left")
    plain = weighted(times["NAdamW"], {"neither": 1})
    table.add_row("NAdamW", f"{1e3 * plain:.1f}", "1.00", "", "1.00")
    ratios = {}
    for name, contender in CONTENDERS.items():
        mine = weighted(times[name], contender.kinds)
        ratios[name] = mine / plain
        thesis = f"{THESIS[name]:.2f}" if name in THESIS else ""
        table.add_row(
            name, f"{1e3 * mine:.1f}", f"{ratios[name]:.2f}", f"{contender.target}", thesis
        )
    return table, ratios


def parts_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="Where the time of a step with new curvature and new inverses goes (ms)")
    table.add_column("")
    for part in PARTS:
        table.add_column(part, justify="right")
    for name, medians in found.items():
        table.add_row(name, *(f"{1e3 * medians.get(part, 0.0):.1f}" for part in PARTS))
    return table


def counts_table(found: Mapping[str, tuple[int, int]], name: str) -> Table:
    table = Table(title=f"{name}: what one step of a kind asks of the device")
    for header in ("step with", "values read back", "kernels started"):
        table.add_column(header, justify="right" if header != "step with" else "left")
    for kind, (reads, launches) in found.items():
        table.add_row(kind, str(reads), str(launches) if launches else "-")
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="'cuda', or 'cpu' for a small model")
    parser.add_argument("--batch", type=int, help="instead of the largest that fits well")
    parser.add_argument("--seconds", type=float, default=120, help="for the timing, each precision")
    parser.add_argument("--rounds", type=int, default=30, help="of the timing, at most")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs a small model on the CPU")
    size = SMALL if options.device == "cpu" else Size(options.device)
    console = Console(width=None if Console().is_terminal else 140)
    return measure(size, options, console)


def measure(size: Size, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print all tables, and return (and write) what is in them."""
    is_cpu = size.device == "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.batch or not is_cpu:
        size = replace(size, batch=options.batch or largest_batch(size))
    report: dict[str, Any] = {
        "device": platform.machine() if is_cpu else torch.cuda.get_device_name(size.device),
        "torch": torch.__version__,
        "asdl_ws_plugin": asdl_ws_plugin.__version__,
        "size": asdict(size),
    }
    console.print(report)
    report["factors"] = {name: check_same(size, name) for name in ("expand", "reduce")}
    for name, relative in report["factors"].items():
        console.print(f"{name}: float32 factors here are the CPU's in float64, to {relative:.0e}")
    for precision in ("float32", "bfloat16"):
        times = step_times(size, precision == "bfloat16", options.seconds, options.rounds)
        table, ratios = times_table(times, precision)
        console.print(table)
        report[precision] = {"times": times, "ratios": ratios}
    every_step = [name for name, c in CONTENDERS.items() if c.curvature_interval == 1]
    rounds = min(options.rounds, 5)
    report["parts"] = {name: parts_of(size, True, name, rounds) for name in every_step}
    console.print(parts_table(report["parts"]))
    report["counts"], rows = counts_of(size, True, "reduce 10/100")
    console.print(counts_table(report["counts"], "reduce 10/100"))
    console.print(rows, markup=False, highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
    console.print(f"Everything: {options.out / 'gpu.json'}")
    return report


if __name__ == "__main__":
    main()
