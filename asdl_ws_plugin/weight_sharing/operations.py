"""ASDL operations for weight sharing: thin classes that hand ASDL's names to :mod:`~.factors`.

Every operation gets ``in_data`` of shape ``(N, R, P)`` and ``out_grads`` of shape ``(N, R, Q)`` (a
convolution also the image ``(N, C, H, W)``, a normalization layer its input in the same layout) and
returns sums over the examples, which ASDL multiplies with its scale. An example's gradient is the
sum over its positions in every shape but ``kron``, where ``expand`` and ``reduce`` are two
approximations of it.

:class:`WeightSharingOperation` is what the stages may ask of any operation. One that is not of this
package, a user's, gets what it lacks by :func:`completed`.
"""

# mypy: disable-error-code="override,attr-defined,misc"
# ASDL calls these methods on an instance and declares them static, or the other way round.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from asdl import operations as upstream
from torch import Tensor, nn

from . import factors
from .errors import LayerError, LayerFault, LayerRuntimeError
from .names import OURS
from .ragged import Ragged
from .registry import ANY_STRATEGY, register_operation

__all__ = [
    "BatchNorm",
    "Conv2dExpand",
    "Conv2dReduce",
    "Embedding",
    "ExpandFactors",
    "LayerNorm",
    "LinearExpand",
    "LinearReduce",
    "WeightSharingOperation",
    "completed",
]

EXPAND, REDUCE = "expand", "reduce"


class WeightSharingOperation:
    """What the stages ask of an operation, beside ASDL's own methods, with defaults.

    Attributes:
        layer_name: of the layer, for messages.
        shares_A: layers of this operation that saw the same input have the same A.
        splits: the factors of a part of the features are a block of the whole factors.
    """

    layer_name = ""
    shares_A = False
    splits = False

    @staticmethod
    def num_feature_dims(module: Any) -> int:
        """How many trailing dimensions of the layer's tensors are features."""
        return 1

    def prepare_in_data(self, module: Any, in_data: Tensor) -> Tensor:
        """The input before it is arranged, ``(*, P)``."""
        return in_data

    def ragged_in_data(self, in_data: Tensor, ragged: Ragged) -> tuple[Tensor, float]:
        """``(N, R, P)`` of what is ragged, and a factor for A."""
        return ragged.pad(in_data), 1.0

    def ragged_out_grads(self, out_grads: Tensor, ragged: Ragged) -> Tensor:
        """``(N, R, Q)`` of what is ragged."""
        return ragged.pad(out_grads)


class _SumOverPositions(WeightSharingOperation):
    """What does not depend on the approximation: everything that is made of the examples'
    gradients.
    """

    splits = True

    def _only_kron(self) -> bool:
        """Whether nothing is asked for that is made of the examples' gradients."""
        return not any(name in upstream.BWD_OPS_WITH_INPUTS for name in self._op_names)

    @staticmethod
    def preprocess_in_data(module: Any, in_data: Tensor, out_data: Tensor) -> Tensor:
        return in_data

    @staticmethod
    def preprocess_out_grads(module: Any, out_grads: Tensor) -> Tensor:
        return out_grads

    @staticmethod
    def extend_in_data(in_data: Tensor) -> Tensor:
        return torch.cat([in_data, in_data.new_ones(*in_data.shape[:-1], 1)], dim=-1)

    @staticmethod
    def batch_grads_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        grads = factors.per_example_grads(in_data, out_grads)
        return grads.view(-1, *module.weight.shape)

    @staticmethod
    def batch_grads_bias(module: Any, out_grads: Tensor) -> Tensor:
        return factors.position_sum(out_grads)

    @staticmethod
    def cov_diag_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        return factors.per_example_square_sum(in_data, out_grads).view_as(module.weight)

    @staticmethod
    def cov_diag_bias(module: Any, out_grads: Tensor) -> Tensor:
        return factors.position_sum(out_grads).square().sum(0)

    @staticmethod
    def cov_unit_wise(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        per_unit = factors.per_example_grads(in_data, out_grads).transpose(0, 1)  # Q x N x P
        return per_unit.mT @ per_unit  # Q x P x P

    # Eigenvectors are those of the factors; the eigenvalues are the second moments of the examples'
    # gradients.
    def cov_kfe_A(self, module: Any, in_data: Tensor) -> Tensor:
        return torch.linalg.eigh(self.cov_kron_A(module, in_data))[1]

    def cov_kfe_B(self, module: Any, out_grads: Tensor) -> Tensor:
        return torch.linalg.eigh(self.cov_kron_B(module, out_grads))[1]

    def cov_kfe_scale(
        self,
        module: Any,
        in_data: Tensor,
        out_grads: Tensor,
        Ua: Tensor,
        Ub: Tensor,
        bias: bool = True,
    ) -> tuple[Tensor, ...]:
        in_data, out_grads = in_data.to(Ua.dtype) @ Ua, out_grads.to(Ub.dtype) @ Ub
        scale: tuple[Tensor, ...] = (
            factors.per_example_square_sum(in_data, out_grads) * self._cov_scale,
        )
        if bias:
            scale += (factors.position_sum(out_grads).square().sum(0) * self._cov_scale,)
        return scale

    # Upstream's swift variant saves work where there are fewer rows than features, for the same
    # preconditioner. With positions there rarely are, and its moving average is wrong, so the
    # factors are the square ones.
    def cov_swift_kron_A(self, module: Any, in_data: Tensor) -> Tensor:
        return self.cov_kron_A(module, in_data)

    def cov_swift_kron_B(self, module: Any, out_grads: Tensor) -> Tensor:
        return self.cov_kron_B(module, out_grads)


class ExpandFactors:
    """K-FAC-expand, eq. 3.7."""

    def ragged_in_data(self, in_data: Tensor, ragged: Ragged) -> tuple[Tensor, float]:
        """What A is computed from where R_n differs by example, and a factor for it (section
        3.4).
        """
        if not self._only_kron() or ragged.num_positions == 0:
            return ragged.pad(in_data), 1.0
        return ragged.rows(in_data).unsqueeze(0), float(ragged.num_examples)

    def ragged_out_grads(self, out_grads: Tensor, ragged: Ragged) -> Tensor:
        """What B is computed from where R_n differs by example (section 3.4)."""
        return ragged.rows(out_grads).unsqueeze(0) if self._only_kron() else ragged.pad(out_grads)

    @staticmethod
    def cov_kron_A(module: Any, in_data: Tensor) -> Tensor:
        """A of eq. 3.7, ``(P, P)``."""
        return factors.expand_factor_A(in_data)

    @staticmethod
    def cov_kron_B(module: Any, out_grads: Tensor) -> Tensor:
        """B of eq. 3.7, ``(Q, Q)``."""
        return factors.expand_factor_B(out_grads)


class _Reduce:
    """K-FAC-reduce, eq. 3.19."""

    def ragged_in_data(self, in_data: Tensor, ragged: Ragged) -> tuple[Tensor, float]:
        """What A is computed from where R_n differs by example (eq. 3.34), and a factor for it."""
        return (
            ragged.mean(in_data).unsqueeze(1) if self._only_kron() else ragged.pad(in_data)
        ), 1.0

    def ragged_out_grads(self, out_grads: Tensor, ragged: Ragged) -> Tensor:
        return ragged.sum(out_grads).unsqueeze(1) if self._only_kron() else ragged.pad(out_grads)

    @staticmethod
    def cov_kron_A(module: Any, in_data: Tensor) -> Tensor:
        return factors.reduce_factor_A(in_data)

    @staticmethod
    def cov_kron_B(module: Any, out_grads: Tensor) -> Tensor:
        return factors.reduce_factor_B(out_grads)


class LinearExpand(ExpandFactors, _SumOverPositions, upstream.Linear):
    """K-FAC-expand for ``nn.Linear``. in_data: ``N x R x f_in``; out_grads: ``N x R x f_out``."""

    shares_A = True


class LinearReduce(_Reduce, _SumOverPositions, upstream.Linear):
    """K-FAC-reduce for ``nn.Linear``. in_data: ``N x R x f_in``; out_grads: ``N x R x f_out``."""

    shares_A = True


class _Conv2d(_SumOverPositions, upstream.Conv2d):
    """A convolution is a linear layer that shares its weight over its output positions.

    in_data: ``N x C x H x W`` or patches ``N x R x (C kh kw)``; out_grads: ``N x R x C_out``.
    """

    def preprocess_in_data(self, module: Any, in_data: Tensor, out_data: Tensor) -> Tensor:
        return factors.patches(in_data, module) if in_data.ndim == 4 else in_data

    # A group's outputs see the patches of its own channels only. What follows the patches are ones,
    # for the bias.
    @staticmethod
    def _groups(module: Any, in_data: Tensor, out_grads: Tensor) -> list[tuple[Tensor, Tensor]]:
        if module.groups == 1:
            return [(in_data, out_grads)]
        num_features = module.groups * module.weight[0].numel()
        inputs, ones = in_data[..., :num_features], in_data[..., num_features:]
        return [
            (torch.cat([a, ones], dim=-1), b)
            for a, b in zip(
                inputs.chunk(module.groups, -1), out_grads.chunk(module.groups, -1), strict=True
            )
        ]

    @staticmethod
    def batch_grads_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        grads = [
            factors.per_example_grads(a, b) for a, b in _Conv2d._groups(module, in_data, out_grads)
        ]
        return torch.cat(grads, dim=1).view(-1, *module.weight.shape)

    @staticmethod
    def cov_diag_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        sums = [
            factors.per_example_square_sum(a, b)
            for a, b in _Conv2d._groups(module, in_data, out_grads)
        ]
        return torch.cat(sums).view_as(module.weight)

    @staticmethod
    def cov_unit_wise(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        groups = _Conv2d._groups(module, in_data, out_grads)
        return torch.cat([_SumOverPositions.cov_unit_wise(module, a, b) for a, b in groups])


class Conv2dExpand(ExpandFactors, _Conv2d):
    """K-FAC-expand for ``nn.Conv2d`` (which is ASDL's K-FAC for convolutions)."""


class Conv2dReduce(_Reduce, _Conv2d):
    """K-FAC-reduce for ``nn.Conv2d``."""

    def preprocess_in_data(self, module: Any, in_data: Tensor, out_data: Tensor) -> Tensor:
        """The mean patch, ``(N, 1, P)``, where A alone is wanted; else the patches."""
        if (
            self._only_kron() and in_data.ndim == 4
        ):  # the mean patch is all that A needs, and has no positions left
            return factors.mean_patches(in_data, module)
        return super().preprocess_in_data(module, in_data, out_data)


class _Normalization(_SumOverPositions):
    """Layers that multiply their normalized input elementwise: in_data and out_grads ``N x R x
    features``.

    The normalized input is computed from the input. Upstream restores it from the output, which is
    wrong after an in-place operation and not finite where the weight is 0.
    """

    @staticmethod
    def normalized(module: Any, in_data: Tensor) -> Tensor:
        raise NotImplementedError

    def prepare_in_data(self, module: Any, in_data: Tensor) -> Tensor:
        """The normalized input, before positions are arranged: statistics may be those of the whole
        batch.
        """
        return self.normalized(module, in_data.to(factors.accumulation_dtype(in_data.dtype)))

    @staticmethod
    def extend_in_data(in_data: Tensor) -> Tensor:
        return in_data

    @staticmethod
    def batch_grads_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        return (in_data * out_grads).sum(1).view(-1, *module.weight.shape)

    @staticmethod
    def batch_grads_bias(module: Any, out_grads: Tensor) -> Tensor:
        return factors.position_sum(out_grads).view(-1, *module.bias.shape)

    def cov_diag_weight(self, module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        return self.batch_grads_weight(module, in_data, out_grads).square().sum(0)

    def cov_diag_bias(self, module: Any, out_grads: Tensor) -> Tensor:
        return self.batch_grads_bias(module, out_grads).square().sum(0)

    def cov_unit_wise(self, module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        grads = torch.stack(
            [
                self.batch_grads_weight(module, in_data, out_grads).flatten(1),
                self.batch_grads_bias(module, out_grads).flatten(1),
            ],
            dim=2,
        )  # N x features x 2
        return torch.einsum("nfi,nfj->fij", grads, grads)


class LayerNorm(_Normalization, upstream.LayerNorm):
    """``nn.LayerNorm`` and its subclasses. in_data and out_grads: ``N x R x features``."""

    @staticmethod
    def num_feature_dims(module: Any) -> int:
        """As many trailing dimensions as are normalized."""
        return len(module.normalized_shape)

    @staticmethod
    def normalized(module: Any, in_data: Tensor) -> Tensor:
        """The normalized input, before weight and bias."""
        return F.layer_norm(in_data, in_data.shape[-1:], eps=module.eps)


class BatchNorm(_Normalization, upstream.BatchNorm1d):
    """``nn.BatchNorm1d`` and ``nn.BatchNorm2d``. in_data: ``N x R x C``; all positions are
    normalized jointly.
    """

    @staticmethod
    def normalized(module: Any, in_data: Tensor) -> Tensor:
        """The normalized input, before weight and bias."""
        mean, var = module.running_mean, module.running_var
        use_batch = module.training or mean is None
        flat = in_data.reshape(-1, in_data.shape[-1])
        if use_batch:
            mean, var = None, None
        return F.batch_norm(
            flat, mean, var, training=use_batch, momentum=0.0, eps=module.eps
        ).view_as(in_data)


class Embedding(_SumOverPositions, upstream.Embedding):
    """``nn.Embedding`` in the shapes made of the examples' gradients. in_data: ids ``N x R``;
    out_grads ``N x R x E``.

    ``kron`` is not offered: its A would be a matrix of vocabulary size squared.
    """

    supported_operations = upstream.Embedding.supported_operations - {upstream.OP_COV_KRON}

    @staticmethod
    def batch_grads_weight(module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        """Each example its own gradient: its rows added up by id, ``(N, ids, features)``."""
        dtype = factors.accumulation_dtype(out_grads.dtype)
        out_grads = out_grads.to(dtype)
        if module.padding_idx is not None:
            out_grads = out_grads * (in_data != module.padding_idx).unsqueeze(-1)
        grads = out_grads.new_zeros(in_data.shape[0], *module.weight.shape)
        return grads.scatter_add_(1, in_data.unsqueeze(-1).expand_as(out_grads), out_grads)

    def cov_diag_weight(self, module: Any, in_data: Tensor, out_grads: Tensor) -> Tensor:
        """The squares of the single gradients, one example in memory at a time."""
        total = torch.zeros_like(module.weight, dtype=factors.accumulation_dtype(out_grads.dtype))
        for ids, grads in zip(in_data.split(1), out_grads.split(1), strict=True):
            total += self.batch_grads_weight(module, ids, grads)[0].square()
        return total


# ------------------------------------------------------------------------------- those of the user


class _Foreign:
    """Goes before a user's operation: says which layer it failed for, and on what."""

    shares_A = False
    splits = False

    def forward_post_process(self, in_data: Tensor, out_data: Any) -> None:
        try:
            super().forward_post_process(in_data, out_data)
        except Exception as error:
            self._name_layer(error, "in_data", in_data)
            raise

    def backward_pre_process(self, out_grads: Tensor, vector: Any = None) -> None:
        try:
            super().backward_pre_process(out_grads, vector)
        except Exception as error:
            self._name_layer(error, "out_grads", out_grads)
            raise

    def _name_layer(self, error: Exception, what: str, data: Tensor) -> None:
        if not isinstance(error, LayerFault):
            raise LayerRuntimeError(
                self.layer_name,
                f"{type(self).__name__} failed with {what} of sizes {tuple(data.shape)}: "
                f"{type(error).__name__}: {error}",
            ) from error


class _ForeignKron(_Foreign):
    """Of a layer whose factors have known sizes: looks at what the user's operation returns.

    Upstream scales a factor in place, so it must not be a view of something else.
    """

    def cov_kron_A(self, module: Any, in_data: Tensor) -> Tensor:
        return self._checked("cov_kron_A", module.weight[0].numel(), module, in_data)

    def cov_kron_B(self, module: Any, out_grads: Tensor) -> Tensor:
        return self._checked("cov_kron_B", module.weight.shape[0], module, out_grads)

    def _checked(self, name: str, size: int, module: Any, data: Tensor) -> Tensor:
        method = getattr(super(), name)
        matrix = method(module, data)
        is_view = matrix.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
        if matrix.shape != (size, size) or is_view:
            raise LayerError(
                self.layer_name,
                f"{method.__qualname__} has to return a new matrix of sizes ({size}, {size}), got "
                f"{'a view of its argument' if is_view else tuple(matrix.shape)}",
            )
        return matrix


_completed: dict[tuple[Any, type[nn.Module]], Any] = {}


def completed(operation: Any, module_class: type[nn.Module]) -> Any:
    """The operation itself if it is of this package; a subclass of a user's with what it lacks.

    Args:
        operation: a subclass of ``asdl.Operation``.
        module_class: the class of the layer that it is for.
    """
    if operation.__module__.startswith(OURS):
        return operation
    key = operation, module_class
    if key not in _completed:
        has_factors = issubclass(module_class, (nn.Linear, nn.Conv2d))
        bases: tuple[Any, ...] = (_ForeignKron if has_factors else _Foreign, operation)
        if not issubclass(operation, WeightSharingOperation):
            bases = (*bases, WeightSharingOperation)
        names = {"__module__": operation.__module__, "__qualname__": operation.__qualname__}
        _completed[key] = type(operation.__name__, bases, names)
    return _completed[key]


def register_all() -> None:
    """Register the operations of this module."""
    register_operation(nn.Linear, LinearExpand, EXPAND)
    register_operation(nn.Linear, LinearReduce, REDUCE)
    register_operation(nn.Conv2d, Conv2dExpand, EXPAND)
    register_operation(nn.Conv2d, Conv2dReduce, REDUCE)
    register_operation(nn.LayerNorm, LayerNorm, ANY_STRATEGY)
    register_operation(nn.BatchNorm1d, BatchNorm, ANY_STRATEGY)
    register_operation(nn.BatchNorm2d, BatchNorm, ANY_STRATEGY)
    register_operation(nn.Embedding, Embedding, ANY_STRATEGY)
