"""Which rows of the dictionary are a query's positives, as slot numbers: a label for every row exists only for the part
of the rows that is worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls.core.matching import Matches
from mls.core.sharding import Sharding


@dataclass(frozen=True)
class Positives:
    """Slot slots[i, j] is a positive of query i wherever present[i, j]; no slot is a query's positive twice.

    >>> first = Positives.of(Matches(torch.tensor([[2, 0]]), torch.tensor([[0.9, 0.8]])))
    >>> second = Positives.of(Matches(torch.tensor([[3, 2]]), torch.tensor([[0.7, 0.6]])))
    >>> first.labels(slice(0, 4)), (first | second).labels(slice(0, 4)), (first & second).labels(slice(0, 4))
    (tensor([[1., 0., 1., 0.]]), tensor([[1., 0., 1., 1.]]), tensor([[0., 0., 1., 0.]]))
    """

    slots: Int64[Tensor, "queries most"]
    present: Bool[Tensor, "queries most"]
    weights: Float[Tensor, "queries most"] | None = None  # of their entries in the loss, 1 on average; None: all 1

    @classmethod
    def of(cls, matches: Matches, soft: float = 0.0) -> Positives:
        """All matches but those that stand for a row that could not be found; with `soft` weighed by exp(score / soft).

        >>> Positives.of(Matches(torch.tensor([[2, 0]]), torch.tensor([[0.9, 0.2]])), soft=1.0).weights
        tensor([[1.3364, 0.6636]])
        """
        present = ~matches.scores.isneginf()
        if soft == 0:
            return cls(matches.indices, present)
        shares = (matches.scores / soft).softmax(dim=1).nan_to_num(0.0)  # NaN where a query has no positive
        return cls(matches.indices, present, shares * present.sum(dim=1, keepdim=True))

    @classmethod
    def random(
        cls,
        counts: Int64[Tensor, "queries"],
        rows: Int64[Tensor, "rows"],
        own: Int64[Tensor, "queries"] | None,
        stream: torch.Generator,
    ) -> Positives:
        """As many of the `rows`, which are named by their images, for each query as counted; none of the images `own`,
        in whose place others are taken as long as half of the rows drawn are not theirs. All queries share an order,
        from a random place on: a draw for each query and row would cost more than the loss."""
        total, most = len(rows), min(len(rows), int(counts.max()) * (1 if own is None else 2))
        order = torch.randperm(total, generator=stream)[:most]
        starts = torch.randint(total, (len(counts), 1), generator=stream)
        slots = ((order + starts) % total).to(rows.device)
        may = torch.ones_like(slots, dtype=torch.bool) if own is None else rows[slots] != own[:, None]
        return cls(slots, may & (may.cumsum(dim=1) <= counts[:, None]))

    def __and__(self, other: Positives) -> Positives:
        return Positives(self.slots, self.present & self._are_in(other))

    def __or__(self, other: Positives) -> Positives:
        fresh = other.present & ~other._are_in(self)
        return Positives(torch.cat([self.slots, other.slots], dim=1), torch.cat([self.present, fresh], dim=1))

    def _are_in(self, other: Positives) -> Bool[Tensor, "queries most"]:
        return ((self.slots[:, :, None] == other.slots[:, None]) & other.present[:, None]).any(dim=2)

    def first(self, counts: Int64[Tensor, "queries"]) -> Positives:
        """As many as counted, the first of each query."""
        places = torch.arange(self.slots.shape[1], device=counts.device)
        return Positives(self.slots, self.present & (places < counts[:, None]))

    def images(self, ids: Int64[Tensor, "rows"]) -> Int64[Tensor, "queries most"]:
        """The images of the positives; -1 where there is none."""
        return ids[self.slots].masked_fill(~self.present, -1)

    def counts(self) -> Int64[Tensor, "queries"]:
        return self.present.sum(dim=1)

    def labels(self, part: slice) -> Float[Tensor, "queries part"]:
        """+1 for the positives among these rows, 0 for the rest."""
        return self._spread(torch.ones_like(self.slots, dtype=torch.float32), part)

    def importance(self, part: slice) -> Float[Tensor, "queries part"]:
        """What each entry of these rows counts in the loss: the positives their weights, the rest 1."""
        assert self.weights is not None
        return 1 + self._spread(self.weights - 1, part)

    def _spread(self, values: Float[Tensor, "queries most"], part: slice) -> Float[Tensor, "queries part"]:
        """The positives' values at their rows, 0 elsewhere."""
        width = part.stop - part.start
        inside = self.present & (self.slots >= part.start) & (self.slots < part.stop)
        places = (self.slots - part.start).clamp(0, width - 1)
        rows = torch.zeros(len(self.slots), width, device=self.slots.device)
        return rows.scatter_add_(1, places, values * inside)

    def held(self, sharding: Sharding) -> Positives:
        """Those that lie on this process, by their place there."""
        own = self.slots % sharding.world == sharding.rank
        return Positives(self.slots // sharding.world, self.present & own, self.weights)
