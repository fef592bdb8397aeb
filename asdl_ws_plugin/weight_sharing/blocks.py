"""Linear layers whose weight is a part of a Parameter that another module owns.

Attention modules keep the query, key and value weights in one Parameter, GPT-2 keeps its weights
transposed. The optimizer, ``state_dict`` and data-parallel wrappers hold those Parameters, so they
stay; a :class:`LinearBlock` is a child module without Parameters of its own that hooks can see and
whose ``weight`` and ``weight.grad`` are views.

What else has to know: :func:`weight_key` for layers that hold the same weight, :func:`has_blocks`
for the module that owns the weight and is not a layer itself any more.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BlocksForward",
    "LinearBlock",
    "blocks_of",
    "call_block",
    "has_blocks",
    "input_group",
    "is_trainable",
    "lent_to",
    "parameters_of",
    "weight_key",
]

_OWN: Any = object()


def _refuse_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "The weight and bias of a LinearBlock are views for reading and preconditioning; autograd "
        "cannot reach the Parameter through them. Use the Parameter of the module that owns the "
        "block, such as in_proj_weight."
    )


class LinearBlock(nn.Linear):
    """One block of a larger linear layer, as an ``nn.Linear`` without Parameters of its own.

    ``weight`` of shape ``(out_features, in_features)`` and ``bias`` of shape ``(out_features,)``
    are views of the owner's Parameters, the same objects on every access. ``weight.grad`` is a view
    of the owner's gradient, or None where that has none: what changes it in place changes the
    gradient that the optimizer sees. The forward pass reads the owner's Parameters themselves, so
    their gradients are those of the layer that was there before.

    Args:
        owner: the module that has the Parameters.
        weight: the name of its weight, ``(num_blocks * out_features, in_features)``, transposed
            with ``transposed``.
        bias: the name of its bias, ``(num_bias_blocks * out_features,)``.
        index: which of the blocks.
        num_blocks: how many there are in the weight.
        num_bias_blocks: how many there are in the bias; by default as many as in the weight.
        transposed: the weight is stored as ``(in_features, out_features)``.
    """

    _owner: nn.Module
    _views: dict[str, nn.Parameter]

    def __init__(
        self,
        owner: nn.Module,
        weight: str,
        bias: str,
        index: int,
        num_blocks: int,
        num_bias_blocks: int | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        # Not a child, or the module tree would have a cycle.
        self.__dict__["_owner"] = owner
        self._names = {"weight": weight, "bias": bias}
        self._index = index
        self._num_blocks = {"weight": num_blocks, "bias": num_bias_blocks or num_blocks}
        self.transposed = transposed
        self.__dict__["_views"] = {}
        self.out_features, self.in_features = self.part("weight", getattr(owner, weight)).shape

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}  # a copy makes its own

    def part(self, kind: str, tensor: Tensor) -> Tensor:
        """This block's part of the owner's tensor, a view."""
        count = self._num_blocks[kind]
        if kind == "weight" and self.transposed:
            tensor = tensor.mT
        if count == 1:
            return tensor
        size = tensor.shape[0] // count
        return tensor.narrow(0, self._index * size, size)

    def owned(self, kind: str) -> nn.Parameter | None:
        """The Parameter that ``kind``, ``'weight'`` or ``'bias'``, is a part of."""
        return getattr(self._owner, self._names[kind])

    def places(self) -> list[tuple[nn.Module, str]]:
        """Where these Parameters are: the module and their names."""
        return [(self._owner, name) for name in self._names.values()]

    def forget_views(self) -> None:
        """Let go of the gradients that the views are of."""
        for view in self._views.values():
            view.grad = None

    def _view(self, kind: str) -> Any:
        parameter = self.owned(kind)
        if parameter is None or (
            self._num_blocks[kind] == 1 and not (kind == "weight" and self.transposed)
        ):
            return parameter
        whole: Any = parameter.detach()
        is_divided = hasattr(whole, "device_mesh")
        if is_divided:  # by fully_shard: a part has sizes only, and no rank has to wait for it
            whole = whole.to_local().new_zeros(()).expand(whole.shape)
        data = self.part(kind, whole)
        view = self._views.get(kind)
        if view is None or view.dtype != data.dtype or view.device != data.device:
            view = self._views[kind] = nn.Parameter(data)
            view.register_hook(_refuse_gradient)
        view.grad = None
        view.data = data
        view.requires_grad_(parameter.requires_grad)
        if parameter.grad is not None and not is_divided:
            view.grad = self.part(kind, parameter.grad)
        return view

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The block's weight, ``(out_features, in_features)``."""
        return self._view("weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The block's bias, ``(out_features,)``, or None."""
        return self._view("bias")

    def forward(
        self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``.

        The owner hands over the parts it cut out of its Parameters; it cuts them at once, which
        autograd does with one operation instead of one for each block.
        """
        if weight is None:
            owned_weight, owned_bias = self.owned("weight"), self.owned("bias")
            assert owned_weight is not None
            weight = self.part("weight", owned_weight)
            bias = None if owned_bias is None else self.part("bias", owned_bias)
        return F.linear(input, weight, bias)

    def extra_repr(self) -> str:
        """PyTorch's, with the place in the whole weight."""
        return f"{super().extra_repr()}, block {self._index} of {self._names['weight']}"


class BlocksForward:
    """The ``forward`` of a layer that was cut into blocks: calls the blocks, which are its
    children.

    Set as an attribute of the layer's instance. ``bias`` replaces the layer's own, for callers that
    compute ``F.linear(x, layer.weight, another_bias)``.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...], transposed: bool = False) -> None:
        self.owner, self.names, self.transposed = owner, names, transposed
        self.running = False

    def __call__(self, input: Tensor, bias: Tensor | None = _OWN) -> Tensor:
        """The layer as a call of each of its blocks, their outputs side by side."""
        owner, count = self.owner, len(self.names)
        bias = getattr(owner, "bias", None) if bias is _OWN else bias
        weight: Any = owner.weight.mT if self.transposed else owner.weight
        biases = [None] * count if bias is None else bias.chunk(count)
        self.running = True
        try:
            outs = [
                call_block(getattr(owner, name), input, w, b)
                for name, w, b in zip(self.names, weight.chunk(count), biases, strict=True)
            ]
        finally:
            self.running = False
        return outs[0] if count == 1 else torch.cat(outs, dim=-1)


def call_block(block: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call a child that is a :class:`LinearBlock`, or whatever the user put into its place."""
    return block(input, weight, bias) if isinstance(block, LinearBlock) else block(input)


def blocks_of(module: nn.Module) -> list[LinearBlock]:
    """The blocks that a module's own Parameters were cut into."""
    return [
        child
        for child in module.children()
        if isinstance(child, LinearBlock) and child._owner is module
    ]


def has_blocks(module: nn.Module) -> bool:
    """Whether the module's weight belongs to its blocks, so that it is no layer itself."""
    return bool(blocks_of(module))


def weight_key(module: nn.Module) -> Hashable | None:
    """Equal for two modules that hold the same weight; ``None`` for a module without one."""
    if isinstance(module, LinearBlock):
        count = module._num_blocks["weight"]
        whole = count == 1 and not module.transposed
        return (
            id(module.owned("weight"))
            if whole
            else (id(module.owned("weight")), module._index, count, module.transposed)
        )
    weight = getattr(module, "weight", None)
    return None if weight is None else id(weight)


def input_group(module: nn.Module) -> nn.Module | None:
    """What a block shares its input with its siblings through: the layer they were cut from, or
    ``None``.
    """
    if not isinstance(module, LinearBlock):
        return None
    forward = module._owner.__dict__.get("forward")
    return module._owner if isinstance(forward, BlocksForward) and len(forward.names) > 1 else None


def is_trainable(module: nn.Module) -> bool:
    """Whether a layer's weight or bias requires a gradient."""
    block = module if isinstance(module, LinearBlock) else None
    both = (
        getattr(module, kind, None) if block is None else block.owned(kind)
        for kind in ("weight", "bias")
    )
    return any(p is not None and p.requires_grad for p in both)


def lent_to(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that a layer uses as its own and the module around it holds, as a converted
    ``GCNConv`` its bias.
    """
    return [p for p in (module.__dict__.get("bias"),) if isinstance(p, nn.Parameter)]


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """A layer's weight and bias, with what ``parameters()`` does not list: views, and what was lent
    to it.
    """
    if isinstance(module, LinearBlock):
        return [p for p in (module.weight, module.bias) if p is not None]
    return [*module.parameters(recurse=False), *lent_to(module)]
