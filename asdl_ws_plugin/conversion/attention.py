"""A drop-in for ``nn.MultiheadAttention`` whose projections are linear layers that hooks can see.

The thesis' W^Q, W^K and W^V (section 3.2) are layers of their own: children ``q_proj``, ``k_proj``,
``v_proj`` beside ``out_proj``. They are
:class:`~asdl_ws_plugin.weight_sharing.blocks.LinearBlock`: the Parameters and the ``state_dict``
are those of ``nn.MultiheadAttention``, by name and by identity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..weight_sharing.blocks import LinearBlock, call_block
from ..weight_sharing.torch_private import (
    canonical_mask,
    has_global_hooks,
    has_own_hooks,
    is_batched_attention,
)

__all__ = ["MultiheadAttention", "TransformerEncoder"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody wants to see this module's calls."""
    return has_own_hooks(module) or has_global_hooks()


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with linear layers ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``
    that are called.

    All options of the constructor and of the call are those of ``nn.MultiheadAttention``, outputs
    and gradients are equal to rounding, and the ``state_dict`` has the same keys, so checkpoints
    load both ways. It works wherever the original does, as in ``nn.TransformerEncoderLayer``.
    PyTorch's fused inference kernel, which calls no layers, is used for inference only: in
    evaluation mode, without gradients, and while nobody has hooks on the layers or has replaced
    one.

    Shapes:
        - query: ``(N, L, E)`` with ``batch_first``, else ``(L, N, E)``, or unbatched ``(L, E)``
        - key: ``(N, S, kdim)``, ``(S, N, kdim)`` or ``(S, kdim)``; value likewise with ``vdim``
        - output: as query; weights: ``(N, L, S)``, or ``(N, num_heads, L, S)`` with
          ``average_attn_weights=False``

    Raises:
        AssertionError, RuntimeError: as ``nn.MultiheadAttention``, for inputs and masks whose sizes
            do not match.
        ValueError: nested tensors, where the fused kernel cannot be used.

    >>> import torch, asdl_ws_plugin
    >>> attention = asdl_ws_plugin.MultiheadAttention(8, num_heads=2, batch_first=True)
    >>> x = torch.randn(4, 5, 8)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, [name for name, _ in attention.named_children()]
    (torch.Size([4, 5, 8]), ['out_proj', 'q_proj', 'k_proj', 'v_proj'])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_blocks()

    def add_blocks(self) -> None:
        """Give the module its children. Also called on an ``nn.MultiheadAttention`` that becomes
        one of these.
        """
        fused = self.in_proj_weight is not None
        for i, name in enumerate(PROJECTIONS):
            weight = "in_proj_weight" if fused else f"{name}_weight"
            block = LinearBlock(
                self, weight, "in_proj_bias", i, 3 if fused else 1, num_bias_blocks=3
            )
            block.train(self.training)
            self.add_module(name, block)

    # torch.nn.TransformerEncoderLayer reads this to decide whether its fused kernel, which skips
    # the layers, can be used. It checks for forward hooks, but not for backward hooks or layers
    # that were replaced.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.__dict__["_qkv_same_embed_dim"] and self._is_untouched()

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _is_untouched(self) -> bool:
        expected = {
            **dict.fromkeys(PROJECTIONS, LinearBlock),
            "out_proj": NonDynamicallyQuantizableLinear,
        }
        return all(
            child is not None
            and type(child) is expected.get(name)
            and "forward" not in child.__dict__
            and not has_hooks(child)
            for name, child in self._modules.items()
        )

    def _runs_fused(self, inputs: tuple[Tensor, ...]) -> bool:
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in (*inputs, *self.parameters())
        )
        return not self.training and not needs_grad and self._is_untouched()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``."""
        if self._runs_fused((query, key, value)):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if any(t.is_nested for t in (query, key, value)):
            raise ValueError(
                "MultiheadAttention: nested tensors are for inference only: evaluation mode, no "
                "gradients, no hooks on the projections. Pass padded tensors and a "
                "key_padding_mask."
            )
        is_batched = is_batched_attention(
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if not is_batched:
            batch_dim = 0 if self.batch_first else 1
            query, key, value = _unsqueezed((query, key, value), batch_dim)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check(query, key, value)
        seq_dim = 1 if self.batch_first else 0
        num_examples, target_len = query.shape[1 - seq_dim], query.shape[seq_dim]
        mask, is_causal = self._mask(
            query,
            key_padding_mask,
            attn_mask,
            is_causal,
            need_weights,
            (num_examples, target_len, key.shape[seq_dim]),
        )

        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat(
                    [x, b.expand(*(num_examples if d == 1 - seq_dim else 1 for d in (0, 1)), -1)],
                    dim=seq_dim,
                )
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (self._heads(x) for x in (q, k, v))  # n h l d
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, p=dropout) if dropout > 0.0 else weights
            attention = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            attention = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        # n h l d -> n l (h d), or l n (h d)
        attention = attention.transpose(1, 2) if self.batch_first else attention.permute(2, 0, 1, 3)
        output = self.out_proj(attention.flatten(2))
        if self.batch_first and self.training:
            # The original's output has this order in memory, in which a dropout that follows draws
            # its numbers.
            output = output.transpose(0, 1).contiguous().transpose(0, 1)
        if not is_batched:
            output = output.squeeze(1 - seq_dim)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (
            (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        )
        q, k, v = (
            call_block(getattr(self, name), x, weight, bias)
            for name, x, weight, bias in zip(
                PROJECTIONS, (query, key, value), weights, biases, strict=True
            )
        )
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        same = (
            key.shape == value.shape
            if self.in_proj_weight is not None
            else key.shape[:2] == value.shape[:2]
        )
        if not same:
            raise AssertionError(
                f"key's sizes {tuple(key.shape)} do not match value's {tuple(value.shape)}"
            )

    def _mask(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
        sizes: tuple[int, int, int],
    ) -> tuple[Tensor | None, bool]:
        """One additive mask that broadcasts against ``(N, num_heads, L, S)``, and whether to use
        the causal kernel.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer "
                "module method `generate_square_subsequent_mask` to create this mask."
            )
        num_examples, target_len, source_len = sizes
        padding = canonical_mask(key_padding_mask, "key_padding_mask", query.dtype, attn_mask)
        if is_causal and padding is None and not need_weights:
            return None, True
        mask = canonical_mask(attn_mask, "attn_mask", query.dtype)
        if mask is not None:
            expected: tuple[int, ...] = (target_len, source_len)
            if mask.ndim == 3:
                expected = (num_examples * self.num_heads, *expected)
            if mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {mask.ndim}D attn_mask is {tuple(mask.shape)}, but should "
                    f"be {expected}."
                )
            mask = (
                mask.view(num_examples, self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
            )
        if padding is not None:
            if padding.shape != (num_examples, source_len):
                raise AssertionError(
                    f"expecting key_padding_mask shape of {(num_examples, source_len)}, but got "
                    f"{tuple(padding.shape)}"
                )
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra))
        return mask, False


class TransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` that packs padded input into nested tensors only while nobody has
    hooks inside.

    PyTorch looks for hooks when it is too late to unpack them again.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """Whether the fused inference path is possible."""
        return self.__dict__["use_nested_tensor"] and not any(
            has_hooks(m) for m in self.layers.modules()
        )

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def _unsqueezed(tensors: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
    """The tensors with another dimension; one that occurs several times stays one tensor."""
    made: dict[int, Tensor] = {}
    return tuple(made.setdefault(id(t), t.unsqueeze(dim)) for t in tensors)
