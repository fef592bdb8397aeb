"""Propositions 3.2, 3.3, 3.5 and 3.6, and the claims of section 3.2 about attention, against exact
blocks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracles.autograd import (
    MSE,
    Factors,
    assert_equal,
    computed_fisher,
    covariance,
    exact_block,
    rel_error,
)
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")

N, P, H, C = 4, 5, 4, 3
SHARING = [(6,), (2, 3), (2, 3, 2)]
TOL = 1e-10


class DeepLinear(nn.Module):
    """Eq. 3.10: linear layers, then nothing (expand setting) or a sum over all positions, weighted
    by ``weights``.
    """

    def __init__(self, depth: int, bias: bool, weights: Tensor | None = None) -> None:
        super().__init__()
        sizes = [P, *[H] * (depth - 1), C]
        self.layers = nn.Sequential(
            *(nn.Linear(i, o, bias=bias) for i, o in itertools.pairwise(sizes))
        )
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.weights is None:
            return y
        return torch.einsum("nrc,r->nc", y.flatten(1, -2), self.weights)


def factors_of(model: nn.Module, x: Tensor, shared_dim: str, var: Any) -> dict[str, Factors]:
    """The factors of all layers, by name, averaged over the examples."""
    computed_fisher(model, x, shared_dim, loss_type=MSE, var=var)
    return {
        name: Factors(module.fisher.kron.A, module.fisher.kron.B)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def exact(model: nn.Module, parameter: str, x: Tensor, var: Any) -> Tensor:
    return exact_block(model, parameter, x, MSE, var) / len(x)


@pytest.mark.parametrize("var", ["number", "vector", "matrix"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("depth", [1, 3], ids=["single", "deep"])
@pytest.mark.parametrize("sharing", SHARING, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("setting", ["expand", "sum", "mean"])
def test_matching_approximation_is_exact(
    setting: str, sharing: tuple[int, ...], depth: int, bias: bool, var: str
):
    """Props. 3.2, 3.3 (expand), 3.5, 3.6 (scaled sum with c = 1 and c = 1/R); the other
    approximation is inexact.
    """
    size = torch.Size(sharing).numel()
    weights = {"expand": None, "sum": torch.ones(size), "mean": torch.full((size,), 1 / size)}[
        setting
    ]
    likelihood = {"number": 0.3, "vector": torch.rand(C) + 0.5, "matrix": covariance(C)}[var]
    model, x = DeepLinear(depth, bias, weights), torch.randn(N, *sharing, P) + 0.5
    matching, other = ("expand", "reduce") if setting == "expand" else ("reduce", "expand")
    right, wrong = (
        factors_of(model, x, shared_dim, likelihood) for shared_dim in (matching, other)
    )
    assert len(right) == depth
    for name, factors in right.items():
        block = exact(model, f"{name}.weight", x, likelihood)
        assert_equal(factors.block, block, TOL)
        assert rel_error(wrong[name].block, block) > 0.05
        if bias:  # by B alone
            assert_equal(factors.B, exact(model, f"{name}.bias", x, likelihood), TOL)


def test_reduce_is_inexact_for_a_weighted_sum():
    """Linearity of the aggregation is not enough (below eq. 3.23): all positions have to weigh the
    same.
    """
    weights = torch.linspace(0.2, 1.8, 6)
    model, x = DeepLinear(3, False, weights), torch.randn(N, 6, P) + 0.5
    for shared_dim in ("reduce", "expand"):
        for name, factors in factors_of(model, x, shared_dim, 1.0).items():
            assert rel_error(factors.block, exact(model, f"{name}.weight", x, 1.0)) > 1e-2


@pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
def test_both_are_exact_without_sharing(shared_dim: str):
    model, x, var = DeepLinear(3, True), torch.randn(N, P), covariance(C)
    for name, factors in factors_of(model, x, shared_dim, var).items():
        assert_equal(factors.block, exact(model, f"{name}.weight", x, var), TOL)


def test_a_convolution_is_a_linear_layer_over_its_output_positions():
    """Prop. 3.6 for convolutions whose stride and kernel make the network linear with a mean at its
    end.
    """

    class Patchwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(2, H, 2, stride=2)
            self.head = nn.Linear(H, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).flatten(2).mT).mean(1)

    model, x, var = Patchwise(), torch.randn(N, 2, 6, 4), covariance(C)
    right, wrong = factors_of(model, x, "reduce", var), factors_of(model, x, "expand", var)
    assert set(right) == {"embed", "head"}
    for name, factors in right.items():
        block = exact(model, f"{name}.weight", x, var)
        assert_equal(factors.block, block, TOL)
        assert rel_error(wrong[name].block, block) > 0.05


class LinearAttention(nn.Module):
    """Blocks of eq. 3.24, ``X W_Qᵀ W_K Xᵀ X W_Vᵀ``, and a mean over the positions in the reduce
    setting.
    """

    def __init__(self, num_blocks: int, mean: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "qkv"})
            for _ in range(num_blocks)
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["q"](x) @ block["k"](x).mT @ block["v"](x)
        return x.mean(1) if self.mean else x


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_attention_is_exact_for_the_last_query_weights_and_one_example_only(
    setting: str, num_blocks: int
):
    """Section 3.2. The other weights, the other blocks, two examples and the other approximation
    are inexact.
    """
    model, var = LinearAttention(num_blocks, mean=setting == "reduce"), covariance(4)
    other = {"expand": "reduce", "reduce": "expand"}[setting]
    exact_for = f"blocks.{num_blocks - 1}.q"
    for num_examples in (1, 2):
        x = torch.randn(num_examples, 5, 4)
        right, wrong = factors_of(model, x, setting, var), factors_of(model, x, other, var)
        assert len(right) == 3 * num_blocks
        for name, factors in right.items():
            block = exact(model, f"{name}.weight", x, var)
            assert rel_error(wrong[name].block, block) > 1e-2, name
            if num_examples == 1 and name == exact_for:
                assert_equal(factors.block, block, TOL)
            else:
                assert rel_error(factors.block, block) > 1e-2, name
