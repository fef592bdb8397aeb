"""GCNs (eq. 2.6-2.8, 3.30-3.31) and the conversion of PyTorch Geometric's layers."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import pickle
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import CE, MSE, assert_equal, covariance, loss_hessians, rel_error
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import (
    Segments,
    WeightSharingLinear,
    attach_segments,
    convert,
    inspect,
    revert,
    segments,
)

pyg = pytest.importorskip("torch_geometric", reason="PyTorch Geometric is not installed")
from torch_geometric import nn as gnn  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

NODES, C = 7, 3
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 6, 0, 5], [1, 0, 2, 1, 4, 3, 6, 5, 5, 0]])


class GCN(nn.Module):
    def __init__(
        self, sizes: list[int], activation: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            gnn.GCNConv(a, b, **options) for a, b in itertools.pairwise(sizes)
        )
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        for conv in self.convs[:-1]:
            x = self.activation(conv(x, edge_index, edge_weight))
        return self.convs[-1](x, edge_index, edge_weight)


def normalized_adjacency() -> Tensor:
    """``Ĉ`` of eq. 2.6, from its definition."""
    adjacency = torch.zeros(NODES, NODES)
    adjacency[EDGES[1], EDGES[0]] = 1
    adjacency += torch.eye(NODES)
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale


# ----------------------------------------------------------------------------------- the conversion


OPTIONS = [
    {},
    {"bias": False},
    {"cached": True},
    {"normalize": False},
    {"improved": True},
    {"add_self_loops": False},
    {"aggr": "mean"},
    {"flow": "target_to_source"},
]


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        *((options, edges) for options in OPTIONS for edges in ("index", "weighted")),
        *(
            (options, "sparse") for options in OPTIONS if not {"improved", "flow"} & set(options)
        ),  # GCNConv has no more
    ],
)
def test_the_converted_gcn_computes_the_same(options: dict[str, Any], edges: str):
    """Output, gradients, state_dict and Parameter objects; twice, for what is cached; and back."""
    torch.manual_seed(1)
    model, x = GCN([4, 5, C], nn.Tanh(), **options), torch.randn(NODES, 4, requires_grad=True)
    weight = torch.rand(EDGES.shape[1]) if edges == "weighted" else None
    edge_index: Any = EDGES
    if edges == "sparse":
        edge_index = torch.sparse_coo_tensor(
            EDGES.flip(0), torch.ones(EDGES.shape[1]), (NODES, NODES)
        ).coalesce()
    original = copy.deepcopy(model)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())

    def outputs(net: nn.Module) -> list[Tensor]:
        y = net(x, edge_index, weight)
        again = net(x, edge_index, weight)
        return [y, again, *torch.autograd.grad(y.square().sum(), [*net.parameters(), x])]

    expected = outputs(original)
    assert convert(model) is model
    for conv in model.convs:
        assert (
            isinstance(conv, gnn.GCNConv)
            and isinstance(conv.lin, nn.Linear)
            and isinstance(conv.lin, gnn.Linear)
        )
    for one, other in zip(outputs(model), expected, strict=True):
        assert_equal(one, other, 1e-12)
    assert list(model.state_dict()) == keys and all(
        p is parameters[name] for name, p in model.named_parameters()
    )
    revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all(
        m.__dict__.keys() == o.__dict__.keys()
        for m, o in zip(model.modules(), original.modules(), strict=True)
    )
    for one, other in zip(outputs(model), expected, strict=True):
        assert torch.equal(one, other)


def test_the_linear_of_a_converted_gcn_sees_aggregated_rows():
    """ã of eq. 3.30; that of PyG's own sees each node alone."""
    model, x = GCN([4, C]), torch.randn(NODES, 4)
    seen: list[Tensor] = []
    model.convs[0].lin.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    model(x, EDGES)
    convert(model)
    model(x, EDGES)
    assert torch.equal(seen[0], x)
    assert_equal(seen[1], normalized_adjacency() @ x)


def test_copies_pickles_and_saved_models():
    model, x = convert(GCN([4, 5, C])), torch.randn(NODES, 4)
    expected = model(x, EDGES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for copied in copies:
        assert torch.equal(copied(x, EDGES), expected)
        conv = copied.convs[0]
        assert conv.lin.bias is conv.bias and conv.bias is not model.convs[0].bias
        with torch.no_grad():
            conv.bias += 1  # what the optimizer changes is what the layer adds
        assert not torch.equal(copied(x, EDGES), expected)
        revert(copied)
        assert type(copied.convs[0]) is gnn.GCNConv and type(copied.convs[0].lin) is gnn.Linear
    fresh = GCN([4, 5, C])
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh(x, EDGES), expected, 1e-12)
    model.load_state_dict(GCN([4, 5, C]).state_dict())
    model.float()
    assert (
        model.convs[0].lin.bias is model.convs[0].bias
        and model(x.float(), EDGES).dtype == torch.float32
    )


def test_what_cannot_be_converted_is_refused_by_name_and_nothing_is_changed():
    model = nn.ModuleList([gnn.GCNConv(4, 4), gnn.GCNConv(4, 4, aggr="max")])
    with pytest.raises(
        ValueError, match=r"Module '1' \(GCNConv\): its aggregation, 'max', does not commute"
    ):
        convert(model)
    assert type(model[0]) is gnn.GCNConv and type(model[0].lin) is gnn.Linear
    convert(model, ignore_modules=["1"])
    assert type(model[0]) is not gnn.GCNConv and type(model[1]) is gnn.GCNConv
    lazy = nn.Sequential(gnn.Linear(-1, 3))
    with pytest.raises(ValueError, match=r"Module '0' \(Linear\): it is lazy"):
        convert(lazy)
    x = torch.randn(2, 5)
    expected = lazy(x)
    convert(lazy)
    assert (
        isinstance(lazy[0], WeightSharingLinear)
        and lazy[0].in_features == 5
        and lazy[0].out_features == 3
    )
    assert torch.equal(lazy(x), expected)
    assert type(revert(lazy)[0]) is gnn.Linear


# ----------------------------------------------------------------------------------------- eq. 3.31


def node_factors(
    model: GCN, layer: int, x: Tensor, loss_type: str, var: Any = 1.0, used: Tensor | None = None
) -> Any:
    """Eq. 3.31, with the loss terms of all nodes that a layer's row takes part in: sums over the
    nodes, not divided.

    ``A = Σ ããᵀ`` and ``B = Σ_n Σ_m b Λ_m bᵀ`` with the Jacobian of node m's logits with respect to
    row n. Autograd on a dense matrix ``Ĉ``, without PyG's layers.
    """
    C_hat = normalized_adjacency()
    shift = torch.zeros(NODES, model.convs[layer].out_channels)
    seen: list[Tensor] = []

    def logits(shift: Tensor) -> Tensor:
        y = x
        for i, conv in enumerate(model.convs):
            y = C_hat @ y
            if i == layer:
                seen.append(y.detach())
            y = y @ conv.lin.weight.T + conv.bias
            y = y + shift if i == layer else y
            y = model.activation(y) if i < len(model.convs) - 1 else y
        return y

    b = torch.autograd.functional.jacobian(logits, shift)  # M C N Q
    hessians = loss_hessians(logits(shift).detach().unsqueeze(0), loss_type, var)[0]
    if used is not None:
        hessians = hessians * used.view(-1, 1, 1)
    return seen[0].T @ seen[0], torch.einsum("mcnp,mcd,mdnq->pq", b, hessians, b)


def exact_block(
    model: GCN, layer: int, x: Tensor, var: Tensor, used: Tensor | None = None
) -> Tensor:
    """``Σ_n Jᵀ Λ J`` of the layer's weight, from PyG's own model."""
    own = revert(copy.deepcopy(model))
    weight = own.convs[layer].lin.weight
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(own, {f"convs.{layer}.lin.weight": w}, (x, EDGES)),
        weight,
    ).flatten(2)
    precision = torch.linalg.inv(var)
    scale = torch.ones(NODES) if used is None else used
    return torch.einsum("ncp,cd,n,ndq->pq", jacobian, precision, scale, jacobian)


def one_graph(model: nn.Module) -> Any:
    return segments(model, node=torch.zeros(NODES, dtype=torch.long))


@pytest.mark.parametrize("told", ["one_graph", "nothing"])
@pytest.mark.parametrize("sizes", [[4, C], [4, 5, C]], ids=["single_layer", "two_layers"])
def test_eq_3_31_is_exact_for_the_last_layer_of_a_linear_gcn(sizes: list[int], told: str):
    """Regular K-FAC, each node an example: A has 1/N, B the sum. The same where all nodes are said
    to be one graph.
    """
    model, x, var = convert(GCN(sizes)), torch.randn(NODES, 4), covariance(C)
    size = 1 if told == "one_graph" else NODES
    maker = get_fisher_maker(
        model,
        FisherConfig("fisher_exact", ["kron"], MSE, data_size=size, var=var, shared_dim="expand"),
    )
    maker.setup_model_call(model, x, EDGES)
    if told == "one_graph":
        with one_graph(model):
            maker.forward_and_backward()
    else:
        maker.forward_and_backward()
    layer, kron = len(sizes) - 2, model.convs[-1].lin.fisher.kron
    block = exact_block(model, layer, x, var)
    assert_equal(torch.kron(kron.B, kron.A) * size, block)
    A, B = node_factors(model, layer, x, MSE, var)
    assert_equal(kron.A, A / NODES)
    assert_equal(kron.B * size, B)
    if (
        len(sizes) > 2
    ):  # the first layer's nodes differ: their outputs take different numbers of paths
        first = model.convs[0].lin.fisher.kron
        assert rel_error(torch.kron(first.B, first.A) * size, exact_block(model, 0, x, var)) > 1e-2


def test_hooks_on_pygs_own_layers_see_the_wrong_rows():
    """The unconverted product, with an nn.Linear in place of PyG's to be seen at all, is not the
    exact block.
    """
    model, x, var = GCN([4, C], bias=False), torch.randn(NODES, 4), covariance(C)
    block = exact_block(model, 0, x, var)
    plain = nn.Linear(4, C, bias=False)
    plain.load_state_dict(model.convs[0].lin.state_dict())
    model.convs[0].lin = plain
    maker = get_fisher_maker(
        model,
        FisherConfig("fisher_exact", ["kron"], MSE, data_size=NODES, var=var, shared_dim="expand"),
    )
    maker.setup_model_call(model, x, EDGES)
    maker.forward_and_backward()
    assert rel_error(torch.kron(plain.fisher.kron.B, plain.fisher.kron.A) * NODES, block) > 0.1


@pytest.mark.parametrize("loss_type", [CE, MSE])
def test_every_layers_factors_of_a_nonlinear_gcn(loss_type: str):
    model, x = convert(GCN([4, 5, C], nn.Tanh())), torch.randn(NODES, 4)
    maker = get_fisher_maker(
        model, FisherConfig("fisher_exact", ["kron"], loss_type, data_size=1, shared_dim="auto")
    )
    maker.setup_model_call(model, x, EDGES)
    attach_segments(model, "pyg")  # without an argument 'batch' all nodes are one graph
    maker.forward_and_backward()
    assert maker.plan.setting == "expand"
    for i, conv in enumerate(model.convs):
        A, B = node_factors(model, i, x, loss_type)
        assert_equal(conv.lin.fisher.kron.A, A / NODES)
        assert_equal(conv.lin.fisher.kron.B, B)


@pytest.mark.parametrize("told", ["one_graph", "nothing"])
def test_monte_carlo_is_unbiased(told: str):
    model, x, count = convert(GCN([4, 5, C], nn.Tanh())), torch.randn(NODES, 4), 400
    size = 1 if told == "one_graph" else NODES
    maker = get_fisher_maker(
        model, FisherConfig("fisher_mc", ["kron"], CE, data_size=size, shared_dim="expand")
    )
    maker.setup_model_call(model, x, EDGES)
    if told == "one_graph":
        attach_segments(model, "pyg")
    samples = []
    for _ in range(count):
        maker.forward_and_backward()
        samples.append(model.convs[0].lin.fisher.kron.B * size)
    stacked, expected = torch.stack(samples), node_factors(model, 0, x, CE)[1]
    error = stacked.std(0) / count**0.5
    assert error.norm() < 0.1 * expected.norm()
    assert ((stacked.mean(0) - expected).abs() <= 5 * error).all()


@pytest.mark.parametrize("how", ["ignore_index", "index", "boolean", "terms"])
def test_labels_of_some_nodes_only(how: str):
    """Transductive training: the other nodes' terms are not in B, their rows are in A, for messages
    go through them.
    """
    model, x = convert(GCN([4, 5, C], nn.Tanh())), torch.randn(NODES, 4)
    train, y = (
        torch.tensor([True, False, True, False, False, True, False]),
        torch.randint(C, (NODES,)),
    )

    def loss(logits: Tensor) -> Tensor:
        if how == "ignore_index":
            return F.cross_entropy(logits, y.masked_fill(~train, -100))
        if how == "index":
            index = torch.nonzero(train).flatten()
            return F.cross_entropy(logits[index], y[index])
        if how == "boolean":
            return F.cross_entropy(logits[train], y[train])
        return (F.cross_entropy(logits, y, reduction="none") * train).sum() / train.sum()

    attach_segments(model, "pyg")
    for data_size, scale in ((1, 1), (-1, 3)):  # of the loss as it was passed: a mean over 3 terms
        maker = get_fisher_maker(
            model,
            FisherConfig("fisher_exact", ["kron"], CE, data_size=data_size, shared_dim="expand"),
        )
        maker.setup_loss_call(loss, maker.setup_model_call(model, x, EDGES))
        maker.forward_and_backward()
        for i, conv in enumerate(model.convs):
            A, B = node_factors(model, i, x, CE, used=train.double())
            assert_equal(conv.lin.fisher.kron.A, A / NODES)
            assert_equal(conv.lin.fisher.kron.B, B / scale)


def test_a_role_for_the_last_layer_makes_it_exact_with_labels_of_some_nodes():
    """Its rows at other nodes meet no loss term, so A is that of the labelled ones by a role that
    leaves out rows.
    """
    model, x, var = convert(GCN([4, 5, C])), torch.randn(NODES, 4), covariance(C)
    train, target = (
        torch.tensor([True, False, True, False, False, True, False]),
        torch.randn(NODES, C),
    )
    zeros = torch.zeros(NODES, dtype=torch.long)
    convert(model, roles=[("convs.0", "node"), ("convs.1", "labelled")])
    maker = get_fisher_maker(
        model,
        FisherConfig("fisher_exact", ["kron"], MSE, data_size=1, var=var, shared_dim="expand"),
    )
    logits = maker.setup_model_call(model, x, EDGES)
    maker.setup_loss_call(lambda z: F.mse_loss(z[train], target[train], reduction="sum"), logits)
    with segments(model, node=zeros, labelled=Segments(zeros, mask=train)):
        maker.forward_and_backward()
    kron = model.convs[1].lin.fisher.kron
    assert_equal(torch.kron(kron.B, kron.A), exact_block(model, 1, x, var, train.double()))
    assert_equal(model.convs[0].lin.fisher.kron.A, node_factors(model, 0, x, MSE)[0] / NODES)


def test_the_bias_is_preconditioned_with_its_layer():
    """By B alone, as ASDL does it; ``GCNConv`` keeps it beside its Linear."""
    model, x, y = (
        convert(GCN([4, 5, C], nn.Tanh())),
        torch.randn(NODES, 4),
        torch.randint(C, (NODES,)),
    )
    config = asdl.PreconditioningConfig(data_size=NODES, damping=0.1, ema_decay=1.0)
    gm = asdl.KfacGradientMaker(model, config, loss_type=CE, shared_dim="expand")
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x, EDGES), y)
    gm.forward_and_backward()
    grads = torch.autograd.grad(F.cross_entropy(model(x, EDGES), y), list(model.parameters()))
    for conv, (bias, weight) in zip(
        model.convs, zip(grads[::2], grads[1::2], strict=True), strict=True
    ):
        kron = conv.lin.fisher.kron
        assert_equal(conv.bias.grad, kron.B_inv @ bias)
        assert_equal(conv.lin.weight.grad, kron.B_inv @ weight @ kron.A_inv)


def test_the_bias_is_reported_with_its_layer():
    report = inspect(convert(GCN([4, 5, C], nn.Tanh())), torch.randn(NODES, 4), EDGES)
    assert {row.name: (row.num_parameters, row.num_seen, row.note) for row in report.rows} == {
        "convs.0.lin": (4 * 5 + 5, 4 * 5 + 5, ""),
        "convs.1.lin": (5 * C + C, 5 * C + C, ""),
    }
    assert report.coverage == 1.0


# -------------------------------------------------------------------------------------------- roles


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.node, self.pyg, self.own = (
            nn.Linear(4, 4),
            gnn.Linear(4, 4),
            WeightSharingLinear(4, 4, role="edge"),
        )
        self.head = nn.Linear(4, 2)


def test_roles_by_rules_and_back():
    model = Mixed()
    parameters, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fired = []
    handle = model.node.register_forward_hook(lambda *_: fired.append(1))
    convert(
        model,
        roles=[(nn.Linear, "node"), ("edge", "edge"), ("edge.1", "norms"), (model.pyg, "bond")],
    )
    roles = {name: getattr(module, "role", None) for name, module in model.named_modules() if name}
    assert roles == {
        "edge": None,
        "edge.0": "edge",
        "edge.1": "norms",
        "node": "node",
        "pyg": "bond",
        "own": "node",
        "head": "node",
    }
    assert type(model.edge[0]) is type(model.node) is type(model.head) is WeightSharingLinear
    assert type(model.edge[1]) is nn.LayerNorm and isinstance(model.pyg, WeightSharingLinear)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(
        p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
    )
    model.node(torch.ones(1, 4))
    assert fired
    handle.remove()
    convert(
        model, roles=[("head", "graph")]
    )  # of what was converted before, the rules change what they name
    assert model.head.role == "graph" and model.node.role == "node"
    loaded = pickle.loads(pickle.dumps(revert(copy.deepcopy(model))))
    for reverted in (revert(model), loaded):
        assert [type(m) for m in reverted.modules()] == kinds
        assert reverted.own.role == "edge"
        assert not hasattr(reverted.node, "role") and not hasattr(reverted.edge[1], "role")


def test_without_roles_the_linears_of_a_model_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.TransformerEncoderLayer(4, 2, 8))
    convert(model)
    assert type(model[0]) is nn.Linear and type(model[2].linear1) is nn.Linear


def test_roles_that_are_wrong():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="roles: the rule for 'edge' matches no supported layer"):
        convert(model, roles=[("edge", "edge")])
    with pytest.raises(ValueError, match="roles: module '0' is given several: 'edge', 'node'"):
        convert(model, roles=[("0", "edge", "node")])
    with pytest.raises(TypeError, match="roles: a rule's values have to be strings"):
        convert(model, roles=[("0", 1)])
    assert type(model[0]) is nn.Linear and not hasattr(model[0], "role")


@pytest.mark.parametrize("name", ["GIN", "GraphSAGE", "GAT", "GCN", "EdgeCNN", "PNA"])
def test_models_of_the_library_become_visible(name: str):
    """Every matrix is a Linear's, all of them see rows, and outputs and gradients are those from
    before.
    """
    options: dict[str, Any] = {"norm": "layer_norm"} if name == "GIN" else {}
    if name == "PNA":
        options = {
            "aggregators": ["mean", "max"],
            "scalers": ["identity"],
            "deg": torch.tensor([0, 3, 4]),
        }
    torch.manual_seed(2)
    model, x = getattr(gnn, name)(4, 8, 2, C, dropout=0.0, **options), torch.randn(NODES, 4)
    model.eval()
    expected = model(x, EDGES)
    grads = torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
    convert(model)
    actual = model(x, EDGES)
    assert_equal(actual, expected, 1e-12)
    for one, other in zip(
        torch.autograd.grad(actual.sum(), list(model.parameters()), allow_unused=True),
        grads,
        strict=True,
    ):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-12)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "att" not in name}
    assert linears and {id(m.weight) for m in linears} >= matrices


@pytest.mark.skipif(
    importlib.util.find_spec("torch_scatter") is None, reason="torch_scatter is not installed"
)
def test_pyg_beside_torch_scatter():
    """PyG uses torch_scatter where it is installed; the factors do not depend on it."""
    model, x = convert(GCN([4, C])), torch.randn(NODES, 4)
    previous = asdl_ws_plugin.set_backend("torch_scatter")
    try:
        maker = get_fisher_maker(
            model, FisherConfig("fisher_exact", ["kron"], MSE, data_size=1, shared_dim="reduce")
        )
        maker.setup_model_call(model, x, EDGES)
        with one_graph(model):
            maker.forward_and_backward()
    finally:
        asdl_ws_plugin.set_backend(previous)
    mean = (normalized_adjacency() @ x).mean(0)
    assert_equal(model.convs[0].lin.fisher.kron.A, mean.outer(mean))


def test_pygs_linear_layers_that_were_not_converted_say_so():
    """To a reader of the report they are called Linear like any other."""
    model = nn.Sequential(nn.Linear(3, 4), gnn.Linear(4, 2))
    row = {row.name: row for row in asdl_ws_plugin.inspect(model, torch.randn(5, 3)).rows}["1"]
    assert "convert(model)" in row.remedy
    plan = asdl.KfacGradientMaker(
        model, asdl.PreconditioningConfig(damping=1e-3), shared_dim="reduce"
    ).plan
    assert plan.unsupported == {
        "1": "it is PyG's own Linear; convert(model) makes it a layer that is seen"
    }
    asdl_ws_plugin.convert(model)
    plan = asdl.KfacGradientMaker(
        model, asdl.PreconditioningConfig(damping=1e-3), shared_dim="reduce"
    ).plan
    assert [layer.name for layer in plan.layers] == ["0", "1"] and not plan.unsupported
