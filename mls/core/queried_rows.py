"""What a step asks the rows of a dictionary: the nearest, the log-sum-exp, sums over them. Every answer is about all
rows and for this process' own queries, whether one process holds the rows or many do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.core.dictionary import Dictionary
from mls.core.matching import Matcher, Matches
from mls.core.positives import Positives
from mls.core.products import Mask, OwnRows, log_sum_exp, over_parts
from mls.distributed import gather


@dataclass(frozen=True)
class Sums:
    """Of each query's entries, one a row, and of the cosines that they come from."""

    entries: Float[Tensor, "batch"]  # over all rows
    entries_of_positives: Float[Tensor, "batch"]
    cosines: Float[Tensor, "batch"]  # over all rows, without gradient
    near: Float[Tensor, "batch"]  # the cosines of the positives


class QueriedRows:
    """The filled rows as one step's queries, of images `ids`, see them: all, or all but each image's own. `name` is a
    memory of the dictionary.

    A sharded dictionary's rows are asked for the queries of all processes, each its own rows, and what they answer is
    put together; a query's gradient finds its way back. With one process all of that is the identity.

    >>> dictionary = Dictionary(4, backbone=2)
    >>> dictionary.enqueue(torch.eye(2), ids=torch.tensor([7, 8]))
    >>> rows = QueriedRows(dictionary, torch.tensor([7]), exclude_own=True)
    >>> rows.logsumexp("backbone", torch.tensor([[0.0, 1.0]]), temperature=0.5)
    tensor([2.])
    """

    def __init__(self, dictionary: Dictionary, ids: Int64[Tensor, "batch"], exclude_own: bool = False) -> None:
        self.sharding = dictionary.sharding
        self.held = dictionary.rows()  # by this process
        self.ids = dictionary.ids  # the images of all rows
        self.own = self.sharding.own(len(ids))  # of the queries of all processes this process' own
        self.exclude: Mask | None = None  # of the rows held here, those that a query of any process leaves out
        self.counts = torch.full_like(ids, len(self.ids))  # rows left for each query
        if exclude_own:
            asking = ids if self.sharding.world == 1 else gather([ids])[0]
            self.exclude = OwnRows(asking, self.held.ids)
            self.counts = self.counts - OwnRows(ids, self.ids).counts()
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}  # by identity of the query

    def __len__(self) -> int:
        return len(self.ids)

    def topk(self, name: str, query: Float[Tensor, "batch dim"], k: int, matcher: Matcher) -> Matches:
        """The k nearest rows, as slots of the dictionary. No gradient."""
        rows = getattr(self.held, name)
        found = self.sharding.topk(matcher, self._of_all(query).detach(), rows, k, self.exclude)
        return Matches(found.indices[self.own], found.scores[self.own])

    def scores(self, name: str, query: Float[Tensor, "batch dim"], most: int) -> Float[Tensor, "some"]:
        """The inner products of all queries with all rows that they do not leave out, sorted; of more than `most` those
        of every n-th row. No gradient."""
        step = -(-len(query) * len(self) // most)
        part = slice(0, len(self) // self.sharding.world, step)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            found = self._of_all(query).float() @ getattr(self.held, name)[part].float().T
            found = self.without_own(found, torch.nan, part)
            if self.sharding.world > 1:
                found = gather([found])[0].unflatten(0, (self.sharding.world, -1))[:, self.own]
        found = found[~found.isnan()]
        if found.is_cuda:
            return found.sort().values
        return torch.from_numpy(np.sort(found.numpy()))  # on a CPU several times as fast as torch's

    def logsumexp(self, name: str, query: Float[Tensor, "batch dim"], temperature: float) -> Float[Tensor, "batch"]:
        """log sum_n exp(query . row_n / temperature)."""
        rows = getattr(self.held, name)
        return self.sharding.log_totals(log_sum_exp(self._of_all(query), rows, temperature, self.exclude))

    def sums(
        self,
        name: str,
        query: Float[Tensor, "batch dim"],
        positives: Positives,
        entries: Callable[[Tensor, Tensor], Tensor],
        left_out: float,
        whole: bool = False,
    ) -> Sums:
        """Sums of `entries(cosines, labels)`, which gives one value for each query and row. A row that a query leaves
        out has the cosine `left_out` there and counts for nothing. The rows come a part at a time (neither labels nor
        products exist for all at once), unless `entries` must see the `whole`."""
        positives = self._held_positives(positives)

        def of_part(cosines: Tensor, part: slice) -> Tensor:
            """[4, queries]"""
            labels, plain = positives.labels(part), cosines.detach()
            values = entries(self.without_own(cosines, left_out, part), labels)
            values = self.without_own(values, 0.0, part)
            if positives.weights is not None:
                values = values * positives.importance(part)
            pulls, near = torch.linalg.vecdot(values, labels), torch.linalg.vecdot(plain, labels)
            return torch.stack([values.sum(1), pulls, plain.sum(1), near])

        parts = torch.stack(over_parts(of_part, self._of_all(query), getattr(self.held, name), whole))
        total, of_positives, cosines, near = self.sharding.totals(parts.sum(0))
        return Sums(total, of_positives, cosines.detach(), near.detach())

    def products(self, name: str, query: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch rows"]:
        """Of one process' whole dictionary, the rows that a query leaves out as well: for losses that look at all rows
        at once."""
        assert self.sharding.world == 1
        (cosines,) = over_parts(lambda products, _: products, query, getattr(self.held, name), whole=True)
        return cosines

    def without_own(self, values: Tensor, left_out: float, part: slice = slice(None)) -> Tensor:
        """`left_out` in the place of the values of rows that a query leaves out."""
        return values if self.exclude is None else values.masked_fill(self.exclude[:, part], left_out)

    def _of_all(self, query: Float[Tensor, "batch dim"]) -> Float[Tensor, "world_batch dim"]:
        """The queries of all processes, gathered once: a step asks several times with the same ones."""
        if self.sharding.world == 1:
            return query
        if id(query) not in self._gathered:
            self._gathered[id(query)] = (query, self.sharding.gathered(query))
        return self._gathered[id(query)][1]

    def _held_positives(self, positives: Positives) -> Positives:
        """For the queries of all processes: their positives among the rows held here, by place there."""
        if self.sharding.world == 1:
            return positives
        known = [positives.slots, positives.present, *([] if positives.weights is None else [positives.weights])]
        return Positives(*gather(known)).held(self.sharding)
