"""Which positions are padding where the length of a mask does not tell; wrapped models."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import empirical_factors, fisher
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import attach_padding, attach_segments, padding
from asdl_ws_plugin.weight_sharing.torch_private import unwrapped

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
LENGTHS, L, D, C = [5, 2, 3], 5, 4, 3
N = len(LENGTHS)
MASK = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask.unsqueeze(1), float("-inf"))
    return torch.softmax(scores, -1) @ v


class Tokens(nn.Module):
    """Self-attention with ``extra`` learned tokens, in front or behind, and the mean of all."""

    def __init__(self, extra: int, behind: bool = False) -> None:
        super().__init__()
        self.extra, self.behind = extra, behind
        self.tokens = nn.Parameter(torch.randn(extra, D))
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = self.tokens.expand(len(x), -1, -1)
        real = mask.new_ones(len(x), self.extra)
        parts, masks = ([x, tokens], [mask, real]) if self.behind else ([tokens, x], [real, mask])
        x, mask = torch.cat(parts, 1), torch.cat(masks, 1)
        y = torch.tanh(self.o(attend(self.q(x), self.k(x), self.v(x), mask)))
        y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


def check(layer: nn.Module, one: Any, counts: list[int], shared_dim: str) -> None:
    """Against a loop over the examples without their padding; ragged expand weighs positions."""
    A, B = empirical_factors(layer, one, N, shared_dim)
    if shared_dim == "expand":
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(
            lambda m, args, out: seen.append(args[0].flatten(0, -2))
        )
        for n in range(N):
            one(n)
        handle.remove()
        rows = torch.cat(seen).detach()
        assert len(rows) == sum(counts)
        A = rows.T @ rows / len(rows)
    kron = layer.fisher.kron
    assert torch.allclose(kron.A, A, rtol=1e-10) and torch.allclose(kron.B, B, rtol=1e-10)


@STRATEGIES
@pytest.mark.parametrize(("extra", "behind"), [(1, False), (1, True), (3, False)])
def test_further_tokens_beside_those_of_the_mask(shared_dim: str, extra: int, behind: bool):
    model, x = Tokens(extra, behind), torch.randn(N, L, D)
    y = torch.randint(C, (N,))
    with padding(model, MASK):
        fisher(model, shared_dim, F.cross_entropy, y, x, MASK, data_size=N)

    def one(n: int) -> Tensor:
        kept = MASK[n : n + 1, : LENGTHS[n]]
        return F.cross_entropy(model(x[n : n + 1, : LENGTHS[n]], kept), y[n : n + 1])

    for layer in (model.q, model.k, model.v, model.o):
        check(layer, one, [length + extra for length in LENGTHS], shared_dim)


class Translation(nn.Module):
    """Two sequences of one length, each with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.target, self.q, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, source: Tensor, target: Tensor, s: Tensor, t: Tensor) -> Tensor:
        source, target = torch.tanh(self.source(source)), torch.tanh(self.target(target))
        y = torch.tanh(attend(self.q(target), self.k(source), self.v(source), s))
        y = y.masked_fill(~t.unsqueeze(-1), 0)
        return self.head(y.sum(1) / t.sum(1, keepdim=True))


@STRATEGIES
def test_two_masks_of_one_length(shared_dim: str):
    model, source, target = Translation(), torch.randn(N, L, D), torch.randn(N, L, D)
    s, t = MASK, MASK.flip(0)
    y = torch.randint(C, (N,))
    with padding(model, {"source": s, "target": t}):
        fisher(model, shared_dim, F.cross_entropy, y, source, target, s, t, data_size=N)

    def one(n: int) -> Tensor:
        a, b = int(s[n].sum()), int(t[n].sum())
        z = model(source[n : n + 1, :a], target[n : n + 1, :b], s[n : n + 1, :a], t[n : n + 1, :b])
        return F.cross_entropy(z, y[n : n + 1])

    for layer in (model.source, model.k, model.v, model.target, model.q):
        check(layer, one, LENGTHS, shared_dim)


class Strided(nn.Module):
    """Frames at half the rate, with a mask of their own that nobody gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * mask.unsqueeze(-1)
        mask = mask[:, ::2]
        y = torch.tanh(self.second(y[:, ::2])) * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


def test_a_mask_that_shrinks_is_refused_by_name_until_it_is_given():
    model, x, y = Strided(), torch.randn(N, L, D), torch.randint(C, (N,))
    with (
        padding(model, MASK),
        pytest.raises(ValueError, match=r"'second': some of its 3 positions are padding.*are 5"),
    ):
        fisher(model, "reduce", F.cross_entropy, y, x, MASK)
    with padding(model, {"frames": MASK, "half": MASK[:, ::2]}):
        fisher(model, "reduce", F.cross_entropy, y, x, MASK, data_size=N)
    kept = MASK[:, ::2].unsqueeze(-1)
    seen = (torch.tanh(model.first(x)) * MASK.unsqueeze(-1))[:, ::2].detach()
    a = (seen * kept).sum(1) / kept.sum(1)
    assert torch.allclose(model.second.fisher.kron.A, a.T @ a / N, rtol=1e-10)


def test_positions_of_another_length_that_all_count():
    """Latents that read the tokens: nothing of them is padding."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, D))
            self.k, self.q, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            k = self.k(x)
            y = attend(self.q(self.latents.expand(len(x), -1, -1)), k, k, mask)
            return self.head(torch.tanh(y).mean(1))

    model, x, y = Latents(), torch.randn(N, L, D), torch.randint(C, (N,))
    with padding(model, MASK):
        fisher(model, "reduce", F.cross_entropy, y, x, MASK, data_size=N)
    a = model.latents.detach().mean(0, keepdim=True)
    assert torch.allclose(model.q.fisher.kron.A, a.T @ a, rtol=1e-10)


# ------------------------------------------------------------------------------- attached, wrapped


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x)) * attention_mask.unsqueeze(-1)
        return self.head(y.sum(1) / attention_mask.sum(1, keepdim=True))


def expected_A(x: Tensor) -> Tensor:
    rows = x[MASK]
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_the_model_inside(wrap: Any):
    model = Masked()
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    attach_padding(wrapped, "attention_mask")
    attach_segments(wrapped, "auto")  # nothing of it is a graph
    assert asdl_ws_plugin.convert(wrapped) is wrapped
    x, y = torch.randn(N, L, D), torch.randint(C, (N,))
    maker = fisher(
        wrapped, "expand", F.cross_entropy, y, x, MASK, data_size=N, call=unwrapped(wrapped)
    )
    assert maker.plan.model is model and next(iter(maker.plan.layers)).name == "fc"
    assert torch.allclose(model.fc.fisher.kron.A, expected_A(x), rtol=1e-10)
    assert asdl_ws_plugin.inspect(wrapped, x, MASK).rows[0].name == "fc"


def test_attaching_again_changes_nothing_and_detaching_works():
    model, x, y = Masked(), torch.randn(N, L, D), torch.randint(C, (N,))
    handle = attach_padding(model, "attention_mask")
    assert attach_padding(model, "attention_mask") is handle
    fisher(model, "expand", F.cross_entropy, y, x, MASK, data_size=N)
    assert torch.allclose(model.fc.fisher.kron.A, expected_A(x), rtol=1e-10)
    handle.remove()
    del model.fc.fisher, model.head.fisher
    fisher(model, "expand", F.cross_entropy, y, x, MASK, data_size=N)
    assert not torch.allclose(model.fc.fisher.kron.A, expected_A(x), rtol=1e-3)
    attach_padding(model, "attention_mask")
    fisher(model, "expand", F.cross_entropy, y, x, MASK, data_size=N)
    assert torch.allclose(model.fc.fisher.kron.A, expected_A(x), rtol=1e-10)


def test_a_model_with_a_mask_attached_can_be_pickled():
    model, x, y = Masked(), torch.randn(N, L, D), torch.randint(C, (N,))
    attach_padding(model, "attention_mask")
    attach_segments(model, "auto")
    again = pickle.loads(pickle.dumps(model))
    fisher(again, "expand", F.cross_entropy, y, x, MASK, data_size=N)
    assert torch.allclose(again.fc.fisher.kron.A, expected_A(x), rtol=1e-10)


def test_segments_auto_finds_a_graph():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            y = torch.tanh(self.fc(x))
            return self.head(y.new_zeros(2, D).index_add(0, batch, y))

    model, batch, x = Graph(), torch.tensor([0, 1, 1]), torch.randn(3, D)
    attach_segments(model, "auto")
    edges = torch.zeros(2, 1, dtype=torch.long)
    fisher(model, "reduce", F.cross_entropy, torch.tensor([0, 1]), x, edges, batch, data_size=2)
    a = torch.stack([x[0], x[1:].mean(0)])
    assert torch.allclose(model.fc.fisher.kron.A, a.T @ a / 2, rtol=1e-10)


def test_a_mask_beside_segments():
    """A graph model with sequences of its own: both may be attached."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.text, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

        def forward(
            self,
            x: Tensor,
            edge_index: Tensor,
            batch: Tensor,
            tokens: Tensor,
            attention_mask: Tensor,
        ) -> Tensor:
            y = torch.tanh(self.fc(x))
            y = y.new_zeros(N, D).index_add(0, batch, y)
            text = torch.tanh(self.text(tokens)) * attention_mask.unsqueeze(-1)
            return self.head(y + text.sum(1))

    model, batch = Both(), torch.tensor([0, 1, 1, 2])
    attach_segments(model, "pyg")
    attach_padding(model, "attention_mask")
    x, tokens, edges = torch.randn(4, D), torch.randn(N, L, D), torch.zeros(2, 1, dtype=torch.long)
    y = torch.randint(C, (N,))
    fisher(model, "expand", F.cross_entropy, y, x, edges, batch, tokens, MASK, data_size=N)
    assert torch.allclose(model.text.fisher.kron.A, expected_A(tokens), rtol=1e-10)
    assert torch.allclose(model.fc.fisher.kron.A, x.T @ x / 4, rtol=1e-10)


def test_the_plan_of_a_converted_graph_convolution_does_not_name_its_bias():
    geometric = pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = geometric.GCNConv(D, D), nn.Linear(D, C)

    import asdl

    model = asdl_ws_plugin.convert(Net())
    maker = asdl.KfacGradientMaker(model, asdl.PreconditioningConfig(), shared_dim="reduce")
    assert "conv.lin" in repr(maker.plan) and "left out" not in repr(maker.plan)


# ------------------------------------------------------------------- masks as models are given them


class Summed(nn.Module):
    """Takes any mask and reads it as attention does: at ``real`` positions it is 0, or it is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        given = mask if key_padding_mask is None else key_padding_mask
        assert given is not None
        is_added = given.is_floating_point() and bool((given < 0).any())
        real = given == 0 if is_added or key_padding_mask is not None else given != 0
        return self.head((torch.tanh(self.layer(x)) * real.unsqueeze(-1)).sum(1))


ADDED = {
    "-inf": torch.zeros(N, L).masked_fill(~MASK, -torch.inf),
    "-1e9": torch.zeros(N, L).masked_fill(~MASK, -1e9),
    "least float32": torch.zeros(N, L).masked_fill(~MASK, torch.finfo(torch.float32).min),
    "least float16": torch.zeros(N, L, dtype=torch.half).masked_fill(~MASK, -65504),
}


def mean_of_tokens(model: nn.Module, source: Any, **mask: Tensor) -> tuple[Tensor, Tensor]:
    """A of the layer under expand, and what it has to be."""
    x = torch.randn(N, L, D)
    attach_padding(model, source)
    fisher(model, "expand", F.cross_entropy, torch.arange(N) % C, x, data_size=N, **mask)
    a = x[MASK]
    return model.layer.fisher.kron.A, a.mT @ a / len(a)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *(("mask", MASK.to(d)) for d in (torch.bool, torch.int8, torch.long, torch.half)),
        ("mask", MASK.double()),
        ("key_padding_mask", ~MASK),
        ("key_padding_mask", (~MASK).long()),
        *(("key_padding_mask", added) for added in ADDED.values()),
    ],
)
def test_a_mask_by_its_argument_is_read_as_the_model_reads_it(name: str, mask: Tensor):
    found, expected = mean_of_tokens(Summed(), name, **{name: mask})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", ADDED.values(), ids=ADDED.keys())
def test_a_mask_that_is_added_to_scores_is_no_mask_of_ones(mask: Tensor):
    """It was read the wrong way: 0 for padding. The remedy of the refusal works."""
    with pytest.raises(ValueError, match=r"'mask' are others than 0 and 1.*mask == 0"):
        mean_of_tokens(Summed(), "mask", mask=mask)
    found, expected = mean_of_tokens(Summed(), lambda *args, mask, **kwargs: mask == 0, mask=mask)
    torch.testing.assert_close(found, expected)


def test_biases_of_scores_are_no_padding():
    with pytest.raises(ValueError, match=r"others than 0 and -10000 or less"):
        mean_of_tokens(Summed(), "key_padding_mask", key_padding_mask=-0.5 * (~MASK).double())
