"""Padded sequences: the factors are those of the sentences without their padding, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import CE, MSE, assert_equal, assert_factors
from oracles.graphs import exact_ragged_block, ragged_factors
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import attach_padding, padding

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
LENGTHS = [5, 2, 3]
C, DIM = 3, 4


def real_tokens(lengths: list[int], longest: int | None = None) -> Tensor:
    """``(N, R)``, True for real tokens."""
    return torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]


class Encoder(nn.Module):
    """A Transformer encoder that ignores padding, with a mean over the tokens or logits for each of
    them.
    """

    def __init__(self, batch_first: bool = True, pool: bool = True) -> None:
        super().__init__()
        self.batch_first, self.pool = batch_first, pool
        self.embed = nn.Linear(2, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 2, 6, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, C)
        asdl_ws_plugin.convert(self)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """x: ``(N, R, 2)``."""
        y = self.embed(x if self.batch_first else x.transpose(0, 1))
        y = self.encoder(
            y, src_key_padding_mask=None if attention_mask is None else ~attention_mask.bool()
        )
        if not self.pool:
            y = self.head(y)
            return y if self.batch_first else y.transpose(0, 1)
        y = y if self.batch_first else y.transpose(0, 1)
        if attention_mask is None:
            return self.head(y.mean(1))
        kept = attention_mask.unsqueeze(-1)
        return self.head((y * kept).sum(1) / kept.sum(1))


def sentences(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Tokens with rubbish where there is padding, and the mask of real ones."""
    mask = real_tokens(lengths)
    x = torch.randn(len(lengths), max(lengths), 2)
    return x.masked_fill(~mask.unsqueeze(-1), 7.0), mask


def make_maker(model: nn.Module, shared_dim: Any, shapes: Any = "kron", **config: Any) -> Any:
    options = {
        "fisher_type": "fisher_exact",
        "loss_type": CE,
        "data_size": 1,
        "ignore_modules": [nn.LayerNorm],
    }
    options |= config
    return get_fisher_maker(
        model, FisherConfig(fisher_shapes=shapes, shared_dim=shared_dim, **options)
    )


def check(
    model: nn.Module, example: Any, num_examples: int, shared_dim: str, skip: tuple[str, ...] = ()
) -> None:
    checked = 0
    for name, module in model.named_modules():
        fisher: Any = getattr(module, "fisher", None)
        if fisher is None or getattr(fisher, "kron", None) is None or name in skip:
            continue
        expected = ragged_factors(module, example, num_examples, shared_dim, CE)
        assert_equal(fisher.kron.A, expected.A)
        # The keys' gradients add up to zero over the tokens: a softmax does not see what all keys
        # have in common.
        scale = max(1e-3, expected.B.norm().item())
        assert (fisher.kron.B - expected.B).norm() < 1e-9 * scale, name
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    "said_by", ["padding", "attention_mask", "integers", "src_key_padding_mask", "function"]
)
@pytest.mark.parametrize("batch_first", [True, False])
@STRATEGIES
def test_one_loss_term_for_every_sentence(shared_dim: str, batch_first: bool, said_by: str):
    model = Encoder(batch_first)
    x, mask = sentences()
    if said_by == "padding":
        maker = make_maker(model, shared_dim)
        maker.setup_model_call(model, x, mask)
        with padding(model, mask):
            maker.forward_and_backward()
    else:
        beside = (
            ["embed"] if said_by == "src_key_padding_mask" else []
        )  # not within the encoder that is told
        maker = make_maker(model, shared_dim, ignore_modules=[nn.LayerNorm, *beside])
        maker.setup_model_call(
            model, x, attention_mask=mask.long() if said_by == "integers" else mask
        )
        if said_by == "function":
            attach_padding(model, lambda x, attention_mask: attention_mask)
        elif said_by == "src_key_padding_mask":
            attach_padding(model.encoder, "src_key_padding_mask")
        else:
            attach_padding(model, "attention_mask")
        maker.forward_and_backward()
    check(model, lambda n: model(x[n : n + 1, : LENGTHS[n]]), 3, shared_dim)


@pytest.mark.parametrize("batch_first", [True, False])
@STRATEGIES
def test_a_loss_term_for_every_token(shared_dim: str, batch_first: bool):
    """The padding's labels are ignored; attention is between the real tokens."""
    model = Encoder(batch_first, pool=False)
    x, mask = sentences()
    target = torch.randint(C, mask.shape).masked_fill(~mask, -100)
    maker = make_maker(model, shared_dim)
    logits = maker.setup_model_call(model, x, mask)
    maker.setup_loss_call(F.cross_entropy, logits.flatten(0, 1), target.flatten())
    with padding(model, mask):
        maker.forward_and_backward()
    check(model, lambda n: model(x[n : n + 1, : LENGTHS[n]]), 3, shared_dim)


@STRATEGIES
def test_without_the_mask_the_factors_are_others(shared_dim: str):
    model = Encoder()
    x, mask = sentences()
    maker = make_maker(model, shared_dim)
    maker.setup_model_call(model, x, mask)
    with pytest.warns(UserWarning, match="an argument of the model leaves them out"):
        maker.forward_and_backward()
    with pytest.raises(AssertionError):
        check(model, lambda n: model(x[n : n + 1, : LENGTHS[n]]), 3, shared_dim)


@STRATEGIES
def test_a_source_and_a_target_of_different_lengths(shared_dim: str):
    """Cross-attention projects keys and values from the source, and queries from the target."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Transformer(DIM, 2, 1, 1, 6, dropout=0.0, batch_first=True)
            self.body.encoder.enable_nested_tensor = False
            self.head = nn.Linear(DIM, C)
            asdl_ws_plugin.convert(self)

        def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
            y = self.body(
                src,
                tgt,
                src_key_padding_mask=~src_mask,
                tgt_key_padding_mask=~tgt_mask,
                memory_key_padding_mask=~src_mask,
            )
            return self.head(y)

    model, src_lengths, tgt_lengths = Translator(), [4, 6, 3], [5, 2, 3]
    src_mask, tgt_mask = real_tokens(src_lengths), real_tokens(tgt_lengths)
    src = torch.randn(3, 6, DIM).masked_fill(~src_mask.unsqueeze(-1), 5.0)
    tgt = torch.randn(3, 5, DIM).masked_fill(~tgt_mask.unsqueeze(-1), 5.0)
    target = torch.randint(C, (3, 5)).masked_fill(~tgt_mask, -100)
    maker = make_maker(model, shared_dim)
    logits = maker.setup_model_call(model, src, tgt, src_mask, tgt_mask)
    maker.setup_loss_call(F.cross_entropy, logits.flatten(0, 1), target.flatten())
    with padding(model, {"src": src_mask, "tgt": tgt_mask}):
        maker.forward_and_backward()

    def example(n: int) -> Tensor:
        s, t = src_lengths[n], tgt_lengths[n]
        return model(
            src[n : n + 1, :s], tgt[n : n + 1, :t], src_mask[n : n + 1, :s], tgt_mask[n : n + 1, :t]
        )

    check(model, example, 3, shared_dim)


@STRATEGIES
def test_a_layer_norms_block_is_made_of_the_sentences_gradients(shared_dim: str):
    model = Encoder()
    x, mask = sentences()
    maker = make_maker(model, shared_dim, ["kron", (nn.LayerNorm, "unit_wise")], ignore_modules=[])
    maker.setup_model_call(model, x, mask)
    with padding(model, mask):
        maker.forward_and_backward()
    for name in ("encoder.layers.0.norm1", "encoder.layers.1.norm2"):
        block = exact_ragged_block(
            model, f"{name}.weight", lambda n: model(x[n : n + 1, : LENGTHS[n]]), 3, CE
        )
        assert_equal(model.get_submodule(name).fisher.unit.data[:, 0, 0], block.diagonal())


class Windows(nn.Module):
    """``(N, R, K, 2)``: K positions of each token; the second layer sees tokens, or everything,
    merged in the batch.
    """

    def __init__(self, merged: int) -> None:
        super().__init__()
        self.first, self.second, self.merged = nn.Linear(2, 4), nn.Linear(4, C), merged

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        y = self.second(y.flatten(0, self.merged)).view(*y.shape[:3], C).sum(2)
        return (y * mask.unsqueeze(-1)).sum(1)


def assert_factors_of_real_tokens(
    model: nn.Module,
    modules: Sequence[nn.Module],
    x: Tensor,
    mask: Tensor,
    lengths: Sequence[int],
    shared_dim: str,
) -> None:
    """The factors of a padded batch of three are those of its sentences, each cut to its length."""
    maker = make_maker(model, shared_dim, ignore_modules=[])
    maker.setup_model_call(model, x, mask)
    with padding(model, mask):
        maker.forward_and_backward()
    for module in modules:
        expected = ragged_factors(
            module,
            lambda n: model(x[n : n + 1, : lengths[n]], mask[n : n + 1, : lengths[n]]),
            3,
            shared_dim,
            CE,
        )
        assert_factors(module, expected)


@pytest.mark.parametrize("merged", [0, 1])
@STRATEGIES
def test_further_positions_of_each_token(shared_dim: str, merged: int):
    model, mask = Windows(merged), real_tokens(LENGTHS)
    x = torch.randn(3, 5, 2, 2).masked_fill(~mask[..., None, None], 3.0)
    assert_factors_of_real_tokens(model, (model.first, model.second), x, mask, LENGTHS, shared_dim)


def test_positions_that_are_merged_beyond_recognition_are_refused():
    model, mask = Windows(merged=2), real_tokens(LENGTHS)
    maker = make_maker(model, "reduce", ignore_modules=[])
    maker.setup_model_call(model, torch.randn(3, 5, 2, 2), mask)
    message = r"Layer 'second'.*10 positions.*sizes \(3, 5\).*\(N, 5, \.\.\.\)"
    with pytest.raises(ValueError, match=message), padding(model, mask):
        maker.forward_and_backward()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.where(mask.unsqueeze(-1), torch.tanh(self.layer(x)), 0)
        return self.head(y.sum(1))


@STRATEGIES
def test_padding_may_be_anything_and_a_sentence_may_be_empty(shared_dim: str):
    """NaN in the padding, and a sentence without tokens (R_n = 0)."""
    model, lengths = Pooled(), [4, 0, 2]
    mask = real_tokens(lengths)
    x = torch.randn(3, 4, 2).masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert_factors_of_real_tokens(model, (model.layer, model.head), x, mask, lengths, shared_dim)


@STRATEGIES
def test_a_mask_of_real_tokens_only_is_the_dense_path(shared_dim: str):
    model, x, mask = Pooled(), torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    maker = make_maker(model, shared_dim, ignore_modules=[], loss_type=MSE)
    maker.setup_model_call(model, x, mask)
    maker.forward_and_backward()
    dense = [(m.fisher.kron.A, m.fisher.kron.B) for m in (model.layer, model.head)]
    with padding(model, mask):
        maker.forward_and_backward()
    for module, (A, B) in zip((model.layer, model.head), dense, strict=True):
        assert_factors(module, (A, B), rtol=1e-14)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 4), TypeError, "booleans.*float"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"\(N, R\), got \(3,\)"),
        ([[True]], TypeError, "booleans.*list"),
        (
            {"a": torch.ones(3, 4, dtype=torch.bool), "b": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"\[2, 3\]",
        ),
    ],
)
def test_masks_that_make_no_sense_are_refused(mask: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message), padding(Pooled(), mask):
        pass


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@STRATEGIES
def test_a_mask_that_is_the_other_way_round_is_refused(
    shared_dim: str, batch_first: bool, pool: bool
):
    """By what the loss depends on; the same step with the mask turned trains on."""
    model = Encoder(batch_first, pool)
    x, mask = sentences()
    maker = make_maker(model, shared_dim)
    if pool:
        maker.setup_model_call(model, x, mask)
    else:
        labels = torch.randint(0, C, mask.shape).masked_fill(~mask, -100)
        logits = maker.setup_model_call(model, x, mask)
        maker.setup_loss_call(
            lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), logits, labels
        )
    message = r"'embed'.*none of the positions.*other way round"
    with pytest.raises(ValueError, match=message), padding(model, ~mask):
        maker.forward_and_backward()
    with padding(model, mask):
        maker.forward_and_backward()
    assert model.embed.fisher.kron.A is not None


def test_two_masks_of_one_name_are_refused_and_the_remedy_works():
    model, (x, mask) = Encoder(), sentences()
    maker = make_maker(model, "reduce")
    maker.setup_model_call(model, x, mask)
    first = attach_padding(model, lambda x, attention_mask: torch.ones_like(attention_mask))
    attach_padding(model, "attention_mask")
    message = r"Mask\(15 of 3 x 5 positions\)} and .*Mask\(10 of 3 x 5 positions\)}.*remove\(\)"
    with pytest.raises(ValueError, match=message):
        maker.forward_and_backward()
    first.remove()
    maker.forward_and_backward()
    check(model, lambda n: model(x[n : n + 1, : LENGTHS[n]]), 3, "reduce")


def test_an_additive_mask_has_a_way_to_be_turned():
    scores = torch.zeros(3, 1, 1, 4).masked_fill(~real_tokens([4, 1, 3])[:, None, None], -1e9)
    with pytest.raises(TypeError, match=r"mask == 0"), padding(Pooled(), scores):
        pass
    wide = real_tokens([4, 1, 3])[:, None, None]
    with pytest.raises(ValueError, match=r"mask\[:, 0, 0\]"), padding(Pooled(), wide):
        pass


def test_masks_that_do_not_fit_and_the_next_one_that_does():
    model, x = Pooled(), torch.randn(3, 4, 2)
    good = real_tokens([4, 1, 3])
    maker = make_maker(model, "reduce", ignore_modules=[])
    maker.setup_model_call(model, x, good)
    with (
        pytest.raises(
            ValueError,
            match=r"no layer has .* length 5 of the mask|no mask of that length \(there are 5",
        ),
        padding(model, torch.ones(3, 5, dtype=torch.bool)),
    ):
        maker.forward_and_backward()
    with (
        pytest.raises(ValueError, match="Layer 'layer'"),
        padding(model, torch.ones(5, 4, dtype=torch.bool)),
    ):
        maker.forward_and_backward()
    with (
        pytest.raises(ValueError, match=r"Layer 'layer'.*'a', 'b'.*length 4.*role"),
        padding(model, {"a": good, "b": ~good}),
    ):
        maker.forward_and_backward()
    assert not hasattr(model.layer, "fisher")
    model.layer.role = "a"  # type: ignore[assignment]
    with padding(model, {"a": good, "b": good.flip(0)}):
        model.head.role = "a"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="mask 'b'"):
            maker.forward_and_backward()
    with padding(model, good):
        maker.forward_and_backward()
    expected = ragged_factors(
        model.layer,
        lambda n: model(x[n : n + 1, good[n]], good[n : n + 1, good[n]]),
        3,
        "reduce",
        CE,
    )
    assert_equal(model.layer.fisher.kron.A, expected.A)


def test_what_is_neither_a_name_nor_a_function_is_refused_and_the_remedy_works():
    class Pair(nn.Module):
        """The mean of the real tokens of a source, and of those of a longer target."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, DIM), nn.Linear(2, DIM), nn.Linear(DIM, C)

        def forward(self, x: Tensor, u: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
            parts = (self.a(x), source_mask), (self.b(u), target_mask)
            means = [(h * m[..., None]).sum(1) / m.sum(1, keepdim=True) for h, m in parts]
            return self.head(torch.tanh(means[0] * means[1]))

    model = Pair()
    masks = real_tokens(LENGTHS), real_tokens([2, 7, 4])
    for source in (["source_mask", "target_mask"], None):
        with pytest.raises(
            TypeError, match=r"attach_padding.*a function that returns a dictionary"
        ):
            attach_padding(model, source)  # type: ignore[arg-type]
    attach_padding(
        model,
        lambda *_, source_mask, target_mask: {"source": source_mask, "target": target_mask},
    )
    x, u, y = torch.randn(3, 5, 2), torch.randn(3, 7, 2), torch.randint(C, (3,))
    config = FisherConfig("fisher_emp", ["kron"], shared_dim="expand")
    maker = get_fisher_maker(model, config)
    output = maker.setup_model_call(model, x, u, source_mask=masks[0], target_mask=masks[1])
    maker.setup_loss_call(F.cross_entropy, output, y)
    maker.forward_and_backward()
    for layer, inputs, mask in ((model.a, x, masks[0]), (model.b, u, masks[1])):
        rows = inputs[mask]
        assert_equal(layer.fisher.kron.A, rows.mT @ rows / len(rows))


def test_segments_from_what_is_neither_a_name_nor_a_function_are_refused():
    with pytest.raises(ValueError, match=r"attach_segments: source has to be a function or one of"):
        asdl_ws_plugin.attach_segments(nn.Linear(2, 2), ["batch"])  # type: ignore[arg-type]
