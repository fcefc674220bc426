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

    @classmethod
    def of(cls, matches: Matches) -> Positives:
        """All matches but those that stand for a row that could not be found."""
        return cls(matches.indices, ~matches.scores.isneginf())

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
        width = part.stop - part.start
        inside = self.present & (self.slots >= part.start) & (self.slots < part.stop)
        places = (self.slots - part.start).clamp(0, width - 1)
        labels = torch.zeros(len(self.slots), width, device=self.slots.device)
        return labels.scatter_add_(1, places, inside.float())

    def held(self, sharding: Sharding) -> Positives:
        """Those that lie on this process, by their place there."""
        own = self.slots % sharding.world == sharding.rank
        return Positives(self.slots // sharding.world, self.present & own)
