"""``convert`` and ``revert`` on whole models: nothing changes but what hooks see; what cannot be
done is refused.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
import zoo
from asdl import symmatrix
from oracles.autograd import (
    assert_captured,
    assert_equal,
    assert_same_grads,
    captured_weight_grads,
    computed_fisher,
    parameter_grads,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from asdl_ws_plugin import MultiheadAttention, convert, register_converter, revert
from asdl_ws_plugin import convert as convert_function
from asdl_ws_plugin.conversion.convert import Converter, Site, _converters
from asdl_ws_plugin.weight_sharing.blocks import LinearBlock
from asdl_ws_plugin.weight_sharing.plan import Plan


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that conversion may not leave behind: classes, children, attributes,
    Parameters.
    """
    return [
        (
            name,
            module,
            type(module),
            [*map(id, module.children())],
            tuple(sorted(map(str, module.__dict__))),
            tuple(map(id, module.parameters())),
            module.forward,
        )
        for name, module in model.named_modules()
    ]


# ------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.filterwarnings("ignore:split_qkv:UserWarning")  # where there is nothing to split
def test_nothing_changes_but_what_hooks_see(name: str, split: bool) -> None:
    case, original = zoo.ZOO[name], zoo.make(name)
    model = copy.deepcopy(original)
    before, parameters = snapshot(model), [*model.named_parameters()]
    assert convert(model, split_qkv=split) is model
    assert all(
        a is b and n == m
        for (n, a), (m, b) in zip(model.named_parameters(), parameters, strict=True)
    )

    out = zoo.logits(name, original)
    out.sin().sum().backward()
    outputs = []
    captured = captured_weight_grads(
        model, lambda: outputs.append(zoo.logits(name, model)) or outputs[0].sin().sum()
    )
    torch.testing.assert_close(outputs[0], out, rtol=1e-11, atol=1e-11)
    assert_same_grads(model, original, 1e-10)
    assert len(captured) == (case.split if split else case.linears)
    assert_captured(model, captured, case.tied)

    model.zero_grad()
    for trained in (model.eval(), original.eval()):
        with torch.no_grad():
            outputs.append(zoo.logits(name, trained))
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-11, atol=1e-11)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == list(original.state_dict())
    fresh = zoo.make(name)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(state)
    assert torch.equal(zoo.logits(name, fresh.eval()), zoo.logits(name, original))
    model.load_state_dict(original.state_dict())

    model.train()
    assert revert(model) is model
    assert snapshot(model) == before


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.filterwarnings("ignore:split_qkv:UserWarning")
def test_every_matrix_is_seen_or_accounted_for(name: str) -> None:
    """The matrices that are not preconditioned: embeddings (also as an output layer), grouped
    convolutions, tables.
    """
    case, model = zoo.ZOO[name], convert(zoo.make(name), split_qkv=True)
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    plan = Plan(
        model,
        ["kron", (nn.LayerNorm, "unit_wise"), (nn.BatchNorm2d, "unit_wise")],
        "reduce",
        grouped,
    )
    modules = [layer.module for layer in plan.layers]
    seen = {id(m.owned("weight") if isinstance(m, LinearBlock) else m.weight) for m in modules}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    missing = {
        n: p.shape
        for n, p in model.named_parameters()
        if id(p) not in seen
        and id(p) not in embeddings
        and n.rpartition(".")[2].startswith(("weight", "in_proj"))
        and p.ndim > 1
        and n.rpartition(".")[0] not in grouped
    }
    assert all(any(part in n for part in case.without_batch) for n in missing), missing
    for part in case.without_batch:
        assert any(part in n and "same for every example" in why for n, why in plan.skipped.items())
    for tied in case.tied:
        assert "tied to the embedding" in plan.skipped[tied]
    if name in ("bert", "timm vit", "hugging face vit", "torchvision vit"):
        assert not missing and not grouped


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n not in ("torchvision swin", "timm swin")])
@pytest.mark.filterwarnings(
    "ignore:.*batch_first.*:UserWarning",
    "ignore:.*was not called.*:UserWarning",
    "ignore:split_qkv:UserWarning",
)
def test_a_step_of_kfac(name: str, setting: str) -> None:
    model = convert(zoo.make(name).eval(), split_qkv=True)
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    config = asdl.PreconditioningConfig(
        data_size=zoo.N, damping=1e-2, ema_decay=0.5, ignore_modules=grouped
    )
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_mc", shared_dim=setting)
    case, arguments = zoo.ZOO[name], zoo.ZOO[name].arguments()
    by_position = () if case.inputs else arguments.values()
    output = maker.setup_model_call(model, *by_position, **(arguments if case.inputs else {}))
    out = output.logits if case.inputs else output
    if case.inputs:
        maker.setup_logits_repr(out)
    labels = arguments["input_ids"] if case.tied else torch.arange(zoo.N)
    maker.setup_loss_call(lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()), out, labels)
    plain = copy.deepcopy(model)
    _, loss = maker.forward_and_backward()
    z = zoo.logits(name, plain)
    expected = F.cross_entropy(z.flatten(0, -2), labels.flatten())
    expected.backward()
    assert_equal(loss.detach(), expected.detach(), 1e-10)
    grads, before = parameter_grads(model), parameter_grads(plain)
    layers = {layer.name: layer.module for layer in maker.plan.layers}
    for param, grad in grads.items():
        owner = param.rpartition(".")[0]
        if grad is None:
            continue
        assert grad.isfinite().all()
        preconditioned = any(n == owner or n.startswith(f"{owner}.") for n in layers)
        if not preconditioned:
            torch.testing.assert_close(grad, before[param], rtol=1e-9, atol=1e-12)
        elif param.endswith("weight") and before[param].norm() > 1e-9:
            assert (grad - before[param]).norm() > 1e-3 * grad.norm(), param


# ---------------------------------------------------------------------------------- fused and split


def vit() -> nn.Module:
    """A timm ViT. Behind a plain softmax the keys' summed gradient would be zero; their
    normalization prevents it.
    """
    import timm

    torch.manual_seed(2)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        qk_norm=True,
    ).double()


def step(
    model: nn.Module, x: Tensor, y: Tensor, setting: str, steps: int = 1, **config: Any
) -> asdl.KfacGradientMaker:
    maker = asdl.KfacGradientMaker(
        model,
        asdl.PreconditioningConfig(data_size=len(x), damping=1e-3, **config),
        fisher_type="fisher_emp",
        shared_dim=setting,
    )
    for i in range(steps):
        model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x * (i + 1)), y)
        maker.forward_and_backward()
    return maker


@pytest.fixture
def double_default() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.3}], ids=["no average", "average"])
def test_fused_and_split_agree_block_by_block(setting: str, ema: dict[str, float]) -> None:
    fused, split = vit(), vit()
    convert(split, split_qkv=True)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    if ema:
        for model in (fused, split):
            step(model, x, y, setting, steps=3, **ema)
        for one, other in zip(fused.blocks, split.blocks, strict=True):
            whole = one.attn.qkv.fisher.kron
            for i, block in enumerate(other.attn.qkv.children()):
                rows = slice(16 * i, 16 * (i + 1))
                assert_equal(block.fisher.kron.A, whole.A)
                assert_equal(block.fisher.kron.A_inv, whole.A_inv)
                assert_equal(block.fisher.kron.B, whole.B[rows, rows])
                assert block.fisher.kron.A is other.attn.qkv.q.fisher.kron.A
                assert block.fisher.kron.A_inv is other.attn.qkv.q.fisher.kron.A_inv
    # the gradient of a block is its own B's inverse times it, with the damping of the whole
    model = vit()
    shapes = ["kron", (nn.LayerNorm, "unit_wise")]
    computed_fisher(model, x, setting, (F.cross_entropy, y), shapes, fisher_type="fisher_emp")
    F.cross_entropy(model(x), y).backward()
    kron, linear, scale = (
        model.blocks[1].attn.qkv.fisher.kron,
        model.blocks[1].attn.qkv,
        ema.get("ema_decay", 1.0),
    )
    A, B = kron.A * scale, kron.B * scale
    pi = ((A.trace() / 16) / (B.trace() / 48)).sqrt()
    A_inv = torch.linalg.inv(A + 1e-3**0.5 * pi * torch.eye(16, dtype=A.dtype))
    target = vit()
    convert(target, split_qkv=True)
    step(target, x, y, setting, **ema)
    for i in range(3):
        rows = slice(16 * i, 16 * (i + 1))
        B_inv = torch.linalg.inv(B[rows, rows] + 1e-3**0.5 / pi * torch.eye(16, dtype=A.dtype))
        qkv = target.blocks[1].attn.qkv
        assert_equal(qkv.weight.grad[rows], B_inv @ linear.weight.grad[rows] @ A_inv, 1e-8)
        assert_equal(qkv.bias.grad[rows], B_inv @ linear.bias.grad[rows], 1e-8)


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.3}], ids=["no average", "average"])
def test_a_shared_A_is_computed_and_inverted_once(
    ema: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    inverted: list[int] = []
    computed: list[Tensor] = []
    invert, factor = symmatrix.cholesky_inv, asdl_ws_factor()
    monkeypatch.setattr(
        symmatrix, "cholesky_inv", lambda X, d: inverted.append(X.shape[0]) or invert(X, d)
    )
    monkeypatch.setattr(
        "asdl_ws_plugin.weight_sharing.factors.reduce_factor_A",
        lambda x: computed.append(x) or factor(x),
    )
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    counts = []
    for split in (False, True):
        inverted.clear()
        computed.clear()
        step(convert(vit(), split_qkv=split), x, y, "reduce", **ema)
        counts.append((len(computed), len(inverted), inverted.count(48)))
    (A_fused, inverses_fused, wide_fused), (A_split, inverses_split, wide_split) = counts
    assert A_split == A_fused
    assert (wide_fused, wide_split) == (2, 0)
    assert inverses_split == inverses_fused + 2 * (3 - 1)  # three B for one, still one A


def asdl_ws_factor() -> Callable[[Tensor], Tensor]:
    from asdl_ws_plugin.weight_sharing import factors

    return factors.reduce_factor_A


def test_inverses_are_refreshed_with_every_update() -> None:
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    fused, split = vit(), convert(vit(), split_qkv=True)
    makers = [step(m, x, y, "reduce", ema_decay=0.3) for m in (fused, split)]
    for damping in (1e-2, 1e-2, 1e-1):
        for maker in makers:
            maker.update_preconditioner(damping)
        whole = fused.blocks[0].attn.qkv.fisher.kron
        for block in split.blocks[0].attn.qkv.children():
            assert_equal(block.fisher.kron.A_inv, whole.A_inv)
            assert_equal(block.fisher.kron.A, whole.A)
    factors = fused.blocks[0].attn.qkv.fisher.kron
    for damping in (0.5, 0.05):
        factors.update_inv(damping)
        for block in split.blocks[0].attn.qkv.children():
            block.fisher.kron.update_inv(damping)
            assert_equal(block.fisher.kron.A_inv, factors.A_inv)


def test_separate_layers_of_one_input_keep_inverses_of_their_own() -> None:
    """Their A is computed once, but each has the damping that its own B asks for, as if it were
    alone.
    """
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])

    class Separate(nn.Module):
        def __init__(self, copy_input: bool) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.q, self.v = nn.Linear(48, 16), nn.Linear(48, 16)
            self.head = nn.Linear(16, 5)
            self.copy_input = copy_input
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).unflatten(2, (-1, 48 // 3)).transpose(1, 2).flatten(2)
            other = x.clone() if self.copy_input else x
            return self.head((self.q(x).tanh() + 3 * self.v(other)).mean(1))

    models = [Separate(copy_input) for copy_input in (False, True)]
    for model in models:
        step(model, x, y, "expand", ema_decay=0.5, steps=2)
    for name in ("q", "v"):
        shared, alone = (getattr(model, name) for model in models)
        for factor in ("A", "B", "A_inv", "B_inv"):
            assert torch.equal(
                getattr(shared.fisher.kron, factor), getattr(alone.fisher.kron, factor)
            )
        assert torch.equal(shared.weight.grad, alone.weight.grad)
    assert models[0].q.fisher.kron.A is not models[0].v.fisher.kron.A


def blocks(model: nn.Module) -> set[str]:
    return {n.rpartition(".")[0] for n, m in model.named_modules() if isinstance(m, LinearBlock)}


def test_split_qkv_by_name_and_what_it_leaves_alone() -> None:
    model = convert(vit(), split_qkv=["blocks.1.attn.qkv"])
    assert blocks(model) == {"blocks.1.attn.qkv"}
    assert [type(m) for m in revert(model).modules()] == [type(m) for m in vit().modules()]
    with pytest.raises(ValueError, match="'nothing' matches no module"):
        convert(model, split_qkv=["nothing"])
    with pytest.raises(ValueError, match=r"'head'.*5 outputs cannot be three blocks"):
        convert(model, split_qkv=["head"])
    for bad in ("qkv", 3):
        with pytest.raises(TypeError, match="split_qkv"):
            convert(vit(), split_qkv=bad)


class Fused(nn.Module):
    """An attention's fused layer, or what is called like one."""

    def __init__(self, name: str, outputs: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(12, outputs))


@pytest.mark.parametrize(
    ("name", "outputs", "match"),
    [
        ("qkv", 24, "24 outputs of 12 inputs"),  # keys and values of all heads, as GCViT's
        ("c_attn", 18, "18 outputs of 12 inputs"),  # keys and values of one head of four
        (
            "query_key_value",
            36,
            "'query_key_value' does not say.*name it, as in split_qkv=..layer.query_key_value",
        ),
        ("qkv_proj", 36, "'qkv_proj' does not say"),
        ("project", 36, "nothing was split"),
    ],
)
def test_split_qkv_says_what_stays_one_layer(name: str, outputs: int, match: str) -> None:
    model = nn.ModuleDict({"layer": Fused(name, outputs)})
    with pytest.warns(UserWarning, match=match):
        convert(model, split_qkv=True)
    assert not blocks(model)
    assert blocks(convert(model, split_qkv=[f"layer.{name}"])) == {f"layer.{name}"}
    revert(model)
    model["other"] = Fused(
        "qkv", 72
    )  # twice as wide as its input, as between the stages of a hierarchy
    model["wide"] = Fused("to_qkv", 60)
    model["wide"].add_module(
        "to_out", nn.Sequential(nn.Linear(20, 12))
    )  # which takes heads of one third's size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(model, split_qkv=True)
        convert(model, split_qkv=True)  # what is split already is not missing
    assert blocks(model) == {"other.qkv", "wide.to_qkv"} and len(caught) == (
        0 if name == "project" else 2
    )


def _gpt_bigcode(multi_query: bool) -> nn.Module:
    import transformers

    return transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=30,
            n_embd=24,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=1,
            multi_query=multi_query,
        )
    )


def _tiny_vit() -> nn.Module:
    from timm.models.tiny_vit import TinyVit

    return TinyVit(
        num_classes=5,
        embed_dims=(16, 32, 32, 32),
        depths=(1,) * 4,
        num_heads=(2,) * 4,
        window_sizes=(4,) * 4,
    )


@pytest.mark.parametrize(
    ("make", "name", "match"),
    [
        (lambda: zoo.make("timm maxvit"), "qkv", "ordered by heads"),
        (_tiny_vit, "qkv", "ordered by heads"),
        (lambda: _gpt_bigcode(False), "c_attn", "ordered by heads"),
        (lambda: _gpt_bigcode(True), "c_attn", "fewer heads"),
    ],
)
def test_split_qkv_does_not_cut_across_heads(
    make: Callable[[], nn.Module], name: str, match: str
) -> None:
    """These models' fused layers have names that say nothing of their order: thirds would not be q,
    k and v.
    """
    model = make()
    with pytest.warns(UserWarning, match=match):
        convert(model, split_qkv=True)
    assert not any(n.endswith(name) for n in blocks(model))
    with pytest.raises(ValueError, match=match):
        convert(make(), split_qkv=[name])


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "beit_base_patch16_224"])
@pytest.mark.parametrize("variant", ["routed", "called"])
def test_every_layer_is_called_once(name: str, variant: str) -> None:
    """Also where the attention module does call its layer, inside of a forward that is routed."""
    sizes = zoo.WINDOWS if "swin" in name else zoo.PLAIN
    import timm

    options = {} if variant == "routed" else {"qkv_bias": False}
    model = timm.create_model(name, num_classes=5, **sizes, **options).double()
    x = zoo.ZOO["timm vit"].arguments()["x"]
    expected = model(x)
    convert(model)
    if variant == "called":  # timm has no option for it in these models
        for module in model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = True
    calls: dict[str, int] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda *_, n=module_name: calls.update({n: calls.get(n, 0) + 1})
            )
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert set(calls.values()) == {1}
    assert len(calls) == (26 if "swin" in name else 9)


def test_transposed_weights_are_preconditioned_as_their_linear_layer() -> None:
    """GPT-2's ``Conv1D`` beside an ``nn.Linear`` of the transposed weight."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(6, 4).double()
    nn.init.normal_(conv.bias)
    linear = nn.Linear(4, 6).double()
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.arange(5)

    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh().mean(1)

    for ema in ({}, {"ema_decay": 0.5}):
        for setting in ("expand", "reduce"):
            models = [convert(Model(copy.deepcopy(conv))), Model(copy.deepcopy(linear))]
            for model in models:
                step(model, x, y, setting, **ema)
            assert_equal(models[0].layer.weight.grad.T, models[1].layer.weight.grad)
            assert_equal(models[0].layer.bias.grad, models[1].layer.bias.grad)
            assert (
                models[0].layer.linear.weight.grad.data_ptr()
                == models[0].layer.weight.grad.data_ptr()
            )


# ---------------------------------------------------------------------------------------- bad input


class Tree(nn.Module):
    """Attention, a fused layer and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.last = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.last(q, k, v)[0]


def test_convert_again_changes_nothing_or_adds_what_is_new() -> None:
    model = Tree()
    before = snapshot(model)
    convert(model)
    once = snapshot(model)
    assert snapshot(convert(model)) == once != before
    convert(model, split_qkv=True)
    assert [name for name, _ in model.qkv.named_children()] == ["q", "k", "v"]
    twice = snapshot(model)
    assert snapshot(convert(model, split_qkv=True)) == snapshot(convert(model)) == twice
    assert snapshot(revert(model)) == before == snapshot(revert(model))


def test_a_module_twice_in_the_tree() -> None:
    model = Tree()
    model.last, model.again = model.attention, model.qkv
    model.attention.register_module("inner", None)
    del model.attention._modules["inner"]
    expected = copy.deepcopy(model)
    before = snapshot(model)
    convert(model, split_qkv=True)
    assert (
        model.last is model.attention
        and isinstance(model.last, MultiheadAttention)
        and model.again is model.qkv
    )
    x = torch.randn(2, 3, 8)
    model(x).sum().backward()
    expected(x).sum().backward()
    torch.testing.assert_close(model(x), expected(x))
    assert_same_grads(model, expected, 1e-5)
    assert snapshot(revert(model)) == before


def scripted(model: Tree) -> None:
    model.last = torch.jit.script(nn.Linear(8, 8))


def forward_replaced(model: Tree) -> None:
    model.last.forward = lambda *args: None


def own_subclass(model: Tree) -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.last = Mine(8, 2)


def parametrized_attention(model: Tree) -> None:
    parametrizations.weight_norm(model.last, "in_proj_weight")


def parametrized_linear(model: Tree) -> None:
    parametrizations.weight_norm(model.qkv, "weight")


def several_devices(model: Tree) -> None:
    model.last.in_proj_bias = nn.Parameter(model.last.in_proj_bias.to("meta"))


def shared_with_another_layer(model: Tree) -> None:
    model.table = nn.Embedding(24, 8)
    model.table.weight = model.qkv.weight


def linear_subclass(model: Tree) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.qkv = Scaled(8, 24)


REFUSALS: list[tuple[Callable[[Tree], None], str, str, type[Exception]]] = [
    (scripted, "last", "torch.jit", TypeError),
    (forward_replaced, "last", "forward was replaced", ValueError),
    (own_subclass, "last", "forward of its own", ValueError),
    (parametrized_attention, "last", "parametrizations", ValueError),
    (parametrized_linear, "qkv", "parametrizations", ValueError),
    (several_devices, "last", r"several devices \(cpu, meta\)", ValueError),
    (shared_with_another_layer, "qkv", "shares a Parameter with 'table'", ValueError),
    (linear_subclass, "qkv", "forward of its own", ValueError),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("spoil", "name", "reason", "error"), REFUSALS, ids=lambda v: getattr(v, "__name__", None)
)
def test_what_cannot_be_converted_is_refused_by_name(
    spoil: Callable[[Tree], None], name: str, reason: str, error: type[Exception]
) -> None:
    model = Tree()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(
        error, match=rf"(?s)'{name}'.*{reason}.*model is unchanged.*ignore_modules=\['{name}'\]"
    ):
        convert(model, split_qkv=True)
    assert snapshot(model) == before
    convert(model, split_qkv=True, ignore_modules=[name])
    assert isinstance(model.attention, MultiheadAttention)
    assert snapshot(revert(model)) == before


def test_a_converter_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    class Last(nn.Linear):
        pass

    class Fails(Converter):
        def convert(self, site: Site) -> None:
            raise OSError("disk full")

    register_converter(Last, Fails())
    try:
        model = Tree()
        model.end = Last(8, 8)
        before = snapshot(model)
        with pytest.raises(OSError, match="disk full"):
            convert(model, split_qkv=True)
        assert snapshot(model) == before
    finally:
        del _converters[f"{Last.__module__}.{Last.__qualname__}"]


def test_a_users_converter() -> None:
    class Doubled(nn.Linear):
        pass

    class Marks(Converter):
        options = ("mark",)

        def wants(self, site: Site) -> bool:
            return site.options.get("mark", False)

        def convert(self, site: Site) -> None:
            site.module.marked = site.name

        def revert(self, module: nn.Module) -> None:
            del module.marked

    register_converter(Doubled, Marks())
    try:
        model = nn.Sequential(Doubled(8, 24), nn.Sequential(Doubled(24, 8)))
        assert not hasattr(convert(model)[0], "marked")
        assert convert(model, mark=True)[1][0].marked == "1.0"
        assert not hasattr(revert(model)[0], "marked")
        # the first that wants a module gets it: the package's own is for the base class
        convert(model, mark=False, split_qkv=[model[0]])
        assert len(list(model[0].children())) == 3
    finally:
        del _converters[f"{Doubled.__module__}.{Doubled.__qualname__}"]
    for bad in ((3, Marks()), (nn.Linear, Marks)):
        with pytest.raises(TypeError):
            register_converter(*bad)
    with pytest.raises(TypeError, match=r"unknown options \['typo'\]"):
        convert(nn.Linear(2, 2), typo=1)
    for function in (convert_function, revert):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function("model")
    with pytest.raises(TypeError, match="ignore_modules"):
        convert(nn.Linear(2, 2), ignore_modules="qkv")


def test_the_users_hooks_stay_and_block_revert_where_they_would_be_lost() -> None:
    model = convert(Tree(), split_qkv=True)
    seen: list[str] = []
    model.qkv.register_forward_hook(lambda *_: seen.append("qkv"))
    handle = model.qkv.k.register_forward_hook(lambda *_: seen.append("k"))
    model(torch.randn(2, 3, 8))
    assert seen == ["k", "qkv"]
    state = snapshot(model)
    with pytest.raises(ValueError, match=r"'qkv'.*has hooks"):
        revert(model)
    assert snapshot(model) == state
    handle.remove()
    revert(model)(torch.randn(2, 3, 8))
    assert seen == ["k", "qkv", "qkv"]


def test_copies_and_pickles_can_be_reverted() -> None:
    model = convert(zoo.make("torchvision swin_v2").eval(), split_qkv=True)
    expected = zoo.logits("torchvision swin_v2", model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(zoo.logits("torchvision swin_v2", other), expected)
        captured = captured_weight_grads(
            other, lambda other=other: zoo.logits("torchvision swin_v2", other).sum()
        )
        assert len(captured) == 34
        assert all(p.grad is None for p in model.parameters())
        revert(other)
        assert not any(isinstance(m, LinearBlock) for m in other.modules())
        torch.testing.assert_close(
            zoo.logits("torchvision swin_v2", other), expected, rtol=1e-12, atol=1e-12
        )


def test_the_optimizer_and_its_state_survive() -> None:
    """Training, converting in the middle, and reverting again, is training."""
    models = [vit() for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for change in (lambda m: m, lambda m: convert(m, split_qkv=True), lambda m: m, revert):
        change(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# -------------------------------------------------------------- subclasses and parametrized Linears


class Adapted(nn.Linear):
    """A low-rank adapter beside a linear layer, in a subclass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.down, self.up = (
            nn.Parameter(torch.randn(2, args[0])),
            nn.Parameter(torch.randn(args[1], 2)),
        )

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class Standardized(nn.Linear):
    """Uses another weight than the one it has."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / self.weight.norm(), self.bias)


class Pooled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().mean(1))


def test_a_subclass_that_is_still_linear_in_its_weight_works(double_default: None) -> None:
    model, x = Pooled(Adapted(4, 6)), torch.randn(5, 3, 4)
    captured = captured_weight_grads(model, lambda: model(x).sin().sum())
    assert_captured(model, captured)
    maker = computed_fisher(model, x, "reduce")
    a = x.mean(1)
    assert_equal(model.layer.fisher.kron.A, a.mT @ a / 5)
    assert [layer.name for layer in maker.plan.layers] == ["layer", "head"]


def test_a_subclass_that_computes_something_else_is_refused(double_default: None) -> None:
    model, x = Pooled(Standardized(4, 6)), torch.randn(5, 3, 4)
    with pytest.raises(
        ValueError, match=r"Layer 'layer' \(Standardized\).*ignore_modules=\['layer'\]"
    ):
        computed_fisher(model, x, "reduce")
    assert not hasattr(model.head, "fisher")
    computed_fisher(model, x, "reduce", ignore_modules=["layer"])


@pytest.mark.parametrize("register", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated.*:FutureWarning")
def test_a_parametrized_layer_is_left_out_and_reported(register: Any, double_default: None) -> None:
    model, x, y = Pooled(nn.Linear(4, 6)), torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 0, 1])
    register(model.layer)
    plain = copy.deepcopy(model) if register is parametrizations.weight_norm else None
    maker = step(model, x, y, "reduce")
    assert "parametrization" in maker.plan.skipped["layer"]
    assert [layer.name for layer in maker.plan.layers] == ["head"]
    if plain is not None:
        F.cross_entropy(plain(x), y).backward()
        for a, b in zip(model.layer.parameters(), plain.layer.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert parametrize.is_parametrized(model.layer)


def test_attention_whose_layer_is_not_called_and_cannot_be_routed() -> None:
    model = zoo.make("timm beit")
    parametrizations.weight_norm(model.blocks[1].attn.qkv)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks.1.attn'.*without calling it"):
        convert(model)
    assert snapshot(model) == before
