"""The likelihoods behind PyTorch's losses: what a loss term's Hessian is, as a root and as noise.

A term has logits ``z`` of ``C`` classes or outputs. With ``Λ`` the Hessian of ``-log p(y | z)``
(eq. 3.4), a likelihood knows two things, for all terms at once:

====================  =====================================  ====================================
loss                  ``Λ``                                  noise with the covariance ``Λ``
====================  =====================================  ====================================
cross_entropy         ``diag(p) - p pᵀ``, ``p = softmax z``  ``p - onehot(y)``, ``y ~ p``
binary_cross_entropy  ``diag(p (1 - p))``, ``p = σ(z)``      ``p - y``, ``y_c ~ p_c``
mse                   ``Σ⁻¹``, the covariance given as       ``Σ^{-1/2} ε``, ``ε`` standard normal
                      ``var``
====================  =====================================  ====================================

All of it is independent of the labels. Tensors are ``(*, C)``, classes last, in at least float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from asdl.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE
from torch import Tensor

from .factors import accumulation_dtype

__all__ = ["LOSS_BINARY_CROSS_ENTROPY", "LOSS_TYPES", "Likelihood", "check_var", "likelihood_of"]

LOSS_BINARY_CROSS_ENTROPY = "binary_cross_entropy"


class Likelihood(ABC):
    """Of one type of loss."""

    @abstractmethod
    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Gradient of ``-log p`` of one label drawn for each term: ``(*, C) -> (*, C)``.

        Its second moment is Λ (eq. 3.35).
        """

    @abstractmethod
    def hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        """The C columns of ``S`` with ``S Sᵀ = Λ``, of all terms: each ``(*, C)``."""


class Categorical(Likelihood):
    """``cross_entropy``."""

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probs = torch.softmax(logits, -1)
        labels = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        labels = labels.reshape(*probs.shape[:-1], 1)
        return probs.scatter_add(-1, labels, -torch.ones_like(labels, dtype=probs.dtype))

    def hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        probs = torch.softmax(logits, -1)
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        for c, one in enumerate(eye):
            yield (probs - one) * probs[..., c, None].sqrt()


class Bernoulli(Likelihood):
    """``binary_cross_entropy``: independent outputs."""

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probs = torch.sigmoid(logits)
        return probs - torch.bernoulli(probs, generator=generator)

    def hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        probs = torch.sigmoid(logits)
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        for one in eye:
            yield (probs * (1 - probs)).sqrt() * one


class Gaussian(Likelihood):
    """``mse``, by ASDL's convention ``-log p = (z - y)ᵀ Σ⁻¹ (z - y) / 2``.

    Args:
        var: Σ as a variance, variances ``(C,)``, or a covariance ``(C, C)``.
    """

    def __init__(self, var: Any = 1.0) -> None:
        self.var = var

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(
            logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
        )
        root = self._root(logits)
        return noise @ root.mT if isinstance(root, Tensor) else noise * root

    def hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        root = self._root(logits)
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        for column in root.mT if isinstance(root, Tensor) else eye * root:
            yield column.expand_as(logits)

    def _root(self, logits: Tensor) -> float | Tensor:
        """``Σ^{-1/2}``: a number, or a ``(C, C)`` matrix whose columns are gradients."""
        var = self.var
        if not isinstance(var, Tensor):
            return 1 / math.sqrt(var)
        num_outputs = logits.shape[-1]
        fits = (num_outputs,) if var.ndim == 2 else (1, num_outputs)
        if var.ndim and var.shape[-1] not in fits:
            raise ValueError(
                f"var has sizes {tuple(var.shape)}, but there are {num_outputs} outputs."
            )
        var = var.to(logits)
        if var.ndim == 2:
            return torch.linalg.inv(torch.linalg.cholesky(var)).mT
        return torch.diag(var.expand(num_outputs).rsqrt())


_LIKELIHOODS: dict[str, type[Likelihood]] = {
    LOSS_CROSS_ENTROPY: Categorical,
    LOSS_MSE: Gaussian,
    LOSS_BINARY_CROSS_ENTROPY: Bernoulli,
}
LOSS_TYPES = tuple(_LIKELIHOODS)


def likelihood_of(loss_type: str, var: Any = 1.0) -> Likelihood:
    """The likelihood of one of :data:`LOSS_TYPES`; ``var`` is the Gaussian's."""
    return Gaussian(var) if loss_type == LOSS_MSE else _LIKELIHOODS[loss_type]()


def check_var(var: Any) -> None:
    """Raise a ValueError unless ``var`` is a variance, variances ``(C,)`` or a covariance ``(C,
    C)``.
    """
    if isinstance(var, Tensor) and var.ndim == 2 and var.shape[0] == var.shape[1]:
        symmetric = torch.allclose(var, var.mT)
        if symmetric and not int(
            torch.linalg.cholesky_ex(var.to(accumulation_dtype(var.dtype))).info
        ):
            return
        raise ValueError(
            "var has to be symmetric and positive definite to be the covariance of the outputs."
        )
    if isinstance(var, Tensor) and var.ndim > 1:
        raise ValueError(
            f"var has to be a number or a tensor (C,) or (C, C), got sizes {tuple(var.shape)}."
        )
    if not bool(torch.as_tensor(var > 0).all()):
        raise ValueError(f"var is the variance of the outputs, which is positive; got {var!r}.")
