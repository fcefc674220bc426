"""Nearest neighbours among features that do not change: exact for few rows, through an IVF-PQ index for many. Matching
in a training step, where rows change and the search must be exact, is in core/matching.py."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.chunks import chunks
from mls.core import matching
from mls.core.matching import Matcher, Matches
from mls.errors import ConfigError
from mls.models.finite import finite

EXACT_UP_TO = 1 << 18  # rows; with fewer, exact searches take less time than building an index
ROWS = 1 << 14  # of a memory-mapped file that are in memory together
QUERIES = 1 << 10  # that are compared with these rows together
WIDTH = 256  # principal components that the approximate index keeps
CANDIDATES = 10  # times k rows come from the index and are compared exactly
PROBED = 16  # one in PROBED lists of the index is searched


class Index(Protocol):
    def search(self, queries: Float[Tensor, "batch dim"], k: int) -> Matches:
        """The k rows with the largest cosine."""
        ...


def build(features: Float[Tensor, "rows dim"], path: Path | None = None) -> Index:
    """The features may be memory-mapped and of any length. `path`: the file of an index that takes time to build.

    >>> build(torch.tensor([[3.0, 0.0], [0.0, 0.1]])).search(torch.tensor([[0.0, 7.0]]), k=1).indices
    tensor([[1]])
    """
    return Exact(features) if len(features) <= EXACT_UP_TO else Approximate(features, path)


class Exact:
    def __init__(self, features: Float[Tensor, "rows dim"]) -> None:
        self.features = features
        try:
            self.matcher = matching.build("faiss")
        except ConfigError:
            self.matcher = matching.build("torch")

    def search(self, queries: Float[Tensor, "batch dim"], k: int) -> Matches:
        matching.check_k(k, len(self.features))
        return exact_search(self.features, queries, k, self.matcher)


def exact_search(
    rows: Float[Tensor, "rows dim"], queries: Float[Tensor, "batch dim"], k: int, matcher: Matcher
) -> Matches:
    """The k rows of largest cosine to each query. Rows are read once, a chunk at a time: they may be memory-mapped."""
    best: dict[int, Matches] = {}
    for chunk in chunks(len(rows), ROWS):
        some = F.normalize(finite(rows[chunk].float()), dim=1)
        for number, part in enumerate(queries.split(QUERIES)):
            found = matcher.topk(F.normalize(finite(part.float()), dim=1), some, min(k, len(some)))
            found = Matches(found.indices + chunk.start, found.scores)
            best[number] = matching.merge(best[number], found, k) if number in best else found
    return _concatenated(list(best.values()))


class Approximate:
    """IVF-PQ on the principal components; its candidates are compared exactly, so the cosines are true and only a
    neighbour may be missed (`mls bench matching` measures how many are found)."""

    def __init__(self, features: Float[Tensor, "rows dim"], path: Path | None = None) -> None:
        import faiss

        self.features = features
        if path is not None and path.is_file():
            self.index = faiss.read_index(str(path))
        else:
            self.index = _trained(faiss, features)
            for chunk in chunks(len(features), ROWS):
                self.index.add(_unit(features[chunk]))
            if path is not None:
                temporary = path.with_name(f".{path.name}.{os.getpid()}")
                faiss.write_index(self.index, str(temporary))
                os.replace(temporary, path)
        lists = faiss.extract_index_ivf(self.index)
        lists.nprobe = max(8, lists.nlist // PROBED)

    def search(self, queries: Float[Tensor, "batch dim"], k: int) -> Matches:
        matching.check_k(k, len(self.features))
        candidates, found = min(CANDIDATES * k, len(self.features)), []
        for part in F.normalize(finite(queries.float()), dim=1).split(QUERIES // 16):
            _, ids = self.index.search(part.numpy(), candidates)
            ids = torch.from_numpy(ids)
            rows = F.normalize(self.features[ids.clamp(min=0)].float(), dim=2)  # [part, candidates, dim]
            cosines = torch.einsum("qd,qcd->qc", part, rows).masked_fill(ids < 0, -torch.inf)
            best = cosines.topk(k, dim=1)
            found.append(Matches(ids.gather(1, best.indices), best.values))
        return _concatenated(found)


def _trained(faiss: Any, features: Tensor) -> Any:
    """Distances between unit vectors have the order of their cosines; principal components change them least."""
    count, dim = features.shape
    lists, width = 2 ** round(math.log2(math.sqrt(count))), min(dim, WIDTH)
    components = f"PCAR{width}," if dim > width else ""
    # Codes of 4 bits: training codes of 8 bits took 150 s for 4,096 rows, these take half a second.
    index = faiss.index_factory(dim, f"{components}IVF{lists},PQ{max(1, width // 2)}x4fs", faiss.METRIC_L2)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.cp.min_points_per_centroid = ivf.pq.cp.min_points_per_centroid = 1  # no warning about few rows
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 64 * lists].sort().values
    index.train(_unit(features[sample]))
    return index


def _unit(features: Tensor) -> Any:
    return F.normalize(finite(features.float()), dim=1).numpy()


def _concatenated(parts: list[Matches]) -> Matches:
    return Matches(torch.cat([part.indices for part in parts]), torch.cat([part.scores for part in parts]))
