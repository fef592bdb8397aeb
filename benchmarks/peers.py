"""Kronecker factors of one batch: how long they take here, with curvlinops, and with stock ASDL.

    python benchmarks/peers.py

The model is that of ``step_time.py``, a timm ViT, with the factors of all Linear layers and of the
patch embedding. Contenders are alternated in one process, medians. That the factors are the same is
checked before, for the empirical Fisher to rounding; the Monte-Carlo ones are drawn from different
labels. Stock ASDL computes neither approximation: it flattens the positions with the wrong scale,
which is the work of K-FAC-expand.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _timing import alternate
from asdl.fisher import FisherConfig, get_fisher_maker
from curvlinops import KFACLinearOperator
from rich.console import Console
from rich.table import Table
from step_time import Size, Workload
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401  # makes ASDL accept shared_dim

FISHER_TYPES = {"fisher_emp": "empirical", "fisher_mc": "mc"}  # ASDL's name -> curvlinops'
Factors = dict[str, tuple[Tensor, Tensor]]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def by_asdl(workload: Workload, fisher_type: str, shared_dim: str | None) -> Callable[[], Factors]:
    """With this package, or with ``shared_dim=None`` ASDL as it is. Divided by the number of
    examples.
    """
    config = FisherConfig(
        fisher_type,
        ["kron"],
        loss_type="cross_entropy",
        data_size=len(workload.x),
        ignore_modules=[nn.LayerNorm],
        shared_dim=shared_dim,
    )
    maker = get_fisher_maker(workload.model, config)

    def run() -> Factors:
        logits = maker.setup_model_call(workload.model, workload.x)
        maker.setup_loss_call(F.cross_entropy, logits, workload.y)
        maker.forward_and_backward()
        return {
            name: (layer.fisher.kron.A, layer.fisher.kron.B)
            for name, layer in layers_of(workload.model).items()
        }

    return run


def by_curvlinops(workload: Workload, fisher_type: str, shared_dim: str) -> Callable[[], Factors]:
    layers = layers_of(workload.model)
    operator = KFACLinearOperator(
        workload.model,
        nn.CrossEntropyLoss(),
        [p for layer in layers.values() for p in layer.parameters()],
        [(workload.x, workload.y)],
        fisher_type=FISHER_TYPES[fisher_type],
        kfac_approx=shared_dim,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )

    def run() -> Factors:
        operator._input_covariances, operator._gradient_covariances = {}, {}  # it would add to them
        operator.compute_kronecker_factors()
        return {
            name: (operator._input_covariances[name], operator._gradient_covariances[name])
            for name in layers
        }

    return run


def check_same(size: Size, shared_dim: str) -> float:
    """Raise an AssertionError unless the empirical factors agree; return the largest relative
    difference.
    """
    ours, theirs = (
        make(Workload(size), "fisher_emp", shared_dim)() for make in (by_asdl, by_curvlinops)
    )
    difference = 0.0
    for name, factors in ours.items():
        for mine, peer in zip(factors, theirs[name], strict=True):
            peer = peer[: len(mine), : len(mine)]  # its A has a row and a column for the bias
            relative = float((mine - peer).norm() / peer.norm())
            assert relative < 1e-4, f"the factors of '{name}' differ by {relative:.1e}"
            difference = max(difference, relative)
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and few rounds")
    parser.add_argument("--rounds", type=int, help="rounds of every contender (default: 10)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Upstream's backward hooks are of a deprecated kind.
    warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
    size = Size(depth=2, width=48, batch=16, classes=10) if options.quick else Size()
    rounds = options.rounds or (2 if options.quick else 10)
    console = Console(width=110)
    for shared_dim in ("reduce", "expand"):
        console.print(
            f"{shared_dim}: the same factors as curvlinops', to {check_same(size, shared_dim):.0e}"
        )

    contenders: dict[str, dict[str, Callable[[], Any]]] = {}
    for fisher_type in FISHER_TYPES:
        contenders[f"stock {fisher_type}"] = {"batch": by_asdl(Workload(size), fisher_type, None)}
        for shared_dim in ("reduce", "expand"):
            for who, make in (("ours", by_asdl), ("curvlinops", by_curvlinops)):
                contenders[f"{who} {fisher_type} {shared_dim}"] = {
                    "batch": make(Workload(size), fisher_type, shared_dim)
                }
    with console.status("timing"):
        alternate(contenders, 1)  # warm up
        times = {
            name: statistics.median(kinds["batch"])
            for name, kinds in alternate(contenders, rounds).items()
        }
    table = Table(
        title=f"Milliseconds for the factors of a batch of {size.batch}; medians of {rounds} rounds"
    )
    for column in ("", "ours", "curvlinops", "stock ASDL", "curvlinops / ours", "stock / ours"):
        table.add_column(column, justify="right" if column else "left")
    for fisher_type in FISHER_TYPES:
        for shared_dim in ("reduce", "expand"):
            ours, theirs = (
                times[f"{who} {fisher_type} {shared_dim}"] for who in ("ours", "curvlinops")
            )
            stock = times[f"stock {fisher_type}"]
            table.add_row(
                f"{shared_dim}, {FISHER_TYPES[fisher_type]}",
                *(f"{t * 1e3:.0f}" for t in (ours, theirs, stock)),
                f"{theirs / ours:.2f}",
                f"{stock / ours:.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
