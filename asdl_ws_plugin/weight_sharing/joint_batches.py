"""Stage 6 of a curvature step, for batches that are parts of a joint one: micro-batches, and the
batches of several ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from asdl.fisher import FisherMaker
from torch import Tensor, nn

from .commit import commit
from .joint import joint_curvature
from .micro_batches import MicroBatches
from .operate import FISHER_FORWARD_ONLY
from .plan import Plan
from .ranks import Ranks
from .sharded import ShardedModel
from .shares import Part, Share
from .transaction import put_aside

__all__ = ["JointBatches"]


class JointBatches(FisherMaker):
    """The part of :class:`~.fisher_maker.WeightSharingFisherMaker` that puts batches together.

    Attributes:
        decay: what the accumulated curvature is multiplied with before the new one is added.
        least_weight: or, of an average without bias: the least weight that an update has.
        micro_batches: those of the step, where there are several.
        belongs_to_maker: whether a gradient maker sets all of this.
        ranks: the processes that train together.
        sharded: a model that ``fully_shard`` was called on.
        place: where they are in their training.
        share: what this one's last batch was of the joint one.
    """

    plan: Plan
    unseen: dict[nn.Module, str]
    decay = 1.0
    least_weight: float | None = None
    micro_batches: MicroBatches | None = None
    belongs_to_maker = False
    ranks: Ranks
    sharded: ShardedModel | None = None
    place = ""
    share: Share

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[None]:
        """Around what is sent back for the curvature: with whole weights, if they are divided."""
        if self.sharded is None:
            yield
            return
        self.ranks.agree(f"{self.place}, batch")
        with self.sharded.gathered():
            yield

    def _backward_of(self, loss: Tensor, share: Share) -> tuple[float, Callable[[], None]]:
        """The backward pass of the loss, and the weight that it gives to the loss; that is 1 unless
        the pass itself averages over the ranks.
        """
        if self.sharded is None:
            return 1.0, loss.backward
        what = f"{self.place}, gradients"
        weight = self.sharded.weight(self.ranks, what, share)
        return weight, partial(self.sharded.send_back, self.ranks, what, loss, weight)

    def commit_micro_batches(self) -> None:
        """Stage 6 for the joint batch of several micro-batches."""
        total = self.micro_batches
        assert total is not None and total.step is not None
        joined = total.joined()
        self.unseen = joined.unseen
        self._commit(joined)

    @property
    def _has_B_of_examples(self) -> bool:
        """Whether B is a mean over examples, and does not know the loss."""
        return self.config.fisher_type == FISHER_FORWARD_ONLY

    def _add(self, part: Part) -> None:
        assert self.micro_batches is not None
        self.micro_batches = self.micro_batches.added(part, self._has_B_of_examples)

    def _commit(self, part: Part) -> None:
        """Stage 6, of the joint batch of all ranks."""
        self.share, results = part.share, part.results
        if self.ranks.size > 1:
            what = f"{self.place}, curvature"
            results = joint_curvature(self.ranks, what, self.plan, part, self._has_B_of_examples)
        if not self.belongs_to_maker:
            put_aside(self.model)  # what a gradient maker has gathered is not this maker's
        decay = self.decay if part.step.accumulate else None
        commit(self.model, results, self.config.fisher_attr, decay, self.least_weight)

    def _decide(self, num_terms: int, num_examples: int) -> None:
        """Settle ``'auto'`` by the joint batch."""
        if self.ranks.size > 1 and self.plan.setting is None and self.plan.is_auto:
            rows = self.ranks.agree(f"{self.place}, setting", [num_terms, num_examples])
            num_terms, num_examples = (int(sum(column)) for column in zip(*rows, strict=True))
        self.plan.decide(num_terms, num_examples)
