"""What ranks send of a tensor, and what becomes of it on the other side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asdl_ws_plugin.weight_sharing.packing import Packed, buckets, unpack


def symmetric(*shape: int) -> Tensor:
    x = torch.randn(*shape)
    return x + x.mT


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 5), (3, 4, 4), (7, 1, 1)], ids=str)
def test_of_a_symmetric_matrix_one_triangle_is_sent(shape: tuple[int, ...]) -> None:
    matrix, side = symmetric(*shape), shape[-1]
    values = Packed(matrix, True).values()
    assert len(values) == Packed(matrix, True).numel == matrix.numel() * (side + 1) // (2 * side)
    received = torch.full(shape, torch.nan)
    Packed(received, True).take(values)
    assert torch.equal(received, matrix)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (3, 3)], ids=str)
def test_of_any_other_tensor_everything_is_sent(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    values = Packed(tensor).values()
    assert len(values) == Packed(tensor).numel == tensor.numel()
    received = torch.full(shape, torch.nan)
    Packed(received).take(values)
    assert torch.equal(received, tensor)


def test_what_is_no_square_matrix_is_never_taken_for_a_symmetric_one() -> None:
    for shape in ((3,), (2, 3), ()):
        tensor = torch.randn(shape)
        assert Packed(tensor, True).numel == tensor.numel()
        assert torch.equal(Packed(tensor, True).values(), tensor.flatten())


def test_half_precision_is_weighed_in_float32_and_comes_back_as_half() -> None:
    tensor = symmetric(3, 3).bfloat16()
    values = Packed(tensor, True, weight=1 / 3).values()
    assert values.dtype == torch.float32
    expected = (tensor.float() / 3).bfloat16()
    Packed(tensor, True).take(values)
    assert torch.equal(tensor, expected)


def test_sparse_gradients_are_sent_dense_and_come_back_sparse() -> None:
    dense = torch.zeros(4, 3)
    dense[2] = torch.randn(3)
    sparse = dense.to_sparse(1)
    Packed(sparse).take(2 * Packed(sparse).values())
    assert sparse.is_sparse and torch.equal(sparse.to_dense(), 2 * dense)


def test_a_bucket_has_one_dtype_and_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asdl_ws_plugin.weight_sharing.packing._BUCKET_NUMEL", 20)
    tensors = [symmetric(4, 4), torch.randn(5), torch.randn(30), symmetric(2, 2).double()]
    entries = [Packed(t, t.ndim == 2) for t in tensors]
    found = list(buckets(entries))
    assert [[entry.numel for entry in bucket] for bucket in found] == [[10, 5], [30], [3]]
    before = [t.clone() for t in tensors]
    for bucket in found:
        unpack(2 * torch.cat([entry.values() for entry in bucket]), bucket)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, 2 * old)
