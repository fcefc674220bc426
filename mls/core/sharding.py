"""A dictionary spread over the processes: slot s lies on process s % world, at place s // world. What each computes on
its part, for the queries of all processes, is put together here. With one process all of it is the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mls import distributed
from mls.core.matching import Matcher, Matches
from mls.core.products import Mask


@dataclass(frozen=True)
class Sharding:
    """Every step enqueues at least a row for each process, so from the first on each holds some.

    >>> second = Sharding(rank=1, world=2)
    >>> second.of(torch.arange(6)), second.held(filled=4)
    (tensor([1, 3, 5]), 2)
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def over_processes(cls, sharded: bool) -> Sharding:
        return cls(distributed.rank(), distributed.world()) if sharded else WHOLE

    def of(self, whole: Shaped[Tensor, "slots ..."]) -> Shaped[Tensor, "here ..."]:
        """This process' part of something that has a value for every slot. A view."""
        return whole[self.rank :: self.world]

    def held(self, filled: int) -> int:
        """How many of the first `filled` slots lie here."""
        return (filled - self.rank + self.world - 1) // self.world

    def share_of(self, rows: Shaped[Tensor, "batch ..."], head: int) -> tuple[Shaped[Tensor, "share ..."], int]:
        """Of rows to be written from slot `head` on: those that belong here, and the place of the first."""
        first = (self.rank - head) % self.world
        return rows[first :: self.world], (head + first) // self.world

    def own(self, batch: int) -> slice:
        """Of the queries of all processes, in rank order, this process' own."""
        return slice(self.rank * batch, (self.rank + 1) * batch)

    def gathered(self, queries: Float[Tensor, "batch ..."]) -> Float[Tensor, "world_batch ..."]:
        """The queries of all processes, in rank order; the gradient finds its way back to each."""
        return queries if self.world == 1 else distributed.gather_with_gradient([queries])[0]

    def totals(self, parts: Float[Tensor, "sums world_batch"]) -> Float[Tensor, "sums batch"]:
        """Each process' sums over its rows, added up; of the queries of all only this process' own."""
        return parts if self.world == 1 else distributed.own_totals(parts)

    def log_totals(self, parts: Float[Tensor, "world_batch"]) -> Float[Tensor, "batch"]:
        """`totals` for logarithms of sums."""
        if self.world == 1:
            return parts
        largest = distributed.maximum(parts.detach())
        own = largest.view(self.world, -1)[self.rank]
        return distributed.own_totals((parts - largest).exp()[None])[0].log() + own

    def topk(
        self,
        matcher: Matcher,
        queries: Float[Tensor, "world_batch dim"],
        rows: Float[Tensor, "here dim"],
        k: int,
        exclude: Mask | None = None,
    ) -> Matches:
        """For the queries of all: the k nearest of all rows, as slots; the same on every process."""
        if self.world == 1:
            return matcher.topk(queries, rows, k, exclude)
        here = min(k, len(rows))
        slots = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
        found = matcher.topk(queries, rows, here, exclude)
        slots[:, :here], scores[:, :here] = found.indices * self.world + self.rank, found.scores
        slots, scores = (self._side_by_side(part) for part in distributed.gather([slots, scores]))
        # A stable sort, so that all processes settle a tie alike.
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Matches(slots.gather(1, order), scores.gather(1, order))

    def _side_by_side(self, parts: Shaped[Tensor, "all k"]) -> Shaped[Tensor, "world_batch candidates"]:
        return parts.view(self.world, -1, parts.shape[1]).transpose(0, 1).flatten(1)


WHOLE = Sharding()
