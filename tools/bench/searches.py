"""Searches of growing dictionaries, timed in turns: the exact back-ends of mls/core/matching.py, and the
approximate index of mls/frozen/index.py with its recall."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mls.chunks import chunks
from mls.core import matching
from mls.frozen.index import Approximate
from mls.tools.bench.memory import peak_bytes, peak_of_process
from mls.tools.bench.timing import median_seconds

GROUPS = 1000  # clusters of the synthetic rows
SHARE = 0.3  # of the free memory that rows may take: they exist once, and the index beside them


@dataclass(frozen=True)
class Search:
    name: str
    queries: int
    width: int
    rows: int
    seconds: float
    peak: int  # bytes beyond what was there
    recall: float | None = None  # of an approximate index: the share of the true k that it found
    built: float = 0.0  # seconds that its index took


def fits(rows: int, width: int, device: str) -> bool:
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        known = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(known[1]) if known else math.inf
    return 4 * rows * width < SHARE * free


def features(count: int, width: int, seed: int, device: str = "cpu") -> Tensor:
    """Unit vectors in groups, whose directions matter less and less, as a network's features."""
    stream = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -0.5
    groups = torch.randn(GROUPS, width, generator=torch.Generator().manual_seed(0)) * scale
    out = torch.empty(count, width)
    for rows in chunks(count, 1 << 16):
        part = out[rows]
        noise = torch.randn(part.shape, generator=stream) * scale
        part.copy_(F.normalize(groups[torch.randint(GROUPS, (len(part),), generator=stream)] + noise, dim=1))
    return out.to(device)


def searches(device: str, batches: Sequence[int], count: int, width: int, k: int, rounds: int) -> list[Search]:
    """Each number of queries with each back-end; on a CPU the approximate index as well."""
    rows, all_queries = features(count, width, 1, device), features(max(batches), width, 2, device)
    began, found = time.perf_counter(), []
    index = Approximate(rows) if device == "cpu" else None  # for data that do not change: building is no search
    built = time.perf_counter() - began
    for queries in map(all_queries.__getitem__, map(slice, batches)):
        times = matching.seconds_of_each(queries, rows, k, rounds)
        for name in sorted(times, reverse=True):
            matcher = matching.build(name)
            peak = _peak(lambda matcher=matcher, queries=queries: matcher.topk(queries, rows, k), device)
            found.append(Search(name, len(queries), width, count, times[name], peak))
        if index is not None:
            found.append(_approximate(index, built, queries, rows, k, rounds))
    return found


def _approximate(index: Approximate, built: float, queries: Tensor, rows: Tensor, k: int, rounds: int) -> Search:
    exact = matching.build("torch").topk(queries, rows, k).indices
    seconds = median_seconds({"": lambda: index.search(queries, k)}, "cpu", rounds)[""]
    recall = (index.search(queries, k).indices[:, :, None] == exact[:, None]).any(2).float().mean().item()
    peak = _peak(lambda: index.search(queries, k), "cpu")
    return Search("IVF-PQ", len(queries), rows.shape[1], len(rows), seconds, peak, recall, built)


def _peak(work: Callable[[], object], device: str) -> int:
    """What torch allocates, or what the process holds more where that is more: faiss has memory of its own."""
    return max(peak_bytes(work, device), peak_of_process(work, device) or 0)


def exponents(found: list[Search]) -> dict[str, float]:
    """How time grows with rows: the slope of a line through the logarithms, of the widest vectors and most queries.

    >>> exponents([Search("torch", 1, 512, rows, 2.0 * rows, 0) for rows in (10, 100, 1000)])
    {'torch': 1.0}
    """
    slopes, largest = {}, max((search.width, search.queries) for search in found)
    for name in dict.fromkeys(search.name for search in found):
        of = [search for search in found if (search.name, (search.width, search.queries)) == (name, largest)]
        points = [(math.log(search.rows), math.log(search.seconds)) for search in of]
        if len(points) > 1:
            slopes[name] = round(statistics.linear_regression(*zip(*points, strict=True)).slope, 6)
    return slopes
