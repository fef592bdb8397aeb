"""Whether a state dict is one that a gradient maker can go on from: looked at whole, before
anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from asdl.matrices import (
    SHAPE_DIAG,
    SHAPE_FULL,
    SHAPE_KFE,
    SHAPE_KRON,
    SHAPE_LAYER_WISE,
    SHAPE_SWIFT_KRON,
    SHAPE_UNIT_WISE,
)
from torch import Tensor, nn

from .blocks import parameters_of
from .capped import factor_sizes
from .capture import Layer
from .errors import LayerError
from .state_dict import VERSION, check_sizes

__all__ = ["check_state"]

_KEYS = {"step", "version", "curvature", "weight_sharing"}
# What a layer's curvature of a shape consists of; a factor may be there as its inverse alone.
_PARTS = {
    SHAPE_KRON: ("kron.A", "kron.B"),
    SHAPE_SWIFT_KRON: ("kron.A", "kron.B"),
    SHAPE_KFE: ("kfe.Ua", "kfe.Ub", "kfe.scale"),
    SHAPE_LAYER_WISE: ("data",),
    SHAPE_FULL: ("data",),
    SHAPE_UNIT_WISE: ("unit.data",),
    SHAPE_DIAG: (),  # of the weight, the bias, or both
}
_INVERSES = {"data": "inv", "unit.data": "unit.inv"}
# A layer's block per unit is its diagonal while it has one trainable parameter.
_SAME = {SHAPE_UNIT_WISE: (SHAPE_UNIT_WISE, SHAPE_DIAG), SHAPE_DIAG: (SHAPE_DIAG, SHAPE_UNIT_WISE)}


def check_state(maker: Any, state: Any) -> None:
    """Raise a ValueError, which names the difference, unless the maker can load the state."""
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("This is no state of a gradient maker: it has no 'step'.")
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"The state's step has to be a number of steps, got {step!r}.")
    if set(state) == {"step"}:  # all that ASDL 0.1a5 keeps
        return
    has_training = {"training"} if maker.training is not None else set()
    _check_keys("The state", state, _KEYS | has_training)
    if state["version"] != VERSION:
        raise ValueError(
            f"The state is of version {state['version']!r}, this gradient maker's of version "
            f"{VERSION}. Load it with the version of the package that wrote it."
        )
    _check_options(maker, state["weight_sharing"])
    _check_curvature(maker, state["curvature"], state["weight_sharing"])
    if has_training:
        _check_second_moments(maker, state["training"])


def _check_keys(what: str, state: dict[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - set(state)):
        raise ValueError(f"{what} lacks {_listed(missing)}.")
    if more := sorted(set(state) - wanted):
        raise ValueError(f"{what} has {_listed(more)}, which a gradient maker's does not have.")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:8]) + (", ..." if len(names) > 8 else "")


def _check_options(maker: Any, state: dict[str, Any]) -> None:
    """What the curvature is of: the Fisher type, an average or not, the layers and strategies."""
    wanted = "setting strategies layouts roles unseen draws fisher_type moving_average"
    _check_keys(
        "The state's 'weight_sharing'", state, {*wanted.split(), "without_curvature", "graph"}
    )
    plan, own_type = maker.plan, maker.fisher_maker.config.fisher_type
    if state["fisher_type"] != own_type:
        raise ValueError(
            f"The state's curvature is of fisher_type='{state['fisher_type']}', not of "
            f"'{own_type}'."
        )
    if state["moving_average"] != maker.do_accumulate:
        with_or_not = "with" if state["moving_average"] else "without"
        raise ValueError(
            f"The state is of training {with_or_not} a moving average (ema_decay), this gradient "
            f"maker is {'with' if maker.do_accumulate else 'without'} one."
        )
    strategies = state["strategies"]
    own = {layer.name: plan.strategy_of(layer) for layer in plan.all_layers}
    if unknown := sorted(set(strategies) - set(own)):
        raise ValueError(
            f"The state is of another model: it has the layers {_listed(unknown)}, which this "
            "model lacks or leaves out."
        )
    if missing := sorted(set(own) - set(strategies)):
        raise ValueError(f"The state is of another model: it lacks the layers {_listed(missing)}.")
    for name, strategy in own.items():
        found = strategies[name]
        if None not in (found, strategy) and found != strategy:
            reason = f"the state has its curvature under '{found}', not under '{strategy}'"
            raise LayerError(name, reason)
    modules = dict(maker.model.named_modules())
    named = [*state["layouts"], *(name for name, _, _ in state["roles"]), *state["unseen"]]
    if unknown := sorted({name for name in named if name not in modules}):
        raise ValueError(f"The state is of another model, with the modules {_listed(unknown)}.")


def _check_curvature(
    maker: Any, curvature: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    layers = {layer.name: layer for layer in maker.plan.all_layers}
    full = any(layer.shape == SHAPE_FULL for layer in layers.values())
    modules = dict(maker.model.named_modules())
    for name, entry in curvature.items():
        if name not in modules or (name not in layers and not (full and name == "")):
            raise ValueError(
                f"The state has curvature of a module '{name}', which the model lacks or which is "
                "no layer of it."
            )
        _check_tensors(name, entry)
        check_sizes(name, modules[name], entry)
        _check_parts(maker, name, layers.get(name), entry)
        _check_blocks(maker, name, layers.get(name), entry)
    known = {*curvature, *options["without_curvature"]}
    if missing := sorted(set(layers) - known):
        raise ValueError(f"The state has lost the curvature of {_listed(missing)}.")
    if full and options["draws"] and "" not in curvature:
        raise ValueError("The state has lost the curvature of the whole model.")


def _tensors(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if key != "trained":
            yield from ((key, v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _check_tensors(name: str, entry: dict[str, Any]) -> None:
    where = f"'{name}'" if name else "the whole model"
    for key, value in _tensors(entry):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The state's {key} of {where} is no tensor, but {type(value).__name__}."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"The state's {key} of {where} is not finite.")


def _check_parts(maker: Any, name: str, layer: Layer | None, entry: dict[str, Any]) -> None:
    """Whether a curvature is of the layer's shape, complete, and of the sizes of its parameters."""
    where = f"Layer '{name}'" if name else "The model"
    shapes = _SAME.get(layer.shape, (layer.shape,)) if layer is not None else (SHAPE_FULL,)
    families = {"kron": "kron", "swift_kron": "kron", "kfe": "kfe", "unit_wise": "unit"}
    allowed = {families.get(shape, "diag" if shape == SHAPE_DIAG else "data") for shape in shapes}
    found = {_family(key) for key in entry if key != "trained"}
    if not found or not found <= allowed:
        raise ValueError(
            f"{where}: the state has the curvature {_listed(sorted(entry))}, which is not of the "
            f"shape '{shapes[0]}'."
        )
    parts = () if found == {"diag"} else _PARTS[shapes[0] if found != {"unit"} else SHAPE_UNIT_WISE]
    for part in parts:
        is_there = part in entry
        inverse = _INVERSES.get(part, f"{part}_inv")
        if not is_there and (maker.do_accumulate or inverse not in entry):
            raise ValueError(f"{where}: the state lacks {part} of its curvature.")
    wanted = _sizes(maker, layer, entry)
    for key, value in _tensors(entry):
        if key in wanted and tuple(value.shape) != wanted[key]:
            raise ValueError(
                f"{where}: the state has {key} of sizes {tuple(value.shape)}, but the parameters "
                f"need {wanted[key]}."
            )


def _check_blocks(maker: Any, name: str, layer: Layer | None, entry: dict[str, Any]) -> None:
    """Whether wide factors are divided as this maker divides them."""
    if layer is None or not (layer.shape == SHAPE_KRON and maker.plan.operation_of(layer).splits):
        return
    max_side = None if maker.training is None else maker.training.max_side
    for part, wanted in factor_sizes(layer.module, max_side).items():
        for key in (part, f"{part}_inv"):
            found = tuple(entry[key].shape) if key in entry else wanted
            if found != wanted:
                raise LayerError(
                    name,
                    f"the state has {key} as {_blocks(found)}, but with max_side={max_side} it is "
                    f"{_blocks(wanted)}. The state was saved with another max_side, or by a "
                    "version of the package that has other blocks",
                    "Give the max_side that it was saved with, or do not load this state: without "
                    "it, the curvature is estimated anew from the next step on.",
                )


def _blocks(sizes: tuple[int, ...]) -> str:
    if len(sizes) == 2:
        return f"one matrix of {sizes[0]} rows"
    return (
        f"{sizes[0]} blocks of {sizes[1]} rows" if sizes[1] > 1 else f"{sizes[0]} diagonal entries"
    )


def _check_second_moments(maker: Any, training: dict[str, Any]) -> None:
    """Whether the second moments, or there being none, are of this maker and of its layers."""
    is_wanted, found = maker.training.second_moment is not None, training.get("second_moments")
    if is_wanted != (found is not None):
        with_or_not = "without" if is_wanted else "with"
        raise ValueError(
            f"The state is of training {with_or_not} second_moment, this gradient maker's is not."
        )
    layers = {layer.name: layer for layer in maker.plan.layers}
    for name, entry in (found or {}).items():
        if name not in layers:
            raise ValueError(f"The state has second moments of '{name}', which is no layer here.")
        weight: Any = layers[name].module.weight
        rows, columns = weight.shape[0], weight[0].numel()
        factors = dict(zip(("kron.A", "kron.B"), entry["bases"], strict=False))
        check_sizes(name, layers[name].module, factors)
        for parameter, (average, _) in entry["moments"].items():
            is_weight = parameter == f"{name}.weight"
            wanted = (rows, columns if is_weight else 1)
            if tuple(average.shape) != wanted or not bool(torch.isfinite(average).all()):
                raise ValueError(
                    f"The state's second moments of '{parameter}' have to be finite and of sizes "
                    f"{wanted}."
                )


def _family(key: str) -> str:
    return key.partition(".")[0] if "." in key else "data"


def _sizes(maker: Any, layer: Layer | None, entry: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The sizes that the parts of a curvature have to be of, besides Kronecker factors'."""
    if layer is None:
        parameters = [
            p
            for other in maker.plan.layers
            if other.shape == SHAPE_FULL
            for p in parameters_of(other.module)
            if p.requires_grad
        ]
        size = sum(p.numel() for p in parameters)
        return {"data": (size, size), "inv": (size, size)}
    module: nn.Module = layer.module
    trained = entry.get("trained", [name for name, _ in module.named_parameters()])
    of = {
        name: p
        for name in ("weight", "bias")
        if name in trained and isinstance(p := getattr(module, name, None), Tensor)
    }
    if not of:
        return {}
    size = sum(p.numel() for p in of.values())
    units = next(iter(of.values())).shape[0]
    block = (units, size // units, size // units)
    sizes: dict[str, tuple[int, ...]] = {"data": (size, size), "inv": (size, size)}
    sizes |= {"unit.data": block, "unit.inv": block}
    for name, p in of.items():
        sizes |= {f"diag.{name}": tuple(p.shape), f"diag.{name}_inv": tuple(p.shape)}
    return sizes
