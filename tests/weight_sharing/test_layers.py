"""Layers that models use in their own ways: called twice, tied, unused, frozen, hooked, subclassed,
in place.
"""

import warnings

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.by_example import assert_factors, empirical_factors, fisher, hooks_of, kfac, kron, step
from torch import Tensor, nn

from asdl_ws_plugin._torchvision import make_importable

pytestmark = pytest.mark.usefixtures("double")
SETTINGS = ["expand", "reduce"]
N, R, D, C = 4, 5, 6, 3


def sum_loss(y, target):
    return F.cross_entropy(y.reshape(-1, y.shape[-1]), target.reshape(-1), reduction="sum")


def check(model, layers, setting, x=None, *, tied=None, rtol=1e-10, **options):
    """The empirical factors of these layers against a loop over single examples."""
    x = torch.randn(N, R, D) if x is None else x
    target = torch.randint(C, (len(x),))
    maker = fisher(model, setting, sum_loss, target, x, data_size=len(x), **options)
    for layer in layers:
        expected = empirical_factors(
            tied or layer,
            lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]),
            len(x),
            setting,
        )
        assert_factors(layer, expected, rtol=rtol)
    return maker


def inverse_of(A: Tensor, B: Tensor, damping: float):
    """ASDL's damped inverses, from their definition: A + √λ·π, B + √λ/π."""
    pi = (A.trace() / len(A) / (B.trace() / len(B))).sqrt()
    root = damping**0.5
    return torch.linalg.inv(A + root * pi * torch.eye(len(A))), torch.linalg.inv(
        B + root / pi * torch.eye(len(B))
    )


# ------------------------------------------------------------------------- calls and shared weights


class Recurrent(nn.Module):
    """One layer called three times, on tensors of different numbers of positions."""

    def __init__(self):
        super().__init__()
        self.cell, self.conv, self.head = (
            nn.Linear(D, D),
            nn.Conv2d(1, 1, 3, padding=1),
            nn.Linear(D, C),
        )

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.cell(x))
            x = torch.tanh(self.conv(x.unsqueeze(1))).squeeze(1)
        return self.head(torch.tanh(self.cell(x.mean(1))))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_module_that_is_called_several_times(setting):
    model = Recurrent()
    check(model, [model.cell, model.conv, model.head], setting)


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
@pytest.mark.parametrize("setting", SETTINGS)
def test_its_gradient_is_preconditioned_once(setting, ema_decay):
    """Upstream, without the moving average, uses the last input twice and sums inverses."""
    model, x, target = Recurrent(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(
        model, setting, fisher_type="fisher_emp", data_size=N, ema_decay=ema_decay, damping=0.1
    )
    step(maker, sum_loss, target, x)
    A, B = empirical_factors(
        model.cell, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
    )
    A_inv, B_inv = inverse_of(A, B, 0.1)
    weight, bias = torch.autograd.grad(
        sum_loss(model(x), target), [model.cell.weight, model.cell.bias]
    )
    torch.testing.assert_close(
        model.cell.weight.grad, B_inv @ weight @ A_inv, rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(model.cell.bias.grad, B_inv @ bias, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_exact"])
def test_a_call_that_does_not_reach_the_loss_does_not_count(fisher_type):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x):
            self.fc(2 * x)
            return self.head(torch.tanh(self.fc(x)).mean(1))

    model, x = Dead(), torch.randn(N, R, D)
    fisher(model, "reduce", None, None, x, fisher_type=fisher_type, data_size=N)
    mean = x.mean(1)
    torch.testing.assert_close(kron(model.fc)[0], mean.mT @ mean / N)
    assert kron(model.fc)[1].abs().sum() > 0


class Tied(nn.Module):
    """Two linear layers with one weight; the second has a bias of its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.encode, self.decode, self.head = (
            nn.Linear(D, D),
            nn.Linear(D, D, bias=bias),
            nn.Linear(D, C),
        )
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.head(torch.tanh(self.decode(torch.tanh(self.encode(x)))).mean(1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_linear_layers_with_one_weight(setting):
    model = Tied()
    check(model, [model.encode], setting, tied=[model.encode, model.decode])
    assert not hasattr(model.decode, "fisher")


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
def test_a_tied_weight_is_preconditioned_once_and_each_bias_by_the_same_factor(ema_decay):
    model, x, target = Tied(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, fisher_type="fisher_emp", data_size=N, ema_decay=ema_decay, damping=0.1)
    assert list(maker.shared_dim_for) == ["encode", "head"]
    step(maker, sum_loss, target, x)
    A, B = empirical_factors(
        [model.encode, model.decode],
        lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]),
        N,
        "reduce",
    )
    A_inv, B_inv = inverse_of(A, B, 0.1)
    weight, bias, other = torch.autograd.grad(
        sum_loss(model(x), target), [model.encode.weight, model.encode.bias, model.decode.bias]
    )
    torch.testing.assert_close(
        model.encode.weight.grad, B_inv @ weight @ A_inv, rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(model.encode.bias.grad, B_inv @ bias, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.decode.bias.grad, B_inv @ other, rtol=1e-8, atol=1e-10)


class TiedConvolutions(nn.Module):
    """One weight at two dilations, the second one strided, too."""

    def __init__(self):
        super().__init__()
        self.near, self.far = (
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Conv2d(2, 3, 3, padding=2, dilation=2, stride=2),
        )
        self.far.weight, self.far.bias = self.near.weight, self.near.bias
        self.head = nn.Linear(3, C)

    def forward(self, x):
        convolved = [self.far] if self.only_far else [self.near, self.far]
        return self.head(sum(torch.tanh(layer(x)).mean((2, 3)) for layer in convolved))


@pytest.mark.parametrize("only_far", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_convolutions_with_one_weight(setting, only_far):
    model = TiedConvolutions()
    model.only_far = only_far
    check(model, [model.near], setting, torch.randn(N, 2, 5, 5), tied=[model.near, model.far])


def test_two_normalizations_with_one_weight():
    class TwoNorms(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.sharp, self.smooth = (
                nn.Linear(D, D),
                nn.LayerNorm(D),
                nn.LayerNorm(D, eps=1.0),
            )
            self.smooth.weight, self.smooth.bias = self.sharp.weight, self.sharp.bias
            self.head = nn.Linear(D, C)

        def forward(self, x):
            return self.head(torch.tanh(self.sharp(self.mix(x))) + self.smooth(x)).mean(1)

    model, x, target = TwoNorms(), torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(model, "reduce", sum_loss, target, x, data_size=N, shapes=["layer_wise"])
    grads = [
        torch.cat(
            torch.autograd.grad(
                sum_loss(model(x[i : i + 1]), target[i : i + 1]),
                [model.sharp.weight, model.sharp.bias],
            )
        )
        for i in range(N)
    ]
    torch.testing.assert_close(model.sharp.fisher.data, sum(g.outer(g) for g in grads) / N)


@pytest.mark.parametrize("shape", ["layer_wise", "diag", "unit_wise", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_weight_with_two_biases_is_refused_by_shapes_that_hold_them_together(bias, shape):
    with pytest.raises(
        ValueError, match=r"'decode' and 'encode' have one weight, but not one bias.*ignore_modules"
    ):
        fisher(
            Tied(bias),
            "reduce",
            sum_loss,
            torch.randint(C, (N,)),
            torch.randn(N, R, D),
            shapes=[shape],
        )


@pytest.mark.parametrize(
    "rules", [["reduce", ("decode", "expand")], ["reduce", ("decode", "sequence_first")]]
)
def test_one_weight_under_two_rules_is_refused(rules):
    with pytest.raises(ValueError, match=r"'decode'.*'encode'.*one weight"):
        kfac(Tied(), rules)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.decoder = nn.Embedding(7, D), nn.Linear(D, D), nn.Linear(D, 7)
        self.decoder.weight = self.embed.weight

    def forward(self, ids):
        return self.decoder(torch.tanh(self.fc(self.embed(ids))))


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
def test_an_embedding_tied_to_the_decoder_is_left_to_the_first_order_optimizer(ema_decay):
    model, ids, target = LanguageModel(), torch.randint(7, (N, R)), torch.randint(7, (N, R))
    maker = kfac(model, "expand", ema_decay=ema_decay)
    assert list(maker.shared_dim_for) == ["fc"]
    assert "tied to the embedding 'embed'" in maker.plan.skipped["decoder"]
    assert "vocabulary" in maker.plan.skipped["embed"]
    step(maker, sum_loss, target, ids)
    expected = torch.autograd.grad(
        sum_loss(model(ids), target), [model.embed.weight, model.decoder.bias]
    )
    torch.testing.assert_close(model.embed.weight.grad, expected[0])
    torch.testing.assert_close(model.decoder.bias.grad, expected[1])


@pytest.mark.parametrize("shape", ["kron", "swift_kron", "unit_wise"])
def test_embeddings_are_left_out_of_kronecker_factors(shape):
    model = nn.Sequential(nn.Embedding(7, D), nn.Linear(D, C))
    config = FisherConfig("fisher_emp", [shape], shared_dim="expand")
    assert [layer.name for layer in get_fisher_maker(model, config).plan.layers] == ["1"]


def test_an_embedding_of_ids_in_one_dimension_by_its_diagonal():
    model = nn.Sequential(nn.Embedding(7, D), nn.Linear(D, C))
    ids, target = torch.randint(7, (N,)), torch.randint(C, (N,))
    fisher(model, "expand", sum_loss, target, ids, shapes=["diag"], data_size=N)
    expected = torch.zeros(7, D)
    for i in range(N):
        (grad,) = torch.autograd.grad(
            sum_loss(model(ids[i : i + 1]), target[i : i + 1]), model[0].weight
        )
        expected += grad**2 / N
    torch.testing.assert_close(model[0].fisher.diag.weight, expected)


# -------------------------------------------------------------------------- layers that saw nothing


class Depth(nn.Module):
    """Stochastic depth: the middle layer may be dropped, or run without reaching the logits."""

    drop = ""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.drop == "":
            x = x + torch.tanh(self.middle(x))
        elif self.drop == "dead":
            self.middle(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("drop", ["skipped", "dead"])
@pytest.mark.parametrize("ema_decay", [-1, 0.25])
@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp", "fisher_exact"])
def test_an_unused_layer_is_reported_and_not_stale(fisher_type, ema_decay, drop):
    model, x, target = Depth(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, fisher_type=fisher_type, ema_decay=ema_decay, data_size=N, seed=1)
    step(maker, sum_loss, target, x)
    if ema_decay == 0.25:
        before = [factor.clone() for factor in kron(model.middle)]
        first = kron(model.first)[0].clone()
    model.drop = drop
    message = (
        "'middle' was not called" if drop == "skipped" else "'middle' does not influence the logits"
    )
    with pytest.warns(UserWarning, match=message):
        step(maker, sum_loss, target, x)
    assert model.middle.weight.grad is None or not model.middle.weight.grad.any()
    if ema_decay == 0.25:  # its average waits; those of the others go on
        assert all(torch.equal(*pair) for pair in zip(before, kron(model.middle), strict=True))
        a = x.mean(1)
        torch.testing.assert_close(kron(model.first)[0], 0.75 * first + 0.25 * a.mT @ a / N)
    else:
        assert not hasattr(model.middle, "fisher")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(maker, sum_loss, target, x)  # reported once
        model.drop = ""
        step(maker, sum_loss, target, x)
    (raw,) = torch.autograd.grad(sum_loss(model(x), target), model.middle.weight)
    assert not torch.allclose(model.middle.weight.grad, raw)


def test_a_layer_unused_on_the_curvature_step_has_its_own_gradient_in_between():
    """No factors of an earlier batch are applied to a layer that took no part in the last curvature
    update.
    """
    model, x, target = Depth(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, ema_decay=0.5, curvature_upd_interval=2, preconditioner_upd_interval=2)
    step(maker, sum_loss, target, x)
    step(maker, sum_loss, target, x)
    model.drop = "skipped"
    with pytest.warns(UserWarning, match="'middle'"):
        step(maker, sum_loss, target, x)
    model.drop = ""
    step(maker, sum_loss, target, x)  # no curvature; the layer takes part
    (raw,) = torch.autograd.grad(sum_loss(model(x), target), model.middle.weight)
    torch.testing.assert_close(model.middle.weight.grad, raw)


# ------------------------------------------------------------------------------ frozen and unfrozen


def mixed_model():
    return nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, C))


SHAPES = ["kron", "layer_wise", "diag", "unit_wise"]


def natural(model, shape, ema_decay=-1, **options):
    shapes = [shape, (nn.LayerNorm, "unit_wise" if shape == "kron" else shape)]
    return asdl.precondition.NaturalGradientMaker(
        model,
        asdl.PreconditioningConfig(data_size=N, damping=0.1, ema_decay=ema_decay),
        fisher_type="fisher_emp",
        fisher_shape=shapes,
        shared_dim="reduce",
        **options,
    )


def expected_gradients(model, shape, x, target):
    """Preconditioned gradients of one batch, parameter by parameter, from the examples'
    gradients.
    """
    expected = {}
    loss = sum_loss(model(x), target)
    for layer in (model[0], model[1], model[3]):
        params = [p for p in (layer.weight, layer.bias) if p.requires_grad]
        if not params:
            continue
        grads = list(torch.autograd.grad(loss, params, retain_graph=True))
        if isinstance(layer, nn.Linear) and shape == "kron":
            A, B = empirical_factors(
                layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, "reduce"
            )
            A_inv, B_inv = inverse_of(A, B, 0.1)
            for p, grad in zip(params, grads, strict=True):
                expected[p] = B_inv @ grad @ A_inv if grad.ndim == 2 else B_inv @ grad
            continue
        rows = [
            torch.autograd.grad(sum_loss(model(x[i : i + 1]), target[i : i + 1]), params)
            for i in range(N)
        ]
        units = layer.weight.shape[0]
        if shape == "layer_wise":
            flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            block = flat.mT @ flat / N + 0.1 * torch.eye(flat.shape[1])
            solution = torch.linalg.solve(block, torch.cat([g.flatten() for g in grads]))
            for p, part in zip(params, solution.split([p.numel() for p in params]), strict=True):
                expected[p] = part.view_as(p)
        elif shape == "diag" or (isinstance(layer, nn.LayerNorm) and len(params) == 1):
            for k, (p, grad) in enumerate(zip(params, grads, strict=True)):
                expected[p] = grad / (sum(row[k] ** 2 for row in rows) / N + 0.1)
        else:  # a block for every unit
            per_unit = torch.stack(
                [torch.cat([g.reshape(units, -1) for g in row], dim=1) for row in rows]
            )
            blocks = torch.einsum("nui,nuj->uij", per_unit, per_unit) / N + 0.1 * torch.eye(
                per_unit.shape[-1]
            )
            vectors = torch.cat([g.reshape(units, -1) for g in grads], dim=1)
            solved = torch.linalg.solve(blocks, vectors.unsqueeze(2)).squeeze(2)
            for p, part in zip(
                params, solved.split([p.numel() // units for p in params], dim=1), strict=True
            ):
                expected[p] = part.reshape(p.shape)
    return expected


FROZEN = {
    "nothing": [],
    "a weight": ["0.weight"],
    "a bias": ["3.bias"],
    "a norm's weight": ["1.weight"],
    "a norm's bias": ["1.bias"],
    "a layer": ["0.weight", "0.bias"],
    "a norm": ["1.weight", "1.bias"],
}


def assert_gradients(model, shape, x, target):
    expected = expected_gradients(model, shape, x, target)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, expected[p], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
@pytest.mark.parametrize("frozen", list(FROZEN))
@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_parameters_leave_the_others_preconditioned(shape, frozen, ema_decay):
    model, x, target = mixed_model(), torch.randn(N, D), torch.randint(C, (N,))
    for name in FROZEN[frozen]:
        model.get_parameter(name).requires_grad_(False)
    maker = natural(model, shape, ema_decay)
    step(maker, sum_loss, target, x)
    assert_gradients(model, shape, x, target)


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
@pytest.mark.parametrize("frozen", list(FROZEN)[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("late", ["freeze", "unfreeze"])
def test_freezing_and_unfreezing_late(shape, frozen, ema_decay, late):
    """What is trainable is looked at on every step, not when the gradient maker is made."""
    model, x, target = mixed_model(), torch.randn(N, D), torch.randint(C, (N,))
    parameters = [model.get_parameter(name) for name in FROZEN[frozen]]
    for p in parameters:
        p.requires_grad_(late == "freeze")
    maker = natural(model, shape, ema_decay)
    step(maker, sum_loss, target, x)
    for p in parameters:
        p.requires_grad_(late != "freeze")
    for _ in range(2):
        step(maker, sum_loss, target, x)
        assert_gradients(model, shape, x, target)


# ------------------------------------------------------------------------------------ normalization


class OwnNorm(nn.LayerNorm):
    """A subclass with its own forward, as timm has it."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirstNorm(nn.LayerNorm):
    """As timm's LayerNorm2d: the features are dimension 1."""

    def forward(self, x):
        return F.layer_norm(
            x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps
        ).movedim(-1, 1)


class OtherNorm(nn.LayerNorm):
    """A subclass that is no LayerNorm (an RMSNorm)."""

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight + self.bias


class Normed(nn.Module):
    def __init__(self, norm, in_place=False, channels_first=False):
        super().__init__()
        self.norm, self.head, self.in_place, self.channels_first = (
            norm,
            nn.Linear(D, C),
            in_place,
            channels_first,
        )
        with torch.no_grad():
            for p in norm.parameters():
                p.normal_()

    def forward(self, x):
        x = self.norm(x.movedim(-1, 1)).movedim(1, -1) if self.channels_first else self.norm(x)
        if self.in_place:
            x += 1
        return self.head(torch.tanh(x).flatten(1, -2).mean(1))


def check_norm(model, shape, x=None):
    x = torch.randn(N, R, D) if x is None else x
    target = torch.randint(C, (N,))
    fisher(model, "reduce", sum_loss, target, x, data_size=N, shapes=["kron", (nn.Module, shape)])
    params = [p for p in (model.norm.weight, model.norm.bias) if p is not None]
    grads = [
        torch.stack(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    sum_loss(model(x[i : i + 1]), target[i : i + 1]), params
                )
            ],
            dim=1,
        )
        for i in range(len(x))
    ]
    expected = sum(torch.einsum("fi,fj->fij", g, g) for g in grads) / N
    if shape == "unit_wise" and len(params) == 2:
        torch.testing.assert_close(model.norm.fisher.unit.data, expected, rtol=1e-9, atol=1e-14)
    else:
        diag = model.norm.fisher.diag
        torch.testing.assert_close(diag.weight.flatten(), expected[:, 0, 0], rtol=1e-9, atol=1e-14)
        if len(params) == 2:
            torch.testing.assert_close(
                diag.bias.flatten(), expected[:, 1, 1], rtol=1e-9, atol=1e-14
            )


@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(D),
        lambda: nn.LayerNorm(D, bias=False),
        lambda: OwnNorm(D),
        lambda: OwnNorm(D, bias=False),
        lambda: nn.LayerNorm(D, eps=1e-1),
    ],
)
def test_layer_norms_have_their_blocks(norm, shape):
    check_norm(Normed(norm()), shape)


@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
def test_a_layer_norm_over_two_dimensions(shape):
    class Grid(Normed):
        def forward(self, x):
            return self.head(torch.tanh(self.norm(x)).mean((1, 2)))

    check_norm(Grid(nn.LayerNorm((2, D))), shape, torch.randn(N, R, 2, D))


@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
def test_a_layer_norm_whose_weight_is_zero(shape):
    model = Normed(nn.LayerNorm(D))
    with torch.no_grad():
        model.norm.weight[:3] = 0
    check_norm(model, shape)


@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
def test_an_in_place_addition_after_a_layer_norm(norm):
    check_norm(Normed(norm(D), in_place=True), "unit_wise")


@pytest.mark.parametrize(
    "height", [3, N]
)  # as high as there are images: no question of layout for channels first
@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
def test_a_layer_norm_of_channels_first(shape, height):
    check_norm(
        Normed(ChannelsFirstNorm(D), channels_first=True), shape, torch.randn(N, height, 2, D)
    )


@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
def test_layer_norms_of_timm_have_their_blocks(shape):
    make_importable()
    layers = pytest.importorskip("timm.layers")
    check_norm(Normed(layers.LayerNorm(D)), shape)
    check_norm(Normed(layers.LayerNorm2d(D), channels_first=True), shape, torch.randn(N, 3, 2, D))


@pytest.mark.parametrize("height", [3, N])
def test_batch_norm_of_images_as_high_as_there_are_images(height):
    model = Normed(nn.BatchNorm2d(D), channels_first=True).eval()
    check_norm(model, "diag", torch.randn(N, height, 2, D))


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass with an activation in its forward, in place or not."""

    def __init__(self, in_place):
        super().__init__(D)
        self.in_place = in_place

    def forward(self, x):
        return F.relu(super().forward(x), inplace=self.in_place)


class Stemmed(Normed):
    """The norm comes after another layer."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stem = nn.Linear(D, D)

    def forward(self, x):
        return super().forward(self.stem(x))


@pytest.mark.parametrize("shape", ["unit_wise", "diag"])
@pytest.mark.parametrize("kind", ["in place", "not in place", "timm"])
@pytest.mark.parametrize("stem", [False, True], ids=["of the input", "of a layer"])
def test_a_batch_norm_with_an_activation(stem, kind, shape):
    """The block is that of the normalization's own output, which the activation changes."""
    make_importable()
    timms = pytest.importorskip("timm.layers").BatchNormAct2d
    norm = timms(D, act_layer=nn.SiLU) if kind == "timm" else ActivatedNorm(kind == "in place")
    model = (Stemmed if stem else Normed)(norm, channels_first=True).eval()
    check_norm(model, shape, torch.randn(N, 3, 2, D))


class OtherBatchNorm(nn.BatchNorm2d):
    """Normalizes something else than its input."""

    def forward(self, x):
        return super().forward(x * x)


def test_a_subclass_that_computes_something_else_is_refused():
    with pytest.raises(
        ValueError, match=r"'norm' \(OtherNorm\) is a subclass of LayerNorm that computes"
    ):
        check_norm(Normed(OtherNorm(D)), "unit_wise")
    model = nn.Sequential(
        nn.Conv2d(2, D, 1), OtherBatchNorm(D), nn.Flatten(1), nn.LazyLinear(C)
    ).eval()
    with pytest.raises(
        ValueError, match=r"'1' \(OtherBatchNorm\) is a subclass of BatchNorm that computes"
    ):
        fisher(
            model,
            "reduce",
            sum_loss,
            torch.randint(C, (N,)),
            torch.randn(N, 2, 3, 3),
            shapes=["kron", (nn.BatchNorm2d, "unit_wise")],
        )


class StandardizedConv(nn.Conv2d):
    """Uses another weight than the one it has, as weight standardization does."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class SamePaddedConv(nn.Conv2d):
    """Pads by itself, as TensorFlow's "same" and timm's Conv2dSame do."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class AdaptedConv(nn.Conv2d):
    """A convolution of its own weight, and an adapter beside it."""

    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)[..., 1:-1, 1:-1]


@pytest.mark.parametrize("conv", [StandardizedConv, SamePaddedConv])
def test_a_convolution_that_computes_something_else_is_refused(conv):
    model = nn.Sequential(conv(2, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C))
    x = torch.randn(N, 2, 8, 8)
    model(x)
    match = rf"'0' \({conv.__name__}\) is a subclass of Conv2d that computes something else"
    with pytest.raises(ValueError, match=match):
        check(model, [model[0]], "expand", x)
    check(model, [model[3]], "expand", x, ignore=["0"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_subclass_of_conv2d_that_is_one_works(setting):
    model = nn.Sequential(AdaptedConv(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C))
    x = torch.randn(N, 2, 6, 6)
    model(x)
    check(model, [model[0]], setting, x)


def test_norms_without_parameters_are_nothing_to_precondition():
    model = nn.Sequential(
        nn.Linear(D, D),
        nn.LayerNorm(D, elementwise_affine=False),
        nn.BatchNorm1d(D, affine=False),
        nn.Linear(D, C),
    )
    maker = kfac(model, ema_decay=0.5)
    assert list(maker.shared_dim_for) == ["0", "3"]
    step(maker, sum_loss, torch.randint(C, (N,)), torch.randn(N, D))


# ----------------------------------------------------------------------------------------- in place


class InPlace(nn.Module):
    """``act`` works in place on the output of the layer before it, where the layer is followed by
    nothing else.
    """

    def __init__(self, layer, act, dims):
        super().__init__()
        self.layer, self.act, self.dims = layer, act, dims
        self.head = nn.LazyLinear(C)

    def forward(self, x):
        x = self.act(self.layer(x))
        return self.head(x.mean(self.dims) if self.dims else x)


ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.1, inplace=True),
    "add": lambda x: x.add_(1).tanh(),
    "mul": lambda x: x.mul_(2).sin_(),
}


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact"])
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear 2-D", "linear 3-D", "linear 4-D", "conv"])
def test_an_in_place_activation_after_a_layer(kind, bias, act, fisher_type):
    dims = {"linear 2-D": (), "linear 3-D": (1,), "linear 4-D": (1, 2), "conv": (2, 3)}[kind]
    x = {
        "linear 2-D": (N, D),
        "linear 3-D": (N, R, D),
        "linear 4-D": (N, R, 2, D),
        "conv": (N, 2, 5, 4),
    }[kind]
    x = torch.randn(*x)
    layer = nn.Conv2d(2, 4, 3, bias=bias) if kind == "conv" else nn.Linear(D, 4, bias=bias)

    class Plain(InPlace):
        """The same function without anything in place."""

        def forward(self, x):
            x = self.act(self.layer(x).clone())
            return self.head(x.mean(self.dims) if self.dims else x)

    model = InPlace(layer, ACTIVATIONS[act], dims)
    model(x)
    if fisher_type == "fisher_emp":
        plain = Plain(layer, ACTIVATIONS[act], dims)
        plain.head = model.head
        target = torch.randint(C, (N,))
        fisher(model, "reduce", sum_loss, target, x, data_size=N)
        assert_factors(
            layer,
            empirical_factors(
                layer, lambda i: sum_loss(plain(x[i : i + 1]), target[i : i + 1]), N, "reduce"
            ),
        )
        return
    fisher(model, "reduce", None, None, x, data_size=N, fisher_type=fisher_type)
    B = torch.zeros(4, 4)  # Σ_n Jᵀ Λ J, J of the logits with respect to the summed output
    for i in range(N):
        with torch.no_grad():
            out = layer(x[i : i + 1])

        def logits(shift, out=out):
            z = ACTIVATIONS[act]((out + shift).clone())
            return model.head(z.mean(dims) if dims else z)[0]

        J = torch.func.jacrev(logits)(torch.zeros_like(out))
        J = J.sum((-1, -2))[:, 0] if kind == "conv" else J.flatten(1, -2).sum(1)
        p = logits(torch.zeros_like(out)).softmax(0)
        B += J.mT @ (p.diag() - p.outer(p)) @ J / N
    torch.testing.assert_close(kron(layer)[1], B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
def test_in_place_activations_after_batch_norm_and_convolution(ema_decay):
    def make(in_place):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(in_place),
            nn.Conv2d(4, 4, 2),
            nn.ReLU(in_place),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.ReLU(in_place),
            nn.Linear(8, C),
        )

    x, target, found = torch.randn(N, 2, 5, 5), torch.randint(C, (N,)), []
    for in_place in (True, False):
        model = make(in_place)
        step(
            kfac(model, fisher_type="fisher_emp", ema_decay=ema_decay, damping=0.1),
            F.cross_entropy,
            target,
            x,
        )
        found.append([p.grad for p in model.parameters()])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------- the user's hooks


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))).mean(1))


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp"])
def test_the_users_hooks_run_and_stay(fisher_type):
    model, seen = Tokens(), []
    handles = [
        model.fc1.register_forward_hook(lambda *_: seen.append("forward")),
        model.fc1.register_forward_pre_hook(lambda *_: seen.append("pre")),
        model.fc2.register_full_backward_hook(lambda *_: seen.append("backward")),
        model.fc2.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        model.fc1.weight.register_hook(lambda grad: seen.append("weight")),
    ]
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, fisher_type=fisher_type, data_size=N, ema_decay=1.0)
    step(maker, sum_loss, target, x)
    assert {"forward", "pre", "backward", "backward pre", "weight"} <= set(seen)
    assert seen.count("forward") == seen.count("pre") == seen.count("weight") == 1
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == hooks_of(Tokens())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("full_backward", [True, False])
def test_hooks_that_change_what_a_layer_sees_and_returns(setting, full_backward):
    """Curvature is of the weight: of its own input, after pre-hooks, and of its own output, before
    hooks.
    """
    model = Tokens()
    model.fc1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.fc2.register_forward_hook(lambda m, args, out: out * 3)
    if full_backward:
        model.fc2.register_full_backward_hook(lambda m, grad_in, grad_out: None)
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(model, setting, sum_loss, target, x, data_size=N)
    found = {layer: kron(layer) for layer in (model.fc1, model.fc2, model.head)}

    class Written(nn.Module):
        """The same function without hooks."""

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x):
            return self.head(torch.tanh(3 * self.fc2(torch.tanh(self.fc1(2 * x)))).mean(1))

    plain = Written()
    plain.load_state_dict(model.state_dict())
    for layer, same in zip(found, (plain.fc1, plain.fc2, plain.head), strict=True):
        expected = empirical_factors(
            same, lambda i: sum_loss(plain(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        assert_factors(layer, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_calls_by_keyword_only(setting):
    class Keywords(Tokens):
        def forward(self, x):
            x = torch.tanh(self.fc2(input=torch.tanh(self.fc1(input=x))))
            return self.head(input=x.mean(1))

    model = Keywords()
    check(model, [model.fc1, model.fc2, model.head], setting)


def test_the_models_own_arguments_by_keyword():
    class Keywords(Tokens):
        def forward(self, *, mask, x):
            return super().forward(x)

    model, x, target = Keywords(), torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(model, "reduce", sum_loss, target, mask=None, x=x, data_size=N)
    assert_factors(
        model.fc1,
        empirical_factors(
            model.fc1,
            lambda i: sum_loss(model(mask=None, x=x[i : i + 1]), target[i : i + 1]),
            N,
            "reduce",
        ),
    )


class WithExtras(nn.Linear):
    """Returns a tuple, as column-parallel linear layers do."""

    def forward(self, x):
        return super().forward(x), self.bias


class Surprising(nn.Linear):
    """Takes something before the input."""

    def forward(self, scale, x):
        return super().forward(scale * x)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_that_returns_a_tuple_has_its_factors(setting):
    class Tuples(Tokens):
        def __init__(self):
            super().__init__()
            self.fc1 = WithExtras(D, D)

        def forward(self, x):
            return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)[0]))).mean(1))

    model, x, target = Tuples(), torch.randn(N, R, D), torch.randint(C, (N,))
    fisher(model, setting, sum_loss, target, x, data_size=N)
    plain = Tokens()
    plain.load_state_dict(model.state_dict())
    for layer, same in ((model.fc1, plain.fc1), (model.fc2, plain.fc2)):
        assert_factors(
            layer,
            empirical_factors(
                same, lambda i: sum_loss(plain(x[i : i + 1]), target[i : i + 1]), N, setting
            ),
        )


def test_a_subclass_with_a_signature_of_its_own_is_refused():
    class Odd(Tokens):
        def __init__(self):
            super().__init__()
            self.fc2 = Surprising(D, D)

        def forward(self, x):
            return self.head(self.fc2(torch.ones(()), self.fc1(x)).mean(1))

    with pytest.raises(ValueError, match=r"'fc2' \(Surprising\).*ignore_modules=\['fc2'\]"):
        step(kfac(Odd()), sum_loss, torch.randint(C, (N,)), torch.randn(N, R, D))


# ------------------------------------------------------------------------------ relatives of Linear


@pytest.mark.parametrize("setting", SETTINGS)
def test_subclasses_of_linear_have_its_factors(setting):
    """Upstream asserts the class's own name."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    model = Tokens()
    model.fc1 = NonDynamicallyQuantizableLinear(D, D)
    model.fc2 = nn.LazyLinear(D)
    model(torch.randn(N, R, D))
    check(model, [model.fc1, model.fc2], setting)
    step(kfac(model, setting), sum_loss, torch.randint(C, (N,)), torch.randn(N, R, D))


@pytest.mark.parametrize(
    "make", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_parametrized_weight_is_left_to_the_first_order_optimizer(make):
    """The weight is computed from other parameters: there is no gradient of it to precondition."""
    model = Tokens()
    make(model.fc2)
    maker = kfac(model)
    assert list(maker.shared_dim_for) == ["fc1", "head"]
    assert "its weight is computed from other parameters" in maker.plan.skipped["fc2"]
    x, target = torch.randn(N, R, D), torch.randint(C, (N,))
    model.eval()  # spectral_norm updates its vectors in training
    step(maker, sum_loss, target, x)
    own = list(model.fc2.parameters())
    for p, raw in zip(own, torch.autograd.grad(sum_loss(model(x), target), own), strict=True):
        torch.testing.assert_close(p.grad, raw)


def test_the_old_weight_norm_is_left_to_the_first_order_optimizer():
    model = Tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.fc2)
    assert "its weight is computed" in kfac(model).plan.skipped["fc2"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, C)

    def forward(self, x):
        return self.head(self.mha(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
def test_the_output_layer_of_torchs_attention_is_reported(ema_decay):
    """Its weight is used by a function, past the module: hooks do not see it, and it must not pass
    in silence.
    """
    model, x, target = Attention(), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, ema_decay=ema_decay)
    assert "convert" in maker.plan.unsupported["mha"]
    with pytest.warns(UserWarning, match=r"'mha.out_proj' was not called.*convert\(model\)"):
        step(maker, sum_loss, target, x)
    raw = torch.autograd.grad(
        sum_loss(model(x), target), [model.mha.out_proj.weight, model.mha.in_proj_weight]
    )
    torch.testing.assert_close(model.mha.out_proj.weight.grad, raw[0])
    torch.testing.assert_close(model.mha.in_proj_weight.grad, raw[1])
