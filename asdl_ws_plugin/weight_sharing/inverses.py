"""Damped inverses of many curvature matrices at once.

The damping is relative: a fraction of a matrix's own mean eigenvalue, so that a matrix is inverted
alike whatever it is multiplied with. Matrices of equal size are one stack ``(k, n, n)`` with one
Cholesky decomposition and one inversion; what the checks found is read back from the device once
for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor

__all__ = ["split_damping", "update_inverses"]


@dataclass
class _Job:
    """A tensor to invert, one matrix ``(n, n)`` or blocks ``(k, n, n)``."""

    name: str
    data: Tensor
    damping: Tensor
    # Where the inverse belongs: objects and their attributes.
    places: list[tuple[Any, str]]

    @property
    def blocks(self) -> Tensor:
        return self.data.view(-1, *self.data.shape[-2:])

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
def update_inverses(matrices: Iterable[tuple[str, SymMatrix, Tensor]]) -> list[str]:
    """Replace the inverses of matrices by those of their data, which are not changed.

    ``damping`` times the mean eigenvalue is added to the diagonals, for Kronecker factors as
    :func:`split_damping` has it. A matrix
    that is exactly zero gets no inverse. One that is not positive definite in its own precision is
    inverted in float64; where that fails, too, the old inverse stays.

    Args:
        matrices: names, matrices, and their dampings: the fraction, a scalar.

    Returns:
        The names of those whose old inverse, or none, stays.
    """
    jobs = _jobs(matrices)
    devices = {job.data.device for job in jobs}
    return [
        name
        for device in devices
        for name in _update([job for job in jobs if job.data.device == device])
    ]


def _jobs(matrices: Iterable[tuple[str, SymMatrix, Tensor]]) -> list[_Job]:
    jobs: dict[tuple[int, int], _Job] = {}
    for name, matrix, damping in matrices:
        parts: list[tuple[Any, str, str, Tensor]] = [(matrix, "data", "inv", damping)]
        if matrix.kron is not None:
            split = split_damping(damping)
            parts += [(matrix.kron, "A", "A_inv", split), (matrix.kron, "B", "B_inv", split)]
        if matrix.unit is not None:
            parts += [(matrix.unit, "data", "inv", damping)]
        for holder, attribute, inverse, part_damping in parts:
            data = getattr(holder, attribute)
            if data is not None:
                job = jobs.setdefault((id(data), id(damping)), _Job(name, data, part_damping, []))
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


def _update(jobs: list[_Job]) -> list[str]:
    """The inverses of matrices on one device."""
    if not jobs:
        return []
    means = [job.data.diagonal(dim1=-2, dim2=-1).mean() for job in jobs]
    stacks: dict[Any, list[int]] = defaultdict(list)
    for i, job in enumerate(jobs):
        stacks[job.data.shape[-1], job.data.dtype].append(i)
    inverses: dict[int, Tensor] = {}
    flags: list[Tensor] = []
    for indices in stacks.values():
        counts = [len(jobs[i].blocks) for i in indices]
        shifts = torch.stack([means[i] * jobs[i].damping for i in indices])
        stack = torch.cat([jobs[i].blocks for i in indices])
        by_block = shifts.repeat_interleave(shifts.new_tensor(counts, dtype=torch.long))
        stack.diagonal(dim1=-2, dim2=-1).add_(by_block.unsqueeze(1))
        factor, info = torch.linalg.cholesky_ex(stack)
        # What has no decomposition would end the inversion of all.
        eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        factor = torch.where((info != 0).view(-1, 1, 1), eye, factor)
        parts = torch.cholesky_inverse(factor).split(counts)
        for i, part, found in zip(indices, parts, info.split(counts), strict=True):
            inverses[i] = part.view_as(jobs[i].data)
            # A zero matrix has a Cholesky decomposition of zeros or none.
            flags.append((found != 0).any())
    order = [i for indices in stacks.values() for i in indices]
    found = torch.stack([*flags, *(means[i] == 0 for i in order)]).tolist()
    failed = []
    for i, is_wrong, is_zero in zip(order, found[: len(order)], found[len(order) :], strict=True):
        job = jobs[i]
        if is_zero:
            job.set(None)
        elif not is_wrong:
            job.set(inverses[i])
        elif (retried := _in_float64(job)) is not None:
            job.set(retried)
        else:
            failed.append(job.name)
    return failed


def _in_float64(job: _Job) -> Tensor | None:
    data = job.blocks.double()
    shift = job.damping * job.data.double().diagonal(dim1=-2, dim2=-1).mean()
    factor, info = torch.linalg.cholesky_ex(
        data + shift * torch.eye(data.shape[-1], dtype=data.dtype, device=data.device)
    )
    if bool((info != 0).any()):
        return None
    return torch.cholesky_inverse(factor).to(job.data.dtype).view_as(job.data)
