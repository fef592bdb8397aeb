"""Damped inverses of many curvature matrices at once.

The damping is relative: a fraction of a matrix's own mean eigenvalue, so that a matrix is inverted
alike whatever it is multiplied with. Matrices of equal size are one stack ``(j, n, n)`` with one
Cholesky decomposition and one inversion, so that the number of kernels does not grow with the
layers; what the checks found is read back from the device once for all of them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor

__all__ = ["Updated", "split_damping", "update_inverses"]


@dataclass(frozen=True)
class Updated:
    """Names of matrices whose inverses were not simply replaced.

    Attributes:
        kept: the old inverse, or none, stays.
        zero: a Kronecker factor is exactly zero, and has no inverse.
    """

    kept: list[str]
    zero: list[str]


@dataclass
class _Job:
    """A tensor to invert, one matrix ``(n, n)`` or blocks ``(k, n, n)``."""

    name: str
    data: Tensor
    damping: Tensor
    # Whether it stands for zeros, a scalar.
    is_noise: Tensor
    # Where the inverse belongs: objects and their attributes.
    places: list[tuple[Any, str]]

    def set(self, inverse: Tensor | None) -> None:
        for holder, attribute in self.places:
            setattr(holder, attribute, inverse)


def split_damping(damping: Tensor) -> Tensor:
    """The relative damping of each of two factors that stands for one of their product.

    With δ of each factor, ``(1 + δ)² / δ² = (1 + damping) / damping``: an eigenvector of mean
    eigenvalues is shortened by the factors as it is by the damped product, whatever the damping. A
    small one is split into square roots, as ASDL does (by π, which is the ratio of the means); of a
    large one, where ``sqrt(damping)`` would precondition far too much, each factor gets twice.
    """
    return damping + (damping.square() + damping).sqrt()


@torch.no_grad()
def update_inverses(
    matrices: Iterable[tuple[str, SymMatrix, Tensor]], noise: Mapping[str, Tensor] | None = None
) -> Updated:
    """Replace the inverses of matrices by those of their data, which are not changed.

    ``damping`` times the mean eigenvalue is added to the diagonals, for Kronecker factors as
    :func:`split_damping` has it. A matrix that is zero gets no inverse. One that is not positive
    definite in its own precision is inverted in float64; where that fails, too, the old inverse
    stays.

    Args:
        matrices: names, matrices, and their dampings: the fraction, a scalar.
        noise: of names, whether B is rounding noise and stands for zero: a scalar.
    """
    by_device: dict[torch.device, list[tuple[str, SymMatrix, Tensor]]] = defaultdict(list)
    for entry in matrices:
        by_device[entry[2].device].append(entry)
    noise = noise or {}
    updated = [_update(_jobs(entries, noise)) for entries in by_device.values()]
    return Updated(
        kept=[name for kept, _ in updated for name in kept],
        # A layer has two factors.
        zero=list(dict.fromkeys(name for _, zero in updated for name in zero)),
    )


def _jobs(matrices: list[tuple[str, SymMatrix, Tensor]], noise: Mapping[str, Tensor]) -> list[_Job]:
    """What there is to invert on one device. Layers that share a tensor and its damping have one
    inverse.
    """
    # A damping that several layers have is one tensor.
    distinct = {id(damping): damping for _, _, damping in matrices}
    splits = dict(zip(distinct, split_damping(torch.stack([*distinct.values()])), strict=True))
    jobs: dict[tuple[int, int], _Job] = {}
    never = torch.zeros((), dtype=torch.bool, device=matrices[0][2].device)
    for name, matrix, damping in matrices:
        parts: list[tuple[Any, str, str, Tensor]] = [(matrix, "data", "inv", damping)]
        if matrix.kron is not None:
            split = splits[id(damping)]
            parts += [(matrix.kron, "A", "A_inv", split), (matrix.kron, "B", "B_inv", split)]
        if matrix.unit is not None:
            parts += [(matrix.unit, "data", "inv", damping)]
        for holder, attribute, inverse, part_damping in parts:
            data = getattr(holder, attribute)
            if data is not None:
                key = id(data), id(part_damping)
                is_noise = noise.get(name, never) if attribute == "B" else never
                job = jobs.setdefault(key, _Job(name, data, part_damping, is_noise, []))
                job.places.append((holder, inverse))
        if matrix.diag is not None:
            _invert_diagonal(matrix.diag, damping)
    return list(jobs.values())


def _invert_diagonal(diag: Any, damping: Tensor) -> None:
    for kind in ("weight", "bias"):
        data = getattr(diag, kind)
        if data is not None:
            mean = data.mean()
            inverse = torch.where(mean > 0, 1 / (data + damping * mean), 1.0)
            setattr(diag, f"{kind}_inv", inverse)


def _update(jobs: list[_Job]) -> tuple[list[str], list[str]]:
    """The inverses of matrices on one device; names as those of :class:`Updated`."""
    stacks: dict[Any, list[_Job]] = defaultdict(list)
    for job in jobs:
        stacks[job.data.shape, job.data.dtype].append(job)
    if not stacks:
        return [], []
    inverses, flags = zip(*map(_inverted, stacks.values()), strict=True)
    found = torch.cat(flags, dim=1).tolist()
    order = [job for stack in stacks.values() for job in stack]
    failed, zero = [], []
    for job, inverse, is_wrong, is_zero, is_noise in zip(
        order, itertools.chain(*inverses), *found, strict=True
    ):
        if is_zero or is_noise:
            job.set(None)
            if is_zero and any(attribute in ("A_inv", "B_inv") for _, attribute in job.places):
                zero.append(job.name)
        elif not is_wrong:
            job.set(inverse)
        elif (retried := _in_float64(job)) is not None:
            job.set(retried)
        else:
            failed.append(job.name)
    return failed, zero


def _inverted(jobs: list[_Job]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inverses of tensors of equal size, and flags ``(3, jobs)``: whether one is wrong, of
    zeros, and of noise.
    """
    stack = torch.stack([job.data for job in jobs])  # (jobs, n, n) or (jobs, k, n, n)
    diagonals = stack.diagonal(dim1=-2, dim2=-1)
    means = diagonals.flatten(1).mean(1)
    shifts = means * torch.stack([job.damping for job in jobs])
    diagonals.add_(shifts.view(-1, *[1] * (diagonals.ndim - 1)))
    factor, info = torch.linalg.cholesky_ex(stack)
    is_wrong = info != 0
    # What has no decomposition would end the inversion of all.
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    factor = torch.where(is_wrong[..., None, None], eye, factor)
    # A zero matrix has a Cholesky decomposition of zeros or none.
    is_noise = torch.stack([job.is_noise for job in jobs])
    flags = torch.stack([is_wrong.view(len(jobs), -1).any(1), means == 0, is_noise])
    return torch.cholesky_inverse(factor).unbind(), flags


def _in_float64(job: _Job) -> Tensor | None:
    data = job.data.double()
    shift = job.damping * data.diagonal(dim1=-2, dim2=-1).mean()
    factor, info = torch.linalg.cholesky_ex(
        data + shift * torch.eye(data.shape[-1], dtype=data.dtype, device=data.device)
    )
    if bool((info != 0).any()):
        return None
    return torch.cholesky_inverse(factor).to(job.data.dtype)
