"""The curvature of a joint batch, from what each rank computed of its part, and who inverts it."""

from __future__ import annotations

from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

from .agreement import signature
from .blocks import input_group
from .layout import MaskOf
from .matrices import (
    IS_A,
    IS_SYMMETRIC,
    NUM_PARTS,
    SYMMETRIC_INVERSES,
    copy_inverses,
    data_of,
    drop_inverted,
    tensors,
    trained,
    with_data,
)
from .plan import Plan
from .ranks import Ranks
from .shares import Part
from .state_dict import plan_state

__all__ = ["joint_curvature", "owners", "share_inverses"]


def joint_curvature(
    ranks: Ranks,
    what: str,
    plan: Plan,
    part: Part,
    weigh_B_by_examples: bool = False,
) -> list[tuple[nn.Module, SymMatrix]]:
    """The curvature that one process with the joint batch would have, the same on all ranks.

    What batches settle (the setting, layouts, roles) is the same on all ranks afterwards, too. A
    layer that a rank did not call has no examples there.

    Args:
        ranks: who takes part.
        what: the place of the training.
        plan: what is done with which layer.
        part: this rank's batch. Its curvature is changed in place, and ``unseen`` are on return
            the layers that took part on no rank.
        weigh_B_by_examples: B is a mean over examples as A is, and does not know the loss.

    Raises:
        ValueError: batches have settled different things on the ranks.
        RankFailure: another rank has failed.
    """
    own = dict(part.results)
    modules = [*(layer.module for layer in plan.all_layers), plan.model]
    data = [tensor for module in modules for tensor in data_of(own.get(module))]
    state = plan_state(plan, part.unseen)
    counts = [part.positions.get(module) for module in modules]
    shares, (are_same, same_counts) = ranks.exchange_shares(
        what, part.share, signature([state, _described(data)]), signature(counts)
    )
    if not are_same:
        _settle_together(plan, ranks.gather(state))
    everyone = [counts] * ranks.size if same_counts else ranks.gather(counts)
    columns = list(zip(*everyone, strict=True))

    def weight(i: int) -> float:
        is_A = IS_A[i % NUM_PARTS]
        if part.step.has_data_size:  # that of one rank's batch
            of_batch = shares.of_ranks
        else:
            of_batch = shares.of_examples if is_A or weigh_B_by_examples else shares.of_terms
        return of_batch * (shares.of_positions(columns[i // NUM_PARTS]) if is_A else 1.0)

    summed = ranks.sum_(data, weight, are_same, lambda i: IS_SYMMETRIC[i % NUM_PARTS])
    if are_same:
        return part.results
    joint = _matrices(modules, summed)
    for module, _ in joint:
        part.unseen.pop(module, None)
    return joint


def _described(data: list[Tensor | None]) -> list[Any]:
    """Of every tensor its sizes, its type, and where the same one comes first."""
    first: dict[int, int] = {}
    return [
        None if t is None else (tuple(t.shape), t.dtype, first.setdefault(id(t), i))
        for i, t in enumerate(data)
    ]


def _matrices(
    modules: list[nn.Module], data: list[Tensor | None]
) -> list[tuple[nn.Module, SymMatrix]]:
    """The curvature whose tensors these are, of the modules that have any."""
    found = []
    for i, module in enumerate(modules):
        parts = data[i * NUM_PARTS : (i + 1) * NUM_PARTS]
        if any(part is not None for part in parts):
            matrix = with_data(parts)
            matrix.trained = trained(module)
            found.append((module, matrix))
    return found


def _settle_together(plan: Plan, states: list[dict[str, Any]]) -> None:
    """Let what any rank's batches have settled be settled on this one, too."""
    modules = dict(plan.model.named_modules())
    masks = [
        {(name, call): of and tuple(of) for name, call, of in state["graph"]["masks"]}
        for state in states
    ]
    layouts = [state["layouts"] for state in states]
    roles = [{(name, call): role for name, call, role in state["roles"]} for state in states]
    for (name, call), role in _agreed(roles, "the role of layer '{0[0]}'").items():
        plan.layouts.roles[modules[name], call] = role
    for (name, call), mask in _agreed(masks, "the padding mask of layer '{0[0]}'").items():
        plan.layouts.masks[modules[name], call] = None if mask is None else MaskOf(*mask)
    for name, layout in _agreed(layouts, "the layout of layer '{0}'").items():
        plan.layouts.settled[modules[name]] = layout


def _agreed(settled: list[dict[Any, Any]], what: str) -> dict[Any, Any]:
    joint: dict[Any, Any] = {}
    for entries in settled:
        for key, value in entries.items():
            if joint.setdefault(key, value) != value:
                found = ", ".join(
                    f"{other[key]!r} on rank {rank}"
                    for rank, other in enumerate(settled)
                    if key in other
                )
                raise ValueError(
                    f"The first batches show {what.format(key)} to be {found}. Say which it is: a "
                    "layout by a rule in shared_dim, as in ('encoder', 'reduce', "
                    "'sequence_first'); a role with convert(model, roles=...); a padding mask by "
                    "a role of its name."
                )
    return joint


def owners(ranks: Ranks, matrices: list[tuple[nn.Module, SymMatrix]]) -> list[int]:
    """Which rank inverts which matrix. Blocks of one layer, which share A, go together."""
    groups: dict[nn.Module, float] = {}
    keys = [input_group(module) or module for module, _ in matrices]
    for key, (_, matrix) in zip(keys, matrices, strict=True):
        cost = sum(t.numel() * t.shape[-1] for t in tensors(matrix))
        groups[key] = groups.get(key, 0.0) + float(cost)
    owner = dict(zip(groups, ranks.owners(list(groups.values())), strict=True))
    return [owner[key] for key in keys]


def share_inverses(
    ranks: Ranks,
    what: str,
    matrices: list[SymMatrix],
    owner: list[int],
    replace: bool = False,
) -> None:
    """Give every rank the inverses that their owners have computed.

    With ``replace``, what was inverted is let go of.
    """
    if ranks.size == 1:
        return
    places = [
        (rank, holder, name, inverse)
        for rank, matrix in zip(owner, matrices, strict=True)
        for holder, name, inverse in copy_inverses(matrix)
    ]
    first: dict[int, int] = {}
    specs = [
        (i, first.setdefault(id(inverse), i), tuple(inverse.shape), inverse.dtype)
        for i, (rank, _, _, inverse) in enumerate(places)
        if rank == ranks.rank and inverse is not None
    ]
    ranks.agree(what)
    for rank, theirs in enumerate(ranks.gather(specs)):
        sent = {}
        for i, same_as, shape, dtype in theirs:
            if same_as not in sent:
                inverse = places[i][3]
                # strides count, too: products of the same numbers have other last digits otherwise
                sent[same_as] = (
                    inverse.contiguous()
                    if rank == ranks.rank and inverse is not None
                    else torch.empty(shape, dtype=dtype, device=ranks.device)
                )
        are_symmetric = [places[i][2] in SYMMETRIC_INVERSES for i in sent]
        ranks.broadcast_(list(zip(sent.values(), are_symmetric, strict=True)), rank)
        for i, same_as, _, _ in theirs:
            _, holder, name, _ = places[i]
            setattr(holder, name, sent[same_as])
    if replace:
        for matrix in matrices:
            drop_inverted(matrix)
