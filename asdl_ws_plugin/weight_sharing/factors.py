"""The mathematics: Kronecker factors and per-example gradients of linear weight-sharing layers.

Pure functions on tensors; nothing here knows about modules, hooks or ASDL. Every tensor is brought
into one layout before it gets here:

=============  ===================================================================================
``(N, R, P)``  ``N`` examples, ``R`` positions that share the weight, ``P`` features
=============  ===================================================================================

``(8, 1, 10)`` is an ordinary linear layer, ``(8, 197, 384)`` the tokens of a ViT, ``(8, 49, 27)``
the patches that a 3x3 convolution of three channels sees at 7x7 output positions. ``a`` is a
layer's input, ``b`` the gradient of the summed loss with respect to its output.

None of these functions divides by the number of examples: ASDL multiplies by ``1 / data_size``
afterwards. Half precision is accumulated, and returned, in float32.

Equation numbers are those of Eschenhagen, "Kronecker-factored Approximate Curvature for Linear
Weight-Sharing Layers" (2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_private import padding_of

__all__ = [
    "accumulation_dtype",
    "expand_factor_A",
    "expand_factor_B",
    "full_precision",
    "mean_patches",
    "patches",
    "per_example_grads",
    "per_example_square_sum",
    "reduce_factor_A",
    "reduce_factor_B",
    "rows",
]

# Fewer rows than this are multiplied faster in one go, whatever the number of features.
_MANY_ROWS = 1024
# Per-example weight gradients are formed in chunks of at most this many numbers (64 MiB of
# float32).
_CHUNK_NUMEL = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which factors of data of this dtype are accumulated: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast: a user's may be active around a whole step, and would compute factors in half
    precision.
    """
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(
                device_type
            ):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def rows(x: Tensor) -> Tensor:
    """All positions of all examples as rows, in whichever order needs no copy: ``(N, R, P) -> (N·R,
    P)``.
    """
    if (
        not x.is_contiguous() and x.transpose(0, 1).is_contiguous()
    ):  # sequence first: R N P -> (R N) P
        x = x.transpose(0, 1)
    return x.reshape(-1, x.shape[-1]).to(accumulation_dtype(x.dtype))


def _gram(x: Tensor) -> Tensor:
    """``xᵀ x``. On a CPU only the blocks on and above the diagonal of a large one are
    multiplied.
    """
    num_rows, size = x.shape
    block = max(
        64, -(-size // 256) * 64
    )  # about a quarter: smaller blocks save more and multiply slower
    if x.device.type != "cpu" or size < 2 * block or num_rows < _MANY_ROWS:
        return x.mT @ x
    product = x.new_empty(size, size)
    for start in range(0, size, block):
        stop = min(start + block, size)
        torch.mm(x[:, start:stop].mT, x[:, start:], out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].mT
    return product


def expand_factor_A(a: Tensor) -> Tensor:
    """``Σ_n 1/R Σ_r a_nr a_nrᵀ`` of eq. 3.7. ``(N, R, P) -> (P, P)``."""
    return _gram(rows(a)).div_(a.shape[1])


def expand_factor_B(b: Tensor) -> Tensor:
    """``Σ_n Σ_r b_nr b_nrᵀ`` of eq. 3.7. ``(N, R, Q) -> (Q, Q)``."""
    return _gram(rows(b))


def reduce_factor_A(a: Tensor) -> Tensor:
    """``Σ_n (mean_r a_nr)(mean_r a_nr)ᵀ`` of eq. 3.19. ``(N, R, P) -> (P, P)``."""
    return _gram(position_mean(a))


def reduce_factor_B(b: Tensor) -> Tensor:
    """``Σ_n (Σ_r b_nr)(Σ_r b_nr)ᵀ`` of eq. 3.19. ``(N, R, Q) -> (Q, Q)``."""
    return _gram(position_sum(b))


def position_mean(x: Tensor) -> Tensor:
    """``(N, R, P) -> (N, P)``."""
    dtype = accumulation_dtype(x.dtype)
    return x[:, 0].to(dtype) if x.shape[1] == 1 else x.mean(1, dtype=dtype)


def position_sum(x: Tensor) -> Tensor:
    """``(N, R, P) -> (N, P)``."""
    dtype = accumulation_dtype(x.dtype)
    return x[:, 0].to(dtype) if x.shape[1] == 1 else x.sum(1, dtype=dtype)


def per_example_grads(a: Tensor, b: Tensor) -> Tensor:
    """Weight gradient of each example, ``Σ_r b_nr a_nrᵀ`` (eq. 3.17): ``(N, R, P), (N, R, Q) -> (N,
    Q, P)``.
    """
    dtype = accumulation_dtype(a.dtype)
    return b.to(dtype).mT @ a.to(dtype)


def per_example_square_sum(a: Tensor, b: Tensor) -> Tensor:
    """``Σ_n (Σ_r b_nr a_nrᵀ)²``, elementwise: ``(N, R, P), (N, R, Q) -> (Q, P)``. Never holds all N
    gradients.
    """
    if a.shape[1] == 1:  # the square of an outer product is the outer product of the squares
        return position_sum(b).square().mT @ position_sum(a).square()
    total = torch.zeros(
        b.shape[-1], a.shape[-1], dtype=accumulation_dtype(a.dtype), device=a.device
    )
    chunk = max(1, _CHUNK_NUMEL // total.numel())
    for a_part, b_part in zip(a.split(chunk), b.split(chunk), strict=True):
        total += per_example_grads(a_part, b_part).square_().sum(0)
    return total


def _windows(x: Tensor, conv: Any) -> Tensor:
    """A view of all patches: ``(N, C, H, W) -> (N, C, H', W', kh, kw)``. Copies only what padding
    adds.
    """
    pads = padding_of(conv)
    if any(pads):
        x = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for dim, (size, step, gap) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    return x


def patches(x: Tensor, conv: Any) -> Tensor:
    """What a convolution's weight is multiplied with: ``(N, C, H, W) -> (N, H'·W', C·kh·kw)``, one
    copy.
    """
    windows = _windows(x, conv)
    n, _, height, width, _, _ = windows.shape
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(
        n, height * width, -1
    )  # n c h w i j -> n (h w) (c i j)


def mean_patches(x: Tensor, conv: Any) -> Tensor:
    """``patches(x, conv).mean(1, keepdim=True)`` without materialising the patches: ``(N, 1,
    C·kh·kw)``.
    """
    return _windows(x, conv).mean((2, 3), dtype=accumulation_dtype(x.dtype)).flatten(1).unsqueeze(1)
