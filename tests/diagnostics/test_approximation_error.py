"""``approximation_error`` against dense blocks, factors and solves, all brute force from autograd
in float64.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.autograd import (
    BCE,
    CE,
    MSE,
    Factors,
    SelfAttention,
    Tokenwise,
    covariance,
    exact_block,
    oracle_factors,
    rel_error,
)
from rich.console import Console
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import approximation_error

pytestmark = pytest.mark.usefixtures("double")

N, R, P, H, C = 6, 4, 5, 4, 3
DAMPING = 1e-2


def targets_for(loss_type: str, sizes: tuple[int, ...]) -> Tensor:
    if loss_type == CE:
        return torch.randint(C, sizes)
    return torch.randn(*sizes, C) if loss_type == MSE else torch.randint(2, (*sizes, C)).double()


def mean_loss(loss_type: str, z: Tensor, y: Tensor) -> Tensor:
    if loss_type == CE:
        return F.cross_entropy(z.flatten(0, -2), y.flatten())
    return F.mse_loss(z, y) if loss_type == MSE else F.binary_cross_entropy_with_logits(z, y)


def damped_like_asdl(factors: Factors, grad: Tensor, damping: float) -> Tensor:
    """Damping split between the factors by their mean eigenvalues."""
    A, B = factors.A, factors.B
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    A = A + math.sqrt(damping) * pi * torch.eye(len(A))
    B = B + math.sqrt(damping) / pi * torch.eye(len(B))
    return torch.linalg.solve(Factors(A, B).block, grad)


def cosine(u: Tensor, v: Tensor) -> float:
    return (u @ v / (u.norm() * v.norm())).item()


def expected(
    exact: Tensor, factors: dict[str, Factors], grad: Tensor, damping: float = DAMPING
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors and cosines, dense."""
    best = torch.linalg.solve(exact + damping * torch.eye(len(exact)), grad)
    errors = {name: rel_error(f.block, exact) for name, f in factors.items()}
    return errors, {
        name: cosine(damped_like_asdl(f, grad, damping), best) for name, f in factors.items()
    }


def assert_row(row: Any, errors: dict[str, float], cosines: dict[str, float]) -> None:
    assert row.error == pytest.approx(errors, rel=1e-8)
    assert row.cosine == pytest.approx(cosines, rel=1e-8)


def scaled(factors: Factors, num_examples: int, num_terms: int) -> Factors:
    return Factors((factors.A / num_examples).detach(), (factors.B / num_terms).detach())


# ----------------------------------------------------------------------- where one of them is exact


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("sharing", [(6,), (2, 3)], ids=["1d", "2d"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_the_matching_approximation_of_deep_linear_networks_is_exact(
    setting: str, sharing: tuple[int, ...], depth: int
):
    """Props. 3.2 and 3.5: the matching approximation is the block, and preconditions as it does;
    the other is not.
    """
    sizes = [P, *[H] * (depth - 1), C]
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    model = Tokenwise(*layers, pool=setting == "reduce")
    x = torch.randn(8, *sharing, P) + 0.5
    y = torch.randn(8, *sharing, C) if setting == "expand" else torch.randn(8, C)
    result = approximation_error(model, MSE, (x, y), var=covariance(C), damping=1e-12)
    other = {"expand": "reduce", "reduce": "expand"}[setting]
    assert [row.name for row in result.rows] == [f"layers.{i}" for i in range(depth)]
    for row in result.rows:
        assert row.error[setting] < 1e-10
        assert row.error[other] > 0.05
        # Behind another layer, B has the rank of the logits and there is nothing but damping left.
        if depth == 1:
            assert row.cosine[setting] > 1 - 1e-6
            assert row.cosine[other] < 0.999


@pytest.mark.parametrize("strategy", ["expand", "reduce"])
def test_both_are_exact_without_sharing(strategy: str):
    model, x, y = Tokenwise(nn.Linear(P, H), nn.Linear(H, C)), torch.randn(N, P), torch.randn(N, C)
    for row in approximation_error(model, MSE, (x, y), compare=[strategy]).rows:
        assert list(row.error) == [strategy]
        assert row.error[strategy] < 1e-10


# --------------------------------------------------------------- where neither is: the dense values


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


def mlp(pool: bool) -> nn.Module:
    return Tokenwise(nn.Linear(P, H), nn.Tanh(), nn.Linear(H, C), pool=pool)


CASES: dict[str, Any] = {
    "mlp_expand": (lambda: mlp(False), (N, R, P), (N, R)),
    "mlp_reduce": (lambda: mlp(True), (N, R, P), (N,)),
    "mlp_no_sharing": (lambda: mlp(False), (N, P), (N,)),
    "attention_expand": (lambda: SelfAttention(4, C), (N, R, 4), (N, R)),
    "attention_reduce": (lambda: SelfAttention(4, C, pool=True), (N, R, 4), (N,)),
    "conv": (ConvNet, (N, 2, 5, 4), (N,)),
}


@pytest.mark.parametrize("loss_type", [CE, MSE, BCE])
@pytest.mark.parametrize("case", list(CASES))
def test_errors_and_cosines_are_those_of_the_oracles_blocks(case: str, loss_type: str):
    make, input_sizes, target_sizes = CASES[case]
    model, x, y = make(), torch.randn(input_sizes) + 0.3, targets_for(loss_type, target_sizes)
    result = approximation_error(model, loss_type, (x, y), damping=DAMPING)
    num_terms = torch.Size(target_sizes).numel()
    assert (result.num_examples, result.num_terms, result.damping) == (N, num_terms, DAMPING)
    modules = {
        name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    assert [row.name for row in result.rows] == list(modules)
    loss = mean_loss(loss_type, model(x), y)
    for name, module in modules.items():
        exact = exact_block(model, f"{name}.weight", x, loss_type) / num_terms
        factors = {
            s: scaled(oracle_factors(model, module, x, s, loss_type), N, num_terms)
            for s in ("expand", "reduce")
        }
        (grad,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
        assert_row(result[name], *expected(exact, factors, grad.flatten()))
        assert result[name].weight_sizes == (module.weight.shape[0], module.weight[0].numel())
        assert result[name].type == type(module).__name__


def test_labels_that_are_left_out_are_no_terms():
    """``ignore_index`` and NaN labels are no loss terms: a term's weight is 0."""
    model, x = mlp(False), torch.randn(N, R, P)
    y = torch.randint(C, (N, R))
    y[0, 1:] = y[3] = -100
    used = y.ne(-100)
    result = approximation_error(model, CE, (x, y), damping=DAMPING)
    assert result.num_terms == used.sum() < N * R
    loss = F.cross_entropy(model(x)[used], y[used])
    for index in (0, 2):
        module, name = model.layers[index], f"layers.{index}"
        exact = exact_block(model, f"{name}.weight", x, CE, weight=used.double()) / used.sum()
        factors = {
            s: scaled(
                oracle_factors(model, module, x, s, CE, weight=used.double()), N, int(used.sum())
            )
            for s in ("expand", "reduce")
        }
        (grad,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
        assert_row(result[name], *expected(exact, factors, grad.flatten()))

    y = torch.randint(2, (N, C)).double()
    y[0], y[2:4] = math.nan, math.nan  # whole rows, which are terms
    model, rest = mlp(True), torch.tensor([1, 4, 5])
    found = approximation_error(model, BCE, (x, y), damping=DAMPING)
    exact = exact_block(model, "layers.0.weight", x[rest], BCE)
    for strategy in ("expand", "reduce"):
        all_inputs = oracle_factors(model, model.layers[0], x, strategy, BCE)
        labelled = oracle_factors(model, model.layers[0], x[rest], strategy, BCE)
        block = Factors(all_inputs.A / N, labelled.B).block
        assert found["layers.0"].error[strategy] == pytest.approx(rel_error(block, exact), rel=1e-8)


def test_soft_labels_and_a_loss_of_the_users():
    model, x, y = mlp(True), torch.randn(N, R, P), torch.softmax(torch.randn(N, C), -1)
    soft = approximation_error(model, CE, (x, y))
    own = approximation_error(
        model, CE, (x, y), loss=lambda z, t: F.cross_entropy(z, t, reduction="sum")
    )
    assert own.num_terms == 1  # what a sum averages over
    grad = torch.autograd.grad(F.cross_entropy(model(x), y), model.layers[0].weight)[0].flatten()
    exact = exact_block(model, "layers.0.weight", x, CE)
    for result, terms in ((soft, N), (own, 1)):
        factors = {
            s: scaled(oracle_factors(model, model.layers[0], x, s, CE), N, terms)
            for s in ("expand", "reduce")
        }
        assert_row(result["layers.0"], *expected(exact / terms, factors, grad, 1e-3))


def test_padded_sequences_count_at_their_own_length():
    """Padded sequences: every example at its own length, by a loop over single examples."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(P, H), nn.Linear(H, C)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.second(torch.tanh(self.first(x)))
            if mask is None:
                return y.mean(1)
            return (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    model, x, y = Pooled(), torch.randn(N, R, P), torch.randint(C, (N,))
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    mask = torch.arange(R) < lengths.unsqueeze(1)
    with asdl_ws_plugin.padding(model, mask):
        result = approximation_error(model, CE, ({"x": x, "mask": mask}, y))
    for name in ("first", "second"):
        module = model.get_submodule(name)
        alone = [x[n : n + 1, : lengths[n]] for n in range(N)]
        exact = sum(exact_block(model, f"{name}.weight", part, CE) for part in alone)
        reduce = [oracle_factors(model, module, part, "reduce", CE) for part in alone]
        expand = [oracle_factors(model, module, part, "expand", CE) for part in alone]
        share = lengths / lengths.sum()  # ragged expand: every row counts the same
        blocks = {
            "reduce": Factors(sum(f.A for f in reduce) / N, sum(f.B for f in reduce)),
            "expand": Factors(
                sum(f.A * s for f, s in zip(expand, share, strict=True)), sum(f.B for f in expand)
            ),
        }
        for strategy, factors in blocks.items():
            assert result[name].error[strategy] == pytest.approx(
                rel_error(factors.block, exact), rel=1e-8
            )


def test_projections_of_converted_attention():
    """A block of ``in_proj_weight`` is the exact block of its rows."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.attn(x, x, x)[0])).mean(1)

    model, x, y = Model(), torch.randn(N, R, 4), torch.randint(C, (N,))
    full = exact_block(model, "attn.in_proj_weight", x, CE) / N
    (full_grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.attn.in_proj_weight)
    with pytest.raises(ValueError, match=r"'attn\.out_proj': it was not called"):
        approximation_error(model, CE, (x, y), ["attn"])
    result = approximation_error(asdl_ws_plugin.convert(model), CE, (x, y), damping=DAMPING)
    assert [row.name for row in result.rows] == [
        "attn.out_proj",
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "head",
    ]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(16 * i, 16 * (i + 1))
        factors = {
            s: scaled(oracle_factors(model, model.attn.get_submodule(name), x, s, CE), N, N)
            for s in ("expand", "reduce")
        }
        grad = full_grad.flatten()[rows]
        errors, cosines = expected(full[rows, rows], factors, grad)
        row = result[f"attn.{name}"]
        if (
            name == "k_proj"
        ):  # a softmax does not see what all keys have in common: reduce's B is zero
            assert row.error["reduce"] == pytest.approx(1.0)
            errors.pop("reduce"), cosines.pop("reduce")
        assert {s: row.error[s] for s in errors} == pytest.approx(errors, rel=1e-8)
        assert {s: row.cosine[s] for s in cosines} == pytest.approx(cosines, rel=1e-8)


def test_a_sequence_first_model_has_the_errors_of_batch_first():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).mean(0)

    model, x, y = SequenceFirst(), torch.randn(N, R, P), torch.randint(C, (N,))
    found = approximation_error(model, CE, (x, y))

    class BatchFirst(SequenceFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    other = BatchFirst()
    other.load_state_dict(model.state_dict())
    exact = exact_block(other, "inner.layers.0.weight", x, CE)
    for strategy in ("expand", "reduce"):
        factors = oracle_factors(other, other.inner.layers[0], x, strategy, CE)
        assert found["inner.layers.0"].error[strategy] == pytest.approx(
            rel_error(scaled(factors, N, 1).block, exact), rel=1e-8
        )
    square = torch.randn(R, R, P)
    said = approximation_error(model, CE, (square, y[:R]), rules=[("inner", "sequence_first")])
    block = scaled(oracle_factors(other, other.inner.layers[0], square, "reduce", CE), R, 1).block
    exact = exact_block(other, "inner.layers.0.weight", square, CE)
    assert said["inner.layers.0"].error["reduce"] == pytest.approx(
        rel_error(block, exact), rel=1e-8
    )


# --------------------------------------------------------------------------------------------- data


def test_batches_and_groups_are_parts_of_one():
    model, x, y = mlp(True), torch.randn(N, R, P), torch.randint(C, (N,))
    whole = approximation_error(model, CE, (x, y))
    parts = [(x[:2], y[:2]), [x[2:], y[2:]]]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    for other in (
        approximation_error(model, CE, parts),
        approximation_error(model, CE, iter(parts)),
        approximation_error(model, CE, loader),
        approximation_error(model, CE, (x, y), max_weights=20),  # no two of the blocks at once
    ):
        assert other.num_examples == other.num_terms == N
        for row, reference in zip(other.rows, whole.rows, strict=True):
            assert_row(row, reference.error, reference.cosine)


def test_blocks_that_do_not_fit_together_are_computed_one_after_the_other():
    """In passes of their own, which is what keeps the memory for all of them to ``max_weights²``
    numbers.
    """
    model, data = mlp(True), (torch.randn(N, R, P), torch.randint(C, (N,)))  # blocks of 20² and 12²
    calls: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module))
    for max_weights, passes in ((20, 2), (23, 2), (24, 1), (10_000, 1)):
        calls.clear()
        assert len(approximation_error(model, CE, data, max_weights=max_weights).rows) == 2
        assert len(calls) == passes


def test_outputs_that_are_not_tensors():
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(True)

        def forward(self, x: Tensor, scale: float) -> dict[str, Tensor]:
            return {"hidden": x, "logits": self.inner(x) * scale}

    model, x, y = Output(), torch.randn(N, R, P), torch.randint(C, (N,))
    found = approximation_error(model, CE, ((x, 1.0), y))
    by_hand = approximation_error(model, CE, ((x, 1.0), y), logits=lambda output: output["logits"])
    reference = approximation_error(model.inner, CE, (x, y))
    for result in (found, by_hand):
        for row, other in zip(result.rows, reference.rows, strict=True):
            assert_row(row, other.error, other.cosine)


def test_layers_are_chosen_as_asdl_does_it():
    model, x, y = SelfAttention(4, C, pool=True), torch.randn(N, R, 4), torch.randint(C, (N,))
    whole = approximation_error(model, CE, (x, y))

    def chosen(*keys: Any) -> list[str]:
        result = approximation_error(model, CE, (x, y), list(keys))
        for row in result.rows:
            assert_row(row, whole[row.name].error, whole[row.name].cosine)
        return [row.name for row in result.rows]

    assert chosen("q") == ["q"]
    assert chosen(model.out, "k") == ["out", "k"]
    assert chosen(nn.Linear) == ["q", "k", "v", "out"]
    with pytest.raises(KeyError):
        whole["missing"]


# ------------------------------------------------------------------------------- nothing is changed


def test_the_model_is_as_before():
    model = nn.Sequential(
        nn.Linear(P, H), nn.BatchNorm1d(H).eval(), nn.Dropout(0.5), nn.Linear(H, C)
    )
    model[0].weight.grad = torch.ones_like(model[0].weight)
    handle = model[0].register_forward_hook(lambda *_: None)
    x, y = torch.randn(N, P), torch.randint(C, (N,))
    model(x).sum()  # the dropout draws
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    approximation_error(model, CE, (x, y))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(H, P)) and model[3].weight.grad is None
    assert [m.training for m in model] == [True, False, True, True]
    assert list(model[0]._forward_hooks) == [handle.id] and not model[3]._forward_hooks
    assert not any(hasattr(m, "fisher") for m in model)


# ---------------------------------------------------------------------------------------- bad input


def test_what_is_left_out_and_what_is_refused():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(P, H), nn.Linear(H, 40)
            self.norm, self.frozen, self.unused = (
                nn.LayerNorm(40),
                nn.Linear(40, H),
                nn.Linear(H, H),
            )
            self.frozen.weight.requires_grad_(False)
            self.grouped = nn.Conv2d(2, 2, 1, groups=2)
            self.elsewhere, self.head = nn.Linear(H, H), nn.Linear(H, C)

        def forward(self, x: Tensor) -> Tensor:
            x = self.frozen(self.norm(self.large(torch.tanh(self.small(x)))))
            x = self.grouped(torch.stack([x, x], 1).unsqueeze(-1))[:, 0, :, 0]
            x = self.elsewhere(x) + F.linear(torch.tanh(x), self.elsewhere.weight)
            return self.head(x)

    model, x, y = Model(), torch.randn(N, P), torch.randint(C, (N,))
    result = approximation_error(model, CE, (x, y), max_weights=100)
    assert [row.name for row in result.rows] == ["small", "head"]
    for name, reason in {
        "large": "160 weights",
        "frozen": "frozen",
        "unused": "was not called",
        "grouped": "2 groups",
        "elsewhere": "without calling it",
    }.items():
        assert reason in result.skipped[name]
        with pytest.raises(ValueError, match=reason):
            approximation_error(model, CE, (x, y), [name], max_weights=100)
    assert set(result.skipped) == {"large", "frozen", "unused", "grouped", "elsewhere"}
    with pytest.raises(ValueError, match=r"matches no layer.*'small'"):
        approximation_error(model, CE, (x, y), ["smal1"], max_weights=100)


def test_arguments_that_make_no_sense_are_refused():
    model, data = mlp(True), (torch.randn(N, R, P), torch.randint(C, (N,)))
    for error, match, arguments in (
        (TypeError, "torch.nn.Module", (print, CE, data)),
        (ValueError, "loss_type", (model, "hinge", data)),
        (TypeError, "iterable", (model, CE, 3)),
        (ValueError, "no batches", (model, CE, [])),
        (TypeError, "inputs, targets", (model, CE, [torch.ones(3)])),
        (TypeError, "inputs, targets", (model, CE, (data[0],))),
    ):
        with pytest.raises(error, match=match):
            approximation_error(*arguments)
    for match, options in (
        ("compare", {"compare": ["both"]}),
        ("compare", {"compare": []}),
        ("compare", {"compare": "expand"}),
        ("damping", {"damping": -1.0}),
        ("damping", {"damping": math.nan}),
        ("unknown value", {"rules": ["x"]}),
    ):
        with pytest.raises(ValueError, match=match):
            approximation_error(model, CE, data, **options)
    with pytest.raises(ValueError, match="no layer to compare"):
        approximation_error(model, CE, data, max_weights=1)
    with pytest.raises(torch.linalg.LinAlgError, match=r"Layer 'layers\.0'.*Increase damping"):
        approximation_error(model, CE, data, damping=0.0)
    with pytest.raises(FloatingPointError, match="loss is"):
        approximation_error(model, CE, (data[0], torch.full((N,), -100)))


def test_batch_normalization_in_training_mode_is_refused():
    """There is no block of an example where its logits depend on the others; in evaluation mode
    there is.
    """
    model = nn.Sequential(nn.Linear(P, H), nn.BatchNorm1d(H), nn.Linear(H, C))
    x, y = torch.randn(N, P), torch.randint(C, (N,))
    with pytest.raises(ValueError, match=r"Module '1' \(BatchNorm1d\).*eval"):
        approximation_error(model, CE, (x, y))
    row = approximation_error(model.eval(), CE, (x, y))["0"]
    block = scaled(oracle_factors(model, model[0], x, "reduce", CE), N, 1).block
    assert row.error["reduce"] == pytest.approx(
        rel_error(block, exact_block(model, "0.weight", x, CE)), rel=1e-8
    )


# ----------------------------------------------------------------------------------- size and print

LARGE = """
import torch
import asdl_ws_plugin


def peak():  # of this program; getrusage would begin with that of the process that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(inputs, outputs, damping):
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, outputs), torch.nn.Tanh(), torch.nn.Linear(outputs, 3)
    )
    data, before = (torch.randn(8, 2, inputs), torch.randint(3, (8, 2))), peak()
    result = asdl_ws_plugin.approximation_error(
        model, "cross_entropy", data, ["0"], damping=damping
    )
    assert all(0 < error < 1.5 for error in result["0"].error.values()), result
    print((peak() - before) / (4 * (inputs * outputs) ** 2))
    return result["0"].cosine


torch.manual_seed(0)
torch.linalg.cholesky(torch.eye(50) + torch.ones(50, 50))
measure(10, 10, 1e-3)
assert all(0 < cosine <= 1 for cosine in measure(60, 60, 1e-3).values())
assert measure(100, 100, None) == {}
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)
def test_a_layer_of_10000_weights_needs_memory_for_one_block():
    """Its block takes 400 MB in float32; buffers are small beside it. The Cholesky factor, tried at
    3,600 weights to be quick, takes the block's place.

    What the allocator and BLAS hold on to besides differs from run to run, and only adds to the
    peak: the least counts.
    """
    solved = large = math.inf
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", LARGE], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        _, *found = map(float, done.stdout.split())
        solved, large = min(solved, found[0]), min(large, found[1])
        if solved < 1.7 and large < 1.2:
            break
    assert 0.9 < solved < 1.8  # a copy would make it 2.3
    assert 0.7 < large < 1.3  # some of the first one's memory is used again


def test_prints_as_a_table(monkeypatch: pytest.MonkeyPatch):
    result = approximation_error(
        mlp(True), CE, (torch.randn(N, R, P), torch.randint(C, (N,))), max_weights=15
    )
    console = Console(record=True, width=120)
    console.print(result)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
    plain = str(result)
    for text in (console.export_text(), plain):
        assert (
            "layers.2" in text
            and "3x4" in text
            and "error, expand" in text
            and "20 weights" in text
        )
        assert f"{result['layers.2'].cosine['reduce']:.4f}" in text and "6 examples" in text
