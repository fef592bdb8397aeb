"""Padding that nobody names: read off the model's arguments, and off what the loss depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import fisher, kfac
from oracles.every_layer import every_layers_factors, worst_layer
from torch import Tensor, nn

from asdl_ws_plugin import attach_padding, attach_segments

pytestmark = pytest.mark.usefixtures("double")

N, D, C, V = 4, 6, 3, 11
SOURCE, TARGET = [5, 2, 4, 3], [3, 5, 2, 4]


class Pair(nn.Module):
    """A source is averaged and added to every token of a target of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.source, self.target, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, source: Tensor, target: Tensor, places: Tensor | None = None) -> Tensor:
        """``places (N, R)``, whose zeros are no padding, are of no use here."""
        kept = (source > 0).unsqueeze(-1)
        x = (torch.tanh(self.source(self.embedding(source))) * kept).sum(1) / kept.sum(1)
        return self.head(torch.tanh(self.target(self.embedding(target))) + x.unsqueeze(1))


def ids(lengths: list[int], longest: int = 5) -> Tensor:
    """Tokens, of which 0 is padding."""
    tokens = torch.randint(1, V, (len(lengths), longest))
    return tokens * (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def labels_of(target: Tensor) -> Tensor:
    return torch.where(target > 0, target % C, -1)


def expected_factors(model: nn.Module, source: Tensor, target: Tensor) -> Any:
    """Of each example cut to its own lengths."""

    def summed_loss(n: int) -> Tensor:
        a, b = (x[n : n + 1, : int((x[n] > 0).sum())] for x in (source, target))
        return F.cross_entropy(model(a, b)[0], labels_of(b)[0], reduction="sum")

    layers = {name: [getattr(model, name)] for name in ("source", "target", "head")}
    return every_layers_factors(layers, summed_loss, N, ragged=True)


def assert_right(model: nn.Module, source: Tensor, target: Tensor, strategy: str) -> None:
    modules = {name: getattr(model, name) for name in ("source", "target", "head")}
    error, where = worst_layer(modules, expected_factors(model, source, target), strategy)
    assert error < 1e-10, f"{where} is off by {error:.2e}"


@pytest.mark.parametrize("strategy", ["expand", "reduce"])
def test_two_sides_of_one_length_are_told_apart(strategy: str):
    model, source, target = Pair(), ids(SOURCE), ids(TARGET)
    attach_padding(model, "auto")
    fisher(model, strategy, token_loss, labels_of(target), source, target, data_size=N)
    assert_right(model, source, target, strategy)


def test_what_was_found_holds_where_a_later_batch_would_not_tell():
    """All targets are full: the source's mask would leave out nothing that the loss sees there."""
    model = Pair()
    attach_padding(model, "auto")
    maker = kfac(model, "reduce", ema_decay=1.0, data_size=N, fisher_type="fisher_emp")
    for source_lengths, target_lengths in ((SOURCE, TARGET), ([1] * N, [5] * N), (TARGET, SOURCE)):
        source, target = ids(source_lengths), ids(target_lengths)
        output = maker.setup_model_call(model, source, target)
        maker.setup_loss_call(token_loss, output, labels_of(target))
        maker.forward_and_backward()
        assert_right(model, source, target, "reduce")


def test_the_first_batch_with_padding_decides():
    model = Pair()
    attach_padding(model, "auto")
    maker = kfac(model, "expand", ema_decay=1.0, data_size=N, fisher_type="fisher_emp")
    for lengths in ([5] * N, SOURCE):
        source, target = ids(lengths), ids([5] * N if lengths[1] == 5 else TARGET)
        places = torch.arange(5).expand(N, 5)
        output = maker.setup_model_call(model, source, target, places)
        maker.setup_loss_call(token_loss, output, labels_of(target))
        maker.forward_and_backward()
        assert_right(model, source, target, "expand")


def test_what_was_found_is_a_part_of_the_state():
    """The resumed training sees first what does not tell: all rows of one length, or none."""
    state: dict[str, Any] = {}
    for source_lengths, target_lengths in ((SOURCE, TARGET), (SOURCE, SOURCE), (TARGET, SOURCE)):
        torch.manual_seed(0)
        model, source, target = Pair(), ids(source_lengths), ids(target_lengths)
        attach_padding(model, "auto")
        maker = kfac(model, "reduce", ema_decay=1.0, data_size=N, fisher_type="fisher_emp")
        if state:
            maker.load_state_dict(state)
        output = maker.setup_model_call(model, source, target)
        maker.setup_loss_call(token_loss, output, labels_of(target))
        maker.forward_and_backward()
        assert_right(model, source, target, "reduce")
        state = maker.state_dict()
        masks = {name: of[0] for name, _, of in state["weight_sharing"]["graph"]["masks"]}
        assert masks == {"source": "source", "target": "target", "head": "target"}


class Frames(nn.Module):
    """Padding is 1, as AlgoPerf and PyTorch have it; in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, paddings = inputs
        kept = 1 - paddings.to(x.dtype).unsqueeze(-1)
        return self.head((torch.tanh(self.layer(x)) * kept).sum(1) / kept.sum(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.float32])
def test_a_mask_that_is_1_for_padding_is_read_the_right_way(dtype: torch.dtype):
    model, x = Frames(), torch.randn(N, 5, D)
    paddings = (torch.arange(5) >= torch.tensor(SOURCE).unsqueeze(1)).to(dtype)
    attach_padding(model, "auto")
    fisher(model, "reduce", F.cross_entropy, torch.arange(N) % C, (x, paddings), data_size=N)
    means = torch.stack([row[:length].mean(0) for row, length in zip(x, SOURCE, strict=True)])
    torch.testing.assert_close(model.layer.fisher.kron.A, means.mT @ means / N)


class Unmasked(nn.Module):
    """Takes padding for a token as any other: it is one, then."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(tokens))).mean(1))


def test_positions_that_the_loss_depends_on_are_no_padding():
    model, tokens = Unmasked(), ids(SOURCE)
    attach_padding(model, "auto")
    fisher(model, "reduce", F.cross_entropy, torch.arange(N) % C, tokens, data_size=N)
    means = model.embedding(tokens).mean(1)
    torch.testing.assert_close(model.layer.fisher.kron.A, means.mT @ means / N)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        return self.head(x.new_zeros(num_graphs, D).index_add(0, batch, torch.tanh(self.node(x))))


@pytest.mark.parametrize("segments_first", [True, False])
def test_beside_segments_nothing_is_guessed(segments_first: bool):
    model, x = Graph(), torch.randn(7, D)
    batch, edges = torch.tensor([0, 0, 1, 1, 1, 2, 3]), torch.tensor([[0, 2], [1, 3]])
    attachments = [lambda: attach_segments(model, "auto"), lambda: attach_padding(model, "auto")]
    for attach in attachments if segments_first else reversed(attachments):
        attach()
    fisher(model, "reduce", F.cross_entropy, torch.arange(4) % C, x, edges, batch, 4, data_size=4)
    means = torch.stack([x[batch == n].mean(0) for n in range(4)])
    torch.testing.assert_close(model.node.fisher.kron.A, means.mT @ means / 4)
