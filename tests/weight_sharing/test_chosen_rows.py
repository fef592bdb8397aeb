"""Experts: layers whose rows an index chose from all tokens of the batch.

The right values come from a loop over single examples (:mod:`oracles.every_layer`), whose own
tokens are routed as in the batch: a router looks at one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import fisher, step
from oracles.every_layer import every_layers_factors, worst_layer
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import WeightSharingLinear
from asdl_ws_plugin.weight_sharing.errors import LayerError

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*not called in this step"),  # an expert without tokens
]

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
N, R, D, C, EXPERTS = 5, 7, 6, 4, 3

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]  # expert, tokens, which are its


def by_number(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    flat, rows = tokens.reshape(-1, D), torch.where(mine.flatten())[0]
    return torch.zeros_like(flat).index_add(0, rows, expert(flat[rows])).view_as(tokens)


def by_index_select(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    flat, rows = tokens.reshape(-1, D), torch.where(mine.flatten())[0]
    chosen = expert(flat.index_select(0, rows))
    return torch.zeros_like(flat).index_add(0, rows, chosen).view_as(tokens)


def behind_a_new_dimension(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    """As Hugging Face's Mixtral had it."""
    flat, rows = tokens.reshape(-1, D), torch.where(mine.flatten())[0]
    chosen = expert(flat[None, rows].reshape(-1, D))
    return torch.zeros_like(flat).index_add(0, rows, chosen).view_as(tokens)


def by_mask(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    out = torch.zeros_like(tokens)
    out[mine] = expert(tokens[mine])
    return out


def by_two_numbers(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    n, r = torch.where(mine)
    out = torch.zeros_like(tokens)
    out[n, r] = expert(tokens[n, r])
    return out


def shuffled(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    flat, rows = tokens.reshape(-1, D), torch.where(mine.flatten())[0].flip(0)
    return torch.zeros_like(flat).index_add(0, rows, expert(flat[rows])).view_as(tokens)


def sequence_first(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
    return by_number(expert, tokens.transpose(0, 1), mine.T).transpose(0, 1)


WAYS: list[Call] = [
    by_number,
    by_index_select,
    behind_a_new_dimension,
    by_mask,
    by_two_numbers,
    shuffled,
    sequence_first,
]


class Mixture(nn.Module):
    """A router sends each token to the best expert, or to the ``top`` best."""

    def __init__(self, call: Call = by_number, top: int = 1, pool: bool = False) -> None:
        super().__init__()
        self.inp, self.router = nn.Linear(D, D), nn.Linear(D, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)) for _ in range(EXPERTS)
        )
        self.head, self.call, self.top, self.pool = nn.Linear(D, C), call, top, pool

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        shares, which = self.router(h).softmax(-1).topk(self.top)
        for e, expert in enumerate(self.experts):
            mine = which == e
            share = (shares * mine).sum(-1, keepdim=True)
            if mine.any():
                h = h + share * self.call(expert, h, mine.any(-1))
        return self.head(h.mean(1) if self.pool else h)


def loss_of(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def batch(model: Mixture, n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, R, D), torch.randint(C, (n,) if model.pool else (n, R))


def assert_right(model: Mixture, x: Tensor, y: Tensor, shared_dim: str) -> None:
    """All layers' factors are those of single examples, the empirical Fisher of ``loss_of``."""

    def summed_loss(n: int) -> Tensor:
        return loss_of(model(x[n : n + 1]), y[n : n + 1]) * y[n].numel()

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = every_layers_factors({k: [m] for k, m in layers.items()}, summed_loss, len(x), True)
    seen = {name: layers[name] for name in expected}
    assert len(seen) >= len(layers) - 2
    error, where = worst_layer(seen, expected, shared_dim, len(y) / y.numel())
    assert error < 1e-10, where


@STRATEGIES
@pytest.mark.parametrize("call", WAYS, ids=lambda call: call.__name__)
def test_factors_of_experts(shared_dim: str, call: Call):
    model = Mixture(call)
    x, y = batch(model)
    fisher(model, shared_dim, loss_of, y, x)
    assert_right(model, x, y, shared_dim)


@STRATEGIES
@pytest.mark.parametrize("top", [1, 2])
def test_behind_a_mean_of_the_tokens(shared_dim: str, top: int):
    model = Mixture(top=top, pool=True)
    x, y = batch(model)
    fisher(model, shared_dim, loss_of, y, x)
    assert_right(model, x, y, shared_dim)


@STRATEGIES
def test_whatever_the_number_of_tokens_on_every_batch(shared_dim: str):
    """The last expert gets none on the first batches; others happen to get N or 2N tokens."""
    model = Mixture()
    maker: Any = None
    with torch.no_grad():
        model.router.bias[-1] = -9.0
    counts = set()
    for k in range(12):
        if k == 4:
            with torch.no_grad():
                model.router.bias[-1] = 0.0
        x, y = batch(model)
        if maker is None:
            maker = fisher(model, shared_dim, loss_of, y, x)
        else:
            step(maker, loss_of, y, x)
        assert_right(model, x, y, shared_dim)
        which = model.router(torch.tanh(model.inp(x))).argmax(-1)
        counts |= set(torch.bincount(which.flatten(), minlength=EXPERTS).tolist())
    assert 0 in counts and any(count % N == 0 for count in counts - {0})


@STRATEGIES
def test_a_first_batch_on_which_an_expert_gets_as_many_tokens_as_there_are_examples(
    shared_dim: str,
):
    def first_rows(expert: nn.Module, tokens: Tensor, mine: Tensor) -> Tensor:
        rows = torch.arange(R) < (N if len(tokens) == N else R)  # of the first example alone
        rows = rows & (torch.arange(len(tokens)) == 0).unsqueeze(1)
        return by_mask(expert, tokens, rows)

    model = Mixture(first_rows)
    x, y = batch(model)
    fisher(model, shared_dim, loss_of, y, x)
    rows = torch.tanh(model.inp(x))[0, :N]
    rows = rows if shared_dim == "expand" else rows.mean(0, keepdim=True)
    torch.testing.assert_close(model.experts[0][0].fisher.kron.A, rows.mT @ rows / N)


@STRATEGIES
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact"])
def test_padding_enters_no_factor_of_an_expert(shared_dim: str, fisher_type: str):
    """The factors are those of the batch without its padding, given as examples of their own."""
    model, (x, y) = Mixture(), (torch.randn(N, R, D), torch.randint(C, (N, R)))
    lengths = torch.tensor([7, 3, 5, 7, 2])
    mask = torch.arange(R) < lengths.unsqueeze(1)
    y[~mask] = -100

    def factors(x: Tensor) -> list[Tensor]:
        with asdl_ws_plugin.padding(model, mask):
            fisher(model, shared_dim, loss_of, y, x, fisher_type=fisher_type)
        kron = [expert[k].fisher.kron for expert in model.experts for k in (0, 2)]
        return [matrix for one in kron for matrix in (one.A, one.B)]

    clean, other = factors(x), factors(x.where(mask.unsqueeze(-1), 50 * torch.randn(N, R, D)))
    for a, b in zip(clean, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    which = model.router(torch.tanh(model.inp(x))).argmax(-1)
    rows = torch.tanh(model.inp(x))[(which == 0) & mask]
    if shared_dim == "expand":
        torch.testing.assert_close(factors(x)[0], rows.mT @ rows / len(rows))


def test_forgotten_padding_is_noticed_and_the_remedy_works():
    class Masked(Mixture):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    model, x, y = Masked(), torch.randn(N, R, D), torch.randint(C, (N, R))
    mask = torch.arange(R) < torch.tensor([7, 3, 5, 7, 2]).unsqueeze(1)
    y[~mask] = -100
    with pytest.warns(UserWarning, match=r"count in the factors A.*attach_padding"):
        fisher(model, "expand", loss_of, y, x, mask)
    asdl_ws_plugin.attach_padding(model, "attention_mask")
    fisher(model, "expand", loss_of, y, x, mask)
    which = model.router(torch.tanh(model.inp(x))).argmax(-1)
    rows = torch.tanh(model.inp(x))[(which == 0) & mask]
    A = model.experts[0][0].fisher.kron.A
    torch.testing.assert_close(A, rows.mT @ rows / len(rows))


@STRATEGIES
def test_an_index_of_something_else_says_nothing(shared_dim: str):
    """Rows of a table, as many as tokens: their number, not the table's index, tells whose."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2 * N, D))
            self.layer, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.arange(R).repeat(len(x))
            h = torch.tanh(self.layer(self.table[ids] * x.flatten(0, 1)))
            return self.head(h.view(len(x), R, D))

    model, x, y = Lookup(), torch.randn(N, R, D), torch.randint(C, (N, R))
    fisher(model, shared_dim, loss_of, y, x)
    a = model.table[torch.arange(R)] * x
    a = a.flatten(0, 1) * R**-0.5 if shared_dim == "expand" else a.mean(1)
    torch.testing.assert_close(model.layer.fisher.kron.A, a.mT @ a / N)


@STRATEGIES
def test_from_a_loop_that_calls_backward_itself(shared_dim: str):
    model = Mixture()
    config = asdl_ws_plugin.recommended(graft=False)
    options: dict[str, Any] = {"shared_dim": shared_dim, "fisher_type": "fisher_emp"}
    prec = asdl_ws_plugin.Preconditioner(model, config, **options)
    for _ in range(3):
        x, y = batch(model)
        model.zero_grad()
        loss_of(model(x), y).backward()
        prec.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert hasattr(model.experts[0][0], "fisher")


def test_which_of_two_masks_is_refused_and_one_alone_is_right():
    model, x, y = Mixture(), torch.randn(N, R, D), torch.randint(C, (N, R))
    mask = torch.arange(R) < torch.tensor([7, 3, 5, 7, 2]).unsqueeze(1)
    ignored = ["inp", "router", "head"]  # theirs is another question
    both = asdl_ws_plugin.padding(model, {"source": mask, "target": mask.flip(0)})
    with both, pytest.raises(LayerError, match=r"some of which may be padding.*padding\(model"):
        fisher(model, "expand", loss_of, y, x, ignore=ignored)
    y[~mask] = -100
    with asdl_ws_plugin.padding(model, mask):
        fisher(model, "expand", loss_of, y, x, ignore=ignored)


def test_a_graphs_rows_are_never_an_equal_share_of_those_that_an_index_chose_from():
    """Twelve nodes are no three for each of four graphs, though the first batch may look so."""

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes, self.some, self.head = (
                WeightSharingLinear(D, D),
                nn.Linear(D, D),
                nn.Linear(D, C),
            )

        def forward(self, x: Tensor, owner: Tensor) -> Tensor:
            h = torch.tanh(self.nodes(x))
            h = h.index_add(0, torch.arange(5), self.some(h[torch.arange(5)]))
            return self.head(torch.zeros(4, D).index_add(0, owner, h))

    model, x, y = Graphs(), torch.randn(12, D), torch.randint(C, (4,))
    model.nodes.set_segments(torch.arange(4).repeat_interleave(3), num_examples=4)
    with pytest.raises(LayerError, match=r"'some'.*segments\(model"):
        fisher(model, "reduce", loss_of, y, x, torch.arange(4).repeat_interleave(3))
