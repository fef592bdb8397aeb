"""A step is a transaction: one that fails, or is interrupted anywhere, leaves everything as it was.

And whose curvature it is: modules carry that of one gradient maker at a time, where users find it
(``module.fisher``); each maker has its own all the same.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import nn

from .capture import remove_hooks
from .matrices import copy_inverses
from .torch_private import function_modes, set_function_modes

__all__ = ["Snapshot", "carry", "curvature_of", "put_aside"]

# module -> the gradient maker whose curvature it carries
_carried: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _maker_of(module: nn.Module) -> Any:
    reference = _carried.get(module)
    return None if reference is None else reference()


def curvature_of(maker: Any) -> dict[nn.Module, SymMatrix]:
    """A gradient maker's own curvature, of every module that has one."""
    found = {}
    for module in maker.model.modules():
        is_carried = _maker_of(module) is maker
        matrix = maker._get_module_fisher(module) if is_carried else maker.put_aside.get(module)
        if matrix is not None:
            found[module] = matrix
    return found


def carry(maker: Any) -> None:
    """Let the modules of a maker's model carry its curvature; that of another one is put aside."""
    for module in maker.model.modules():
        other = _maker_of(module)
        if other is not maker:
            _put_aside(module, other)
            _set(maker, module, maker.put_aside.pop(module, None))
            _carried[module] = weakref.ref(maker)


def put_aside(model: nn.Module) -> None:
    """Let the modules carry nobody's curvature, as before something is computed that is not a
    gradient maker's.
    """
    for module in model.modules():
        other = _maker_of(module)
        if other is not None:
            _put_aside(module, other)
            _set(other, module, None)
            del _carried[module]


def _put_aside(module: nn.Module, maker: Any) -> None:
    matrix = None if maker is None else maker._get_module_fisher(module)
    if matrix is not None:
        maker.put_aside[module] = matrix


def _set(maker: Any, module: nn.Module, matrix: SymMatrix | None) -> None:
    if matrix is not None:
        maker._set_module_fisher(module, matrix)
    elif maker._get_module_fisher(module) is not None:
        delattr(module, maker._fisher_attr)


class Snapshot:
    """What a step of a gradient maker may change. Making one changes nothing.

    Args:
        with_grads: gradients belong to it.
    """

    def __init__(self, maker: Any, with_grads: bool = True) -> None:
        self.maker = maker
        self.step = maker.state["step"]
        self.grads = {p: p.grad for p in maker.parameters()} if with_grads else {}
        self.sums: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_added = False
        self.matrices = {m: maker._get_module_fisher(m) for m in maker.model.modules()}
        self.inverses = [
            entry
            for matrix in self.matrices.values()
            if matrix is not None
            for entry in copy_inverses(matrix)
        ]
        fisher_maker = maker.fisher_maker
        self.of_fisher_maker = {
            name: getattr(fisher_maker, name) for name in ("unseen", "decay", "draws")
        }
        self.forget = maker.plan.remember()
        # what a context manager that was interrupted as it was entered may have changed
        self.grad_mode = torch.is_grad_enabled()
        self.modes = function_modes()
        # a NaN would stay in running averages
        self.buffers = [(buffer, buffer.clone()) for buffer in maker.model.buffers()]

    def set_aside_grads(self) -> None:
        """Only this step's gradient is preconditioned, so those that are already there wait."""
        for p in self.grads:
            p.grad = None

    def add_grads(self) -> None:
        """Add this step's gradients, once, to those that were there, in the same tensors."""
        if self.are_added:
            return
        self.are_added = True
        held = [(p, grad) for p, grad in self.grads.items() if grad is not None]
        self.sums = [(grad, grad.clone()) for p, grad in held if p.grad is not None]
        for p, grad in held:
            p.grad = grad if p.grad is None else grad.add_(p.grad)

    def restore(self) -> None:
        """Put everything back, however often this is interrupted."""
        while True:
            try:
                self._restore()
                return
            except KeyboardInterrupt:  # the first one is on its way to the user
                continue

    def _restore(self) -> None:
        maker = self.maker
        set_function_modes(self.modes)
        torch.set_grad_enabled(self.grad_mode)
        with torch.no_grad():
            for tensor, copy in (*self.sums, *self.buffers):
                tensor.copy_(copy)
        for p, grad in self.grads.items():
            p.grad = grad
        for module, matrix in self.matrices.items():
            _set(maker, module, matrix)
        for holder, name, inverse in self.inverses:
            setattr(holder, name, inverse)
        for name, value in self.of_fisher_maker.items():
            setattr(maker.fisher_maker, name, value)
        maker.state["step"] = self.step
        self.forget()
        remove_hooks(maker.model)
