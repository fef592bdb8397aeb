"""Which rows belong to which example, where sizes alone do not tell or tell it wrongly.

The right values come from a loop over single examples (:mod:`oracles.by_example`), or from the
inputs where a loop cannot have them.
"""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import assert_factors, empirical_factors, fisher, kfac, step
from oracles.every_layer import every_layers_factors, worst_layer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import asdl_ws_plugin

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
N, R, D, C = 8, 5, 4, 3


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def token_ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


# ------------------------------------------------------- a first argument that is not the batch


class NodeClassifier(nn.Module):
    """Each node is an example; ``e`` are edges."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, C)

    def forward(self, e: Tensor, x: Tensor) -> Tensor:
        return self.layer(x + torch.zeros_like(x).index_add(0, e[1], x[e[0]]))


@STRATEGIES
@pytest.mark.parametrize("num_edges", [30, 7])
def test_edges_come_first(shared_dim: str, num_edges: int):
    model, x, e = NodeClassifier(), torch.randn(12, D), torch.randint(0, 12, (2, num_edges))
    y = torch.randint(C, (12,))
    fisher(model, shared_dim, ce, y, e, x)
    seen = x + torch.zeros_like(x).index_add(0, e[1], x[e[0]])
    expected = empirical_factors(
        model.layer,
        lambda n: F.cross_entropy(model.layer(seen[n : n + 1]), y[n : n + 1]),
        12,
        shared_dim,
    )
    A, B = model.layer.fisher.kron.A, model.layer.fisher.kron.B
    assert torch.allclose(A, expected[0], rtol=1e-10) and torch.allclose(B, expected[1], rtol=1e-10)


class WithTable(nn.Module):
    """A table of constants is the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x + table.mean(0))))


@STRATEGIES
def test_a_table_comes_first(shared_dim: str):
    model, table, x, y = (
        WithTable(),
        torch.randn(2, D),
        torch.randn(N, D),
        torch.randint(C, (N,)),
    )
    fisher(model, shared_dim, ce, y, table, x)
    for layer in (model.layer, model.head):
        expected = empirical_factors(
            layer, lambda n: ce(model(table, x[n : n + 1]), y[n : n + 1]), N, shared_dim
        )
        assert_factors(layer, expected)


# ---------------------------------------------------------------------- inputs that are no batch


class Positions(nn.Module):
    """A constant with ``rows`` rows goes through a layer of its own."""

    def __init__(self, rows: int, has_dim: bool) -> None:
        super().__init__()
        self.constant = torch.randn(1, rows, 2) if has_dim else torch.randn(rows, 2)
        self.pos, self.inp, self.head = nn.Linear(2, 6), nn.Linear(D, 6), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inp(x).unsqueeze(1) + self.pos(self.constant))
        return self.head(y.mean(1))


@STRATEGIES
@pytest.mark.parametrize("has_dim", [True, False])
@pytest.mark.parametrize("rows", [N, 5, 1, 2 * N])
def test_constants_are_left_out_whatever_their_number(shared_dim: str, has_dim: bool, rows: int):
    model, x, y = Positions(rows, has_dim), torch.randn(N, D), torch.randint(C, (N,))
    maker = fisher(model, shared_dim, ce, y, x)
    assert not hasattr(model.pos, "fisher")
    assert "the same for every example" in maker.plan.skipped["pos"]
    assert "left out: pos" in repr(maker.plan)
    for layer in (model.inp, model.head):
        expected = empirical_factors(
            layer, lambda n: ce(model(x[n : n + 1]), y[n : n + 1]), N, shared_dim
        )
        assert_factors(layer, expected)


def test_constants_are_left_out_of_later_batches_of_other_sizes():
    model = Positions(N, True)
    maker = kfac(model, "reduce", fisher_type="fisher_emp")
    for size in (N, N - 3, 2 * N):
        step(maker, ce, torch.randint(C, (size,)), torch.randn(size, D))
        assert model.pos.weight.grad is not None
        assert not hasattr(model.pos, "fisher") and hasattr(model.inp, "fisher")


def test_constants_that_are_repeated_for_each_example_have_examples():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = torch.randn(R, 2)
            self.pos, self.inp, self.head = nn.Linear(2, 6), nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x: Tensor) -> Tensor:
            pos = self.pos(self.constant.expand(len(x), -1, -1))
            return self.head(torch.tanh(self.inp(x).unsqueeze(1) + pos).mean(1))

    model, x, y = Net(), torch.randn(N, D), torch.randint(C, (N,))
    fisher(model, "reduce", ce, y, x)
    expected = empirical_factors(
        model.pos, lambda n: ce(model(x[n : n + 1]), y[n : n + 1]), N, "reduce"
    )
    assert_factors(model.pos, expected)


def test_batch_normalization_mixes_examples_and_constants_are_still_told_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = torch.randn(N, 2)
            self.pos, self.inp, self.head = nn.Linear(2, 6), nn.Linear(D, 6), nn.Linear(6, C)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inp(x) + self.pos(self.constant).mean(0)
            return self.head(torch.tanh(self.norm(y)))

    model, x, y = Net(), torch.randn(N, D), torch.randint(C, (N,))
    fisher(model, "reduce", ce, y, x, ignore=[nn.BatchNorm1d])
    assert not hasattr(model.pos, "fisher")
    assert torch.allclose(model.inp.fisher.kron.A, x.T @ x / N, rtol=1e-10)


@STRATEGIES
def test_a_layer_called_on_the_batch_and_on_constants(shared_dim: str):
    """As DeBERTa's keys are: the call on constants adds nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = torch.randn(1, 2 * N, D)
            self.key, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x: Tensor) -> Tensor:
            pos = self.key(self.constant).mean(1, keepdim=True).detach()
            shared = self.key(self.constant).mean(1, keepdim=True)
            return self.head(torch.tanh(self.key(x) + pos + shared).mean(1))

    model, x, y = Net(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = fisher(model, shared_dim, ce, y, x)
    shared = model.key(model.constant).mean(1, keepdim=True).detach()
    expected = empirical_factors(
        model.key,
        lambda n: ce(
            model.head(torch.tanh(model.key(x[n : n + 1]) + 2 * shared).mean(1)), y[n : n + 1]
        ),
        N,
        shared_dim,
    )
    assert_factors(model.key, expected)
    assert "key" not in maker.plan.skipped


# ------------------------------------------------------------------- one object holds the inputs


@dataclass
class Inputs:
    x: Tensor


@dataclass(slots=True)
class Slots:
    x: Tensor


class Outer:
    """Holds the inputs two attributes deep, and itself."""

    def __init__(self, x: Tensor) -> None:
        self.inner, self.name = {"store": [types.SimpleNamespace(x=x)]}, "batch"
        self.itself = self

    @property
    def x(self) -> Tensor:
        return self.inner["store"][0].x


def data(x: Tensor) -> Any:
    return pytest.importorskip("torch_geometric.data").Data(x=x)


def batch_of_graphs(x: Tensor) -> Any:
    """Each node is a graph of its own."""
    geometric = pytest.importorskip("torch_geometric.data")
    return geometric.Batch.from_data_list([geometric.Data(x=row[None]) for row in x])


@STRATEGIES
@pytest.mark.parametrize(
    "wrap", [data, batch_of_graphs, Inputs, Slots, Outer, lambda x: UserDict(x=x)]
)
def test_the_tensors_of_an_object_are_followed_as_if_they_were_arguments(
    shared_dim: str, wrap: Callable[[Tensor], Any]
):
    """Else a constant with as many rows as there are examples is taken for a batch."""

    class Net(Positions):
        def forward(self, held: Any) -> Tensor:
            return super().forward(held["x"] if isinstance(held, UserDict) else held.x)

    model, x, y = Net(N, True), torch.randn(N, D), torch.randint(C, (N,))
    maker = fisher(model, shared_dim, ce, y, wrap(x))
    assert not hasattr(model.pos, "fisher")
    assert "the same for every example" in maker.plan.skipped["pos"]
    plain = Positions.forward
    for layer in (model.inp, model.head):
        expected = empirical_factors(
            layer, lambda n: ce(plain(model, x[n : n + 1]), y[n : n + 1]), N, shared_dim
        )
        assert_factors(layer, expected)


def test_an_object_with_tokens_says_how_many_examples_flattened_logits_are_of():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.head = nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, held: Inputs) -> Tensor:
            return self.head(torch.tanh(self.inp(held.x)).flatten(0, 1))

    model, x, y = Net(), torch.randn(N, R, D), torch.randint(C, (N, R))
    fisher(model, "reduce", lambda z, t: F.cross_entropy(z, t.flatten()), y, Inputs(x), data_size=N)
    for layer in (model.inp, model.head):
        expected = empirical_factors(
            layer,
            lambda n: F.cross_entropy(model(Inputs(x[n : n + 1])), y[n], reduction="sum"),
            N,
            "reduce",
        )
        assert_factors(layer, expected)


def test_what_an_object_hides_is_not_taken_for_constant():
    """Arrays are no tensors: nothing is known of what is made of them, and sizes decide."""

    class Net(Positions):
        def forward(self, held: Any) -> Tensor:
            self.constant = torch.from_numpy(held.array)
            return super().forward(held.x)

    model, x, y = Net(N, False), torch.randn(N, D), torch.randint(C, (N,))
    array = torch.randn(N, 2).numpy()
    fisher(model, "expand", ce, y, types.SimpleNamespace(x=x, array=array))
    assert hasattr(model.pos, "fisher")


# --------------------------------------- rows that sizes give to examples, and the graph to others


class Rows(nn.Module):
    """A layer whose rows are pooled for each example, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, 6), nn.Linear(6, C)

    def pooled(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(x))


class OneByOne(Rows):
    """One call for each example."""

    def pooled(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.layer(one)).mean(0) for one in x])


class InChunks(Rows):
    """Two calls, of half of the batch each: ``(N/2, R, D)``."""

    def pooled(self, x: Tensor) -> Tensor:
        return torch.cat([super(InChunks, self).pooled(part) for part in x.split(N // 2)])


class BatchLast(Rows):
    """``(R, R, N, D)`` of all pairs of positions."""

    def pooled(self, x: Tensor) -> Tensor:
        pairs = (x.unsqueeze(1) * x.unsqueeze(2)).permute(1, 2, 0, 3)
        return torch.tanh(self.layer(pairs)).mean((0, 1))


class Packed(Rows):
    """Examples of different lengths, sorted by them, without their padding."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        seen = rows._replace(data=torch.tanh(self.layer(rows.data)))
        return self.head(pad_packed_sequence(seen, batch_first=True)[0].sum(1))


@pytest.mark.parametrize("kind", [OneByOne, InChunks, BatchLast])
def test_rows_of_other_examples_than_sizes_say_are_refused(kind: type[Rows]):
    """R = N, so that sizes fit; they were taken for what they are not, without a word."""
    model, x, y = kind(), torch.randn(N, N, D), torch.randint(C, (N,))
    message = "layer'.* whose logits each of them reaches.*whole batch at once.*ignore_modules"
    with pytest.raises(ValueError, match=message):
        fisher(model, "reduce", ce, y, x)
    maker = fisher(model, "reduce", ce, y, x, ignore=["layer"])
    assert maker.plan.layers[0].module is model.head
    expected = empirical_factors(
        model.head, lambda n: ce(Rows.forward(model, x[n : n + 1]), y[n : n + 1]), N, "reduce"
    )
    if kind is not BatchLast:  # whose pairs are no rows of Rows
        assert_factors(model.head, expected)


@pytest.mark.parametrize("kind", [OneByOne, InChunks])
def test_whose_rows_they_are_does_not_matter_to_expand(kind: type[Rows]):
    model, x, y = kind(), torch.randn(N, N, D), torch.randint(C, (N,))
    fisher(model, "expand", ce, y, x)
    expected = empirical_factors(
        model.layer, lambda n: ce(Rows.forward(model, x[n : n + 1]), y[n : n + 1]), N, "expand"
    )
    assert_factors(model.layer, expected)


@STRATEGIES
@pytest.mark.parametrize("lengths", [[3, 4, 2, 3], [3, 4, 3, 2], [4, 3, 2, 3]])
def test_a_packed_batch_of_as_many_rows_as_a_dense_one_is_refused(
    shared_dim: str, lengths: list[int]
):
    """12 rows of 4 examples, and those of the first and the last example are where they were if
    all had 3.
    """
    model, x, y = Packed(), torch.randn(4, 4, D), torch.randint(C, (4,))
    with pytest.raises(ValueError, match="'layer': its 12 rows are not 3 consecutive rows"):
        fisher(model, shared_dim, ce, y, x, torch.tensor(lengths))


@STRATEGIES
def test_a_packed_batch_of_one_length_is_read_off_the_graph(shared_dim: str):
    model, x, y = Packed(), torch.randn(4, 3, D), torch.randint(C, (4,))
    lengths = torch.full((4,), 3)
    fisher(model, shared_dim, ce, y, x, lengths)
    expected = empirical_factors(
        model.layer, lambda n: ce(model(x[n : n + 1], lengths[:1]), y[n : n + 1]), 4, shared_dim
    )
    assert_factors(model.layer, expected)


class Reversed(Rows):
    """Every row is one example's, in another order than the logits'."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x)).flip(0)
        return super().forward(x[order])[order]


class Dead(Rows):
    """The last example has no gradient at the layer, as behind a dead ReLU."""

    def pooled(self, x: Tensor) -> Tensor:
        alive = torch.arange(N)[-len(x) :] < N - 1 if len(x) == N else x[:, :1, 0] < torch.inf
        return super().pooled(x) * alive.view(-1, 1)


@STRATEGIES
@pytest.mark.parametrize("length", [N, R, 2 * N])
def test_examples_in_another_order_are_examples(shared_dim: str, length: int):
    model, x, y = Reversed(), torch.randn(N, length, D), torch.randint(C, (N,))
    fisher(model, shared_dim, ce, y, x)
    for layer in (model.layer, model.head):
        expected = empirical_factors(
            layer, lambda n: ce(model(x[n : n + 1]), y[n : n + 1]), N, shared_dim
        )
        assert_factors(layer, expected)


@pytest.mark.parametrize("length", [N, R])
def test_an_example_without_a_gradient_contradicts_nothing(length: int):
    model, x, y = Dead(), torch.randn(N, length, D), torch.randint(C, (N,))
    fisher(model, "reduce", ce, y, x)
    assert_factors(model.layer, (mean_of_outer(x.mean(1)), model.layer.fisher.kron.B))


@pytest.mark.parametrize("length", [2 * N, R])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_examples_that_are_mixed_two_by_two_are_still_examples(length: int, share: float):
    """As mixup inside of a model does it: rows are of the example whose place they have."""

    class Mixed(Rows):
        def forward(self, x: Tensor) -> Tensor:
            y = self.pooled(x)
            return self.head((1 - share) * y + share * y.roll(1, 0))

    model, x, y = Mixed(), torch.randn(N, length, D), torch.randint(C, (N,))
    fisher(model, "reduce", ce, y, x)
    assert_factors(model.layer, (mean_of_outer(x.mean(1)), model.layer.fisher.kron.B))


def mean_of_outer(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


# --------------------------------------------------------------------- calls that nothing reaches


class Teacher(nn.Module):
    """The layer's first call is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        teacher = self.layer(3 * x).detach()
        return self.head(torch.tanh(self.layer(x)) + 0 * teacher)


class Identity(nn.Module):
    """A product with an identity, as DoRA makes it of its adapters, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.layer(torch.eye(D)).detach().norm()
        return self.head(torch.tanh(self.layer(x) / norm))


class Unused(nn.Module):
    """The second call's output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.layer(x)))
        self.layer(x.repeat(3, 1))
        return y


@STRATEGIES
@pytest.mark.parametrize("model_class", [Teacher, Identity, Unused])
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact"])
def test_calls_that_no_gradient_reaches_do_not_count(
    shared_dim: str, model_class: type[nn.Module], fisher_type: str
):
    model, x, y = model_class(), torch.randn(N, D), torch.randint(C, (N,))
    for _ in range(2):  # not on the first batch alone
        fisher(model, shared_dim, ce, y, x, fisher_type=fisher_type)
        A = model.layer.fisher.kron.A
        assert torch.allclose(A, x.T @ x / N, rtol=1e-10)


# --------------------------------------------------------------------------------- views of a batch


class Siamese(nn.Module):
    """Two views of each example, in two copies of the batch."""

    def __init__(self, consecutive: bool = False) -> None:
        super().__init__()
        self.layer, self.consecutive = nn.Linear(D, C), consecutive

    def forward(self, x: Tensor) -> Tensor:
        views = torch.stack([x, x.flip(1)], dim=1 if self.consecutive else 0)
        return self.layer(views.flatten(0, 1))


def test_two_views_of_a_batch_are_refused_until_their_order_is_said():
    model, x, y = Siamese(), torch.randn(N, D), torch.randint(C, (2 * N,))
    with pytest.raises(ValueError, match=r"'layer'.*16 rows.*8 examples.*'sequence_first'"):
        fisher(model, "reduce", ce, y, x)


@pytest.mark.parametrize(
    ("consecutive", "layout"), [(False, "sequence_first"), (True, "batch_first")]
)
def test_the_order_of_views_that_was_said(consecutive: bool, layout: str):
    model, x = Siamese(consecutive), torch.randn(N, D)
    y = torch.randint(C, (N,))
    targets = y.repeat_interleave(2) if consecutive else y.repeat(2)
    fisher(model, ["reduce", ("layer", layout)], ce, targets, x)
    expected = empirical_factors(
        model.layer,
        lambda n: F.cross_entropy(model(x[n : n + 1]), y[n].repeat(2), reduction="sum"),
        N,
        "reduce",
    )
    A = model.layer.fisher.kron.A
    assert torch.allclose(A, expected[0], rtol=1e-10)


def test_two_views_do_not_matter_to_expand():
    model, x, y = Siamese(), torch.randn(N, D), torch.randint(C, (2 * N,))
    fisher(model, "expand", ce, y, x)
    views = torch.cat([x, x.flip(1)])
    assert torch.allclose(model.layer.fisher.kron.A, views.T @ views / (2 * N), rtol=1e-10)


# ------------------------------------------------------------------------------ mixtures of experts


class Mixture(nn.Module):
    """The first expert gets all tokens, the second none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, rows in zip(self.experts, (slice(None), slice(0, 0)), strict=True):
            index = torch.arange(len(x))[rows]
            y = y.index_add(0, index, expert(x[index]))
        return self.head(y)


@STRATEGIES
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact", "fisher_mc"])
def test_an_expert_without_tokens_takes_no_part(shared_dim: str, fisher_type: str):
    model, x, y = Mixture(), torch.randn(N, D), torch.randint(C, (N,))
    maker = kfac(model, shared_dim, fisher_type=fisher_type)
    for _ in range(2):
        step(maker, ce, y, x)
    assert not hasattr(model.experts[1], "fisher") and hasattr(model.experts[0], "fisher")
    assert maker.plan.skipped == {}


# --------------------------------------------------------------------- what sizes alone cannot tell


class Attention(nn.Module):
    """Self-attention of one head, over the first or the second dimension."""

    def __init__(self, batch_dim: int, pool: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.head, self.batch_dim, self.pool = nn.Linear(D, C), batch_dim, pool

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._batched(layer(x)) for layer in (self.q, self.k, self.v))
        y = self._batched(torch.softmax(q @ k.mT, -1) @ v)
        y = torch.tanh(self.o(y))
        return self.head(y.mean(1 - self.batch_dim) if self.pool else y)

    def _batched(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.batch_dim else x


@STRATEGIES
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_a_square_batch_is_read_off_the_graph(shared_dim: str, pool: bool, batch_dim: int):
    model, x = Attention(batch_dim, pool), torch.randn(R, R, D)
    y = torch.randint(C, (R,) if pool else (R, R))
    fisher(model, shared_dim, token_ce, y, x, data_size=R)  # warnings are errors

    def one(n: int) -> Tensor:
        targets = y[n] if pool else y.select(batch_dim, n)
        z = model(x.narrow(batch_dim, n, 1))
        return F.cross_entropy(z.reshape(-1, C), targets.reshape(-1), reduction="sum")

    for layer in (model.q, model.k, model.v, model.o):
        expected = empirical_factors(layer, one, R, shared_dim)
        assert torch.allclose(layer.fisher.kron.A, expected[0], rtol=1e-10)


@STRATEGIES
def test_logits_whose_second_dimension_is_the_batch(shared_dim: str):
    model, x, y = Attention(1, False), torch.randn(6, R, D), torch.randint(C, (6, R))
    fisher(model, shared_dim, token_ce, y, x, data_size=R)

    def one(n: int) -> Tensor:
        z = model(x[:, n : n + 1])
        return F.cross_entropy(z.flatten(0, 1), y[:, n], reduction="sum")

    for layer in (model.q, model.v, model.o):
        expected = empirical_factors(layer, one, R, shared_dim)
        assert torch.allclose(layer.fisher.kron.A, expected[0], rtol=1e-10)


class Shuffled(nn.Module):
    """Rows of all examples in an order that no layout has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(N * R, generator=torch.Generator().manual_seed(0))
        rows = torch.tanh(self.layer(x.flatten(0, 1)[order]))
        back = torch.empty_like(order)
        back[order] = torch.arange(N * R)
        return self.head(rows[back].view(N, R, D).mean(1))


def test_rows_in_an_order_that_no_layout_has_are_refused():
    model, x, y = Shuffled(), torch.randn(N, R, D), torch.randint(C, (N,))
    with pytest.raises(ValueError, match=r"'layer'.*40 rows are not 5 consecutive.*segments"):
        fisher(model, "reduce", ce, y, x)


class CausalAttention(nn.Module):
    """The first token attends to itself alone: the gradient of its query is rounding errors, which
    are in proportion as those of a row of some other example may be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, 8) for _ in range(3))
        self.head = nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            of(x).unflatten(-1, (2, 4)).transpose(1, 2) for of in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_are_nobodys_rows(dtype: torch.dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = CausalAttention().to(dtype), torch.randn(N, R, D, dtype=dtype)
        fisher(model, "reduce", token_ce, torch.randint(C, (N, R)), x)
        mean = x.mean(1)
        torch.testing.assert_close(model.query.fisher.kron.A, mean.T @ mean / N)  # type: ignore[union-attr]


def test_the_graph_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    from asdl_ws_plugin.weight_sharing import probe

    asked: list[int] = []
    original = probe.probe
    monkeypatch.setattr(
        probe,
        "probe",
        lambda *a: asked.append(1) or original(*a),  # type: ignore[func-returns-value]
    )
    model = Attention(0, True)
    maker = kfac(model, "reduce", fisher_type="fisher_emp")
    for _ in range(3):
        step(maker, ce, torch.randint(C, (N,)), torch.randn(N, R, D))
    assert len(asked) == 1


def test_a_failed_step_forgets_what_the_graph_said():
    model = Attention(0, True)
    maker = kfac(model, "reduce", fisher_type="fisher_emp")
    x, y = torch.randn(N, R, D), torch.randint(C, (N,))
    with pytest.raises(FloatingPointError):
        step(maker, lambda z, t: ce(z, t) * float("nan"), y, x)
    assert not maker.plan.layouts.is_probed
    step(maker, ce, y, x)
    assert maker.plan.layouts.is_probed


# ------------------------------------------------------------------------------------------ graphs


def test_a_dense_padded_batch_inside_a_graph_model():
    nn_geometric = pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn_geometric.GPSConv(8, None, heads=2, norm=None)
            self.head = nn.Linear(8, C)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
            y = self.conv(x, edge_index, batch)
            return self.head(nn_geometric.global_mean_pool(y, batch, num_graphs))

    model = asdl_ws_plugin.convert(Net())
    asdl_ws_plugin.attach_segments(model)
    batch, x = torch.tensor([0, 0, 1, 1, 1, 1, 1]), torch.randn(7, 8)
    edges = torch.tensor([[0, 2, 3], [1, 3, 4]])
    for _ in range(2):
        fisher(model, "expand", ce, torch.tensor([0, 1]), x, edges, batch, 2)
        for name in ("q_proj", "k_proj", "v_proj"):
            A = getattr(model.conv.attn, name).fisher.kron.A
            assert torch.allclose(A, x.T @ x / 7, rtol=1e-10)


class DenseCoat(nn.Module):
    """Nodes in a dense coat go through a layer, or ``heads`` further rows of each graph do."""

    def __init__(self, heads: int = 0) -> None:
        super().__init__()
        self.heads, self.layer, self.head = heads, nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        to_dense_batch = pytest.importorskip("torch_geometric.utils").to_dense_batch
        dense, mask = to_dense_batch(x, batch, batch_size=num_graphs)
        if self.heads:
            pooled = dense.sum(1, keepdim=True) * torch.arange(1.0, self.heads + 1).view(1, -1, 1)
            return self.head(torch.tanh(self.layer(pooled)).mean(1))
        y = torch.tanh(self.layer(dense)) * mask.unsqueeze(-1)
        return self.head(y.sum(1))


@STRATEGIES
@pytest.mark.parametrize("heads", [0, 4])
def test_dense_rows_are_padded_only_if_the_loss_says_so(shared_dim: str, heads: int):
    model = DenseCoat(heads)
    asdl_ws_plugin.attach_segments(model)
    batch, x = torch.tensor([0, 0, 1, 1, 1, 1]), torch.randn(6, D)
    y = torch.tensor([0, 1])
    edges = torch.zeros(2, 1, dtype=torch.long)
    fisher(model, shared_dim, ce, y, x, edges, batch, 2)
    parts = [x[batch == n] for n in range(2)]

    def one(n: int) -> Tensor:
        none = torch.zeros(len(parts[n]), dtype=torch.long)
        return F.cross_entropy(model(parts[n], edges, none, 1), y[n : n + 1])

    A, B = empirical_factors(model.layer, one, 2, shared_dim)
    if shared_dim == "expand" and not heads:  # ragged expand weighs positions, not examples
        A = x.T @ x / 6
    assert torch.allclose(model.layer.fisher.kron.A, A, rtol=1e-10)
    assert torch.allclose(model.layer.fisher.kron.B, B, rtol=1e-10)


# -------------------------------------------------------------------- rows in an order of their own


class HeadsOutermost(nn.Module):
    """A layer of each head: ``(heads·N, R, D/heads)``, in neither of the two layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.of_heads, self.head = nn.Linear(D, 8), nn.Linear(4, 4), nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x)).unflatten(-1, (2, 4)).permute(2, 0, 1, 3)
        h = torch.tanh(self.of_heads(h.flatten(0, 1))).view(h.shape)
        return self.head(h.permute(1, 2, 0, 3).flatten(2))


@pytest.mark.parametrize("n", [N, 6, 3])
def test_heads_outermost_are_right_for_expand_and_refused_for_reduce(n: int):
    """R is no number of examples, though all layers would fit if R examples lay in the second
    dimension.
    """
    model, x, y = HeadsOutermost(), torch.randn(n, R, D), torch.randint(C, (n, R))
    maker = fisher(model, "expand", token_ce, y, x)
    layers = {layer.name: layer.modules for layer in maker.plan.layers}

    def summed_loss(i: int) -> Tensor:
        return R * token_ce(model(x[i : i + 1]), y[i : i + 1])

    expected = every_layers_factors(layers, summed_loss, n)
    seen = {name: modules[0] for name, modules in layers.items()}
    error, where = worst_layer(seen, expected, "expand", 1 / R)
    assert error < 1e-12, where
    with pytest.raises(ValueError, match=r"'of_heads'.*other examples.*ignore_modules"):
        fisher(model, "reduce", token_ce, y, x)
    fisher(model, "reduce", token_ce, y, x, ignore=["of_heads"])
    expected.pop("of_heads")
    del seen["of_heads"]
    error, where = worst_layer(seen, expected, "reduce", 1 / R)
    assert error < 1e-12, where


# -------------------------------------------------------------------------------- recurrent modules


class LanguageModel(nn.Module):
    """Tokens ``(R, N)``, or ``(N, R)`` that are turned around a recurrent module."""

    def __init__(self, kind: Any, is_flat: bool, turns: bool) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(9, 7), kind(7, 7)
        self.head, self.is_flat, self.turns = nn.Linear(7, C), is_flat, turns

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.recurrent(x.transpose(0, 1) if self.turns else x)[0]
        z = self.head(x.transpose(0, 1) if self.turns else x)
        return z.flatten(0, 1) if self.is_flat else z


@STRATEGIES
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("n", "r"), [(6, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_module_says_which_dimension_is_the_batch(
    shared_dim: str, is_flat: bool, turns: bool, n: int, r: int, kind: Any
):
    model, sizes = LanguageModel(kind, is_flat, turns), (n, r) if turns else (r, n)
    tokens, y = torch.randint(9, sizes), torch.randint(C, sizes)

    def summed_loss(i: int) -> Tensor:
        rows = slice(i, i + 1)
        one = (tokens[rows], y[rows]) if turns else (tokens[:, rows], y[:, rows])
        return r * token_ce(model(one[0]), one[1])

    expected = every_layers_factors({"head": [model.head]}, summed_loss, n)
    for data_size, scale in ((-1, 1 / r), (n, 1.0)):
        fisher(model, shared_dim, token_ce, y, tokens, data_size=data_size)
        error, where = worst_layer({"head": model.head}, expected, shared_dim, scale)
        assert error < 1e-12, where
