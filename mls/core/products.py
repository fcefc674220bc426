"""What is taken from the products of queries and rows, a part of the rows at a time: with many rows no tensor of
batch x rows exists, neither in the forward pass nor in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mls.chunks import chunks, rows_within

ENTRIES = 1 << 21  # products that may exist at once: 8 MiB in fp32
NOTHING = -1e4  # the logit of a row that is left out. Not -inf: the gradient of a log-sum-exp of nothing else is NaN


@dataclass(frozen=True)
class OwnRows:
    """A mask [queries, rows], True where a row came from the query's own image. It is indexed like a tensor, and only
    the columns that are asked for are computed.

    >>> OwnRows(torch.tensor([7, 8]), torch.tensor([8, 9, 7]))[:, 1:]
    tensor([[False,  True],
            [False, False]])
    """

    queries: Int64[Tensor, "batch"]  # the images' numbers
    rows: Int64[Tensor, "rows"]

    def __getitem__(self, key: tuple[slice, slice]) -> Bool[Tensor, "queries part"]:
        queries, part = key
        return self.queries[queries, None] == self.rows[None, part]

    def counts(self) -> Int64[Tensor, "batch"]:
        """How many rows are a query's own."""
        size = rows_within(ENTRIES, len(self.queries))
        parts = [self[:, part].sum(dim=1) for part in chunks(len(self.rows), size)]
        return torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(self.queries)


Mask = Bool[Tensor, "batch rows"] | OwnRows  # True: this row is left out for this query


def over_parts(
    function: Callable[[Tensor, slice], Tensor],
    query: Float[Tensor, "batch dim"],
    rows: Float[Tensor, "rows dim"],
    whole: bool = False,
) -> list[Tensor]:
    """`function(products, part)` for one part of the rows after the other, products [batch, part] in at least fp32.

    Where there are several parts, each is worked out again in the backward pass and nothing of it is kept until then.
    `rows` get no gradient and must stay as they are until the backward pass. `whole` makes one part of all rows.

    >>> over_parts(lambda products, part: products.sum(1), torch.ones(1, 2), torch.ones(3, 2))
    [tensor([6.])]
    """

    def of_part(query: Tensor, part: slice) -> Tensor:
        # Autocast would turn the product to half precision.
        with torch.autocast(query.device.type, enabled=False):
            return function(query @ rows[part].to(query.dtype).T, part)

    query = query.to(torch.promote_types(query.dtype, torch.float32))
    size = max(1, len(rows)) if whole else rows_within(ENTRIES, len(query))
    parts = list(chunks(len(rows), size))
    if len(parts) == 1:
        return [of_part(query, parts[0])]
    return [checkpoint(of_part, query, part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def log_sum_exp(
    query: Float[Tensor, "batch dim"],
    rows: Float[Tensor, "rows dim"],
    temperature: float,
    exclude: Mask | None = None,
) -> Float[Tensor, "batch"]:
    """log sum_n exp(query . row_n / temperature). No row at all gives a number far below every logit.

    >>> log_sum_exp(torch.eye(2), torch.eye(2), temperature=1.0)  # log(e + 1)
    tensor([1.3133, 1.3133])
    """

    def of_part(products: Tensor, part: slice) -> Tensor:
        logits = products / temperature
        if exclude is not None:
            logits = logits.masked_fill(exclude[:, part], NOTHING)
        return logits.logsumexp(dim=1)

    parts = over_parts(of_part, query, rows)
    if not parts:
        return query.new_full((len(query),), NOTHING)
    return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(dim=0)
