"""Searches of growing dictionaries, timed in turns: the exact back-ends of mls/core/matching.py, and the
approximate index of mls/frozen/index.py with its recall."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mls.chunks import chunks
from mls.core import matching
from mls.frozen.index import Approximate
from mls.tools.bench.memory import peak_bytes, peak_of_process

GROUPS = 1000  # clusters of the synthetic rows
SHARE = 0.3  # of the free memory that rows may take: they exist once, and the index beside them


@dataclass(frozen=True)
class Search:
    name: str
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


def searches(device: str, batch: int, count: int, width: int, k: int, rounds: int) -> list[Search]:
    rows, queries = features(count, width, 1, device), features(batch, width, 2, device)
    times = matching.seconds_of_each(queries, rows, k, rounds)
    found = []
    for name in sorted(times, reverse=True):
        matcher = matching.build(name)
        peak = _peak(lambda matcher=matcher: matcher.topk(queries, rows, k), device)
        found.append(Search(name, width, count, times[name], peak))
    if device == "cpu":
        found.append(_approximate(queries, rows, k, rounds))
    return found


def _approximate(queries: Tensor, rows: Tensor, k: int, rounds: int) -> Search:
    """It is built for data that do not change, so its building is no part of a search."""
    began = time.perf_counter()
    index = Approximate(rows)
    built, times = time.perf_counter() - began, []
    exact = matching.build("torch").topk(queries, rows, k).indices
    for _ in range(rounds):
        began = time.perf_counter()
        found = index.search(queries, k).indices
        times.append(time.perf_counter() - began)
    recall = (found[:, :, None] == exact[:, None]).any(2).float().mean().item()
    peak = _peak(lambda: index.search(queries, k), "cpu")
    return Search("IVF-PQ", rows.shape[1], len(rows), statistics.median(times), peak, recall, built)


def _peak(work: Callable[[], object], device: str) -> int:
    """What torch allocates, or what the process holds more where that is more: faiss has memory of its own."""
    return max(peak_bytes(work, device), peak_of_process(work, device) or 0)


def exponents(found: list[Search]) -> dict[str, float]:
    """How time grows with rows: the slope of a line through the logarithms, of the widest vectors measured.

    >>> exponents([Search("torch", 512, rows, 2.0 * rows, 0) for rows in (10, 100, 1000)])
    {'torch': 1.0}
    """
    slopes, width = {}, max(search.width for search in found)
    for name in dict.fromkeys(search.name for search in found):
        points = [(math.log(s.rows), math.log(s.seconds)) for s in found if (s.name, s.width) == (name, width)]
        if len(points) > 1:
            slopes[name] = round(statistics.linear_regression(*zip(*points, strict=True)).slope, 6)
    return slopes
