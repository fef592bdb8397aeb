"""``shared_dim`` and Fisher shapes as lists of rules, and strategies of the user's own."""

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.by_example import assert_factors, empirical_factors, fisher, kfac, kron, step
from torch import nn

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable
from asdl_ws_plugin.weight_sharing.operations import LinearExpand, LinearReduce

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 4, 5, 3, 2


class MyLinear(nn.Linear):
    """A subclass, as libraries have their own."""


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.qkv, self.proj = linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.proj(torch.tanh(self.qkv(x))))


class Model(nn.Module):
    """``(N, 1, 6, R) -> (N, R, 6) -> (N, C)``; every layer but the head shares its weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, (6, 1))
        self.block1, self.block2 = Block(nn.Linear), Block(MyLinear)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, C)

    def forward(self, x):
        x = self.conv(x).squeeze(2).mT
        return self.head(self.norm(self.block2(self.block1(x))).mean(1))


def batch():
    return torch.randn(N, 1, 6, R), torch.randint(C, (N,))


def strategies_of(rules, model=None):
    model = Model() if model is None else model
    config = FisherConfig("fisher_emp", ["kron", (nn.LayerNorm, "unit_wise")], shared_dim=rules)
    plan = get_fisher_maker(model, config).plan
    found = {layer.name: plan.strategy_of(layer) for layer in plan.layers}
    found.pop("norm")
    return found


LINEAR = ["block1.qkv", "block1.proj", "block2.qkv", "block2.proj", "head"]


# ---------------------------------------------------------------------------------- which rule wins


def test_a_string_is_for_every_layer():
    assert strategies_of("reduce") == dict.fromkeys(["conv", *LINEAR], "reduce")
    assert strategies_of(["expand"]) == dict.fromkeys(["conv", *LINEAR], "expand")


def test_the_example_of_the_readme():
    model = Model()
    found = strategies_of(
        ["reduce", (nn.Conv2d, "expand"), ("block1", "expand"), (model.head, "expand")], model
    )
    assert found == {
        "conv": "expand",
        "block1.qkv": "expand",
        "block1.proj": "expand",
        "block2.qkv": "reduce",
        "block2.proj": "reduce",
        "head": "expand",
    }


def test_subclasses_match_their_base_class_and_the_nearest_class_wins():
    assert strategies_of(["expand", (nn.Linear, "reduce")])["block2.qkv"] == "reduce"
    for order in (1, -1):
        rules = [
            "expand",
            *[(nn.Module, "expand"), (nn.Linear, "expand"), (MyLinear, "reduce")][::order],
        ]
        found = strategies_of(rules)
        assert {name for name, strategy in found.items() if strategy == "reduce"} == {"block2.qkv"}


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_rule_wins_in_any_order(order):
    """A module, the full name, the longer part of a name, a class, the default."""
    model = Model()
    ladder = [
        ("expand", {"block2.qkv": "expand"}),
        ((nn.Linear, "reduce"), {"block2.qkv": "reduce"}),
        (("block", "expand"), {"block2.qkv": "expand", "head": "reduce"}),
        (("block2", "reduce"), {"block2.qkv": "reduce", "block1.qkv": "expand"}),
        (("block2.qkv", "expand"), {"block2.qkv": "expand", "block2.proj": "reduce"}),
        ((model.block2.qkv, "reduce"), {"block2.qkv": "reduce"}),
    ]
    for height in range(1, len(ladder) + 1):
        rules = [rule for rule, _ in ladder[:height]][::order]
        found = strategies_of(rules, model)
        for name, strategy in ladder[height - 1][1].items():
            assert found[name] == strategy, (height, name)


def test_a_full_name_stands_above_a_longer_part_of_another():
    """'fc' is the whole name of one layer and part of the other's."""
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    config = FisherConfig("fisher_emp", ["kron"], shared_dim=[("fc", "reduce"), ("fc2", "expand")])
    plan = get_fisher_maker(model, config).plan
    assert {layer.name: plan.strategy_of(layer) for layer in plan.layers} == {
        "fc": "reduce",
        "fc2": "expand",
    }


def test_a_container_is_a_key_by_its_name_only():
    """ASDL compares modules by identity: a container is not its layers, and says so instead of
    doing nothing.
    """
    model = Model()
    with pytest.raises(ValueError, match="matches no supported layer"):
        strategies_of(["reduce", (model.block1, "expand")], model)


def test_a_layout_needs_no_strategy_beside_it():
    model = Model()
    config = FisherConfig(
        "fisher_emp",
        ["kron", (nn.LayerNorm, "unit_wise")],
        shared_dim=["expand", "batch_first", ("qkv", "sequence_first"), (nn.Linear, "reduce")],
    )
    plan = get_fisher_maker(model, config).plan
    layer = next(layer for layer in plan.layers if layer.name == "block2.qkv")
    assert plan.strategy_of(layer) == "reduce"
    assert plan.layouts.rule[model.block2.qkv] == "sequence_first"
    assert plan.layouts.rule[model.head] == "batch_first"


# ---------------------------------------------------------------------------------- what is refused


MAKERS = {
    "kfac": lambda model, rules: asdl.KfacGradientMaker(
        model, asdl.PreconditioningConfig(), shared_dim=rules
    ),
    "ekfac": lambda model, rules: asdl.EkfacGradientMaker(
        model, asdl.PreconditioningConfig(), fisher_type="fisher_emp", shared_dim=rules
    ),
    "fisher": lambda model, rules: get_fisher_maker(
        model, FisherConfig("fisher_mc", ["kron"], loss_type="cross_entropy", shared_dim=rules)
    ),
}


@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ("redcue", ValueError, "'redcue'.*'expand', 'reduce', 'auto'"),
        (["reduce", ("head", "sum")], ValueError, "unknown value 'sum'"),
        (
            ["reduce", ("haed", "expand")],
            ValueError,
            "'haed' matches no supported layer.*block1.qkv",
        ),
        (["reduce", (nn.Conv1d, "expand")], ValueError, "Conv1d matches no supported layer"),
        (
            ["reduce", (nn.Linear(2, 2), "expand")],
            ValueError,
            "the module Linear matches no supported layer",
        ),
        (
            [("head", "reduce"), ("conv", "reduce")],
            ValueError,
            "no rule gives layer 'block1.qkv' a strategy",
        ),
        (["batch_first"], ValueError, "no rule gives layer 'conv' a strategy"),
        ([], ValueError, "no rule gives layer 'conv' a strategy"),
        (["reduce", ("head", "expand"), ("head", "reduce")], ValueError, "two rules for 'head'"),
        (
            ["reduce", (nn.Linear, "expand"), (nn.Linear, "expand")],
            ValueError,
            "two rules for Linear",
        ),
        (["reduce", "expand"], ValueError, "several strategies"),
        (["reduce", ("head", "expand", "reduce")], ValueError, "several strategies"),
        (
            ["reduce", ("head", "batch_first", "sequence_first")],
            ValueError,
            "several strategies or layouts",
        ),
        (1, TypeError, "a string or a list of rules, got 1"),
        (True, TypeError, "a string or a list of rules, got True"),
        (b"reduce", TypeError, "a string or a list of rules"),
        ({"head": "reduce"}, TypeError, "a string or a list of rules"),
        (["reduce", ["head", "expand"]], TypeError, "a tuple"),
        (["reduce", ("head",)], TypeError, "a tuple"),
        (["reduce", None], TypeError, "a tuple"),
        (["reduce", (3, "expand")], TypeError, "a module, a name or a module class, got 3"),
        (["reduce", (int, "expand")], TypeError, "a module, a name or a module class"),
        (["reduce", ("head", None)], TypeError, "values have to be strings"),
    ],
)
def test_rules_that_make_no_sense_are_refused(maker, rules, error, message):
    with pytest.raises(error, match=f"shared_dim.*{message}"):
        MAKERS[maker](Model(), rules)


def test_shapes_are_checked_too():
    for shapes, error in ((["kron", ("head", "cron")], ValueError), (["kron", 2], TypeError)):
        with pytest.raises(error, match="fisher_shape"):
            get_fisher_maker(Model(), FisherConfig("fisher_emp", shapes, shared_dim="reduce"))


def test_two_default_shapes_are_refused():
    with pytest.raises(ValueError, match=r"'conv' is assigned several Fisher shapes"):
        get_fisher_maker(Model(), FisherConfig("fisher_emp", ["kron", "diag"], shared_dim="reduce"))


# ------------------------------------------------------------- the factors that each layer then has


def test_every_layer_has_the_factors_of_its_own_rule():
    model, (x, target) = Model(), batch()
    rules = ["reduce", (nn.Conv2d, "expand"), ("block2", "expand"), (model.block2.proj, "reduce")]
    maker = kfac(model, rules, fisher_type="fisher_emp", data_size=N, ema_decay=1.0)
    step(maker, F.cross_entropy, target, x)
    want = {
        "conv": "expand",
        "block1.qkv": "reduce",
        "block2.qkv": "expand",
        "block2.proj": "reduce",
    }
    assert {name: maker.shared_dim_for[name] for name in want} == want

    def example(i):
        return F.cross_entropy(model(x[i : i + 1]), target[i : i + 1])

    for name, setting in want.items():
        layer = model.get_submodule(name)
        assert_factors(layer, empirical_factors(layer, example, N, setting))


def test_rules_reach_the_factors_of_ekfac():
    """The eigenvectors of EKFAC are those of the rule's factors."""
    model, (x, target) = Model(), batch()
    maker = asdl.EkfacGradientMaker(
        model,
        asdl.PreconditioningConfig(data_size=N, damping=1e-3, ignore_modules=["norm"]),
        fisher_type="fisher_emp",
        shared_dim=["reduce", ("block1", "expand")],
    )
    step(maker, F.cross_entropy, target, x)
    for name, setting in (("block1.qkv", "expand"), ("block2.qkv", "reduce")):
        layer = model.get_submodule(name)
        A, B = empirical_factors(
            layer, lambda i: F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        for U, factor in ((layer.fisher.kfe.Ua, A), (layer.fisher.kfe.Ub, B)):
            rotated = U.mT @ factor @ U
            off_diagonal = rotated - rotated.diagonal().diag()
            assert off_diagonal.abs().max() < 1e-10 * factor.abs().max()


# --------------------------------------------------------------------------- Fisher shapes by rules


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_shape_rules_match_subclasses():
    """Upstream's own rule (nn.LayerNorm, 'unit_wise') leaves timm's LayerNorm with 'kron', and
    crashes.
    """
    make_importable()
    timm_layers = pytest.importorskip("timm.layers")
    for norm_class in (nn.LayerNorm, OwnNorm, timm_layers.LayerNorm):
        model, (x, target) = Model(), batch()
        model.norm = norm_class(6)
        with torch.no_grad():
            model.norm.weight.normal_()
        maker = kfac(model, "reduce", fisher_type="fisher_emp", data_size=N, ema_decay=1.0)
        step(maker, F.cross_entropy, target, x)
        grads = []
        for i in range(N):
            loss = F.cross_entropy(model(x[i : i + 1]), target[i : i + 1])
            grads.append(
                torch.stack(torch.autograd.grad(loss, [model.norm.weight, model.norm.bias]), dim=1)
            )
        expected = sum(torch.einsum("fi,fj->fij", g, g) for g in grads) / N
        torch.testing.assert_close(model.norm.fisher.unit.data, expected, rtol=1e-10, atol=1e-15)


def test_a_shape_rule_for_a_base_class_reaches_the_subclass():
    model = Model()
    config = FisherConfig(
        "fisher_emp", ["diag", (nn.Linear, "kron"), (MyLinear, "layer_wise")], shared_dim="reduce"
    )
    plan = get_fisher_maker(model, config).plan
    shapes = {layer.name: layer.shape for layer in plan.layers}
    assert shapes == {
        "conv": "diag",
        "block1.qkv": "kron",
        "block1.proj": "kron",
        "block2.qkv": "layer_wise",
        "block2.proj": "kron",
        "norm": "diag",
        "head": "kron",
    }


def test_kron_for_everything_gives_norms_their_own_shape_and_says_so():
    with pytest.warns(
        UserWarning, match=r"'norm' \(LayerNorm\) has no Kronecker factors; it gets .*'unit_wise'"
    ):
        fisher(Model(), "reduce", F.cross_entropy, torch.randint(C, (N,)), batch()[0])


def test_a_plan_prints_what_is_done_with_which_layer(caplog):
    """And the log has one line for each reason, however many layers it is the reason of."""
    model = nn.ModuleDict(
        {
            "ids": nn.Embedding(5, 3),
            "more": nn.Embedding(5, 3),
            "fc": nn.Linear(3, 3),
            "head": nn.Linear(3, 2),
            "bare": nn.PReLU(),
            "still": nn.Linear(2, 2),
        }
    )
    model["still"].requires_grad_(False)
    with caplog.at_level("INFO"):
        plan = kfac(model, ["expand", ("head", "auto")], ignore_modules=[]).plan
    reason = "the Kronecker factor of an embedding would have the vocabulary's size squared"
    assert [record.getMessage() for record in caplog.records] == [
        f"left to the first-order optimizer: 'ids', 'more': {reason}"
    ]
    assert repr(plan).splitlines() == [
        "Plan of 2 layers",
        "  expand, kron: fc",
        "  auto, not decided yet, kron: head",
        "  frozen: still",
        f"  left out: ids: {reason}",
        f"  left out: more: {reason}",
        "  left out: bare: PReLU has parameters without an operation: weight",
    ]


# ---------------------------------------------------------- operations and strategies of the user's


class FirstTokenOnly(LinearReduce):
    """A strategy that looks at the first position alone."""

    @staticmethod
    def cov_kron_A(module, in_data):
        return in_data[:, 0].mT @ in_data[:, 0]

    @staticmethod
    def cov_kron_B(module, out_grads):
        return out_grads[:, 0].mT @ out_grads[:, 0]


def test_a_strategy_of_the_users_own():
    model, (x, target) = Model(), batch()
    with pytest.raises(ValueError, match="unknown value 'mine'"):
        kfac(model, "mine")
    asdl_ws_plugin.register_operation(nn.Linear, FirstTokenOnly, shared_dim="mine")
    inputs = []
    handle = model.block1.proj.register_forward_hook(
        lambda m, args, out: inputs.append(args[0].detach())
    )
    maker = kfac(
        model, ["reduce", ("block1", "mine")], fisher_type="fisher_emp", data_size=N, ema_decay=1.0
    )
    step(maker, F.cross_entropy, target, x)
    handle.remove()
    first = inputs[0][:, 0]
    torch.testing.assert_close(kron(model.block1.proj)[0], first.mT @ first / N)
    assert maker.shared_dim_for["block1.qkv"] == "mine" and maker.shared_dim_for["head"] == "reduce"

    def example(i):
        return F.cross_entropy(model(x[i : i + 1]), target[i : i + 1])

    assert_factors(model.block2.qkv, empirical_factors(model.block2.qkv, example, N, "reduce"))


def test_a_strategy_for_every_layer_needs_an_operation_for_each():
    asdl_ws_plugin.register_operation(nn.Linear, FirstTokenOnly, shared_dim="mine")
    with pytest.raises(
        ValueError, match=r"'conv'.*no operation for Conv2d under.*'mine'.*register_operation"
    ):
        kfac(Model(), "mine")
    model = Model()
    model.conv = nn.Flatten(2)  # and normalization layers, which know no strategy, need none
    del model.conv
    assert kfac(model, "mine").shared_dim_for["block2.qkv"] == "mine"


class Scaled(nn.Module):
    """A user's own layer type: a linear layer without bias, no subclass of anything."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return 3 * (x @ self.weight.mT)


class ScaledExpand(LinearExpand):
    def preprocess_in_data(self, module, in_data, out_data):
        return 3 * in_data


@pytest.mark.parametrize("ema_decay", [-1, 1.0])
def test_a_layer_type_of_the_users_own(ema_decay):
    asdl_ws_plugin.register_operation(Scaled, ScaledExpand, shared_dim="expand")
    model, (x, target) = Model(), batch()
    model.block1.qkv = Scaled(6, 6)
    maker = kfac(
        model,
        ["reduce", (Scaled, "expand")],
        fisher_type="fisher_emp",
        data_size=N,
        ema_decay=ema_decay,
        damping=0.5,
    )
    step(maker, F.cross_entropy, target, x)
    A, B = empirical_factors(
        model.block1.qkv,
        lambda i: F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]),
        N,
        "expand",
    )
    A = 9 * A  # a linear layer of 3 x
    if ema_decay == 1.0:
        assert_factors(model.block1.qkv, (A, B))
    pi = (A.trace() / len(A) / (B.trace() / len(B))).sqrt()
    r = 0.5**0.5
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), target), model.block1.qkv.weight)
    eye = torch.eye(6)
    expected = torch.linalg.solve(B + r / pi * eye, grad) @ torch.linalg.inv(A + r * pi * eye)
    torch.testing.assert_close(model.block1.qkv.weight.grad, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(
        ValueError, match=r"'block1.qkv'.*no operation for Scaled under shared_dim='reduce'"
    ):
        kfac(model, "reduce")


def test_register_operation_refuses_what_it_cannot_use():
    for arguments in (
        (torch.Tensor, LinearReduce),
        (nn.Linear, nn.Linear),
        (nn.Linear, LinearReduce, 3),
        (nn.Linear(2, 2), LinearReduce),
    ):
        with pytest.raises(TypeError):
            asdl_ws_plugin.register_operation(*arguments)
    for name in ("auto", "sequence_first", "batch_first"):
        with pytest.raises(ValueError, match="another name"):
            asdl_ws_plugin.register_operation(nn.Linear, LinearReduce, shared_dim=name)
