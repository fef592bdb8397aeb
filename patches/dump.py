"""Everything that stock and patched ASDL have to agree on, to the last bit: ``python
patches/dump.py FILE``.

Run once with each (:mod:`check` does); the file maps names to tensors. Two parts:

``shared_dim/...``
    factors, inverses and preconditioned gradients of the plugin, which registers itself in stock
    ASDL and uses the registry it finds in a patched one.
``None/...``
    gradients and curvature of ASDL's own gradient makers with defaults, one process, wherever stock
        is right: layers
    called once, logits ``(N, C)``, labels everywhere, a mean over ``data_size`` terms.
    ``README.md`` lists the rest.
"""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import asdl
import torch
import torch.nn.functional as F
from asdl import FisherConfig, PreconditioningConfig, get_fisher_maker
from torch import Tensor, nn

import asdl_ws_plugin

D, C, R = 5, 3, 4


class Tokens(nn.Module):
    """A small transformer: ``(N, R, D)`` to ``(N, C)`` or ``(N, R, C)``."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D, 8), nn.Linear(8, C)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.relu_(self.fc(self.norm(x)))
        return self.head(x.mean(1) if self.pool else x)


class Graphs(nn.Module):
    """Rows of nodes, summed up for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 8), nn.Linear(8, C)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = torch.tanh(self.fc1(x))
        return self.fc2(y.new_zeros(3, 8).index_add(0, index, y))


def cnn(classes: int = C) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def mlp(classes: int = C) -> nn.Module:
    return nn.Sequential(
        nn.Linear(D, 7),
        nn.LayerNorm(7),
        nn.Tanh(),
        nn.Linear(7, 6),
        nn.ReLU(),
        nn.Linear(6, classes),
    )


def mlp_without_norm(classes: int = C) -> nn.Module:
    return nn.Sequential(
        nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, classes)
    )


def flat_cross_entropy(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, -2), target.flatten())


def tensors_of(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value.detach().clone()
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors_of(item, f"{prefix}.{i}")
    elif hasattr(value, "__dict__"):
        for name, item in sorted(vars(value).items()):
            if not name.startswith("_"):
                yield from tensors_of(item, f"{prefix}.{name}")


def record(out: dict[str, Tensor], key: str, model: nn.Module, with_fisher: bool = True) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None:
            out[f"{key}/grad/{name}"] = p.grad.detach().clone()
    for name, module in model.named_modules():
        if with_fisher and hasattr(module, "fisher"):
            out.update(tensors_of(module.fisher, f"{key}/fisher/{name}"))


def train(
    out: dict[str, Tensor],
    key: str,
    model: nn.Module,
    maker: Any,
    loss: Callable[..., Tensor],
    args: tuple[Any, ...],
    target: Tensor,
    steps: int = 3,
    with_fisher: bool = True,
    lr: float = 0.05,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        dummy = maker.setup_model_call(model, *args)
        maker.setup_loss_call(loss, dummy, target)
        maker.forward_and_backward()
        record(out, f"{key}/{step}", model, with_fisher)
        optimizer.step()


# ---------------------------------------------------------------------------------- with shared_dim


def with_shared_dim(out: dict[str, Tensor]) -> None:
    for pool, fisher_type, shared_dim, ema_decay in itertools.product(
        (True, False),
        ("fisher_mc", "fisher_exact", "fisher_emp", "fisher_forward_only"),
        (
            "auto",
            "expand",
            "reduce",
            ["reduce", ("attention", "expand"), ("fc", "expand"), (nn.LayerNorm, "reduce")],
        ),
        (-1, 0.3),
    ):
        torch.manual_seed(0)
        model = Tokens(pool)
        asdl_ws_plugin.convert(model)
        x, target = torch.randn(6, R, D), torch.randint(C, (6,) if pool else (6, R))
        intervals = {"curvature_upd_interval": 2} if ema_decay != -1 else {}
        config = PreconditioningConfig(damping=1e-2, ema_decay=ema_decay, **intervals)
        maker = asdl.KfacGradientMaker(
            model, config, fisher_type=fisher_type, shared_dim=shared_dim
        )
        terms = "pooled" if pool else "all"
        key = f"shared_dim/tokens/{terms}/{fisher_type}/{shared_dim}/{ema_decay}"
        train(out, key, model, maker, flat_cross_entropy, (x,), target)
    for shape, shared_dim in itertools.product(
        ("full", "layer_wise", "kron", "swift_kron", "kfe", "unit_wise", "diag"),
        ("expand", "reduce"),
    ):
        torch.manual_seed(0)
        model = cnn()
        config = FisherConfig(
            "fisher_emp", [shape], "cross_entropy", data_size=5, shared_dim=shared_dim
        )
        maker = get_fisher_maker(model, config)
        x, target = torch.randn(5, 2, 6, 6), torch.randint(C, (5,))
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), target)
        maker.forward_and_backward(calc_loss_grad=True)
        record(out, f"shared_dim/cnn/{shape}/{shared_dim}", model)
    for shared_dim in ("expand", "reduce"):
        torch.manual_seed(0)
        graphs, index = Graphs(), torch.tensor([0, 0, 1, 2, 2, 2, 2])
        maker = asdl.KfacGradientMaker(
            graphs, PreconditioningConfig(damping=1e-2), shared_dim=shared_dim
        )
        with asdl_ws_plugin.segments(graphs, node=index):
            train(
                out,
                f"shared_dim/graphs/{shared_dim}",
                graphs,
                maker,
                F.cross_entropy,
                (torch.randn(7, D), index),
                torch.randint(C, (3,)),
            )


# ------------------------------------------------------------------------------- without shared_dim


NATURAL = [
    ("KfacGradientMaker", {"fisher_type": "fisher_mc"}),
    ("KfacGradientMaker", {"fisher_type": "fisher_exact"}),
    ("KfacGradientMaker", {"fisher_type": "fisher_emp"}),
    ("KfacGradientMaker", {"swift": True}),
    ("FullNaturalGradientMaker", {}),
    ("FullNaturalGradientMaker", {"fisher_type": "fisher_exact"}),
    ("DiagNaturalGradientMaker", {}),
    ("DiagNaturalGradientMaker", {"fisher_type": "fisher_exact"}),
    ("UnitWiseNaturalGradientMaker", {}),
    ("UnitWiseNaturalGradientMaker", {"fisher_type": "fisher_emp"}),
    ("EmpNaturalGradientMaker", {"fisher_shape": "diag"}),
    ("EmpNaturalGradientMaker", {"fisher_shape": "full"}),
    (
        "NaturalGradientMaker",
        {"fisher_shape": ["kron", (nn.LayerNorm, "diag"), (nn.BatchNorm2d, "unit_wise")]},
    ),
]


def without_shared_dim(out: dict[str, Tensor]) -> None:
    networks = {"mlp": (mlp, (D,)), "cnn": (cnn, (2, 6, 6))}
    for (name, (make, sizes)), (maker_name, options), n, ema_decay in itertools.product(
        networks.items(), NATURAL, (5, 8), (-1, 0.3)
    ):
        if name == "cnn" and maker_name.startswith("UnitWise"):
            continue  # stock multiplies a weight of four dimensions as if it had two
        if options.get("swift") and ema_decay != -1:
            continue  # stock averages rows of different batches
        for loss_type, loss in (("cross_entropy", F.cross_entropy), ("mse", F.mse_loss)):
            torch.manual_seed(1)
            # More outputs are more terms than data_size.
            classes = C if loss_type == "cross_entropy" else 1
            model = make(classes)
            x = torch.randn(n, *sizes)
            target = torch.randint(C, (n,)) if loss_type == "cross_entropy" else torch.randn(n, 1)
            intervals = {"curvature_upd_interval": 2} if ema_decay != -1 else {}
            config = PreconditioningConfig(
                data_size=n,
                damping=0.1,
                ema_decay=ema_decay,
                preconditioner_upd_interval=2,
                **intervals,
            )
            maker = getattr(asdl, maker_name)(
                model, config, loss_type=loss_type, **copy.copy(options)
            )
            key = f"None/{maker_name}/{options}/{name}/{loss_type}/{n}/{ema_decay}"
            train(out, key, model, maker, loss, (x,), target)
    others: dict[str, Callable[[nn.Module, int], Any]] = {
        "Seng": lambda model, n: asdl.SengGradientMaker(
            model, PreconditioningConfig(data_size=n, damping=1.0)
        ),
        "KronBfgs": lambda model, n: asdl.KronBfgsGradientMaker(
            model, PreconditioningConfig(data_size=n, damping=1.0, ema_decay=0.5)
        ),
        "Smw": lambda model, n: asdl.SmwEmpNaturalGradientMaker(
            model, asdl.SmwEmpNaturalGradientConfig(data_size=n, damping=1.0)
        ),
        "Shampoo": lambda model, n: asdl.ShampooGradientMaker(
            model, PreconditioningConfig(damping=1e-2)
        ),
    }
    for (maker_name, make_maker), n in itertools.product(others.items(), (5, 8)):
        torch.manual_seed(2)
        model = mlp_without_norm()
        maker = make_maker(model, n)
        train(
            out,
            f"None/{maker_name}/{n}",
            model,
            maker,
            nn.CrossEntropyLoss(),
            (torch.randn(n, D),),
            torch.randint(C, (n,)),
            with_fisher=False,
            lr=0.01,
        )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out: dict[str, Tensor] = {}
    with_shared_dim(out)
    without_shared_dim(out)
    torch.save(out, sys.argv[1])
    print(f"{len(out)} tensors, ASDL at {asdl.__file__}")


if __name__ == "__main__":
    main()
