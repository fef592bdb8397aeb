"""Whether a layer of a subclass is still what its base class is: looked at when it is called.

timm's ``BatchNormAct2d`` adds an activation, its ``LayerNorm2d`` normalizes another dimension, a
weight-standardized convolution multiplies with another weight. What can be handled is; the rest is
refused with its name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .capture import Layer, batch_norm_edge, first_tensor
from .errors import LayerError
from .names import OURS
from .torch_private import has_plain_forward

__all__ = ["Subclasses"]


class Subclasses:
    """What is known of the layers of one model that are of a subclass."""

    def __init__(self) -> None:
        self._plain: set[nn.Module] = set()  # do with their weight what their base class does
        self._channels_first: dict[nn.Module, bool] = {}  # of subclasses of LayerNorm

    def has_channels_first(self, module: nn.Module) -> bool:
        """Whether the layer's features are dimension 1 of its input."""
        if isinstance(module, (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
            return True
        return self._channels_first.get(module, False)

    def check_call(
        self, layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor
    ) -> GradientEdge | None:
        """Look at a call while its tensors are untouched.

        Returns where the gradient of the layer's output arrives if it is not the module's output.
        Raises a LayerError for a layer that computes something else than its base class.
        """
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._check_weight(layer, module, in_data)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return _edge_of_batch_norm(layer, module, in_data, out)
        elif isinstance(module, nn.LayerNorm):
            self._find_channels(layer, module, in_data, out)
        return None

    def _find_channels(
        self, layer: Layer, module: nn.LayerNorm, in_data: Tensor, out: Tensor
    ) -> None:
        """Which dimension does a subclass of LayerNorm normalize?"""
        if type(module).forward is nn.LayerNorm.forward or module in self._channels_first:
            return
        with torch.no_grad():
            for channels_first in (False, True):
                x = in_data.movedim(1, -1) if channels_first and in_data.ndim > 2 else in_data
                if x.shape[-len(module.normalized_shape) :] != tuple(module.normalized_shape):
                    continue
                y = F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
                y = y.movedim(-1, 1) if channels_first and in_data.ndim > 2 else y
                if torch.allclose(y.to(out.dtype), out, rtol=1e-2, atol=1e-3):
                    self._channels_first[module] = channels_first
                    return
        raise _something_else(layer, module, "LayerNorm")

    def _check_weight(self, layer: Layer, module: nn.Linear | nn.Conv2d, in_data: Tensor) -> None:
        """Whether the weight gradient of a subclass of a linear layer is that of such a layer of
        its input.
        """
        base: type[nn.Module] = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        forward = module.__dict__.get("forward") or type(module).forward
        known = forward is base.forward or (getattr(forward, "__module__", "") or "").startswith(
            OURS
        )
        if known or module in self._plain or not module.weight.requires_grad:
            return
        found, expected = _weight_grads(layer, module, in_data)
        off = math.inf if found is None or expected is None else float((found - expected).norm())
        if expected is None or not off <= 1e-2 * float(expected.norm()):
            raise _something_else(layer, module, base.__name__, " with its weight")
        self._plain.add(module)


def _something_else(layer: Layer, module: nn.Module, base: str, with_what: str = "") -> LayerError:
    return LayerError(
        layer.name,
        f"is a subclass of {base} that computes something else{with_what}",
        f"Leave it to the first-order optimizer with ignore_modules=['{layer.name}'].",
        kind=type(module).__name__,
    )


def _edge_of_batch_norm(
    layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor
) -> GradientEdge | None:
    """Of a subclass that adds an activation, as timm's do: the output of the normalization."""
    if has_plain_forward(module):
        return None
    edge = batch_norm_edge(module, in_data, out)
    if edge is None:
        raise _something_else(layer, module, "BatchNorm")
    return edge


def _weight_grads(
    layer: Layer, module: nn.Linear | nn.Conv2d, in_data: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the layer's weight for some gradient of its output, as autograd has it and as
    it would be for a plain layer; ``None`` where there is none.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [in_data.device] if in_data.device.type != "cpu" else []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type=in_data.device.type):
            out = first_tensor(layer.name, module, "outputs", module.forward(in_data.detach()))
            cotangent = torch.arange(out.numel(), device=out.device).sin()
            cotangent = cotangent.view_as(out).to(out.dtype)
            (found,) = torch.autograd.grad(out, module.weight, cotangent, allow_unused=True)
            return found, _plain_weight_grad(module, in_data.detach(), cotangent)
    except TypeError:  # it wants more arguments
        return None, None
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def _plain_weight_grad(
    module: nn.Linear | nn.Conv2d, in_data: Tensor, cotangent: Tensor
) -> Tensor | None:
    """What the gradient of a plain layer's weight would be; ``None`` if its output would have other
    sizes.
    """
    if isinstance(module, nn.Linear):
        dtype = module.weight.dtype
        return cotangent.flatten(0, -2).mT.to(dtype) @ in_data.flatten(0, -2).to(dtype)
    out = nn.Conv2d.forward(module, in_data)
    if out.shape != cotangent.shape:  # padded by itself, as TensorFlow's "same" is
        return None
    (grad,) = torch.autograd.grad(out, module.weight, cotangent.to(out.dtype))
    return grad
