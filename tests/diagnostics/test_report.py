"""``inspect``: what it says is what training does, and nothing has changed afterwards."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import asdl
import numpy
import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import hooks_of, kfac
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import asdl_ws_plugin
from asdl_ws_plugin import Report, inspect
from asdl_ws_plugin._torchvision import make_importable
from asdl_ws_plugin.weight_sharing.matrices import tensors

make_importable()

N, R, E, C = 3, 5, 8, 4


def row_of(report: Report, name: str) -> Any:
    return {row.name: row for row in report.rows}[name]


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=E,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=C,
        **options,
    )


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True, pool: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, E)
        self.layer = nn.TransformerEncoderLayer(E, 2, 6, batch_first=batch_first, dropout=0.1)
        self.head = nn.Linear(E, C)
        self.pool = pool

    def forward(self, ids: Tensor) -> Tensor:
        y = self.head(self.layer(self.embedding(ids)))
        return y.mean(1) if self.pool else y


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Calls(nn.Module):
    """A layer that is called twice, tied layers, and windows that are merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.window = nn.Linear(E, E), nn.Linear(E, E)
        self.first, self.second = nn.Linear(E, E), nn.Linear(E, E)
        self.second.weight = self.first.weight
        self.head = nn.Linear(E, C)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.window(x.reshape(2 * n, -1, E)).reshape(n, -1, E)
        return self.head(self.second(self.first(x)).mean(1))


class Queries(nn.Module):
    """Cross-attention from learned queries, the same for every example, as detection models have
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(R + 1, E))
        self.q, self.k, self.v, self.head = (
            nn.Linear(E, E),
            nn.Linear(E, E),
            nn.Linear(E, E),
            nn.Linear(E, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        queries = torch.zeros(len(x), 1, 1) + self.queries
        return self.head(F.scaled_dot_product_attention(self.q(queries), self.k(x), self.v(x)))


def tokens(*sizes: int) -> Tensor:
    return torch.randint(11, sizes)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "vit": (vit, lambda: torch.randn(N, 3, 16, 16), "auto"),
    "encoder": (lambda: asdl_ws_plugin.convert(Encoder()), lambda: tokens(N, R), "auto"),
    "encoder_pooled": (
        lambda: asdl_ws_plugin.convert(Encoder(pool=True)),
        lambda: tokens(N, R),
        "auto",
    ),
    "sequence_first": (
        lambda: asdl_ws_plugin.convert(Encoder(batch_first=False)),
        lambda: tokens(R, N),
        "expand",
    ),
    "cnn": (CNN, lambda: torch.randn(N, 2, 9, 7), ["reduce", (nn.Conv2d, "expand")]),
    "calls": (Calls, lambda: torch.randn(N, 8, E), "reduce"),
    "queries": (Queries, lambda: torch.randn(N, R, E), "auto"),
    "split_qkv": (
        lambda: asdl_ws_plugin.convert(vit(), split_qkv=True),
        lambda: torch.randn(N, 3, 16, 16),
        "reduce",
    ),
}


@pytest.mark.parametrize("case", list(MODELS))
def test_it_says_what_training_does(case: str):
    """Layers, strategies, sizes and memory are those of a gradient maker's matrices after one
    step.
    """
    make, data, shared_dim = MODELS[case]
    model, x = make(), data()
    report = inspect(model, x, shared_dim=shared_dim)
    maker = kfac(model, shared_dim, ema_decay=0.9)
    dummy = maker.setup_model_call(model, x)
    logits = model(x)
    maker.setup_loss_call(
        lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()),
        dummy,
        torch.randint(C, logits.shape[:-1]),
    )
    maker.forward_and_backward()
    rows = {row.name: row for row in report.rows}
    modules = dict(model.named_modules())
    with_matrices = {
        name
        for name, module in modules.items()
        if hasattr(module, "fisher") and module is not model
    }
    tied = {"second"} if case == "calls" else set()
    assert {name for name, row in rows.items() if row.seen} == with_matrices | tied
    storages: dict[int, int] = {}
    for name in with_matrices:
        fisher, row = modules[name].fisher, rows[name]
        if fisher.kron is not None:
            assert row.shape == "kron" and row.strategy == maker.shared_dim_for[name]
            assert row.factor_sizes == {
                "A": tuple(fisher.kron.A.shape),
                "B": tuple(fisher.kron.B.shape),
            }
        else:
            assert row.shape == "unit_wise" and row.strategy is None
            assert row.factor_sizes == {"blocks": tuple(fisher.unit.data.shape)}
        storages |= {t.untyped_storage().data_ptr(): t.nbytes for t in tensors(fisher)}
    assert report.factor_bytes == report.inverse_bytes == sum(storages.values())
    if maker.setting is not None:
        assert report.setting == maker.setting
    covered = {
        id(owner): owner
        for name in with_matrices
        for kind in ("weight", "bias")
        if (
            owner := modules[name].owned(kind)
            if hasattr(modules[name], "owned")
            else getattr(modules[name], kind)
        )
        is not None
    }
    seen = sum(p.numel() for p in covered.values())
    everything = sum(p.numel() for p in model.parameters())
    assert (report.num_seen, report.num_parameters) == (seen, everything)
    assert report.coverage == seen / everything
    assert report.matrix_coverage == 1.0


def test_rows_of_a_vit():
    report = inspect(vit(), torch.randn(N, 3, 16, 16))
    patches, qkv, head, model = (
        row_of(report, name) for name in ("patch_embed.proj", "blocks.1.attn.qkv", "head", "")
    )
    assert (patches.type, patches.input_sizes, patches.layout) == (
        "Conv2d",
        (N, 3, 16, 16),
        "batch_first",
    )
    assert patches.R == 16
    assert patches.factor_sizes == {"A": (48, 48), "B": (E, E)}
    assert (qkv.type, qkv.input_sizes, qkv.R, qkv.calls) == ("Linear", (N, 17, E), 17, 1)
    assert (qkv.num_parameters, qkv.num_seen) == (3 * E * E + 3 * E, 3 * E * E + 3 * E)
    assert (head.R, head.strategy, head.factor_bytes) == (1, "reduce", 4 * (E * E + C * C))
    assert (
        not model.seen
        and "cls_token" in model.reason
        and "pos_embed" in model.reason
        and model.remedy
    )
    assert (
        model.num_parameters == E + 17 * E
    )  # position embeddings are of two dimensions and no matrix
    assert (report.num_examples, report.setting) == (N, "reduce")
    assert report.num_parameters - report.num_seen == model.num_parameters


def test_the_report_counts_positions_and_calls():
    calls = inspect(Calls(), torch.randn(N, 8, E))
    assert [(row.name, row.R, row.calls) for row in calls.rows] == [
        ("twice", 16, 2),
        ("window", 8, 1),
        ("first", 16, 1),
        ("second", 16, 1),
        ("head", 1, 1),
    ]
    first, second = row_of(calls, "first"), row_of(calls, "second")
    assert (
        "'second'" in first.note
        and "'first'" in second.note
        and second.factor_bytes == 0 < first.factor_bytes
    )
    assert first.num_seen == E * E + E
    assert (
        second.num_seen == E * E and "'bias'" in second.note
    )  # the bias of the second is not preconditioned
    assert calls.num_seen == calls.num_parameters - E

    sequence_first = inspect(
        asdl_ws_plugin.convert(Encoder(batch_first=False)), tokens(R, N), shared_dim="expand"
    )
    assert sequence_first.num_examples == N and sequence_first.setting == "expand"
    row = row_of(sequence_first, "layer.linear1")
    assert (row.layout, row.R, row.input_sizes) == ("sequence_first", R, (R, N, E))

    square = inspect(
        Calls(), torch.randn(4, 4, E), shared_dim=["reduce", ("twice", "sequence_first")]
    )
    assert row_of(square, "twice").layout == "sequence_first"
    assert (
        not row_of(square, "twice").note
        and "batch first is assumed" in row_of(square, "first").note
    )

    model = nn.Sequential(asdl_ws_plugin.WeightSharingLinear(E, C, role="node"))
    with asdl_ws_plugin.segments(model, node=torch.tensor([0, 0, 0, 1, 1, 2])):
        ragged = inspect(model, torch.randn(6, E))
    assert (ragged.num_examples, ragged.rows[0].layout, ragged.rows[0].R) == (3, "ragged", 2)
    unknown = inspect(model, torch.randn(6, E)).rows[0]
    assert (
        not unknown.seen
        and "which example each of its 6 rows" in unknown.reason
        and "segments" in unknown.remedy
    )


def test_the_setting_is_told_by_the_logits():
    class Output(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.inner, self.sizes = nn.Linear(E, C), sizes

        def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
            return {
                "loss": self.inner(x).sum() * scale,
                "logits": self.inner(x).reshape(*self.sizes, C),
            }

    x = torch.randn(N, R, E)
    assert inspect(Output(N, R), x, scale=2.0).setting == "expand"
    assert inspect(Output(N * R), x).setting == "expand"  # flattened
    assert inspect(Output(N * R), x).num_examples == N
    report = inspect(Output(N, R), x, shared_dim=["auto", (nn.Linear, "reduce")])
    assert (report.setting, report.rows[0].strategy) == ("expand", "reduce")

    class Loss(Output):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum()

    assert inspect(Loss(), x).num_examples == N

    class Mine(asdl_ws_plugin.weight_sharing.operations.LinearReduce):
        pass

    asdl_ws_plugin.register_operation(nn.Linear, Mine, shared_dim="mine")
    try:
        assert inspect(Output(N, R), x, shared_dim="mine").rows[0].strategy == "mine"
    finally:
        asdl_ws_plugin.weight_sharing.registry._operations.pop((nn.Linear, "mine"))


# --------------------------------------------------------------------------------- what is not seen


def unseen(model: nn.Module, *args: Any, **options: Any) -> dict[str, Any]:
    report = inspect(model, *args, **options)
    for row in report.rows:
        assert row.seen == (not row.reason) == (row.num_seen > 0), row
        if not row.seen:
            assert row.remedy and not row.factor_bytes and row.layout is None
    return {row.name: row for row in report.rows if not row.seen}


def test_attention_has_to_be_converted():
    model, x = Encoder(), tokens(N, R)
    rows = unseen(model, x)
    assert set(rows) == {"embedding", "layer.self_attn", "layer.self_attn.out_proj"}
    for name in ("layer.self_attn", "layer.self_attn.out_proj"):
        assert "convert(model)" in rows[name].remedy
    assert "without calling it" in rows["layer.self_attn.out_proj"].reason
    assert "vocabulary" in rows["embedding"].reason
    report = inspect(model, x)
    matrices = 4 * E * E + 2 * 6 * E + C * E
    assert (
        report.num_matrix_parameters == matrices
    )  # without the embedding, and with the raw in_proj_weight
    assert report.num_matrix_seen == matrices - 4 * E * E
    assert set(unseen(asdl_ws_plugin.convert(model), x)) == {"embedding"}
    assert inspect(model, x).matrix_coverage == 1.0


def test_a_tied_output_layer():
    class Tied(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(E, 11, bias=False)
            self.head.weight = self.embedding.weight

    rows = unseen(asdl_ws_plugin.convert(Tied()), tokens(N, R))
    assert set(rows) == {"embedding", "head"}
    assert "tied to the embedding 'embedding'" in rows["head"].reason
    report = inspect(asdl_ws_plugin.convert(Tied()), tokens(N, R))
    assert report.matrix_coverage == 1.0 and report.num_matrix_parameters == 4 * E * E + 2 * 6 * E


class Zoo(nn.Module):
    """Everything that K-FAC does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(E, E)
        self.grouped = nn.Conv2d(E, E, 1, groups=2)
        self.conv1d = nn.Conv1d(E, E, 1)
        self.group_norm = nn.GroupNorm(2, E)
        self.never = nn.Linear(E, E)
        self.used = nn.Linear(E, E)
        self.no_grad = nn.Linear(E, E)
        self.aside = nn.Linear(E, E)
        self.table = nn.Linear(2, E)
        self.weight_norm = parametrizations.weight_norm(nn.Linear(E, E))
        self.frozen = nn.Linear(E, E).requires_grad_(False)
        self.misfit = nn.Linear(E, E)
        self.gamma = nn.Parameter(torch.ones(E, 1))
        self.projection = nn.Parameter(torch.randn(E, E))
        self.head = nn.Linear(E, C)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.stem(x)
        x = (
            x
            + self.grouped(x.mT.unsqueeze(-1)).squeeze(-1).mT
            + self.group_norm(self.conv1d(x.mT)).mT
        )
        x = (
            x
            + F.linear(x, self.used.weight, self.used.bias)
            + x @ self.projection.mT * self.gamma.mT
        )
        with torch.no_grad():
            constant = self.no_grad(x)
        x = x + constant
        self.aside(x)
        x = x + self.table(torch.ones(n, 2)).mean(
            0
        )  # as many rows as examples, all of them the same
        x = self.frozen(self.weight_norm(x))
        x = x + self.misfit(torch.cat([x.flatten(0, 1), x[:, 0], x[0, :1]])).mean()
        return self.head(x.mean(1))


def test_every_layer_that_is_not_seen_has_a_reason_and_a_remedy():
    rows = unseen(Zoo(), torch.randn(N, R, E))
    expected = {
        "": ("Raw Parameters ('gamma', 'projection')", "weight of a layer that is called"),
        "grouped": ("2 groups", "ignore_modules=['grouped']"),
        "conv1d": ("no operation for Conv1d", "register_operation(Conv1d"),
        "group_norm": ("no operation for GroupNorm", "register_operation(GroupNorm"),
        "never": ("was not called", "first-order optimizer"),
        "used": ("without calling it", "Call the module"),
        "no_grad": ("without an autograd graph", "use_reentrant=False"),
        "aside": ("does not influence the model's output", "Leave it out"),
        "table": ("does not depend on the model's input", "ignore_modules=['table']"),
        "weight_norm": ("a parametrization", "first-order optimizer"),
        "weight_norm.parametrizations.weight": ("computed from", "remove the parametrization"),
        "frozen": ("Frozen", "requires_grad_"),
        "misfit": (f"leading sizes ({N * R + N + 1},)", "ignore_modules=['misfit']"),
    }
    for name, (reason, remedy) in expected.items():
        assert reason in rows[name].reason, rows[name]
        assert remedy in rows[name].remedy, rows[name]
    assert set(rows) == set(expected)


def test_a_layer_without_batch_at_every_number_of_examples():
    """Sizes say nothing where one example fits everything; autograd does."""
    for n in (1, 2, 3):
        rows = unseen(Zoo(), torch.randn(n, R, E))
        assert "does not depend on the model's input" in rows["table"].reason
    whole = inspect(nn.Sequential(nn.Linear(E, C)), torch.randn(1, E))
    assert whole.coverage == 1.0


def test_parameters_in_matrices_are_counted():
    report = inspect(Zoo(), torch.randn(N, R, E))
    matrices = {"stem", "grouped", "conv1d", "never", "used", "no_grad", "aside", "misfit"}
    count = (
        len(matrices) * E * E - E * E // 2 + 2 * E + C * E
    )  # of grouped one half, and table and head
    count += (
        E * E + E + E * E
    )  # the two of weight_norm, and projection; gamma is multiplied elementwise
    assert report.num_matrix_parameters == count
    assert report.num_matrix_seen == E * E + C * E
    frozen = nn.Linear(E, C).requires_grad_(False)
    report = inspect(frozen, torch.randn(N, E))
    assert (report.coverage, report.matrix_coverage, report.rows[0].num_frozen) == (
        0.0,
        1.0,
        E * C + C,
    )


def test_layers_that_are_seen_in_part():
    class LoRA(nn.Linear):
        def __init__(self) -> None:
            super().__init__(E, E)
            self.down, self.up = nn.Parameter(torch.randn(2, E)), nn.Parameter(torch.randn(E, 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.down.mT @ self.up.mT

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.elsewhere, self.head = LoRA(), nn.Linear(E, E), nn.Linear(E, C)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.lora(x))
            return self.head(self.elsewhere(x) + F.linear(x, self.elsewhere.weight))

    report = inspect(Model(), torch.randn(N, E))
    lora, elsewhere, head = report.rows
    assert lora.seen and lora.num_parameters - lora.num_seen == 4 * E
    assert "'down', 'up'" in lora.note and f"{4 * E}" in lora.note
    assert elsewhere.seen and "used 2 times" in elsewhere.note
    assert not head.note
    assert (
        report.num_parameters - report.num_seen
        == report.num_matrix_parameters - report.num_matrix_seen
        == 4 * E
    )


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return self._conv_forward(x, weight, self.bias)


def test_a_weight_that_is_standardized_is_a_matrix_that_is_not_seen():
    report = inspect(
        nn.Sequential(StandardizedConv(2, 3, 3), nn.Flatten(), nn.Linear(12, C)),
        torch.randn(N, 2, 4, 4),
    )
    row = report.rows[0]
    assert row.reason == "It is a subclass of Conv2d that computes something else with its weight."
    assert "ignore_modules=['0']" in row.remedy
    assert (report.num_matrix_seen, report.num_matrix_parameters) == (12 * C, 12 * C + 54)


def test_refusals_of_hooks_are_rows():
    class Strange(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 3 + x

    class NoTensor(nn.Linear):
        def forward(self, x: list[Any]) -> Tensor:  # type: ignore[override]
            return super().forward(x[0][0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.head = Strange(E), NoTensor(E, E), nn.Linear(E, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner([[self.norm(x)]]))

    rows = unseen(Model(), torch.randn(N, E))
    assert set(rows) == {"norm", "inner"}
    assert "computes something else" in rows["norm"].reason
    assert "no tensor among its arguments" in rows["inner"].reason.lower()


@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
def test_checkpointed_and_compiled_models_are_inspected():
    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant: bool) -> None:
            super().__init__()
            self.inner, self.head, self.use_reentrant = (
                nn.Linear(E, E),
                nn.Linear(E, C),
                use_reentrant,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inner, x, use_reentrant=self.use_reentrant))

    x = torch.randn(N, E)
    assert "reentrant" in unseen(Checkpointed(True), x)["inner"].reason
    assert not unseen(Checkpointed(False), x)
    model = nn.Sequential(torch.jit.script(nn.Linear(E, E)), nn.Linear(E, C))
    assert "torch.jit" in unseen(model, x)["0"].reason


def test_what_rules_refuse_is_raised():
    model, x = vit(), torch.randn(N, 3, 16, 16)
    for match, rules in (
        ("unknown value", "both"),
        ("matches no supported layer", ["reduce", ("tail", "expand")]),
    ):
        with pytest.raises(ValueError, match=match):
            inspect(model, x, shared_dim=rules)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        inspect(print, x)
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised"):
        inspect(nn.Sequential(nn.LazyLinear(C)), torch.randn(N, E))

    class Ids(nn.Module):
        def forward(self, x: Tensor) -> list[Any]:
            return [x.long(), None]

    with pytest.raises(TypeError, match=r"output, list"):
        inspect(Ids(), torch.randn(N, E))


# ------------------------------------------------------------------------------- nothing is changed


class Changing(CNN):
    """Draws from all generators, writes into its input, its buffers and its modes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1 + random.random() + numpy.random.rand())
        self.count: Tensor = self.count + 1
        self.norm.momentum, self.head.training = 0.3, False
        return super().forward(x)


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failing"])
def test_inspecting_changes_nothing(failing: bool):
    model, x = Changing(), torch.randn(N, 2, 9, 7)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    handles = [
        model.conv.register_forward_hook(lambda *_: None),
        model.head.register_forward_pre_hook(lambda *_: None),
    ]
    if failing:
        handles.append(model.head.register_forward_hook(lambda *_: 1 / 0))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    modes, hooks, data = [m.training for m in model.modules()], hooks_of(model), x.clone()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    with torch.no_grad():
        if failing:
            with pytest.raises(ZeroDivisionError):
                inspect(model, x)
        else:
            assert inspect(model, x).coverage == 1.0
        assert not torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (random.getstate(), numpy.random.get_state()[1].tolist())
    assert torch.equal(x, data) and not x.requires_grad
    assert set(dict(model.named_buffers())) == set(buffers) and model.nothing is None
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])
    assert [m.training for m in model.modules()] == modes and hooks_of(model) == hooks
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "conv.weight")
    assert not any(hasattr(m, "fisher") for m in model.modules())
    for handle in handles:
        handle.remove()


def test_a_gradient_maker_goes_on_as_if_nothing_had_happened():
    x, y = torch.randn(N, 2, 9, 7), torch.randint(C, (N,))
    results = []
    for inspected in (False, True):
        torch.manual_seed(1)
        model = CNN()
        maker = asdl.KfacGradientMaker(
            model, asdl.PreconditioningConfig(damping=1e-2), shared_dim="auto"
        )
        for _ in range(2):
            for p in model.parameters():
                p.grad = None
            dummy = maker.setup_model_call(model, x)
            maker.setup_loss_call(F.cross_entropy, dummy, y)
            maker.forward_and_backward()
            if inspected:
                inspect(model, x)
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ----------------------------------------------------------------------------------------- printing


def report_to_print() -> Report:
    model = nn.Module()
    model.add_module("[bold]", nn.Linear(E, C))  # a name that looks like markup
    model.add_module("unused", nn.Linear(1000, 400))
    model.forward = model.get_submodule("[bold]").forward
    model.forward = lambda x: model.get_submodule("[bold]")(x)
    return inspect(model, torch.randn(N, R, E))


def test_str_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch):
    """There rich shows what it prints by itself, whatever file it is given."""
    report = asdl_ws_plugin.inspect(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    expected = str(report)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(report) == expected and "Linear" in expected


def test_prints_with_rich_and_without(monkeypatch: pytest.MonkeyPatch):
    report = report_to_print()
    console = Console(record=True, width=150)
    console.print(report)
    monkeypatch.setenv("COLUMNS", "150")
    printed = str(report)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
    plain = str(report)
    for text in (console.export_text(), printed, plain):
        for part in (
            "[bold]",
            "3x5x8",
            "A 8x8  B 4x4",
            "expand",
            "640 B",
            "It was not called.",
            "400,400",
            "Coverage: 0.0%",
            "3 examples, the expand setting",
            "320 B of curvature",
            "batch_first",
        ):
            assert part in text, (part, text)
    assert plain != printed
    lines = plain.splitlines()
    assert lines[0] == "Seen by K-FAC"
    header, rule, row = lines[1:4]
    assert set(rule) == {"-", " "} and len(rule) == max(map(len, (header, row)))
    for column in ("Type", "Input", "Layout", "Curvature", "Factors"):  # aligned to the left
        at = header.index(column)
        assert row[at - 1] == " " and row[at] != " "
    for column in ("R", "Calls", "Memory", "Parameters"):  # numbers to the right
        end = header.index(f" {column}") + len(column) + 1
        assert row[end - 1] != " " and row[end : end + 1] in ("", " ")


def test_the_report_as_json_has_what_it_has():
    report = report_to_print()
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["coverage"] == report.coverage and data["matrix_coverage"] == report.matrix_coverage
    row = data["rows"][0]
    assert (row["name"], row["seen"], row["input_sizes"], row["R"]) == (
        "[bold]",
        True,
        [N, R, E],
        R,
    )
    assert row["factor_sizes"] == {"A": [E, E], "B": [C, C]}
    assert data["rows"][1]["reason"] and not data["rows"][1]["seen"]
