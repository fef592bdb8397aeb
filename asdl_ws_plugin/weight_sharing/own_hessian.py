"""The Hessian of a loss with respect to each row of the logits, by differentiating it twice.

For a loss, or a part of one, that is none of PyTorch's that are read. Only the loss is
differentiated, never the model: ``C`` products with the Hessian, each for all rows at once, are
everything where no term mixes rows. That is checked by one product more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import accumulation_dtype, full_precision

__all__ = ["depends_on_elements_alone", "roots_of_positive_parts", "row_hessians"]

# The Hessians of all rows together have at most so many numbers: 1 GiB of double precision.
_MAX_NUMEL = 1 << 27
_REMEDY = "Use fisher_type='fisher_emp', the second moment of the gradients, which takes any loss."


@full_precision()
def row_hessians(loss: Tensor, logits: Tensor) -> Tensor:
    """``∂²L / ∂z_r ∂z_r`` of each row z_r of the logits: ``(rows, C, C)``.

    Args:
        logits: ``(*, C)``, or ``(N,)`` with rows of one logit.

    Raises a ValueError if the loss mixes rows, is linear or cannot be differentiated twice, or the
    Hessians are not finite or too large.
    """
    num_classes = logits.shape[-1] if logits.ndim > 1 else 1
    rows = logits.numel() // max(1, num_classes)
    if rows * num_classes**2 > _MAX_NUMEL:
        raise ValueError(
            f"The loss is not made of torch's cross_entropy, mse_loss or "
            f"binary_cross_entropy_with_logits alone, and its own Hessians of {rows} rows with "
            f"{num_classes} classes would have {rows * num_classes**2:,} numbers. {_REMEDY}"
        )
    product = _HessianProduct(loss, logits)
    columns = []
    for c in range(num_classes):
        direction = torch.zeros(rows, num_classes, dtype=logits.dtype, device=logits.device)
        direction[:, c] = 1
        columns.append(product(direction))
    hessians = torch.stack(columns, -1)
    if not bool(torch.isfinite(hessians).all()):
        raise ValueError(
            "The second derivative of the loss is not finite. Of a loss that masks values, mask "
            f"them before they enter a function that has no derivative there. {_REMEDY}"
        )
    _check_rows(product, hessians, logits)
    return (hessians + hessians.mT) / 2


class _HessianProduct:
    """The products of the loss's Hessian with vectors ``(rows, C)``.

    Raises a ValueError if the loss cannot be differentiated twice.
    """

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.logits = logits
        with torch.enable_grad():
            (self.grad,) = torch.autograd.grad(loss, logits, create_graph=True)

    def __call__(self, vectors: Tensor) -> Tensor:
        result: Tensor | None = None
        if self.grad.requires_grad:
            try:
                (result,) = torch.autograd.grad(
                    self.grad,
                    self.logits,
                    vectors.view_as(self.logits),
                    retain_graph=True,
                    allow_unused=True,
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(
                    "The loss is not made of torch's cross_entropy, mse_loss or "
                    "binary_cross_entropy_with_logits alone, and it cannot be differentiated "
                    f"twice ({error}). {_REMEDY}"
                ) from error
        if result is None:
            return torch.zeros(
                vectors.shape, dtype=accumulation_dtype(vectors.dtype), device=vectors.device
            )
        return result.reshape(vectors.shape).to(accumulation_dtype(vectors.dtype))


def _check_rows(product: _HessianProduct, hessians: Tensor, logits: Tensor) -> None:
    """Raise a ValueError if the loss's Hessian has more than the blocks of its rows, or is zero."""
    vectors = _probe(hessians.shape[:2], logits)
    found, expected = product(vectors), (hessians @ vectors.to(hessians.dtype).unsqueeze(-1))
    size = torch.maximum(found.norm(), expected.norm())
    if bool((found - expected.squeeze(-1)).norm() > size * torch.finfo(logits.dtype).eps ** 0.6):
        raise ValueError(
            f"The loss mixes rows of the logits {tuple(logits.shape)}, so that there is no Hessian "
            "of each: it compares examples, as contrastive losses do, or positions, or the classes "
            f"are not the last dimension. {_REMEDY}"
        )
    if not bool(size > 0) and bool(product.grad.any()):
        raise ValueError(
            "The loss has a gradient but no second derivative with respect to the logits: it is "
            "piecewise linear, as the L1 loss is, or a function of its own that PyTorch cannot "
            f"differentiate twice. {_REMEDY}"
        )


def _probe(sizes: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers without a pattern; the user's generators are left alone."""
    count = torch.Size(sizes).numel()
    numbers = torch.arange(1, count + 1, device=like.device, dtype=accumulation_dtype(like.dtype))
    return (numbers * 12.9898).sin().reshape(sizes).to(like.dtype)


@full_precision()
def depends_on_elements_alone(loss: Tensor, logits: Tensor) -> bool:
    """Whether each logit has a term of its own, so that the Hessian is diagonal.

    Two products tell. A loss that cannot be differentiated twice has terms of rows.
    """
    if logits.ndim < 2 or logits.shape[-1] == 1:
        return False
    sizes = (logits.numel() // logits.shape[-1], logits.shape[-1])
    try:
        product = _HessianProduct(loss, logits)
        first = _probe(sizes, logits)
        second = first.roll(1, 1).cos()
        diagonal = product(first) / first
        found = product(second)
    except ValueError:
        return False
    off = (found - diagonal * second).norm()
    return bool(off <= found.norm() * torch.finfo(logits.dtype).eps ** 0.6)


def roots_of_positive_parts(hessians: Tensor) -> Tensor:
    """``S`` with ``S Sᵀ`` the part of each Hessian with positive eigenvalues: ``(rows, C, C)``."""
    values, vectors = torch.linalg.eigh(hessians)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
