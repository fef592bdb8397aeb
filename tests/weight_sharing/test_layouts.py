"""Which dimension of a layer's tensor is the batch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import assert_factors, empirical_factors, fisher, kfac, step
from torch import nn

from asdl_ws_plugin._torchvision import make_importable

SETTINGS = ["expand", "reduce"]
N, R, D, C = 3, 5, 4, 3


pytestmark = pytest.mark.usefixtures("double")


def sum_loss(y, target):
    return F.cross_entropy(y.reshape(-1, C), target.reshape(-1), reduction="sum")


class Sequence(nn.Module):
    """Layers that mix positions, for tensors ``(N, R, D)`` or ``(R, N, D)``; it declares
    nothing.
    """

    def __init__(self, position_dim, pool=True):
        super().__init__()
        self.position_dim, self.pool = position_dim, pool
        self.fc1, self.fc2, self.head = (
            nn.Linear(D, 6),
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, C),
        )

    def forward(self, x):
        x = torch.tanh(self.fc1(x))
        x = self.fc2(x + x.mean(self.position_dim, keepdim=True))
        return self.head(x.mean(self.position_dim)) if self.pool else self.head(x)


class Encoder(nn.Module):
    def __init__(self, batch_first, stack=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 7, dropout=0.0, batch_first=batch_first)
        norm = nn.LayerNorm(D)
        self.encoder = (
            nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False) if stack else layer
        )
        self.head = nn.Linear(D, C)
        self.position_dim = 1 if batch_first else 0

    def forward(self, x):
        return self.head(self.encoder(x).mean(self.position_dim))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(N, R), (4, 4), (1, R), (N, 2 * N), (N, 1)])
def test_transformer_encoder_layer_says_its_layout(setting, size):
    """batch_first=False, on square batches too, gives the factors of single examples and of
    batch_first=True.
    """
    n, r = size
    target = torch.randint(C, (n,))
    x = torch.randn(n, r, D)
    models = {}
    for batch_first in (True, False):
        torch.manual_seed(1)
        model = models[batch_first] = Encoder(batch_first)
        fisher(
            model,
            setting,
            sum_loss,
            target,
            x if batch_first else x.transpose(0, 1),
            ignore=["out_proj"],
            shapes=["kron", (nn.LayerNorm, "unit_wise")],
            data_size=n,
        )
    for name, layer in models[False].named_modules():
        if name in ("encoder.linear1", "encoder.linear2", "head"):

            def example(i):
                return sum_loss(models[False](x[i : i + 1].transpose(0, 1)), target[i : i + 1])

            expected = empirical_factors(layer, example, n, setting)
            assert_factors(layer, expected)
            assert_factors(models[True].get_submodule(name), expected)
        elif isinstance(layer, nn.LayerNorm):
            other = models[True].get_submodule(name)
            torch.testing.assert_close(
                layer.fisher.unit.data, other.fisher.unit.data, rtol=1e-10, atol=1e-14
            )


def test_the_final_norm_of_a_stack_has_the_layout_of_its_layers():
    n = 4
    target, x = torch.randint(C, (n,)), torch.randn(n, n, D)  # a square batch: sizes tell nothing
    found = []
    for batch_first in (True, False):
        torch.manual_seed(1)
        model = Encoder(batch_first, stack=True)
        fisher(
            model,
            "reduce",
            sum_loss,
            target,
            x if batch_first else x.transpose(0, 1),
            ignore=["out_proj"],
            shapes=["diag"],
            data_size=n,
        )
        found.append(model.encoder.norm.fisher.diag.weight)
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("position_dim", [0, 1])
def test_sizes_determine_the_layout(setting, position_dim):
    model = Sequence(position_dim)
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(model, setting, sum_loss, target, x if position_dim else x.transpose(0, 1), data_size=N)

    def example(i):
        one = x[i : i + 1]
        return sum_loss(model(one if position_dim else one.transpose(0, 1)), target[i : i + 1])

    for layer in (model.fc1, model.fc2, model.head):
        assert_factors(layer, empirical_factors(layer, example, N, setting))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("position_dim", [0, 1])
def test_a_square_batch_needs_the_rule(setting, position_dim):
    model = Sequence(position_dim)
    x, target = torch.randn(R, R, D), torch.randint(C, (R,))
    layout = "batch_first" if position_dim else "sequence_first"
    rules = [
        setting,
        ("fc1", setting, layout),
        ("fc2", layout),
    ]  # a layout alone leaves the strategy to other rules
    fisher(model, rules, sum_loss, target, x if position_dim else x.transpose(0, 1), data_size=R)

    def example(i):
        one = x[i : i + 1]
        return sum_loss(model(one if position_dim else one.transpose(0, 1)), target[i : i + 1])

    for layer in (model.fc1, model.fc2):
        assert_factors(layer, empirical_factors(layer, example, R, setting))


def test_a_rule_stands_above_the_module_and_above_sizes():
    """batch_first=False inside a model that hands the layer its transpose: only the user knows."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch_first = False
            self.fc, self.head = nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)).mean(1))

    model, x, target = Odd(), torch.randn(R, R, D), torch.randint(C, (R,))
    fisher(model, [("fc", "reduce", "batch_first"), "reduce"], sum_loss, target, x, data_size=R)
    assert_factors(
        model.fc,
        empirical_factors(
            model.fc, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), R, "reduce"
        ),
    )


@pytest.mark.parametrize("position_dim", [0, 1])
def test_a_square_batch_is_read_off_the_graph_without_a_warning(position_dim):
    model = Sequence(position_dim)
    maker = kfac(model, "reduce", data_size=R)
    x, target = torch.randn(R, R, D), torch.randint(C, (R,))
    step(maker, F.cross_entropy, target, x)
    expected = "batch_first" if position_dim else "sequence_first"
    assert maker.plan.layouts.settled[model.fc1] == expected


def test_a_square_batch_is_taken_batch_first_with_one_warning_where_the_graph_says_nothing():
    model = Sequence(1)
    nn.init.zeros_(model.head.weight)  # no gradient gets through
    maker = kfac(model, "reduce", data_size=R, fisher_type="fisher_emp")
    x, target = torch.randn(R, R, D), torch.randint(C, (R,))
    with pytest.warns(UserWarning) as caught:
        step(maker, F.cross_entropy, target, x)
    warning = caught[0]  # one, for both of the layers that see positions
    assert "'fc1'" in str(warning.message) and "sequence_first" in str(warning.message)
    assert sum("sequence_first" in str(other.message) for other in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(maker, F.cross_entropy, target, x)  # settled: not said again


@pytest.mark.parametrize("ambiguous_first", [True, False])
def test_a_batch_that_contradicts_a_settled_layout_is_an_error(ambiguous_first):
    model = Sequence(1)
    maker = kfac(model, "reduce")
    size = R if ambiguous_first else N
    step(maker, F.cross_entropy, torch.randint(C, (size,)), torch.randn(size, R, D))
    model.position_dim = 0
    with pytest.raises(ValueError, match=r"'fc1'.*batch_first as earlier batches.*sequence_first"):
        step(maker, F.cross_entropy, torch.randint(C, (N,)), torch.randn(R, N, D))


def test_sizes_that_fit_no_layout_are_an_error():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x):  # 7 rows for 3 examples
            return self.head(self.fc(x.flatten(0, 1)[:7])[:N])

    with pytest.raises(ValueError, match=r"'fc'.*3 examples.*ignore_modules=\['fc'\]"):
        fisher(Crops(), "reduce", F.cross_entropy, torch.randint(C, (N,)), torch.randn(N, R, D))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_batch_of_a_single_example_has_its_factors(setting):
    for position_dim in (0, 1):
        model = Sequence(position_dim)
        x, target = torch.randn(1, R, D), torch.randint(C, (1,))
        x = x if position_dim else x.transpose(0, 1)
        fisher(model, setting, sum_loss, target, x, data_size=1)
        for layer in (model.fc1, model.fc2, model.head):
            assert_factors(
                layer,
                empirical_factors(
                    layer,
                    lambda i, model=model, x=x, target=target: sum_loss(model(x), target),
                    1,
                    setting,
                ),
            )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("flatten_in_model", [True, False])
def test_a_decoder_that_flattens(setting, flatten_in_model):
    """Logits ``(N·R, C)`` from rows ``(N·R, D)``: the positions of an example are still its own."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.decoder = nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x):
            x = torch.tanh(self.body(x))
            x = x + x.mean(1, keepdim=True)
            return self.decoder(x.flatten(0, 1)) if flatten_in_model else self.decoder(x)

    model, x, target = Decoder(), torch.randn(N, R, D), torch.randint(C, (N, R))
    fisher(model, setting, sum_loss, target, x, data_size=N)
    for layer in (model.body, model.decoder):
        expected = empirical_factors(
            layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        assert_factors(layer, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sequence_first_decoder_that_flattens(setting):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch_first = False
            self.body, self.decoder = nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x):  # (R, N, D) -> (R·N, C)
            x = torch.tanh(self.body(x))
            return self.decoder((x + x.mean(0)).flatten(0, 1))

    model, x, target = Decoder(), torch.randn(R, N, D), torch.randint(C, (R, N))
    fisher(model, setting, sum_loss, target, x, data_size=N)
    for layer in (model.body, model.decoder):
        expected = empirical_factors(
            layer, lambda i: sum_loss(model(x[:, i : i + 1]), target[:, i : i + 1]), N, setting
        )
        assert_factors(layer, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_several_sharing_dimensions_in_both_layouts(setting):
    class Grid(nn.Module):
        def __init__(self, dims):
            super().__init__()
            self.dims, self.fc, self.head = dims, nn.Linear(D, 6), nn.Linear(6, C)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)).mean(self.dims))

    x, target = torch.randn(N, 5, 2, D), torch.randint(C, (N,))
    for dims, order in (((1, 2), (0, 1, 2, 3)), ((0, 2), (1, 0, 2, 3))):
        torch.manual_seed(1)
        model = Grid(dims)
        fisher(model, setting, sum_loss, target, x.permute(order), data_size=N)

        def example(i, model=model, order=order):
            return sum_loss(model(x[i : i + 1].permute(order)), target[i : i + 1])

        assert_factors(model.fc, empirical_factors(model.fc, example, N, setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_pooled_crops_merged_into_the_batch(setting):
    """``(N, k, 3, H, W)`` run as ``N·k`` images: crops are further positions of their example."""

    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.conv2 = (
                nn.Conv2d(2, 4, 3, padding=1, stride=2),
                nn.Conv2d(4, 5, 3, bias=False),
            )
            self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, C)

        def forward(self, x):
            n, k = x.shape[:2]
            x = self.conv2(torch.tanh(self.conv(x.flatten(0, 1))))
            x = self.fc(torch.tanh(x.mean((2, 3))))  # n·k rows
            return self.head(x.view(n, k, -1).mean(1))

    model, x, target = Crops(), torch.randn(N, 4, 2, 8, 9), torch.randint(C, (N,))
    fisher(model, setting, sum_loss, target, x, data_size=N)
    for layer in (model.conv, model.conv2, model.fc, model.head):
        expected = empirical_factors(
            layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        assert_factors(layer, expected)


def small_swin():
    make_importable()
    timm = pytest.importorskip("timm")
    return timm.models.SwinTransformer(
        img_size=16,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
        num_classes=C,
        drop_path_rate=0.0,
    ).double()


@pytest.mark.parametrize("setting", SETTINGS)
def test_windows_of_swin_are_positions_of_their_image(setting):
    """Window attention sees ``(N·windows, 16, D)``: factors are those of single images, layer by
    layer.
    """
    model, x, target = small_swin(), torch.randn(N, 3, 16, 16), torch.randint(C, (N,))
    fisher(
        model,
        setting,
        sum_loss,
        target,
        x,
        data_size=N,
        shapes=["kron", (nn.LayerNorm, "unit_wise")],
    )
    names = [
        "patch_embed.proj",
        "layers.0.blocks.0.attn.qkv",
        "layers.0.blocks.1.attn.proj",
        "layers.0.blocks.1.mlp.fc1",
        "layers.1.downsample.reduction",
        "layers.1.blocks.0.attn.qkv",
        "head.fc",
    ]
    layers = dict(model.named_modules())
    for name in names:
        expected = empirical_factors(
            layers[name], lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        assert_factors(layers[name], expected, rtol=1e-9)


@pytest.mark.parametrize(
    "n", [4, 16]
)  # as many images as windows, as many images as positions of a window
def test_swin_of_sizes_that_fit_both_layouts_is_read_off_the_graph(n):
    """Where N is a window's size or the feature map's height, batch first is right, and nothing is
    said.
    """
    model, x, target = small_swin(), torch.randn(n, 3, 16, 16), torch.randint(C, (n,))
    fisher(
        model,
        "reduce",
        sum_loss,
        target,
        x,
        data_size=n,
        shapes=["kron", (nn.LayerNorm, "unit_wise")],
    )
    layer = model.layers[0].blocks[1].attn.qkv
    expected = empirical_factors(
        layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), n, "reduce"
    )
    assert_factors(layer, expected, rtol=1e-9)
    # The rule for everything says it once and for all, in silence.
    fisher(
        model,
        [(nn.Module, "reduce", "batch_first")],
        sum_loss,
        target,
        x,
        data_size=n,
        shapes=["kron", (nn.LayerNorm, "unit_wise")],
    )
    assert_factors(layer, expected, rtol=1e-9)
