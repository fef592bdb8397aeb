"""PyTorch's private names that this package depends on: each once, with its reason.

All of them are as they are here from PyTorch 2.5 to 2.14, unless a version is given. What replaces
one of them belongs here, too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

__all__ = [
    "AnyBatchNorm",
    "active_wrapper",
    "add_outermost_function_mode",
    "averages_gradients",
    "base_of",
    "canonical_mask",
    "eagerly",
    "foreach_mul_",
    "foreach_norm",
    "function_modes",
    "has_global_hooks",
    "has_own_hooks",
    "has_plain_forward",
    "index_of",
    "is_batched_attention",
    "is_called_by_grad_scaler",
    "is_sharded_by_fsdp1",
    "own_buffers",
    "own_parameters",
    "padding_of",
    "remove_forward_hooks",
    "remove_function_mode",
    "reshards_after_backward",
    "set_function_modes",
    "unwrapped",
    "version_of",
]

# Many tensors in one call, as torch's own optimizers and clip_grad_norm_ have it.
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm

# The class of all batch normalization; the public ones have no base class but this.
AnyBatchNorm = _BatchNorm


def index_of(node: Any) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]] | None:
    """The indices that a function of the autograd graph applied, ``None`` for a whole dimension,
    and the sizes of what it applied them to; ``None`` if it is no such function, or its graph was
    let go of.
    """
    try:
        if node.name() == "IndexBackward0":
            indices, sizes = tuple(node._saved_indices), node._saved_self_sym_sizes
        elif node.name() == "IndexSelectBackward0":
            dim = node._saved_dim % len(node._saved_self_sym_sizes)
            indices, sizes = (*[None] * dim, node._saved_index), node._saved_self_sym_sizes
        else:
            return None
    except RuntimeError:
        return None
    return indices, tuple(int(size) for size in sizes)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to: autograd's counter, the only sign of an in-place
    operation.
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this is a view of; F.linear returns views of what it computes."""
    return tensor._base


def padding_of(conv: Any) -> tuple[int, ...]:
    """A convolution's padding as :func:`F.pad` takes it; resolves ``'same'`` as the layer did."""
    return conv._reversed_padding_repeated_twice


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers, also those that are None, in the dict where they can be replaced."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's Parameters without those that parametrizations or properties make."""
    return module._parameters


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a batch normalization runs PyTorch's own ``forward``."""
    return type(module).forward is _BatchNorm.forward and "forward" not in module.__dict__


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a hook was registered with the module; there is no public list of them."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether a hook was registered for all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_batched_attention(*arguments: Any) -> bool:
    """What nn.MultiheadAttention says of its arguments' sizes; raises what it raises."""
    return F._mha_shape_check(*arguments)  # type: ignore[attr-defined]


def canonical_mask(
    mask: Tensor | None, name: str, dtype: torch.dtype, other: Tensor | None = None
) -> Tensor | None:
    """A mask of nn.MultiheadAttention as numbers to add; raises what it raises.

    Args:
        other: the mask that has to be of the same type, ``attn_mask``; ``None``: not compared.
    """
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other),
        other_name="attn_mask" if other is not None else "",
        target_type=dtype,
        check_other=other is not None,
    )


def unwrapped(model: Any) -> Any:
    """The model inside of what DistributedDataParallel, DataParallel and torch.compile made of it.

    A compiled module has the one it was made of under a private name.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def active_wrapper() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass goes on; nothing else leads from the module
    inside to it.
    """
    return nn.parallel.DistributedDataParallel._active_ddp_module


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Whatever was compiled runs as if it were not."""
    if "torch._dynamo" not in sys.modules:
        yield
    elif hasattr(torch.compiler, "set_stance"):  # PyTorch 2.6
        with torch.compiler.set_stance("force_eager"):
            yield
    else:  # PyTorch 2.5
        eval_frame: Any = sys.modules["torch._dynamo.eval_frame"]
        set_callback = eval_frame._maybe_set_eval_frame
        eval_frame._maybe_set_eval_frame = lambda callback: set_callback(None)
        try:
            yield
        finally:
            eval_frame._maybe_set_eval_frame = set_callback


def is_called_by_grad_scaler() -> bool:
    """Whether a function mode sees a call of ``GradScaler.scale``, which multiplies a loss with a
    tensor and leaves no other mark on it.
    """
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back  # a mode's method, and that of the class it extends
    return frame is not None and frame.f_globals.get("__name__") == "torch.amp.grad_scaler"


def add_outermost_function_mode(mode: TorchFunctionMode) -> None:
    """Put a mode below all others, so that those which are active now can be left before it:
    leaving one takes off the uppermost, whichever that is. That of ``set_default_device`` stays the
    lowest, where it looks for itself.
    """
    modes = function_modes()
    of_device = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    above = 1 if modes and modes[0] is of_device else 0
    set_function_modes([*modes[:above], mode, *modes[above:]])


def remove_function_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack wherever it is there: others may have been entered since, and
    ``__exit__`` would take off the uppermost.
    """
    set_function_modes([other for other in function_modes() if other is not mode])


def remove_forward_hooks(module: nn.Module, are_wanted: Callable[[Any], bool]) -> None:
    """Remove the forward hooks for which this is true, also half registered ones."""
    for key in [key for key, hook in module._forward_hooks.items() if are_wanted(hook)]:
        for table in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ):
            table.pop(key, None)


def function_modes() -> list[Any]:
    """The TorchFunctionModes that are active, the innermost last."""
    return overrides._get_current_function_mode_stack()


def set_function_modes(wanted: list[Any]) -> None:
    """Let these be the modes that are active."""
    if function_modes() == wanted:
        return
    while overrides._len_torch_function_stack():
        overrides._pop_mode()
    for mode in wanted:
        overrides._push_mode(mode)


def is_sharded_by_fsdp1(p: nn.Parameter) -> bool:
    """Whether FullyShardedDataParallel has a Parameter's values, or a part of them."""
    return getattr(p, "_fsdp_flattened", False)


def reshards_after_backward(unit: Any) -> bool:
    """What ``set_reshard_after_backward`` of a module that ``fully_shard`` was called on has set;
    it can only be set.
    """
    return all(group.reshard_after_backward for group in _groups_of(unit))


def averages_gradients(unit: Any) -> bool:
    """Whether the backward pass of a module that ``fully_shard`` was called on averages gradients:
    ``set_gradient_divide_factor`` has set nothing else; it can only be set.
    """
    factors = (getattr(group, "gradient_divide_factor", None) for group in _groups_of(unit))
    return all(factor is None for factor in factors)


def _groups_of(unit: Any) -> list[Any]:
    """The Parameters that are gathered together."""
    state = unit._get_fsdp_state()
    # Older versions have one at most.
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups
    return [group for group in groups if group is not None]
