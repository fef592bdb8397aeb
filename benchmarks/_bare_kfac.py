"""K-FAC-expand and -reduce written out by hand for a ViT of ``nn.Linear`` layers and one patch
embedding.

The yardstick of ``step_time.py``: the same arithmetic as the plugin's, with nothing around it. No
ASDL, no plugin, no
checks; batch first, cross-entropy, mean reduction and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _timing import Parts
from torch import Tensor, nn

__all__ = ["BareKfac"]


class BareKfac:
    """One training step's gradient by hand.

    Args:
        model: images to logits ``(N, C)``.
        setting: ``'expand'`` or ``'reduce'``.
        empirical: whether B is made of the loss's own gradient; else of one Monte-Carlo sample.
        damping: λ, shared between the two factors as pi damping does.
        decay: weight of the new factors in the moving average, which starts from zero (ASDL's
            ``ema_decay``).
        parts: where the time of each part is noted.

    Attributes:
        A, B: layer -> factor.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: str,
        empirical: bool,
        damping: float,
        decay: float,
        parts: Parts,
    ) -> None:
        self.model, self.reduce, self.empirical = model, setting == "reduce", empirical
        self.damping, self.decay, self.part = damping, decay, parts
        self.layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.A: dict[nn.Module, Tensor] = {}
        self.B: dict[nn.Module, Tensor] = {}
        for m in self.layers:
            outputs, inputs = m.weight.shape[0], m.weight[0].numel()
            self.A[m] = m.weight.new_zeros(inputs, inputs)
            self.B[m] = m.weight.new_zeros(outputs, outputs)
        self.inverse: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._on_gradient: list[Any] = []
        self._first: Tensor | None = None

    def step(self, x: Tensor, y: Tensor, curvature: bool, inverse: bool) -> Tensor:
        """Set ``.grad`` to the preconditioned gradient and return the loss."""
        if curvature:
            loss = self._with_curvature(x, y)
        else:
            with self.part("forward"):
                loss = F.cross_entropy(self.model(x), y)
            with self.part("backward"):
                loss.backward()
        if inverse:
            with self.part("inverse"):
                self._invert()
        with self.part("precondition"):
            self._precondition()
        return loss

    def _with_curvature(self, x: Tensor, y: Tensor) -> Tensor:
        self._on_gradient, self._first = [], None
        handles = [m.register_forward_hook(self._on_forward) for m in self.layers]
        with self.part("forward"):
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
        for handle in handles:
            handle.remove()
        if not self.empirical:
            with self.part("second backward"):
                with torch.no_grad():
                    sampled = torch.softmax(logits, -1)
                    labels = torch.multinomial(sampled, 1)
                    sampled.scatter_add_(1, labels, -torch.ones_like(labels, dtype=sampled.dtype))
                # The patch embedding comes first, so a pass up to its output meets the outputs of
                # all other layers.
                torch.autograd.grad(logits, self._first, sampled, retain_graph=True)
            for handle in self._on_gradient:
                handle.remove()
        with self.part("backward"):
            loss.backward()
        return loss

    def _on_forward(self, m: nn.Module, args: Any, out: Tensor) -> None:
        self._add_A(m, args[0].detach())
        # The gradient of the mean loss is 1/N of the summed loss's; a sample's is that of the sum
        # already.
        scale = out.shape[0] if self.empirical else 1 / out.shape[0]
        self._on_gradient.append(out.register_hook(lambda grad: self._add_B(m, grad, scale)))
        self._first = out if self._first is None else self._first

    @torch.no_grad()
    def _add_A(self, m: nn.Module, x: Tensor) -> None:
        with self.part("A"):
            n, r = x.shape[0], 1
            if isinstance(m, nn.Conv2d):
                x = F.unfold(x, m.kernel_size, stride=m.stride).mT
            if x.ndim == 3:
                r = 1 if self.reduce else x.shape[1]
                x = x.mean(1) if self.reduce else x.reshape(-1, x.shape[-1])
            self.A[m].addmm_(x.mT, x, beta=1 - self.decay, alpha=self.decay / (n * r))

    @torch.no_grad()
    def _add_B(self, m: nn.Module, grad: Tensor, scale: float) -> None:
        with self.part("B"):
            if grad.ndim == 4:  # N C H W -> N (H W) C
                grad = grad.flatten(2).mT
            if grad.ndim == 3:
                grad = grad.sum(1) if self.reduce else grad.reshape(-1, grad.shape[-1])
            self.B[m].addmm_(grad.mT, grad, beta=1 - self.decay, alpha=self.decay * scale)

    @torch.no_grad()
    def _invert(self) -> None:
        for m in self.layers:
            A, B = self.A[m], self.B[m]
            pi = torch.sqrt(A.diagonal().mean() / B.diagonal().mean())
            self.inverse[m] = (
                _damped_inverse(A, self.damping**0.5 * pi),
                _damped_inverse(B, self.damping**0.5 / pi),
            )

    @torch.no_grad()
    def _precondition(self) -> None:
        for m in self.layers:
            A_inv, B_inv = self.inverse[m]
            grad: Any = m.weight.grad
            m.weight.grad = (B_inv @ grad.flatten(1) @ A_inv).view_as(grad)
            if m.bias is not None:
                m.bias.grad = B_inv @ m.bias.grad


def _damped_inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
