"""Matching: which rows of the dictionary are nearest to a query. Every back-end gives the same answer: scores to 1e-5,
indices wherever the scores differ by more than that."""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Matches:
    """The rows nearest to each query, nearest first."""

    indices: Int64[Tensor, "batch k"]
    scores: Float[Tensor, "batch k"]


@runtime_checkable
class Matcher(Protocol):
    def topk(
        self,
        queries: Float[Tensor, "batch dim"],
        rows: Float[Tensor, "rows dim"],
        k: int,
        exclude: Bool[Tensor, "batch rows"] | None = None,
    ) -> Matches:
        """The k rows with the largest inner product. Where `exclude` is True a row may not be matched."""
        ...


class TorchMatcher:
    """Matrix product and top-k in fp32, `chunk` rows at a time: no more than batch x chunk scores exist at once.

    >>> rows = torch.eye(4)
    >>> TorchMatcher().topk(torch.tensor([[0.1, 0.5, 0.0, 0.9]]), rows, k=2).indices
    tensor([[3, 1]])
    """

    def __init__(self, chunk: int = 16384) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk {chunk} leaves no rows to match: set chunk to 1 or more")
        self.chunk = chunk

    @torch.no_grad()
    def topk(
        self,
        queries: Float[Tensor, "batch dim"],
        rows: Float[Tensor, "rows dim"],
        k: int,
        exclude: Bool[Tensor, "batch rows"] | None = None,
    ) -> Matches:
        check_k(k, len(rows))
        best: Matches | None = None
        for start in range(0, len(rows), self.chunk):
            part = slice(start, start + self.chunk)
            found = _topk(queries, rows[part], k, None if exclude is None else exclude[:, part])
            found = Matches(found.indices + start, found.scores)
            best = found if best is None else _merge(best, found, k)
        assert best is not None
        if exclude is not None and torch.isneginf(best.scores[:, -1]).any():
            allowed = int((~exclude).sum(1).min())
            raise ConfigError(
                f"a query may be matched with {allowed} rows only, fewer than k = {k}: lower objective.k, "
                "or set dictionary.own_rows=keep"
            )
        return best


def check_k(k: int, rows: int) -> None:
    """Every back-end's first question."""
    if not 1 <= k <= rows:
        raise ConfigError(f"k = {k} matches cannot be found among {rows} rows: choose k from 1 to {rows}")


def _topk(queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None) -> Matches:
    # Autocast would turn the product to bf16, where a hundredth of a cosine is lost and neighbours swap places.
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ rows.float().T  # [batch, chunk]
    if exclude is not None:
        scores = scores.masked_fill(exclude, -torch.inf)
    values, indices = scores.topk(min(k, len(rows)), dim=1)
    return Matches(indices, values)


def _merge(first: Matches, second: Matches, k: int) -> Matches:
    """The best k of two: exact, since a row among the best of all is among the best of its part."""
    scores = torch.cat([first.scores, second.scores], dim=1)
    indices = torch.cat([first.indices, second.indices], dim=1)
    values, places = scores.topk(min(k, scores.shape[1]), dim=1)
    return Matches(indices.gather(1, places), values)


MATCHERS: dict[str, type[Matcher]] = {"torch": TorchMatcher}


def names() -> list[str]:
    return sorted(MATCHERS)


def build(name: str, **options: Any) -> Matcher:
    """
    >>> build("torch", chunk=1024).chunk
    1024
    """
    if name not in MATCHERS:
        raise unknown_name("matcher", name, names())
    known = inspect.signature(MATCHERS[name]).parameters
    for option in options:
        if option not in known:
            raise unknown_name(f"option of matcher {name}", option, known)
    return MATCHERS[name](**options)
