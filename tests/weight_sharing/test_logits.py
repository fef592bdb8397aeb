"""Which part of a model's output the curvature is of: what the loss is given, if nobody says."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import assert_equal, oracle_factors
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401

pytestmark = pytest.mark.usefixtures("double")

N, R, D, C = 4, 3, 5, 6
Output = namedtuple("Output", ["features", "logits"])


class Network(nn.Module):
    """Returns its logits, or what ``output`` makes of features and logits."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.first, self.head, self.output = nn.Linear(D, 7), nn.Linear(7, C), output

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.first(x))
        logits = self.head(features)
        return logits if self.output is None else self.output(features, logits)


def make_maker(model: nn.Module) -> Any:
    config = FisherConfig(
        "fisher_exact", ["kron"], loss_type="cross_entropy", shared_dim="expand", data_size=N
    )
    return get_fisher_maker(model, config)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


WAYS = {
    "attribute": (lambda f, z: SimpleNamespace(logits=z), lambda y: y.logits),
    "key": (lambda f, z: {"features": f, "logits": z}, lambda y: y["logits"]),
    "second item": (lambda f, z: (f, z), lambda y: y[1]),
    "named tuple": (Output, lambda y: y.logits),
    "first of a part": (lambda f, z: ((z, f), None), lambda y: y[0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_what_the_loss_takes_out_of_the_output(way: str):
    output, select = WAYS[way]
    model, x, labels = Network(output), torch.randn(N, R, D), torch.randint(C, (N, R))
    loss = token_loss
    if way == "first of a part":

        def loss(parts: Any, labels: Tensor) -> Tensor:
            return token_loss(parts[0], labels)

    maker = make_maker(model)
    maker.setup_loss_call(loss, select(maker.setup_model_call(model, x)), labels)
    maker.forward_and_backward()
    model.output = None
    for module in (model.first, model.head):
        expected = oracle_factors(model, module, x, "expand")
        assert_equal(module.fisher.kron.A, expected.A / N)
        assert_equal(module.fisher.kron.B, expected.B / N)


def test_what_is_done_with_the_logits_is_a_part_of_the_loss():
    """A causal model whose last position predicts nothing: its terms have weight 0."""
    model, x, labels = (
        Network(lambda f, z: SimpleNamespace(logits=z)),
        torch.randn(N, R, D),
        torch.randint(C, (N, R - 1)),
    )
    maker = make_maker(model)
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(token_loss, output.logits[:, :-1], labels)
    maker.forward_and_backward()
    model.output = None
    weight = torch.ones(N, R)
    weight[:, -1] = 0
    expected = oracle_factors(model, model.head, x, "expand", weight=weight)
    assert_equal(model.head.fisher.kron.B, expected.B / N)


def test_a_selection_is_kept_whatever_the_loss_is_given():
    model, x = Network(lambda f, z: (f, z)), torch.randn(N, R, D)
    maker = make_maker(model)
    output = maker.setup_model_call(model, x)
    maker.setup_logits_repr(output[1])
    maker.setup_loss_call(lambda y, t: token_loss(y[1], t), output, torch.randint(C, (N, R)))
    maker.forward_and_backward()
    model.output = None
    expected = oracle_factors(model, model.head, x, "expand")
    assert_equal(model.head.fisher.kron.B, expected.B / N)


def test_of_several_parts_none_is_guessed_and_the_error_shows_the_line():
    model = Network(lambda f, z: {"features": f, "logits": z})
    maker = make_maker(model)
    output = maker.setup_model_call(model, torch.randn(N, R, D))
    maker.setup_loss_call(
        lambda f, z, t: token_loss(z, t) + f.square().mean(),
        output["features"],
        output["logits"],
        torch.randint(C, (N, R)),
    )
    with pytest.raises(TypeError, match=r"got dict.*\n.*setup_model_call.*\n.*output\.logits"):
        maker.forward_and_backward()
