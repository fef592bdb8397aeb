"""Models whose Parameters ``fully_shard`` (FSDP2) has divided among the ranks.

Their layers see whole tensors in the forward and backward pass, so factors are those of whole
layers, as of any model. What is divided are the Parameters and gradients outside of these passes: a
gradient is put together one layer at a time, preconditioned, and divided again.

FSDP2 averages gradients itself, in the backward pass, as a mean of the ranks' means. So the loss of
each rank is weighed before it. And whatever sends something back through the model gathers weights,
in which all ranks have to take part. How often that is done for the curvature depends on a rank's
batch, so weights are gathered before it, once, and stay until the gradient's pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .agreement import signature
from .blocks import LinearBlock, lent_to
from .errors import LayerError
from .ranks import Ranks
from .shares import Share
from .torch_private import averages_gradients, own_parameters, reshards_after_backward

__all__ = ["ShardedModel", "is_divided", "sharded_model"]

_WHOLE_COPIES = (
    "Train with whole copies of the model on every rank instead, with DistributedDataParallel or "
    "without a wrapper."
)


def is_divided(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each rank has a part."""
    return hasattr(tensor, "device_mesh")


def sharded_model(model: nn.Module) -> ShardedModel | None:
    """What there is to know of a sharded model; ``None`` for one that is not.

    Raises a ValueError for one that is sharded in a way that is not supported.
    """
    modules: list[Any] = list(model.modules())
    units = [module for module in modules if hasattr(module, "set_reshard_after_backward")]
    for unit in units:
        unit.reshard()
    if not units and not any(map(is_divided, model.parameters())):
        return None
    return ShardedModel(model, units)


class ShardedModel:
    """A model that ``fully_shard`` was called on, and its parts.

    Args:
        model: the model.
        units: the modules that are gathered as one, the model among them.

    Raises:
        ValueError: it is sharded in another way.
    """

    def __init__(self, model: nn.Module, units: Sequence[Any]) -> None:
        self.model, self._units = model, list(units)
        self._known: dict[str, nn.Parameter] = {}
        self._gathered: Sequence[tuple[Any, bool]] = ()
        for name, p in model.named_parameters():
            if is_divided(p):
                _check_division(name, p, bool(units))
        for name, module in model.named_modules():
            if any(p.requires_grad for p in lent_to(module)):
                raise LayerError(
                    name,
                    "its bias is held by the module around it, as convert(model) makes it of a "
                    "GCNConv; fully_shard does not see that it is the same one",
                    _WHOLE_COPIES,
                )
        self.parameters()

    def check_ranks(self, ranks: Ranks) -> None:
        """Raise a ValueError unless the parts are on the ranks that train together."""
        for name, p in self._known.items():
            size = p.device_mesh.size()  # type: ignore[attr-defined]
            if size != ranks.size:
                raise ValueError(
                    f"Parameter '{name}' is sharded over {size} processes, and {ranks.size} train "
                    "together. Shard it over a mesh of all of them."
                )

    def parameters(self) -> list[Any]:
        """The divided Parameters, also while whole ones take their places in the model.

        Raises a ValueError if there are others that are trained.
        """
        for name, p in self.model.named_parameters():
            if is_divided(p):
                self._known[name] = p
            elif p.requires_grad and name not in self._known:
                raise ValueError(
                    f"Parameter '{name}' is trained and not sharded, but others are, so nobody "
                    "averages its gradient. Call fully_shard(model) after fully_shard of its "
                    "parts, without ignored_params."
                )
        return list(self._known.values())

    def reshard(self) -> None:
        """Let the model have its divided Parameters, as after a backward pass."""
        for unit in self._units:
            unit.reshard()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights, so that nothing that is sent back has to be waited for by other ranks.

        All ranks have to enter it. :meth:`send_back` ends it earlier.
        """
        self._gathered = [(unit, reshards_after_backward(unit)) for unit in self._units]
        try:
            for unit in self._units:
                unit.unshard()
                unit.set_reshard_after_backward(False, recurse=False)
            yield
        finally:
            self._release()
            self.reshard()

    def _release(self) -> None:
        for unit, reshards in self._gathered:
            unit.set_reshard_after_backward(reshards, recurse=False)
        self._gathered = ()

    def weight(self, ranks: Ranks, what: str, share: Share) -> float:
        """What this rank's loss is multiplied with, so that FSDP2's mean of the ranks' gradients is
        the gradient of the joint loss.

        Raises a RankFailure if another rank has failed.
        """
        if ranks.size == 1:
            return 1.0
        shares, _ = ranks.exchange_shares(what, share)
        return shares.of_gradient * ranks.size

    def send_back(self, ranks: Ranks, what: str, loss: Tensor, weight: float) -> None:
        """``loss.backward()`` with that weight, which averages gradients over the ranks.

        Raises:
            RankFailure: another rank has failed.
            ValueError: gradients are not averaged in this pass.
        """
        if not all(map(averages_gradients, self._units)):
            raise ValueError(
                "set_gradient_divide_factor lets FSDP2 do something else than average gradients, "
                "which are weighed for that here. Leave it as it is by default, and multiply the "
                "loss instead."
            )
        ranks.agree(what)
        self._release()
        handle = None if weight == 1 else loss.register_hook(lambda grad: grad * weight)
        try:
            with ranks.exchanging():
                loss.backward()
        finally:
            if handle is not None:
                handle.remove()
        self.reshard()
        grads = [p.grad is not None for p in self.parameters()]
        if not any(grads):
            raise ValueError(
                "The backward pass has left no gradient: it waits in FSDP2 for another one. Leave "
                "set_requires_gradient_sync and set_is_last_backward as they are by default; "
                "micro-batches are added up all the same."
            )
        rows = ranks.agree(what, [signature(grads)])
        if len({row[0] for row in rows}) > 1:
            raise ValueError("The ranks have gradients of different Parameters of a sharded model.")

    @contextlib.contextmanager
    def whole(self, modules: Sequence[nn.Module], with_values: bool = False) -> Iterator[None]:
        """Let layers have whole gradients, and on leaving the parts of what became of these.

        All ranks have to enter it.

        Args:
            with_values: they have whole weights, too, instead of memory that has no values, and
                all of it is for reading.
        """
        places = [
            (owner, name, p)
            for module in dict.fromkeys(modules)
            for owner, name in _places(module)
            if (p := own_parameters(owner).get(name)) is not None and is_divided(p)
        ]
        divided: Any = {id(p): p for _, _, p in places}
        whole = {key: _stand_in(p, with_values) for key, p in divided.items()}
        try:
            for owner, name, p in places:
                own_parameters(owner)[name] = whole[id(p)]
            yield
            for key, p in divided.items():
                if p.grad is not None and not with_values:
                    _copy_part(p.grad, whole[key].grad)
        finally:
            for p in whole.values():
                p.grad = None
            for module in modules:
                if isinstance(module, LinearBlock):
                    module.forget_views()
            for owner, name, p in places:
                own_parameters(owner)[name] = p

    @torch.no_grad()
    def scale(self, modules: Sequence[nn.Module], factor: Tensor) -> None:
        """Multiply the gradients of layers, divided as they are."""
        places = (place for module in modules for place in _places(module))
        parameters = dict.fromkeys(own_parameters(owner).get(name) for owner, name in places)
        for p in parameters:
            if p is not None and p.grad is not None:
                p.grad.mul_(factor.to(p.grad.dtype))

    def norm(self, grads: Sequence[Any]) -> float:
        """Of all gradients together; all ranks have to ask for it."""
        parts = [grad.to_local().double() for grad in grads]
        total = torch.stack([part.square().sum() for part in parts]).sum()
        dist.all_reduce(total, group=grads[0].device_mesh.get_group())
        return float(total.sqrt())


def _check_division(name: str, p: Any, has_units: bool) -> None:
    what = None
    if not has_units:
        what = "a DTensor that fully_shard has not made"
    elif p.device_mesh.ndim != 1 or not all(place.is_shard() for place in p.placements):
        what = f"divided as {p.placements} over a mesh of {p.device_mesh.ndim} dimensions"
    elif p.to_local().device.type != p.device_mesh.device_type:
        what = "kept on another device than the one that computes (CPUOffloadPolicy)"
    if what is not None:
        raise ValueError(
            f"Parameter '{name}' is {what}. Shard with fully_shard alone, over a mesh of one "
            f"dimension and on its device. {_WHOLE_COPIES}"
        )


def _places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of a layer's own Parameters, or of those that it is a part of."""
    if isinstance(module, LinearBlock):
        return module.places()
    return [(module, name) for name in own_parameters(module)]


def _stand_in(p: Any, with_values: bool) -> Any:
    local = p.to_local()
    values = p.detach().full_tensor() if with_values else local.new_zeros(()).expand(p.shape)
    whole = nn.Parameter(values, requires_grad=p.requires_grad)
    if p.grad is not None:
        whole.grad = p.grad.full_tensor()
    return whole


@torch.no_grad()
def _copy_part(divided: Any, whole: Tensor) -> None:
    """Let a divided tensor have the values of a whole one, without communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = divided.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    divided.copy_(everywhere.redistribute(placements=divided.placements))
