"""Activation checkpointing: without reentrance the factors are the same; reentrant is refused by
the layer's name.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import assert_factors, empirical_factors, fisher, hooks_of, kfac, kron, step
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 4, 5, 6, 3
TYPES = ["fisher_mc", "fisher_emp", "fisher_exact"]


def sum_loss(y, target):
    return F.cross_entropy(y.reshape(-1, C), target.reshape(-1), reduction="sum")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x):
        x = x + torch.tanh(x.mean(1, keepdim=True))
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Model(nn.Module):
    """Two blocks and a head; ``reentrant=None``: no checkpointing."""

    def __init__(self, reentrant=None, all_blocks=True, dropout=0.0):
        super().__init__()
        self.reentrant, self.all_blocks = reentrant, all_blocks
        self.embed, self.blocks = nn.Linear(D, D), nn.ModuleList([Block(), Block()])
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(D, C)

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if self.reentrant is None or (i == 0 and not self.all_blocks):
                x = self.dropout(block(x))
            else:
                x = checkpoint(
                    lambda x, block=block: self.dropout(block(x)), x, use_reentrant=self.reentrant
                )
        return self.head(x.mean(1))


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("all_blocks", [True, False])
def test_factors_of_single_examples(setting, all_blocks):
    """Upstream counts A two to four times, as the forward pass runs again."""
    model, x, target = (
        Model(reentrant=False, all_blocks=all_blocks),
        torch.randn(N, R, D),
        torch.randint(C, (N,)),
    )
    fisher(
        model,
        setting,
        sum_loss,
        target,
        x,
        data_size=N,
        shapes=["kron", (nn.LayerNorm, "unit_wise")],
    )
    plain = Model()
    plain.load_state_dict(model.state_dict())
    for layer, same in zip(layers_of(model), layers_of(plain), strict=True):
        assert_factors(
            layer,
            empirical_factors(
                same, lambda i: sum_loss(plain(x[i : i + 1]), target[i : i + 1]), N, setting
            ),
        )


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("ema_decay", [-1, 0.5])
def test_training_is_the_same_with_and_without(fisher_type, ema_decay):
    """Gradients over three steps, with a seed for the labels and dropout replayed by the
    checkpoint.
    """
    batches = [(torch.randn(N, R, D), torch.randint(C, (N,))) for _ in range(3)]
    torch.manual_seed(1)
    initial, found = Model(dropout=0.3), []
    for reentrant in (None, False):
        model = copy.deepcopy(initial)
        model.reentrant = reentrant
        maker = kfac(
            model, fisher_type=fisher_type, ema_decay=ema_decay, seed=4, damping=0.1, data_size=N
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(2)
        for x, target in batches:
            loss = step(maker, F.cross_entropy, target, x)
            optimizer.step()
        found.append(
            [
                loss.detach(),
                *(p.grad for p in model.parameters()),
                *(
                    (t for layer in layers_of(model) for t in kron(layer))
                    if ema_decay == 0.5
                    else ()
                ),
            ]
        )
        assert hooks_of(model) == hooks_of(Model())
    for with_checkpoints, without in zip(*found, strict=True):
        torch.testing.assert_close(with_checkpoints, without, rtol=1e-9, atol=1e-11)


def test_factors_under_checkpoint_sequential():
    model = nn.Sequential(*[Block() for _ in range(4)], nn.Flatten(1), nn.Linear(R * D, C))
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(
        model,
        "reduce",
        sum_loss,
        target,
        x,
        data_size=N,
        shapes=["kron", (nn.LayerNorm, "unit_wise")],
        call=lambda x: checkpoint_sequential(model, 3, x, use_reentrant=False),
    )
    for layer in layers_of(model):
        assert_factors(
            layer,
            empirical_factors(
                layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, "reduce"
            ),
        )


@pytest.mark.parametrize("all_blocks", [True, False])
@pytest.mark.parametrize("fisher_type", [*TYPES, "fisher_forward_only"])
def test_reentrant_checkpointing_is_refused_by_name(fisher_type, all_blocks):
    """There the layers run without autograd first, and again inside of the backward pass."""
    model = Model(reentrant=True, all_blocks=all_blocks)
    maker = kfac(model, fisher_type=fisher_type)
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    with pytest.raises(
        RuntimeError, match=rf"'blocks.{0 if all_blocks else 1}.(norm|fc1)'.*use_reentrant=False"
    ):
        step(maker, F.cross_entropy, target, x)
    assert hooks_of(model) == hooks_of(Model())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert maker.state["step"] == 0
    model.reentrant = False
    step(maker, F.cross_entropy, target, x)


@pytest.mark.parametrize("how", ["ignored", "frozen"])
def test_reentrant_checkpoints_of_ignored_or_frozen_layers_do_no_harm(how):
    """The other layers have the factors that they have without checkpoints."""
    model = Model(reentrant=True, all_blocks=False)
    if how == "frozen":
        model.blocks[1].requires_grad_(False)
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(
        model,
        fisher_type="fisher_emp",
        ignore_modules=["blocks.1"] if how == "ignored" else None,
        data_size=N,
        ema_decay=1.0,
    )
    step(maker, sum_loss, target, x)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    for name in ("embed", "blocks.0.fc1", "head"):
        expected = empirical_factors(
            plain.get_submodule(name),
            lambda i: sum_loss(plain(x[i : i + 1]), target[i : i + 1]),
            N,
            "reduce",
        )
        assert_factors(model.get_submodule(name), expected)
    assert not any(name.startswith("blocks.1") for name in maker.shared_dim_for)
