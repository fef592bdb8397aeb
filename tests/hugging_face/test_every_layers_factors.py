"""Hugging Face's models as they are: the factors of every layer are those of single examples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from configurations import CONFIGURATIONS, Configuration, InDouble, N
from oracles.by_example import fisher
from oracles.every_layer import every_layers_factors, worst_layer
from torch import Tensor, nn

from asdl_ws_plugin import attach_padding, convert

pytestmark = pytest.mark.usefixtures("double")

NORMALIZATIONS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def left_out(model: nn.Module) -> list[nn.Module]:
    """What has no Kronecker factors: normalizations, and convolutions in groups."""
    return [
        module
        for module in model.modules()
        if isinstance(module, NORMALIZATIONS)
        or (isinstance(module, nn.Conv2d) and module.groups > 1)
    ]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def computed(case: Configuration, model: nn.Module, shared_dim: str) -> Any:
    """The curvature of one batch; the logits are those that the loss is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fisher(
            model,
            shared_dim,
            mean_loss,
            case.labels(),
            ignore=left_out(model),
            data_size=N,
            **case.inputs(),
            call=lambda **inputs: case.logits(model, **inputs),
        )


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_layers_factors_are_those_of_single_examples(name: str):
    case = CONFIGURATIONS[name]
    model = convert(case.make())
    inputs, labels = case.inputs(), case.labels()

    def summed_loss(n: int) -> Tensor:
        logits = case.logits(model, **{key: value[n : n + 1] for key, value in inputs.items()})
        return F.cross_entropy(logits.flatten(0, -2), labels[n].flatten(), reduction="sum")

    for strategy in ("expand", "reduce"):
        maker = computed(case, model, strategy)
        layers = {layer.name: layer for layer in maker.plan.layers}
        expected = every_layers_factors(  # an expert's rows are ragged
            {layer.name: layer.modules for layer in layers.values()}, summed_loss, N, ragged=True
        )
        seen = {
            name: layer.module for name, layer in layers.items() if layer.module not in maker.unseen
        }
        assert seen.keys() == expected.keys()
        missing = linear_layers_without_curvature(model, maker)
        assert not missing, f"no factors for {missing}"
        error, where = worst_layer(seen, expected, strategy)
        assert error < 1e-9, f"{strategy}: {where} is off by {error:.2e}"


def linear_layers_without_curvature(model: nn.Module, maker: Any) -> list[str]:
    """Trainable linear layers and convolutions that nobody explains the absence of."""
    explained = {*maker.plan.skipped, *maker.plan.unsupported}
    known = {module for layer in maker.plan.layers for module in layer.modules}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and module not in known
        and name not in explained
        and module not in left_out(model)
    ]


# ------------------------------------------------------------------------------------------ padding

LENGTHS = (7, 3, 5)
PADDED = ("bert", "distilbert", "gpt2", "opt", "llama", "bart with a classifier", "esm")


@pytest.mark.parametrize("name", PADDED)
def test_padding_by_the_attention_mask_enters_no_factor(name: str):
    case = CONFIGURATIONS[name]
    model = convert(case.make())
    ids, labels = case.inputs()["input_ids"], case.labels()
    for n, length in enumerate(LENGTHS):
        ids[n, length - 1] = case.options.get("eos_token_id", 1)
        ids[n, length:] = 0
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    if case.per_token:
        labels = labels.masked_fill(~mask, -100)

    def summed_loss(n: int) -> Tensor:
        length = LENGTHS[n]
        logits = case.logits(model, input_ids=ids[n : n + 1, :length])
        target = labels[n, :length] if case.per_token else labels[n : n + 1]
        return F.cross_entropy(logits.flatten(0, -2), target, reduction="sum")

    attach_padding(model, "attention_mask")
    for strategy in ("expand", "reduce"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = FisherConfig(
                "fisher_emp",
                ["kron"],
                shared_dim=strategy,
                data_size=N,
                ignore_modules=left_out(model),
            )
            maker = get_fisher_maker(model, config)
            output = maker.setup_model_call(model, input_ids=ids, attention_mask=mask.long())
            maker.setup_logits_repr(output.logits)
            maker.setup_loss_call(mean_loss, output.logits, labels)
            with InDouble():
                maker.forward_and_backward()
        layers = {layer.name: layer for layer in maker.plan.layers}
        expected = every_layers_factors(
            {layer.name: layer.modules for layer in layers.values()}, summed_loss, N, ragged=True
        )
        seen = {
            name: layer.module for name, layer in layers.items() if layer.module not in maker.unseen
        }
        error, where = worst_layer(seen, expected, strategy)
        assert error < 1e-9, f"{strategy}: {where} is off by {error:.2e}"


# ----------------------------------------------------------------------------------- which logits


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_logits_that_the_loss_is_given_are_the_logits(name: str):
    """Without ``setup_logits_repr``."""
    case = CONFIGURATIONS[name]
    found = []
    for says_so in (True, False):
        model = convert(case.make())
        config = FisherConfig(
            "fisher_exact",
            ["kron"],
            loss_type="cross_entropy",
            shared_dim="reduce",
            data_size=N,
            ignore_modules=left_out(model),
        )
        maker = get_fisher_maker(model, config)
        output = maker.setup_model_call(model, **case.inputs())
        if says_so:
            maker.setup_logits_repr(output.logits)
        maker.setup_loss_call(mean_loss, output.logits, case.labels())
        maker.forward_and_backward()
        found.append([layer.module.fisher.kron.B for layer in maker.plan.layers])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)
