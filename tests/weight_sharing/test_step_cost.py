"""What an update of the inverses costs beside a curvature step, counted on a CPU: kernels that are
launched, values that are read back from the device, and matrices that are inverted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import asdl_ws_plugin

# They launch nothing.
VIEWS = ["view", "_unsafe_view", "detach", "alias", "diagonal", "unbind", "split", "slice"]
VIEWS += ["split_with_sizes", "select", "t", "transpose", "permute", "unsqueeze", "expand"]
READS = ["_local_scalar_dense", "nonzero", "is_nonzero", "equal"]


class Calls(TorchDispatchMode):
    """Counts operators by name, and the sizes of what is inverted."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.inverted: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count[name] += 1
        if name == "cholesky_inverse":
            side = args[0].shape[-1]
            self.inverted[side] += args[0].numel() // side**2
        return func(*args, **(kwargs or {}))

    @property
    def num_kernels(self) -> int:
        return sum(count for name, count in self.count.items() if name not in VIEWS)

    @property
    def num_reads(self) -> int:
        return sum(self.count[name] for name in [*READS, "tolist"])


class Transformer(nn.Module):
    """Its attention has separate layers for queries, keys and values after :func:`convert`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def calls_of_steps(
    depth: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Calls, Calls]:
    """Of a step with new curvature, and of one with new inverses, too."""
    torch.manual_seed(0)
    model = asdl_ws_plugin.convert(Transformer(depth))
    config = asdl_ws_plugin.recommended(
        early_updates=0, curvature_upd_interval=1, preconditioner_upd_interval=5, **options
    )
    maker = asdl.KfacGradientMaker(model, config, shared_dim="reduce", fisher_type="fisher_emp")
    x, y = torch.randn(4, 5, 8), torch.randint(3, (4,))
    steps = []
    tolist = Tensor.tolist
    for _ in range(11):  # the last ones: an average and the length of a step are there
        model.zero_grad()
        logits = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, logits, y)
        calls = Calls()
        with monkeypatch.context() as patch, calls:
            # On a CPU no operator is behind it.
            patch.setattr(
                Tensor, "tolist", lambda self, c=calls: c.count.update(["tolist"]) or tolist(self)
            )
            maker.forward_and_backward()
        steps.append(calls)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.01 * p.grad)
    curvature, inverse = steps[9], steps[10]
    assert not curvature.inverted and inverse.inverted
    return curvature, inverse


@pytest.mark.parametrize("options", [{}, {"trust": None, "damping": 1e-2}], ids=["preset", "fixed"])
def test_new_inverses_of_twelve_blocks_launch_few_kernels_and_read_two_values_at_most(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature, inverse = calls_of_steps(12, monkeypatch, **options)
    assert inverse.num_reads - curvature.num_reads in (1, 2)
    assert 0 < inverse.num_kernels - curvature.num_kernels <= 200


def test_the_kernels_of_new_inverses_do_not_grow_with_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curvature, inverse = calls_of_steps(1, monkeypatch)
    deep_curvature, deep_inverse = calls_of_steps(6, monkeypatch)
    more = inverse.num_kernels - curvature.num_kernels
    assert deep_inverse.num_kernels - deep_curvature.num_kernels == more


def test_queries_keys_and_values_with_one_damping_have_one_inverse_of_their_input_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, followed = calls_of_steps(1, monkeypatch)
    _, fixed = calls_of_steps(1, monkeypatch, trust=None, damping=1e-2)
    # Of side 8: A of q, k, v, the projection, the first linear layer and the head; B of q, k, v,
    # the projection and the second linear layer.
    assert (followed.inverted[8], fixed.inverted[8]) == (11, 9)
    assert followed.inverted[16] == fixed.inverted[16] == 2
