"""The attention drop-in against ``nn.MultiheadAttention``: outputs, gradients, checkpoints,
Transformer modules.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from oracles.autograd import (
    assert_captured,
    assert_equal,
    assert_same_grads,
    captured_weight_grads,
    computed_fisher,
)
from torch import Tensor, nn

from asdl_ws_plugin import MultiheadAttention, convert, register_converter, revert
from asdl_ws_plugin.conversion.attention import TransformerEncoder
from asdl_ws_plugin.conversion.transformers import Conv1DConverter
from asdl_ws_plugin.weight_sharing.blocks import LinearBlock

pytestmark = pytest.mark.usefixtures("double")

E, H, N, L, S = 8, 2, 3, 4, 5


def both(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """The original and the drop-in with the same, nowhere zero, parameters."""
    original = nn.MultiheadAttention(E, H, **options)
    for p in original.parameters():
        nn.init.normal_(p, std=0.5)
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(original.state_dict())
    return original, ours


def inputs(options: dict[str, Any], batched: bool = True, same: str = "none") -> list[Tensor]:
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)
    sizes = ((L, E), (S, kdim), (S, vdim))
    result = [
        torch.randn((N, n, d) if options.get("batch_first") else (n, N, d))
        if batched
        else torch.randn(n, d)
        for n, d in sizes
    ]
    if same == "kv":
        result[2] = result[1]
    if same == "qkv":
        result[1] = result[2] = result[0]
    return result


def compare(original: nn.Module, ours: nn.Module, xs: list[Tensor], **call: Any) -> None:
    """Outputs, weights and all gradients, those of the inputs included."""
    results = []
    for module in (original, ours):
        module.zero_grad()
        leaves: dict[int, Tensor] = {}
        args = [leaves.setdefault(id(x), x.clone().requires_grad_()) for x in xs]
        torch.manual_seed(7)
        out, weights = module(*args, **call)
        loss = out.sin().sum() + (0 if weights is None else weights.square().sum())
        loss.backward()
        results.append((out, weights, [leaf.grad for leaf in leaves.values()]))
    (out, weights, grads), (our_out, our_weights, our_grads) = results
    assert our_out.shape == out.shape
    torch.testing.assert_close(our_out, out, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert (weights is None) == (our_weights is None)
    if weights is not None:
        assert our_weights.shape == weights.shape
        torch.testing.assert_close(our_weights, weights, rtol=1e-12, atol=1e-13, equal_nan=True)
    for ours_grad, grad in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(ours_grad, grad, rtol=1e-11, atol=1e-12)
    assert_same_grads(ours, original)


def masks(length: int, source: int, batched: bool = True) -> list[dict[str, Any]]:
    causal = torch.ones(length, source).tril(source - length).bool().logical_not()
    padding = torch.zeros(N, source).bool()
    padding[0, -2:] = padding[1, -1:] = True
    padding = padding if batched else padding[0]
    heads = (N if batched else 1) * H
    soft = torch.randn(heads, length, source)
    hard = torch.rand(heads, length, source) > 0.7
    hard[..., 0] = False
    soft_padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    return [
        {},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(length, source)},
        {"attn_mask": hard},
        {"attn_mask": soft},
        {"key_padding_mask": padding},
        {"key_padding_mask": soft_padding},
        {"key_padding_mask": padding, "attn_mask": hard},
        {"key_padding_mask": soft_padding, "attn_mask": soft},
    ]


OPTIONS = [
    {
        "bias": bias,
        "add_bias_kv": bias_kv,
        "add_zero_attn": zero,
        "batch_first": batch_first,
        **dims,
    }
    for bias, bias_kv, zero, batch_first, dims in itertools.product(
        (True, False), (True, False), (True, False), (True, False), ({}, {"kdim": 6, "vdim": 7})
    )
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_every_option_equals_the_original(options: dict[str, Any]) -> None:
    original, ours = both(**options)
    for mask in masks(L, S):
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            compare(original, ours, inputs(options), **mask, **weights)
    for mask in masks(L, S, batched=False):
        compare(original, ours, inputs(options, batched=False), **mask)
        compare(original, ours, inputs(options, batched=False), **mask, need_weights=False)
    if "kdim" not in options:
        compare(original, ours, inputs(options, same="kv"))
        compare(original, ours, inputs(options, same="qkv"), need_weights=False)
        compare(original, ours, inputs(options, batched=False, same="qkv"))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_causal_call_equals_the_original(need_weights: bool, padded: bool) -> None:
    original, ours = both(batch_first=True)
    xs = inputs({"batch_first": True}, same="qkv")
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = (
        torch.zeros(N, L).masked_fill(torch.arange(L) >= L - 1, -torch.inf) if padded else None
    )
    call = {
        "attn_mask": mask,
        "is_causal": True,
        "need_weights": need_weights,
        "key_padding_mask": padding,
    }
    compare(original, ours, xs, **call)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(*xs, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights: bool, batch_first: bool) -> None:
    original, ours = both(dropout=0.4, batch_first=batch_first)
    xs = inputs({"batch_first": batch_first})
    compare(original, ours, xs, need_weights=need_weights)
    first, second = (ours(*xs, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    compare(original.eval(), ours.eval(), xs, need_weights=need_weights)
    assert torch.equal(*(ours(*xs, need_weights=need_weights)[0] for _ in range(2)))


def test_what_the_original_refuses_is_refused() -> None:
    original, ours = both(batch_first=True)
    q, k, v = inputs({"batch_first": True})
    bad: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((q[..., :-1], k, v), {}),
        ((q, k, v[:, :-1]), {}),
        ((q[0], k, v), {}),
        ((q[None], k, v), {}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S + 1)}),
        ((q, k, v), {"attn_mask": torch.zeros(N * H + 1, L, S)}),
        ((q, k, v), {"attn_mask": torch.zeros(1, 1, L, S)}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S, dtype=torch.long)}),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, S + 1).bool()}),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, S + 1, 2).bool()}),
    ]
    for args, call in bad:
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            original(*args, **call)
        with pytest.raises(expected.type):
            ours(*args, **call)
    for kwargs in ({"embed_dim": 7}, {"embed_dim": 0}):
        with pytest.raises((AssertionError, ValueError)):
            MultiheadAttention(num_heads=H, **kwargs)


def test_construction_is_the_originals() -> None:
    torch.manual_seed(3)
    original = nn.MultiheadAttention(E, H, add_bias_kv=True, device="cpu", dtype=torch.float32)
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, add_bias_kv=True, device="cpu", dtype=torch.float32)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in original.named_parameters()
    ]
    for a, b in zip(ours.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    assert isinstance(ours, nn.MultiheadAttention)
    assert MultiheadAttention(E, H, device="meta").q_proj.weight.is_meta


# ----------------------------------------------------------------------------------- what hooks see


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 7, "add_bias_kv": True}]
)
def test_every_weight_gradient_is_reproduced(options: dict[str, Any]) -> None:
    _, ours = both(**options)
    xs = inputs(options)
    captured = captured_weight_grads(ours, lambda: ours(*xs)[0].sin().sum())
    assert set(captured) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert_captured(ours, captured)


def test_blocks_are_views_of_the_parameters() -> None:
    _, ours = both()
    k = ours.k_proj
    assert isinstance(k, LinearBlock) and k.weight is k.weight
    assert torch.equal(k.weight, ours.in_proj_weight[E : 2 * E]) and torch.equal(
        k.bias, ours.in_proj_bias[E : 2 * E]
    )
    assert k.weight.grad is None and list(k.parameters()) == []
    ours(*inputs({}))[0].sum().backward()
    ours(*inputs({}))[0].sum().backward()  # accumulates
    k.weight.grad.mul_(3)  # type: ignore[attr-defined]
    assert torch.equal(ours.in_proj_weight.grad[E : 2 * E], k.weight.grad)
    with torch.no_grad():
        nn.init.constant_(k.weight, 0.25)
    assert (ours.in_proj_weight[E : 2 * E] == 0.25).all() and not (
        ours.in_proj_weight[:E] == 0.25
    ).any()
    ours.zero_grad()
    assert k.weight.grad is None
    ours.in_proj_weight.requires_grad_(False)
    assert not k.weight.requires_grad and k.bias.requires_grad
    ours.float()
    assert k.weight.dtype == torch.float32 and torch.equal(k.weight, ours.in_proj_weight[E : 2 * E])
    ours.to("meta")
    assert k.weight.is_meta and k.bias.is_meta
    ours.in_proj_weight = nn.Parameter(torch.ones(3 * E, E))
    assert (k.weight == 1).all() and k.weight.requires_grad
    _, separate = both(kdim=6)
    assert separate.k_proj.weight is separate.k_proj_weight


def test_a_block_alone_is_a_linear_layer() -> None:
    _, ours = both()
    x = torch.randn(3, E)
    expected = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    assert torch.equal(ours.v_proj(x), expected)
    ours.v_proj(x).sum().backward()
    assert (
        ours.in_proj_weight.grad[2 * E :].abs().sum() > 0
        and (ours.in_proj_weight.grad[: 2 * E] == 0).all()
    )
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        ours.v_proj.weight.square().sum().backward()
    with pytest.raises(KeyError):
        ours.v_proj.weight = nn.Parameter(torch.zeros(E, E))


class Classifier(nn.Module):
    """An attention layer, pooled: ``(N, L, E)``, or ``(L, N, E)``, to ``(N, 3)``."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0].tanh()
        return self.head(y.mean(1 if self.attention.batch_first else 0))


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("n", [N, L], ids=["N=3", "N=L"])
@pytest.mark.filterwarnings("ignore:.*batch_first.*:UserWarning")
def test_sequence_first_and_batch_first_have_the_same_factors(setting: str, n: int) -> None:
    original, ours = both(batch_first=True, add_bias_kv=True)
    models = [Classifier(ours)]
    sequence_first = MultiheadAttention(E, H, add_bias_kv=True)
    sequence_first.load_state_dict(original.state_dict())
    models.append(Classifier(sequence_first))
    models[1].head.load_state_dict(models[0].head.state_dict())
    x = torch.randn(n, L, E)
    for model in models:
        computed_fisher(model, x, setting)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        first, second = (model.attention.get_submodule(name).fisher.kron for model in models)
        assert_equal(second.A, first.A)
        assert_equal(second.B, first.B)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("ema", [None, 0.3])
def test_q_k_v_are_preconditioned_as_separate_layers(setting: str, ema: float | None) -> None:
    """``B⁻¹ G A⁻¹`` of every block, from factors and gradients that are computed here by autograd
    alone.

    With ``add_bias_kv`` there is a key that the key layer does not make; without, a softmax would
    not see what all its keys have in common, and their summed gradient would vanish.
    """
    _, ours = both(batch_first=True, add_bias_kv=True)
    model, x, y = Classifier(ours), torch.randn(N, L, E), torch.tensor([0, 2, 1])
    attention, damping = model.attention, 1e-2

    q, k, v = (
        F.linear(x, w, b)
        for w, b in zip(
            attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    with_bias = (
        q,
        *(
            torch.cat([z, b.expand(N, 1, E)], 1)
            for z, b in ((k, attention.bias_k), (v, attention.bias_v))
        ),
    )
    heads = [z.unflatten(-1, (H, E // H)).transpose(1, 2) for z in with_bias]
    z = torch.softmax(heads[0] @ heads[1].mT / (E // H) ** 0.5, -1) @ heads[2]
    logits = model.head(attention.out_proj(z.transpose(1, 2).flatten(2)).tanh().mean(1))
    losses = F.cross_entropy(logits, y, reduction="none")
    out_grads = torch.autograd.grad(losses.sum(), (q, k, v), retain_graph=True)
    grad_w, grad_b = torch.autograd.grad(
        losses.mean(), (attention.in_proj_weight, attention.in_proj_bias)
    )
    expected = []
    for b, grad, bias_grad in zip(out_grads, grad_w.chunk(3), grad_b.chunk(3), strict=True):
        if setting == "expand":
            A, B = torch.einsum("nrp,nrq->pq", x, x) / L / N, torch.einsum("nrp,nrq->pq", b, b) / N
        else:
            A, B = x.mean(1).mT @ x.mean(1) / N, b.sum(1).mT @ b.sum(1) / N
        A, B = (A, B) if ema is None else (A * ema, B * ema)
        pi = (A.trace() / B.trace()).sqrt()
        A_inv = torch.linalg.inv(A + damping**0.5 * pi * torch.eye(E))
        B_inv = torch.linalg.inv(B + damping**0.5 / pi * torch.eye(E))
        expected.append((B_inv @ grad @ A_inv, B_inv @ bias_grad))

    config = asdl.PreconditioningConfig(
        data_size=N, damping=damping, **({} if ema is None else {"ema_decay": ema})
    )
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim=setting)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    for i, (weight, bias) in enumerate(expected):
        assert_equal(attention.in_proj_weight.grad[i * E : (i + 1) * E], weight, 1e-9)
        assert_equal(attention.in_proj_bias.grad[i * E : (i + 1) * E], bias, 1e-9)


@pytest.mark.parametrize("shape", ["unit_wise", "diag", "layer_wise", "full"])
def test_other_shapes_precondition_the_parameters_gradient(shape: str) -> None:
    """Against the examples' gradients of the query's weight and bias (or of everything), damped and
    inverted here.
    """
    _, ours = both(batch_first=True, add_bias_kv=True)
    model, x, y = Classifier(ours), torch.randn(N, L, E), torch.tensor([0, 2, 1])
    losses, damping = F.cross_entropy(model(x), y, reduction="none"), 1e-2
    parts = {
        name: p
        for name, p in model.named_parameters()
        if name.split(".")[-1] not in ("bias_k", "bias_v")
    }

    def layers(tensors: dict[str, Tensor]) -> list[Tensor]:
        """``(out_features, in_features + 1)`` of out, q, k, v and the head: weights with their bias
        beside them.
        """
        w, b = tensors["attention.in_proj_weight"], tensors["attention.in_proj_bias"]
        pairs = [
            (tensors["attention.out_proj.weight"], tensors["attention.out_proj.bias"]),
            *zip(w.chunk(3), b.chunk(3), strict=True),
            (tensors["head.weight"], tensors["head.bias"]),
        ]
        return [torch.cat([weight, bias[:, None]], dim=1) for weight, bias in pairs]

    examples = [
        layers(
            dict(
                zip(
                    parts, torch.autograd.grad(loss, parts.values(), retain_graph=True), strict=True
                )
            )
        )
        for loss in losses
    ]
    mean = [torch.stack(grads).mean(0) for grads in zip(*examples, strict=True)]
    if shape == "full":
        rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in examples])
        F_inv = torch.linalg.inv(rows.mT @ rows / N + damping * torch.eye(rows.shape[1]))
        product = F_inv @ torch.cat([g.flatten() for g in mean])
        expected = [
            p.view_as(g)
            for p, g in zip(product.split([g.numel() for g in mean]), mean, strict=True)
        ]
    else:
        expected = []
        for i, grad in enumerate(mean):
            rows = torch.stack([grads[i] for grads in examples])
            if shape == "diag":
                expected.append(grad / (rows.square().mean(0) + damping))
                continue
            units = (
                rows.flatten(1)[None] if shape == "layer_wise" else rows.transpose(0, 1)
            )  # units N numel
            blocks = units.mT @ units / N + damping * torch.eye(units.shape[-1])
            expected.append(
                torch.linalg.solve(blocks, grad.reshape(len(units), -1, 1)).view_as(grad)
            )
    config = asdl.PreconditioningConfig(data_size=N, damping=damping)
    maker = asdl.NaturalGradientMaker(
        model, config, fisher_type="fisher_emp", fisher_shape=shape, shared_dim="reduce"
    )
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    for actual, grad in zip(
        layers({name: p.grad for name, p in parts.items()}), expected, strict=True
    ):
        assert_equal(actual, grad, 1e-7)


def test_a_frozen_bias_has_no_curvature() -> None:
    _, ours = both(batch_first=True)
    model, x, y = Classifier(ours), torch.randn(N, L, E), torch.tensor([0, 2, 1])
    ours.in_proj_bias.requires_grad_(False)
    computed_fisher(model, x, "reduce", (F.cross_entropy, y), "diag", fisher_type="fisher_emp")
    assert ours.v_proj.fisher.diag.bias is None and model.head.fisher.diag.bias is not None
    rows = torch.stack(
        [
            torch.autograd.grad(
                F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), ours.in_proj_weight
            )[0]
            for n in range(N)
        ]
    )
    assert_equal(ours.v_proj.fisher.diag.weight, rows.square().mean(0)[2 * E :])


def test_a_parameter_of_two_modules_is_one_layer() -> None:
    first, second = (
        MultiheadAttention(E, H, batch_first=True),
        MultiheadAttention(E, H, batch_first=True),
    )
    second.in_proj_weight, second.in_proj_bias = first.in_proj_weight, first.in_proj_bias

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = first, second, nn.Linear(E, 3)

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.first, self.second):
                x = attention(x, x, x)[0]
            return self.head(x.mean(1))

    maker = computed_fisher(Twice(), torch.randn(N, L, E), "reduce")
    names = {layer.name: [name for name, _ in layer.tied] for layer in maker.plan.layers}
    assert names["first.q_proj"] == ["second.q_proj"] and "second.q_proj" not in names
    assert names["first.out_proj"] == []


# -------------------------------------------------------------------------------------- checkpoints


def test_state_dict_loads_both_ways_with_the_optimizers() -> None:
    original, _ = both(add_bias_kv=True)
    ours = convert(copy.deepcopy(original))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (original, ours)]

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        module(*inputs({}))[0].square().sum().backward()
        optimizer.step()

    for module, optimizer in zip((original, ours), optimizers, strict=True):
        train(module, optimizer, 1)
    # swap the checkpoints, through a file
    files = [io.BytesIO(), io.BytesIO()]
    for file, module, optimizer in zip(files, (original, ours), optimizers, strict=True):
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
    for file, module, optimizer in zip(files, (ours, original), reversed(optimizers), strict=True):
        state = torch.load(file)
        assert not any(module.load_state_dict(state["model"]))
        optimizer.load_state_dict(state["optimizer"])
    for module, optimizer in zip((original, ours), optimizers, strict=True):
        train(module, optimizer, 2)
    for a, b in zip(original.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1], b[1], rtol=1e-9, atol=1e-10)


def test_copies_have_blocks_of_their_own() -> None:
    _, ours = both(batch_first=True)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    xs = inputs({"batch_first": True})
    _ = ours.q_proj.weight
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(other(*xs)[0], ours(*xs)[0])
        with torch.no_grad():
            other.in_proj_weight.zero_()
        assert (other.q_proj.weight == 0).all() and not (ours.q_proj.weight == 0).any()
        with pytest.raises(RuntimeError, match="in_proj_weight"):
            other.q_proj.weight.sum().backward()
        other.q_proj(xs[0]).sum().backward()
        assert other.in_proj_weight.grad is not None and ours.in_proj_weight.grad is None


def test_convert_and_revert_keep_the_module() -> None:
    original, _ = both(batch_first=True, dropout=0.1)
    attributes, parameters = dict(original.__dict__), list(original.parameters())
    seen: list[Any] = []
    original.register_forward_hook(lambda *args: seen.append(args))
    converted = convert(original)
    assert converted is original and type(original) is MultiheadAttention
    assert all(a is b for a, b in zip(original.parameters(), parameters, strict=True))
    original(*inputs({"batch_first": True}))
    assert len(seen) == 1  # the user's hook is still there
    assert revert(original) is original and type(original) is nn.MultiheadAttention
    assert set(original.__dict__) == set(attributes) and list(original._modules) == ["out_proj"]
    original(*inputs({"batch_first": True}))
    assert len(seen) == 2
    assert type(revert(MultiheadAttention(E, H))) is nn.MultiheadAttention


def test_functional_call_and_compile_reach_the_parameters() -> None:
    _, ours = both(batch_first=True)
    xs = inputs({"batch_first": True})
    doubled = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    expected = copy.deepcopy(ours)
    expected.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(ours, doubled, tuple(xs))[0], expected(*xs)[0])
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*xs)[0], ours(*xs)[0], rtol=1e-12, atol=1e-13)


# -------------------------------------------------------------------- PyTorch's Transformer modules


def encoder(batch_first: bool, norm_first: bool, bias: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        E, H, 12, dropout=0.1, batch_first=batch_first, norm_first=norm_first, bias=bias
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces where its nested tensors are not used
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E))


def run(module: nn.Module, *args: Any, seed: int = 5, **kwargs: Any) -> Tensor:
    torch.manual_seed(seed)
    return module(*args, **kwargs)


PADDING = torch.tensor([[False] * L, [False] * (L - 1) + [True], [False] * (L - 2) + [True] * 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_encoder_equals_the_original(
    batch_first: bool, norm_first: bool, train: bool, bias: bool
) -> None:
    original = encoder(batch_first, norm_first, bias).train(train)
    ours = convert(copy.deepcopy(original))
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    calls: list[dict[str, Any]] = [
        {},
        {"src_key_padding_mask": PADDING},
        {"mask": causal, "is_causal": True},
        {"mask": causal},
        {
            "mask": causal,
            "src_key_padding_mask": torch.zeros(N, L).masked_fill(PADDING, -torch.inf),
        },
    ]
    for call in calls:
        for module in (original, ours):
            module.zero_grad()
            run(module, x, **call).sin().sum().backward()
        torch.testing.assert_close(
            run(ours, x, **call), run(original, x, **call), rtol=1e-12, atol=1e-12
        )
        assert_same_grads(ours, original, 1e-10)
        with torch.no_grad():  # the fused path with nested tensors, where PyTorch takes it
            torch.testing.assert_close(
                run(ours, x, **call), run(original, x, **call), rtol=1e-12, atol=1e-12
            )
        captured = captured_weight_grads(
            ours, lambda call=call: run(ours.zero_grad() or ours, x, **call).sin().sum()
        )
        assert len(captured) == 2 * 6
        assert_captured(ours, captured)
    reverted = revert(ours)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in original.modules()]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_converted_transformer_equals_the_original(
    batch_first: bool, norm_first: bool, train: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = nn.Transformer(
            E, H, 2, 2, 12, batch_first=batch_first, norm_first=norm_first
        ).train(train)
    ours = convert(copy.deepcopy(original))
    src, tgt = torch.randn(N, S, E), torch.randn(N, L, E)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1:, -2:] = True
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L).isinf(),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_key_padding_mask": PADDING,
    }
    run(original, src, tgt, **call).sin().sum().backward()
    captured = captured_weight_grads(ours, lambda: run(ours, src, tgt, **call).sin().sum())
    assert_same_grads(ours, original, 1e-10)
    assert len(captured) == 2 * (4 + 2) + 2 * (8 + 2)
    assert_captured(ours, captured)
    torch.testing.assert_close(
        run(ours, src, tgt, **call), run(original, src, tgt, **call), rtol=1e-12, atol=1e-12
    )
    with torch.no_grad():
        torch.testing.assert_close(
            run(ours, src, tgt, **call), run(original, src, tgt, **call), rtol=1e-12, atol=1e-12
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fused_path_is_off_while_somebody_looks() -> None:
    original = encoder(batch_first=True, norm_first=False).eval()
    ours = convert(copy.deepcopy(original))
    assert type(ours) is TransformerEncoder and ours.use_nested_tensor
    x = torch.randn(N, L, E)
    real = ~PADDING
    with torch.no_grad():
        expected = original(x, src_key_padding_mask=PADDING)
        assert (expected[PADDING] == 0).all()  # PyTorch does take the fused path
        assert torch.equal(ours(x, src_key_padding_mask=PADDING), expected)
        names = ["q_proj", "k_proj", "v_proj", "out_proj"]
        for name in names:
            seen: list[Any] = []
            block = ours.layers[1].self_attn.get_submodule(name)
            handle = block.register_forward_hook(
                lambda m, args, out, seen=seen: seen.append(out.shape)
            )
            out = ours(x, src_key_padding_mask=PADDING)
            handle.remove()
            assert seen == [(N, L, E)], name
            torch.testing.assert_close(out[real], expected[real], rtol=1e-12, atol=1e-12)
        calls: list[Any] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
        ours(x, src_key_padding_mask=PADDING)
        handle.remove()
        assert sum(isinstance(m, LinearBlock) for m in calls) == 2 * 3
        ours.layers[0].self_attn.v_proj = nn.Linear(E, E)  # somebody's adapter
        changed = ours(x)
        assert not torch.allclose(changed, original(x))


@pytest.mark.parametrize("kind", ["backward", "pre"])
def test_hooks_of_every_kind_count(kind: str) -> None:
    _, ours = both(batch_first=True)
    ours.eval().requires_grad_(False)
    x = torch.randn(N, L, E)
    fused: list[bool] = []
    with torch.no_grad():
        assert ours._qkv_same_embed_dim and ours._runs_fused((x, x, x))
        register = {
            "backward": ours.q_proj.register_full_backward_hook,
            "pre": ours.q_proj.register_forward_pre_hook,
        }
        handle = register[kind](lambda *args: None)
        fused.append(ours._qkv_same_embed_dim)
        handle.remove()
        fused.append(ours._qkv_same_embed_dim)
    assert fused == [False, True]


def test_nested_tensors_are_refused_where_they_cannot_be_used() -> None:
    _, ours = both(batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(ValueError, match="padded tensors"):
        ours(nested, nested, nested)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.eval()(nested, nested, nested, need_weights=False)[0].is_nested
        ours.k_proj.register_forward_hook(lambda *args: None)
        with pytest.raises(ValueError, match="padded tensors"):
            ours(nested, nested, nested)


# -------------------------------------------------------------------------------- several processes


class Transposed(nn.Module):
    """A linear layer that keeps its weight as ``(in_features, out_features)``, as ``Conv1D``
    does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(E, E)), nn.Parameter(torch.zeros(E))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Distributed(nn.Module):
    """Attention, a fused layer that is split, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.transposed = Transposed()
        self.qkv = nn.Linear(E, 3 * E)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(x).tanh()
        q, k, v = self.qkv(x + self.attention(x, x, x)[0]).chunk(3, dim=-1)
        return self.head((q.tanh() * k.sin() + v).mean(1))


def train_on_a_part(rank: int, world_size: int) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    register_converter(Transposed, Conv1DConverter())
    model = convert(Distributed(), split_qkv=True)
    config = asdl.PreconditioningConfig(data_size=8 // world_size, damping=1e-2, ema_decay=0.3)
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        x, y = torch.randn(8, L, E), torch.randint(0, 3, (8,))
        part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        optimizer.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x[part]), y[part])
        maker.forward_and_backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _worker(rank: int, file: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        results[rank] = [p.numpy() for p in train_on_a_part(rank, 2)]
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*batch_first.*:UserWarning")
def test_two_ranks_train_like_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (str(tmp_path / "store"), results), nprocs=2)
        ranks = [[torch.from_numpy(p) for p in results[rank]] for rank in range(2)]
    for joint, first, second in zip(train_on_a_part(0, 1), *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, joint, rtol=1e-8, atol=1e-10)
