"""Curvature in a ``state_dict``: what a gradient maker has to remember besides the step.

The state is made of dicts, strings and tensors, so that ``torch.save`` takes it and
``torch.load(weights_only=True)`` gives it back. Tensors are those in use, not copies, as in
``torch.optim``; loading copies them.
"""

from __future__ import annotations

from typing import Any

from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

from .layout import MaskOf
from .matrices import corrected, pairs, share_inverses

__all__ = [
    "VERSION",
    "check_sizes",
    "complete_inverses",
    "curvature_state",
    "load_curvature_state",
    "load_plan_state",
    "load_training_state",
    "loaded_matrices",
    "plan_state",
    "rank_state",
    "replace_matrices",
    "state_of_maker",
    "training_state",
]

# Of a state with curvature; the first had none.
VERSION = 2

# key in the state -> where it is in a SymMatrix, and how its constructor calls it
_TENSORS = {
    "data": "data",
    "inv": "inv",
    "kron.A": "kron_A",
    "kron.B": "kron_B",
    "kron.A_inv": "kron_A_inv",
    "kron.B_inv": "kron_B_inv",
    "unit.data": "unit_data",
    "unit.inv": "unit_inv",
    "diag.weight": "diag_weight",
    "diag.bias": "diag_bias",
    "diag.weight_inv": "diag_weight_inv",
    "diag.bias_inv": "diag_bias_inv",
    "kfe.Ua": "kfe_A",
    "kfe.Ub": "kfe_B",
    "kfe.scale": "kfe_scale",
}


def curvature_state(model: nn.Module, attr: str) -> dict[str, dict[str, Any]]:
    """Module name -> the tensors of its curvature, factors and inverses, for every module that has
    one.
    """
    return _matrices_state(
        {
            name: matrix
            for name, module in model.named_modules()
            if (matrix := getattr(module, attr, None)) is not None
        }
    )


def _matrices_state(matrices: dict[str, SymMatrix]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for name, matrix in matrices.items():
        entries = {key: _get(matrix, key) for key in _TENSORS}
        state[name] = {key: value for key, value in entries.items() if value is not None}
        if hasattr(matrix, "trained"):  # the parameters that the curvature is of
            state[name]["trained"] = list(matrix.trained)
    return state


def _get(matrix: SymMatrix, key: str) -> Any:
    value: Any = matrix
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def load_curvature_state(model: nn.Module, attr: str, state: dict[str, dict[str, Any]]) -> None:
    """Give the modules the curvature of a state, in the place of what they have.

    Raises a ValueError, before anything is changed, if the model lacks a module or has another
    shape there.
    """
    replace_matrices(model, attr, loaded_matrices(model, state))


def loaded_matrices(
    model: nn.Module, state: dict[str, dict[str, Any]]
) -> list[tuple[nn.Module, SymMatrix]]:
    """Modules and the curvature of a state, copied. Raises a ValueError if the model lacks a module
    or has another shape there.
    """
    modules = dict(model.named_modules())
    loaded: dict[int, Tensor] = {}  # tensors that several modules share stay shared

    def load(value: Any, like: Tensor) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(load(item, like) for item in value)
        if id(value) not in loaded:
            loaded[id(value)] = value.detach().to(like.device, copy=True)
        return loaded[id(value)]

    matrices = []
    for name, entry in state.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(
                f"The state has curvature of a module '{name}', which the model lacks."
            )
        check_sizes(name, module, entry)
        like = next(
            p for p in (getattr(module, "weight", None), *module.parameters()) if p is not None
        )
        values = {
            _TENSORS[key]: load(value, like) for key, value in entry.items() if key in _TENSORS
        }
        matrix = corrected(SymMatrix(**values))
        if "trained" in entry:
            matrix.trained = tuple(entry["trained"])
        matrices.append((module, matrix))
    return matrices


def replace_matrices(
    model: nn.Module, attr: str, matrices: list[tuple[nn.Module, SymMatrix]]
) -> None:
    """Let modules have this curvature, and no others any."""
    for module in model.modules():
        if hasattr(module, attr):
            delattr(module, attr)
    for module, matrix in matrices:
        setattr(module, attr, matrix)


def rank_state(maker: Any) -> list[int]:
    """Whose state it is. With several ranks and ``shared_dim=None``, where ASDL carries this
    module, each has all factors, but inverses of its own layers only.
    """
    return [maker.world_rank, maker.world_size]


def complete_inverses(maker: Any, state: dict[str, Any]) -> None:
    """Invert what the state of another rank has no inverse of, and this rank preconditions with.

    The inverses are those of the factors as they are in the state.
    """
    from asdl.precondition.natural_gradient import (
        _module_level_shapes,
    )  # imports this module on an ASDL with patches

    if state.get("rank", [0, 1]) == rank_state(maker):
        return
    matrices = [
        (module, matrix)
        for shape, partition in zip(_module_level_shapes, maker.partitions, strict=True)
        for module, rank in zip(maker.modules_for(shape), partition, strict=False)
        if rank == maker.world_rank and (matrix := maker._get_module_fisher(module)) is not None
    ]
    if getattr(maker.config, "relative_damping", False):
        maker.update_relative_inverses()
        return
    share_inverses(matrices)
    for _, matrix in matrices:
        if any(inverse is None for _, inverse in pairs(matrix)):
            matrix.update_inv(maker.config.damping)


def training_state(maker: Any, matrices: dict[nn.Module, SymMatrix]) -> dict[str, Any]:
    """What a :class:`~.training_config.TrainingConfig` goes by: when the last updates were, how
    many each layer's average has seen, each layer's damping with the optimizer's last step, and
    with ``second_moment`` those and their bases.
    """
    names = {module: name for name, module in maker.model.named_modules()}
    has_moments = maker.training.second_moment is not None
    return {
        **({"second_moments": maker.second_moments.state_dict()} if has_moments else {}),
        "last_update": dict(maker.last_update),
        "updates": {
            names[module]: matrix.updates
            for module, matrix in matrices.items()
            if hasattr(matrix, "updates")
        },
        "trust": maker.step_trust.state_dict(names),
    }


def load_training_state(
    maker: Any, state: dict[str, Any], matrices: dict[nn.Module, SymMatrix]
) -> None:
    """The inverse of :func:`training_state`, for curvature that was loaded."""
    modules = dict(maker.model.named_modules())
    maker.last_update = dict(state["last_update"])
    for name, updates in state["updates"].items():
        matrices[modules[name]].updates = updates
    maker.step_trust.load_state_dict(state["trust"], modules)
    if "second_moments" in state:
        devices = {layer.name: layer.module.weight.device for layer in maker.plan.layers}
        maker.second_moments.load_state_dict(state["second_moments"], devices)


def check_sizes(name: str, module: nn.Module, entry: dict[str, Any]) -> None:
    """Raise a ValueError if factors are not of a layer's sizes."""
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return
    weight = module.weight
    for key, size in (("kron.A", weight[0].numel()), ("kron.B", weight.shape[0])):
        for found in (entry.get(key), entry.get(f"{key}_inv")):
            if found is not None and not _fits(found, size):
                raise ValueError(
                    f"The state has {key} of sizes {tuple(found.shape)} for the module '{name}', "
                    f"whose weight is of sizes {tuple(weight.shape)}."
                )


def _fits(factor: Tensor, side: int) -> bool:
    """Whether a factor of a weight of this side may be of these sizes: whole, or in blocks, the
    last of which may be longer than what is left for it.
    """
    if factor.ndim == 2:
        return factor.shape[-1] == side
    return side <= factor.shape[0] * factor.shape[1] < 2 * side


def state_of_maker(maker: Any, matrices: dict[nn.Module, SymMatrix]) -> dict[str, Any]:
    """The whole state of a gradient maker whose curvature these matrices are."""
    plan, fisher_maker = maker.plan, maker.fisher_maker
    named = {
        name: matrices[module] for name, module in maker.model.named_modules() if module in matrices
    }
    training = {} if maker.training is None else {"training": training_state(maker, matrices)}
    return {
        **training,
        "step": maker.state["step"],
        "version": VERSION,
        "curvature": _matrices_state(named),
        "weight_sharing": {
            **plan_state(plan, fisher_maker.unseen),
            "draws": fisher_maker.draws,
            "fisher_type": fisher_maker.config.fisher_type,
            "moving_average": maker.do_accumulate,
            "without_curvature": [
                layer.name for layer in plan.all_layers if layer.module not in matrices
            ],
        },
    }


def plan_state(plan: Any, unseen: dict[nn.Module, str]) -> dict[str, Any]:
    """What batches have settled: the setting of ``'auto'``, layouts, roles, and which layers the
    last one left out.
    """
    names = {module: name for name, module in plan.model.named_modules()}
    return {
        "setting": plan.setting,
        "strategies": {layer.name: plan.strategy_of(layer) for layer in plan.all_layers},
        "layouts": {names[module]: layout for module, layout in plan.layouts.settled.items()},
        "roles": [
            [names[module], call, role] for (module, call), role in plan.layouts.roles.items()
        ],
        "graph": _graph_state(plan.layouts, names),
        "unseen": {names[module]: reason for module, reason in unseen.items()},
    }


def _graph_state(book: Any, names: dict[nn.Module, str]) -> dict[str, Any]:
    """What the autograd graph was asked, and what it said of masks and of inputs without a
    batch.
    """
    return {
        "masks": [
            [names[module], call, None if of is None else list(of)]
            for (module, call), of in book.masks.items()
        ],
        "without_batch": sorted([names[module], call] for module, call in book.without_batch),
        "looked_at": sorted(book.looked_at),
        "is_probed": book.is_probed,
        "num_probes": book.num_probes,
    }


def _load_graph_state(book: Any, modules: dict[str, nn.Module], state: dict[str, Any]) -> None:
    book.masks = {
        (modules[name], call): None if of is None else MaskOf(*of)
        for name, call, of in state["masks"]
    }
    book.without_batch = {(modules[name], call) for name, call in state["without_batch"]}
    book.looked_at = set(state["looked_at"])
    book.is_probed, book.num_probes = state["is_probed"], state["num_probes"]


def load_plan_state(plan: Any, state: dict[str, Any]) -> dict[nn.Module, str]:
    """The inverse of :func:`plan_state`; returns the layers that the last batch left out."""
    modules = dict(plan.model.named_modules())
    plan.setting = state["setting"]
    plan.layouts.settled = {modules[name]: layout for name, layout in state["layouts"].items()}
    plan.layouts.roles = {(modules[name], call): role for name, call, role in state["roles"]}
    if "graph" in state:
        _load_graph_state(plan.layouts, modules, state["graph"])
    return {modules[name]: reason for name, reason in state["unseen"].items()}
