"""Where K-FAC-expand and K-FAC-reduce are exact: figures 4.1 and 4.2 of Eschenhagen (2023), and the
claims of its section 3.2 about attention as a figure.

    python examples/exactness_figures.py

The first two show the third layer of a deep linear network of six (N = 4 examples, R = 2 positions,
width 8) under a Gaussian likelihood: what a layer receives, after K-FAC-expand has flattened or
K-FAC-reduce has reduced the positions; the factors A and B that ASDL makes of it; their Kronecker
product; the exact block of the generalized Gauss-Newton matrix, by ``torch.func``; and the
difference. In the expand setting the loss has a term for every position, in the reduce setting it
sees the mean over the positions. The third figure does the same for blocks of attention without
softmax (eq. 3.24), whose matching approximation is exact for the query weights of the last block
and one example only.

Every error is printed, and asserted to be zero to rounding or clearly not zero, as the thesis says.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report
from _training import exact_fisher

STRATEGIES = ("expand", "reduce")
EXACT, INEXACT = 1e-10, 1e-2  # relative errors below and above these are zero and not zero


class DeepLinear(nn.Module):
    """Eq. 3.10: ``depth`` linear layers, and in the reduce setting the mean over the positions."""

    def __init__(self, setting: str, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.setting == "expand" else x.mean(1)


class LinearAttention(nn.Module):
    """Eq. 3.24, block after block: ``X W_Qᵀ W_K Xᵀ X W_Vᵀ``."""

    def __init__(self, setting: str, num_blocks: int, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in "QKV"})
            for _ in range(num_blocks)
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["Q"](x) @ block["K"](x).mT @ block["V"](x)
        return x if self.setting == "expand" else x.mean(1)


def exact_block(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """``1/N Σ_n Σ_r JᵀJ`` of a weight (eq. 3.5, Λ = I): ``(numel, numel)``."""
    weight = model.get_parameter(name).detach()
    jacobian = jacrev(lambda w: functional_call(model, {name: w}, (x,)))(weight)
    rows = jacobian.reshape(-1, weight.numel())
    return (rows.mT @ rows / len(x)).detach()


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm())


# ------------------------------------------------------------------------- figures 4.1 and 4.2


@dataclass
class Panels:
    """One row of figures 4.1 and 4.2: the tensors of one approximation, and its error."""

    in_data: Tensor
    out_grads: Tensor
    A: Tensor
    B: Tensor
    block: Tensor
    difference: Tensor
    error: float


def received(model: nn.Module, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's input ``(N, R, P)``, and the Jacobians ``(N, R', C, R, Q)`` of every loss term's
    outputs with respect to the layer's output.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
    terms = model(x)
    handle.remove()
    terms = terms.unsqueeze(1) if terms.ndim == 2 else terms  # N R' C
    sums = terms.sum(0).flatten()  # the examples do not see each other
    grads = [torch.autograd.grad(one, seen[1], retain_graph=True)[0] for one in sums]
    return seen[0].detach(), torch.stack(grads, dim=1).unflatten(1, terms.shape[1:])


def panels(model: DeepLinear, layer: int, x: Tensor, strategy: str) -> Panels:
    """What listing 3.1 makes of the third layer's tensors, beside what ASDL does."""
    exact_fisher(model, x, shared_dim=strategy, loss_type="mse")
    module: Any = model.layers[layer]
    A, B = module.fisher.kron.A, module.fisher.kron.B
    a, b = received(model, module, x)
    if strategy == "expand":  # a row for each position, which only its own term depends on
        a, b = a.flatten(0, 1) / a.shape[1] ** 0.5, b.sum(1).movedim(2, 1).flatten(0, 1)
    else:  # a row for each loss term
        a, b = a.mean(1), b.sum(3).flatten(0, 1)
    # The picture is true: what is drawn on the left makes the factors to its right.
    torch.testing.assert_close(a.mT @ a / len(x), A, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("nci,ncj->ij", b, b) / len(x), B, rtol=0, atol=1e-12)
    exact = exact_block(model, f"layers.{layer}.weight", x)
    block = torch.kron(B.contiguous(), A.contiguous())
    difference = (block - exact).abs()
    return Panels(a, b.flatten(1), A, B, block, difference, relative_error(block, exact))


def draw_layer(setting: str, rows: dict[str, Panels], exact: Tensor, path: Path) -> None:
    """Both approximations above each other; the errors share their scale, and black is zero."""
    titles = ("in_data", "out_grads", "A", "B", "B ⊗ A", "exact GGN", "|error|")
    drawing, axes = _report.pyplot().subplots(
        2, len(titles), figsize=(14, 4.6), layout="constrained"
    )
    worst = max(float(row.difference.max()) for row in rows.values())
    highest = max(float(block.abs().max()) for block in (exact, *(r.block for r in rows.values())))
    for line, (strategy, row) in zip(axes, rows.items(), strict=True):
        images = (row.in_data, row.out_grads, row.A, row.B, row.block, exact, row.difference)
        for axis, title, image in zip(line, titles, images, strict=True):
            largest = highest if image.shape == exact.shape else float(image.abs().max())
            limits = (
                {"cmap": "gray", "vmin": 0, "vmax": worst}
                if title == "|error|"
                else {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
            )
            aspect = "auto" if title == "out_grads" else "equal"
            axis.imshow(image.numpy(), aspect=aspect, interpolation="nearest", **limits)
            axis.set(xticks=[], yticks=[], title=title)
            axis.set_xlabel(" x ".join(map(str, image.shape)))
        line[0].set_ylabel(f"K-FAC-{strategy}", fontsize="large")
        line[-1].set_xlabel(f"relative error {row.error:.1e}")
    drawing.suptitle(f"The {setting} setting: a layer of a deep linear network")
    _report.save(drawing, path)


def deep_linear(setting: str, out: Path, layer: int = 2) -> dict[str, float]:
    """Figure 4.1 (``setting='expand'``) or 4.2 (``'reduce'``); returns the errors by strategy."""
    torch.manual_seed(0)
    model, x = DeepLinear(setting), torch.randn(4, 2, 8)
    rows = {strategy: panels(model, layer, x, strategy) for strategy in STRATEGIES}
    exact = exact_block(model, f"layers.{layer}.weight", x)
    draw_layer(setting, rows, exact, out / f"figure_4_{1 + STRATEGIES.index(setting)}")
    errors = {strategy: row.error for strategy, row in rows.items()}
    for strategy, error in errors.items():
        assert error < EXACT if strategy == setting else error > INEXACT, (setting, strategy, error)
    # The approximations' B are the same but for a factor. In the reduce setting it is R. In the
    # expand setting it would be R, too, if all terms were back-propagated at once, as in the
    # thesis; here they are independent of each other, and it is 1.
    factor = 1 if setting == "expand" else x.shape[1]
    torch.testing.assert_close(rows["reduce"].B, factor * rows["expand"].B, rtol=1e-10, atol=0)
    return errors


# ------------------------------------------------------------------------- section 3.2

Errors = dict[str, dict[str, float]]  # weight -> strategy -> relative error


def attention(setting: str, num_examples: int, num_blocks: int) -> Errors:
    """Errors of all query, key and value weights, asserted to be what section 3.2 says."""
    torch.manual_seed(0)
    model, x = LinearAttention(setting, num_blocks), torch.randn(num_examples, 5, 4)
    errors: Errors = {}
    for strategy in STRATEGIES:
        exact_fisher(model, x, shared_dim=strategy, loss_type="mse")
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                fisher: Any = module.fisher
                block = torch.kron(fisher.kron.B.contiguous(), fisher.kron.A.contiguous())
                error = relative_error(block, exact_block(model, f"{name}.weight", x))
                errors.setdefault(name, {})[strategy] = error
                is_last_query = name == f"blocks.{num_blocks - 1}.Q"
                is_exact = strategy == setting and is_last_query and num_examples == 1
                assert error < EXACT if is_exact else error > INEXACT, (name, strategy, error)
    return errors


def draw_attention(results: dict[tuple[str, int, int], Errors], path: Path) -> None:
    """One panel for each number of examples and blocks, a mark for each setting and strategy."""
    drawing, axes = _report.pyplot().subplots(
        2, 2, figsize=(10, 6), sharey=True, width_ratios=(3, 9), layout="constrained"
    )
    colors = {"expand": "tab:blue", "reduce": "tab:orange"}
    for (setting, num_examples, num_blocks), errors in results.items():
        panel = axes[int(num_examples > 1), int(num_blocks > 1)]
        for strategy in STRATEGIES:
            panel.plot(
                [max(error[strategy], 1e-17) for error in errors.values()],
                "o" if strategy == setting else "x",
                color=colors[setting],
                fillstyle="none",
                label=f"{setting} setting, K-FAC-{strategy}",
            )
        labels = [
            f"$W^{name[-1]}_{{{int(name.split('.')[1]) + 1}}}$" for name in errors
        ]  # "blocks.0.Q" is the first block's
        panel.set_xticks(range(len(errors)), labels)
        panel.set_xlim(-0.5, len(errors) - 0.5)
        blocks = "one block" if num_blocks == 1 else "three blocks"
        panel.set_title(f"N = {num_examples}, {blocks}")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("relative error of B ⊗ A")
    axes[1, 1].legend(loc="lower left", ncols=2)
    drawing.suptitle("Attention without softmax: exact for the last query weights of one example")
    _report.save(drawing, path)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figures")
    options = parser.parse_args(arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        linear = {setting: deep_linear(setting, options.out) for setting in STRATEGIES}
        results = {
            (setting, num_examples, num_blocks): attention(setting, num_examples, num_blocks)
            for setting in STRATEGIES
            for num_examples in (1, 8)
            for num_blocks in (1, 3)
        }
    finally:
        torch.set_default_dtype(before)
    draw_attention(results, options.out / "section_3_2")

    table = Table(title="Relative error of a layer's block", caption="Asserted as in the thesis.")
    for header in ("network", "setting", "N", "weight"):
        table.add_column(header)
    for strategy in STRATEGIES:
        table.add_column(f"K-FAC-{strategy}", justify="right")
    for setting, errors in linear.items():
        cells = [f"{errors[strategy]:.1e}" for strategy in STRATEGIES]
        table.add_row("deep linear", setting, "4", "third layer", *cells)
    for (setting, num_examples, num_blocks), by_weight in results.items():
        table.add_section()
        for name, errors in by_weight.items():
            blocks = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
            cells = [f"{errors[strategy]:.1e}" for strategy in STRATEGIES]
            table.add_row(f"attention, {blocks}", setting, str(num_examples), name, *cells)
    console = _report.console()
    console.print(table)
    console.print(f"Figures: {options.out}/figure_4_1, figure_4_2, section_3_2 (.png, .pdf)")
    return linear


if __name__ == "__main__":
    main()
