"""The autograd graph between the logits and the loss: what the loss is computed from, and how.

Only this part of the graph is looked at, never the model's. Most questions are answered without a
number; where that cannot be, a gradient is sent from a call's input back to the logits.
"""

from __future__ import annotations

import torch
from asdl.grad_maker import LOSS_CROSS_ENTROPY
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .observe_loss import Observation

__all__ = ["LossGraph", "is_weighted_by_one", "node_of", "places_of", "probe_of"]

# Operations on each element, or that move elements, by the names of autograd's nodes. A chain of
# them leaves every term a function of its own row.
_LOCAL = (
    "Alias",
    "Clone",
    "Div",
    "Mul",
    "Neg",
    "Permute",
    "Reshape",
    "Select",
    "Slice",
    "Split",
    "Squeeze",
    "TBackward",
    "Tanh",
    "ToCopy",
    "Transpose",
    "Unbind",
    "UnsafeView",
    "Unsqueeze",
    "View",
)
# Operations that are linear in all of their inputs together; in the name of autograd's node.
_LINEAR = (
    "Add",
    "Alias",
    "Cat",
    "Clone",
    "Expand",
    "Index",
    "Mean",
    "Neg",
    "Reshape",
    "Select",
    "Slice",
    "Squeeze",
    "Stack",
    "Sub",
    "Sum",
    "ToCopy",
    "Unsqueeze",
    "View",
)
_LAST = (-1, 2**64 - 1)  # how autograd keeps a dimension of -1


class LossGraph:
    """The calls that the loss is computed from, and whether there is a way around them.

    Args:
        observations: the calls that were seen.
        num_examples: N, where it matters that every term is of one example; ``None`` where not.

    Attributes:
        used: the calls that the loss depends on.
        of_logits: those of them that are calls of the logits.
        has_rest: whether the loss also depends on the logits in another way.
    """

    def __init__(
        self,
        loss: Tensor,
        observations: list[Observation],
        logits: Tensor,
        num_examples: int | None,
    ) -> None:
        self.loss, self.logits = loss, logits
        self.target = node_of(logits)
        self.used, self.has_rest = observations, False
        is_call = len(observations) == 1 and observations[0].output is loss
        if not is_call:
            met = _met(loss, {call.output.grad_fn for call in observations} | {self.target})
            self.used = [call for call in observations if call.output.grad_fn in met]
            self.has_rest = self.target in met
        self.of_logits: list[Observation] = []
        for call in self.used:
            if any(self._reaches(value) for value in call.others):
                self.has_rest = True  # its labels are computed from the logits
            elif self._is_call_of_logits(call):
                if num_examples is None or self._has_own_terms(call, num_examples):
                    self.of_logits.append(call)
                else:
                    self.has_rest = True

    def is_linear(self, calls: list[Observation]) -> bool:
        """Whether the loss weighs the calls' terms with numbers that do not depend on the logits.

        The focal loss of a cross-entropy does not, nor does the root of a mean: the weights' own
        derivative is a part of the second derivative. Detached weights are numbers.
        """
        outputs = [call.output for call in calls if call.output is not self.loss]
        if not outputs or _is_plainly_linear(self.loss, {node_of(out) for out in outputs}):
            return True
        with torch.enable_grad():
            weights = torch.autograd.grad(self.loss, outputs, create_graph=True)
        return not any(self._reaches(weight) for weight in weights)

    def is_all(self, calls: list[Observation]) -> bool:
        """Whether the calls' gradients with respect to the logits add up to that of the loss."""
        if not calls or not all(self._reaches(call.input) for call in calls):
            return False
        outputs, inputs = [call.output for call in calls], [call.input for call in calls]
        (whole,) = torch.autograd.grad(self.loss, self.logits, retain_graph=True)
        weights = torch.autograd.grad(self.loss, outputs, retain_graph=True)
        grads = torch.autograd.grad(outputs, inputs, weights, retain_graph=True)
        (known,) = torch.autograd.grad(inputs, self.logits, grads, retain_graph=True)
        size = torch.maximum(whole.abs().max(), known.abs().max())
        coarsest = max(torch.finfo(t.dtype).eps for t in (whole, *grads))
        return bool((whole - known).abs().max() <= 100 * coarsest * size)

    def _reaches(self, x: Tensor) -> bool:
        return self.target in _met(x, {self.target})

    def _is_call_of_logits(self, call: Observation) -> bool:
        """Whether a call's input is made of the logits, or is another view of their memory."""
        return _has_memory_of(call.input, self.logits) or self._reaches(call.input)

    def _has_own_terms(self, call: Observation, num_examples: int) -> bool:
        """Whether each of the logits is a part of one term, and no term of several examples.

        Every term gets a weight, 1 or 2 without a pattern. What comes back at one of the logits is
        weighted with one of them if it is of one term, and with something else if it is of several.
        """
        x = call.input
        if _has_memory_of(x, self.logits) or self._is_local(x):
            return True
        sizes = list(x.shape)  # with 1 in the place of the classes: a number for each term
        if x.ndim > 1 or call.loss_type == LOSS_CROSS_ENTROPY:
            sizes[min(1, x.ndim - 1) if call.loss_type == LOSS_CROSS_ENTROPY else -1] = 1
        weight, values = _ones_and_twos(sizes, x), probe_of(x)
        plain, weighted = (
            torch.autograd.grad(x, self.logits, v, retain_graph=True)[0]
            for v in (values, values * weight)
        )
        if not is_weighted_by_one(plain, weighted):
            return False
        met = _as_rows(plain) != 0
        if int(met.any(-1).sum()) <= weight.numel() and int(met.sum()) <= x.numel():
            return True  # not more than one row each
        return self._is_of_one_example(x, num_examples)

    def _is_of_one_example(self, x: Tensor, num_examples: int) -> bool:
        """Whether terms of several rows each are of one example, as where the loss pools positions.

        The same test from the other side: examples get weights, and terms have to arrive weighted
        with one of them.
        """
        num_rows = len(_as_rows(self.logits))
        if num_rows % num_examples:
            return True  # ragged: a term of several examples cannot be told
        ids = torch.arange(num_rows, device=x.device)
        values = probe_of(self.logits)
        with torch.enable_grad():
            start = torch.zeros_like(x, requires_grad=True)
            (back,) = torch.autograd.grad(x, self.logits, start, create_graph=True)
        found = []
        for example in (ids // (num_rows // num_examples), ids % num_examples):  # or sequence first
            weight = _ones_and_twos([num_examples], x)[example].unsqueeze(-1)
            weighted_values = (_as_rows(values) * weight).view_as(values)
            plain, weighted = (
                torch.autograd.grad(back, start, v, retain_graph=True)[0]
                for v in (values, weighted_values)
            )
            found.append(is_weighted_by_one(plain, weighted))
        return any(found)

    def _is_local(self, x: Tensor) -> bool:
        """Whether a chain of operations on elements, or on classes, leads from the logits to x."""
        node = node_of(x)
        if x.numel() > self.logits.numel():
            return False
        while node is not None and node is not self.target:
            name = node.name()
            if name in ("LogSoftmaxBackward0", "SoftmaxBackward0"):
                if getattr(node, "_saved_dim", None) not in (*_LAST, self.logits.ndim - 1):
                    return False
            elif not name.startswith(_LOCAL):
                return False
            behind = [other for other, _ in node.next_functions if other is not None]
            node = behind[0] if len(behind) == 1 else None
        return node is self.target and node is not None


def node_of(tensor: Tensor) -> Node | None:
    """Where a tensor's gradient arrives; ``None`` if it has none."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def places_of(x: Tensor, logits: Tensor) -> Tensor:
    """Which of the logits a tensor is computed from: booleans of the sizes of the logits."""
    found = None
    if x.requires_grad:
        (found,) = torch.autograd.grad(x, logits, probe_of(x), retain_graph=True, allow_unused=True)
    return torch.ones_like(logits, dtype=torch.bool) if found is None else found != 0


def _met(start: Tensor, stops: set[Node | None]) -> set[Node | None]:
    """Those of the nodes that a backward pass from a tensor meets; it goes behind none of them."""
    met: set[Node | None] = set()
    seen: set[Node] = set()
    stack = [node_of(start)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            met.add(node)
        else:
            stack += [other for other, _ in node.next_functions]
    return met


def _is_plainly_linear(start: Tensor, stops: set[Node | None]) -> bool:
    """Whether the operations' names say that a tensor is linear in those that it is made of."""
    stack, seen = [node_of(start)], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in stops:
            continue
        seen.add(node)
        behind = [other for other, _ in node.next_functions]
        is_scaled = node.name().startswith(("Mul", "Div")) and sum(map(bool, behind)) == 1
        # A number divided by a tensor is not linear in it.
        is_linear = is_scaled and not (node.name().startswith("Div") and behind[0] is None)
        if not (is_linear or node.name().startswith(_LINEAR)):
            return False
        stack += behind
    return True


def _has_memory_of(x: Tensor, logits: Tensor) -> bool:
    return x is logits or x.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1)


def _ones_and_twos(sizes: list[int], like: Tensor) -> Tensor:
    """Weights without a pattern, which every precision has: by the parity of a number's bits."""
    number = torch.arange(torch.Size(sizes).numel(), device=like.device)
    for shift in (16, 8, 4, 2, 1):
        number = number ^ (number >> shift)
    return (1 + number % 2).to(like.dtype).view(sizes)


def is_weighted_by_one(plain: Tensor, weighted: Tensor) -> bool:
    """Whether every number was weighted with 1 or with 2, and none with a mean of them."""
    off = torch.minimum((weighted - plain).abs(), (weighted - 2 * plain).abs()).max()
    return bool(off <= plain.abs().max() * torch.finfo(plain.dtype).eps ** 0.5)


def probe_of(x: Tensor) -> Tensor:
    """Numbers without a pattern, of the sizes and the dtype of x."""
    numbers = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float32)
    return numbers.sin().to(x.dtype).view(x.shape)
