"""What somebody new trips over: each mistake is told apart, and told how to mend."""

from __future__ import annotations

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import asdl_ws_plugin
from asdl_ws_plugin.weight_sharing.operations import LinearReduce

N = 16


def kfac(model, shared_dim="reduce", **options):
    options = {"damping": 1e-2, **options}
    return asdl.KfacGradientMaker(
        model, asdl.PreconditioningConfig(**options), shared_dim=shared_dim
    )


def step(maker, model, x, target, loss=F.cross_entropy):
    logits = maker.setup_model_call(model, x)
    maker.setup_loss_call(loss, logits, target)
    return maker.forward_and_backward()


def labels(*sizes):
    return torch.randint(0, 5, sizes or (N,))


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact"])
@pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
def test_channels_last_models_get_the_same_step(shared_dim, fisher_type):
    grads = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
        model = model.double().to(memory_format=memory_format)
        x = torch.randn(N, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
        maker = asdl.KfacGradientMaker(
            model,
            asdl.PreconditioningConfig(damping=1e-2),
            fisher_type=fisher_type,
            shared_dim=shared_dim,
        )
        step(maker, model, x, labels())
        grads.append([p.grad for p in model.parameters()])
    for contiguous, channels_last in zip(*grads, strict=True):
        torch.testing.assert_close(channels_last, contiguous, rtol=1e-9, atol=1e-12)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x, attention_mask=None):
        return self.layers(x).mean(1)


def test_attach_padding_refuses_a_name_that_is_no_argument():
    with pytest.raises(ValueError, match="'attn_mask'; it has 'x', 'attention_mask'"):
        asdl_ws_plugin.attach_padding(Masked(), "attn_mask")


def test_masks_of_zeros_and_ones_are_booleans():
    model, x = Masked().double(), torch.randn(N, 3, 6, dtype=torch.float64)
    mask = torch.ones(N, 3, dtype=torch.long)
    mask[::2, 2] = 0
    factors = []
    for value in (mask, mask.bool()):
        maker = kfac(model, ema_decay=1.0)
        with asdl_ws_plugin.padding(model, value):
            step(maker, model, x, labels())
        factors.append(model.layers[0].fisher.kron.A)
    assert torch.equal(*factors)
    with pytest.raises(TypeError, match="booleans"), asdl_ws_plugin.padding(model, mask * 2):
        pass


class Rows(nn.Module):
    """80 rows that nobody says the examples of."""

    def __init__(self):
        super().__init__()
        self.row, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, batch):
        return self.head(x.new_zeros(N, 8).index_add(0, batch, torch.tanh(self.row(x))))


class MessagePassing(Rows):
    """Named as PyTorch Geometric's base class is."""


def rows_step(model, num_rows, shared_dim="reduce"):
    batch = torch.arange(N).repeat(num_rows // N + 1)[:num_rows].sort().values
    x = torch.randn(num_rows, 6)
    maker = kfac(model, shared_dim, ema_decay=1.0)
    logits = maker.setup_model_call(model, x, batch)
    maker.setup_loss_call(F.cross_entropy, logits, labels())
    maker.forward_and_backward()
    return x


def test_rows_that_the_graph_confirms_to_be_merged_positions_need_no_rule():
    """Nor is there a warning, which would be an error here: the guess by sizes was checked."""
    model = Rows()
    x = rows_step(model, 80)
    means = x.view(N, -1, 6).mean(1)
    torch.testing.assert_close(model.row.fisher.kron.A, means.mT @ means / N)


def test_a_rule_says_that_positions_are_merged():
    """Then there is no warning, which would be an error here."""
    model = Rows()
    x = rows_step(model, 80, ["reduce", ("row", "batch_first")])
    means = x.view(N, -1, 6).mean(1)
    torch.testing.assert_close(model.row.fisher.kron.A, means.mT @ means / N)


def test_rows_of_a_graph_network_are_never_taken_for_merged_positions():
    with pytest.raises(ValueError, match=r"'row'.*80 rows.*segments\(model"):
        rows_step(MessagePassing(), 80)


def test_rows_that_fit_nothing_are_told_of_segments():
    with pytest.raises(ValueError, match=r"'row'.*segments"):
        rows_step(Rows(), 88)


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 5))


def test_a_conversion_after_the_maker_is_refused():
    model = transformer()
    maker = kfac(model, "expand")
    asdl_ws_plugin.convert(model)
    with pytest.raises(RuntimeError, match=r"'1.self_attn.q_proj'.*convert\(model\) first"):
        step(
            maker, model, torch.randn(N, 3, 6), labels(N, 3), lambda p, t: F.cross_entropy(p.mT, t)
        )


def test_unsupported_modules_are_listed_with_the_reason():
    model = nn.Sequential(nn.Conv1d(6, 8, 1), nn.Flatten(), nn.Linear(8, 5), transformer())
    unsupported = kfac(model).plan.unsupported
    assert "Conv1d" in unsupported["0"]
    assert "convert(model)" in unsupported["3.1.self_attn"]
    assert set(unsupported) == {"0", "3.1.self_attn"}


def test_ignore_modules_that_match_nothing_are_reported():
    with pytest.warns(UserWarning, match="'typo' matches no module"):
        kfac(transformer(), ignore_modules=["typo", nn.LayerNorm, nn.BatchNorm2d])


def test_a_step_without_a_loss_or_a_model_call_says_so():
    model = nn.Linear(6, 5)
    maker = kfac(nn.Sequential(model))
    with pytest.raises(ValueError, match="setup_model_call"):
        maker.forward_and_backward()
    maker.setup_model_call(maker.model, torch.randn(N, 6))
    with pytest.raises(ValueError, match="setup_loss_call"):
        maker.forward_and_backward()


def test_a_loss_that_is_not_a_scalar_is_refused():
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"scalar, got sizes \(16,\)"):
        step(kfac(model), model, torch.randn(N, 6), labels(), nn.CrossEntropyLoss(reduction="none"))


class WrongSize(LinearReduce):
    @staticmethod
    def cov_kron_B(module, out_grads):
        return torch.eye(3)


class AView(LinearReduce):
    @staticmethod
    def cov_kron_A(module, in_data):
        return in_data[:6, 0, :6]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (WrongSize, r"WrongSize.cov_kron_B.*\(5, 5\), got \(3, 3\)"),
        (AView, "AView.cov_kron_A.*a view"),
    ],
)
def test_what_a_users_operation_returns_is_checked(operation, message):
    asdl_ws_plugin.register_operation(nn.Linear, operation, shared_dim="checked")
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(N, 6)
    before = x.clone()
    with pytest.raises(ValueError, match=f"'0'.*{message}"):
        step(kfac(model, "checked"), model, x, labels())
    assert torch.equal(x, before)
