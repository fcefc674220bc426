"""Neighbours among features that do not change: exact while they are few, through an IVF-PQ index when they are many.
A training's step, whose rows change and whose answers must be exact, uses matching.py."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.core import matching
from mls.core.matching import Matches
from mls.errors import ConfigError

EXACT_UP_TO = 1 << 18  # rows; with fewer all searches together take less time than building an index
AT_ONCE = 1 << 14  # rows of a memory-mapped file that are in memory together
QUERIES = 1 << 10  # that are compared with them together
WIDTH = 256  # principal components that the approximate index keeps
CANDIDATES = 10  # times k rows are looked up and compared exactly
PROBED = 16  # one of so many lists is searched


class Index(Protocol):
    def search(self, queries: Float[Tensor, "batch dim"], k: int) -> Matches:
        """The k rows with the largest cosine."""
        ...


def build(features: Float[Tensor, "rows dim"], path: Path | None = None) -> Index:
    """For features that may be memory-mapped, of any length. `path` keeps an index that took time to build.

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
        parts = F.normalize(queries.float(), dim=1).split(QUERIES)
        best: list[Matches | None] = [None] * len(parts)
        for start in range(0, len(self.features), AT_ONCE):
            rows = F.normalize(self.features[start : start + AT_ONCE].float(), dim=1)
            for number, part in enumerate(parts):
                found = self.matcher.topk(part, rows, min(k, len(rows)))
                found, before = Matches(found.indices + start, found.scores), best[number]
                best[number] = found if before is None else matching.merge(before, found, k)
        return _together([found for found in best if found is not None])


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
            for start in range(0, len(features), AT_ONCE):
                self.index.add(_unit(features[start : start + AT_ONCE]))
            if path is not None:
                temporary = path.with_name(f".{path.name}.{os.getpid()}")
                faiss.write_index(self.index, str(temporary))
                os.replace(temporary, path)
        lists = faiss.extract_index_ivf(self.index)
        lists.nprobe = max(8, lists.nlist // PROBED)

    def search(self, queries: Float[Tensor, "batch dim"], k: int) -> Matches:
        matching.check_k(k, len(self.features))
        candidates, found = min(CANDIDATES * k, len(self.features)), []
        for part in F.normalize(queries.float(), dim=1).split(QUERIES // 16):
            _, ids = self.index.search(part.numpy(), candidates)
            ids = torch.from_numpy(ids)
            rows = F.normalize(self.features[ids.clamp(min=0)].float(), dim=2)  # [part, candidates, dim]
            cosines = torch.einsum("qd,qcd->qc", part, rows).masked_fill(ids < 0, -torch.inf)
            best = cosines.topk(k, dim=1)
            found.append(Matches(ids.gather(1, best.indices), best.values))
        return _together(found)


def _trained(faiss: Any, features: Tensor) -> Any:
    """Distances between unit vectors order them as cosines do, and principal components keep them best."""
    count, dim = features.shape
    lists, width = 2 ** round(math.log2(math.sqrt(count))), min(dim, WIDTH)
    components = f"PCAR{width}," if dim > width else ""
    # Codes of 4 bits: to train those of 8 took 150 s for 4,096 rows, these half a second.
    index = faiss.index_factory(dim, f"{components}IVF{lists},PQ{max(1, width // 2)}x4fs", faiss.METRIC_L2)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.cp.min_points_per_centroid = ivf.pq.cp.min_points_per_centroid = 1  # else it complains of few rows
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 64 * lists].sort().values
    index.train(_unit(features[sample]))
    return index


def _unit(features: Tensor) -> Any:
    return F.normalize(features.float(), dim=1).numpy()


def _together(parts: list[Matches]) -> Matches:
    return Matches(torch.cat([part.indices for part in parts]), torch.cat([part.scores for part in parts]))
